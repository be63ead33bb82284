"""Exact influence in least squares against refits: to 1e-10, with no first-order step anywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from errors import refuses
from whence.methods.regression import block_leave_one_out, ridge

N, K = 30, 5


def problem(outputs: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of unequal scale that are not orthogonal, and a row that stands far out."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(N, K, generator=g, dtype=torch.float64) @ torch.diag(
        torch.tensor([1.0, 3.0, 0.2, 1.0, 0.5]).double()
    )
    X[:, 1] += X[:, 0]
    X[4] *= 6
    return X, torch.randn(N, outputs, generator=g, dtype=torch.float64)


def refit(X: Tensor, Y: Tensor, damping: float, weight: Tensor | None = None) -> Tensor:
    w = (torch.ones(len(X)) if weight is None else weight).double()[:, None]
    return torch.linalg.solve(X.T @ (w * X) + damping * torch.eye(X.shape[1]).double(), X.T @ (w * Y))


def drop(rows: list[int]) -> Tensor:
    weight = torch.ones(N, dtype=torch.float64)
    weight[rows] = 0
    return weight


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=[0.0, 0.7])
def damping(request) -> float:
    return request.param


def test_one_row(damping):
    X, Y = problem()
    fit = ridge(X, Y, damping)
    close(fit.theta, refit(X, Y, damping))
    refits = torch.stack([refit(X, Y, damping, drop([i])) for i in range(N)])
    close(fit.leave_one_out(), refits - fit.theta)
    deleted = Y - torch.einsum("ik,ikd->id", X, refits)
    close(fit.deleted_residual(), deleted)
    assert fit.press() == pytest.approx(float(deleted.square().sum()), rel=1e-10)
    first_order = -fit.weight_derivative()
    close(first_order, (1 - fit.leverage)[:, None, None] * fit.leave_one_out())
    assert float((first_order - fit.leave_one_out()).norm() / first_order.norm()) > 0.1, "leverage matters here"


def test_hat_matrix(damping):
    X, Y = problem()
    fit = ridge(X, Y, damping)
    close(fit.hat() @ Y, X @ fit.theta)
    close(fit.hat().diagonal(), fit.leverage)
    if damping == 0:
        assert float(fit.leverage.sum()) == pytest.approx(K)
        close(fit.hat() @ fit.hat(), fit.hat())


@pytest.mark.parametrize("rows", [[4], [0, 4, 5, 29], list(range(0, 30, 2)), []])
def test_group(damping, rows):
    X, Y = problem()
    fit = ridge(X, Y, damping)
    close(fit.without(rows), refit(X, Y, damping, drop(rows)) - fit.theta)


def test_weight_derivative(damping):
    """Central differences, whose own error is about 1e-9."""
    X, Y = problem()
    found = ridge(X, Y, damping).weight_derivative()
    for i in (0, 4, 17):
        step = torch.zeros(N).double()
        step[i] = 1e-4
        slope = (refit(X, Y, damping, 1 + step) - refit(X, Y, damping, 1 - step)) / 2e-4
        torch.testing.assert_close(found[i], slope, rtol=1e-6, atol=1e-8)


def test_cook_distance():
    """By its textbook formula for one output without ridge, and by refits in general."""
    X, y = problem(1)
    fit = ridge(X, y[:, 0])
    r, h = fit.residual[:, 0], fit.leverage
    variance = r.square().sum() / (N - K)
    close(fit.cook(), r.square() * h / (K * variance * (1 - h).square()))
    X, Y = problem(3)
    Y[4] += 10
    fit = ridge(X, Y, 0.7)
    moved = torch.stack([(X @ (refit(X, Y, 0.7, drop([i])) - fit.theta)).square().sum() for i in range(N)])
    close(fit.cook(), moved / (K * 3) / (fit.residual.square().sum() / ((N - K) * 3)))
    assert int(fit.cook().argmax()) == 4


def test_vector_outputs(damping):
    """Images with several rows: the block form equals Woodbury and a fit without all rows of the image."""
    X, Y = problem(1)
    J, lam = X.reshape(10, 3, K), damping + 0.3
    fit = ridge(X, Y, lam)
    H = X.T @ X + lam * torch.eye(K).double()
    found = block_leave_one_out(J, H, -fit.residual.reshape(10, 3))
    for i in range(10):
        rows = [3 * i, 3 * i + 1, 3 * i + 2]
        close(found[i], (refit(X, Y, lam, drop(rows)) - fit.theta)[:, 0])
        close(found[i], fit.without(rows)[:, 0])


def test_what_is_refused():
    X, Y = problem()
    with refuses("X is [30, 5] and Y [29, 3]", accepted="[n, k] with"):
        ridge(X, Y[1:])
    with refuses("damping -1.0", accepted="0 or more"):
        ridge(X, Y, -1.0)
    with refuses("linearly dependent; use a damping above 0"):
        ridge(torch.cat([X, X[:, :1] + X[:, 1:2]], 1), Y)
    alone = X.clone()
    alone[:, 2] = 0
    alone[7, 2] = 1
    fit = ridge(alone, Y)
    with refuses("row 7 has leverage 1: without it the fit is not determined"):
        fit.leave_one_out()
    with refuses("without these 2 rows the fit is not determined"):
        fit.without([3, 7])
    with refuses("there are 4 rows and 5 features"):
        ridge(X[:4], Y[:4], 1.0).cook()
