"""A model as it travels: named float32 tensors, trainable ones only, and their checks.

What crosses the wire is Flower's own `ArrayRecord`. Between hospitals its arrays are bytes in NumPy's format, without
pickle; inside one process they keep their tensor and become bytes only if somebody asks (`LiveArray`).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from wardround.common.errors import UpdateRefused

Weights = dict[str, Tensor]

_LARGEST_HEADER = 4096  # bytes; an honest float32 header has 128


class LiveArray(Array):
    """An `Array` that holds its tensor and makes bytes of it only when a transport asks for `data`."""

    def __init__(self, tensor: Tensor) -> None:
        self.__dict__.update(tensor=tensor, dtype="float32", shape=tuple(tensor.shape), stype="numpy.ndarray")

    def __getattr__(self, name: str) -> Any:
        if name != "data":
            raise AttributeError(name)
        buffer = io.BytesIO()
        np.save(buffer, self.__dict__["tensor"].detach().cpu().contiguous().numpy(), allow_pickle=False)
        data = buffer.getvalue()
        self.__dict__["data"] = data
        return data


LiveArray.__qualname__ = "Array"  # Flower writes the class name into what it sends; the receiver has a plain Array


@dataclass(frozen=True)
class Shapes:
    """The names and shapes a model's weights must have."""

    of: Mapping[str, tuple[int, ...]]

    @classmethod
    def like(cls, weights: Mapping[str, Tensor]) -> Shapes:
        """The shapes of `weights`."""
        return cls({name: tuple(tensor.shape) for name, tensor in weights.items()})

    @property
    def count(self) -> int:
        """How many numbers a model has."""
        return sum(math.prod(shape) for shape in self.of.values())

    @property
    def nbytes(self) -> int:
        """Bytes of one model on the wire, NumPy's headers included."""
        return 4 * self.count + 128 * len(self.of)


def trainable(model: nn.Module) -> Weights:
    """The tensors of `model` that learn, detached, under torch's own names; buffers never travel."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values, in hex."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(json.dumps([name, list(tensor.shape)]).encode())
        total.update(tensor.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def pack(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """Weights as Flower's record; no bytes are made yet."""
    record = ArrayRecord()
    for name, tensor in weights.items():
        record[name] = LiveArray(tensor)
    return record


def unpack(record: ArrayRecord, shapes: Shapes) -> Weights:
    """The weights in `record`, after every check that can be made before memory is taken.

    Inside one process the tensors are the sender's own; do not write into them.

    Raises:
        UpdateRefused: names, shapes, dtype or format differ from `shapes`, or a size in a header is not the real one.
    """
    if missing := sorted(shapes.of.keys() - record.keys()):
        raise UpdateRefused(f"tensor {missing[0]} is missing")
    if extra := sorted(record.keys() - shapes.of.keys()):
        raise UpdateRefused(f"{len(extra)} tensors are not part of the model")
    return {name: _unpack_one(name, record[name], shape) for name, shape in shapes.of.items()}


def _unpack_one(name: str, array: Array, shape: tuple[int, ...]) -> Tensor:
    if tuple(array.shape) != shape:
        raise UpdateRefused(f"tensor {name} should have shape {list(shape)}")
    if array.dtype != "float32" or array.stype != "numpy.ndarray":
        raise UpdateRefused(f"tensor {name} should be float32 in NumPy's format")
    if isinstance(array, LiveArray):
        tensor: Tensor = array.__dict__["tensor"]
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise UpdateRefused(f"tensor {name} is not what it says it is")
        return tensor
    return torch.from_numpy(_read_npy(name, array.data, shape))


def _read_npy(name: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    # numpy.load would trust the header and allocate what it claims; here the claim is checked against the plan first
    refused = UpdateRefused(f"tensor {name} is not a float32 array of shape {list(shape)}")
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
        raise refused
    (length,) = struct.unpack("<H", data[8:10])
    if length > _LARGEST_HEADER or len(data) != 10 + length + 4 * math.prod(shape):
        raise refused
    # compared, not parsed: numpy's parser of headers raises a dozen kinds of errors on a hostile one
    if data[10 : 10 + length].rstrip() != f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode():
        raise refused
    return np.frombuffer(data, dtype="<f4", offset=10 + length).reshape(shape).copy()


def rounded(weights: Weights, numbers: str) -> Weights:
    """`weights` as float32 that "float16" could hold as well: an update so rounded is half as long on a network.

    To be used on what may leave, noise included: what is made of it alone costs no more privacy.

    >>> rounded({"w": torch.tensor([0.1, 1e6, -1e6])}, "float16")["w"]
    tensor([ 9.9976e-02,  6.5504e+04, -6.5504e+04])
    """
    if numbers == "float32":
        return weights
    largest = torch.finfo(torch.float16).max
    return {name: tensor.clamp(-largest, largest).half().float() for name, tensor in weights.items()}


def norm(weights: Mapping[str, Tensor]) -> float:
    """The joint L2 length; NaN or infinite exactly when some number in `weights` is (or the length overflows float32).

    >>> norm({"w": torch.tensor([3.0, 4.0])})
    5.0
    """
    squares = [torch.dot(flat, flat) for flat in (tensor.reshape(-1) for tensor in weights.values())]
    total = float(torch.stack(squares).sum())
    return math.sqrt(total) if total >= 0 else math.nan
