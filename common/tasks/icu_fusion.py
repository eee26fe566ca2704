"""Death after the first day in intensive care, in the eICU demo: hourly findings alone, or beside the APACHE table.

The hourly variables are those of YAIB (van de Water et al. 2024, https://arxiv.org/abs/2306.05109), the table what APACHE IV
reads on the first day (Zimmerman et al. 2006, https://doi.org/10.1097/01.CCM.0000215112.84523.F0). Centres and scales are
textbook values of a critically ill adult, not statistics of these patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from wardround.common.errors import ConfigError
from wardround.common.models import MODELS
from wardround.common.tasks.base import Task
from wardround.common.tasks.series import SeriesSchema, Variable
from wardround.common.tasks.table import Column

VARIABLES = (
    Variable("hr", "heart rate, per minute", 10, 300, centre=85, scale=20),
    Variable("sbp", "systolic pressure, mm Hg", 20, 300, centre=120, scale=22),
    Variable("dbp", "diastolic pressure, mm Hg", 5, 200, centre=63, scale=14),
    Variable("map", "mean pressure, mm Hg", 10, 250, centre=80, scale=16),
    Variable("resp", "breaths, per minute", 2, 80, centre=18, scale=6),
    Variable("o2sat", "oxygen saturation, %", 30, 100, centre=97, scale=3),
    Variable("temp", "temperature, degrees Celsius", 25, 45, centre=37, scale=0.8),
    Variable("urine", "urine in the hour, ml", 0, 5000, centre=100, scale=150),
    Variable("fio2", "oxygen breathed in, %", 20, 100, centre=45, scale=20),
    Variable("ph", "of arterial blood", 6.5, 8, centre=7.4, scale=0.08),
    Variable("pco2", "carbon dioxide in arterial blood, mm Hg", 8, 200, centre=40, scale=10),
    Variable("po2", "oxygen in arterial blood, mm Hg", 15, 700, centre=110, scale=60),
    Variable("be", "base excess, mmol/l", -40, 40, centre=0, scale=5),
    Variable("bicar", "bicarbonate, mmol/l", 3, 60, centre=24, scale=4.5),
    Variable("lact", "lactate, mmol/l", 0.1, 35, centre=2, scale=2),
    Variable("methb", "methaemoglobin, %", 0, 60, centre=0.5, scale=0.5),
    Variable("bun", "urea nitrogen, mg/dl", 1, 250, centre=22, scale=18),
    Variable("crea", "creatinine, mg/dl", 0.05, 30, centre=1.1, scale=1),
    Variable("na", "sodium, mmol/l", 90, 190, centre=139, scale=5),
    Variable("k", "potassium, mmol/l", 1, 12, centre=4.1, scale=0.6),
    Variable("cl", "chloride, mmol/l", 60, 150, centre=104, scale=6),
    Variable("ca", "calcium, mg/dl", 3, 20, centre=8.5, scale=0.8),
    Variable("cai", "ionised calcium, mmol/l", 0.3, 3, centre=1.15, scale=0.1),
    Variable("mg", "magnesium, mg/dl", 0.3, 10, centre=2, scale=0.4),
    Variable("phos", "phosphate, mg/dl", 0.1, 20, centre=3.5, scale=1.3),
    Variable("glu", "glucose, mg/dl", 15, 1500, centre=140, scale=50),
    Variable("wbc", "white cells, 1000/ul", 0.05, 500, centre=11, scale=6),
    Variable("neut", "neutrophils, %", 0, 100, centre=78, scale=13),
    Variable("bnd", "band forms, %", 0, 100, centre=5, scale=10),
    Variable("lymph", "lymphocytes, %", 0, 100, centre=12, scale=9),
    Variable("hgb", "haemoglobin, g/dl", 2, 25, centre=10.5, scale=2),
    Variable("mch", "haemoglobin of a red cell, pg", 10, 60, centre=30, scale=2.5),
    Variable("mchc", "haemoglobin in red cells, g/dl", 15, 50, centre=33, scale=1.5),
    Variable("mcv", "volume of a red cell, fl", 40, 160, centre=90, scale=7),
    Variable("plt", "platelets, 1000/ul", 1, 2000, centre=190, scale=100),
    Variable("inr_pt", "prothrombin time, INR", 0.5, 25, centre=1.4, scale=0.6),
    Variable("ptt", "partial thromboplastin time, s", 10, 300, centre=38, scale=18),
    Variable("fgn", "fibrinogen, mg/dl", 20, 2000, centre=350, scale=150),
    Variable("alb", "albumin, g/dl", 0.5, 7, centre=3, scale=0.6),
    Variable("bili", "bilirubin, mg/dl", 0.05, 80, centre=1, scale=2.5),
    Variable("bili_dir", "direct bilirubin, mg/dl", 0, 60, centre=0.5, scale=2),
    Variable("alt", "U/l", 1, 30_000, centre=40, scale=100),
    Variable("ast", "U/l", 1, 40_000, centre=60, scale=150),
    Variable("alp", "U/l", 1, 6000, centre=85, scale=60),
    Variable("ck", "creatine kinase, U/l", 1, 500_000, centre=200, scale=600),
    Variable("ckmb", "creatine kinase MB, ng/ml", 0, 2000, centre=6, scale=15),
    Variable("tnt", "troponin T, ug/l", 0, 60, centre=0.1, scale=0.5),
    Variable("crp", "C-reactive protein, mg/l", 0, 1000, centre=80, scale=80),
)

# eICU writes -1 for not measured
APACHE = (
    Column("age", "years", 15, 110, centre=65, scale=15, absent_values=(-1,)),
    Column("intubated", "yes or no", yes=(1,), no=(0,)),
    Column("vent", "on a ventilator", yes=(1,), no=(0,)),
    Column("dialysis", "yes or no", yes=(1,), no=(0,)),
    Column("eyes", "opening of the eyes, 1 to 4", 1, 4, centre=3.5, scale=1, absent_values=(-1,)),
    Column("motor", "motor response, 1 to 6", 1, 6, centre=5.5, scale=1.2, absent_values=(-1,)),
    Column("verbal", "verbal response, 1 to 5", 1, 5, centre=4, scale=1.5, absent_values=(-1,)),
    Column("urine", "ml a day", 0, 20_000, centre=1700, scale=1000, absent_values=(-1,)),
    Column("wbc", "white cells, 1000/ul", 0.05, 500, centre=11, scale=6, absent_values=(-1,)),
    Column("temperature", "degrees Celsius", 20, 45, centre=36.5, scale=0.8, absent_values=(-1,)),
    Column("respiratoryrate", "per minute", 2, 100, centre=26, scale=12, absent_values=(-1,)),
    Column("sodium", "mmol/l", 90, 190, centre=138, scale=5, absent_values=(-1,)),
    Column("heartrate", "per minute", 10, 300, centre=105, scale=28, absent_values=(-1,)),
    Column("meanbp", "mean pressure, mm Hg", 10, 250, centre=75, scale=35, absent_values=(-1,)),
    Column("ph", "of arterial blood", 6.5, 8, centre=7.37, scale=0.1, absent_values=(-1,)),
    Column("hematocrit", "%", 5, 70, centre=33, scale=6, absent_values=(-1,)),
    Column("creatinine", "mg/dl", 0.05, 30, centre=1.2, scale=1, absent_values=(-1,)),
    Column("albumin", "g/dl", 0.5, 7, centre=2.9, scale=0.6, absent_values=(-1,)),
    Column("pao2", "oxygen in arterial blood, mm Hg", 15, 700, centre=110, scale=60, absent_values=(-1,)),
    Column("pco2", "carbon dioxide in arterial blood, mm Hg", 8, 200, centre=41, scale=12, absent_values=(-1,)),
    Column("bun", "urea nitrogen, mg/dl", 1, 250, centre=24, scale=18, absent_values=(-1,)),
    Column("glucose", "mg/dl", 15, 1500, centre=150, scale=70, absent_values=(-1,)),
    Column("bilirubin", "mg/dl", 0.05, 80, centre=0.9, scale=1.5, absent_values=(-1,)),
    Column("fio2", "oxygen breathed in, %", 20, 100, centre=55, scale=25, absent_values=(-1,)),
    Column("hepaticfailure", "yes or no", yes=(1,), no=(0,)),
    Column("metastaticcancer", "yes or no", yes=(1,), no=(0,)),
    Column("immunosuppression", "yes or no", yes=(1,), no=(0,)),
    Column("cirrhosis", "yes or no", yes=(1,), no=(0,)),
    Column("readmit", "in intensive care before", yes=(1,), no=(0,)),
)

HOURLY = SeriesSchema(VARIABLES, hours=24, step=2)
BOTH = SeriesSchema(VARIABLES, hours=24, step=2, static=APACHE)

BRANCHES = {"both": ("series", "table"), "series": ("series",), "table": ("table",)}


class Branches(nn.Module):
    """A network that is shown some of a record's fields only."""

    def __init__(self, network: nn.Module, fields: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.fields = fields

    def forward(self, series: Tensor, table: Tensor) -> Tensor:
        """(batch, steps, inputs) and (batch, width) -> logits (batch, 2)."""
        given = {"series": series, "table": table}
        logits: Tensor = self.network(**{name: given[name] for name in self.fields})
        return logits


def _fusion(options: Mapping[str, Any]) -> nn.Module:
    rest = dict(options)
    branches = rest.pop("branches", "both")
    if not isinstance(branches, str) or branches not in BRANCHES:
        raise ConfigError(f"model.branches: {branches!r}; there are: {', '.join(BRANCHES)}")
    fields = BRANCHES[branches]
    inputs, features = BOTH.inputs if "series" in fields else 0, BOTH.width if "table" in fields else 0
    return Branches(MODELS["fusion"](rest, inputs=inputs, features=features, channels=0, vocabulary=0, classes=2), fields)


icu_fusion = Task(
    name="icu-fusion",
    title="Death in hospital, from the APACHE table and the first day's hourly findings",
    schema=BOTH,
    build=_fusion,
    metrics=("auroc", "auprc", "balanced_accuracy", "log_loss"),
)

icu_mortality_eicu = Task(
    name="icu-mortality-eicu",
    title="Death in intensive care, from the first day's hourly findings",
    schema=HOURLY,
    build=lambda options: MODELS["series-rnn"](options, inputs=HOURLY.inputs, table=0, classes=2),
    metrics=("auroc", "auprc", "balanced_accuracy", "log_loss"),
)
