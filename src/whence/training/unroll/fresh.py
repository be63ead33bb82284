"""Slopes of the images along the path of a training, at draws and in an order of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whence.diffusion.draws import Draws, Quantiles
from whence.diffusion.noise import seed_for, stream
from whence.features.gradients import per_image, per_image_vmap
from whence.training.optimizer import State
from whence.training.order import augment, density_of, slots
from whence.training.unroll.run import Trainer, twin
from whence.types import Batch, WhenceError

ROWS = 64  # gradients formed at a time, where the budget holds them
SMALL = 2048  # input values of an image's draws, below which many images at once are faster than one by one (measured)


@dataclass(frozen=True)
class Fresh:
    """Slopes for df/dw_i that are not those of the slots of each step: what image i does at any draw, in any step.

        df/dw_i = sum_t <p_t, [i in step t] grad l_i(theta_t; its draw)> / (B c)        p_t: adjoint of step t's gradient
                ~ sum_k <sum_t p_t, mean_s grad l_i(theta_k; draw s)> / (images c)       t from k to k + every - 1

    for the `images` that are taken at step k = 0, every, 2 every, ..., in an order of their own, each with `draws` of its
    own: the mean over the orders and the noise that the training might as well have had, along the path it took. The sum of
    the adjoints costs one product per image and stretch, so that many draws are cheap; the weights stand still for it.
    """

    images: int
    every: int = 16
    draws: int = 16

    def __post_init__(self) -> None:
        for name in ("images", "every", "draws"):
            if getattr(self, name) < 1:
                raise WhenceError(f"unroll: fresh slopes with {name}={getattr(self, name)}; at least 1 is needed")


class Points:
    """The gradients of the images at the first state of each stretch of a run."""

    def __init__(self, trainer: Trainer, fresh: Fresh):
        self.trainer, self.fresh, run = trainer, fresh, trainer.run
        self.training = replace(run.training, batch_size=fresh.images, seed=seed_for(run.training.seed, "fresh"))
        self.module = twin(trainer.module)
        self.constant = fresh.images * run.c
        steps = Quantiles(fresh.draws, density_of(run.forward))
        self.draws = Draws(steps, self.training.seed, antithetic=fresh.draws % 2 == 0)

    def begins(self, state: State) -> bool:
        return state.step % self.fresh.every == 0

    def each(self, state: State, wanted: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [b] and their mean gradients [b, D], some at a time as the budget holds them. wanted: [n]."""
        trainer, run = self.trainer, self.trainer.run
        taken = slots(self.training, trainer.keys, state.step // self.fresh.every)
        here = torch.ones(len(taken.rows), dtype=torch.bool) if wanted is None else wanted[taken.rows]
        rows, epochs = taken.rows[here], taken.epochs[here]
        if not len(rows):
            return
        names = list(state.weights)
        self.module.load_state_dict(state.weights, strict=False)
        size = sum(w.numel() * w.element_size() for w in state.weights.values())
        at_once = max(1, min(ROWS, run.engine.budget // (6 * size)))
        for some, when in zip(rows.split(at_once), epochs.split(at_once), strict=True):
            batch = augment(self.training, run.images, trainer.read(some), when)
            batch = Batch(batch.x0, stream(self.training.seed, when, batch.keys), batch.cond)  # other draws every time
            given = (self.module, run.forward, self.training.output, self.draws, batch, names)
            together = self.draws.count * math.prod(batch.x0.shape[1:]) < SMALL
            pieces = [per_image_vmap(*given)] if together else [b for _, b in per_image(*given, run.engine.batch_size)]
            yield some, torch.cat([torch.cat([b[name] for name in names], dim=1) for b in pieces])
