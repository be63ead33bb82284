"""Slopes of the images along the path of a training, at draws and in an order of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from whence.diffusion.draws import Draws, Quantiles
from whence.diffusion.noise import seed_for, stream
from whence.features.gradients import per_image, per_image_vmap
from whence.training.optimizer import State
from whence.training.order import augment, slots
from whence.training.unroll.run import Resample, Trainer, twin
from whence.types import Batch

ROWS = 64  # gradients formed at a time, where the budget holds them
SMALL = 2048  # input values of an image's draws, below which many images at once are faster than one by one (measured)


class Points:
    """The gradients of the images at the first state of each stretch of a run."""

    def __init__(self, trainer: Trainer, resample: Resample):
        self.trainer, self.resample, run = trainer, resample, trainer.run
        self.recipe = replace(run.recipe, batch_size=resample.images, seed=seed_for(run.recipe.seed, "fresh"))
        self.module = twin(trainer.module)
        self.constant = resample.images * run.c
        steps = Quantiles(resample.draws, run.forward.density)
        self.draws = Draws(steps, self.recipe.seed, antithetic=resample.draws % 2 == 0)

    def begins(self, state: State) -> bool:
        return state.step % self.resample.every == 0

    def each(self, state: State, wanted: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [b] and their mean gradients [b, D], some at a time as the budget holds them. wanted: [n]."""
        trainer, run = self.trainer, self.trainer.run
        taken = slots(self.recipe, trainer.keys, state.step // self.resample.every)
        here = torch.ones(len(taken.rows), dtype=torch.bool) if wanted is None else wanted[taken.rows]
        rows, epochs = taken.rows[here], taken.epochs[here]
        if not len(rows):
            return
        names = list(state.weights)
        self.module.load_state_dict(state.weights, strict=False)
        size = sum(w.numel() * w.element_size() for w in state.weights.values())
        at_once = max(1, min(ROWS, run.engine.budget // (6 * size)))
        for some, when in zip(rows.split(at_once), epochs.split(at_once), strict=True):
            batch = augment(self.recipe, run.images, trainer.read(some), when)
            batch = Batch(batch.x0, stream(self.recipe.seed, when, batch.keys), batch.cond)  # other draws every time
            given = (self.module, run.forward, self.recipe.loss, self.draws, batch, names)
            together = self.draws.count * math.prod(batch.x0.shape[1:]) < SMALL
            pieces = [per_image_vmap(*given)] if together else [b for _, b in per_image(*given, run.engine.batch_size)]
            yield some, torch.cat([torch.cat([b[name] for name in names], dim=1) for b in pieces])
