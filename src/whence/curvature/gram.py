"""The Gram system H = Phi^T Phi + lambda I, in the smaller of its two forms, for a whole grid of lambda at once.

    primal  (k <= n)   Phi^T Phi = V diag(s) V^T           psi^T H^-1 phi = (psi V) diag(1/(s+lambda)) (phi V)^T
    dual    (n < k)    Phi Phi^T = U diag(s) U^T           Psi H^-1 Phi^T = (Psi Phi^T U) diag(1/(s+lambda)) U^T

Sums and eigenvectors are float64: in float32 the inverse of a rank-deficient Gram matrix is noise as soon as lambda is
below about 6e-8 of its largest eigenvalue, which is where released code loses its scores. Only one shard of rows and one
matrix of min(n, k) squared are held. Phi is the features' matrix, so H is the uncentred empirical Fisher (a sum over
images) when they are loss gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.solve import Basis, Dampings, Problem, Solution, check_damping, eigenbasis
from whence.storage.arrays import Rows
from whence.storage.files import progress


@dataclass(frozen=True)
class Gram:
    """The Gram system of the features, in the smaller of its two forms.

    Args:
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi (tr / rank).
        absolute: whether the damping is lambda itself.
    """

    damping: float
    absolute: bool = False

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        basis = (_dual if len(train) < train.width else _primal)(train, query.double())
        return basis.at(dampings, self.damping, self.absolute)


def _primal(rows: Rows, query: Tensor) -> Basis:
    gram = torch.zeros(rows.width, rows.width, dtype=torch.float64)
    for _, values in progress(rows, "Gram matrix", total=len(rows.shards)):
        values = values.double()
        gram += values.T @ values
    return eigenbasis(gram, rows, query, len(rows))


def _dual(rows: Rows, query: Tensor) -> Basis:
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    cross = torch.zeros(len(query), len(rows), dtype=torch.float64)
    shards = rows.shards
    for number, a in enumerate(progress(shards, "Gram matrix")):
        left = rows.read(a).double()
        cross[:, a] = query @ left.T
        for b in shards[number:]:
            block = left @ rows.read(b).double().T
            gram[a, b], gram[b, a] = block, block.T
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues = eigenvalues.clamp(min=0)
    vectors[gram.diagonal() == 0] = 0  # an image without gradient has exactly no part in any direction
    # Psi Phi^T U = (coordinates of psi) sqrt(s); directions without training signal have no coordinate.
    floor = eigenvalues.max() * len(rows) * torch.finfo(torch.float64).eps
    inverse = torch.where(eigenvalues > floor, eigenvalues.rsqrt(), 0.0)
    coordinates = (cross @ vectors) * inverse
    rest = (query.square().sum(1) - coordinates.square().sum(1)).clamp(min=0)
    return Basis(rows, vectors, eigenvalues, coordinates, rest, dual=True, images=len(rows))
