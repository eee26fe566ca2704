"""What an answer comes from, by captum: integrated gradients for numbers and tokens, saliency and Grad-CAM for pictures.

A method is chosen by the shape of a field, never by the task, so a task that is new tomorrow is explained too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from wardround.client.interpret.answers import Score
from wardround.common.errors import ConfigError
from wardround.common.tasks import Records, Task

# where the straight path from the reference (0) to the record (1) is cut, and how many points each piece has. Where a network
# normalises, what matters happens so close to a reference of zeros that evenly cut pieces would miss it.
_PATHS: tuple[tuple[tuple[float, ...], int], ...] = (((0, 1), 64), ((0, 1e-4, 1e-3, 1e-2, 0.1, 1), 128))
_AT_ONCE = 256  # points
TOLERANCE = 0.01  # of the difference that is explained, or of 1 where that is smaller


@dataclass(frozen=True)
class Attribution:
    """Why one record is scored as it is.

    Attributes:
        score: of the record, see `answers.MEANINGS`.
        reference: the score where every field in `integrated` is at its reference; the same as `score` if there is none.
        delta: the sum of all of `integrated`, less (score - reference): 0 if the integral were exact.
        steps: points of the path.
        integrated: field -> a number for each of its entries, shaped as one record's; they sum to score - reference.
        saliency: picture -> (rows, columns), by how much the score moves with a pixel at most.
        grad_cam: picture -> (rows, columns) of the last convolution, how much each place speaks for the answer.
        layer: picture -> which convolution that is.
    """

    score: float
    reference: float
    delta: float
    steps: int
    integrated: dict[str, Tensor]
    saliency: dict[str, Tensor]
    grad_cam: dict[str, Tensor]
    layer: dict[str, str]

    @property
    def adds_up(self) -> bool:
        """Whether the integral is as good as exact."""
        return abs(self.delta) <= TOLERANCE * max(1.0, abs(self.score - self.reference))


def captum() -> Any:
    """The methods.

    Raises:
        ConfigError: captum is not installed.
    """
    try:
        return importlib.import_module("captum.attr")
    except ImportError:
        raise ConfigError("captum is not installed: pip install wardround[explain]") from None


def kind_of(task: Task, field: str, like: Tensor) -> str:
    """How a field (records, ...) is explained: "picture", "tokens", "line" or "grid".

    Raises:
        ConfigError: there is no method for such a field.
    """
    if not like.is_floating_point():
        if like.dim() == 2:
            return "tokens"
    elif like.dim() in (2, 3, 4):
        return {2: "line", 3: "grid", 4: "picture"}[like.dim()]
    raise ConfigError(
        f"task {task.name}, field {field}: no method for {like.dtype} of shape {list(like.shape[1:])}; there are methods for "
        "tables, series, pictures and tokens"
    )


def attribute(task: Task, model: nn.Module, record: Records, score: Score) -> Attribution:
    """Explain the `score` of one record; `model` and `record` in the same dtype, `model` in eval mode.

    Integrated gradients (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365) for all fields together that are no
    picture, which stay as they are; saliency (Simonyan et al. 2014, https://arxiv.org/abs/1312.6034) and Grad-CAM (Selvaraju
    et al. 2017, https://arxiv.org/abs/1610.02391) for each picture.

    Raises:
        ConfigError: captum is not installed, or there is no method for a field or the network.
    """
    kinds = {name: kind_of(task, name, t) for name, t in record.fields.items()}
    with torch.no_grad():
        at = float(score(model(**record.fields)))
    integrated, reference, delta, steps = _integrated(model, record, kinds, score)
    pictures = [name for name, kind in kinds.items() if kind == "picture"]
    cams = {name: cam for name in pictures if (cam := _grad_cam(model, record, name, score)) is not None}
    return Attribution(
        score=at,
        reference=at if reference is None else reference,
        delta=delta,
        steps=steps,
        integrated=integrated,
        saliency={name: _saliency(model, record, name, score) for name in pictures},
        grad_cam={name: cam for name, (_, cam) in cams.items()},
        layer={name: layer for name, (layer, _) in cams.items()},
    )


def embedding_of(model: nn.Module, record: Records, field: str) -> nn.Embedding:
    """The layer that reads the tokens of `field`.

    Raises:
        ConfigError: none, or several.
    """
    found: dict[nn.Embedding, None] = {}
    tokens = record.fields[field]

    def seen(layer: nn.Embedding, args: tuple[Any, ...]) -> None:
        if args and torch.equal(args[0], tokens):
            found[layer] = None

    with _hooked(model, _is_embedding, lambda layer: layer.register_forward_pre_hook(seen)), torch.no_grad():
        model(**record.fields)
    if len(found) != 1:
        raise ConfigError(f"field {field}: {len(found)} embeddings of the network read its tokens; one can be explained")
    return next(iter(found))


def last_convolution(model: nn.Module, record: Records) -> tuple[str, nn.Module] | None:
    """The convolution that runs last and still gives a map, by name; None where there is no such one.

    One that gives a single place (a pooled vector in disguise) has nothing to show, and one that gives the answer itself
    would only show the answer.
    """
    ran: list[tuple[nn.Module, Any]] = []

    def seen(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ran.append((layer, output))

    with _hooked(model, _has_kernel, lambda layer: layer.register_forward_hook(seen)), torch.no_grad():
        answer = model(**record.fields)
    names = {layer: name for name, layer in model.named_modules()}
    for layer, output in reversed(ran):
        if isinstance(output, Tensor) and output.dim() == 4 and min(output.shape[2:]) > 1 and output.shape != answer.shape:
            return names[layer], layer
    return None


def _integrated(
    model: nn.Module, record: Records, kinds: dict[str, str], score: Score
) -> tuple[dict[str, Tensor], float | None, float, int]:
    numbers = [name for name, kind in kinds.items() if kind in ("line", "grid")]
    tokens = [name for name, kind in kinds.items() if kind == "tokens"]
    names = numbers + tokens
    if not names:
        return {}, None, 0.0, 0
    layers = {name: embedding_of(model, record, name) for name in tokens}
    inputs = [record.fields[name] for name in numbers]
    starts = [torch.zeros_like(field) for field in inputs]
    with torch.no_grad():
        inputs += [layers[name](record.fields[name]) for name in tokens]
        starts += [layers[name](torch.zeros_like(record.fields[name])) for name in tokens]

    def scored(*given: Tensor) -> Tensor:
        # an embedding's output is put in its place, while the layers behind still see which tokens are padding
        fields = {name: t.expand(len(given[0]), *t.shape[1:]) for name, t in record.fields.items()}
        fields |= dict(zip(numbers, given, strict=False))
        with _replaced({layers[name]: t for name, t in zip(tokens, given[len(numbers) :], strict=True)}):
            return score(model(**fields))

    method = captum().IntegratedGradients(scored)
    with torch.no_grad():
        reference = float(scored(*starts))
        difference = float(scored(*inputs)) - reference
    for cuts, each in _PATHS:
        total, delta = [torch.zeros_like(given) for given in inputs], 0.0
        for this, following in pairwise(cuts):
            ends = (
                tuple(start + share * (given - start) for start, given in zip(starts, inputs, strict=True))
                for share in (following, this)
            )
            parts, off = method.attribute(*ends, n_steps=each, internal_batch_size=_AT_ONCE, return_convergence_delta=True)
            total = [one + part.detach() for one, part in zip(total, parts, strict=True)]
            delta += float(off)
        if abs(delta) <= TOLERANCE * max(1.0, abs(difference)):
            break
    found = {name: part[0] for name, part in zip(names, total, strict=True)}
    found |= {name: found[name].sum(1) for name in tokens}  # of one token, all numbers of its embedding
    return found, reference, delta, each * (len(cuts) - 1)


def _saliency(model: nn.Module, record: Records, field: str, score: Score) -> Tensor:
    picture = record.fields[field].clone().requires_grad_()
    found: Tensor = captum().Saliency(_of_picture(model, record, field, score)).attribute(picture)
    return found.detach()[0].amax(0)


def _grad_cam(model: nn.Module, record: Records, field: str, score: Score) -> tuple[str, Tensor] | None:
    last = last_convolution(model, record)
    if last is None:
        return None
    name, layer = last
    method = captum().LayerGradCam(_of_picture(model, record, field, score), layer)
    found: Tensor = method.attribute(record.fields[field].clone().requires_grad_(), relu_attributions=True)
    return name, found.detach()[0, 0]


def _of_picture(model: nn.Module, record: Records, field: str, score: Score) -> Callable[[Tensor], Tensor]:
    return lambda picture: score(model(**{**record.fields, field: picture}))


def _has_kernel(layer: nn.Module) -> bool:
    return any(p.dim() >= 4 for p in layer.parameters(recurse=False))  # not by class: a task may bring its own


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Embedding)


@contextmanager
def _hooked(model: nn.Module, wanted: Callable[[nn.Module], bool], hook: Callable[[Any], Any]) -> Iterator[None]:
    handles = [hook(layer) for layer in model.modules() if wanted(layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(outputs: dict[nn.Embedding, Tensor]) -> Iterator[None]:
    """Let each layer give the tensor that stands beside it, whatever it is asked."""
    handles = [layer.register_forward_hook(lambda *_, given=given: given) for layer, given in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
