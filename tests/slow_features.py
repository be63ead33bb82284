"""Features of a part that takes its time: run as a script to be killed in the middle (see test_store.py)."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from whence.diffusion.draws import uniform
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.diffusion.outputs import loss
from whence.features.parts import Gradient
from whence.features.projections import Rademacher
from whence.features.rows import rows
from whence.storage.arrays import Rows
from whence.types import Engine, Task, describe
from worlds import checkpoint, tensors


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x)


@dataclass(frozen=True)
class Slow(Gradient):
    """Gradients that wait before each shard; the waiting is no part of what they are."""

    def describe(self) -> object:
        return describe(Gradient(self.output, self.draws, self.projection, self.parameters))

    def compute(self, *args, **kwargs) -> Tensor:
        time.sleep(PAUSE)
        return super().compute(*args, **kwargs)


PAUSE = 0.0


def build(root: Path) -> Rows:
    """30 images in shards of 3: the budget holds three gradients of 110 float32."""
    g = torch.Generator().manual_seed(0)
    train = tensors(torch.randn(30, 6, generator=g), "image")
    task = Task(Denoiser(linear_schedule()), (checkpoint(Net, "net"),), train, train, root, Engine(budget=3 * 110 * 4))
    return rows(Slow(loss, uniform(5), Rademacher(16)), task, task.trajectory[0], train, "slow features")


if __name__ == "__main__":
    PAUSE = 0.3
    build(Path(sys.argv[1]))
