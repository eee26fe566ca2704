"""Where a study starts: at weights drawn from the plan's seed, or at public ones out of a file that the plan names by digest.

Public weights are nobody's of this study; if records stood behind them, no epsilon here covers those. The coordinator alone
has the file. Where only a part of the network learns, the rest goes to the sites beside each round's model, never back, and a
site takes it only if it has the plan's digest.

A file is read without pickle's programs: safetensors, or what `torch.load(weights_only=True)` reads. Tensors are found by
name; a network of torchvision also under torchvision's own names. Its checkpoints have BatchNorm where our networks have
GroupNorm: the scale and shift are taken over, the statistics of batches have no place to go.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from wardround.common.errors import ConfigError, OrderRefused
from wardround.common.plan import StudyPlan
from wardround.common.tasks import task_of
from wardround.common.weights import Weights, digest, trainable

_WRAPPED = "network."  # what our wrapper puts before torchvision's names
_SHOWN = 8  # names in a note


@dataclass(frozen=True)
class Start:
    """First weights.

    Attributes:
        weights: of what learns.
        frozen: of what does not, where it came out of a file; else every site makes it itself.
        notes: for the report, what came out of the file and what did not.
    """

    weights: Weights
    frozen: Weights = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def start(plan: StudyPlan, file: Path | None = None) -> Start:
    """The first weights of a study.

    Raises:
        ConfigError: a file for a plan that names none, none for one that does, another file than the plan's, or one that
            does not fit the plan's network: a tensor that is missing, has another shape, or holds what is no number.
    """
    network = task_of(plan).model(plan.model, plan.seed)
    if "weights" not in plan.model:
        if file is not None:
            raise ConfigError(f"{file}: the plan names no model.weights, so it starts from none")
        return Start(trainable(network))
    if file is None:
        raise ConfigError(f"the plan starts from public weights, {plan.model['weights']}; give their file (--weights FILE)")
    body = _bytes(file)
    if _named(body) != plan.model["weights"]:
        raise ConfigError(f"{file}: is {_named(body)}, the plan's model.weights are {plan.model['weights']}")
    notes = _filled(network, _tensors(file, body), str(file))
    fixed = _kept(network, plan.model)
    if fixed and _digest(fixed) != plan.model["frozen"]:
        raise ConfigError(f"{file}: its frozen part is {_digest(fixed)}, the plan's model.frozen is {plan.model['frozen']}")
    return Start(trainable(network), fixed, notes)


def named(plan: StudyPlan, file: Path) -> dict[str, str]:
    """The keys of [model] that name the weights in `file`, for a plan that names none yet.

    Raises:
        ConfigError: the file does not fit the plan's network.
    """
    body = _bytes(file)
    network = task_of(plan).model(plan.model, plan.seed)
    _filled(network, _tensors(file, body), str(file))
    fixed = _frozen(network)
    return {"weights": _named(body)} | ({"frozen": _digest(fixed)} if fixed else {})


def sent(network: nn.Module, options: Mapping[str, Any]) -> Weights:
    """Every tensor that a round's model brings to a site: what learns, and what is frozen if it came out of a file."""
    return trainable(network) | _kept(network, options)


def taken_in(network: nn.Module, options: Mapping[str, Any], weights: Weights) -> Weights:
    """What learns of `weights`, as they were sent; what does not is put into `network`.

    Raises:
        OrderRefused: what does not learn is not what the plan names.
    """
    fixed = {name: weights[name] for name in _kept(network, options)}
    if not fixed:
        return weights
    if _digest(fixed) != options["frozen"]:
        raise OrderRefused("the frozen weights that came with the round are not those the plan names")
    with torch.no_grad():
        for name, tensor in fixed.items():
            network.get_parameter(name).copy_(tensor)
    return {name: tensor for name, tensor in weights.items() if name not in fixed}


def _kept(network: nn.Module, options: Mapping[str, Any]) -> Weights:
    return _frozen(network) if "frozen" in options else {}


def _frozen(network: nn.Module) -> Weights:
    return {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}


def _digest(fixed: Weights) -> str:
    return f"sha256:{digest(fixed)}"


def _named(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def _tensors(file: Path, body: bytes) -> dict[str, Tensor]:
    """The file's named tensors, in whatever precision it has them."""
    try:
        found: object = (
            safetensors.torch.load(body)
            if body[8:9] == b"{"
            else torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        )
    except Exception:  # torch's and safetensors' own, of a dozen kinds
        raise ConfigError(f"{file}: is neither safetensors nor a file of tensors alone that torch saved") from None
    if not isinstance(found, Mapping) or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()):
        raise ConfigError(f"{file}: holds something else than named tensors; save the network's state_dict() alone")
    return dict(found)


def _filled(network: nn.Module, tensors: Mapping[str, Tensor], file: str) -> list[str]:
    """Put the file's tensors into `network`; returns notes on what was done."""
    parameters = dict(network.named_parameters())
    answer = list(parameters)[-1].rpartition(".")[0]  # the layer that answers stands last
    home = {name: name if name in tensors else name.removeprefix(_WRAPPED) for name in parameters}
    of_answer = [name for name in parameters if name.rpartition(".")[0] == answer]
    fresh = any(home[n] not in tensors or tensors[home[n]].shape != parameters[n].shape for n in of_answer)
    for name, p in parameters.items():
        if fresh and name in of_answer:
            continue
        if home[name] not in tensors:
            raise ConfigError(f"{file}: has no tensor {home[name]}, which the plan's network wants")
        given = tensors[home[name]]
        if given.shape != p.shape:
            raise ConfigError(
                f"{file}: tensor {home[name]} has shape {list(given.shape)}, the plan's network wants {list(p.shape)}"
            )
        if not _finite(given):
            raise ConfigError(f"{file}: tensor {home[name]} holds something that is no number")
        with torch.no_grad():
            p.copy_(given)
    taken = {home[name] for name in parameters if not (fresh and name in of_answer)}
    return _notes(network, sorted(tensors.keys() - taken), len(taken), answer if fresh else "")


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        return False
    return bool(tensor.to(torch.float32).isfinite().all())


def _notes(network: nn.Module, left: list[str], taken: int, fresh: str) -> list[str]:
    fixed = sum(t.numel() for t in _frozen(network).values())
    of_all = sum(p.numel() for p in network.parameters())
    notes = [
        f"The study started from public weights: {taken} tensors came out of the file that the plan names. No epsilon of this "
        f"study covers records that they were trained on. Of {of_all:,} numbers {of_all - fixed:,} learn."
    ]
    if fresh:
        notes.append(f"The layer that answers ({fresh}) did not come out of it, but was drawn from the plan's seed.")
    statistics = [n for n in left if n.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")]
    if statistics:
        notes.append(
            f"{len(statistics)} tensors of the file are statistics of batches (BatchNorm). The network has GroupNorm in its "
            "place, which took over scale and shift, so it does not compute what the file's network computed."
        )
    others = [name for name in left if name not in statistics]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        notes.append(f"Of the file's tensors these were not used: {', '.join(others[:_SHOWN])}{more}.")
    return notes
