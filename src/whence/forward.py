"""From an image and a draw to (prediction, target): the training measure of a model, written once.

noisy      x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
target     epsilon: eps      v_prediction: sqrt(abar_t) eps - sqrt(1 - abar_t) x0      sample: x0
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whence.types import Batch, Draw, WhenceError, describe, digest

Predict = Callable[[Callable[..., Any], Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(call, x_t [b, ...], t [b], cond) -> the network's output for each row."""

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def plain(call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """A network called as net(x_t, t, **cond)."""
    return call(x_t, t, **cond)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A model of the DDPM family with a discrete schedule.

    alphas_cumprod [T]; prediction_type as diffusers names it; predict: how to call the network.
    """

    alphas_cumprod: Tensor
    prediction_type: str = "epsilon"
    predict: Predict = plain
    models = "denoiser"

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise WhenceError(f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")

    @property
    def timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def describe(self) -> dict[str, Any]:
        return {
            "is": "Denoiser",
            "prediction_type": self.prediction_type,
            "schedule": digest(self.alphas_cumprod.double()),
            "predict": describe(self.predict),
        }

    def __call__(self, call: Callable[..., Any], batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        x0, noise = batch.x0, draw.noise
        signal = self.alphas_cumprod.to(x0)[draw.t].reshape(-1, *[1] * (x0.ndim - 1))
        a, s = signal.sqrt(), (1 - signal).sqrt()
        x_t = a * x0 + s * noise
        target = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[self.prediction_type]
        prediction = self.predict(call, x_t, draw.t, batch.cond)
        if prediction.shape[1] == 2 * x0.shape[1]:
            # Networks that also learn the variance (DiT, improved DDPM) put it in as many further channels.
            prediction = prediction[:, : x0.shape[1]]
        if prediction.shape != target.shape:
            raise WhenceError(
                f"the network returns {list(prediction.shape)} for images {list(x0.shape)}; their shapes must be equal"
            )
        return prediction, target


@dataclass(frozen=True)
class Classifier:
    """Any network called as net(images) -> logits; the target is cond["class_labels"]. Draws are ignored."""

    timesteps: int = 1
    alphas_cumprod = None
    models = "classifier"

    def __call__(self, call: Callable[..., Any], batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        if "class_labels" not in batch.cond:
            raise WhenceError("a classifier needs labels: class folders or a `label` column in metadata.jsonl")
        return call(batch.x0), batch.cond["class_labels"]


def linear_schedule(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """alphas_cumprod of the linear beta schedule of DDPM: [steps] float64."""
    return (1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0)
