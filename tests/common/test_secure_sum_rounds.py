"""The coordinator gets the sum, exactly, whoever vanishes when; and with too few left it gets nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sums import OTHER_MODEL, PHASES, Sum, a_plan, names, signer
from wardround.common.errors import SumAborted, UpdateRefused
from wardround.common.secure_sum import shamir
from wardround.common.secure_sum.messages import Advert, Dealt, Masked, Revealed
from wardround.common.secure_sum.shares import mark
from wardround.common.secure_sum.turns import Turns

some = settings(derandomize=True, deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPARE = {count: count - shamir.threshold_of(count) for count in (3, 4, 5, 10, 32, 100)}


def off(found: Sum) -> float:
    return float(np.abs(found.coordinator.result() - found.plain()).max())


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., Sum]:
    made = iter(range(1000))

    def sum_of(count: int = 4, **more: object) -> Sum:
        return Sum(more.pop("plan", None) or a_plan(count), tmp_path / str(next(made)), **more)  # type: ignore[arg-type]

    return sum_of


# ---- the sum


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [3, 4, 5, 10, pytest.param(32, marks=pytest.mark.slow)])
def test_the_sum_is_exact_with_as_many_gone_in_a_phase_as_may_be(fresh: Callable[..., Sum], count: int, phase: str):
    found = fresh(count).upto("reveal", {phase: names(count)[: SPARE[count]]})
    assert off(found) <= 1e-7


@some
@given(st.sampled_from([4, 5, 7, 10]), st.data())
def test_the_sum_is_exact_whoever_vanishes_in_whichever_phase(fresh: Callable[..., Sum], count: int, data: st.DataObject):
    gone = data.draw(st.permutations(names(count)))[: count - shamir.threshold_of(count)]
    when = [data.draw(st.sampled_from(PHASES)) for _ in gone]
    lost = {phase: [name for name, at in zip(gone, when, strict=True) if at == phase] for phase in PHASES}
    assert off(fresh(count).upto("reveal", lost)) <= 1e-7


@pytest.mark.slow
def test_the_sum_of_a_hundred_sites_is_exact_with_a_third_of_them_gone(fresh: Callable[..., Sum]):
    gone = names(100)[: SPARE[100]]
    lost = {phase: gone[number::5] for number, phase in enumerate(PHASES)}
    assert off(fresh(100).upto("reveal", lost)) <= 1e-7


def test_the_sum_of_32_sites_is_exact_with_some_gone_in_every_phase(fresh: Callable[..., Sum]):
    gone = names(32)[: SPARE[32]]
    assert off(fresh(32).upto("reveal", {phase: gone[number::5] for number, phase in enumerate(PHASES)})) <= 1e-7


def test_weights_are_the_plans(fresh: Callable[..., Sum]):
    weights = dict(zip(names(4), (0.1, 0.2, 0.3, 0.4), strict=True))
    plan = a_plan(4)
    found = fresh(plan=type(plan)(weights, 2.0, 30, 64)).upto("reveal", {"masked": ["h000"]})
    assert found.coordinator.weight == pytest.approx(0.9)
    assert off(found) <= 2e-7


def test_a_float32_sum_is_the_float64_sum_rounded(fresh: Callable[..., Sum]):
    found = fresh().upto("reveal")
    result = found.coordinator.result(np.float32)
    assert result.dtype == np.float32
    assert np.abs(result - found.plain()).max() < 1e-7


def test_vectors_longer_than_a_block_are_summed_by_threads(tmp_path: Path):
    found = Sum(a_plan(3, size=70_003), tmp_path)
    for half in (found.coordinator, *found.sites.values()):
        half._threads = 2
    assert off(found.upto("reveal")) <= 1e-7


def test_two_rounds_have_nothing_in_common(fresh: Callable[..., Sum]):
    first, second = fresh().upto("masked"), fresh().upto("masked")
    for name in names(4):
        assert np.array_equal(first.updates[name], second.updates[name])
        assert not (first.masked[name][1] == second.masked[name][1]).any()


# ---- what the coordinator sees


def test_a_masked_vector_looks_like_noise(tmp_path: Path):
    found = Sum(a_plan(4, size=20_000), tmp_path)
    for update in found.updates.values():
        update[:] = 0.25
    found.upto("masked")
    for _, vector in found.masked.values():
        bits = np.unpackbits(vector.view(np.uint8))
        centred = vector / 2**32 - 0.5
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(bits.size)
        assert abs(np.corrcoef(centred[:-1], centred[1:])[0, 1]) < 6 / np.sqrt(vector.size)
        assert vector.size - len(np.unique(vector)) < 5
        assert abs(np.corrcoef(bits[:-32], bits[32:])[0, 1]) < 6 / np.sqrt(bits.size)


def test_vectors_of_fewer_than_all_survivors_still_look_like_noise(tmp_path: Path):
    found = Sum(a_plan(4, size=20_000), tmp_path).upto("masked")
    vectors = [vector for _, vector in found.masked.values()]
    for some_of_them in (vectors[:2], vectors[:3], vectors):  # even of all of them: each has its own mask besides
        bits = np.unpackbits(sum(some_of_them).astype(np.uint32).view(np.uint8))
        assert abs(bits.mean() - 0.5) < 6 * 0.5 / np.sqrt(bits.size)


def test_the_coordinator_keeps_no_vector(fresh: Callable[..., Sum]):
    found = fresh().upto("masked")
    held = [value for value in vars(found.coordinator).values() if isinstance(value, np.ndarray)]
    assert [value.size for value in held] == [found.plan.size]


# ---- too few


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_below_the_threshold_nothing_is_revealed(fresh: Callable[..., Sum], count: int, phase: str):
    found = fresh(count)
    with pytest.raises(SumAborted, match="or more are wanted"):
        found.upto("reveal", {phase: names(count)[: SPARE[count] + 1]}).coordinator.result()
    assert found.revealed == {} or phase == "reveal"
    assert len(found.revealed) < found.plan.threshold
    assert found.coordinator._total is None


def test_a_round_that_fails_after_reveal_began_is_lost(fresh: Callable[..., Sum]):
    found = fresh().upto("reveal", {"reveal": ["h000", "h001"]})
    with pytest.raises(SumAborted, match="the round is lost"):
        found.coordinator.result()
    with pytest.raises(SumAborted, match="out of order"):
        found.coordinator.result()
    with pytest.raises(UpdateRefused, match="out of turn"):
        found.coordinator.take_masked(*found.masked["h000"])
    for site in found.sites.values():
        assert site._memory is None or site.next == "reveal"


def test_a_sum_is_given_once(fresh: Callable[..., Sum]):
    found = fresh().upto("reveal")
    found.coordinator.result()
    with pytest.raises(SumAborted, match="out of order"):
        found.coordinator.result()


# ---- sites that lie to the coordinator


def test_a_site_that_deals_shares_of_another_secret_is_named(fresh: Callable[..., Sum], monkeypatch: pytest.MonkeyPatch):
    found = fresh().upto("advert")
    found.sites["h001"]._memory.seed = b"z" * 32  # type: ignore[union-attr]
    for phase in (found.shares, found.mask, found.agree, found.reveal):
        phase()
    with pytest.raises(SumAborted, match="dealt by h001 do not make its secret; the round is lost"):
        found.coordinator.result()


def with_a_bad_share(found: Sum, what: str, dealer: str, holder: str) -> None:
    """`dealer` deals `holder` a share from nowhere, and signs for it."""
    memory, deal = found.sites[dealer]._memory, shamir.deal
    assert memory is not None
    secret = memory.seed if what == "seed" else memory.mask_key.private_bytes_raw()
    point = found.plan.points[holder]

    def lying(given: bytes, threshold: int, points: list[int]) -> dict[int, bytes]:
        shares = deal(given, threshold, points)
        return {**shares, point: b"\x00" * 33} if given == secret else shares

    shamir.deal = lying  # type: ignore[assignment]
    try:
        found.shares()
    finally:
        shamir.deal = deal  # type: ignore[assignment]


@pytest.mark.parametrize(("what", "gone"), [("seed", []), ("key", ["h004"])])
def test_a_bad_share_names_its_dealer_and_others_make_the_sum(fresh: Callable[..., Sum], what: str, gone: list[str]):
    found = fresh(5).upto("advert")
    with_a_bad_share(found, what, "h004", "h000")
    found.mask(gone).agree(gone).reveal(gone)
    if gone:  # four are left, four shares are needed, and one of them is bad
        with pytest.raises(SumAborted, match="dealt by h004 do not make"):
            found.coordinator.result()
    else:
        assert off(found) <= 1e-7
        assert found.coordinator.bad_dealers == {"h004"}


def test_a_site_that_reveals_another_share_than_it_was_dealt_is_refused(fresh: Callable[..., Sum]):
    found = fresh(4).upto("agree")
    agreements = found.coordinator.agreements()
    for name in names(4):
        signed = found.sites[name].reveal(agreements)
        if name == "h002":
            body = Revealed.read(signed)
            signed = Revealed(body.occasion, body.model, {**body.seeds, "h000": "00" * 33}, body.keys).sign(signer(name))
            with pytest.raises(UpdateRefused, match="h002 revealed another share than h000 dealt to it"):
                found.coordinator.take_revealed(signed)
        else:
            found.coordinator.take_revealed(signed)
    assert off(found) <= 1e-7


def test_a_site_that_reveals_both_shares_of_a_site_is_refused(fresh: Callable[..., Sum]):
    found = fresh().upto("agree")
    body = Revealed.read(found.sites["h001"].reveal(found.coordinator.agreements()))
    both = Revealed(body.occasion, body.model, body.seeds, {"h002": body.seeds["h002"]}).sign(signer("h001"))
    with pytest.raises(UpdateRefused, match="h001 revealed other shares than it was asked for"):
        found.coordinator.take_revealed(both)


@pytest.mark.parametrize("vector", [np.zeros(63, np.uint32), np.zeros(64, np.int32), np.zeros((8, 8), np.uint32)])
def test_a_vector_of_another_shape_is_refused(fresh: Callable[..., Sum], vector: np.ndarray):
    found = fresh().upto("shares")
    body = Masked.read(found.sites["h000"].mask(found.coordinator.inbox("h000"), found.updates["h000"], found.model)[0])
    digest = hashlib.sha256(vector.tobytes()).hexdigest()
    signed = Masked(body.occasion, body.model, body.cohort, digest).sign(signer("h000"))
    with pytest.raises(UpdateRefused, match="h000 sent no vector of this sum"):
        found.coordinator.take_masked(signed, vector)
    assert not found.coordinator._total.any()


def test_another_vector_than_was_signed_for_is_refused(fresh: Callable[..., Sum]):
    found = fresh().upto("shares")
    signed, vector = found.sites["h000"].mask(found.coordinator.inbox("h000"), found.updates["h000"], found.model)
    with pytest.raises(UpdateRefused, match="h000 sent another vector than it signed for"):
        found.coordinator.take_masked(signed, vector + np.uint32(1))
    assert not found.coordinator._total.any()


def test_a_vector_for_another_model_is_not_added(fresh: Callable[..., Sum]):
    found = fresh().upto("shares")
    masked = found.sites["h000"].mask(found.coordinator.inbox("h000"), found.updates["h000"], OTHER_MODEL)
    with pytest.raises(UpdateRefused, match="h000 masked its vector for another model"):
        found.coordinator.take_masked(*masked)
    assert not found.coordinator._total.any()


def test_a_second_answer_is_refused(fresh: Callable[..., Sum]):
    found = fresh()
    for name, site in found.sites.items():
        signed = site.advert()
        found.coordinator.take_advert(signed)
        with pytest.raises(UpdateRefused, match=f"{name} has answered before"):
            found.coordinator.take_advert(signed)


def test_an_answer_out_of_turn_is_refused(fresh: Callable[..., Sum]):
    found = fresh().upto("advert", {"advert": ["h003"]})
    with pytest.raises(UpdateRefused, match="h003 answers out of turn; shares are collected"):
        found.coordinator.take_advert(found.sites["h003"].advert())


@pytest.mark.parametrize("key", ["00" * 32, "01" + "00" * 31])
def test_an_advert_nobody_can_agree_with_is_refused(fresh: Callable[..., Sum], key: str):
    found = fresh()
    advert = Advert.read(found.sites["h000"].advert())
    signed = Advert(advert.occasion, advert.channel_key, key, advert.commitment).sign(signer("h000"))
    with pytest.raises(UpdateRefused, match="the key of h000 is none"):
        found.coordinator.take_advert(signed)


def test_a_site_with_another_sites_keys_is_refused(fresh: Callable[..., Sum]):
    found = fresh()
    signed = found.sites["h000"].advert()
    found.coordinator.take_advert(signed)
    advert = Advert.read(signed)
    copied = Advert(advert.occasion, advert.mask_key, advert.channel_key, advert.commitment).sign(signer("h001"))
    with pytest.raises(UpdateRefused, match="h001 has a key that is there twice"):
        found.coordinator.take_advert(copied)


def test_a_site_that_leaves_somebody_out_is_not_in_the_cohort(fresh: Callable[..., Sum]):
    found = fresh().upto("advert")
    boxes = found.sites["h000"].deal(found.adverts)
    for wrong in (boxes[:-1], boxes[:-1] + boxes[:1], [*boxes, boxes[0]]):
        with pytest.raises(UpdateRefused, match="h000 did not deal one box to each"):
            found.coordinator.take_dealt(wrong)
    with pytest.raises(UpdateRefused, match="dealt no shares"):
        found.coordinator.take_dealt([])


def test_a_site_that_agrees_to_other_survivors_is_refused(fresh: Callable[..., Sum]):
    found = fresh().upto("masked")
    three = tuple(names(3))
    theirs = [found.masked[name][0] for name in three]
    signed = found.sites["h000"].agree(three, ("h003",), theirs)
    with pytest.raises(UpdateRefused, match="h000 agreed to other survivors"):
        found.coordinator.take_agreed(signed)


def test_a_stranger_is_refused(fresh: Callable[..., Sum]):
    found = fresh()
    advert = Advert.read(found.sites["h000"].advert())
    with pytest.raises(UpdateRefused, match="evil is not among the sites"):
        found.coordinator.take_advert(advert.sign(signer("evil")))


def test_a_site_says_itself_who_dealt_what_was_not_signed_for(fresh: Callable[..., Sum]):
    found = fresh().upto("shares")
    inbox = found.coordinator.inbox("h000")
    dealt = Dealt.read(inbox[0])
    other = mark(b"x" * 33, "seed", dealt.occasion, "h001", "h000")
    inbox[0] = Dealt(dealt.occasion, dealt.to, dealt.box, other, dealt.key_mark).sign(signer("h001"))
    with pytest.raises(SumAborted, match="the shares of h001 are not those it signed for"):
        found.sites["h000"].mask(inbox, found.updates["h000"], found.model)


def test_a_sites_memory_is_its_owners_and_each_sites_own(tmp_path: Path):
    found = Sum(a_plan(3), tmp_path)
    found.sites["h000"].advert()
    assert (tmp_path / "h000.json").stat().st_mode & 0o077 == 0
    Turns(tmp_path / "h001.json").take(found.occasion)
