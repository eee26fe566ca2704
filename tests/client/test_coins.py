"""Secret randomness: which law the noise follows, how far its tail reaches, that no entry goes without, and what is refused.

The keys are the operating system's, so nothing here can be made to repeat: limits on random figures lie six standard
deviations out (a false alarm in 5e8 runs), and p-values at 1e-8.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from wardround.client.dp import Coins, OsCoins, SeededCoins
from wardround.client.dp import chacha as chacha_module
from wardround.client.dp import coins as coins_module
from wardround.client.dp.chacha import DeviceCoins, keystream, little_endian, normal_pairs
from wardround.client.dp.coins import _PAIRS, _WORTH_A_THREAD, _normal_pairs

TYPES = [torch.float32, torch.float64]
CHUNK = 2 * _PAIRS
NEVER = 6.0  # standard deviations
LARGE = 200_001


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def known_keys(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Keys and nonces that the test knows: what the operating system was asked for, in order."""
    given_out: list[bytes] = []

    def known(size: int) -> bytes:
        given_out.append(bytes((len(given_out) * 37 + 11 * at) % 256 for at in range(size)))
        return given_out[-1]

    monkeypatch.setattr(os, "urandom", known)
    return given_out


def noise(count: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, coins: Coins | None = None) -> Tensor:
    to = torch.zeros(count, dtype=dtype)
    (coins or OsCoins()).add_normal(to, scale=scale)
    return to


def from_device_coins(count: int, dtype: torch.dtype) -> Tensor:
    to = torch.zeros(count, dtype=dtype)
    DeviceCoins(torch.device("cpu")).add_normal(to, scale=1.0)
    return to


def assert_standard_normal(z: Tensor) -> None:
    """Moments, shape, tail and neighbours."""
    x, n = z.double().numpy(), len(z)
    assert np.isfinite(x).all()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < NEVER * math.sqrt(variance / n), f"moment {power}"
    assert stats.kstest(x, "norm").pvalue > 1e-8
    for far in (2.0, 3.0):
        share = 2 * stats.norm.sf(far)
        assert abs((np.abs(x) > far).mean() - share) < NEVER * math.sqrt(share / n), f"beyond {far}"
    half = (n + 1) // 2
    for a, b in ((x[:-1], x[1:]), (x[: n - half], x[half:]), (x[: n - half] ** 2 - 1, x[half:] ** 2 - 1)):
        assert abs((a * b).mean()) < NEVER * np.std(a * b) / math.sqrt(len(a))  # the halves are cosines and sines


