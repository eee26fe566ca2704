"""Death in hospital, from the first two days in intensive care.

The variables of the PhysioNet/Computing in Cardiology Challenge 2012 (Silva et al. 2012, https://doi.org/10.13026/C2DTWF).
Centres and scales are textbook values of a critically ill adult, not statistics of these patients. An invasive and a cuff's
blood pressure are one variable here.
"""

from __future__ import annotations

from wardround.common.models import MODELS
from wardround.common.tasks.base import Task
from wardround.common.tasks.series import SeriesSchema, Variable
from wardround.common.tasks.table import Column

SCHEMA = SeriesSchema(
    variables=(
        Variable("HR", "heart rate, per minute", 10, 300, centre=85, scale=20),
        Variable("SysABP", "systolic pressure, mm Hg", 20, 300, centre=120, scale=22, also=("NISysABP",)),
        Variable("DiasABP", "diastolic pressure, mm Hg", 5, 200, centre=60, scale=14, also=("NIDiasABP",)),
        Variable("MAP", "mean pressure, mm Hg", 10, 250, centre=80, scale=16, also=("NIMAP",)),
        Variable("RespRate", "breaths, per minute", 2, 80, centre=18, scale=6),
        Variable("Temp", "temperature, degrees Celsius", 25, 45, centre=37, scale=0.8),
        Variable("SaO2", "oxygen saturation, %", 30, 100, centre=97, scale=3),
        Variable("GCS", "Glasgow coma scale", 3, 15, centre=11, scale=4),
        Variable("Urine", "urine since the last entry, ml", 0, 5000, centre=100, scale=100),
        Variable("FiO2", "share of oxygen breathed in, 0.21 to 1", 0.2, 1, centre=0.5, scale=0.2),
        Variable("MechVent", "on a ventilator, 1", 0, 1, centre=0, scale=1),
        Variable("pH", "of arterial blood", 6.5, 8, centre=7.4, scale=0.08),
        Variable("PaCO2", "carbon dioxide in arterial blood, mm Hg", 8, 200, centre=40, scale=10),
        Variable("PaO2", "oxygen in arterial blood, mm Hg", 15, 700, centre=130, scale=80),
        Variable("HCO3", "bicarbonate, mmol/l", 3, 60, centre=24, scale=4.5),
        Variable("Lactate", "mmol/l", 0.1, 35, centre=2, scale=2),
        Variable("BUN", "urea nitrogen, mg/dl", 1, 250, centre=22, scale=18),
        Variable("Creatinine", "mg/dl", 0.05, 30, centre=1.1, scale=1),
        Variable("Na", "sodium, mmol/l", 90, 190, centre=139, scale=5),
        Variable("K", "potassium, mmol/l", 1, 12, centre=4.1, scale=0.6),
        Variable("Mg", "magnesium, mg/dl", 0.3, 10, centre=2, scale=0.4),
        Variable("Glucose", "mg/dl", 15, 1500, centre=135, scale=50),
        Variable("WBC", "white cells, 1000/ul", 0.05, 500, centre=11, scale=6),
        Variable("HCT", "haematocrit, %", 5, 70, centre=31, scale=5),
        Variable("Platelets", "1000/ul", 1, 2000, centre=190, scale=100),
        Variable("Bilirubin", "mg/dl", 0.05, 80, centre=1, scale=2.5),
        Variable("ALT", "U/l", 1, 30_000, centre=40, scale=100),
        Variable("AST", "U/l", 1, 40_000, centre=60, scale=150),
        Variable("ALP", "U/l", 1, 6000, centre=85, scale=60),
        Variable("Albumin", "g/dl", 0.5, 7, centre=3, scale=0.6),
        Variable("TroponinT", "ug/l", 0, 60, centre=0.1, scale=1),
        Variable("TroponinI", "ug/l", 0, 300, centre=1, scale=8),
        Variable("Cholesterol", "mg/dl", 20, 700, centre=155, scale=45),
    ),
    hours=48,
    step=2,
    static=(
        Column("Age", "years", 15, 110, centre=65, scale=15, absent_values=(-1,)),
        Column("Gender", "1 male, 0 female", yes=(1,), no=(0,), absent_values=(-1,)),
        Column("Height", "cm", 120, 220, centre=170, scale=12, absent_values=(-1,)),
        Column("Weight", "kg", 25, 300, centre=80, scale=20, absent_values=(-1,)),
    ),
)  # fmt: skip

icu_mortality = Task(
    name="icu-mortality",
    title="Death in hospital, from the first two days in intensive care",
    schema=SCHEMA,
    build=lambda options: MODELS["series-rnn"](options, inputs=SCHEMA.inputs, table=SCHEMA.width, classes=2),
    metrics=("auroc", "auprc", "balanced_accuracy", "log_loss"),
)
