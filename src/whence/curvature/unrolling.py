"""Training as gradient descent of constant curvature in each of a few segments (SOURCE: Bae et al. 2024, arXiv 2405.12186).

    q_L = psi;   q_{l-1} = Q_l F_back(Lambda_l) Q_l^T q_l          F_back(s) = exp(-S_l s)
    x_l = Q_l F_seg(Lambda_l) Q_l^T q_l                            F_seg(s) = (1 - exp(-S_l s)) / s,  S_l where s = 0

S_l = sum of the learning rates of segment l. Then -d f_q / d w_i ~ (1/n) sum_l x_l^T g_l(i), g_l(i) the gradient of image i,
mean over the checkpoints of segment l; an equality where curvature and gradients do not change within a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from whence.curvature.eigen import Eigen, refuse_zero
from whence.curvature.factors import Factors, eigenvalues, eigenvectors, factors, fit_factors, read, write
from whence.curvature.solve import Problem
from whence.features.parts import Gradient
from whence.types import Checkpoint, Task, WhenceError, digest


@dataclass(frozen=True)
class Segment:
    """Checkpoints that are near each other in training, and the curvature they have in common.

    Args:
        checkpoints: in the order of training.
        curvature: EK-FAC of each block.
        rates: S, the sum of the learning rates.
    """

    checkpoints: Sequence[Checkpoint]
    curvature: Sequence[Eigen]
    rates: float


def forgotten(rates: float, values: Tensor) -> Tensor:
    """F_back: what is left of a change of the parameters at the end of a segment."""
    return torch.exp(-rates * values)


def gained(rates: float, values: Tensor) -> Tensor:
    """F_seg: how far a constant force carries over a segment. expm1, because 1 - exp(-small) would be noise."""
    return torch.where(values > 0, -torch.expm1(-rates * values) / values, rates)


def backwards(psi: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """x_l [m, d] of every segment, in the order of training; 0 outside the blocks."""
    found, q = [], psi
    for segment in reversed(segments):
        x, before = torch.zeros_like(psi), torch.zeros_like(psi)
        for eigen in segment.curvature:
            coordinates, values = eigen.rotate(q), eigen.values.flatten()
            eigen.block.scatter(eigen.back(coordinates * gained(segment.rates, values)), x)
            eigen.block.scatter(eigen.back(coordinates * forgotten(segment.rates, values)), before)
        found.append(x)
        q = before
    return found[::-1]


def divide(task: Task, count: int) -> list[list[Checkpoint]]:
    """The checkpoints of a training run in `count` parts, one after the other, of almost equal number."""
    checkpoints = [checkpoint for checkpoint in task.trajectory if checkpoint.step is not None]
    if len(checkpoints) < count or not checkpoints:
        names = ", ".join(checkpoint.name for checkpoint in checkpoints or task.trajectory)
        raise WhenceError(
            f"{count} segments of a training run need at least as many checkpoints (checkpoint-N folders); there is only "
            f"{names}"
        )
    steps = [int(checkpoint.step or 0) for checkpoint in checkpoints]
    if any(later <= earlier for earlier, later in pairwise([0, *steps])):
        raise WhenceError(
            f"the checkpoints are at steps {steps}; accepted: those of one run, each later than the one before"
        )
    bounds = [len(checkpoints) * part // count for part in range(count + 1)]
    return [checkpoints[a:b] for a, b in pairwise(bounds)]


def rate_sums(task: Task, parts: Sequence[Sequence[Checkpoint]]) -> list[float]:
    """S of each segment, which reaches from the end of the one before to its own last checkpoint.

    The exact sum where the task knows its training; else the rates of the checkpoints, straight between them and constant
    before the first.
    """
    if task.study is not None:
        rate_at, ends = task.study.recipe.rate_at, [0, *(part[-1].step or 0 for part in parts)]
        sums = [float(sum(rate_at(step) for step in range(start, stop))) for start, stop in pairwise(ends)]
    else:
        stretches = iter(_stretches([checkpoint for part in parts for checkpoint in part]))
        sums = [sum(next(stretches) for _ in part) for part in parts]
    for part, total in zip(parts, sums, strict=True):
        if not total > 0:
            raise WhenceError(
                f"the learning rates of the segment up to {part[-1].name} sum to {total:g}; accepted: above 0"
            )
    return sums


def _stretches(checkpoints: Sequence[Checkpoint]) -> list[float]:
    """The sum of the rates from each checkpoint's predecessor to itself."""
    found: list[float] = []
    step, rate = 0, None
    for checkpoint in checkpoints:
        if checkpoint.rate is None:
            raise WhenceError(f"{checkpoint.name} does not say its learning rate; add it as `rate` to its whence.json")
        now = float(checkpoint.rate)
        found.append(((checkpoint.step or 0) - step) * (now if rate is None else (rate + now) / 2))
        step, rate = checkpoint.step or 0, now
    return found


def curvature(task: Task, part: Gradient, checkpoints: Sequence[Checkpoint], settings: Factors) -> list[Eigen]:
    """EK-FAC of several checkpoints: the mean of their A and B gives one basis, Lambda is the mean of theirs in it.

    Args:
        task: the question.
        part: the gradients whose curvature it is.
        checkpoints: of one segment.
        settings: how A and B are estimated.
    """
    fits = [fit_factors(Problem(task, checkpoint, part), settings) for checkpoint in checkpoints]
    # Kept with the last checkpoint, under the names of all: the layout in memory decides the last bit of products.
    name = digest([fit.folder.name for fit in fits])
    path = fits[-1].folder / f"eigenvectors-{name}.safetensors"
    if not path.exists():
        of_each = [factors(fit) for fit in fits]
        mean = {key: torch.stack([one[key] for one in of_each]).mean(0) for key in of_each[0]}
        write(path, eigenvectors(mean, task.engine.device), 0)
    Q = read(path)[0]
    values = [eigenvalues(fit, Q, fit.draws, name) for fit in fits]
    found = [
        Eigen(b, Q[f"QA {b.name}"], Q[f"QB {b.name}"], torch.stack([v[b.name] for v in values]).mean(0))
        for b in fits[-1].blocks
    ]
    refuse_zero(found)
    return [eigen.to(task.engine.device) for eigen in found]
