"""Heart disease from thirteen routine findings: narrowing of a coronary artery by more than half, yes or no.

The columns of the UCI heart disease files (Detrano et al. 1989, https://doi.org/10.24432/C52P4X). Centres and scales are
textbook values of an adult with chest pain, not statistics of these patients.
"""

from __future__ import annotations

from wardround.common.models import MODELS
from wardround.common.tasks.base import Task
from wardround.common.tasks.table import Column, TableSchema

SCHEMA = TableSchema(
    columns=(
        Column("age", "years", 18, 110, centre=50, scale=10, may_be_missing=False),
        Column("sex", "1 male, 0 female", yes=(1,), no=(0,), may_be_missing=False),
        Column("no pain", "chest pain 4, none", yes=(4,), no=(1, 2, 3), may_be_missing=False, read_from="cp"),
        Column("atypical", "chest pain 2, atypical angina", yes=(2,), no=(1, 3, 4), may_be_missing=False, read_from="cp"),
        Column("trestbps", "resting blood pressure, mm Hg", 50, 260, centre=130, scale=20, absent_values=(0,)),
        Column("chol", "serum cholesterol, mg/dl; Zurich and Basel write 0 for not measured", 50, 700, centre=240,
               scale=50, absent_values=(0,)),
        Column("fbs", "fasting blood sugar above 120 mg/dl", yes=(1,), no=(0,)),
        Column("restecg", "resting ECG: 1 ST-T abnormality, 2 hypertrophy, 0 normal", yes=(1, 2), no=(0,)),
        Column("thalach", "highest heart rate under exercise, per minute", 40, 230, centre=140, scale=25),
        Column("exang", "angina under exercise", yes=(1,), no=(0,)),
        Column("oldpeak", "ST depression under exercise, mm", -5, 10, centre=1, scale=1),
        Column("slope", "ST segment under exercise: 2 flat, 3 down, 1 up", yes=(2, 3), no=(1,)),
        Column("ca", "major vessels coloured by fluoroscopy: any, or 0", yes=(1, 2, 3), no=(0,)),
        Column("thal", "thallium scan: 6 fixed or 7 reversible defect, 3 normal", yes=(6, 7), no=(3,)),
    ),
    label="num",
    positive_above=0,
    label_range=(0, 4),
    scale=2,
)  # fmt: skip

heart_disease = Task(
    name="heart-disease",
    title="Coronary heart disease from routine findings",
    schema=SCHEMA,
    build=lambda options: MODELS["mlp"](options, features=SCHEMA.width, classes=2),
)