def box_muller(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The textbook's transform of (words, pairs) uint32 in float64: all cosines, then all sines.

    Only the uniform number under the logarithm is rounded as we promise: to `dtype`, and away from 1.
    """
    kind = np.float32 if dtype == torch.float32 else np.float64
    uniform = words[0].astype(kind) + (words[1] | 1).astype(kind) * kind(2.0**-32)
    uniform *= kind(2.0**-32 * (1 - np.finfo(kind).epsneg))
    radius = np.sqrt(-2 * np.log(uniform.astype(np.float64)))
    angle = words[2].view(np.int32)
    turns = (angle | 1) * 2.0**-32 if kind is np.float32 else (angle + (words[3] | 1) * 2.0**-32) * 2.0**-32
    return np.concatenate([radius * np.cos(2 * np.pi * turns), radius * np.sin(2 * np.pi * turns)])


def expected_noise(key: bytes, nonce: bytes, count: int, dtype: torch.dtype, skip: int = 0) -> np.ndarray:
    """What AES-256-CTR under this key makes of `count` entries, chunk after chunk."""
    stream = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor()
    stream.update(bytes(skip))
    found = [np.empty(0)]
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        pairs, rows = (size + 1) // 2, 3 if dtype == torch.float32 else 4
        words = np.frombuffer(stream.update(bytes(4 * rows * pairs)), dtype=np.uint32).reshape(rows, pairs)
        found.append(box_muller(words, dtype)[:size])
    return np.concatenate(found)


def assert_close(found: Tensor, expected: np.ndarray) -> None:
    loose = 2e-6 if found.dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=loose, atol=loose)


# --- the law --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_noise_follows_the_normal_law(dtype: torch.dtype):
    assert_standard_normal(noise(LARGE, dtype))
    assert_standard_normal(noise(LARGE, dtype, scale=0.02) / 0.02)
    assert_standard_normal(from_device_coins(LARGE, dtype))


def test_float64_numbers_of_one_draw_follow_the_normal_law():
    drawn = OsCoins().normal(LARGE)
    assert drawn.dtype == torch.float64
    assert_standard_normal(drawn)


def test_uniform_numbers_are_uniform():
    drawn = OsCoins().uniform(LARGE).numpy()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > 1e-8
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < NEVER / math.sqrt(LARGE)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 777])
def test_every_entry_gets_the_number_that_the_textbook_makes_of_the_keystream(
    known_keys: list[bytes], count: int, dtype: torch.dtype
):
    found = noise(count, dtype)
    key, nonce = known_keys
    assert (len(key), len(nonce)) == (32, 16)
    assert_close(found, expected_noise(key, nonce, count, dtype))


def test_uniform_and_normal_numbers_never_share_bits(known_keys: list[bytes]):
    coins = OsCoins()
    uniform = coins.uniform(13)
    found = noise(100, coins=coins)
    again = coins.uniform(5)
    key, nonce = known_keys
    assert_close(found, expected_noise(key, nonce, 100, torch.float32, skip=8 * 13))
    bits = Cipher(algorithms.AES(key), modes.CTR(nonce)).encryptor().update(bytes(8 * 13 + 12 * 50 + 8 * 5))
    words = np.frombuffer(bits[: 8 * 13] + bits[-8 * 5 :], dtype=np.uint64)
    assert torch.cat([uniform, again]).tolist() == ((words >> np.uint64(11)) * 2.0**-53).tolist()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    dtype=st.sampled_from(TYPES),
    scale=st.floats(1e-20, 1e20),
    seeded=st.booleans(),
)
def test_noise_is_added_to_what_is_there_in_any_shape_and_at_any_scale(
    shape: list[int], dtype: torch.dtype, scale: float, seeded: bool
):
    coins = SeededCoins(1) if seeded else OsCoins()
    to = torch.zeros(shape, dtype=dtype)
    address = to.data_ptr()
    coins.add_normal(to, scale=scale)
    assert to.data_ptr() == address
    assert bool((to != 0).all())  # neither lost in a square of the scale nor left out
    assert bool((to.abs() <= 9.5 * scale).all())
    before = to.fill_(1e25 if scale > 1e10 else 1.0).clone()
    coins.add_normal(to, scale=0.1 * float(before.max()) if before.numel() else scale)
    unmoved = int((to == before).sum())  # a number under half a last bit leaves all as it was: 4 in 10^7
    assert unmoved <= min(2, (to.numel() + 1) // 2)
    assert bool(((to - before).abs() <= 0.95 * before.abs()).all())


def test_a_parameter_that_wants_gradients_is_noised_in_place():
    for coins in (OsCoins(), SeededCoins(1)):
        weight = torch.nn.Parameter(torch.zeros(9))
        coins.add_normal(weight, scale=1.0)
        assert bool((weight != 0).all())
        assert weight.grad is None


# --- the tail -------------------------------------------------------------------------------------------------------------

EDGES = np.array([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF], dtype=np.uint32)


def extreme_words(rows: int) -> np.ndarray:
    """Every combination of the most extreme words."""
    return np.stack([axis.ravel() for axis in np.meshgrid(*[EDGES] * rows)]).copy()


def on_cpu(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    work = np.full((3, words.shape[1]), np.nan, dtype=np.float32 if dtype == torch.float32 else np.float64)
    return torch.from_numpy(np.concatenate(_normal_pairs(words.copy(), 1.0, work)))


def on_device(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.cat(normal_pairs(torch.from_numpy(words.view(np.int32)), dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transform", [on_cpu, on_device])
def test_the_most_extreme_bits_give_finite_numbers_beyond_nine_standard_deviations(
    transform: Callable[[np.ndarray, torch.dtype], Tensor], dtype: torch.dtype
):
    words = extreme_words(3 if dtype == torch.float32 else 4)
    found = transform(words, dtype)
    assert bool(torch.isfinite(found).all())
    assert float(found.abs().max()) == pytest.approx(math.sqrt(2 * 64 * math.log(2)), rel=1e-6)
    assert float(found.max()) > 9.4
    assert float(found.min()) < -9.4
    if dtype == torch.float32:
        assert bool((found != 0).all())  # an entry without noise would tell what was there


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transform", [on_cpu, on_device])
def test_the_tail_is_fine_not_a_few_steps(transform: Callable[[np.ndarray, torch.dtype], Tensor], dtype: torch.dtype):
    low = np.random.default_rng(0).integers(0, 2**32, 5000, dtype=np.uint32)  # of radii that happen once in 2^32 pairs
    words = np.stack([np.zeros_like(low), low, *[np.zeros_like(low)] * (1 if dtype == torch.float32 else 2)])
    found = transform(words, dtype)[:5000]
    assert float(found.min()) > 6.6
    assert len(found.unique()) > 4500
    assert_close(found, box_muller(words, dtype)[:5000])


def test_hand_made_keystreams_reach_the_tensor_as_they_are():
    class Zeros:
        def update_into(self, data: memoryview, buffer: memoryview) -> int:
            np.frombuffer(buffer, dtype=np.uint8)[: len(data)] = 0
            return len(data)

    coins = OsCoins()
    coins._keystreams[0]._stream = Zeros()  # type: ignore[assignment]
    found = noise(CHUNK + 3, coins=coins, scale=2.0)
    assert float(found.max()) == pytest.approx(2 * math.sqrt(2 * 64 * math.log(2)))
    assert bool(torch.isfinite(found).all())


# --- whose bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
def test_no_two_rounds_and_no_two_draws_share_noise(dtype: torch.dtype):
    torch.manual_seed(0)
    coins = OsCoins()
    one, other = noise(LARGE, dtype, coins=coins), noise(LARGE, dtype, coins=coins)
    torch.manual_seed(0)
    fresh = noise(LARGE, dtype)
    for a, b in ((one, other), (one, fresh), (other, fresh)):
        assert abs(float((a * b).double().mean())) < NEVER / math.sqrt(LARGE)
        assert float((a == b).double().mean()) < 1e-3


def test_the_generator_of_torch_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    noise(1000)
    from_device_coins(1000, torch.float32)
    assert torch.equal(torch.rand(4), expected)


def test_seeded_coins_draw_for_a_tensor_what_they_draw_as_numbers():
    for dtype in TYPES:
        to, twin = torch.ones(3, 5, dtype=dtype), SeededCoins(4)
        coins = SeededCoins(4)
        coins.add_normal(to, scale=0.3)
        assert torch.equal(to, torch.ones(3, 5, dtype=dtype) + 0.3 * twin.normal(15).view(3, 5).to(dtype))
        assert torch.equal(coins.uniform(4), twin.uniform(4))  # the next draw follows where it should


# --- threads --------------------------------------------------------------------------------------------------------------

TWO = 2 * _WORTH_A_THREAD + 12_345


@pytest.mark.parametrize("count", [1, 2])
def test_with_any_number_of_threads_every_entry_has_one_noise(threads: Callable[[int], None], count: int):
    threads(count)
    found = noise(TWO)
    assert bool((found != 0).all())
    regions = found[: TWO // 128 * 128].view(128, -1).double()  # noise twice would double a region's variance
    limit = (NEVER + 1) * math.sqrt(2 / regions.shape[1])  # 128 regions, whose squares are skewed
    assert bool(((regions.square().mean(1) - 1).abs() < limit).all())
    shared = regions @ regions.T / regions.shape[1] - torch.diag(regions.square().mean(1))
    assert float(shared.abs().max()) < (NEVER + 1) / math.sqrt(regions.shape[1])  # 8128 pairs of regions


def test_each_thread_has_a_key_of_its_own_and_the_schedule_does_not_matter(
    threads: Callable[[int], None], known_keys: list[bytes]
):
    threads(2)
    coins = OsCoins()
    found = noise(TWO, coins=coins)
    first, nonce, second, other_nonce = known_keys
    assert first != second
    cut = (TWO + 1) // 2
    assert_close(found[:cut], expected_noise(first, nonce, cut, torch.float32))
    assert_close(found[cut:], expected_noise(second, other_nonce, TWO - cut, torch.float32))
    noise(TWO, coins=coins)
    assert len(known_keys) == 4  # the keystreams go on; a second tensor asks for no new key


def test_an_error_in_a_thread_is_not_lost(threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("no more bits")

    threads(2)
    monkeypatch.setattr(coins_module, "_normal_pairs", broken)
    with pytest.raises(RuntimeError, match="no more bits"):
        noise(TWO)


# --- the cipher of a device -----------------------------------------------------------------------------------------------


def chacha20(key: bytes, nonce: bytes, block: int, blocks: int) -> np.ndarray:
    """(blocks, 16) int32 words of the keystream, by the library."""
    cipher = Cipher(algorithms.ChaCha20(key, block.to_bytes(4, "little") + nonce), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(64 * blocks)), dtype=np.int32).reshape(blocks, 16)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    key=st.binary(min_size=32, max_size=32),
    nonce=st.binary(min_size=12, max_size=12),
    block=st.one_of(st.integers(0, 2**32 - 40), st.sampled_from([0, 1, 2**31 - 3, 2**32 - 33])),
    blocks=st.integers(1, 33),
)
def test_our_chacha20_is_the_librarys_bit_for_bit(key: bytes, nonce: bytes, block: int, blocks: int):
    found = keystream(little_endian(key), little_endian(nonce), block, blocks)
    assert found.dtype == torch.int32
    np.testing.assert_array_equal(found.T.numpy(), chacha20(key, nonce, block, blocks))


def test_our_chacha20_is_the_one_of_the_standard():
    """RFC 8439, section 2.3.2."""
    key, nonce = bytes(range(32)), bytes.fromhex("000000090000004a00000000")
    block = keystream(little_endian(key), little_endian(nonce), 1, 1)
    text = block.numpy().tobytes().hex()
    assert text.startswith("10f1e7e4d13b5915500fdd1fa32071c4")
    assert text.endswith("b5129cd1de164eb9cbd083e8a2503c4e")


def test_a_device_gives_every_word_once(known_keys: list[bytes], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chacha_module, "_POOL", 1024)
    coins = DeviceCoins(torch.device("cpu"))
    sizes = [5, 17, 300, 0, 1, 256, 255, 254, 300, 250, 4096, 3]  # small ones come out of the pool, large ones do not
    taken = torch.cat([coins.words(size) for size in sizes])
    assert len(taken) == sum(sizes)
    assert len(taken.unique()) == len(taken)  # of 2^32 words; the keys are known, so this does not vary
    key, nonce = known_keys
    assert set(taken.tolist()) <= set(chacha20(key, nonce, 0, coins._block).ravel().tolist())


def test_a_device_takes_a_new_key_before_the_counter_starts_again(known_keys: list[bytes]):
    coins = DeviceCoins(torch.device("cpu"))
    coins._block = 2**32 - 2
    coins.words(2**19)
    assert len(known_keys) == 4
    assert coins._block == 2**19 // 16


@pytest.mark.parametrize("dtype", TYPES)
def test_noise_of_a_device_is_the_textbooks_too(known_keys: list[bytes], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    monkeypatch.setattr(chacha_module, "_PAIRS", 500)  # so that there are several chunks, the last of them odd
    found = torch.full((2345,), 7.0, dtype=torch.float64).to(dtype)
    DeviceCoins(torch.device("cpu")).add_normal(found, scale=0.5)
    words = chacha20(known_keys[0], known_keys[1], 0, 2**20 // 16).T.ravel().view(np.uint32)
    expected, rows = [], 3 if dtype == torch.float32 else 4
    for size in (1000, 1000, 345):
        pairs = (size + 1) // 2
        expected.append(box_muller(words[: rows * pairs].reshape(rows, pairs), dtype)[:size])
        words = words[rows * pairs :]
    assert_close(found, 7 + 0.5 * np.concatenate(expected))


@pytest.mark.gpu
def test_a_gpu_computes_chacha20_bit_for_bit():
    key, nonce = os.urandom(32), os.urandom(12)
    found = keystream(little_endian(key).cuda(), little_endian(nonce).cuda(), 2**31 - 700, 1500)
    np.testing.assert_array_equal(found.T.cpu().numpy(), chacha20(key, nonce, 2**31 - 700, 1500))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
def test_a_gpu_follows_the_normal_law_in_the_middle_and_at_the_edges(dtype: torch.dtype):
    to, coins = torch.zeros(LARGE, dtype=dtype, device="cuda"), OsCoins()
    coins.add_normal(to, scale=1.0)
    assert_standard_normal(to.cpu())
    again = torch.zeros_like(to)
    coins.add_normal(again, scale=1.0)
    assert abs(float((to * again).double().mean())) < NEVER / math.sqrt(LARGE)
    words = torch.from_numpy(extreme_words(3 if dtype == torch.float32 else 4).view(np.int32))
    loose = 1e-5 if dtype == torch.float32 else 1e-12
    for found, expected in zip(normal_pairs(words.cuda(), dtype), normal_pairs(words, dtype), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=loose, atol=loose)


@pytest.mark.gpu
def test_seeded_coins_give_a_gpu_the_noise_of_a_cpu():
    to = torch.zeros(1001, device="cuda")
    SeededCoins(1).add_normal(to, scale=2.0)
    torch.testing.assert_close(to.cpu(), noise(1001, scale=2.0, coins=SeededCoins(1)))


# --- refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [OsCoins, lambda: SeededCoins(1)])
@pytest.mark.parametrize(
    ("to", "named"),
    [
        (torch.zeros(4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(4, dtype=torch.bool), "torch.bool"),
        (torch.zeros(4, dtype=torch.float16), "torch.float16"),
        (torch.zeros(4, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(4, 3).T, "contiguous.*torch.float32"),
        (torch.zeros(8, dtype=torch.float64)[::2], "contiguous.*torch.float64"),
        (torch.zeros(1).expand(5), "contiguous.*torch.float32"),
        (torch.zeros(4, device="meta"), "torch.float32.*meta"),
    ],
)
def test_a_tensor_that_cannot_hold_noise_is_refused_and_left_as_it_was(make: Callable[[], Coins], to: Tensor, named: str):
    with pytest.raises(ValueError, match=named):
        make().add_normal(to, scale=1.0)
    if to.device.type != "meta":
        assert not bool((to != 0).any())


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, 1e39, 1e-50])
def test_a_scale_that_a_tensor_cannot_hold_is_refused(scale: float):
    for coins in (OsCoins(), SeededCoins(1)):
        with pytest.raises(ValueError, match=r"torch\.float32"):
            coins.add_normal(torch.zeros(3), scale=scale)


def test_noise_of_no_scale_changes_nothing():
    assert noise(5, scale=0.0).tolist() == [0.0] * 5
