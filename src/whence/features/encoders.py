"""Encoders: image -> feature row, for the methods that compare images instead of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType

import torch
from torch import Tensor, nn

from whence.types import Batch, Forward, WhenceError, describe

Encoder = Callable[[nn.Module, Forward, Batch], Tensor]
"""(the trained model, how it is measured, a batch) -> [b, k]. Most encoders do not look at the model: those with an
attribute `of_pictures` are given the pictures, also where the model sees latents of them."""


@dataclass(frozen=True)
class Pixels:
    """The image itself, flattened, in [-1, 1].

    Args:
        center: take away each image's own mean.
    """

    center: bool = False
    of_pictures = True

    def __call__(self, model: nn.Module, forward: Forward, batch: Batch) -> Tensor:
        flat = batch.x0.flatten(1)
        return flat - flat.mean(1, keepdim=True) if self.center else flat


@dataclass(frozen=True)
class Thumbnail:
    """The image made small, flattened, each image's own mean taken away: what near-copies are looked for by.

    A larger image is brought down to `side` px along its longer edge, by the means of areas; a smaller one stays as it is.

    Args:
        side: px that no edge is longer than.
    """

    side: int = 64
    of_pictures = True

    def __call__(self, model: nn.Module, forward: Forward, batch: Batch) -> Tensor:
        x0 = batch.x0
        if x0.ndim != 4:
            raise WhenceError(f"images of shape {list(x0.shape[1:])}", "Thumbnail", "pictures [C, H, W]")
        if max(x0.shape[2:]) > self.side:
            height, width = (max(1, round(edge * self.side / max(x0.shape[2:]))) for edge in x0.shape[2:])
            x0 = nn.functional.adaptive_avg_pool2d(x0, (height, width))
        flat = x0.flatten(1)
        return flat - flat.mean(1, keepdim=True)


@dataclass(frozen=True)
class Function:
    """A function of pictures: [b, C, H, W] in [-1, 1] -> [b, k], each row of its own picture alone.

    Features are stored under name and digest, because the function's code cannot be compared.

    Args:
        call: the function.
        digest: any text that changes whenever the function's results do (a version, the digest of its weights).
        name: the function's own by default.
    """

    call: Callable[[Tensor], Tensor]
    digest: str
    name: str = ""
    of_pictures = True

    def __post_init__(self) -> None:
        named = isinstance(self.call, FunctionType | MethodType | BuiltinFunctionType | type)
        own = f"{self.call.__module__}.{self.call.__qualname__ if named else '<lambda>'}"
        if not self.name and "<lambda>" in own:
            raise WhenceError(
                f"encoder {self.call!r} has no name to keep its features under; give Function(..., name=)"
            )
        if not self.digest:
            raise WhenceError(
                f"encoder {self.name or own}: digest is empty; give a text that changes whenever its results do"
            )
        object.__setattr__(self, "name", self.name or own)

    def describe(self) -> dict[str, object]:
        return {"is": "Function", "name": self.name, "digest": describe(self.digest)}

    def __call__(self, model: nn.Module, forward: Forward, batch: Batch) -> Tensor:
        found = self.call(batch.x0)
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(batch):
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise WhenceError(
                f"encoder {self.name} returns {shape} for {len(batch)} pictures; it must be [{len(batch)}, k]"
            )
        return found
