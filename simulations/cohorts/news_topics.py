"""AG's news over four sites that see the topics in different shares. No patients: each item counts as one.

The same text twice goes to the same site, and to the same side of the held-out split.
"""

from __future__ import annotations

from pathlib import Path

from wardround.client.data.text import load_text
from wardround.client.policy import DataSource
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered
from wardround.simulations.cohorts.shares import at_home

_FILE = "ag_news/test.csv"
_SITES = ("east", "north", "south", "west")
_SHARES = (  # of each topic, by site
    (0.40, 0.30, 0.20, 0.10),  # world
    (0.10, 0.40, 0.30, 0.20),  # sports
    (0.20, 0.10, 0.40, 0.30),  # business
    (0.30, 0.20, 0.10, 0.40),  # science and technology
)


def _read(folder: Path, task: Task) -> Gathered:
    loaded = load_text(DataSource(loader="text", path=folder / _FILE, header=False), task)
    return Gathered(loaded, at_home(loaded.records, _SITES, _SHARES))


news_topics = Cohort(
    name="news-topics",
    origin=(
        "AG's news, test.csv of ag_news_csv as Zhang, Zhao and LeCun cut it (https://arxiv.org/abs/1509.01626), for research "
        "and other non-commercial use; put it into ag_news/."
    ),
    files=(_FILE,),
    read=_read,
)
