"""Radiology reports of chest films: is the film normal, or does the report name a finding?

The text is the impression and then the findings, as a radiologist wrote them: the answer is often in so many words in it,
and sorting reports is the task. Words become numbers by a hash, see `TextSchema`.
"""

from __future__ import annotations

from wardround.common.tasks.base import Task
from wardround.common.tasks.networks import one_of
from wardround.common.tasks.text import TextSchema

SCHEMA = TextSchema(
    length=64,
    buckets=2000,
    labels=(("normal", "0"), ("abnormal", "1")),
    columns=("impression", "findings", "label"),  # the impression first: what is cut off is the end of the longest findings
)

radiology_reports = Task(
    name="radiology-reports",
    title="Normal and abnormal radiology reports",
    schema=SCHEMA,
    build=one_of("text-rnn", "transformer", vocabulary=SCHEMA.codes, length=SCHEMA.length, classes=SCHEMA.classes),
    metrics=("auroc", "accuracy", "auprc", "balanced_accuracy", "log_loss"),
)
