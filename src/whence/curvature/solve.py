"""What every preconditioner hands to the rest: the pieces of psi^T H^-1 phi that scores and row scales are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from whence.storage.arrays import Rows
from whence.types import Checkpoint, Task, WhenceError


class Solution(Protocol):
    """One system H at one damping, between m query rows psi and n training rows phi. All float64."""

    def kernel(self) -> Tensor:
        """psi^T H^-1 phi: [m, n]."""
        ...

    def train_self(self) -> Tensor:
        """phi^T H^-1 phi: [n], the self-influence (leverage under a Gram system)."""
        ...

    def train_square(self) -> Tensor:
        """||H^-1 phi||^2: [n]."""
        ...

    def query_self(self) -> Tensor:
        """psi^T H^-1 psi: [m]."""
        ...

    def train_norm(self) -> Tensor:
        """||phi||: [n]."""
        ...

    def beside(self, rows: Rows) -> Solution | None:
        """The same system beside other training rows; None where its pieces were made of its own."""
        return None

    def diagonal(self) -> Solution:
        """Every training image as its own query, apart from the others: n systems of one query and one image."""
        return Diagonal(self)


@dataclass(frozen=True)
class Diagonal(Solution):
    """The systems of each training image with itself as the only query, n of them.

    Every piece has an axis [n] before the axes of `Solution`, which are 1. No kernel of n x n is made.
    """

    of: Solution

    @cached_property
    def _own(self) -> Tensor:
        return self.of.train_self()[:, None]

    def kernel(self) -> Tensor:
        return self._own[:, None]

    def train_self(self) -> Tensor:
        return self._own

    def train_square(self) -> Tensor:
        return self.of.train_square()[:, None]

    def query_self(self) -> Tensor:
        return self._own

    def train_norm(self) -> Tensor:
        return self.of.train_norm()[:, None]


Dampings = Sequence[float | None]
FEW = 512  # rows of a shard that are held in float64 at a time


@dataclass(frozen=True)
class Problem:
    """Where a system is set up.

    Args:
        task: the question.
        checkpoint: the weights at which it is asked.
        part: the features whose rows are given.
    """

    task: Task
    checkpoint: Checkpoint
    part: object


class Preconditioner(Protocol):
    """A choice of H. One that is not made of the rows that it is given says so, `image_by_image = True`: they may then be
    those of some training images only."""

    @property
    def damping(self) -> float | None: ...

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        """Prepare H once, and give a solution for each damping.

        Args:
            problem: where the system is set up.
            train: rows of the training images that are scored [n, k].
            query: rows of the queries [m, k].
            dampings: those asked for; None for its own.
        """
        ...


def check_damping(damping: float) -> None:
    if not 0 < damping < float("inf"):
        raise WhenceError(f"damping {damping}: it must be above 0 and finite, because the system may be singular")


def norms(train: Rows) -> Tensor:
    """||phi_i||: [n], streamed."""
    return torch.cat([torch.linalg.vector_norm(values.double(), dim=1) for _, values in train])


def products(x: Tensor, train: Rows) -> Tensor:
    """x phi_i of each row of x [m, k] float64 and each training image, streamed: [m, n]."""
    found = torch.empty(len(x), len(train), dtype=torch.float64)
    for rows, values in train:
        for part, few in zip(found[:, rows].split(FEW, dim=1), values.split(FEW), strict=True):
            part.copy_(x @ few.double().T)
    return found


@dataclass(frozen=True)
class Plain(Solution):
    """H = I."""

    train: Rows
    query: Tensor

    def beside(self, rows: Rows) -> Solution:
        return Plain(rows, self.query)

    def kernel(self) -> Tensor:
        return products(self.query, self.train)

    def train_self(self) -> Tensor:
        return self.train_norm().square()

    def train_square(self) -> Tensor:
        return self.train_self()

    def query_self(self) -> Tensor:
        return self.query.square().sum(1)

    def train_norm(self) -> Tensor:
        return norms(self.train)


@dataclass(frozen=True)
class NoPreconditioner:
    """No curvature: inner products of the rows as they are."""

    damping: None = None
    image_by_image = True  # no setting: it has no annotation

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        return [Plain(train, query.double()) for _ in dampings]


@dataclass(frozen=True)
class Basis:
    """Everything that does not depend on lambda: eigenvalues [e], both sides in eigen-coordinates.

    Args:
        rows: of the training images [n, k].
        vectors: eigenvectors as columns, [k, e] (primal) or [n, e] (dual).
        values: eigenvalues [e].
        query: coordinates of the queries [m, e].
        rest: the squared part of psi outside the eigenvectors [m].
        dual: whether the eigenvectors are those of Phi Phi^T.
        images: that the matrix is a sum over, of which the rows may be some.
    """

    rows: Rows
    vectors: Tensor
    values: Tensor
    query: Tensor
    rest: Tensor
    dual: bool
    images: int

    def mean_eigenvalue(self) -> float:
        """tr(Phi^T Phi) / rank."""
        largest = float(self.values.max())
        if not largest > 0:
            raise WhenceError(
                "all training features (or their curvature) are zero; nothing can be attributed with them"
            )
        size = max(self.images, self.rows.width)
        nonzero = self.values > largest * size * torch.finfo(torch.float64).eps
        return float(self.values[nonzero].mean())

    def at(self, dampings: Dampings, own: float, absolute: bool) -> list[Solution]:
        """The system at each damping.

        Args:
            dampings: None stands for `own`.
            own: the damping of the preconditioner.
            absolute: whether dampings are lambda itself, not in units of the mean eigenvalue.
        """
        unit = 1.0 if absolute else self.mean_eigenvalue()
        asked = [unit * (own if value is None else value) for value in dampings]
        scales = Scales(self, tuple(asked))
        return [Damped(self, damping, scales) for damping in asked]

    def train(self) -> Iterator[Tensor]:
        """Coordinates of the training rows along the eigenvectors, in pieces [rows, e] (primal: phi V; dual: U sqrt(s))."""
        if self.dual:
            yield self.vectors * self.values.sqrt()
        else:
            yield from (values.double() @ self.vectors for _, values in self.rows)


@dataclass(frozen=True, eq=False)
class Scales:
    """sum_j (phi_i V)_j^2 / (s_j + lambda)^p of all training images: to turn their rows is most work, and is done once.

    Args:
        basis: phi V and s.
        dampings: every lambda that is asked for.
    """

    basis: Basis
    dampings: tuple[float, ...]

    @cached_property
    def sums(self) -> dict[tuple[float, int], Tensor]:
        """(lambda, p) -> [n], p = 1 and 2."""
        factors = {(each, p): (self.basis.values + each) ** -p for each in self.dampings for p in (1, 2)}
        pieces: dict[tuple[float, int], list[Tensor]] = {key: [] for key in factors}
        for coordinates in self.basis.train():
            squares = coordinates.square()
            for key, factor in factors.items():
                pieces[key].append(squares @ factor)
        return {key: torch.cat(found) for key, found in pieces.items()}


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric positive semi-definite matrix [k, k], float64."""
    values, vectors = torch.linalg.eigh(matrix)
    lowest, highest = float(values[0]), float(values[-1])
    if lowest < -1e-6 * max(highest, -lowest):  # far beyond rounding, float32 curvature included
        raise WhenceError(
            f"the curvature has negative eigenvalues (down to {lowest:.3g}); accepted: losses, not margins"
        )
    return values, vectors


