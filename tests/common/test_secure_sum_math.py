"""Rounding, masks and shares: what a secure sum is made of."""

from __future__ import annotations

import hmac
import itertools
import math
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from sums import OCCASION
from wardround.common.errors import ConfigError, SumAborted
from wardround.common.secure_sum import shamir
from wardround.common.secure_sum.masks import BLOCK, Mask, add_masks, agreed, opposite, pair_mask, self_mask
from wardround.common.secure_sum.occasion import MOST_SITES, Occasion, SumPlan
from wardround.common.secure_sum.rounding import check_range, quantise, to_floats
from wardround.common.secure_sum.shares import Channel, Shares, mark

quick = settings(derandomize=True, deadline=None, max_examples=50)


def uniform(count: int) -> dict[str, float]:
    return {f"h{number}": 1 / count for number in range(count)}


# ---- rounding


@quick
@given(st.integers(3, MOST_SITES), st.floats(1e-6, 1e6), st.integers(0, 2**32))
def test_the_sum_of_rounded_vectors_is_within_1e_7_of_the_clip(count: int, clip: float, seed: int):
    rng, total, exact = np.random.default_rng(seed), np.zeros(50, np.uint32), np.zeros(50)
    for weight in uniform(count).values():
        vector = rng.uniform(-clip, clip, 50)
        total += quantise(vector, weight, clip, 30)[0]
        exact += weight * vector
    assert np.abs(to_floats(total, clip, 30) - exact).max() <= 1e-7 * clip


@quick
@given(st.lists(st.floats(1e-4, 1.0), min_size=3, max_size=40), st.integers(1, 30), st.floats(1e-9, 1e9))
def test_what_passes_the_check_cannot_wrap(weights: list[float], bits: int, clip: float):
    named = {f"h{number}": weight for number, weight in enumerate(weights)}
    try:
        check_range(named, clip, bits)
    except ConfigError:
        return
    for sign in (1, -1):
        far = np.full(3, sign * 9 * clip)
        total = sum(quantise(far, weight, clip, bits)[0].view(np.int32).astype(np.int64) for weight in weights)
        assert np.abs(total).max() < 1 << 31


