"""LiSSA: the inverse of the Gauss-Newton matrix as a Neumann series (Agarwal et al. 2017; Koh & Liang 2017).

    h_0 = v,   h_{j+1} = v + (1 - delta) h_j - F h_j / scale,   x = h / scale -> (F + lambda I)^-1 v,   lambda = scale delta

converges where (lambda_max(F) + lambda) / scale < 2. What is left after J steps along an eigenvector of eigenvalue s is
(1 - (s + lambda)/scale)^J: directions of s below about scale / J are not there yet, as if lambda were larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.factors import Sums
from whence.curvature.solve import Dampings, Problem, Solution, check_damping
from whence.curvature.system import (
    IterativeSolution,
    System,
    gauss_newton_operator,
    iterate,
    largest_eigenvalue,
    mean_eigenvalue,
    product,
)
from whence.storage.arrays import Rows, values_digest
from whence.types import WhenceError, digest

KEEP_EVERY = 20  # steps between two states on disk: there are hundreds of steps, and in small networks they are fast


@dataclass(frozen=True)
class LiSSA:
    """H = n (F + lambda I), as far as `depth` steps come.

    Args:
        damping: lambda in units of tr F / min(d, n S D).
        absolute: whether the damping is lambda itself, in units of the mean over images.
        depth: steps of the series.
        scale: above half of lambda_max(F) + lambda; None for lambda_max(F) + lambda, by a power iteration.
    """

    damping: float
    absolute: bool = False
    depth: int = 200
    scale: float | None = None
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.depth < 1 or (self.scale is not None and not 0 < self.scale < float("inf")):
            raise WhenceError(
                f"LiSSA: depth={self.depth}, scale={self.scale}; accepted: a depth of 1 or more, a scale above 0 or None"
            )

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        system = gauss_newton_operator(problem, "LiSSA")
        unit = 1.0 if self.absolute else mean_eigenvalue(system)
        return [self._at(system, train, query, unit * (self.damping if d is None else d)) for d in dampings]

    def _at(self, system: System, train: Rows, query: Tensor, damping: float) -> Solution:
        device = system.task.engine.device
        v = query.double().to(device)
        top = largest_eigenvalue(system) + damping
        scale = top if self.scale is None else self.scale
        if not top / scale < 2:
            raise WhenceError(
                f"LiSSA: scale {scale:g} diverges at a curvature of {top:.4g}; accepted: a scale above {top / 2:.4g}, or "
                "None for one that is found"
            )

        def step(state: Sums) -> Sums:
            left = v - damping / scale * state["h"] - product(system, state["h"]) / scale
            return {"h": state["h"] + left, "left": left}

        def active(state: Sums) -> Tensor:
            return state["left"].norm(dim=1) > torch.finfo(torch.float64).eps * v.norm(dim=1)

        path = system.folder / f"lissa-{digest([values_digest(v), damping, scale])}.safetensors"
        start = {"h": v, "left": v}
        state = iterate(path, lambda: start, step, active, self.depth, "LiSSA", device, KEEP_EVERY)
        # A power iteration may miss the largest eigenvalue; a residual that has grown tells.
        if not (state["left"].norm(dim=1) <= v.norm(dim=1)).all():
            raise WhenceError(f"LiSSA: diverged with scale {scale:g}; accepted: a larger scale or damping")
        return IterativeSolution(train, v.cpu(), state["h"].cpu() / scale / len(system.task.train))
