"""One step of a training: what it sees, its gradient, and the state after it.

The plain loop, the stacked loop and the replay that is differentiated (`unroll`) all take their steps here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whence.diffusion.outputs import Output
from whence.features.gradients import measure
from whence.training.optimizer import State
from whence.training.order import Slots, augment, draw
from whence.training.recipe import Recipe, update
from whence.types import Batch, Draw, Engine, Forward, Images, Weights, WhenceError


class Diverged(WhenceError):
    """A run whose loss or weights are no longer finite: the one failure that is a result of training, not of its input."""

    @classmethod
    def at(cls, step: int, value: float) -> Diverged:
        return cls(f"training diverged at step {step}: the loss is {value}; lower the learning rate")


@dataclass(frozen=True)
class Feed:
    """What one step sees.

    Args:
        rows: the image in each slot [b].
        epochs: of each slot [b].
        batch: the images [b].
        at: timestep [b] and noise [b, ...] of each slot.
    """

    rows: Tensor
    epochs: Tensor
    batch: Batch
    at: Draw

    def only(self, here: Tensor) -> Feed:
        """Some of the slots: here [b] bool."""
        if bool(here.all()):
            return self
        there, batch = here.to(self.batch.x0.device), self.batch
        cond = {name: value[there] for name, value in batch.cond.items()}
        picked = Batch(batch.x0[there], batch.keys[here], cond)
        return Feed(self.rows[here], self.epochs[here], picked, Draw(self.at.t[there], self.at.noise[there]))


Read = Callable[[Tensor], Batch]
"""Rows -> their batch on the device."""


def feed(recipe: Recipe, forward: Forward, images: Images, read: Read, chosen: Slots) -> Feed:
    """What training shows of some slots.

    Args:
        recipe: of the training.
        forward: says how many timesteps there are, and their density.
        images: the training images.
        read: rows -> their batch on the device.
        chosen: the slots.
    """
    return feeds([recipe], forward, images, read, [chosen])[0]


def feeds(
    recipes: Sequence[Recipe], forward: Forward, images: Images, read: Read, chosen: Sequence[Slots]
) -> list[Feed]:
    """The same for several trainings that differ in their seeds, with equally many slots each: one call for all draws.

    Args:
        recipes: of the trainings.
        forward: says how many timesteps there are, and their density.
        images: the training images.
        read: rows -> their batch on the device.
        chosen: the slots of each training.
    """
    batches = [augment(r, images, read(some.rows), some.epochs) for r, some in zip(recipes, chosen, strict=True)]
    x0 = batches[0].x0
    at = draw(
        [recipe.seed for recipe in recipes],
        torch.cat([batch.keys for batch in batches]),
        torch.cat([some.epochs for some in chosen]),
        x0.shape[1:],
        forward.timesteps,
        x0.dtype,
        forward.density,
    )
    t, noise = at.t.to(x0.device).split(len(x0)), at.noise.to(x0).split(len(x0))
    pieces = zip(chosen, batches, t, noise, strict=True)
    return [Feed(some.rows, some.epochs, batch, Draw(t, eps)) for some, batch, t, eps in pieces]


def advance(
    module: nn.Module, forward: Forward, recipe: Recipe, state: State, seen: Feed, scale: Tensor
) -> tuple[State, float]:
    """The state after a step, and the loss sum_b scale_b f_b of its slots.

    Args:
        module: the network.
        forward: image and draw -> prediction and target.
        recipe: of the training.
        state: before the step.
        seen: what the step sees.
        scale: of the loss of each slot [b].
    """
    value, grads = gradient(module, state.weights, forward, recipe.loss, seen, scale)
    if not math.isfinite(value):
        raise Diverged.at(state.step + 1, value)
    return update(recipe, state, grads), value


def gradient(
    module: nn.Module, weights: Weights, forward: Forward, loss: Output, seen: Feed, scale: Tensor
) -> tuple[float, Weights]:
    """The loss sum_b scale_b f_b and its gradient; no image, no gradient.

    Args:
        module: the network.
        weights: of the network.
        forward: image and draw -> prediction and target.
        loss: f.
        seen: what the step sees.
        scale: of the loss of each slot [b].
    """
    if not len(seen.rows):
        return 0.0, {name: torch.zeros_like(w) for name, w in weights.items()}
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    value = (measure(module, leaves, forward, loss, seen.batch, seen.at) * scale).sum()
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    filled = {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), grads, strict=True)
    }
    return float(value.detach()), filled


def reader(images: Images, engine: Engine) -> Read:
    """Rows -> batch on the device; kept in memory when all images fit in the budget, read from disk otherwise."""
    size = images.batch([0]).x0.numel() * torch.finfo(engine.dtype).bits // 8
    if size * len(images) > engine.budget:
        return lambda rows: images.batch(rows.tolist()).to(engine.device, engine.dtype)
    all_images = images.batch(range(len(images))).to(engine.device, engine.dtype)

    def pick(rows: Tensor) -> Batch:
        there = rows.to(all_images.x0.device)
        cond = {name: value[there] for name, value in all_images.cond.items()}
        return Batch(all_images.x0[there], all_images.keys[rows], cond)

    return pick
