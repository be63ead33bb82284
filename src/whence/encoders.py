"""Encoders: image -> feature row, for the methods that compare images instead of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from whence.types import Batch

Encoder = Callable[[nn.Module, Batch], Tensor]
"""(the trained model, a batch) -> [b, k]. Most encoders do not look at the model."""


@dataclass(frozen=True)
class Pixels:
    """The image itself, flattened, in [-1, 1]; `center` takes away each image's own mean."""

    center: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        flat = batch.x0.flatten(1)
        return flat - flat.mean(1, keepdim=True) if self.center else flat
