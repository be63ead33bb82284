"""K-FAC and EK-FAC: the Gauss-Newton matrix of a network, layer by layer as a Kronecker product, never built.

    F = (1/n) sum_i mean_s J_is^T (d^2 f / d prediction^2) J_is       J_is = d prediction / d theta; (2/D) J^T J for the loss
    F ~ B (x) A per layer;    A = Q_A diag(d_A) Q_A^T,   B = Q_B diag(d_B) Q_B^T      (eigenvectors are columns)
    K-FAC    Lambda = d_B d_A^T                                                       (Martens & Grosse 2015)
    EK-FAC   Lambda = mean over draws of (Q_B^T G Q_A)^2, element by element          (George et al. 2018)

    score[q, i] = psi_q^T H^-1 phi_i,  H = n (F + lambda I);  (F + lambda)^-1 G = Q_B [Q_B^T G Q_A / (Lambda + lambda)] Q_A^T

G is the gradient of one draw as a matrix (see `layers`), A and B are means over draws (see `factors`). Targets never enter.
Squares are taken per draw, while the gradients psi and phi are averaged over draws first. H is a sum over images, so that
loss gradients on both sides give the predicted rise of the query's loss when image i is removed (scale "removal").
Influence: Grosse et al. 2023 (arXiv 2308.03296); diffusion: Mlodozeniec et al. 2025 (arXiv 2410.13850).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.eigen import Eigen, solve
from whence.curvature.factors import DEFAULT, Factors, basis, eigenvalues, fit_factors
from whence.curvature.pcg import refined
from whence.curvature.solve import Dampings, Problem, Solution, check_damping
from whence.diffusion.draws import Draws
from whence.storage.arrays import Rows
from whence.types import WhenceError


@dataclass(frozen=True)
class KFAC:
    """A Kronecker product per layer, whose eigenvalues are those of its factors.

    Args:
        damping: lambda in units of the mean of each block's Lambda.
        absolute: whether the damping is lambda itself, in units of the mean over images, as published values (1e-8) and
            1/(sum of learning rates) are.
        factors: how A and B are estimated.
    """

    damping: float
    absolute: bool = False
    factors: Factors = DEFAULT
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        numbers = [self.damping if d is None else d for d in dampings]
        return solve(problem, self.curvature(problem), train, query, numbers, self.absolute)

    def curvature(self, problem: Problem) -> list[Eigen]:
        fit = fit_factors(problem, self.factors)
        Q = basis(fit)
        return [
            Eigen(b, Q[f"QA {b.name}"], Q[f"QB {b.name}"], torch.outer(Q[f"dB {b.name}"], Q[f"dA {b.name}"]))
            for b in fit.blocks
        ]


@dataclass(frozen=True)
class EKFAC:
    """K-FAC with eigenvalues measured in its eigenbasis.

    Args:
        damping: as in `KFAC`.
        absolute: as in `KFAC`.
        factors: how A and B are estimated.
        draws: of the measured eigenvalues; None for those of the factors.
        refine: steps of conjugate gradients from here towards the system of F itself (see `pcg`); 0 for none.
    """

    damping: float
    absolute: bool = False
    factors: Factors = DEFAULT
    draws: Draws | None = None
    refine: int = 0
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.refine < 0:
            raise WhenceError(f"refine={self.refine}; accepted: a number of steps, or 0 for none")

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        curvature, numbers = self.curvature(problem), [self.damping if d is None else d for d in dampings]
        if not self.refine:
            return solve(problem, curvature, train, query, numbers, self.absolute)
        fit = fit_factors(problem, self.factors)
        return [refined(fit, curvature, train, query, d, self.absolute, self.refine) for d in numbers]

    def curvature(self, problem: Problem) -> list[Eigen]:
        fit = fit_factors(problem, self.factors)
        Q = basis(fit)
        values = eigenvalues(fit, Q, self.draws or fit.draws)
        return [Eigen(b, Q[f"QA {b.name}"], Q[f"QB {b.name}"], values[b.name]) for b in fit.blocks]
