"""DataInf: the empirical Fisher of each layer with mean and inverse exchanged (Kwon et al. 2024, arXiv 2310.00902).

    (G + lambda)^-1 v = ( (1/n) sum_i g_i g_i^T + lambda )^-1 v  ~  (1/n) sum_i ( g_i g_i^T + lambda )^-1 v
                      = (1/(n lambda)) sum_i ( v - g_i (g_i^T v) / (lambda + ||g_i||^2) )     lambda = c mean_i ||g_i||^2 / d

per layer, d its parameters and c the damping. Exact for one image, and close where the g_i are nearly orthogonal or
lambda is large. Two passes over the rows, one more for the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.solve import Dampings, Problem, Solution, check_damping, norms
from whence.features.parts import Gradient
from whence.features.projections import Identity
from whence.features.rows import prepare
from whence.storage.arrays import Rows
from whence.types import WhenceError


@dataclass(frozen=True)
class DataInf:
    """The empirical Fisher of each layer with mean and inverse exchanged.

    A layer is what owns parameters side by side (the weight and the bias of a Linear).

    Args:
        damping: c above: lambda in units of the mean squared entry of each layer's gradients.
    """

    damping: float

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        part = problem.part
        if not isinstance(part, Gradient) or part.projection != Identity() or len(part.outputs) > 1:
            raise WhenceError("DataInf needs unprojected gradients of one output (dim=None)")
        layers = _layers(part.sizes(prepare(problem.checkpoint, problem.task.engine)))
        mean = [torch.zeros((), dtype=torch.float64) for _ in layers]
        for _, values in train:
            for at, columns in enumerate(layers):
                mean[at] += values[:, columns].double().square().sum() / len(train)
        if not any(mean):
            raise WhenceError("all training features are zero; nothing can be attributed with them")
        units = [float(square) / (columns.stop - columns.start) for square, columns in zip(mean, layers, strict=True)]
        numbers = [self.damping if d is None else d for d in dampings]
        return [DataInfSolution(train, query.double(), layers, [d * unit for unit in units]) for d in numbers]


def _layers(sizes: dict[str, int]) -> list[slice]:
    """The columns of each layer; its parameters stand side by side in a gradient row."""
    found: list[slice] = []
    owner, start = None, 0
    for name, size in sizes.items():
        path = name.rpartition(".")[0]
        if found and path == owner:
            found[-1] = slice(found[-1].start, start + size)
        else:
            found.append(slice(start, start + size))
        owner, start = path, start + size
    return found


@dataclass(frozen=True)
class DataInfSolution(Solution):
    """H^-1 of each layer as above over n, at the lambda of each. Row scales take a pass over the rows for each shard.

    Args:
        train: rows of the training images [n, d].
        query: rows of the queries [m, d], float64.
        layers: the columns of each layer.
        dampings: lambda of each layer; 0 where it has no training gradients.
    """

    train: Rows
    query: Tensor
    layers: Sequence[slice]
    dampings: Sequence[float]

    def apply(self, v: Tensor) -> Tensor:
        """H^-1 of each row: [b, d]. A layer without training gradients has no lambda and changes no score: 0."""
        n, total = len(self.train), torch.zeros_like(v)
        for _, values in self.train:
            for columns, damping in zip(self.layers, self.dampings, strict=True):
                if not damping:
                    continue
                g = values[:, columns].double()
                inner = v[:, columns] @ g.T / (damping + g.square().sum(1))
                total[:, columns] += (len(g) * v[:, columns] - inner @ g) / (n * damping)
        return total / n

    def kernel(self) -> Tensor:
        x = self.apply(self.query)
        return torch.cat([x @ values.double().T for _, values in self.train], dim=1)

    def train_self(self) -> Tensor:
        return torch.cat([(self.apply(v.double()) * v.double()).sum(1) for _, v in self.train])

    def train_square(self) -> Tensor:
        return torch.cat([self.apply(v.double()).square().sum(1) for _, v in self.train])

    def query_self(self) -> Tensor:
        return (self.apply(self.query) * self.query).sum(1)

    def train_norm(self) -> Tensor:
        return norms(self.train)
