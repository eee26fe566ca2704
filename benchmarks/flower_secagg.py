"""Flower's own SecAgg+ beside ours: its client's four stages, called as its mod calls them, and its server's unmasking.

The stages are Flower's functions themselves. Its workflow unmasks amid its messages, so that step is put together here from the
functions it uses, in its order. What its stages do besides, such as writing arrays as bytes, is in the time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod, parameters_subtraction
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen, share_keys_plaintext_concat
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

CLIP, LEVELS, RING, MOST_WEIGHT = 8.0, 1 << 22, 1 << 32, 1000.0  # the workflow's defaults
_MINE = 1  # the number of the client that is timed


@dataclass(frozen=True)
class _Peer:
    """The other sites: two key pairs each."""

    masks: tuple[bytes, bytes]  # private, public
    channel: tuple[bytes, bytes]

    @classmethod
    def new(cls) -> _Peer:
        (one, one_public), (two, two_public) = generate_key_pairs(), generate_key_pairs()
        mine = (private_key_to_bytes(one), public_key_to_bytes(one_public))
        return cls(mine, (private_key_to_bytes(two), public_key_to_bytes(two_public)))


def client(update: np.ndarray, count: int, threshold: int) -> tuple[float, int]:
    """Processor seconds of all stages of one client among `count`, and the bytes it uploads."""
    peers = {number: _Peer.new() for number in range(2, count + 1)}
    settings: Any = {
        Key.SAMPLE_NUMBER: count, Key.SHARE_NUMBER: count, Key.THRESHOLD: threshold, Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: LEVELS, Key.MOD_RANGE: RING, Key.MAX_WEIGHT: MOST_WEIGHT,
    }  # fmt: skip
    parameters, state = ndarrays_to_parameters([update]), SecAggPlusState(nid=_MINE)
    began = time.process_time()
    keys = _setup(state, settings)
    spent = time.process_time() - began
    public: Any = {str(number): [peer.masks[1], peer.channel[1]] for number, peer in peers.items()}
    public[str(_MINE)] = [keys[Key.PUBLIC_KEY_1], keys[Key.PUBLIC_KEY_2]]
    boxes: Any = {Key.SOURCE_LIST: list(peers), Key.CIPHERTEXT_LIST: []}
    for number, peer in peers.items():
        shared = generate_shared_key(bytes_to_private_key(peer.channel[0]), bytes_to_public_key(state.pk2))
        text = share_keys_plaintext_concat(number, _MINE, os.urandom(52), os.urandom(260))
        boxes[Key.CIPHERTEXT_LIST].append(encrypt(shared, text))
    began = time.process_time()
    _share_keys(state, public)
    masked: Any = _collect_masked_vectors(state, boxes, 100, parameters)
    _unmask(state, {Key.ACTIVE_NODE_ID_LIST: [_MINE, *list(peers)[1:]], Key.DEAD_NODE_ID_LIST: [2]})  # type: ignore[arg-type]
    return spent + time.process_time() - began, sum(map(len, masked[Key.MASKED_PARAMETERS]))


def unmask(size: int, count: int, threshold: int) -> float:
    """Processor seconds to take the masks off a sum of `count` - 1 vectors, one client having vanished."""
    peers = {number: _Peer.new() for number in range(count)}
    alive = list(peers)[1:]
    shares = {number: create_shares(os.urandom(32), threshold, count)[:threshold] for number in alive}
    shares[0] = create_shares(peers[0].masks[0], threshold, count)[:threshold]
    total = [np.zeros(size, np.int64)]
    began = time.process_time()
    for number in alive:
        total = parameters_subtraction(total, pseudo_rand_gen(combine_shares(shares[number]), RING, [(size,)]))
    key = combine_shares(shares[0])
    for number in alive:
        shared = generate_shared_key(bytes_to_private_key(key), bytes_to_public_key(peers[number].masks[1]))
        total = parameters_addition(total, pseudo_rand_gen(shared, RING, [(size,)]))
    for vector in dequantize(parameters_mod(total, RING), CLIP, LEVELS):  # type: ignore[arg-type]
        vector += -(len(alive) - 1) * CLIP
        vector *= 1.0 / len(alive)
    return time.process_time() - began
