"""How many models of a ledger are best trained together on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from whence.training.loop import stacked_steps, steps
from whence.training.optimizer import start
from whence.training.order import with_prior_images
from whence.training.study import Study
from whence.types import Engine, Images


def calibrate(
    study: Study,
    images: Images,
    sizes: Sequence[int] = (1, 8, 32),
    count: int = 6,
    engine: Engine = Engine(),
) -> dict[int, float]:
    """Seconds per step and model when 1, 8, 32 ... half-data models are trained together: choose the size with the fewest.

    Args:
        study: what is trained, and how.
        images: the training images.
        sizes: numbers of models that are tried.
        count: steps that are timed.
        engine: how the work is carried out.
    """
    found = {}
    for size in sizes:
        rng = np.random.default_rng(0)
        order = rng.permuted(np.tile(np.arange(len(images)), (size, 1)), axis=1)
        subsets = torch.from_numpy(order < max(1, len(images) // 2)).float()
        short = replace(study, recipe=replace(study.recipe, schedule=replace(study.recipe.schedule, steps=count + 2)))
        both = [with_prior_images(short, images, subset) for subset in subsets]
        seen, weights = both[0][0], torch.stack([given for _, given in both])
        network = short.network_at(0)
        run: Iterator[Any]
        if size == 1:
            run = steps(network, short.forward(), seen, short.at(0), weights[0], engine=engine)
        else:
            starts = [start(network).weights] * size  # where they begin takes no time
            run = stacked_steps(
                network, short.forward(), seen, [short.at(s) for s in range(size)], weights, starts, engine
            )
        next(run), next(run)  # the first steps pay for set-up
        begun = time.monotonic()
        for _ in run:
            pass
        found[size] = (time.monotonic() - begun) / count / size
    return found
