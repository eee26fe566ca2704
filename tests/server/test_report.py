import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from wardround.server import report as room
from wardround.server.report import Report, plots, to_html, to_json, words, write_report

DOCUMENT = Path(__file__).parents[2] / "docs" / "report.md"
SITES = {"cleveland": 200, "switzerland": 82, "va": 130}
HOSTILE = {
    "<script>alert(1)</script>": 200,
    "$x_{$ & \x00\x1b \"quoted'": 100,
    "</svg></style><img src=https://evil.example/x>": 80,
    "日本語病院{{ 7 * 7 }}": 90,
}


def figures(auroc, *, width=0.03):
    def one(value):
        return {"value": value, "low": value - width, "high": value + width}

    return {"auroc": one(auroc), "accuracy": one(auroc - 0.1), "log_loss": one(1.3 - auroc)}


def a_report(*, private=True, stopped="", baselines=True, seeds=False, sites=SITES, rounds=6, **changes):
    plan = f'name = "heart"\nrounds = {rounds}\n' + ("[privacy]\nepsilon = 3.0\n" if private else "")
    done = 4 if stopped else rounds
    alone = {site: figures(0.7 + 0.05 * i) for i, site in enumerate(sites)} if baselines else {}
    pooled = figures(0.91) if baselines else {}
    spread = {"auroc": {"mean": 0.9, "sd": 0.01, "values": [0.89, 0.9, 0.91]}}
    table = {
        "study": {
            "name": "heart",
            "title": "Hearts of three hospitals",
            "task": "heart-disease",
            "digest": hashlib.sha256(plan.encode()).hexdigest(),
            "run": "3f9c0a11d2b47e58",
            "rounds": rounds,
            "plan": plan,
        },
        "outcome": {"status": "stopped" if stopped else "completed", "reason": stopped, "rounds_done": done},
        "headline": "auroc",
        "results": {
            "federated": figures(0.9),
            "pooled": pooled,
            "local": alone,
            "by_site": {
                site: {
                    "test_patients": 40,
                    "federated": figures(0.88),
                    "local": alone.get(site, {}),
                    "pooled": pooled,
                }
                for site in sites
            },
        },
        "privacy": {
            site: {
                "epsilon": 2.9912 * math.sqrt(done / rounds),
                "epsilon_replace_one": 6.2745 * math.sqrt(done / rounds),
                "delta": 1e-5,
                "unit": "patient",
                "planned": 2.9912,
                "noise_multiplier": 3.65,
                "sampling_rate": 0.25,
                "clip_norm": 0.5,
                "steps": done,
                "steps_planned": rounds,
                "lifetime_charged": 3.31,
                "lifetime_limit": None,
                "ledger_head": "ab" * 32,
            }
            for site in sites
        }
        if private
        else {},
        "rounds": [
            {
                "round": r,
                "attempt": 1,
                "seconds": 0.02,
                "sites": list(sites),
                "dropped": {},
                "lost": False,
                "update_norm": 0.3,
                "metrics": {"auroc": 0.6 + 0.05 * r / rounds},
                "epsilon": {site: 2.9912 * math.sqrt(r / rounds) for site in sites} if private else {},
            }
            for r in range(1, done + 1)
        ],
        "sites": {site: {"declared_patients": n, "test_patients": 40} for site, n in sites.items()},
        "seeds": {
            "values": [7, 8, 9],
            "federated": spread,
            "pooled": spread if baselines else {},
            "local": dict.fromkeys(sites, spread) if baselines else {},
        }
        if seeds
        else None,
        "seconds": {"total": 9.3, "training": 2.1, "baselines": 6.0},
        "versions": {"wardround": "0.1.0", "python": "3.11.7"},
        "notes": ["A simulation with published records."],
    }
    return Report.model_validate(table | changes)


