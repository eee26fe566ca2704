"""Splice junctions: is the middle of a stretch of DNA where an exon ends, where one begins, or neither?

60 bases, 30 before and 30 behind the place in question, as in the UCI Molecular Biology data set
(https://doi.org/10.24432/C5M888); Noordewier, Towell & Shavlik 1991 set the task. What counts is which base stands where, so
the head of the network reads every place by itself.
"""

from __future__ import annotations

from wardround.common.tasks.base import Task
from wardround.common.tasks.networks import one_of
from wardround.common.tasks.sequences import SequenceSchema

SCHEMA = SequenceSchema(
    length=60,
    alphabet="ACGT",
    unknown="DNRS",  # IUPAC: not C; any; A or G; C or G
    labels=(("EI",), ("IE",), ("N",)),  # exon to intron (donor), intron to exon (acceptor), neither
)

splice_junctions = Task(
    name="splice-junctions",
    title="Splice junctions in DNA",
    schema=SCHEMA,
    build=one_of("sequence-rnn", "transformer", vocabulary=SCHEMA.codes, length=SCHEMA.length, classes=SCHEMA.classes),
    headline="accuracy",
    metrics=("accuracy", "balanced_accuracy", "f1", "auroc", "log_loss"),
)
