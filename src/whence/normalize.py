"""Row scales: factors a_q of a query and b_i of a training image around the kernel psi_q^T H^-1 phi_i.

Each is a function of the solved system that gives (a [m] or None, b [n] or None); None stands for 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from whence.precondition.solve import Solution
from whence.types import WhenceError

Scale = tuple[Tensor | None, Tensor | None]
Normalize = Callable[[Solution], Scale]


def _inverse(values: Tensor) -> Tensor:
    """1/x, and 0 where x is 0: an image without gradient has no influence, and cosine 0."""
    return torch.where(values > 0, 1 / values, 0.0)


def none(system: Solution) -> Scale:
    """No scaling."""
    return None, None


def cosine(system: Solution) -> Scale:
    """Cosine in the metric of H^-1: a = (psi^T H^-1 psi)^-1/2, b = (phi^T H^-1 phi)^-1/2."""
    return _inverse(system.query_self().sqrt()), _inverse(system.train_self().sqrt())


def renormalized(system: Solution) -> Scale:
    """b = 1/||phi_i||: undoes the penalty on training images with a small loss (Hammoudeh & Lowd 2022)."""
    return None, _inverse(system.train_norm())


def relatif_theta(system: Solution) -> Scale:
    """b = 1/||H^-1 phi_i||: influence per change of the parameters (Barshan et al. 2020)."""
    return None, _inverse(system.train_square().sqrt())


def relatif_loss(system: Solution) -> Scale:
    """b = (phi_i^T H^-1 phi_i)^-1/2: influence per change of the model's own loss (Barshan et al. 2020)."""
    return None, _inverse(system.train_self().sqrt())


def leverage(system: Solution) -> Scale:
    """b = 1/(1 - h_i), h_i = phi_i^T H^-1 phi_i: turns the first-order step into exact removal for least squares."""
    h = system.train_self()
    if float(h.max()) >= 1:
        raise WhenceError(f"leverage {float(h.max()):.6g} of a training image is not below 1; use a larger damping")
    return None, 1 / (1 - h)
