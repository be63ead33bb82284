"""Preconditioned conjugate gradients: from EK-FAC towards the Gauss-Newton system itself.

    (F + lambda) x = psi      F = mean over images and draws of J^T (d^2 f / d prediction^2) J,  lambda that of each block
    preconditioner P = EK-FAC + lambda;  each step one product F p, by jvp and vjp, on the fixed draws of the factors

A step takes the blocks' cross terms and the directions that no Kronecker product has into account; 5 to 20 steps suffice on
small networks, where the rank correlation with the exact system goes from 0.7 to 0.97 and 1.0. The idea of Wang et al. 2025
(ASTRA, arXiv 2507.14740), with deterministic products in place of their stochastic ones. Each step costs three forward and
backward passes per query, training image and draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence import outputs
from whence.engine import progress
from whence.precondition.eigen import Eigen, refuse_dead, refuse_zero
from whence.precondition.factors import Drawn, Fit, Sums, grouped, passes, read, squared_weight, write
from whence.precondition.solve import Solution
from whence.store import Rows
from whence.types import Weights, WhenceError, digest


@dataclass(frozen=True)
class Refined:
    """x = H^-1 psi [m, d] of the queries, and what follows from it. Row scales that need H^-1 of every training image are
    refused: they would take as many solves."""

    train: Rows
    query: Tensor
    x: Tensor
    blocks: Sequence[Eigen]
    absolute: bool

    def kernel(self) -> Tensor:
        return torch.cat([self.x @ self._checked(values).T for _, values in self.train], dim=1)

    def _checked(self, values: Tensor) -> Tensor:
        for eigen in self.blocks:
            refuse_dead(eigen, eigen.block.gradient(values), self.absolute)
        return values.double()

    def train_self(self) -> Tensor:
        raise WhenceError(
            "refined scores have no self-influence of training images; accepted: refine=0, or no such scale"
        )

    def train_square(self) -> Tensor:
        return self.train_self()

    def query_self(self) -> Tensor:
        return (self.x * self.query).sum(1)

    def train_norm(self) -> Tensor:
        return torch.cat([torch.linalg.vector_norm(_only(self.blocks, v.double()), dim=1) for _, v in self.train])


def refined(
    fit: Fit, curvature: Sequence[Eigen], train: Rows, query: Tensor, damping: float, absolute: bool, steps: int
) -> Solution:
    """H^-1 psi after some steps, on disk after each of them."""
    refuse_zero(curvature)
    device = fit.task.engine.device
    curvature = [eigen.to(device) for eigen in curvature]
    psi = _only(curvature, query.to(device))

    def precondition(r: Tensor) -> Tensor:
        z = torch.zeros_like(r)
        for eigen in curvature:
            eigen.block.scatter(eigen.back(eigen.rotate(r) * eigen.inverse(damping, absolute)), z)
        return z

    def system(v: Tensor) -> Tensor:
        damped = torch.zeros_like(v)
        for eigen in curvature:
            eigen.block.scatter(eigen.block.gradient(v) * damping * eigen.unit(absolute), damped)
        return product(fit, v) + damped

    seen = hashlib.sha256(psi.cpu().numpy().tobytes()).hexdigest()
    values = [digest(eigen.values) for eigen in curvature]
    path = fit.folder / f"refined-{digest([seen, values, damping, absolute])}.safetensors"
    state, done = read(path) if path.exists() else (start(psi, precondition), 0)
    state = {name: value.to(device) for name, value in state.items()}
    for number in progress(range(done, steps), "K-FAC refinement"):
        if not going(state).any():
            break
        state = step(state, system, precondition)
        write(path, state, number + 1)
    return Refined(train, psi.cpu(), state["x"].cpu() / len(train), curvature, absolute)


Apply = Callable[[Tensor], Tensor]


def start(psi: Tensor, precondition: Apply) -> Sums:
    """x = 0 and its residual; the first direction is P^-1 psi."""
    z = precondition(psi)
    return {"x": torch.zeros_like(psi), "r": psi.clone(), "p": z, "rz": (psi * z).sum(1), "first": (psi * z).sum(1)}


def going(state: Sums) -> Tensor:
    """Which rows have not converged to rounding; past it the steps would only add noise: [m]."""
    return state["rz"] > 1e-28 * state["first"]


def step(state: Sums, system: Apply, precondition: Apply) -> Sums:
    """One step of each row for itself; those that have converged stay as they are."""
    some, Ap = going(state), system(state["p"])
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


def product(fit: Fit, vectors: Tensor) -> Tensor:
    """F v of each row: [m, d] -> [m, d], float64 sums."""
    task, module = fit.task, fit.module
    parameters = dict(module.named_parameters())
    columns = {name: at for b in fit.blocks for name, at in zip(b.names, filter(None, (b.weight, b.bias)), strict=True)}
    weights = {name: parameters[name].detach() for name in columns}

    def as_weights(v: Tensor) -> Weights:
        return {name: v[at].to(weights[name]).reshape(weights[name].shape) for name, at in columns.items()}

    tangents, total = [as_weights(v) for v in vectors], torch.zeros_like(vectors)
    # Fused attention has no forward derivative; the weights not chosen must not carry a graph.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for group in grouped(task.train, fit.draws):
            for rows in passes(task.train, group, fit.draws, task):

                def predict(w: Weights, rows: Drawn = rows) -> Tensor:
                    return task.forward(lambda *a, **k: functional_call(module, w, a, k), rows.batch, rows.draw)[0]

                prediction, pull, *_ = vjp(predict, weights)
                for row, tangent in zip(total, tangents, strict=True):
                    _, change, *_ = jvp(predict, (weights,), (tangent,))
                    (back,) = pull(_bend(fit, prediction, change, rows.draw.t))
                    for name, at in columns.items():
                        row[at] += back[name].flatten().double()
    return total / (len(task.train) * fit.draws.count)


def _bend(fit: Fit, prediction: Tensor, change: Tensor, t: Tensor) -> Tensor:
    """d^2 f / d prediction^2 times a change of the prediction."""
    if fit.output == outputs.cross_entropy:
        weighed = prediction.softmax(1) * change
        return weighed - prediction.softmax(1) * weighed.sum(1, keepdim=True)
    return squared_weight(fit.output, fit.task.forward, prediction, t) * change
