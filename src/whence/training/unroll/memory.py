"""How a budget of bytes is shared out: states held, adjoints in one backward pass, queries in one replay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from whence.features.gradients import measure
from whence.training.unroll.run import AT_ONCE, KEEP, Differentiation, Trainer
from whence.training.unroll.states import fan_of, held
from whence.types import WhenceError


@dataclass(frozen=True)
class Plan:
    """How a budget is spent.

    Args:
        states: held in memory.
        at_once: adjoints in one backward pass.
        queries: in one replay.
    """

    states: int
    at_once: int
    queries: int


def plan_of(trainer: Trainer, how: Differentiation) -> Plan:
    """What fits in the budget: half for states, a quarter for a backward pass, the rest for adjoints."""
    keep, vectors = how.keep, 5 if how.resample is None else 6
    steps, budget = trainer.recipe.steps, trainer.run.engine.budget
    one_copy = sum(w.numel() * w.element_size() for w in trainer.first().weights.values())
    state = 3 * one_copy
    needs = {name: held(steps, fan_of(name, steps)) * state for name in KEEP}
    states = held(steps, fan_of(keep, steps))
    if needs[keep] > budget // 2:
        if how.spill is None:
            less = ", ".join(f"keep={name!r} ({_mb(needs[name])})" for name in KEEP if needs[name] < needs[keep])
            raise WhenceError(
                f"unroll: keep={keep!r} holds {_mb(needs[keep])} of states, over half of the budget of {_mb(budget)}; "
                f"accepted: {less + ', ' if less else ''}a spill folder on disk, a larger Engine(budget=...)"
            )
        states = budget // 2 // state
    once = 3 * _activations(trainer) + 2 * one_copy  # of one adjoint in a backward pass
    at_once = max(1, min(AT_ONCE, budget // 4 // once))
    adjoint = vectors * one_copy
    free = budget - states * state - at_once * once
    if free < adjoint:
        least = max(states * state + at_once * once + adjoint, 2 * needs[keep] if how.spill is None else 0)
        raise WhenceError(
            f"unroll: a step of {trainer.recipe.batch_size} images and the adjoint of one query take {_mb(once + adjoint)}, "
            f"and {states} states {_mb(states * state)}, of a budget of {_mb(budget)}",
            accepted=f"a budget of {_mb(least)} (--budget_mb {-(-least // 2**20)}, Engine(budget=...)), or smaller batches",
        )
    return Plan(states, at_once, free // adjoint)


def _mb(count: int) -> str:
    return f"{max(0, count) / 2**20:.3g} MB"


def _activations(trainer: Trainer) -> int:
    """Bytes that the forward pass of a step leaves for its backward pass."""
    feed, found = trainer.feed(0), 0

    def pack(value: Tensor) -> Tensor:
        nonlocal found
        found += value.numel() * value.element_size()
        return value

    leaves = {name: w.requires_grad_() for name, w in trainer.first().weights.items()}
    with saved_tensors_hooks(pack, lambda value: value):
        measure(trainer.module, leaves, trainer.run.forward, trainer.recipe.loss, feed.batch, feed.at)
    return found
