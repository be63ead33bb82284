"""The recipe of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from whence.diffusion.outputs import Output, loss
from whence.types import WhenceError, describe


@dataclass(frozen=True)
class Training:
    """The recipe of a run.

    Args:
        steps: of the optimizer.
        batch_size: images per step.
        rate: the learning rate at its height; it rises linearly over `warmup` steps, then falls as a half cosine to 0.
        warmup: steps in which the rate rises.
        schedule: "cosine", or "constant" for a rate that stays.
        beta1, beta2, eps: of AdamW.
        eps_root: added under AdamW's square root (see `training.loop`); smooth above 0.
        decay: of the weights, times the rate in every step.
        clip: the largest gradient norm, None for no limit.
        ema: decay of the weight average that is sampled from, None for none; it starts as (1 + step) / (10 + step), as in
            diffusers.
        flip: mirror images at random.
        output: the loss.
        seed: of everything.
        prior: how many of the images, the last ones, are prior images (see `with_prior_images`).
        empty_caption: the chance that an image has an empty caption in an epoch, so that the model can be drawn from with
            classifier-free guidance.
        momentum: that of SGD in place of AdamW, m' = momentum m + g, theta' = (1 - rate decay) theta - rate m'.
    """

    steps: int
    batch_size: int = 64
    rate: float = 1e-4
    warmup: int = 0
    schedule: str = "cosine"
    beta1: float = 0.95
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    decay: float = 1e-6
    clip: float | None = 1.0
    ema: float | None = None
    flip: bool = False
    output: Output = loss
    seed: int = 0
    prior: int = 0
    empty_caption: float = 0.0
    momentum: float | None = None

    def describe(self) -> dict[str, Any]:
        """As of any dataclass, without what recipes of before do not name."""
        later = {"prior": 0, "empty_caption": 0.0, "momentum": None}
        found = {f.name: describe(getattr(self, f.name)) for f in fields(self)}
        named = {k: v for k, v in found.items() if k not in later or v != later[k]}
        return {"is": type(self).__name__, **named}

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise WhenceError(f"schedule {self.schedule!r} is not one of cosine, constant")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise WhenceError(f"training: {name} is {getattr(self, name)}; at least 1 is needed")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise WhenceError(f"training: momentum is {self.momentum:g}; accepted: 0 to below 1, None for AdamW")

    def rate_at(self, step: int) -> float:
        """The learning rate of step number `step` (from 0)."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))
