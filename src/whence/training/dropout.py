"""Dropout that can be reproduced."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from whence.diffusion.noise import seed_for, uniforms
from whence.types import WhenceError


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, layer, image, epoch) instead of the position in the batch."""

    def __init__(self, p: float, seed: int):
        super().__init__()
        self.p, self.seed = p, seed
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rows is None:
            return x
        keep = uniforms(self.rows, x[0].numel()).reshape(x.shape) >= self.p
        return x * keep.to(x) / (1 - self.p)


def active_dropout(module: nn.Module) -> bool:
    """Whether any layer of a network drops something in training: values, or the label of an image."""
    return any(
        (isinstance(layer, (_DropoutNd, KeyedDropout)) and layer.p > 0) or _drops_labels(layer)
        for layer in module.modules()
    )


def _drops_labels(layer: nn.Module) -> bool:
    # By its name: a network in memory needs no diffusers.
    return type(layer).__name__ == "LabelEmbedding" and bool(layer.dropout_prob)


def key_dropout(module: nn.Module, seed: int) -> list[KeyedDropout]:
    """Replace every active dropout layer of a network, in place; layers replaced before get the seed of this run."""
    layers: list[KeyedDropout] = []
    for parent in list(module.modules()):
        if _drops_labels(parent):
            raise WhenceError(f"training: {type(parent).__name__} drops labels at random; set its dropout_prob to 0")
        for name, child in list(parent.named_children()):
            if not isinstance(child, (_DropoutNd, KeyedDropout)) or child.p == 0:
                continue
            if not isinstance(child, (nn.Dropout, KeyedDropout)):
                raise WhenceError(
                    f"training: dropout of kind {type(child).__name__} cannot be replayed; use nn.Dropout"
                )
            layers.append(KeyedDropout(child.p, seed_for(seed, f"dropout {len(layers)}")))
            setattr(parent, name, layers[-1])
    return layers
