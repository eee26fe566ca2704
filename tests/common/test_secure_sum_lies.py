"""Every lie of a coordinator to a hospital ends the sum there: it says why, and what it knew is gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sums import MODEL, OCCASION, OTHER_MODEL, Sum, a_plan, check, names, signer
from wardround.common.errors import SumAborted
from wardround.common.secure_sum import site as site_module
from wardround.common.secure_sum.messages import Advert, Agreed, Dealt, Masked, Revealed
from wardround.common.secure_sum.site import SiteRules, SiteSum
from wardround.common.secure_sum.turns import LARGEST_FILE, Turns
from wardround.common.trust.signing import Signed

ME = "h000"
LATER = dataclasses.replace(OCCASION, attempt=2)


@pytest.fixture
def found(tmp_path: Path) -> Sum:
    return Sum(a_plan(5), tmp_path)


def refuses(site: SiteSum, step: Callable[[], object], why: str) -> None:
    """The step is refused for this reason, no other follows it, and no secret is left."""
    with pytest.raises(SumAborted, match=why) as caught:
        step()
    assert site.reason == str(caught.value)
    assert (site.next, site._memory) == ("nothing more", None)
    for again in (site.advert, lambda: site.deal([]), lambda: site.reveal([])):
        with pytest.raises(SumAborted) as after:
            again()
        assert str(after.value) == site.reason


def forged(signed: Signed, **body: object) -> Signed:
    """The statement with something else in it, under the old signature."""
    return dataclasses.replace(signed, body={**signed.body, **body})


# ---- adverts


def deal(found: Sum, adverts: list[Signed], why: str) -> None:
    refuses(found.sites[ME], lambda: found.sites[ME].deal(adverts), why)


def test_a_swapped_key_is_refused(found: Sum):
    adverts = found.upto("advert").adverts
    other = Advert.read(found.adverts[2]).channel_key
    deal(found, [forged(a, mask_key=other) if a.signer == "h001" else a for a in adverts], "not signed by h001")


def test_a_key_signed_by_another_site_in_its_name_is_refused(found: Sum):
    adverts = found.upto("advert").adverts
    theirs = Advert.read(next(a for a in adverts if a.signer == "h002")).sign(signer("h002"))
    deal(
        found, [dataclasses.replace(theirs, signer="h001") if a.signer == "h001" else a for a in adverts], "not signed by h001"
    )


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 0}, {"run": "run-0"}, {"study": "00" * 32}])
def test_a_stale_advert_is_refused(found: Sum, change: dict[str, object]):
    adverts = found.upto("advert").adverts
    old = dataclasses.replace(Advert.read(adverts[1]), occasion=dataclasses.replace(OCCASION, **change))  # type: ignore[arg-type]
    adverts[1] = old.sign(signer(adverts[1].signer))
    refuses(found.sites[ME], lambda: found.sites[ME].deal(adverts), "is of another study, run, round or attempt")


def test_two_adverts_of_a_site_are_refused(found: Sum):
    deal(found, [*found.upto("advert").adverts, found.adverts[1]], "has two adverts")


def test_a_key_that_is_there_twice_is_refused(found: Sum):
    adverts = {a.signer: a for a in found.upto("advert").adverts}
    theirs = Advert.read(adverts["h001"])
    adverts["h002"] = theirs.sign(signer("h002"))
    deal(found, list(adverts.values()), "has a key that is there twice")


def test_one_key_for_both_purposes_is_refused(found: Sum):
    adverts = {a.signer: a for a in found.upto("advert").adverts}
    theirs = Advert.read(adverts["h001"])
    adverts["h001"] = dataclasses.replace(theirs, mask_key=theirs.channel_key).sign(signer("h001"))
    deal(found, list(adverts.values()), "h001 has a key that is there twice")


def test_a_site_that_is_not_in_the_plan_is_refused(found: Sum):
    stranger = Advert(OCCASION, "11" * 32, "22" * 32, "33" * 32).sign(signer("evil"))
    deal(found, [*found.upto("advert").adverts, stranger], "evil is not among the sites of this plan")


def test_a_list_without_its_own_advert_is_refused(found: Sum):
    deal(found, [a for a in found.upto("advert").adverts if a.signer != ME], "the advert of h000 is missing")


def test_its_own_advert_of_another_time_is_refused(found: Sum, tmp_path: Path):
    other = SiteSum(found.plan, OCCASION, signer(ME), check=check, turns=Turns(tmp_path / "x.json"), rules=SiteRules()).advert()
    adverts = [other if a.signer == ME else a for a in found.upto("advert").adverts]
    deal(found, adverts, "the advert of h000 is missing or another's")


def test_a_key_everybody_agrees_with_is_refused(found: Sum):
    adverts = {a.signer: a for a in found.upto("advert").adverts}
    adverts["h003"] = dataclasses.replace(Advert.read(adverts["h003"]), channel_key="00" * 32).sign(signer("h003"))
    deal(found, list(adverts.values()), "the key of h003 is none")


def test_a_cohort_below_the_threshold_is_refused(found: Sum):
    adverts = {a.signer: a for a in found.upto("advert").adverts}
    deal(found, [adverts[name] for name in names(3)], "3 sites sent their keys; h000 wants 4 or more")


def test_a_cohort_below_the_sites_own_policy_is_refused(tmp_path: Path):
    found = Sum(a_plan(5), tmp_path, rules=SiteRules(min_cohort=5)).upto("advert")
    deal(found, [a for a in found.adverts if a.signer != "h004"], "4 sites sent their keys; h000 wants 5 or more")


def test_a_plan_without_this_site_is_refused(tmp_path: Path):
    site = SiteSum(a_plan(4), OCCASION, signer("h009"), check=check, turns=Turns(tmp_path / "t"), rules=SiteRules())
    with pytest.raises(SumAborted, match="h009 is not among the sites"):
        site.advert()
    assert not (tmp_path / "t").exists()


# ---- boxes of shares


def mask(found: Sum, inbox: list[Signed], why: str, update: np.ndarray | None = None) -> None:
    given = found.updates[ME] if update is None else update
    refuses(found.sites[ME], lambda: found.sites[ME].mask(inbox, given, MODEL), why)


def inbox(found: Sum) -> list[Signed]:
    return found.upto("shares").coordinator.inbox(ME)


def test_a_tampered_box_is_refused(found: Sum):
    boxes = inbox(found)
    other = Dealt.read(boxes[1]).box
    mask(found, [forged(boxes[0], box=other), *boxes[1:]], "not signed by h001")


def test_a_box_for_another_site_is_refused(found: Sum):
    inbox(found)
    mask(found, found.coordinator.inbox("h004"), "are not for h000")


def test_a_box_for_another_site_is_refused_though_it_is_signed_as_ours(found: Sum):
    boxes = inbox(found)
    theirs = next(Dealt.read(box) for box in found.dealt["h001"] if Dealt.read(box).to == "h002")
    boxes[0] = dataclasses.replace(theirs, to=ME).sign(signer("h001"))
    mask(found, boxes, "the shares of h001 do not authenticate")


def test_a_box_that_comes_back_to_its_sender_is_refused(found: Sum):
    inbox(found)
    mask(found, found.dealt[ME], "the shares of h000 are not for h000")


def test_a_site_that_reflects_our_box_is_refused(found: Sum):
    boxes = inbox(found)
    ours = next(Dealt.read(box) for box in found.dealt[ME] if Dealt.read(box).to == "h001")
    boxes[0] = dataclasses.replace(ours, to=ME).sign(signer("h001"))
    mask(found, boxes, "the shares of h001 do not authenticate")


def test_a_box_that_comes_twice_is_refused(found: Sum):
    boxes = inbox(found)
    mask(found, [*boxes, boxes[0]], "are there twice")


def test_a_box_of_a_site_that_sent_no_key_is_refused(found: Sum, tmp_path: Path):
    boxes = found.upto("shares", {"advert": ["h004"]}).coordinator.inbox(ME)
    boxes.append(Dealt.read(boxes[0]).sign(signer("h004")))
    mask(found, boxes, "the shares of h004 are not for h000")


def test_a_box_of_another_attempt_is_refused(found: Sum):
    boxes = inbox(found)
    boxes[0] = dataclasses.replace(Dealt.read(boxes[0]), occasion=LATER).sign(signer("h001"))
    mask(found, boxes, "is of another study, run, round or attempt")


def test_too_few_boxes_are_refused(found: Sum):
    mask(found, inbox(found)[:2], "3 sites dealt their shares; h000 wants 4 or more")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_not_sent(found: Sum, bad: float):
    update = found.updates[ME].copy()
    update[-1] = bad
    mask(found, inbox(found), "not finite", update)


@pytest.mark.parametrize("update", [np.zeros(65, np.float32), np.zeros((8, 8), np.float32), np.zeros(64, np.int32)])
def test_an_update_of_another_size_is_not_sent(found: Sum, update: np.ndarray):
    mask(found, inbox(found), "not of the plan's size", update)


# ---- survivors


def agree(found: Sum, survivors: list[str], dropped: list[str], why: str, masked: list[Signed] | None = None) -> None:
    statements = [found.masked[name][0] for name in survivors] if masked is None else masked
    refuses(found.sites[ME], lambda: found.sites[ME].agree(survivors, dropped, statements), why)


def test_a_second_set_of_survivors_is_refused(found: Sum):
    site = found.upto("masked").sites[ME]
    found.asked(ME)
    four = [found.masked[name][0] for name in names(4)]
    refuses(site, lambda: site.agree(names(4), ["h004"], four), "out of order: asked to agree, the next step is reveal")


def test_a_site_that_survived_and_vanished_is_refused(found: Sum):
    found.upto("masked")
    agree(found, names(5), ["h004"], "to have survived and to have vanished")


def test_survivors_that_are_not_of_the_cohort_are_refused(found: Sum):
    found.upto("masked", {"shares": ["h004"]})
    masked = [found.masked[name][0] for name in names(4)]
    agree(found, names(5), [], "are not the sites that this vector was masked for", [*masked, masked[0]])


def test_a_site_that_is_neither_there_nor_gone_is_refused(found: Sum):
    found.upto("masked")
    agree(found, names(4), [], "are not the sites that this vector was masked for")


def test_a_survivor_that_is_named_twice_is_refused(found: Sum):
    found.upto("masked")
    agree(found, [*names(4), "h003"], ["h004"], "are not the sites that this vector was masked for")


def test_a_sum_without_this_site_is_refused(found: Sum):
    found.upto("masked")
    agree(found, names(5)[1:], [ME], "asked to agree to a sum without it")


def test_survivors_below_the_threshold_are_refused(found: Sum):
    found.upto("masked")
    agree(found, names(3), names(5)[3:], "3 sites survive; h000 wants 4 or more")


def test_survivors_below_the_sites_own_policy_are_refused(tmp_path: Path):
    found = Sum(a_plan(5), tmp_path, rules=SiteRules(min_survivors=5)).upto("masked")
    agree(found, names(4), ["h004"], "4 sites survive; h000 wants 5 or more")


def test_survivors_below_the_plans_minimum_are_refused(tmp_path: Path):
    found = Sum(a_plan(5, min_survivors=5), tmp_path).upto("masked")
    agree(found, names(4), ["h004"], "4 sites survive; h000 wants 5 or more")


def test_an_invented_survivor_is_refused(found: Sum):
    found.upto("masked", {"masked": ["h004"]})
    statements = [found.masked[name][0] for name in names(4)]
    invented = dataclasses.replace(statements[1], signer="h004")
    agree(found, names(5), [], "not signed by h004", [*statements, invented])


def test_a_survivor_without_a_statement_is_refused(found: Sum):
    found.upto("masked", {"masked": ["h004"]})
    agree(found, names(5), [], "the statements are not those of the survivors", [found.masked[name][0] for name in names(4)])


def test_a_statement_that_is_there_twice_is_refused(found: Sum):
    found.upto("masked")
    statements = [found.masked[name][0] for name in names(4)]
    agree(found, names(5), [], "a site's statement is there twice", [*statements, statements[1]])


def test_another_model_for_some_site_is_refused(tmp_path: Path):
    found = Sum(a_plan(5), tmp_path, models={"h002": OTHER_MODEL}).upto("masked")
    agree(found, names(5), [], "h002 was sent another model than h000")


def test_another_model_for_this_site_is_refused(tmp_path: Path):
    found = Sum(a_plan(5), tmp_path, models={ME: OTHER_MODEL}).upto("masked")
    agree(found, names(5), [], "h001 was sent another model than h000")


def test_another_cohort_for_some_site_is_refused(found: Sum):
    found.upto("shares")
    for name in names(5):
        boxes = found.coordinator.inbox(name)
        boxes = [box for box in boxes if name != "h001" or box.signer != "h004"]
        found.masked[name] = found.sites[name].mask(boxes, found.updates[name], MODEL)
    agree(found, names(5), [], "h001 masked its vector for other sites than h000")


def test_a_vector_of_another_attempt_is_refused(found: Sum):
    found.upto("masked")
    statements = [found.masked[name][0] for name in names(5)]
    statements[3] = dataclasses.replace(Masked.read(statements[3]), occasion=LATER).sign(signer("h003"))
    agree(found, names(5), [], "is of another study, run, round or attempt", statements)


# ---- reveals


def reveal(found: Sum, agreements: list[Signed], why: str) -> None:
    refuses(found.sites[ME], lambda: found.sites[ME].reveal(agreements), why)


def test_one_set_for_this_site_and_another_for_the_rest_is_refused(found: Sum):
    found.upto("masked")
    four = [found.masked[name][0] for name in names(4)]
    agreed = [found.sites[name].agree(names(4), ["h004"], four) for name in names(4)[1:]]
    agreed.append(found.asked(ME))
    reveal(found, agreed, "h001 agreed to other survivors than h000")


def test_fewer_agreements_than_the_threshold_reveal_nothing(found: Sum):
    agreed = list(found.upto("agree").agreed.values())
    reveal(found, agreed[:3], "3 survivors agreed; h000 wants 4 or more")


def test_an_agreement_that_is_there_twice_reveals_nothing(found: Sum):
    agreed = list(found.upto("agree").agreed.values())
    reveal(found, [*agreed[:3], agreed[0]], "a site's statement is there twice")


def test_an_agreement_of_a_site_that_vanished_reveals_nothing(found: Sum):
    found.upto("agree", {"masked": ["h004"]})
    agreed = list(found.agreed.values())
    theirs = Agreed.read(agreed[0]).sign(signer("h004"))
    reveal(found, [*agreed[:3], theirs], "h004 agreed to other survivors than h000")


def test_a_forged_agreement_reveals_nothing(found: Sum):
    agreed = list(found.upto("agree").agreed.values())
    reveal(found, [*agreed[:3], dataclasses.replace(agreed[3], signer="h004")], "not signed by h004")


def test_an_agreement_to_another_model_reveals_nothing(found: Sum):
    agreed = list(found.upto("agree").agreed.values())
    agreed[3] = dataclasses.replace(Agreed.read(agreed[3]), model=OTHER_MODEL).sign(signer("h003"))
    reveal(found, agreed, "h003 agreed to other survivors than h000")


@pytest.mark.parametrize("gone", [[], ["h004"]])
def test_of_each_site_one_secret_is_revealed_and_never_both(found: Sum, gone: list[str]):
    found.upto("reveal", {"masked": gone})
    for signed in found.revealed.values():
        revealed = Revealed.read(signed)
        assert set(revealed.seeds) == set(names(5)) - set(gone)
        assert set(revealed.keys) == set(gone)


def test_a_second_reveal_is_refused(found: Sum):
    found.upto("reveal")
    site, agreed = found.sites[ME], list(found.agreed.values())
    assert site._memory is None
    with pytest.raises(SumAborted, match="out of order: asked to reveal, the next step is nothing more"):
        site.reveal(agreed)


# ---- order, replay, restart


@pytest.mark.parametrize("step", ["deal", "mask", "agree", "reveal"])
def test_a_step_out_of_order_is_refused(found: Sum, step: str):
    site = found.sites[ME]
    steps = {
        "deal": lambda: site.deal([]),
        "mask": lambda: site.mask([], found.updates[ME], MODEL),
        "agree": lambda: site.agree([], [], []),
        "reveal": lambda: site.reveal([]),
    }
    refuses(site, steps[step], f"out of order: asked to {step}, the next step is advert")


@pytest.mark.parametrize("phase", ["advert", "shares", "masked", "agree", "reveal"])
def test_a_sum_begun_before_is_not_begun_again_after_a_restart(found: Sum, phase: str):
    found.upto(phase)
    again = found.site(ME)
    refuses(again, again.advert, "round 3, attempt 1, was begun here before; this is a replay")


def test_an_earlier_attempt_is_a_replay_and_a_later_one_is_not(found: Sum, tmp_path: Path):
    turns = Turns(tmp_path / "turns.json")
    turns.take(dataclasses.replace(OCCASION, attempt=2))
    turns.take(dataclasses.replace(OCCASION, round=4))
    for attempt in (0, 1, 2):
        with pytest.raises(SumAborted, match="this is a replay"):
            Turns(tmp_path / "turns.json").take(dataclasses.replace(OCCASION, attempt=attempt))
    for new in ({"attempt": 3}, {"round": 2}, {"run": "another"}, {"study": "00" * 32}):
        Turns(tmp_path / "turns.json").take(dataclasses.replace(OCCASION, **new))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"a":1}', b'{"a":{"1":"x"}}', b"\xff", b"[" * 100_000])
def test_a_site_that_cannot_read_what_it_has_begun_begins_nothing(found: Sum, tmp_path: Path, text: bytes):
    (tmp_path / f"{ME}.json").write_bytes(text)
    with pytest.raises(SumAborted, match="begins none") as caught:
        found.sites[ME].advert()
    assert str(tmp_path) not in str(caught.value)
    assert found.sites[ME]._memory is None


def test_a_site_that_cannot_write_what_it_begins_begins_nothing(tmp_path: Path):
    (tmp_path / "file").write_text("")
    turns = Turns(tmp_path / "file" / "turns.json")
    with pytest.raises(SumAborted, match="cannot"):
        turns.take(OCCASION)


def test_a_failure_of_ours_ends_the_sum_and_says_nothing(found: Sum, monkeypatch: pytest.MonkeyPatch):
    def fails(*args: object, **more: object) -> None:
        raise KeyError("patient 7")

    boxes = inbox(found)
    monkeypatch.setattr(site_module, "quantise", fails)
    mask(found, boxes, "^the sum failed at this site$")


def test_an_interruption_ends_the_sum_and_goes_on(found: Sum, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    site, boxes = found.sites[ME], inbox(found)
    monkeypatch.setattr(site_module, "quantise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        site.mask(boxes, found.updates[ME], MODEL)
    assert (site.next, site._memory, site.reason) == ("nothing more", None, "the sum failed at this site")


def test_a_list_of_begun_sums_that_is_too_large_is_not_read(tmp_path: Path):
    (tmp_path / "turns.json").write_bytes(b"{}" + b" " * LARGEST_FILE)
    with pytest.raises(SumAborted, match="begins none") as caught:
        Turns(tmp_path / "turns.json").take(OCCASION)
    assert caught.value.detail.endswith("too large")
