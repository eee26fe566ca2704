"""News by topic: world, sports, business, or science and technology. Not medical: a public yardstick for reading texts.

The columns of AG's corpus as Zhang, Zhao & LeCun 2015 cut it, https://arxiv.org/abs/1509.01626.
"""

from __future__ import annotations

from wardround.common.tasks.base import Task
from wardround.common.tasks.networks import one_of
from wardround.common.tasks.text import TextSchema
from wardround.common.tasks.word_augment import fewer_words

SCHEMA = TextSchema(
    length=48,
    buckets=19_999,  # 20,000 rows of an embedding, padding included
    labels=(("1", "World"), ("2", "Sports"), ("3", "Business"), ("4", "Sci/Tech")),
    columns=("label", "title", "description"),
)

news_topics = Task(
    name="news-topics",
    title="News by topic",
    schema=SCHEMA,
    augment=fewer_words,
    build=one_of("text-rnn", "transformer", vocabulary=SCHEMA.codes, length=SCHEMA.length, classes=SCHEMA.classes),
    headline="accuracy",
    metrics=("accuracy", "balanced_accuracy", "f1", "log_loss"),
)
