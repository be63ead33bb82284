"""Exact influence in least squares, the one model in which nothing needs to be approximated (Cook 1977, Ling 1984).

    theta = A^-1 X^T Y,   A = X^T X + lambda I,   r = Y - X theta,   h_i = x_i^T A^-1 x_i

X [n, k] features; Y [n] or [n, D] targets. An image may own several rows of X; see `without`. All formulas are
for the *sum* of squares: with a mean, removing a row would also change lambda in relation to the data. Computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.types import WhenceError


@dataclass(frozen=True, eq=False)
class Ridge:
    """A fitted ridge.

    Args:
        X: features [n, k].
        Y: targets [n, D].
        damping: lambda.
        factor: A's Cholesky factor [k, k].
        theta: the fit [k, D].
        residual: r [n, D].
        leverage: h [n].
    """

    X: Tensor
    Y: Tensor
    damping: float
    factor: Tensor
    theta: Tensor
    residual: Tensor
    leverage: Tensor

    def solve(self, values: Tensor) -> Tensor:
        """A^-1 values: [k, ...]."""
        return torch.cholesky_solve(values, self.factor)

    def hat(self) -> Tensor:
        """X A^-1 X^T: [n, n]; Y -> fitted values. Its diagonal is the leverage."""
        return self.X @ self.solve(self.X.T)

    def deleted_residual(self) -> Tensor:
        """y_i - x_i^T theta_{-i} = r_i / (1 - h_i): [n, D], the residual of row i under a fit without it."""
        return self.residual / self._kept()[:, None]

    def press(self) -> float:
        """Sum of squared deleted residuals: the leave-one-out error, from one fit (Allen 1974)."""
        return float(self.deleted_residual().square().sum())

    def leave_one_out(self) -> Tensor:
        """theta_{-i} - theta = -A^-1 x_i r_i / (1 - h_i): [n, k, D]. The first-order influence is (1 - h_i) times it."""
        return -self.solve(self.X.T).T[:, :, None] * self.deleted_residual()[:, None, :]

    def cook(self) -> Tensor:
        """D_i = ||X (theta_{-i} - theta)||^2 / (p s^2) [n], p = k D, s^2 = ||r||^2 / ((n - k) D): Cook's distance.

        For lambda = 0 and D = 1 it is r_i^2 h_i / (p s^2 (1 - h_i)^2).
        """
        n, k = self.X.shape
        if n <= k:
            raise WhenceError(f"Cook's distance needs more rows than features; there are {n} rows and {k} features")
        outputs = self.Y.shape[1]
        variance = self.residual.square().sum() / ((n - k) * outputs)
        moved = torch.einsum("ak,ikd->iad", self.X, self.leave_one_out()).square().sum((1, 2))
        return moved / (k * outputs * variance)

    def without(self, rows: Sequence[int]) -> Tensor:
        """theta_{-R} - theta = -A^-1 X_R^T (I - X_R A^-1 X_R^T)^-1 r_R (Woodbury): [k, D], all rows of R removed at once."""
        rows = list(rows)
        few = self.X[rows]
        back = self.solve(few.T)
        inner = torch.eye(len(rows), dtype=few.dtype) - few @ back
        if len(rows) and float(torch.linalg.eigvalsh((inner + inner.T) / 2)[0]) < 1e-10:
            raise WhenceError(f"without these {len(rows)} rows the fit is not determined; use a larger damping")
        return -back @ torch.linalg.solve(inner, self.residual[rows])

    def weight_derivative(self) -> Tensor:
        """d theta / d w_i = A^-1 x_i r_i at w = 1: [n, k, D], w_i the weight of row i in the sum of squares."""
        return self.solve(self.X.T).T[:, :, None] * self.residual[:, None, :]

    def _kept(self) -> Tensor:
        """1 - h: [n]."""
        kept = 1 - self.leverage
        if float(kept.min()) < 1e-10:
            row = int(kept.argmin())
            raise WhenceError(f"row {row} has leverage 1: without it the fit is not determined; use a larger damping")
        return kept


def ridge(X: Tensor, Y: Tensor, damping: float = 0.0) -> Ridge:
    """argmin_theta ||Y - X theta||^2 + lambda ||theta||^2, with what its exact influence needs.

    Args:
        X: features [n, k].
        Y: targets [n] or [n, D].
        damping: lambda, 0 or more.
    """
    X, Y = X.double(), (Y if Y.ndim == 2 else Y[:, None]).double()
    if X.ndim != 2 or len(X) != len(Y):
        raise WhenceError(f"ridge: X is {list(X.shape)} and Y {list(Y.shape)}; accepted: [n, k] with [n] or [n, D]")
    if not 0 <= damping < float("inf"):
        raise WhenceError(f"ridge: damping {damping}; accepted: 0 or more, and finite")
    A = X.T @ X + damping * torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    factor, failed = torch.linalg.cholesky_ex(A)
    smallest, largest = float(factor.diagonal().min()), float(factor.diagonal().max())
    if int(failed) or smallest < 1e-7 * largest:  # squared: the rounding of A itself
        raise WhenceError("ridge: the features are linearly dependent; use a damping above 0")
    back = torch.cholesky_solve(X.T, factor)
    theta = back @ Y
    return Ridge(X, Y, damping, factor, theta, Y - X @ theta, (X * back.T).sum(1))


def block_leave_one_out(J: Tensor, H: Tensor, error: Tensor) -> Tensor:
    """theta_{-i} - theta = H^-1 J_i^T (I - J_i H^-1 J_i^T)^-1 (prediction - target)_i: [n, d].

    Exact for a model linear in theta [d]; for other models one Gauss-Newton step (the vector form behind DAS).

    Args:
        J: Jacobian J_i of the D outputs at each image [n, D, d].
        H: sum_i J_i^T J_i + lambda I [d, d].
        error: prediction - target [n, D], at the optimum.
    """
    J, H, error = J.double(), H.double(), error.double()
    back = torch.cholesky_solve(J.flatten(0, 1).T, torch.linalg.cholesky(H)).T.unflatten(0, J.shape[:2])  # J_i H^-1
    inner = torch.eye(J.shape[1], dtype=J.dtype) - back @ J.mT
    return (back.mT @ torch.linalg.solve(inner, error[:, :, None]))[:, :, 0]
