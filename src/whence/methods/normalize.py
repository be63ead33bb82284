"""What becomes of the kernel psi_q^T H^-1 phi_i: factors a_q of a query and b_i of a training image, or a distance.

Each is a function of the solved system that gives the scores [m, n], or [n, 1, 1] of its diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whence.curvature.solve import Solution
from whence.types import WhenceError

Normalize = Callable[[Solution], Tensor]


def _inverse(values: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: an image without gradient has no influence, and cosine 0."""
    return torch.where(values > 0, 1 / values, 0.0)


def _each_query(values: Tensor) -> Tensor:
    """[m] beside a kernel [m, n]; axes before these stay."""
    return values[..., :, None]


def _each_image(values: Tensor) -> Tensor:
    """[n] beside a kernel [m, n]."""
    return values[..., None, :]


def none(system: Solution) -> Tensor:
    """The kernel as it is."""
    return system.kernel()


def cosine(system: Solution) -> Tensor:
    """Cosine in the metric of H^-1: a = (psi^T H^-1 psi)^-1/2, b = (phi^T H^-1 phi)^-1/2."""
    a, b = _inverse(system.query_self().sqrt()), _inverse(system.train_self().sqrt())
    return system.kernel() * _each_query(a) * _each_image(b)


def distance(system: Solution) -> Tensor:
    """-||H^-1/2 (psi - phi)||, minus the distance in the metric of H^-1 (Hanawa et al. 2021: l2)."""
    square = _each_query(system.query_self()) + _each_image(system.train_self()) - 2 * system.kernel()
    return -square.clamp(min=0).sqrt()


def renormalized(system: Solution) -> Tensor:
    """b = 1/||phi_i||: undoes the penalty on training images with a small loss (Hammoudeh & Lowd 2022)."""
    return system.kernel() * _each_image(_inverse(system.train_norm()))


def relatif_theta(system: Solution) -> Tensor:
    """b = 1/||H^-1 phi_i||: influence per change of the parameters (Barshan et al. 2020)."""
    return system.kernel() * _each_image(_inverse(system.train_square().sqrt()))


def relatif_loss(system: Solution) -> Tensor:
    """b = (phi_i^T H^-1 phi_i)^-1/2: influence per change of the model's own loss (Barshan et al. 2020)."""
    return system.kernel() * _each_image(_inverse(system.train_self().sqrt()))


def leverage(system: Solution) -> Tensor:
    """b = 1/(1 - h_i), h_i = phi_i^T H^-1 phi_i: turns the first-order step into exact removal for least squares."""
    return system.kernel() / _each_image(1 - below_one(system.train_self()))


LINEAR = (none, renormalized, relatif_theta, relatif_loss, leverage)
"""Those with a_q = 1: scores are linear in the query's row."""


def below_one(h: Tensor) -> Tensor:
    """Leverages [n] as they are; an error where one is not below 1."""
    if float(h.max()) >= 1:
        raise WhenceError(f"leverage {float(h.max()):.6g} of a training image is not below 1; use a larger damping")
    return h
