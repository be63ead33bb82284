"""A training to be differentiated, its steps one at a time, and how each step's gradient is linearised.

`Run` says which training, `Trainer` takes its steps to the bit as `training.steps` does. A `Pull` takes vectors back through
the gradient of a step, with the Hessian or with its Gauss-Newton part.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from whence.features.gradients import check, measure
from whence.training.dropout import active_dropout
from whence.training.loop import Diverged, gradient, reader
from whence.training.optimizer import State, start, update
from whence.training.order import augment, density_of, draw, mean_weight, noise_keys, slots, with_prior_images
from whence.training.recipe import Training
from whence.types import Batch, Draw, Engine, Forward, Images, Trainable, Weights, WhenceError

CURVATURES = ("hessian", "gauss-newton")
AT_ONCE = 64  # adjoints in one backward pass, where the budget has room for them


# ----------------------------------------------------------------------------------------------- what is differentiated


@dataclass(frozen=True, eq=False)
class Run:
    """One training, to be differentiated.

    module: the network before its first step; weights [n]: of the images, 1 each by default; constant: the c that losses are
    divided by, the mean of `weights` by default; engine: its budget bounds what is held at once.
    """

    module: nn.Module
    forward: Forward
    images: Images
    training: Training
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
        """The training of a study with a seed, its own by default; its prior images, if any, come after the images."""
        seed = study.training.seed if seed is None else seed
        images, weights = with_prior_images(study, images, weights)
        return cls(study.network_at(seed), study.forward(), images, study.at(seed), weights, engine=engine)

    @property
    def every(self) -> Tensor:
        """The weight of every image: [n]."""
        return torch.ones(len(self.images)) if self.weights is None else self.weights

    @property
    def c(self) -> float:
        return float(mean_weight(self.training, self.every)) if self.constant is None else self.constant

    def at(self, weights: Tensor) -> Run:
        """The same training at other weights, with the same c: the function of the weights that is differentiated."""
        return replace(self, weights=weights, constant=self.c)


def _refuse(run: Run) -> None:
    n = len(run.images)
    if type(run.training) is not Training:
        raise WhenceError(
            f"unroll: no derivative of the optimiser of a {type(run.training).__name__}; accepted: Training (AdamW, SGD)"
        )
    if active_dropout(run.module):
        raise WhenceError("unroll: the network has active dropout; train and differentiate it with dropout 0")
    if any(isinstance(layer, _BatchNorm) for layer in run.module.modules()):
        raise WhenceError("unroll: batch normalisation mixes the images of a step; use group or layer normalisation")
    if run.every.shape != (n,) or not bool((run.every != 0).any()) or not run.c > 0:
        raise WhenceError(
            f"unroll: {n} images need as many weights, with a mean above 0; got {tuple(run.every.shape)}, mean {run.c:.3g}"
        )
    check(run.training.output, run.forward)


# ------------------------------------------------------------------------------------------------------- one step of it


@dataclass(frozen=True)
class Feed:
    """What one step sees: the image in each slot (rows [b]), its batch and draws."""

    rows: Tensor
    batch: Batch
    at: Draw

    def only(self, here: Tensor) -> Feed:
        """Some of the slots: here [b] bool."""
        if bool(here.all()):
            return self
        there, batch = here.to(self.batch.x0.device), self.batch
        cond = {name: value[there] for name, value in batch.cond.items()}
        picked = Batch(batch.x0[there], batch.keys[here], cond)
        return Feed(self.rows[here], picked, Draw(self.at.t[there], self.at.noise[there]))


Pull = Callable[[tuple[Weights, Tensor]], tuple[Weights, Tensor]]
"""(p, e [b]) -> derivatives of <p, g> + <e, l> with respect to (theta, the scale of each slot [b])."""


class Trainer:
    """The steps of `training.steps`, from any state and one at a time, and their derivative."""

    def __init__(self, run: Run, curvature: str = "hessian"):
        _refuse(run)
        if curvature not in CURVATURES:
            raise WhenceError(f"unroll: curvature={curvature!r} is not one of {', '.join(CURVATURES)}")
        self.curvature = curvature
        self.run, self.training, engine = run, run.training, run.engine
        self.module = run.module.to(engine.device, engine.dtype).train()
        self.read, self.keys = reader(run.images, engine), noise_keys(run.images)
        self.weights, self.constant = run.every, run.training.batch_size * run.c

    def first(self) -> State:
        return start(self.module)

    def feed(self, step: int) -> Feed:
        """All slots of a step, whatever their weight."""
        chosen = slots(self.training, self.keys, step)
        batch = augment(self.training, self.run.images, self.read(chosen.rows), chosen.epochs)
        x0, total = batch.x0, self.run.forward.timesteps
        density = density_of(self.run.forward)
        at = draw([self.training], batch.keys, chosen.epochs, x0.shape[1:], total, x0.dtype, density)
        return Feed(chosen.rows, batch, Draw(at.t.to(x0.device), at.noise.to(x0)))

    def present(self, feed: Feed) -> Tensor:
        """The slots whose image has any weight: [b] bool."""
        return self.weights[feed.rows] != 0

    def scale(self, feed: Feed) -> Tensor:
        """What the loss of each slot is multiplied by: [b]."""
        return self.weights[feed.rows].to(feed.batch.x0) / self.constant

    def after(self, state: State, average: bool = True) -> State:
        """The next state, to the bit that of `training.steps`. Without average its ema is its weights."""
        feed = self.feed(state.step)
        feed = feed.only(self.present(feed))
        given = (self.run.forward, self.training.output, feed.batch, feed.at, self.scale(feed))
        value, grads = gradient(self.module, state.weights, *given)
        if not math.isfinite(value):
            raise Diverged(f"training diverged at step {state.step + 1}: the loss is {value}; lower the learning rate")
        return update(self.training if average else replace(self.training, ema=None), state, grads)

    def losses(self, weights: Weights, scale: Tensor, feed: Feed) -> tuple[Weights, Tensor]:
        """g = sum_b scale_b grad l_b, and l [b]: differentiable in (weights, scale)."""

        def value(w: Weights) -> tuple[Tensor, Tensor]:
            each = measure(self.module, w, self.run.forward, self.training.output, feed.batch, feed.at)
            return (each * scale).sum(), each

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            gradients, each = grad(value, has_aux=True)(weights)
        return gradients, each

    def step(self, state: State, scale: Tensor, feed: Feed) -> State:
        """h, a pure function of the state and the scale of each slot: the plain form that the rest is tested against."""
        return update(self.training, state, self.losses(state.weights, scale, feed)[0])

    def linearized(self, state: State, feed: Feed) -> tuple[Weights, Pull]:
        """g at a state, and how to pull vectors back through it: one graph for any number of them."""
        if not len(feed.rows):
            zeros = {name: torch.zeros_like(w) for name, w in state.weights.items()}
            return zeros, lambda given: ({name: torch.zeros_like(p) for name, p in given[0].items()}, given[1])
        if self.curvature == "gauss-newton":
            return self._gauss_newton(state, feed)
        (grads, _), pull = vjp(lambda w, s: self.losses(w, s, feed), state.weights, self.scale(feed))  # type: ignore[misc]
        return grads, pull

    def _gauss_newton(self, state: State, feed: Feed) -> tuple[Weights, Pull]:
        """The same with G in place of H: J p for all slots, times what the losses curve, back through J^T."""
        scale, output = self.scale(feed), self.training.output

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
            _, along = vjp(backward, torch.zeros_like(prediction))  # type: ignore[misc]
        weigh = scale.reshape(-1, *[1] * (prediction.ndim - 1))

        def pull(given: tuple[Weights, Tensor]) -> tuple[Weights, Tensor]:
            p, e = given
            (moved,) = along(p)
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
            return measure(self.module, w, self.run.forward, self.training.output, one, Draw(t[None], noise[None]))[0]

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
    """M vectors p [M, ...], e [M, b] pulled back, `at_once` at a time."""
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
    for _ in range(trainer.training.steps):
        state = trainer.after(state)
    return state.ema
