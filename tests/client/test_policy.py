"""What a hospital allows: every refusal, and that nothing is allowed which nobody wrote down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wardround.client.hospital import Hospital
from wardround.client.policy import SiteConfig, SitePolicy
from wardround.common.errors import ConfigError, PlanRefused
from wardround.common.messages import RollCall
from wardround.common.plan import StudyPlan
from wardround.simulations.scenario import Scenario

ALLOWED = {"tasks": ["heart-disease"], "epsilon_per_study": 4.0, "epsilon_lifetime": 6.0}
PRIVACY = {"epsilon": 3.0}


def a_plan(**changes: Any) -> StudyPlan:
    table = {"name": "study", "task": "heart-disease", "rounds": 10, "sites": {"here": 200, "there": 200}, "privacy": PRIVACY}
    return StudyPlan.build({key: value for key, value in (table | changes).items() if value is not None}, source="test")


def a_policy(**changes: Any) -> SitePolicy:
    return SitePolicy.build({key: value for key, value in (ALLOWED | changes).items() if value is not None}, source="test")


def test_a_plan_within_every_limit_is_admitted():
    a_policy().admit(a_plan(), "here", 200)
    a_policy().admit(a_plan(), "here", None)
    a_policy(without_privacy=True).admit(a_plan(privacy=None), "here", 200)


@pytest.mark.parametrize(("policy", "plan", "reason"), [
    ({"tasks": ["chest-xray"]}, {}, "task heart-disease is not allowed here"),
    ({}, {"sites": {"there": 200, "elsewhere": 200}}, "the plan does not name this site"),
    ({}, {"sites": {"here": 210, "there": 200}}, "the plan counts 210 patients here, this site declares 200"),
    ({"min_sites": 3}, {}, "a round of 2 sites is smaller than the 3 this site wants"),
    ({"rounds": 9}, {}, "10 rounds are more than the 9 allowed"),
    ({}, {"privacy": None}, r"the plan has no \[privacy\], and this site wants it"),
    ({"epsilon_per_study": None}, {}, "this site has set no privacy budget"),
    ({"epsilon_lifetime": None}, {}, "this site has set no privacy budget"),
    ({"epsilon_per_study": 2.99}, {}, "epsilon 3 is more than the 2.99 allowed for a study"),
    ({"delta": 1e-6}, {}, "delta 1e-05 is more than the 1e-06 allowed"),
])  # fmt: skip
def test_each_limit_refuses_alone_and_says_so(policy: dict[str, Any], plan: dict[str, Any], reason: str):
    with pytest.raises(PlanRefused, match=rf"^here does not take part: {reason}$"):
        a_policy(**policy).admit(a_plan(**plan), "here", 200)


def test_all_reasons_are_given_at_once():
    policy = a_policy(tasks=["chest-xray"], min_sites=3, rounds=5, epsilon_per_study=1.0, delta=1e-7)
    with pytest.raises(PlanRefused) as refused:
        policy.admit(a_plan(sites={"x": 200, "y": 200}), "here", 200)
    assert str(refused.value).count("; ") == 5


@pytest.mark.parametrize("plan", [a_plan(), a_plan(privacy=None)])
def test_an_empty_policy_allows_nothing(plan: StudyPlan):
    with pytest.raises(PlanRefused, match=r"task heart-disease is not allowed here; .*privacy"):
        SitePolicy().admit(plan, "here", None)


def test_a_privacy_budget_does_not_admit_studies_without_privacy():
    with pytest.raises(PlanRefused):
        a_policy().admit(a_plan(privacy=None), "here", 200)


def test_allowing_studies_without_privacy_lifts_no_limit_of_private_ones():
    with pytest.raises(PlanRefused, match="no privacy budget"):
        a_policy(without_privacy=True, epsilon_lifetime=None).admit(a_plan(), "here", 200)


# --- the site file --------------------------------------------------------------------------------------------------------

GOOD = """
site = "here"
state = "books"
[allow]
tasks = ["heart-disease"]
[data.heart-disease]
loader = "table"
path = "../records/hearts.csv"
"""


def site_file(folder: Path, text: str) -> Path:
    file = folder / "site.toml"
    file.write_text(text)
    return file


def test_paths_start_at_the_site_files_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "etc"
    folder.mkdir()
    site_file(folder, GOOD)
    monkeypatch.chdir(tmp_path)
    config = SiteConfig.load(Path("etc/site.toml"))
    assert config.state == folder.resolve() / "books"
    assert config.data["heart-disease"].path.resolve() == tmp_path.resolve() / "records" / "hearts.csv"
    absolute = SiteConfig.load(site_file(folder, GOOD.replace("../records", "/srv")))
    assert absolute.data["heart-disease"].path == Path("/srv/hearts.csv")


@pytest.mark.parametrize(("text", "complaint"), [
    ('site = "here"\n[alow]\n', r"alow: no such key \(did you mean allow\?\)"),
    ('site = "here"\n[allow]\nroundz = 3\n', r"allow\.roundz: no such key \(did you mean rounds\?\)"),
    ('site = "here"\n[allow]\nepsilon_lifetime = "3"\n', r"allow\.epsilon_lifetime: .*valid number.*\(got '3'\)"),
    ('site = "here"\n[allow]\nepsilon_lifetime = nan\n', r"allow\.epsilon_lifetime: .*\(got nan\)"),
    ('site = "here"\n[allow]\nepsilon_lifetime = inf\n', r"allow\.epsilon_lifetime: .*\(got inf\)"),
    ('site = "here"\n[allow]\nepsilon_lifetime = 0\n', r"allow\.epsilon_lifetime: .*greater than 0"),
    ('site = "here"\n[allow]\nepsilon_per_study = -1.0\n', r"allow\.epsilon_per_study: .*greater than 0"),
    ('site = "here"\n[allow]\ndelta = 0.1\n', r"allow\.delta: .*less than or equal to 0\.001"),
    ('site = "here"\n[allow]\nwithout_privacy = "no"\n', r"allow\.without_privacy: .*boolean"),
    ('site = "here"\n[allow]\nwithout_privacy = 1\n', r"allow\.without_privacy: .*boolean"),
    ('site = "here"\n[allow]\nrounds = 3.0\n', r"allow\.rounds: .*integer"),
    ('site = "Here I am"\n', r"site: .*pattern"),
    ("[allow]\n", r"site: is missing"),
    ('site = "here"\n[data.hearts]\npath = "x"\n', r"data\.hearts\.loader: is missing"),
    ('site = "here"\n[data.hearts]\nloader = "table"\n', r"data\.hearts\.path: is missing"),
    ('site = "here"\n[data.hearts]\nloader = "table"\npath = "x"\nholdout = 1.0\n', r"data\.hearts\.holdout: .*less than 1"),
    ('site = "here"\n[data.hearts]\nloader = "table"\npath = "x"\ndeclared_patients = 133\n', "patients: 133 tells more"),
    ('site = "here"\n[compute]\ndevice = "tpu"\n', r"compute\.device: .*pattern"),
    ('site = "here\n', r"is not valid TOML"),
])  # fmt: skip
def test_a_wrong_site_file_names_its_mistake(tmp_path: Path, text: str, complaint: str):
    with pytest.raises(ConfigError, match=complaint):
        SiteConfig.load(site_file(tmp_path, text))


def test_a_wrong_site_file_names_all_its_mistakes(tmp_path: Path):
    text = 'state = 3\n[allow]\nepsilon_lifetime = nan\nrouns = 3\n[data.hearts]\nloader = "table"\nheader = "yes"\n'
    with pytest.raises(ConfigError) as wrong:
        SiteConfig.load(site_file(tmp_path, text))
    said = str(wrong.value)
    for part in ("site.toml", "site: is missing", "state:", "allow.epsilon_lifetime:", "did you mean rounds?",
                 "data.hearts.path: is missing", "data.hearts.header:"):  # fmt: skip
        assert part in said


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"x" * (1 << 20) + b"x"])
def test_a_file_that_is_no_page_of_text_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "site.toml").write_bytes(content)
    with pytest.raises(ConfigError):
        SiteConfig.load(tmp_path / "site.toml")


def test_a_missing_site_file_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteConfig.load(tmp_path / "site.toml")


def test_the_roll_call_says_why_a_site_stays_away(scenario: Callable[..., Scenario]):
    prepared = scenario(rounds=2)
    file = prepared.sites["va"]
    file.write_text(file.read_text().replace("min_sites = 3", "min_sites = 9"))
    hospital = Hospital(file)
    present = hospital.present(prepared.study, RollCall(prepared.study.digest, "run"))
    assert present.refusal == "va does not take part: a round of 3 sites is smaller than the 9 this site wants"
    hospital.close()