def eigenbasis(values: Tensor, vectors: Tensor, rows: Rows, query: Tensor, images: int) -> Basis:
    """The basis of a symmetric positive semi-definite k x k matrix: H = V diag(s) V^T + lambda I.

    Args:
        values: eigenvalues s [k].
        vectors: V [k, k].
        rows: of the training images [n, k].
        query: rows of the queries [m, k] float64.
        images: that the matrix is a sum over.
    """
    nothing = torch.zeros(len(query), dtype=torch.float64)
    return Basis(rows, vectors, values.clamp(min=0), query @ vectors, nothing, dual=False, images=images)


@dataclass(frozen=True)
class Damped(Solution):
    """The system at one lambda.

    Args:
        basis: what does not depend on lambda.
        damping: lambda.
        scales: what is made of the training rows for all lambdas together.
        x: H^-1 psi of the queries [m, k], where it is known.
    """

    basis: Basis
    damping: float
    scales: Scales
    x: Tensor | None = None

    def beside(self, rows: Rows) -> Solution | None:
        if self.basis.dual:
            return None
        basis = replace(self.basis, rows=rows)
        return Damped(basis, self.damping, Scales(basis, (self.damping,)), self._of_queries)

    @cached_property
    def _of_queries(self) -> Tensor:
        if self.x is not None:
            return self.x
        basis = self.basis
        return (basis.query / (basis.values + self.damping)) @ basis.vectors.T

    def kernel(self) -> Tensor:
        """The queries are solved, not the training images turned: these are more, and are the same at every lambda.

        (psi V diag(1/(s+lambda)) V^T) phi^T (primal); (Psi Phi^T U diag(1/(s+lambda))) U^T (dual)
        """
        basis, s = self.basis, self.basis.values
        if basis.dual:
            return (basis.query * s.sqrt() / (s + self.damping)) @ basis.vectors.T
        return products(self._of_queries, basis.rows)

    def column(self, row: int) -> Tensor:
        """phi_j^T H^-1 phi_i of one training image i with all j: [n], without the n x n matrix."""
        basis = self.basis
        if basis.dual:
            return basis.vectors @ (basis.vectors[row] * basis.values / (basis.values + self.damping))
        own = basis.rows.take([row])[0].double() @ basis.vectors
        solved = basis.vectors @ (own / (basis.values + self.damping))
        return torch.cat([values.double() @ solved for _, values in basis.rows])

    def train_self(self) -> Tensor:
        return self.scales.sums[self.damping, 1]

    def freedom(self) -> float:
        """tr(Phi H^-1 Phi^T): the sum of `train_self` where H is made of Phi."""
        s = self.basis.values
        return float((s / (s + self.damping)).sum())

    def train_square(self) -> Tensor:
        return self.scales.sums[self.damping, 2]

    def query_self(self) -> Tensor:
        inside = self.basis.query.square() / (self.basis.values + self.damping)
        return inside.sum(1) + self.basis.rest / self.damping

    def train_norm(self) -> Tensor:
        return norms(self.basis.rows)
