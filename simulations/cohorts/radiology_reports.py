"""The Indiana University chest film reports, at home by the maker of the archive that their films passed through.

Many reports are templates: the same words about different patients. Reports with the same tokens have one home, the maker
that most of them name, and one side of the split. That side is decided by a hash of the tokens, so no seed of a study moves it;
otherwise a quarter of the figures' reports would be ones that were trained on.

The reports come "from multiple hospital systems" that are not named; the DICOM headers' Private Creator is the nearest thing
to one. A report is a patient. One without findings is left out. Label: what the report is indexed with is "normal" alone.

The licence (CC BY-NC-ND 4.0) forbids changed copies, so nothing of it is embedded: the files are read out of the data folder,
or where the installed package torchxrayvision has brought them. That package is not imported.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.util
import io
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import torch

from wardround.client.data.text import load_text
from wardround.client.policy import DataSource
from wardround.common.errors import ConfigError
from wardround.common.tasks import Task
from wardround.simulations.cohorts.base import Cohort, Gathered

REPORTS, HEADERS = "iu_xray_reports/NLMCXR_reports.tgz", "iu_xray_reports/nlmcxr_dicom_metadata.csv.gz"
HELD_OUT = 0.25  # of the different texts; of the reports, 0.248
_MAKERS = ("agfa", "mitra", "siemens")  # and "other"


def brought() -> Path | None:
    """The folder in which torchxrayvision has brought the same two files; None where it is not installed."""
    found = importlib.util.find_spec("torchxrayvision")
    places = (found.submodule_search_locations if found else None) or []
    return next((Path(place) / "data" for place in places if (Path(place) / "data" / Path(REPORTS).name).exists()), None)


def _read(folder: Path, task: Task) -> Gathered:
    reports, headers = (folder / name if (folder / name).exists() else folder / Path(name).name for name in (REPORTS, HEADERS))
    try:
        rows = _reports(reports)
        maker = _makers(headers)
    except (OSError, EOFError, KeyError, UnicodeDecodeError, csv.Error, tarfile.TarError, ElementTree.ParseError) as error:
        raise ConfigError(f"{reports} and {headers.name} are not those of the Indiana University collection: {error}") from None
    with tempfile.TemporaryDirectory() as private:
        # as a hospital would hand its reports over, so that its own loader reads them
        path = Path(private) / "reports.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("patient", "impression", "findings", "label"), *rows])
        loaded = load_text(DataSource(loader="text", path=path, patient_column="patient"), task)
    texts = [row.numpy().tobytes() for row in loaded.records.fields["tokens"]]
    held_out = torch.tensor([_place(text) < HELD_OUT for text in texts])
    return Gathered(replace(loaded, held_out=held_out), _homes(texts, [maker.get(patient, "other") for patient, *_ in rows]))


def _place(text: bytes) -> float:
    """A number in [0, 1) that depends on the tokens alone."""
    return int.from_bytes(hashlib.sha256(b"held out/" + text).digest()[:8], "big") / 2**64


def _homes(texts: Sequence[bytes], makers: Sequence[str]) -> list[str]:
    """For each report, the maker that most reports with its tokens name, the first by name where two are even."""
    named: dict[bytes, Counter[str]] = defaultdict(Counter)
    for text, maker in zip(texts, makers, strict=True):
        named[text][maker] += 1
    home = {text: _most_named(found) for text, found in named.items()}
    return [home[text] for text in texts]


def _most_named(makers: Counter[str]) -> str:
    return min(makers, key=lambda maker: (-makers[maker], maker))


def _reports(path: Path) -> list[tuple[str, str, str, str]]:
    """Patient, impression, findings and label of each report that has findings."""
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(".xml") else None
            if file is None:
                continue
            root = ElementTree.parse(file).getroot()
            parts = {part.get("Label"): (part.text or "").strip() for part in root.iter("AbstractText")}
            normal = [(major.text or "").lower() for major in root.iter("major")] == ["normal"]
            if parts.get("FINDINGS"):
                patient = next(root.iter("uId")).attrib["id"]
                found.append((patient, parts.get("IMPRESSION", ""), parts["FINDINGS"], "normal" if normal else "abnormal"))
    return found


def _makers(path: Path) -> dict[str, str]:
    """The maker that most films of each patient name, the first by name where two are even."""
    named: dict[str, Counter[str]] = defaultdict(Counter)
    with gzip.open(path) as file:
        for row in csv.DictReader(io.TextIOWrapper(file, encoding="utf-8", newline="")):
            maker = row["Private Creator"].lower().split() or [""]
            named[row["imageid"].split("_")[0]][maker[0] if maker[0] in _MAKERS else "other"] += 1
    return {patient: _most_named(makers) for patient, makers in named.items()}


radiology_reports = Cohort(
    name="radiology-reports",
    origin=(
        "Indiana University chest X-ray reports, CC BY-NC-ND 4.0 (https://openi.nlm.nih.gov/faq): install torchxrayvision, "
        "which brings both files, or put them into iu_xray_reports/."
    ),
    files=(REPORTS, HEADERS),
    read=_read,
    holdout=0.0,  # by the tokens, see above
    brought=brought,
)
