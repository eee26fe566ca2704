"""Records that several hospitals of a simulation hold: where they come from, and whose home each is.

One file a data set. What is embedded needs nothing; the rest is found by `--data DIR` or WARDROUND_DATA.
"""

from wardround.common.registry import registry
from wardround.simulations.cohorts.base import Cohort, Gathered, gather
from wardround.simulations.cohorts.chest_phantom import chest_phantom, chest_phantom_detection, chest_phantom_segmentation
from wardround.simulations.cohorts.chest_xray import chest_xray
from wardround.simulations.cohorts.colour_images import colour_images
from wardround.simulations.cohorts.ecg_beats import ecg_beats
from wardround.simulations.cohorts.icu_fusion import icu_fusion, icu_mortality_eicu
from wardround.simulations.cohorts.icu_mortality import icu_mortality
from wardround.simulations.cohorts.image_synthesis import image_synthesis
from wardround.simulations.cohorts.news_topics import news_topics
from wardround.simulations.cohorts.radiology_reports import radiology_reports
from wardround.simulations.cohorts.splice_junctions import splice_junctions

COHORTS: dict[str, Cohort] = registry(
    chest_phantom,
    chest_phantom_detection,
    chest_phantom_segmentation,
    chest_xray,
    colour_images,
    ecg_beats,
    icu_fusion,
    icu_mortality,
    icu_mortality_eicu,
    image_synthesis,
    news_topics,
    radiology_reports,
    splice_junctions,
)

__all__ = ["COHORTS", "Cohort", "Gathered", "gather"]
