"""Conjugate gradients on the Gauss-Newton system itself, with EK-FAC as preconditioner or with none.

    (F + lambda) x = psi      F = mean over images and draws of J^T (d^2 f / d prediction^2) J
    each step one product F p, on fixed draws (see `system`)

`refined`: preconditioner P = EK-FAC + lambda, lambda that of each block. A step takes the blocks' cross terms and the
directions that no Kronecker product has into account; 5 to 20 steps suffice on small networks, where the rank correlation
with the exact system goes from 0.7 to 0.97 and 1.0. The idea of Wang et al. 2025 (ASTRA, arXiv 2507.14740), with
deterministic products in place of their stochastic ones. `ConjugateGradients`: P = I, all chosen parameters, until the
residual is small. Each step costs three forward and backward passes per query, training image and draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whence.curvature.eigen import Eigen, refuse_dead, refuse_zero
from whence.curvature.factors import Fit, Sums
from whence.curvature.solve import Dampings, Problem, Solution, check_damping
from whence.curvature.system import (
    Apply,
    IterativeSolution,
    System,
    gauss_newton_operator,
    iterate,
    mean_eigenvalue,
    product,
)
from whence.storage.arrays import Rows, values_digest
from whence.types import WhenceError, digest

ROUNDING = 1e-14  # a relative residual past which the steps would only add noise


@dataclass(frozen=True)
class ConjugateGradients:
    """H = n (F + lambda I), solved to a relative residual ||psi - (F + lambda) x|| <= tolerance ||psi||.

    Args:
        damping: lambda in units of tr F / min(d, n S D).
        absolute: whether the damping is lambda itself, in units of the mean over images.
        tolerance: the relative residual.
        steps: as many at most; a query that has not converged by then is an error.
    """

    damping: float
    absolute: bool = False
    tolerance: float = 1e-6
    steps: int = 500
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if not ROUNDING <= self.tolerance < 1 or self.steps < 1:
            raise WhenceError(
                f"conjugate gradients: tolerance={self.tolerance:g} in steps={self.steps}; accepted: a tolerance from "
                f"{ROUNDING:g} to below 1, and at least 1 step"
            )

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        system = gauss_newton_operator(problem, "conjugate gradients")
        unit = 1.0 if self.absolute else mean_eigenvalue(system)
        return [self._at(system, train, query, unit * (self.damping if d is None else d)) for d in dampings]

    def _at(self, system: System, train: Rows, query: Tensor, damping: float) -> Solution:
        psi = query.double().to(system.task.engine.device)

        def damped(v: Tensor) -> Tensor:
            return product(system, v) + damping * v

        path = system.folder / f"cg-{digest([values_digest(psi), damping, self.tolerance])}.safetensors"
        state = solve(path, psi, damped, Tensor.clone, self.steps, self.tolerance, system.task.engine.device)
        if (still := active(state, self.tolerance)).any():
            residual = float((state["rz"] / state["first"])[still].max().sqrt())
            raise WhenceError(
                f"conjugate gradients: relative residual {residual:.2g} after {self.steps} steps, tolerance "
                f"{self.tolerance:g}; accepted: more steps (those done are kept), a larger damping or tolerance"
            )
        return IterativeSolution(train, psi.cpu(), state["x"].cpu() / len(system.task.train))


def refined(
    fit: Fit, curvature: Sequence[Eigen], train: Rows, query: Tensor, damping: float, absolute: bool, steps: int
) -> Solution:
    """H^-1 psi after some steps, on disk after each of them.

    Args:
        fit: what EK-FAC was estimated on.
        curvature: EK-FAC of each block, the preconditioner.
        train: rows of the training images [n, d].
        query: rows of the queries [m, d].
        damping: lambda in units of the mean of each block's Lambda, unless `absolute`.
        absolute: whether the damping is lambda itself.
        steps: of conjugate gradients.
    """
    refuse_zero(curvature)
    device = fit.task.engine.device
    curvature = [eigen.to(device) for eigen in curvature]
    psi = _only(curvature, query.double().to(device))
    columns = {name: at for b in fit.blocks for name, at in zip(b.names, filter(None, (b.weight, b.bias)), strict=True)}
    system = System(fit.task, fit.module, fit.output, fit.draws, columns, fit.folder)

    def precondition(r: Tensor) -> Tensor:
        z = torch.zeros_like(r)
        for eigen in curvature:
            eigen.block.scatter(eigen.back(eigen.rotate(r) * eigen.inverse(damping, absolute)), z)
        return z

    def damped(v: Tensor) -> Tensor:
        added = torch.zeros_like(v)
        for eigen in curvature:
            eigen.block.scatter(eigen.block.gradient(v) * damping * eigen.unit(absolute), added)
        return product(system, v) + added

    def keep(values: Tensor) -> Tensor:
        for eigen in curvature:
            refuse_dead(eigen, eigen.block.gradient(values), absolute)
        return _only(curvature, values.double())

    values = [digest(eigen.values) for eigen in curvature]
    path = fit.folder / f"refined-{digest([values_digest(psi), values, damping, absolute])}.safetensors"
    state = solve(path, psi, damped, precondition, steps, ROUNDING, device)
    return IterativeSolution(train, psi.cpu(), state["x"].cpu() / len(fit.task.train), keep)


def solve(
    path: Path, psi: Tensor, system: Apply, precondition: Apply, steps: int, tolerance: float, device: str
) -> Sums:
    """The state of preconditioned conjugate gradients for all rows of psi.

    Args:
        path: where the state is kept.
        psi: right-hand sides [m, d].
        system: v -> (F + lambda) v of each row.
        precondition: r -> P^-1 r of each row.
        steps: at most.
        tolerance: the relative residual at which a row stops.
        device: where the state lies.
    """
    return iterate(
        path,
        lambda: start(psi, precondition),
        lambda state: step(state, system, precondition, tolerance),
        lambda state: active(state, tolerance),
        steps,
        "conjugate gradients",
        device,
    )


def start(psi: Tensor, precondition: Apply) -> Sums:
    """x = 0 and its residual; the first direction is P^-1 psi."""
    z = precondition(psi)
    return {"x": torch.zeros_like(psi), "r": psi.clone(), "p": z, "rz": (psi * z).sum(1), "first": (psi * z).sum(1)}


def active(state: Sums, tolerance: float) -> Tensor:
    """Which rows have not converged, by the residual in the metric of P^-1: [m]."""
    return state["rz"] > tolerance**2 * state["first"]


def step(state: Sums, system: Apply, precondition: Apply, tolerance: float) -> Sums:
    """One step of each row for itself; those that have converged stay as they are.

    Args:
        state: x, its residual r, the direction p, r^T P^-1 r, and what that was at the start.
        system: v -> (F + lambda) v of each row.
        precondition: r -> P^-1 r of each row.
        tolerance: the relative residual at which a row stops.
    """
    some, Ap = active(state, tolerance), system(state["p"])
    a = torch.where(some, state["rz"] / (state["p"] * Ap).sum(1), 0.0)[:, None]
    x, r = state["x"] + a * state["p"], state["r"] - a * Ap
    z = precondition(r)
    rz = (r * z).sum(1)
    p = z + torch.where(some, rz / state["rz"], 0.0)[:, None] * state["p"]
    return {"x": x, "r": r, "p": p, "rz": torch.where(some, rz, state["rz"]), "first": state["first"]}


def _only(curvature: Sequence[Eigen], rows: Tensor) -> Tensor:
    """Gradient rows with zeros outside the blocks."""
    kept = torch.zeros_like(rows)
    for eigen in curvature:
        eigen.block.scatter(eigen.block.gradient(rows), kept)
    return kept
