"""Ways to take a query out of a trained model, for attribution by unlearning.

`NaturalAscent`, Wang et al. 2024 (2406.09408): steps of natural gradient ascent, theta + alpha F^-1 grad l_q. To first order
in alpha the loss of image i rises by alpha grad l_i^T F^-1 grad l_q, influence with the curvature F; a step of a size that
can be seen goes beyond.
`BoundedAscent`, Serra et al. 2026 (2605.17938): training on, up for the query and down for the others, until the query is
hardly known better than by a network that predicts nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from whence.diffusion.draws import uniform
from whence.diffusion.noise import seed_for
from whence.features.gradients import measure, repeat
from whence.methods.fisher import Curvature, Measured
from whence.training.optimizer import AdamW, State
from whence.training.order import noise_keys
from whence.types import Batch, Draw, Weights, WhenceError

DOUBLINGS, HALVINGS = 60, 60
"""Of the step in its search."""
FEW = 4
"""Draws of the query in a step of `BoundedAscent`."""
CLOSE = 1e-4
"""The part of the rise by which a step may miss it."""


@dataclass(frozen=True)
class Forgotten:
    """The model without a query.

    Args:
        weights: by parameter, those that were changed.
        facts: how far it went, as numbers.
    """

    weights: Weights
    facts: Mapping[str, float]


class Forgetting(Protocol):
    """A way to take a query out of a model. `compare` makes scores [n] of losses before and after [n, S]; `facts` are the
    names of what `Forgotten` says; `runs` are made with seeds of their own and averaged; `bound` is the share by which the
    mean loss of the training images may rise before a warning, None for any."""

    @property
    def bound(self) -> float | None: ...

    @property
    def runs(self) -> int: ...

    @property
    def facts(self) -> tuple[str, ...]: ...

    def begin(self, asked: Measured, trained: Measured, parameters: str, run: int) -> Callable[[str, Batch], Forgotten]:
        """What forgets one query, by its name.

        Args:
            asked: as queries are measured.
            trained: as training images are.
            parameters: what was selected.
            run: its number.
        """
        ...

    def compare(self, before: Tensor, after: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class NaturalAscent:
    """theta + alpha F^-1 grad l_q in `steps` steps, each as long as brings the query's loss up by its part of `rise`.

    Args:
        curvature: F.
        rise: of the query's loss, as a share of it.
        steps: alike in rise; F stays that of the trained model.
    """

    curvature: Curvature
    rise: float = 0.1
    steps: int = 1
    runs: ClassVar[int] = 1
    facts: ClassVar[tuple[str, ...]] = ("step", "rise")
    bound: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        if not 0 < self.rise < float("inf") or self.steps < 1:
            raise WhenceError(
                f"rise={self.rise}, steps={self.steps}", "unlearning", "a rise above 0, and 1 step or more"
            )

    def begin(self, asked: Measured, trained: Measured, parameters: str, run: int) -> Callable[[str, Batch], Forgotten]:
        inverse = self.curvature.inverse(trained, parameters)

        def forget(name: str, image: Batch) -> Forgotten:
            theta, length, base = asked.weights, 0.0, asked.loss(asked.weights, image)
            for step in range(1, self.steps + 1):
                gradient, now = asked.slope(theta, image)
                way = inverse(gradient)
                slope = sum(float((gradient[key].double() * way[key].double()).sum()) for key in way)
                target = base * (1 + self.rise * step / self.steps)
                alpha = _search(
                    asked, theta, way, image, (now, slope, target, CLOSE * self.rise * base / self.steps), name
                )
                theta, length = _moved(theta, way, alpha), length + alpha
            return Forgotten(theta, {"step": length, "rise": asked.loss(theta, image) / base - 1})

        return forget

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        return after.mean(1) - before.mean(1)


def _moved(weights: Weights, way: Weights, alpha: float) -> Weights:
    return {name: w + alpha * way[name] for name, w in weights.items()}


def _search(
    asked: Measured,
    weights: Weights,
    way: Weights,
    image: Batch,
    goal: tuple[float, float, float, float],
    name: str,
) -> float:
    """alpha with l_q(theta + alpha way) at its target.

    Args:
        asked: how the query is measured.
        weights: theta.
        way: the direction.
        image: the query.
        goal: its loss now, the slope along the way, the target, and by how much this may be missed.
        name: of the query.
    """
    now, slope, target, close = goal
    if not 0 < slope < float("inf"):
        raise WhenceError(
            f"the loss of {name!r} has no slope to go up ({slope:g})", "unlearning", "other draws or parameters, or a model "
            "whose loss they move"
        )  # fmt: skip
    low, high = 0.0, (target - now) / slope
    for _ in range(DOUBLINGS):
        found = asked.loss(_moved(weights, way, high), image)
        if not found < target - close:  # NaN and infinity are beyond, too
            break
        low, high = high, 2 * high
    else:
        raise WhenceError(
            f"the loss of {name!r} cannot be raised from {now:.4g} to {target:.4g} along the gradient",
            "unlearning",
            "a smaller rise",
        )
    for _ in range(HALVINGS):
        if abs(found - target) <= close:
            return high
        middle = (low + high) / 2
        value = asked.loss(_moved(weights, way, middle), image)
        if value < target:
            low = middle
        else:
            high, found = middle, value
    if not found < float("inf"):
        raise WhenceError(
            f"the loss of {name!r} overflows at any step that raises it", "unlearning", "float32 or float64"
        )
    return high


@dataclass(frozen=True)
class BoundedAscent:
    """Further training on L_retain(batch) - weight * min(l_q, l_null), until l_q >= share * l_null.

    l_null is the loss of a network that predicts 0 (the paper's is that of an untrained one, which predicts nearly that).

    Args:
        learning_rate: of AdamW; None for a tenth of that of the training, or 1e-4 where this is not known.
        weight: of the query.
        share: of l_null at which the query is forgotten.
        batch_size: training images per step; all where there are fewer.
        steps: at most; a query that is not forgotten by then is an error.
        runs: with other batches and noise, averaged.
        seed: of these.
    """

    learning_rate: float | None = None
    weight: float = 0.2
    share: float = 0.95
    batch_size: int = 64
    steps: int = 500
    runs: int = 2
    seed: int = 0
    facts: ClassVar[tuple[str, ...]] = ("steps", "share")
    bound: ClassVar[float | None] = 0.01

    def __post_init__(self) -> None:
        positive = (self.weight, 1.0 if self.learning_rate is None else self.learning_rate)
        small = min(self.batch_size, self.steps, self.runs) < 1 or not 0 < self.share <= 1
        if small or not all(0 < x < float("inf") for x in positive):
            told = "batch_size, steps and runs from 1; weight and learning_rate above 0; share above 0, to 1"
            raise WhenceError(f"{self}", "unlearning", told)

    def begin(self, asked: Measured, trained: Measured, parameters: str, run: int) -> Callable[[str, Batch], Forgotten]:
        task, rate = trained.task, self.learning_rate
        if rate is None:
            rate = 1e-4 if task.study is None else task.study.recipe.optimizer.learning_rate / 10
        optimizer = AdamW(rate, beta1=0.9, eps_root=0.0, weight_decay=0.0)
        order = torch.argsort(noise_keys(task.train), stable=True)  # whatever the order of the files
        size, few = min(self.batch_size, len(order)), asked.draws
        few = few if few.count <= FEW else few.with_count(FEW)

        def step(state: State, image: Batch, null: float) -> State:
            seed = seed_for(self.seed, f"unlearning, run {run}, step {state.step}") % 2**31
            chosen = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))[:size]
            batch, rule = trained.read(task.train, order[chosen].tolist()), uniform(1, seed, shared=False)
            drawn = rule(batch.keys, batch.x0.shape[1:], task.forward.timesteps, batch.x0.dtype)
            at = Draw(drawn.t[:, 0].to(batch.x0.device), drawn.noise[:, 0].to(batch.x0))
            own = replace(asked, draws=replace(few, seed=seed))

            def value(w: Weights) -> Tensor:
                kept = measure(trained.module, w, task.forward, trained.output, batch, at).mean()
                query = own.losses(w, image).mean().to(kept)
                return kept - self.weight * query.clamp(max=null)

            grads, _ = grad_and_value(value)(state.weights)
            return State(*optimizer.update(state, grads, rate), state.ema, state.step + 1)

        def forget(name: str, image: Batch) -> Forgotten:
            null = null_loss(asked, image)
            zeros = {key: torch.zeros_like(w) for key, w in asked.weights.items()}
            state, reached = State(asked.weights, zeros, dict(zeros), asked.weights), asked.loss(asked.weights, image)
            while reached < self.share * null and state.step < self.steps:
                state = step(state, image, null)
                reached = asked.loss(state.weights, image)
            if not self.share * null <= reached < float("inf"):
                raise WhenceError(
                    f"{name!r} is not forgotten after {state.step} steps at {rate:g}: its loss is {reached:.4g}, and was to "
                    f"reach {self.share * null:.4g}",
                    "unlearning",
                    "more steps, or a larger learning_rate or weight",
                )
            if not state.step:
                warnings.warn(f"unlearning: the model does not know {name!r}: there is nothing to forget", stacklevel=2)
            return Forgotten(state.weights, {"steps": float(state.step), "share": reached / null})

        return forget

    def compare(self, before: Tensor, after: Tensor) -> Tensor:
        """(after - before) / (after + before + 0.001), draw by draw."""
        return ((after - before) / (after + before + 1e-3)).mean(1)


def null_loss(asked: Measured, image: Batch) -> float:
    """The loss of a network that predicts 0."""
    forward, values = asked.task.forward, []
    with torch.no_grad():
        for draw in asked.drawn(image):

            def call(*args: object, **kwargs: object) -> object:
                return functional_call(asked.module, asked.weights, args, kwargs)

            prediction, target = forward(call, repeat(image, len(draw.t)), draw)
            values.append(asked.output.of(torch.zeros_like(prediction), target, draw.t, forward))
    return float(torch.cat(values).double().mean())