@pytest.mark.parametrize(
    ("key", "given"),
    {
        "bits": ({"bits": 31}, {"bits": 0}, {"bits": 30.0}, {"bits": True}),
        "clip": ({"clip": 0.0}, {"clip": -1.0}, {"clip": math.nan}, {"clip": math.inf}, {"clip": 5e-324}, {"clip": 1e-310}),
        "noise_headroom": ({"noise_headroom": -1}, {"noise_headroom": 0.5}),
        "weights.h1": ({"weights": {"h1": 0.0}}, {"weights": {"h1": 1.1}}, {"weights": {"h1": math.nan}}),
        "weights:": ({"weights": {"a": 1.0, "b": 1.0}}, {"noise_headroom": 1 << 30}),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_numbers_that_could_wrap_are_refused_by_name(key: str, given: tuple[dict[str, object], ...]):
    for one in given:
        with pytest.raises(ConfigError, match=key):
            check_range(**{"weights": uniform(4), "clip": 1.0, "bits": 30, **one})


def test_noise_has_the_room_that_was_kept_for_it_and_no_more():
    room = (1 << 31) - 1 - sum(math.ceil(w * 2**26) + 1 for w in uniform(4).values())
    check_range(uniform(4), 1.0, 26, room)
    with pytest.raises(ConfigError, match="noise_headroom"):
        check_range(uniform(4), 1.0, 26, room + 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 40_000, 99_999])
def test_a_number_that_is_not_finite_is_refused(bad: float, at: int):
    vector = np.zeros(100_000, np.float32)
    vector[at] = bad
    with pytest.raises(SumAborted, match="not finite"):
        quantise(vector, 0.25, 1.0, 30)


def test_clipped_numbers_are_counted_and_end_at_the_clip():
    vector = np.tile(np.array([0.5, -3.0, 1.0, 1e30], np.float32), 20_000)
    ring, clipped = quantise(vector, 1.0, 1.0, 29)
    assert clipped == 40_000
    assert np.array_equal(to_floats(ring, 1.0, 29)[:4], [0.5, -1.0, 1.0, 1.0])


def test_a_clip_that_float32_rounds_up_is_kept():
    clip = 0.1
    vector = np.full(5, clip, np.float32)
    assert float(vector[0]) > clip
    ring, clipped = quantise(vector, 1.0, clip, 29)
    assert clipped == 5
    assert ring.max() == 1 << 29


def test_the_result_goes_where_it_is_wanted_in_the_type_that_is_wanted():
    vector, out = np.linspace(-1, 1, 77_777, dtype=np.float32), np.empty(77_777, np.uint32)
    ring, _ = quantise(vector, 0.5, 1.0, 30, out=out)
    assert ring is out
    assert to_floats(out, 1.0, 30, np.float32).dtype == np.float32
    assert np.abs(2 * to_floats(out, 1.0, 30) - vector).max() < 1e-8


# ---- masks


def stream(key: bytes, numbers: int) -> np.ndarray:
    cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(cipher.update(bytes(4 * numbers)), "<u4")


@pytest.mark.parametrize("size", [1, 3, 4, 1000, BLOCK // 4, BLOCK // 4 + 1, 3 * BLOCK // 4 - 5, 70_001])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_mask_is_the_stream_of_its_key_whatever_the_threads(size: int, threads: int):
    keys, vector = [os.urandom(32), os.urandom(32)], np.arange(size, dtype=np.uint32)
    add_masks(vector, [Mask(keys[0], 1), Mask(keys[1], -1)], threads=threads)
    assert np.array_equal(vector, np.arange(size, dtype=np.uint32) + stream(keys[0], size) - stream(keys[1], size))


def test_a_mask_is_the_cipher_of_a_counter_from_zero():
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")  # of NIST SP 800-38A, F.5.5
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = b"".join(cipher.update(number.to_bytes(16, "big")) for number in range(250))
    vector = np.zeros(1000, np.uint32)
    add_masks(vector, [Mask(key, 1)])
    assert vector.astype("<u4").tobytes() == blocks


def test_the_key_of_a_mask_is_by_hkdf():
    secret, salt, info = b"s" * 32, OCCASION.salt("m"), b'["pair","a","b"]'
    extracted = hmac.digest(salt, secret, "sha256")
    assert pair_mask(secret, salt, "b", "a").key == hmac.digest(extracted, info + b"\x01", "sha256")  # RFC 5869, one block


def test_pair_masks_cancel_and_opposites_do():
    ours, theirs = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    secret = agreed(ours, theirs.public_key().public_bytes_raw(), "b")
    assert secret == agreed(theirs, ours.public_key().public_bytes_raw(), "a")
    vector, salt = np.zeros(500, np.uint32), OCCASION.salt("m")
    add_masks(vector, [pair_mask(secret, salt, "a", "b")])
    assert vector.any()
    add_masks(vector, [pair_mask(secret, salt, "b", "a"), Mask(b"k" * 32, 1), opposite(Mask(b"k" * 32, 1))])
    assert not vector.any()


def test_every_mask_of_every_occasion_has_a_key_of_its_own():
    occasions = [OCCASION, Occasion("00" * 32, "run-1", 3, 1), Occasion("5e" * 32, "run-2", 3, 1),
                 Occasion("5e" * 32, "run-1", 4, 1), Occasion("5e" * 32, "run-1", 3, 2)]  # fmt: skip
    secret, keys = b"s" * 32, set()
    for occasion, model in itertools.product(occasions, ("m1", "m2")):
        salt = occasion.salt(model)
        keys |= {pair_mask(secret, salt, *pair).key for pair in (("a", "b"), ("a", "c"), ("ab", "c"), ("a", "bc"))}
        keys |= {self_mask(secret, salt, name).key for name in ("a", "b")}
    assert len(keys) == len(occasions) * 2 * 6


@pytest.mark.parametrize("bad", [bytes(32), b"\x01" + bytes(31), b"short", b""])
def test_a_key_with_which_everybody_agrees_is_refused(bad: bytes):
    with pytest.raises(SumAborted, match="the key of st-olav is none"):
        agreed(X25519PrivateKey.generate(), bad, "st-olav")


def test_a_key_does_not_stand_in_a_traceback():
    assert "6b6b" not in repr(Mask(b"k" * 32, 1))
    assert "kkk" not in repr(Mask(b"k" * 32, 1)) + repr(Shares(b"k" * 33, b"k" * 33))


# ---- shares


@pytest.mark.parametrize(("sites", "threshold"), [(3, 3), (4, 3), (5, 4), (10, 7), (32, 22), (100, 67), (128, 86)])
def test_more_than_two_thirds_make_a_secret(sites: int, threshold: int):
    assert shamir.threshold_of(sites) == threshold
    secret = os.urandom(32)
    shares = shamir.deal(secret, threshold, range(1, sites + 1))
    assert shamir.combine(dict(list(shares.items())[-threshold:])) == secret
    assert shamir.combine(dict(list(shares.items())[: threshold - 1])) != secret


@quick
@given(st.binary(min_size=32, max_size=32), st.integers(2, 9), st.data())
def test_any_t_shares_make_the_secret(secret: bytes, threshold: int, data: st.DataObject):
    points = data.draw(st.lists(st.integers(1, 128), min_size=threshold, max_size=12, unique=True))
    shares = shamir.deal(secret, threshold, points)
    assert all(shamir.is_share(share) for share in shares.values())
    some = data.draw(st.permutations(points))[:threshold]
    assert shamir.combine({point: shares[point] for point in some}) == secret


def test_the_field_is_a_prime_field_larger_than_any_secret():
    assert shamir.PRIME > 1 << 256
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in (2, 3, 5, 7, 11, 13))
    for secret in (bytes(32), b"\xff" * 32):
        assert shamir.combine(shamir.deal(secret, 3, [2, 5, 9])) == secret


def test_shares_of_known_coefficients_are_known(monkeypatch: pytest.MonkeyPatch):
    draws = iter([5, 7])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda below: next(draws))
    shares = shamir.deal((42).to_bytes(32, "big"), 3, [1, 2, 10])
    assert {point: int.from_bytes(share, "big") for point, share in shares.items()} == {1: 54, 2: 80, 10: 792}


def test_fewer_than_t_shares_fit_every_secret():
    held = {1: (17).to_bytes(33, "big"), 2: (99).to_bytes(33, "big")}
    one, two, three = shamir._weights_at_zero((1, 2, 3))
    for secret in (0, 1, 1 << 255):  # for any of them there is a third share that makes it
        third = (secret - one * 17 - two * 99) * pow(three, -1, shamir.PRIME) % shamir.PRIME
        assert shamir.combine({**held, 3: third.to_bytes(33, "big")}) == secret.to_bytes(32, "big")


@pytest.mark.parametrize("given", [(b"short", [1, 2]), (bytes(32), [1, 1]), (bytes(32), [0, 1])])
def test_what_cannot_be_dealt_is_refused(given: tuple[bytes, list[int]]):
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.deal(given[0], 2, given[1])


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_secret_is_found_beside_bad_shares_as_long_as_t_are_good(bad: int):
    secret = os.urandom(32)
    shares = shamir.deal(secret, 7, range(1, 11))
    for point in range(1, bad + 1):
        shares[point] = (int.from_bytes(shares[point], "big") ^ 1).to_bytes(33, "big")
    assert shamir.recover(shares, 7, secret.__eq__) == (secret, bad == 0)


def test_a_secret_among_many_sites_is_found_beside_a_bad_share():
    secret = os.urandom(32)
    shares = shamir.deal(secret, 22, range(1, 33))
    shares[1] = shares[2]
    assert shamir.recover(shares, 22, secret.__eq__) == (secret, False)


def test_too_few_good_shares_make_nothing():
    secret = os.urandom(32)
    shares = shamir.deal(secret, 4, range(1, 6))
    shares[1], shares[2] = shares[2], shares[1]
    assert shamir.recover(shares, 4, secret.__eq__) == (None, False)
    assert shamir.recover({1: shares[3]}, 4, lambda found: True) == (None, False)


def test_a_box_opens_for_its_receiver_on_its_occasion_only():
    ours, theirs = X25519PrivateKey.generate(), X25519PrivateKey.generate()

    def channel(site: str = "b", peer: str = "a", occasion: Occasion = OCCASION, key: X25519PrivateKey = theirs) -> Channel:
        return Channel.between(key, ours.public_key().public_bytes_raw(), occasion, site, peer)

    sender = Channel.between(ours, theirs.public_key().public_bytes_raw(), OCCASION, "a", "b")
    shares = Shares(b"s" * 33, b"k" * 33)
    box = sender.seal(shares)
    assert channel().open(box) == shares
    later = Occasion(OCCASION.study, OCCASION.run, OCCASION.round, 2)
    stranger = X25519PrivateKey.generate()
    wrong = [channel(site="c"), channel(peer="c"), channel("a", "b"), channel(occasion=later), channel(key=stranger), sender]
    for one in wrong:
        with pytest.raises(SumAborted, match="do not authenticate"):
            one.open(box)
    for text in (box[:-1], box[:5], b"", bytes([box[0] ^ 1]) + box[1:], box + b"x"):
        with pytest.raises(SumAborted, match="do not authenticate"):
            channel().open(text)


def test_a_mark_belongs_to_one_share_of_one_dealer_for_one_holder():
    seen = {mark(share, what, OCCASION, dealer, holder)
            for share in (b"1" * 33, b"2" * 33) for what in ("seed", "key") for dealer in "ab" for holder in "cd"}  # fmt: skip
    assert len(seen) == 16


# ---- the plan's numbers


@pytest.mark.parametrize(
    ("more", "key"),
    [({"weights": uniform(2)}, "2 sites"), ({"weights": uniform(129)}, "129 sites"), ({"size": 0}, "size"),
     ({"size": 1 << 40}, "size"), ({"min_survivors": 2}, "min_survivors"), ({"min_survivors": 5}, "min_survivors"),
     ({"bits": 31}, "bits"), ({"clip": 0.0}, "clip"), ({"weights": {"a": 0.1, "b": 0.1, "../c": 0.1}}, "name")],
)  # fmt: skip
def test_a_plan_without_a_safe_sum_is_refused(more: dict[str, object], key: str):
    with pytest.raises(ConfigError, match=key):
        SumPlan(**{"weights": uniform(4), "clip": 1.0, "bits": 30, "size": 10, **more})


def test_the_floor_of_a_plan_is_the_larger_of_threshold_and_survivors():
    assert SumPlan(uniform(4), 1.0, 30, 1).fewest == 3
    assert SumPlan(uniform(4), 1.0, 30, 1, min_survivors=4).fewest == 4
