"""Ways to take a query out of a trained model, for attribution by unlearning.

`NaturalAscent`, Wang et al. 2024 (2406.09408): steps of natural gradient ascent, theta + alpha F^-1 grad l_q. To first order
in alpha the loss of image i rises by alpha grad l_i^T F^-1 grad l_q, influence with the curvature F; a step of a size that
can be seen goes beyond.
`BoundedAscent`, Serra et al. 2026 (2605.17938): training on, up for the query and down for the others, until the query is
hardly known better than by a network that predicts nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value

from whence.curvature.factors import Factors
from whence.curvature.kfac import EKFAC
from whence.curvature.solve import Problem, check_damping
from whence.diffusion.draws import DrawRule, Draws, OneDraw, uniform
from whence.diffusion.noise import seed_for
from whence.diffusion.outputs import Output
from whence.features.gradients import DRAWS_AT_ONCE, measure, one, per_image, repeat, select
from whence.features.parts import Gradient
from whence.features.rows import identity, prepare
from whence.storage.arrays import Store
from whence.storage.files import progress
from whence.training.optimizer import AdamW, State
from whence.training.order import noise_keys
from whence.training.unroll import twin
from whence.types import Batch, Draw, Images, Task, Weights, WhenceError

DOUBLINGS, HALVINGS = 60, 60
"""Of the step in its search."""
ROUNDING = 1e-10
"""The share of the mean of F below which a parameter tensor's is rounding, as of the biases of keys, which attention does
not see: divided by that, their gradients would be all of a step."""
FEW = 4
"""Draws of the query in a step of `BoundedAscent`."""
CLOSE = 1e-4
"""The part of the rise by which a step may miss it."""


@dataclass(frozen=True)
class Network:
    """A network whose weights are changed, and how its loss is measured.

    Args:
        module: a copy to call with other weights.
        weights: by parameter, those that are changed.
        task: the question.
        output: the loss.
        draws: at which it is measured.
    """

    module: nn.Module
    weights: Weights
    task: Task
    output: Output
    draws: DrawRule

    @classmethod
    def of(cls, task: Task, output: Output, draws: DrawRule, parameters: str) -> Network:
        module = twin(prepare(task.trajectory[-1], task.engine))
        chosen = dict(module.named_parameters())
        weights = {name: chosen[name].detach().clone() for name in select(module, parameters)}
        return cls(module, weights, task, output, draws)

    def read(self, images: Images, rows: Sequence[int]) -> Batch:
        return images.batch(list(rows)).to(self.task.engine.device, self.task.engine.dtype)

    def drawn(self, image: Batch) -> Iterator[Draw]:
        """The draws of an image, some at a time."""
        forward = self.task.forward
        drawn = self.draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
        t, noise = drawn.t[0].to(image.x0.device), drawn.noise[0].to(image.x0)
        for start in range(0, len(t), DRAWS_AT_ONCE):
            yield Draw(t[start : start + DRAWS_AT_ONCE], noise[start : start + DRAWS_AT_ONCE])

    def losses(self, weights: Weights, image: Batch) -> Tensor:
        """Of one image at each draw: [S] float64."""
        parts = [
            measure(self.module, weights, self.task.forward, self.output, repeat(image, len(draw.t)), draw)
            for draw in self.drawn(image)
        ]
        return torch.cat(parts).double()

    def loss(self, weights: Weights, image: Batch) -> float:
        """The mean over the draws, without a graph."""
        with torch.no_grad():
            return float(self.losses(weights, image).mean())

    def slope(self, weights: Weights, image: Batch) -> tuple[Weights, float]:
        """The gradient of the mean over the draws, and that mean."""
        total, value, count = {name: torch.zeros_like(w) for name, w in weights.items()}, 0.0, self.draws.count
        for draw in self.drawn(image):

            def part(w: Weights, draw: Draw = draw) -> Tensor:
                images = repeat(image, len(draw.t))
                return measure(self.module, w, self.task.forward, self.output, images, draw).sum() / count

            gradient, share = grad_and_value(part)(weights)
            value += float(share)
            total = {name: total[name] + gradient[name] for name in total}
        return total, value

    def table(self, weights: Weights, images: Images, mirrored: bool) -> Tensor:
        """The losses of all images at each draw: [n, S], of the mirror images where so asked."""
        found = []
        with torch.no_grad():
            for start in range(0, len(images), self.task.engine.batch_size):
                batch = self.read(images, range(start, min(start + self.task.engine.batch_size, len(images))))
                batch = replace(batch, x0=batch.x0.flip(-1)) if mirrored else batch
                # One image at a time: the last bits of a row must not depend on its company.
                found += [self.losses(weights, one(batch, i)) for i in range(len(batch))]
        return torch.stack(found).cpu()


# ------------------------------------------------------------------------------------------------------------ curvature


Inverse = Callable[[Weights], Weights]
"""F^-1 of a gradient."""


class Curvature(Protocol):
    """A choice of F."""

    def inverse(self, network: Network, parameters: str) -> Inverse: ...


@dataclass(frozen=True)
class Diagonal:
    """F = mean over training images and draws of (d l / d theta)^2, element by element.

    Args:
        damping: lambda in units of the mean of F over each parameter tensor; released code for AbU divides by F as it is.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def inverse(self, network: Network, parameters: str) -> Inverse:
        task, names = network.task, list(network.weights)
        key = {"part": "squared gradients", "of": _part(network, parameters), "checkpoint": task.trajectory[-1].digest}
        key |= {"forward": task.forward, "images": identity(task.train)}
        width = sum(w.numel() for w in network.weights.values())
        array = Store(task.folder_of(task.train)).array(key, (1, width), torch.float64, 1)
        for rows in array.missing():
            array.write(rows, self._squares(network, names)[None])
        found = array.all()[0]
        pieces, least = found.split([w.numel() for w in network.weights.values()]), ROUNDING * found.mean()
        damped = {}
        for (name, w), piece in zip(network.weights.items(), pieces, strict=True):
            full = piece + self.damping * piece.mean()
            damped[name] = (1 / full if piece.mean() > least else torch.zeros_like(full)).view_as(w).to(w)
        return lambda gradient: {name: damped[name] * g for name, g in gradient.items()}

    def _squares(self, network: Network, names: list[str]) -> Tensor:
        """[d] float64."""
        task, count = network.task, network.draws.count
        total = [torch.zeros(w.numel(), dtype=torch.float64, device=w.device) for w in network.weights.values()]
        held = 3 * sum(w.numel() * w.element_size() for w in network.weights.values())
        at_once = max(1, min(task.engine.batch_size, task.engine.budget // held))
        starts = range(0, len(task.train), task.engine.batch_size)
        for start in progress(starts, "squared gradients"):
            batch = network.read(task.train, range(start, min(start + task.engine.batch_size, len(task.train))))
            for number in range(count):
                draw = OneDraw(_rule(network.draws), number)
                passes = per_image(network.module, task.forward, network.output, draw, batch, names, at_once)
                for _, blocks in passes:
                    for sums, name in zip(total, names, strict=True):
                        sums += blocks[name].double().square().sum(0)
        return torch.cat(total).cpu() / (len(task.train) * count)


@dataclass(frozen=True)
class Kronecker:
    """F by EK-FAC (see `curvature.kfac`).

    Args:
        damping: lambda in units of the mean eigenvalue of each layer.
        factors: how the factors are estimated.
    """

    damping: float
    factors: Factors

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def inverse(self, network: Network, parameters: str) -> Inverse:
        problem = Problem(network.task, network.task.trajectory[-1], _part(network, parameters))
        curvature = EKFAC(self.damping, factors=self.factors).curvature(problem)
        sizes = [w.numel() for w in network.weights.values()]

        def inverse(gradient: Weights) -> Weights:
            row = torch.cat([g.flatten() for g in gradient.values()])[None].cpu().double()
            found = torch.zeros_like(row)
            for eigen in curvature:
                eigen.block.scatter(eigen.back(eigen.rotate(row) * eigen.inverse(self.damping, False)), found)
            pieces = zip(gradient.items(), found[0].split(sizes), strict=True)
            return {name: piece.view_as(g).to(g) for (name, g), piece in pieces}

        return inverse


def _part(network: Network, parameters: str) -> Gradient:
    return Gradient(network.output, network.draws, parameters=parameters)


def _rule(draws: DrawRule) -> Draws:
    if not isinstance(draws, Draws):
        raise WhenceError(f"{type(draws).__name__} is no rule of draws", "draws", "draws by a rule")
    return draws


# ----------------------------------------------------------------------------------------------------------- forgetting


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

    def begin(self, asked: Network, trained: Network, parameters: str, run: int) -> Callable[[str, Batch], Forgotten]:
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

    def begin(self, asked: Network, trained: Network, parameters: str, run: int) -> Callable[[str, Batch], Forgotten]:
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
    asked: Network, weights: Weights, way: Weights, image: Batch, goal: tuple[float, float, float, float], name: str
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

    def begin(self, asked: Network, trained: Network, parameters: str, run: int) -> Callable[[str, Batch], Forgotten]:
        task, rate = trained.task, self.learning_rate
        if rate is None:
            rate = 1e-4 if task.study is None else task.study.recipe.optimizer.learning_rate / 10
        optimizer = AdamW(rate, beta1=0.9, eps_root=0.0, weight_decay=0.0)
        order = torch.argsort(noise_keys(task.train), stable=True)  # whatever the order of the files
        size, few = min(self.batch_size, len(order)), _rule(asked.draws)
        few = few if few.count <= FEW else few.with_count(FEW)

        def step(state: State, image: Batch, null: float) -> State:
            seed = seed_for(self.seed, f"unlearning, run {run}, step {state.step}") % 2**31
            chosen = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed))[:size]
            batch, rule = trained.read(task.train, order[chosen].tolist()), uniform(1, seed=seed)
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


def null_loss(asked: Network, image: Batch) -> float:
    """The loss of a network that predicts 0."""
    forward, values = asked.task.forward, []
    with torch.no_grad():
        for draw in asked.drawn(image):

            def call(*args: object, **kwargs: object) -> object:
                return functional_call(asked.module, asked.weights, args, kwargs)

            prediction, target = forward(call, repeat(image, len(draw.t)), draw)
            values.append(asked.output.of(torch.zeros_like(prediction), target, draw.t, forward))
    return float(torch.cat(values).double().mean())
