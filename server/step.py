"""What the coordinator does with the combined update. Post-processing: it costs no privacy.

Server optimisers of Reddi et al. 2021 (https://arxiv.org/abs/2003.00295), each one function of the state it changes.
The state is plain tensors, so it goes into the checkpoint beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wardround.common.plan import StepPlan, StudyPlan
from wardround.common.weights import Weights

State = dict[str, Tensor]  # "m/<tensor>", "v/<tensor>", "mean/<tensor>", "mean-count"
Rule = Callable[[State, str, Tensor, StepPlan, int], Tensor]


def sgd(state: State, name: str, update: Tensor, plan: StepPlan, taken: int) -> Tensor:
    """The update itself."""
    return update


def momentum(state: State, name: str, update: Tensor, plan: StepPlan, taken: int) -> Tensor:
    """A running sum of updates: m = momentum * m + update."""
    m = state.get(f"m/{name}", torch.zeros_like(update)).mul(plan.momentum).add_(update)
    state[f"m/{name}"] = m
    return m


def adam(state: State, name: str, update: Tensor, plan: StepPlan, taken: int) -> Tensor:
    """FedAdam, with Adam's bias correction."""
    return _adaptive(state, name, update, plan, taken, lambda v, u2: v.mul(plan.second_momentum).add_(
        u2, alpha=1 - plan.second_momentum))  # fmt: skip


def yogi(state: State, name: str, update: Tensor, plan: StepPlan, taken: int) -> Tensor:
    """FedYogi: the second moment moves by a bounded amount, with the sign of the surprise."""
    return _adaptive(state, name, update, plan, taken, lambda v, u2: v.sub(
        (1 - plan.second_momentum) * torch.sign(v - u2) * u2))  # fmt: skip


RULES: dict[str, Rule] = {"sgd": sgd, "momentum": momentum, "adam": adam, "yogi": yogi}


def step(weights: Weights, update: Weights, state: State, plan: StudyPlan, round: int) -> tuple[Weights, State]:
    """New weights and a new state; both given ones stay as they are.

    Args:
        weights: the round's model.
        update: the combined update.
        state: what the rule remembers.
        plan: the whole plan, for the rule and its schedule.
        round: counted from 1.
    """
    new_state = dict(state)
    taken = int(state.get("taken", torch.zeros(())).item()) + 1
    new_state["taken"] = torch.tensor(float(taken))
    rate = learning_rate(plan, round)
    rule = RULES[plan.step.rule]
    moved = {
        name: torch.add(w, rule(new_state, name, update[name], plan.step, taken), alpha=rate) for name, w in weights.items()
    }
    averaged = math.ceil(plan.rounds * plan.step.average_last - 1e-9)  # rounds; 0.9 of 10 are 9, not 9.000000000000002
    if round > plan.rounds - averaged:
        count = int(state.get("mean-count", torch.zeros(())).item()) + 1
        new_state["mean-count"] = torch.tensor(float(count))
        for name, w in moved.items():
            mean = state.get(f"mean/{name}", torch.zeros_like(w))
            new_state[f"mean/{name}"] = mean + (w - mean) / count
    return moved, new_state


def learning_rate(plan: StudyPlan, round: int) -> float:
    """The server's learning rate in `round`: a straight line from all of it to `decay_to` of it."""
    share = (round - 1) / max(1, plan.rounds - 1)
    return plan.step.learning_rate * (1 - share * (1 - plan.step.decay_to))


def released(weights: Weights, state: State) -> Weights:
    """The model to hand out: the mean of the last rounds where the plan asks for one, else the newest."""
    return {name: state.get(f"mean/{name}", w) for name, w in weights.items()}


def _adaptive(
    state: State, name: str, update: Tensor, plan: StepPlan, taken: int, second: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    zero = torch.zeros_like(update)
    m = state.get(f"m/{name}", zero).mul(plan.momentum).add_(update, alpha=1 - plan.momentum)
    v = second(state.get(f"v/{name}", zero), update.square())
    state[f"m/{name}"], state[f"v/{name}"] = m, v
    m_hat = m / (1 - plan.momentum**taken)
    v_hat = v / (1 - plan.second_momentum**taken)
    return m_hat / (v_hat.sqrt() + plan.epsilon)
