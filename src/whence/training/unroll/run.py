"""A training to be differentiated, its steps one at a time, and how each step's gradient is linearised.

`Run` says which training, `Trainer` takes its steps to the bit as `training.steps` does. A `Pull` takes vectors back through
the gradient of a step, with the Hessian or with its Gauss-Newton part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from whence.features.gradients import check, measure
from whence.training.dropout import active_dropout
from whence.training.optimizer import SGD, AdamW, State, start
from whence.training.order import mean_weight, noise_keys, slots, with_prior_images
from whence.training.recipe import Recipe, update
from whence.training.step import Feed, advance, feed, reader
from whence.types import Batch, Draw, Engine, Forward, Images, Trainable, Weights, WhenceError

CURVATURES = ("hessian", "gauss-newton", "none")
KEEP = ("all", "sqrt", "tree")
AT_ONCE = 64  # adjoints in one backward pass, where the budget has room for them


@dataclass(frozen=True)
class Resample:
    """Slopes for df/dw_i that are not those of the slots of each step: what image i does at any draw, in any step.

        df/dw_i = sum_t <p_t, [i in step t] grad l_i(theta_t; its draw)> / (B c)        p_t: adjoint of step t's gradient
                ~ sum_k <sum_t p_t, mean_s grad l_i(theta_k; draw s)> / (images c)       t from k to k + every - 1

    The mean over the orders and the noise that the training might as well have had, along the path it took. The sum of the
    adjoints costs one product per image and stretch, so that many draws are cheap; the weights stand still for it.

    Args:
        images: taken at step k = 0, every, 2 every, ..., in an order of their own.
        every: steps between.
        draws: of each image, every time.
    """

    images: int
    every: int = 16
    draws: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise WhenceError(f"{name} is {value}", "unroll: resampled slopes", "at least 1")


@dataclass(frozen=True)
class Differentiation:
    """How a training is differentiated.

    Args:
        curvature: "hessian", the derivative itself, "gauss-newton", or "none" (see `unroll`).
        resample: slopes in place of those of the slots of each step; None for the latter.
        keep: which states of the training stay in memory: "all"; "sqrt", about 2 sqrt(T) of them, the rest computed again,
            once; "tree", log2(T) of them, each step computed log2(T)/2 times more. All give the same numbers.
        spill: a folder for states beyond half of the engine's budget.
    """

    curvature: str = "hessian"
    resample: Resample | None = None
    keep: str = "sqrt"
    spill: Path | None = None

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise WhenceError(f"curvature={self.curvature!r}", "unroll", ", ".join(CURVATURES))
        if self.keep not in KEEP:
            raise WhenceError(f"keep={self.keep!r}", "unroll", ", ".join(KEEP))


@dataclass(frozen=True, eq=False)
class Run:
    """One training, to be differentiated.

    Args:
        module: the network before its first step.
        forward: how it is measured.
        images: n of them.
        recipe: of the training.
        weights: of the images [n], 1 each by default.
        constant: the c that losses are divided by, the mean of `weights` by default.
        engine: its budget bounds what is held at once.
    """

    module: nn.Module
    forward: Forward
    images: Images
    recipe: Recipe
    weights: Tensor | None = None
    constant: float | None = None
    engine: Engine = Engine()

    @classmethod
    def of(
        cls,
        study: Trainable,
        images: Images,
        seed: int | None = None,
        weights: Tensor | None = None,
        engine: Engine = Engine(),
    ) -> Run:
        """The training of a study.

        Args:
            study: what is trained, and how.
            images: those trained on; prior images of the study, if any, come after them.
            seed: of the training; the study's own by default.
            weights: of the images [n]; 1 each by default.
            engine: its budget bounds what is held at once.
        """
        seed = study.recipe.seed if seed is None else seed
        images, weights = with_prior_images(study, images, weights)
        return cls(study.network_at(seed), study.forward(), images, study.at(seed), weights, engine=engine)

    @property
    def all_weights(self) -> Tensor:
        """The weights of all images: [n]."""
        return torch.ones(len(self.images)) if self.weights is None else self.weights

    @property
    def c(self) -> float:
        return float(mean_weight(self.recipe, self.all_weights)) if self.constant is None else self.constant

    def at(self, weights: Tensor) -> Run:
        """The same training at other weights, with the same c: the function of the weights that is differentiated."""
        return replace(self, weights=weights, constant=self.c)


def _refuse(run: Run) -> None:
    n, optimizer = len(run.images), run.recipe.optimizer
    if not isinstance(optimizer, AdamW | SGD):
        raise WhenceError(f"no derivative of a {type(optimizer).__name__}", "unroll", "AdamW, SGD")
    if active_dropout(run.module):
        raise WhenceError("unroll: the network has active dropout; train and differentiate it with dropout 0")
    if any(isinstance(layer, _BatchNorm) for layer in run.module.modules()):
        raise WhenceError("unroll: batch normalisation mixes the images of a step; use group or layer normalisation")
    weights = run.all_weights
    if weights.shape != (n,) or not bool((weights != 0).any()) or not run.c > 0:
        raise WhenceError(
            f"unroll: {n} images need as many weights, with a mean above 0; got {tuple(weights.shape)}, mean {run.c:.3g}"
        )
    check(run.recipe.loss, run.forward)


Pull = Callable[[tuple[Weights, Tensor]], tuple[Weights, Tensor]]
"""(p, e [b]) -> derivatives of <p, g> + <e, l> with respect to (theta, the scale of each slot [b])."""


class Trainer:
    """The steps of `training.steps`, from any state and one at a time, and their derivative.

    Args:
        run: the training.
        curvature: "hessian", "gauss-newton" or "none" (see `unroll`).
    """

    def __init__(self, run: Run, curvature: str = "hessian"):
        _refuse(run)
        self.curvature = curvature
        self.run, self.recipe, engine = run, run.recipe, run.engine
        self.module = run.module.to(engine.device, engine.dtype).train()
        self.read, self.keys = reader(run.images, engine), noise_keys(run.images)
        self.weights, self.constant = run.all_weights, run.recipe.batch_size * run.c

    def first(self) -> State:
        return start(self.module)

    def feed(self, step: int) -> Feed:
        """All slots of a step, whatever their weight."""
        chosen = slots(self.recipe, self.keys, step)
        return feed(self.recipe, self.run.forward, self.run.images, self.read, chosen)

    def present(self, feed: Feed) -> Tensor:
        """The slots whose image has any weight: [b] bool."""
        return self.weights[feed.rows] != 0

    def scale(self, feed: Feed) -> Tensor:
        """What the loss of each slot is multiplied by: [b]."""
        return self.weights[feed.rows].to(feed.batch.x0) / self.constant

    def after(self, state: State, average: bool = True) -> State:
        """The next state, bit for bit that of `training.steps`. Without `average`, its ema is its weights."""
        seen = self.feed(state.step)
        seen = seen.only(self.present(seen))
        recipe = self.recipe if average else replace(self.recipe, ema=0.0)
        return advance(self.module, self.run.forward, recipe, state, seen, self.scale(seen))[0]

    def losses(self, weights: Weights, scale: Tensor, feed: Feed) -> tuple[Weights, Tensor]:
        """g = sum_b scale_b grad l_b, and l [b]: differentiable in (weights, scale).

        Args:
            weights: of the network.
            scale: of the loss of each slot [b].
            feed: what the step sees.
        """

        def value(w: Weights) -> tuple[Tensor, Tensor]:
            each = measure(self.module, w, self.run.forward, self.recipe.loss, feed.batch, feed.at)
            return (each * scale).sum(), each

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            gradients, each = grad(value, has_aux=True)(weights)
        return gradients, each

    def step(self, state: State, scale: Tensor, feed: Feed) -> State:
        """h, a pure function of the state and the scale of each slot: the plain form that the rest is tested against.

        Args:
            state: before the step.
            scale: of the loss of each slot [b].
            feed: what the step sees.
        """
        return update(self.recipe, state, self.losses(state.weights, scale, feed)[0])

    def linearized(self, state: State, feed: Feed) -> tuple[Weights, Pull]:
        """g at a state, and how to pull vectors back through it: one graph for any number of them."""
        if not len(feed.rows):
            zeros = {name: torch.zeros_like(w) for name, w in state.weights.items()}
            return zeros, lambda given: ({name: torch.zeros_like(p) for name, p in given[0].items()}, given[1])
        if self.curvature == "gauss-newton":
            return self._gauss_newton(state, feed)
        if self.curvature == "none":
            (grads, _), through = vjp(lambda s: self.losses(state.weights, s, feed), self.scale(feed))  # type: ignore[misc]
            zeros = {name: torch.zeros_like(w) for name, w in state.weights.items()}
            return grads, lambda given: (zeros, through(given)[0])
        (grads, _), pull = vjp(lambda w, s: self.losses(w, s, feed), state.weights, self.scale(feed))  # type: ignore[misc]
        return grads, pull

    def _gauss_newton(self, state: State, feed: Feed) -> tuple[Weights, Pull]:
        """The same with G in place of H: J p for all slots, times the second derivative of the losses, back through J^T."""
        scale, output = self.scale(feed), self.recipe.loss

        def predict(weights: Weights) -> tuple[Tensor, Tensor]:
            def call(*args: object, **kwargs: object) -> object:
                return functional_call(self.module, weights, args, kwargs)

            return self.run.forward(call, feed.batch, feed.at)

        def slope(prediction: Tensor) -> Tensor:
            return grad(lambda y: output.of(y, target, feed.at.t, self.run.forward).sum())(prediction)

        def backward(cotangent: Tensor) -> Weights:  # linear, so that its own derivative is J
            return vjp(predict, state.weights, has_aux=True)[1](cotangent)[0]

        with sdpa_kernel(SDPBackend.MATH):
            prediction, back, target = vjp(predict, state.weights, has_aux=True)  # type: ignore[misc]
            each, bend = vjp(slope, prediction)  # type: ignore[misc]
            _, jacobian = vjp(backward, torch.zeros_like(prediction))  # type: ignore[misc]
        weigh = scale.reshape(-1, *[1] * (prediction.ndim - 1))

        def pull(given: tuple[Weights, Tensor]) -> tuple[Weights, Tensor]:
            p, e = given
            (moved,) = jacobian(p)
            (weights,) = back(weigh * bend(moved)[0] + e.reshape(weigh.shape) * each)
            return weights, (each * moved).flatten(1).sum(1)

        return back(weigh * each)[0], pull

    def linearized_scales(self, state: State, feed: Feed) -> Pull:
        """The same for slots of weight 0, whose gradient is 0 wherever theta goes: a third of the work."""
        _, pull = vjp(lambda s: self.losses(state.weights, s, feed), self.scale(feed))  # type: ignore[misc]
        return lambda given: ({}, pull(given)[0])

    def each(self, state: State, feed: Feed) -> Iterator[tuple[slice, Tensor]]:
        """grad l_b of each slot, some at a time as the budget holds them: [b, D]."""

        def value(w: Weights, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
            one = Batch(x0[None], t[None], {name: c[None] for name, c in cond.items()})
            return measure(self.module, w, self.run.forward, self.recipe.loss, one, Draw(t[None], noise[None]))[0]

        batch, at = feed.batch, feed.at
        size = sum(w.numel() * w.element_size() for w in state.weights.values())
        for rows in _parts_of(len(feed.rows), max(1, self.run.engine.budget // (6 * size))):
            given = (batch.x0[rows], {k: c[rows] for k, c in batch.cond.items()}, at.t[rows], at.noise[rows])
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                blocks = vmap(grad(value), in_dims=(None, 0, 0, 0, 0))(state.weights, *given)
            yield rows, torch.cat([block.flatten(1) for block in blocks.values()], dim=1)


def twin(module: nn.Module) -> nn.Module:
    """A copy to put other weights into, in evaluation mode; what is not trained is shared, such as all of a LoRA's base."""
    shared = [p for p in module.parameters() if not p.requires_grad]
    return copy.deepcopy(module, {id(p): p for p in shared}).eval()


def _parts_of(count: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))


def pulled(pull: Pull, p: Weights, e: Tensor, at_once: int) -> Iterator[tuple[slice, Weights, Tensor]]:
    """M vectors pulled back, some at a time: the rows of each piece, and what `pull` returns for them.

    Args:
        pull: of one vector.
        p: by parameter, [M, ...] each.
        e: [M, b].
        at_once: vectors in one backward pass.
    """
    for begin in range(0, len(e), at_once):
        rows = slice(begin, min(begin + at_once, len(e)))
        if rows.stop - begin == 1:  # no machinery for a single one
            weights, scale = pull(({name: value[begin] for name, value in p.items()}, e[begin]))
            yield rows, {name: value[None] for name, value in weights.items()}, scale[None]
        else:
            weights, scale = vmap(pull)(({name: value[rows] for name, value in p.items()}, e[rows]))
            yield rows, weights, scale


def final_weights(run: Run) -> Weights:
    """The averaged weights a run ends with."""
    trainer = Trainer(run)
    state = trainer.first()
    for _ in range(trainer.recipe.steps):
        state = trainer.after(state)
    return state.ema
