"""The tasks wardround can train, by name: one file each."""

from wardround.common.plan import StudyPlan
from wardround.common.registry import look_up, registry
from wardround.common.tasks.arrays import ArraySchema
from wardround.common.tasks.base import Records, Schema, Task
from wardround.common.tasks.chest_phantom import chest_phantom, chest_phantom_detection, chest_phantom_segmentation
from wardround.common.tasks.chest_xray import chest_xray
from wardround.common.tasks.colour_images import colour_images
from wardround.common.tasks.ecg_beats import ecg_beats
from wardround.common.tasks.heart_disease import heart_disease
from wardround.common.tasks.icu_fusion import icu_fusion, icu_mortality_eicu
from wardround.common.tasks.icu_mortality import icu_mortality
from wardround.common.tasks.image_synthesis import image_synthesis
from wardround.common.tasks.images import ImageSchema
from wardround.common.tasks.news_topics import news_topics
from wardround.common.tasks.of_plan import with_options
from wardround.common.tasks.radiology_reports import radiology_reports
from wardround.common.tasks.splice_junctions import splice_junctions
from wardround.common.tasks.table import Column, TableSchema

TASKS = registry(
    chest_phantom,
    chest_phantom_detection,
    chest_phantom_segmentation,
    chest_xray,
    colour_images,
    ecg_beats,
    heart_disease,
    icu_fusion,
    icu_mortality,
    icu_mortality_eicu,
    image_synthesis,
    news_topics,
    radiology_reports,
    splice_junctions,
)


def task_of(plan: StudyPlan, shares: tuple[float, ...] | None = None) -> Task:
    """The task that `plan` trains, its loss as the plan wants it; `shares` of the classes where the plan has them counted.

    Raises:
        ConfigError: no such task; or an option of [loss] or [local] that the task has no use for.
    """
    return with_options(look_up("task", plan.task, TASKS), plan, shares)


__all__ = ["TASKS", "ArraySchema", "Column", "ImageSchema", "Records", "Schema", "TableSchema", "Task", "task_of"]
