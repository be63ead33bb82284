"""K-FAC and EK-FAC: the Gauss-Newton matrix of a network, layer by layer as a Kronecker product, never built.

    F = (1/n) sum_i mean_s J_is^T (d^2 f / d prediction^2) J_is       J_is = d prediction / d theta; (2/D) J^T J for the loss
    F ~ B (x) A per layer;    A = Q_A diag(d_A) Q_A^T,   B = Q_B diag(d_B) Q_B^T      (eigenvectors are columns)
    K-FAC    Lambda = d_B d_A^T                                                       (Martens & Grosse 2015)
    EK-FAC   Lambda = mean over draws of (Q_B^T G Q_A)^2, element by element          (George et al. 2018)

    score[q, i] = psi_q^T H^-1 phi_i       H = n (F + lambda I);  (F + lambda)^-1 G = Q_B [Q_B^T G Q_A / (Lambda + lambda)] Q_A^T

G is the gradient of one draw as a matrix (see `layers`), A and B are means over draws (see `factors`). Targets never enter.
Squares are taken per draw, while the gradients psi and phi are averaged over draws first. H is a sum over images, so that
loss gradients on both sides give the predicted rise of the query's loss when image i is removed (scale "removal").
Influence: Grosse et al. 2023 (arXiv 2308.03296); diffusion: Mlodozeniec et al. 2025 (arXiv 2410.13850).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.draws import Draws
from whence.engine import progress
from whence.precondition.factors import DEFAULT, Factors, basis, begin, eigenvalues
from whence.precondition.layers import Block
from whence.precondition.solve import Dampings, Site, Solution, check_damping
from whence.store import Rows
from whence.types import WhenceError


@dataclass(frozen=True)
class KFAC:
    """damping: lambda in units of the mean of each block's Lambda, or as it is where `absolute`: in units of the mean over
    images, as published values (1e-8) and 1/(sum of learning rates) are."""

    damping: float
    absolute: bool = False
    factors: Factors = DEFAULT

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, site: Site, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        return solve(self.curvature(site), train, query, self.damping, dampings, self.absolute, site.task.engine.device)

    def curvature(self, site: Site) -> list[Eigen]:
        fit = begin(site, self.factors)
        Q = basis(fit)
        return [
            Eigen(b, Q[f"QA {b.name}"], Q[f"QB {b.name}"], torch.outer(Q[f"dB {b.name}"], Q[f"dA {b.name}"]))
            for b in fit.blocks
        ]


@dataclass(frozen=True)
class EKFAC:
    """K-FAC with eigenvalues measured in its eigenbasis. draws: of that measurement, None for those of the factors; the
    rest as in `KFAC`."""

    damping: float
    absolute: bool = False
    factors: Factors = DEFAULT
    draws: Draws | None = None

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, site: Site, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        return solve(self.curvature(site), train, query, self.damping, dampings, self.absolute, site.task.engine.device)

    def curvature(self, site: Site) -> list[Eigen]:
        fit = begin(site, self.factors)
        Q = basis(fit)
        values = eigenvalues(fit, Q, self.draws or fit.draws)
        return [Eigen(b, Q[f"QA {b.name}"], Q[f"QB {b.name}"], values[b.name]) for b in fit.blocks]


@dataclass(frozen=True)
class Eigen:
    """A block in its eigenbasis: F = (Q_B (x) Q_A) diag(Lambda) (Q_B (x) Q_A)^T. values: Lambda [d_o, d_i]. All float64."""

    block: Block
    QA: Tensor
    QB: Tensor
    values: Tensor

    def rotate(self, rows: Tensor) -> Tensor:
        """Q_B^T G Q_A of gradient rows: [b, d] -> [b, d_o d_i]."""
        return (self.QB.mT @ self.block.gradient(rows).to(self.QA) @ self.QA).flatten(1)

    def inverse(self, damping: float, absolute: bool) -> Tensor:
        """1 / (Lambda + lambda): [d_o d_i]. Zero for a layer without curvature at a relative damping, whose lambda is 0."""
        damped = self.values + damping * (1.0 if absolute else float(self.values.mean()))
        return torch.where(damped > 0, 1 / damped, 0.0).flatten()


@dataclass(frozen=True)
class Solved:
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
    curvature: Sequence[Eigen],
    train: Rows,
    query: Tensor,
    own: float,
    dampings: Dampings,
    absolute: bool,
    device: str = "cpu",
) -> list[Solution]:
    """All dampings in one pass over the rows: psi and phi are rotated once, and only Lambda + lambda differs."""
    if not any(bool(eigen.values.any()) for eigen in curvature):
        raise WhenceError("all training features (or their curvature) are zero; nothing can be attributed with them")
    n, m = len(train), len(query)
    curvature = [Eigen(e.block, e.QA.to(device), e.QB.to(device), e.values.to(device)) for e in curvature]
    inverses = [[e.inverse(own if d is None else d, absolute) / n for e in curvature] for d in dampings]
    psi = [eigen.rotate(query.to(device)) for eigen in curvature]
    sizes = {"kernel": (m, n), "train_self": (n,), "train_square": (n,), "query_self": (m,), "train_norm": (n,)}
    found = [{name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()} for _ in dampings]
    for pieces, inverse in zip(found, inverses, strict=True):
        for coordinates, h in zip(psi, inverse, strict=True):
            pieces["query_self"] += (coordinates.square() @ h).cpu()
    for rows, values in progress(train, "K-FAC scores", total=len(train.shards)):
        for at, eigen in enumerate(curvature):
            phi = eigen.rotate(values.to(device))
            _refuse_dead(eigen, phi, absolute)
            square = phi.square()
            for pieces, inverse in zip(found, inverses, strict=True):
                pieces["kernel"][:, rows] += ((psi[at] * inverse[at]) @ phi.mT).cpu()
                pieces["train_self"][rows] += (square @ inverse[at]).cpu()
                pieces["train_square"][rows] += (square @ inverse[at].square()).cpu()
                pieces["train_norm"][rows] += square.sum(1).cpu()
    return [Solved(pieces) for pieces in found]


def _refuse_dead(eigen: Eigen, phi: Tensor, absolute: bool) -> None:
    """A layer without curvature has no relative lambda. Where no training gradient lies in it, it changes no score."""
    if not absolute and not eigen.values.any() and phi.any():
        raise WhenceError(
            f"{eigen.block.name} has training gradients but no curvature, so that its relative damping is 0; accepted: "
            "absolute=True, more draws, or `parameters` without it"
        )
