"""A trainer whose every step can be reproduced.

Order, timesteps, noise, flips and dropout are functions of (seed, image, epoch): leaving an image out, or giving it another
weight, shifts nothing for the others. Slot p of the run holds image order_e[p mod n] of epoch e = p div n, and step s
takes slots s*B .. (s+1)*B - 1. With w_i the weight of image i and c a constant (the mean weight at the start):

    loss_s = 1/(B c) * sum over slots of w_i * f(x_i; t, eps of (seed, image, epoch))

A weight of 0 trains as if the image were not there, at the cost of its absence. For the optimizers see `optimizer`.

Timesteps are drawn from the density that the forward declares, t = floor(T density(u)), evenly unless it says otherwise.

With prior images (Ruiz et al. 2023), which hold the model where it was, each step takes B of them besides, in an order of
their own. Their weight is prior_weight times c, so that the loss is that of Kumari et al. 2023 whatever the subset:

    loss_s = 1/(B c) * sum over B slots of w_i f(x_i)  +  prior_weight * 1/B * sum over B prior slots of f(x_j)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.diffusion.noise import stream
from whence.features.gradients import check, measure
from whence.training.dropout import active_dropout, key_dropout
from whence.training.optimizer import State, start
from whence.training.order import Slots, filled_up, mean_weight, noise_keys, slots_of
from whence.training.recipe import Recipe, update
from whence.training.step import Diverged, advance, feed, feeds, reader
from whence.types import Batch, Draw, Engine, Forward, Images, Weights, WhenceError


def steps(
    module: nn.Module,
    forward: Forward,
    images: Images,
    recipe: Recipe,
    weights: Tensor | None = None,
    state: State | None = None,
    engine: Engine = Engine(),
) -> Iterator[tuple[State, float]]:
    """Train, yielding (state, loss) after every step.

    Args:
        module: the network before its first step.
        forward: how it is measured.
        images: n of them.
        recipe: of the training; its `model` is not looked at.
        weights: of the images [n], 1 each by default.
        state: a point reached before, to go on from: the steps that follow are bit-identical to an uninterrupted run.
        engine: how the work is carried out.
    """
    check(recipe.loss, forward)
    module.to(engine.device, engine.dtype).train()
    dropout = key_dropout(module, recipe.seed)
    weights = torch.ones(len(images)) if weights is None else weights
    if weights.shape != (len(images),) or not bool((weights > 0).any()):
        raise WhenceError(
            f"training: {len(images)} images need as many weights, one of them above 0; got {weights.shape}"
        )
    read, keys = reader(images, engine), noise_keys(images)
    constant = recipe.batch_size * float(mean_weight(recipe, weights))
    state = start(module) if state is None else _placed(state, module, engine)
    while state.step < recipe.steps:
        seen = feed(recipe, forward, images, read, slots_of(recipe, keys, weights, state.step))
        for layer in dropout:
            layer.rows = stream(layer.seed, seen.epochs, seen.batch.keys)
        scale = weights[seen.rows].to(seen.batch.x0) / constant
        state, value = advance(module, forward, recipe, state, seen, scale)
        yield state, value


def _refuse_unlike(module: nn.Module, recipes: Sequence[Recipe], weights: Tensor, count: int) -> None:
    """Only equal trainings of a network without dropout, each with images to see, are stacked."""
    recipe, expected = recipes[0], (len(recipes), count)
    if any(replace(other, seed=recipe.seed) != recipe for other in recipes):
        raise WhenceError("stacked training: the recipes differ in more than their seeds; train them one by one")
    if active_dropout(module):
        raise WhenceError("stacked training: the network has active dropout; train the models one by one")
    if weights.shape != expected or not bool((weights > 0).any(1).all()):
        raise WhenceError(
            f"stacked training: {len(recipes)} models of {count} images need as many weights, one of each model "
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
    recipes: Sequence[Recipe],
    weights: Tensor,
    starts: Sequence[Weights],
    engine: Engine = Engine(),
    state: State | None = None,
) -> Iterator[tuple[State, Tensor]]:
    """Train S models at once, one vectorised computation per step; yields (states with a leading axis S, losses [S]).

    Every model sees exactly what it would see alone in `steps`; images of weight 0 are left out, and shorter batches filled
    up with rows of weight 0.

    Args:
        module: the network; its own weights are not used.
        forward: how it is measured.
        images: n of them.
        recipes: S of them, equal but for their seeds.
        weights: of the images, for each model [S, n].
        starts: the initial weights of each.
        engine: how the work is carried out.
        state: a point of all of them reached before, to go on from, as of `steps`.
    """
    recipe = recipes[0]
    _refuse_unlike(module, recipes, weights, len(images))
    check(recipe.loss, forward)
    module.to(engine.device, engine.dtype).train()
    read, keys = reader(images, engine), noise_keys(images)
    constants = recipe.batch_size * mean_weight(recipe, weights)
    now = _side_by_side(starts, engine) if state is None else _placed(state, module, engine)

    def value(w: Weights, batch: Batch, at: Draw, scale: Tensor) -> Tensor:
        return (measure(module, w, forward, recipe.loss, batch, at) * scale).sum()

    def loss_and_grad(w: Weights, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor, scale: Tensor) -> Any:
        return grad_and_value(value)(w, Batch(x0, t, cond), Draw(t, noise), scale)

    def after(w: Weights, m: Weights, v: Weights, ema: Weights, g: Weights) -> tuple[Weights, ...]:
        found = update(recipe, State(w, m, v, ema, now.step), g)
        return found.weights, found.m, found.v, found.ema

    while now.step < recipe.steps:
        chosen, real = _equally_many([slots_of(r, keys, w, now.step) for r, w in zip(recipes, weights, strict=True)])
        seen = feeds(recipes, forward, images, read, chosen)
        x0, t, noise = (
            torch.stack(part) for part in zip(*((s.batch.x0, s.at.t, s.at.noise) for s in seen), strict=True)
        )
        cond = {name: torch.stack([s.batch.cond[name] for s in seen]) for name in seen[0].batch.cond}
        each = zip(weights, constants, chosen, real, strict=True)
        scale = torch.stack([(w[some.rows] * here).to(x0.dtype) / c for w, c, some, here in each]).to(x0)
        with sdpa_kernel(SDPBackend.MATH):
            grads, losses = vmap(loss_and_grad)(now.weights, x0, cond, t, noise, scale)
        w, m, v, ema = vmap(after)(now.weights, now.m, now.v, now.ema, grads)
        now = State(w, m, v, ema, now.step + 1)
        if not torch.isfinite(losses).all():
            raise Diverged.at(now.step, float(losses[~torch.isfinite(losses)][0]))
        yield now, losses


def _equally_many(pieces: Sequence[Slots]) -> tuple[list[Slots], list[Tensor]]:
    """Slots filled up to the longest of them, and which are real: 1 or 0."""
    longest = max(1, *(len(piece.rows) for piece in pieces))  # networks may refuse a batch of no image
    filled = [filled_up(piece, longest) for piece in pieces]
    return [Slots(rows, epochs) for rows, epochs, _ in filled], [real for _, _, real in filled]


def _placed(state: State, module: nn.Module, engine: Engine) -> State:
    """The state on the engine's device and in the module's order: a checkpoint is read on the CPU, sorted by name, and the
    norm of the gradient is a sum in that order, to the last bit."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parts = (state.weights, state.m, state.v, state.ema)
    weights, m, v, ema = ({name: part[name].to(engine.device) for name in names} for part in parts)
    return State(weights, m, v, ema, state.step)