def changed(report, **parts):
    """The report as a table of plain values, some parts replaced."""
    return report.model_dump(by_alias=True) | parts


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.ids, self.open = [], [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@cache  # drawing is slow, and many laws are about the same page
def _page(data):
    return to_html(Report.model_validate_json(data))


def page(report):
    return _page(to_json(report))


@contextmanager
def undrawn():
    with pytest.MonkeyPatch.context() as patch:
        for figure in ("headline_by_round", "epsilon_by_round", "hospitals"):
            patch.setattr(plots, figure, lambda report: "")
        yield


def said(report):
    with undrawn():
        return " ".join(Page(to_html(report)).text.split())


CASES = {
    "private": {},
    "plain": {"private": False},
    "stopped": {"stopped": "the disk of the coordinator is full"},
    "no baselines": {"baselines": False},
    "seeds": {"seeds": True},
    "hostile": {"sites": HOSTILE, "seeds": True},
}


@pytest.fixture(params=list(CASES))
def case(request):
    return a_report(**CASES[request.param])


# ---------------------------------------------------------------- report.json


def test_a_report_survives_the_way_to_json_and_back(case):
    assert Report.model_validate_json(to_json(case)) == case
    assert json.loads(to_json(case))["schema"] == "wardround-report/1"


def test_the_same_report_is_the_same_bytes():
    assert to_json(a_report(seeds=True)) == to_json(a_report(seeds=True))
    assert to_html(a_report(seeds=True)) == to_html(a_report(seeds=True))


@pytest.mark.parametrize("undefined", [math.nan, math.inf])
def test_a_figure_that_is_not_defined_is_null(undefined):
    report = a_report()
    results = report.results.model_dump()
    results["by_site"]["va"]["federated"]["auroc"] = {"value": undefined, "low": None, "high": None}
    rounds = [r.model_dump() | {"metrics": {"auroc": undefined}} for r in report.rounds]
    report = Report.model_validate(changed(report, results=results, rounds=rounds))
    text = to_json(report)
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["results"]["by_site"]["va"]["federated"]["auroc"]["value"] is None
    assert "not defined" in said(report)
    assert "at 2 of 2 hospitals where both are defined" in said(report)


def test_an_epsilon_is_never_undefined():
    privacy = a_report().privacy["va"].model_dump() | {"epsilon": math.nan}
    with pytest.raises(ValidationError, match="finite"):
        Report.model_validate(changed(a_report(), privacy={"va": privacy}))


@pytest.mark.parametrize(
    ("part", "values", "words_of_refusal"),
    [
        ("study", {"digest": "0" * 64}, "not the SHA-256"),
        ("outcome", {"rounds_done": 7}, "7 of 6 rounds"),
        ("outcome", {"rounds_done": 5}, "completed after 5 of 6"),
        ("outcome", {"status": "stopped"}, "says why"),
        ("outcome", {"grade": "A"}, "Extra inputs"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(part, values, words_of_refusal):
    table = changed(a_report())
    with pytest.raises(ValidationError, match=words_of_refusal):
        Report.model_validate(table | {part: table[part] | values})


def test_a_cost_without_a_promise_is_refused():
    with pytest.raises(ValidationError, match=r"no \[privacy\] section"):
        Report.model_validate(changed(a_report(private=False), privacy=a_report().model_dump()["privacy"]))


def test_the_document_and_the_schema_have_the_same_keys():
    documented, section = {}, ""
    for line in DOCUMENT.read_text().splitlines():
        if heading := re.fullmatch(r"## .*\((\w+)\)", line):
            section = heading[1]
            documented[section] = []
        elif row := re.match(r"\| `(\w+)` \|", line):
            documented[section].append(row[1])
    parts = [part for part in vars(room).values() if isinstance(part, type) and issubclass(part, BaseModel)]
    schema = {part.__name__: [field.alias or name for name, field in part.model_fields.items()] for part in parts}
    assert documented == schema
    assert room.VERSION in DOCUMENT.read_text()


# ---------------------------------------------------------------- report.html


def test_a_page_is_whole_and_needs_nothing_else(case):
    parsed = Page(page(case))
    assert not parsed.open
    assert len(parsed.ids) == len(set(parsed.ids))
    assert not {"script", "link", "img", "iframe", "object", "image", "base", "form"} & set(parsed.tags)
    for _, name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href", "data", "action"}:
            assert value.removeprefix("#") in parsed.ids
        if name in {"clip-path", "style"} and "url(" in value:
            assert re.search(r"url\(#([^)]+)\)", value)[1] in parsed.ids
    assert "@import" not in page(case)


def test_every_figure_has_a_text_for_those_who_do_not_see_it(case):
    parsed = Page(page(case))
    named = [value for tag, name, value in parsed.attributes if (tag, name) == ("svg", "aria-label") and value]
    assert len(named) == parsed.tags.count("svg") > 0
    assert parsed.tags.count("caption") == parsed.tags.count("table")


def test_a_hostile_name_is_only_text():
    report = a_report(sites=HOSTILE, stopped="<b>because</b>", seeds=True)
    study = report.study.model_dump() | {"title": "</title><script>alert(2)</script>", "name": "<i>"}
    report = Report.model_validate(changed(report, study=study, notes=["<u>note</u>"]))
    parsed = Page(page(report))
    assert not {"script", "img", "i", "b", "u"} & set(parsed.tags)
    for text in ("<script>alert(1)</script>", "<script>alert(2)</script>", "<b>because</b>", "<u>note</u>"):
        assert text in parsed.text
    assert "日本語病院{{ 7 * 7 }}" in parsed.text


def test_a_stopped_study_says_so_with_its_reason():
    text = said(a_report(stopped="the disk of the coordinator is full"))
    assert "stopped after 4 of 6 planned rounds. The reason: the disk of the coordinator is full." in text
    assert "completed" not in text


def test_a_study_without_privacy_says_that_nothing_is_guaranteed():
    text = said(a_report(private=False))
    assert "ran without differential privacy. No mathematical guarantee" in text
    assert "neither clipped nor noised" in text
    assert "protected by differential privacy" not in text
    assert "ε" not in text


def test_a_private_study_says_what_a_patient_paid_and_never_less():
    text = said(a_report())
    assert "A patient paid at most epsilon 3.00 at delta 1e-5 at each hospital" in text  # 2.9912, rounded up
    assert "at most 20 times as likely" in text  # e^2.9912 = 19.91
    assert "(replace-one); by that count, the same study costs at most epsilon 6.28" in text
    assert "No mathematical guarantee" not in text
    assert "standard deviation of the noise 1.825" in text


def test_a_private_study_in_which_nobody_spent_claims_nothing():
    report = a_report(stopped="1 of at least 3 sites take part")
    silent = Report.model_validate(
        changed(report, privacy={}, rounds=[], outcome=report.outcome.model_dump() | {"rounds_done": 0})
    )
    text = said(silent)
    assert "No hospital is on record as having spent any." in text
    assert "None of them contributed" in text
    assert "ran without differential privacy" not in text


def test_comparisons_are_told_only_where_they_were_made():
    text = said(a_report())
    assert "reach 0.700 (cleveland) to 0.800 (va) on the same patients. The federated value is better than each" in text
    assert "A model trained on all records in one place reaches 0.910 (95 % interval 0.880 to 0.940)" in text
    skipped = said(a_report(baselines=False))
    assert "that was skipped" in skipped
    assert "trained alone" not in skipped
    assert "pooled records" not in skipped.replace("or with pooled records, because that was skipped", "")


def test_a_hospital_that_does_worse_is_named():
    report = a_report()
    results = report.results.model_dump()
    results["by_site"]["va"]["local"] = figures(0.95)
    results["local"]["va"] = figures(0.95)
    text = said(Report.model_validate(changed(report, results=results)))
    assert "better than 2 of these 3." in text
    assert "better than that of the hospital's own model at 2 of 3 hospitals and worse at 1: va (0.880 against 0.950)" in text


def test_a_smaller_log_loss_is_the_better_one():
    text = said(Report.model_validate(changed(a_report(), headline="log_loss")))
    assert "The federated value is better than each of these." in text


def test_of_an_unknown_metric_nothing_is_called_better():
    report = a_report()
    results = json.loads(json.dumps(report.results.model_dump()).replace('"auroc"', '"dice_score"'))
    text = said(Report.model_validate(changed(report, results=results, headline="dice_score")))
    assert "a dice score of 0.900" in text
    assert "better than" not in text


def test_repetitions_do_not_hide_their_price():
    assert "every repetition whose model or figures are handed out costs as much again" in said(a_report(seeds=True))
    assert "costs as much again" not in said(a_report(seeds=True, private=False))
    assert "repeated" not in said(a_report())


def test_lost_and_incomplete_rounds_are_told():
    report = a_report()
    rounds = [r.model_dump() for r in report.rounds]
    rounds[1] |= {"lost": True, "sites": [], "dropped": {"va": "no answer within 60 s"}, "update_norm": None}
    rounds[2] |= {"sites": ["cleveland", "switzerland"], "dropped": {"va": "no answer within 60 s"}}
    text = said(Report.model_validate(changed(report, rounds=rounds)))
    assert "1 round had too few hospitals and changed nothing. In 1 other round a hospital's update was missing" in text
    assert "va: no answer within 60 s" in text


def test_a_coordinator_without_test_records_claims_no_quality():
    empty = {"federated": {}, "pooled": {}, "local": {}, "by_site": {}}
    sites = {site: {"declared_patients": n, "test_patients": None} for site, n in SITES.items()}
    report = a_report()
    rounds = [r.model_dump() | {"metrics": {}} for r in report.rounds]
    text = said(Report.model_validate(changed(report, results=empty, sites=sites, rounds=rounds)))
    assert "holds no figures on how good the model is" in text
    assert "How good the model is" not in text
    assert "test patients in this report" not in text


def test_a_thousand_hospitals_stay_readable():
    report = a_report(sites={f"hospital-{i:03}": 100 + i for i in range(1000)}, rounds=2)
    uneven = [r.model_dump() for r in report.rounds]
    for r in uneven:
        r["epsilon"] = {site: paid * (1 - i / 2000) for i, (site, paid) in enumerate(r["epsilon"].items())}
    report = Report.model_validate(changed(report, rounds=uneven))
    html = to_html(report)
    assert plots.largest(report) == [f"hospital-{i:03}" for i in range(988, 1000)]
    assert "12 largest of 1,000 hospitals" in html
    assert "from least to most, 1000 hospitals" in plots.epsilon_by_round(report)
    assert len(html) < 3_000_000


def test_words_round_bounds_up():
    assert [words.bound(e) for e in (2.9901, 3.0, 0.0001, 0.0)] == ["3.00", "3.00", "0.01", "0.00"]


# ---------------------------------------------------------------- the two files


@pytest.fixture
def no_drawings():
    with undrawn():
        yield


def test_a_report_is_two_files(tmp_path, no_drawings):
    write_report(tmp_path / "runs" / "heart", a_report())
    assert sorted(path.name for path in (tmp_path / "runs" / "heart").iterdir()) == ["report.html", "report.json"]
    assert Report.model_validate_json((tmp_path / "runs" / "heart" / "report.json").read_bytes()) == a_report()


def test_a_crash_while_writing_leaves_the_earlier_files(tmp_path, monkeypatch, no_drawings):
    write_report(tmp_path, a_report())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, a_report(stopped="power cut"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_page_that_cannot_be_made_leaves_both_files(tmp_path, monkeypatch, no_drawings):
    write_report(tmp_path, a_report())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(plots, "hospitals", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, a_report(stopped="power cut"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
