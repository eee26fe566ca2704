"""The tasks wardround can train, by name: one file each."""

from wardround.common.registry import registry
from wardround.common.tasks.base import ArraySchema, Column, Records, TableSchema, Task, scores
from wardround.common.tasks.chest_film import chest_film, chest_film_resnet
from wardround.common.tasks.heart_disease import heart_disease

TASKS = registry(heart_disease, chest_film, chest_film_resnet)

__all__ = ["TASKS", "ArraySchema", "Column", "Records", "TableSchema", "Task", "scores"]
