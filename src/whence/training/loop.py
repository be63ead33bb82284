"""A trainer whose every step can be reproduced.

Order, timesteps, noise, flips and dropout are functions of (seed, image, epoch): leaving an image out, or giving it another
weight, shifts nothing for the others. Slot p of the run holds image order_e[p mod n] of epoch e = p div n, and step s
takes slots s*B .. (s+1)*B - 1. With w_i the weight of image i and c a constant (the mean weight at the start):

    loss_s = 1/(B c) * sum over slots of w_i * f(x_i; t, eps of (seed, image, epoch))
    AdamW    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  theta = (1 - rate decay) theta - rate m' / (sqrt(v' + r) + eps)

with m', v' the bias-corrected moments and r = eps_root (0 in torch's AdamW; above 0 the square root is differentiable).
A weight of 0 trains as if the image were not there, at the cost of its absence.

Timesteps are drawn from the density that the forward declares, t = floor(T density(u)), evenly unless it says otherwise.

With prior images (Ruiz et al. 2023), which hold the model where it was, each step takes B of them besides, in an order of
their own. Their weight is prior_weight times c, so that the loss is that of Kumari et al. 2023 whatever the subset:

    loss_s = 1/(B c) * sum over B slots of w_i f(x_i)  +  prior_weight * 1/B * sum over B prior slots of f(x_j)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.diffusion.noise import stream
from whence.diffusion.outputs import Output
from whence.features.gradients import check, measure
from whence.training.dropout import active_dropout, key_dropout
from whence.training.optimizer import State, start, update
from whence.training.order import augment, density_of, draw, filled_up, mean_weight, noise_keys, slots_of
from whence.training.recipe import Training
from whence.types import Batch, Draw, Engine, Forward, Images, Weights, WhenceError


class Diverged(WhenceError):
    """A run whose loss or weights are no longer finite: the one failure that is a result of training, not of its input."""


def steps(
    module: nn.Module,
    forward: Forward,
    images: Images,
    training: Training,
    weights: Tensor | None = None,
    state: State | None = None,
    engine: Engine = Engine(),
) -> Iterator[tuple[State, float]]:
    """Train, yielding (state, loss) after every step. weights [n]: a weight per image, 1 each by default.

    `state` goes on from a point reached before: the steps that follow are bit-identical to an uninterrupted run.
    """
    check(training.output, forward)
    module.to(engine.device, engine.dtype).train()
    dropout = key_dropout(module, training.seed)
    weights = torch.ones(len(images)) if weights is None else weights
    if weights.shape != (len(images),) or not bool((weights > 0).any()):
        raise WhenceError(
            f"training: {len(images)} images need as many weights, one of them above 0; got {weights.shape}"
        )
    read, keys = reader(images, engine), noise_keys(images)
    constant = training.batch_size * float(mean_weight(training, weights))
    state = start(module) if state is None else _placed(state, module, engine)
    while state.step < training.steps:
        chosen = slots_of(training, keys, weights, state.step)
        rows, epochs = chosen.rows, chosen.epochs
        batch = augment(training, images, read(rows), epochs)
        shape, total = batch.x0.shape[1:], forward.timesteps
        at = draw([training], batch.keys, epochs, shape, total, batch.x0.dtype, density_of(forward))
        at = Draw(at.t.to(batch.x0.device), at.noise.to(batch.x0))
        for layer in dropout:
            layer.rows = stream(layer.seed, epochs, batch.keys)
        scale = weights[rows].to(batch.x0) / constant
        value, grads = gradient(module, state.weights, forward, training.output, batch, at, scale)
        state = update(training, state, grads)
        if not math.isfinite(value):
            raise Diverged(f"training diverged at step {state.step}: the loss is {value}; lower the learning rate")
        yield state, value


def _refuse_unlike(module: nn.Module, trainings: Sequence[Training], weights: Tensor, count: int) -> None:
    """Only equal trainings of a network without dropout, each with images to see, are stacked."""
    recipe, expected = trainings[0], (len(trainings), count)
    if any(replace(other, seed=recipe.seed) != recipe for other in trainings):
        raise WhenceError("stacked training: the recipes differ in more than their seeds; train them one by one")
    if active_dropout(module):
        raise WhenceError("stacked training: the network has active dropout; train the models one by one")
    if weights.shape != expected or not bool((weights > 0).any(1).all()):
        raise WhenceError(
            f"stacked training: {len(trainings)} models of {count} images need as many weights, one of each model "
            f"above 0; got {tuple(weights.shape)}"
        )


def _side_by_side(starts: Sequence[Weights], engine: Engine) -> State:
    """The states before the first step, with a leading axis for the models."""
    first = {name: torch.stack([w[name] for w in starts]).to(engine.device, engine.dtype) for name in starts[0]}
    zeros = {name: torch.zeros_like(w) for name, w in first.items()}
    return State(first, zeros, dict(zeros), dict(first))


def stacked_steps(
    module: nn.Module,
    forward: Forward,
    images: Images,
    trainings: Sequence[Training],
    weights: Tensor,
    starts: Sequence[Weights],
    engine: Engine = Engine(),
) -> Iterator[tuple[State, Tensor]]:
    """Train S models at once, one vectorised computation per step; yields (states with a leading axis S, losses [S]).

    trainings: equal but for their seeds; weights [S, n]; starts: the initial weights of each. Every model sees exactly what
    it would see alone in `steps`; images of weight 0 are left out and shorter batches filled up with rows of weight 0.
    """
    recipe = trainings[0]
    _refuse_unlike(module, trainings, weights, len(images))
    check(recipe.output, forward)
    module.to(engine.device, engine.dtype).train()
    read, keys = reader(images, engine), noise_keys(images)
    constants = recipe.batch_size * mean_weight(recipe, weights)
    state = _side_by_side(starts, engine)

    def value(w: Weights, batch: Batch, at: Draw, scale: Tensor) -> Tensor:
        return (measure(module, w, forward, recipe.output, batch, at) * scale).sum()

    def loss_and_grad(w: Weights, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor, scale: Tensor) -> Any:
        return grad_and_value(value)(w, Batch(x0, t, cond), Draw(t, noise), scale)

    def advance(w: Weights, m: Weights, v: Weights, ema: Weights, g: Weights) -> tuple[Weights, ...]:
        after = update(recipe, State(w, m, v, ema, state.step), g)
        return after.weights, after.m, after.v, after.ema

    while state.step < recipe.steps:
        pieces = [slots_of(t, keys, w, state.step) for t, w in zip(trainings, weights, strict=True)]
        longest = max(1, *(len(piece.rows) for piece in pieces))  # networks may refuse a batch of no image
        filled = [filled_up(piece, longest) for piece in pieces]
        batches = [
            augment(t, images, read(rows), epochs) for t, (rows, epochs, _) in zip(trainings, filled, strict=True)
        ]
        x0 = torch.stack([batch.x0 for batch in batches])
        at = draw(
            trainings,
            torch.cat([batch.keys for batch in batches]),
            torch.cat([epochs for _, epochs, _ in filled]),
            x0.shape[2:],
            forward.timesteps,
            x0.dtype,
            density_of(forward),
        )
        t, noise = at.t.reshape(x0.shape[:2]), at.noise.reshape(x0.shape)
        every = zip(weights, constants, filled, strict=True)
        scale = torch.stack([(w[rows] * real).to(x0.dtype) / c for w, c, (rows, _, real) in every])
        cond = {name: torch.stack([batch.cond[name] for batch in batches]) for name in batches[0].cond}
        with sdpa_kernel(SDPBackend.MATH):
            grads, losses = vmap(loss_and_grad)(state.weights, x0, cond, t.to(x0.device), noise.to(x0), scale.to(x0))
        w, m, v, ema = vmap(advance)(state.weights, state.m, state.v, state.ema, grads)
        state = State(w, m, v, ema, state.step + 1)
        if not torch.isfinite(losses).all():
            raise Diverged(f"training diverged at step {state.step}; lower the learning rate")
        yield state, losses


def gradient(
    module: nn.Module, weights: Weights, forward: Forward, output: Output, batch: Batch, at: Draw, scale: Tensor
) -> tuple[float, Weights]:
    """The loss sum_b scale_b f_b and its gradient; no image, no gradient."""
    if not len(batch):
        return 0.0, {name: torch.zeros_like(w) for name, w in weights.items()}
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    value = (measure(module, leaves, forward, output, batch, at) * scale).sum()
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    filled = {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), grads, strict=True)
    }
    return float(value.detach()), filled


def _placed(state: State, module: nn.Module, engine: Engine) -> State:
    """The state on the engine's device and in the module's order: a checkpoint is read on the CPU, sorted by name, and the
    norm of the gradient is a sum in that order, to the last bit."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parts = (state.weights, state.m, state.v, state.ema)
    weights, m, v, ema = ({name: part[name].to(engine.device) for name in names} for part in parts)
    return State(weights, m, v, ema, state.step)


def reader(images: Images, engine: Engine) -> Callable[[Tensor], Batch]:
    """Rows -> batch on the device; kept in memory when all images fit in the budget, read from disk otherwise."""
    size = images.batch([0]).x0.numel() * torch.finfo(engine.dtype).bits // 8
    if size * len(images) > engine.budget:
        return lambda rows: images.batch(rows.tolist()).to(engine.device, engine.dtype)
    every = images.batch(range(len(images))).to(engine.device, engine.dtype)

    def pick(rows: Tensor) -> Batch:
        there = rows.to(every.x0.device)
        return Batch(every.x0[there], every.keys[rows], {k: v[there] for k, v in every.cond.items()})

    return pick
