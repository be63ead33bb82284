"""A Kronecker-factored matrix in its eigenbasis, and psi^T H^-1 phi in those coordinates for a whole grid of dampings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.layers import Block
from whence.curvature.solve import Problem, Solution
from whence.storage.arrays import Rows
from whence.storage.files import progress
from whence.types import WhenceError


@dataclass(frozen=True)
class Eigen:
    """A block in its eigenbasis: F = (Q_B (x) Q_A) diag(Lambda) (Q_B (x) Q_A)^T. All float64.

    Args:
        block: the parameters.
        QA: eigenvectors of A, as columns [d_i, d_i].
        QB: eigenvectors of B, as columns [d_o, d_o].
        values: Lambda [d_o, d_i].
    """

    block: Block
    QA: Tensor
    QB: Tensor
    values: Tensor

    def rotate(self, rows: Tensor) -> Tensor:
        """Q_B^T G Q_A of gradient rows: [b, d] -> [b, d_o d_i]."""
        return (self.QB.mT @ self.block.gradient(rows).to(self.QA) @ self.QA).flatten(1)

    def back(self, coordinates: Tensor) -> Tensor:
        """Q_B C Q_A^T, the inverse of `rotate`: [b, d_o d_i] -> G [b, d_o, d_i]."""
        return self.QB @ coordinates.unflatten(1, self.block.shape) @ self.QA.mT

    def unit(self, absolute: bool) -> float:
        """What lambda is measured in."""
        return 1.0 if absolute else float(self.values.mean())

    def inverse(self, damping: float, absolute: bool) -> Tensor:
        """1 / (Lambda + lambda): [d_o d_i]. Zero for a layer without curvature at a relative damping, whose lambda is 0."""
        damped = self.values + damping * self.unit(absolute)
        return torch.where(damped > 0, 1 / damped, 0.0).flatten()

    def to(self, device: str) -> Eigen:
        return Eigen(self.block, self.QA.to(device), self.QB.to(device), self.values.to(device))


@dataclass(frozen=True)
class TabulatedSolution(Solution):
    """A Solution whose pieces were all made in one pass over the training rows."""

    pieces: Mapping[str, Tensor]

    def kernel(self) -> Tensor:
        return self.pieces["kernel"]

    def train_self(self) -> Tensor:
        return self.pieces["train_self"]

    def train_square(self) -> Tensor:
        return self.pieces["train_square"]

    def query_self(self) -> Tensor:
        return self.pieces["query_self"]

    def train_norm(self) -> Tensor:
        return self.pieces["train_norm"].sqrt()


def solve(
    problem: Problem,
    curvature: Sequence[Eigen],
    train: Rows,
    query: Tensor,
    dampings: Sequence[float],
    absolute: bool,
) -> list[Solution]:
    """All dampings in one pass over the rows: psi and phi are rotated once, and only Lambda + lambda differs.

    Args:
        problem: where the system is set up; the curvature is the mean over all of its training images.
        curvature: the blocks.
        train: rows of the training images that are scored [n, d].
        query: rows of the queries [m, d].
        dampings: lambda, in units of the mean of each block's Lambda unless `absolute`.
        absolute: whether dampings are in units of the mean over images.
    """
    refuse_zero(curvature)
    n, m, device = len(train), len(query), problem.task.engine.device
    curvature = [eigen.to(device) for eigen in curvature]
    inverses = [[eigen.inverse(d, absolute) / len(problem.task.train) for eigen in curvature] for d in dampings]
    psi = [eigen.rotate(query.to(device)) for eigen in curvature]
    sizes = {"kernel": (m, n), "train_self": (n,), "train_square": (n,), "query_self": (m,), "train_norm": (n,)}
    found = [{name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()} for _ in dampings]
    for pieces, inverse in zip(found, inverses, strict=True):
        for coordinates, h in zip(psi, inverse, strict=True):
            pieces["query_self"] += (coordinates.square() @ h).cpu()
    for rows, values in progress(train, "K-FAC scores", total=len(train.shards)):
        for at, eigen in enumerate(curvature):
            phi = eigen.rotate(values.to(device))
            refuse_dead(eigen, phi, absolute)
            square = phi.square()
            for pieces, inverse in zip(found, inverses, strict=True):
                pieces["kernel"][:, rows] += ((psi[at] * inverse[at]) @ phi.mT).cpu()
                pieces["train_self"][rows] += (square @ inverse[at]).cpu()
                pieces["train_square"][rows] += (square @ inverse[at].square()).cpu()
                pieces["train_norm"][rows] += square.sum(1).cpu()
    return [TabulatedSolution(pieces) for pieces in found]


def refuse_zero(curvature: Sequence[Eigen]) -> None:
    if not any(bool(eigen.values.any()) for eigen in curvature):
        raise WhenceError("all training features (or their curvature) are zero; nothing can be attributed with them")


def refuse_dead(eigen: Eigen, phi: Tensor, absolute: bool) -> None:
    """A layer without curvature has no relative lambda. Where no training gradient lies in it, it changes no score.

    Args:
        eigen: the layer.
        phi: gradients in it [b, ...].
        absolute: whether the damping is absolute, which any layer has.
    """
    if not absolute and not eigen.values.any() and phi.any():
        raise WhenceError(
            f"{eigen.block.name} has training gradients but no curvature, so that its relative damping is 0; accepted: "
            "absolute=True, more draws, or `parameters` without it"
        )
