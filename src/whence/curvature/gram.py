"""The Gram system H = Phi^T Phi + lambda I, in the smaller of its two forms.

    primal  (k <= n)   psi^T H^-1 phi                      Phi^T Phi is k x k
    dual    (n < k)    Psi H^-1 Phi^T = (Psi Phi^T) K^-1   K = Phi Phi^T + lambda I is n x n

A grid of lambda shares one eigendecomposition, Phi^T Phi = V diag(s) V^T or Phi Phi^T = U diag(s) U^T (`solve.Basis`). One
lambda needs none: H or K = L L^T (Cholesky), a tenth of the work (`Primal`, `Dual`). But lambda in units of the mean
non-zero eigenvalue asks for the rank, which Cholesky tells only where it is full. Elsewhere, where rounding would be divided
by a small lambda besides, one lambda goes by the eigenvectors, too.

Sums and factors are float64: in float32 the inverse of a rank-deficient Gram matrix is noise as soon as lambda is
below about 6e-8 of its largest eigenvalue, which is where released code loses its scores. What is held is a block of columns
or a shard of rows, and matrices of min(n, k) squared. Phi is the features' matrix, so H is the uncentred empirical Fisher (a
sum over images) when they are loss gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from whence.curvature.kept import NOT_KEPT, Kept, kept_of
from whence.curvature.solve import (
    Basis,
    Dampings,
    Problem,
    Solution,
    check_damping,
    decomposed,
    eigenbasis,
    norms,
    products,
)
from whence.storage.arrays import Rows
from whence.storage.files import progress

BLOCK_BYTES = 2**27  # of the columns of all training rows that are held at once, in float64: as a shard takes
PANEL = 512  # rows of a symmetric product that are made together


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
        psi, dual = query.double(), len(train) < train.width
        asked = self.damping if dampings[0] is None else dampings[0]
        one, keep = len(dampings) == 1, NOT_KEPT
        if one:
            keep = kept_of(problem, train, {"system": "Gram", "damping": asked, "absolute": self.absolute})
        found = keep("system", lambda: self._factored(_formed(train, dual), train, asked if one else None))
        if "factor" in found:
            damping = float(found["damping"])
            if dual:
                return [Dual(train, psi, found["factor"], found["gram"], damping, keep)]
            return [Primal(train, psi, found["factor"], damping, keep=keep)]
        make = dual_basis if dual else eigenbasis
        basis = make(found["values"], found["vectors"], train, psi, len(train))
        return basis.at(dampings, self.damping, self.absolute)

    def _factored(self, gram: Tensor, train: Rows, damping: float | None) -> dict[str, Tensor]:
        """What the systems are made of: L and lambda where Cholesky can tell the one asked for, else the eigenvectors."""
        dual = len(train) < train.width
        if damping is not None and _of_full_rank(gram, max(len(train), train.width)):
            shift = damping * (1.0 if self.absolute else float(gram.trace()) / len(gram))
            found = {
                "factor": torch.linalg.cholesky(_shifted(gram, shift)),
                "damping": torch.tensor(shift, dtype=torch.float64),
            }
            return {**found, "gram": gram} if dual else found
        values, vectors = torch.linalg.eigh(gram) if dual else decomposed(gram)
        if dual:
            vectors[gram.diagonal() == 0] = 0  # an image without gradient has exactly no part in any direction
        return {"values": values.clamp(min=0), "vectors": vectors}


class Last:
    """The rows whose matrix was formed last, without factors of their columns, and it itself; see `formed_once`."""

    kept: ClassVar[bool] = False
    rows: ClassVar[Rows | None] = None
    matrix: ClassVar[Tensor | None] = None


@contextmanager
def formed_once() -> Iterator[None]:
    """In here the matrix of the same rows is formed once, however often it is solved: errors of scores ask for it again, and
    with other weights of the columns (see `methods.errors`)."""
    Last.kept = True
    try:
        yield
    finally:
        Last.kept, Last.rows, Last.matrix = False, None, None


def _formed(train: Rows, dual: bool) -> Tensor:
    """Phi Phi^T or Phi^T Phi. With columns weighed by W the latter is W Phi^T Phi W, the former a sum of its own.

    A matrix is let go of before another one is formed, and where it is weighed, which is in place: two may not fit.
    """
    form, weights, plain = _of_rows if dual else _of_columns, train.factors, replace(train, factors=None)
    matrix = Last.matrix if Last.rows == plain else None
    Last.rows = Last.matrix = None
    if not Last.kept or (dual and weights is not None):
        return form(train)
    if matrix is None:
        matrix = form(plain)
    if weights is not None:
        return matrix.mul_(weights[:, None]).mul_(weights)
    Last.rows, Last.matrix = plain, matrix
    return matrix


def _of_full_rank(gram: Tensor, size: int) -> bool:
    """Whether every eigenvalue surely is one that `Basis.mean_eigenvalue` counts as not zero: above largest * size * eps.

    gram minus twice as much is positive definite then; the largest eigenvalue is not above the Frobenius norm.
    """
    least = 2 * float(torch.linalg.matrix_norm(gram)) * size * torch.finfo(gram.dtype).eps
    if not float(gram.diagonal().min()) > least:
        return False
    return not bool(torch.linalg.cholesky_ex(_shifted(gram, -least)).info)


def _shifted(gram: Tensor, by: float) -> Tensor:
    """gram + by I"""
    found = gram.clone()
    found.diagonal().add_(by)
    return found


def _of_columns(rows: Rows) -> Tensor:
    """Phi^T Phi, a shard at a time: [k, k]."""
    gram = torch.zeros(rows.width, rows.width, dtype=torch.float64)
    for _, values in progress(rows, "Gram matrix", total=len(rows.shards)):
        _add_product(gram, values.double().T)
    return _mirrored(gram)


def _of_rows(rows: Rows) -> Tensor:
    """Phi Phi^T, some columns of all shards at a time, so that each number on disk is read once: [n, n]."""
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for block in progress(list(_blocks(rows)), "Gram matrix"):
        x = torch.empty(len(block), block.width, dtype=torch.float64)
        for at, values in block:
            x[at] = values
        _add_product(gram, x)
    return _mirrored(gram)


def _blocks(rows: Rows) -> Iterator[Rows]:
    """All columns, as many at a time as `BLOCK_BYTES` holds of all rows."""
    step = max(1, BLOCK_BYTES // (8 * len(rows)))
    if step >= rows.width:
        yield rows
        return
    for start in range(0, rows.width, step):
        yield rows.only(slice(start, min(start + step, rows.width)))


def _add_product(gram: Tensor, x: Tensor) -> None:
    """gram += x x^T of x [side, ...], on the diagonal and above it: half of the work."""
    for start in range(0, len(x), PANEL):
        stop = start + PANEL
        gram[start:stop, start:].addmm_(x[start:stop], x[start:].T)


def _mirrored(gram: Tensor) -> Tensor:
    """The whole of a symmetric matrix that stands on the diagonal and above it."""
    for start in range(0, len(gram), PANEL):
        stop = start + PANEL
        gram[start:stop, start:stop] = gram[start:stop, start:stop].triu() + gram[start:stop, start:stop].triu(1).T
        gram[stop:, start:stop] = gram[start:stop, stop:].T
    return gram


def dual_basis(eigenvalues: Tensor, vectors: Tensor, rows: Rows, query: Tensor, images: int) -> Basis:
    """The basis of Phi Phi^T; the arguments as of `eigenbasis`."""
    cross = products(query, rows)
    # Psi Phi^T U = (coordinates of psi) sqrt(s); directions without training signal have no coordinate.
    floor = eigenvalues.max() * len(rows) * torch.finfo(torch.float64).eps
    inverse = torch.where(eigenvalues > floor, eigenvalues.rsqrt(), 0.0)
    coordinates = (cross @ vectors) * inverse
    rest = (query.square().sum(1) - coordinates.square().sum(1)).clamp(min=0)
    return Basis(rows, vectors, eigenvalues, coordinates, rest, dual=True, images=images)


@dataclass(frozen=True, eq=False)
class Primal(Solution):
    """Phi^T Phi + lambda I = L L^T, at one lambda.

    Args:
        train: rows of the training images [n, k].
        query: psi [m, k] float64.
        factor: L [k, k].
        damping: lambda.
        x: H^-1 psi of the queries [m, k], where it is known.
        keep: what is made of the training rows alone.
    """

    train: Rows
    query: Tensor
    factor: Tensor
    damping: float
    x: Tensor | None = None
    keep: Kept = NOT_KEPT

    def beside(self, rows: Rows) -> Solution:
        return replace(self, train=rows, x=self._of_queries, keep=NOT_KEPT)

    @cached_property
    def _of_queries(self) -> Tensor:
        return self._solved(self.query) if self.x is None else self.x

    def _solved(self, rows: Tensor) -> Tensor:
        """H^-1 of each row."""
        return torch.cholesky_solve(rows.T, self.factor).T

    @cached_property
    def _of_images(self) -> tuple[Tensor, Tensor]:
        """||L^-1 phi||^2 and ||H^-1 phi||^2: [n] each."""
        found = self.keep("images", self._scales)
        return found["own"], found["square"]

    def _scales(self) -> dict[str, Tensor]:
        own, square = [], []
        for _, values in self.train:
            half = torch.linalg.solve_triangular(self.factor, values.double().T, upper=False)
            own.append(half.square().sum(0))
            square.append(torch.linalg.solve_triangular(self.factor.T, half, upper=True).square().sum(0))
        return {"own": torch.cat(own), "square": torch.cat(square)}

    def kernel(self) -> Tensor:
        return products(self._of_queries, self.train)

    def column(self, row: int) -> Tensor:
        """phi_j^T H^-1 phi_i of one training image i with all j: [n]."""
        return products(self._solved(self.train.take([row]).double()), self.train)[0]

    def train_self(self) -> Tensor:
        return self._of_images[0]

    def freedom(self) -> float:
        """tr(Phi H^-1 Phi^T) = k - lambda tr(H^-1): the sum of `train_self`."""
        return float(self.keep("freedom", lambda: {"trace": self._trace()})["trace"])

    def _trace(self) -> Tensor:
        return len(self.factor) - self.damping * torch.cholesky_inverse(self.factor).trace()

    def train_square(self) -> Tensor:
        return self._of_images[1]

    def query_self(self) -> Tensor:
        return (self._of_queries * self.query).sum(1)

    def train_norm(self) -> Tensor:
        return norms(self.train)


@dataclass(frozen=True, eq=False)
class Dual(Solution):
    """K = Phi Phi^T + lambda I = L L^T, at one lambda.

    Args:
        train: rows of the training images [n, k].
        query: psi [m, k] float64.
        factor: L [n, n].
        gram: Phi Phi^T [n, n].
        damping: lambda.
        keep: what is made of the training rows alone.
    """

    train: Rows
    query: Tensor
    factor: Tensor
    gram: Tensor
    damping: float
    keep: Kept = NOT_KEPT

    @cached_property
    def _cross(self) -> Tensor:
        """Psi Phi^T [m, n]."""
        return products(self.query, self.train)

    @cached_property
    def _inverse(self) -> Tensor:
        """K^-1 [n, n]."""
        return self.keep("inverse", lambda: {"inverse": torch.cholesky_inverse(self.factor)})["inverse"]

    def kernel(self) -> Tensor:
        return torch.cholesky_solve(self._cross.T, self.factor).T

    def column(self, row: int) -> Tensor:
        """phi_j^T H^-1 phi_i of one training image i with all j: (Phi Phi^T K^-1)_ji [n]."""
        return torch.cholesky_solve(self.gram[:, row : row + 1], self.factor)[:, 0]

    def train_self(self) -> Tensor:
        """(Phi Phi^T K^-1)_ii = 1 - lambda (K^-1)_ii, in the form that does not cancel."""
        rest = self.damping * self._inverse.diagonal()
        return torch.where(rest < 0.5, 1 - rest, (self.gram * self._inverse).sum(1))

    def freedom(self) -> float:
        """tr(Phi H^-1 Phi^T) = n - lambda tr(K^-1): the sum of `train_self`."""
        return len(self.factor) - self.damping * float(self._inverse.trace())

    def train_square(self) -> Tensor:
        """(K^-1 Phi Phi^T K^-1)_ii"""
        return ((self._inverse @ self.gram) * self._inverse).sum(1)

    def query_self(self) -> Tensor:
        """(||psi||^2 - psi Phi^T K^-1 Phi psi^T) / lambda"""
        inside = (self.kernel() * self._cross).sum(1)
        return (self.query.square().sum(1) - inside).clamp(min=0) / self.damping

    def train_norm(self) -> Tensor:
        return self.gram.diagonal().sqrt()
