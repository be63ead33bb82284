"""A Gauss-Newton matrix that is multiplied and never built: any parameters of any network.

    F v = (1/n) sum_i mean_s J_is^T (d^2 f / d prediction^2) J_is v       J v, f'' and J^T of each pass (Schraudolph 2002)

The draws are fixed, so that F is one matrix and its products are deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.curvature.factors import (
    ROWS_AT_ONCE,
    Sums,
    folder_of,
    grouped,
    measured,
    passes,
    read,
    squared_weight,
    write,
)
from whence.curvature.solve import Problem, Solution
from whence.diffusion import outputs
from whence.diffusion.draws import DrawRule
from whence.diffusion.noise import counters, normals, seed_for
from whence.diffusion.outputs import Output
from whence.features.gradients import differentiating, fill
from whence.features.rows import prepare
from whence.storage.arrays import Rows
from whence.storage.files import progress
from whence.types import Task, WhenceError

PROBES = 16  # random signs that tr F is estimated with
PRODUCTS = 30  # of a power iteration; the Rayleigh quotient is then within some percent of the largest eigenvalue
Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class System:
    """F of some parameters at one checkpoint.

    Args:
        task: the question; its training images are those averaged over.
        module: the network.
        output: whose curvature it is.
        draws: fixed, so that F is one matrix.
        columns: of each parameter in a gradient row.
        folder: for what is found.
    """

    task: Task
    module: nn.Module
    output: Output
    draws: DrawRule
    columns: Mapping[str, slice]
    folder: Path


def gauss_newton_operator(problem: Problem, who: str) -> System:
    """F of all chosen parameters, norms and embeddings included."""
    part, output = measured(problem, who)
    module = prepare(problem.checkpoint, problem.task.engine)
    columns, start = {}, 0
    for name, size in part.sizes(module).items():
        columns[name] = slice(start, start + size)
        start += size
    key = {"products": list(columns), "output": output, "draws": part.draws}
    return System(problem.task, module, output, part.draws, columns, folder_of(problem, key))


def product(system: System, vectors: Tensor) -> Tensor:
    """F v of each row: [m, d] -> [m, d], float64 sums."""
    task, module, names = system.task, system.module, list(system.columns)
    total, at_once = torch.zeros_like(vectors), _rows_at_once(system)
    # Fused attention has no second derivative.
    with differentiating(module, names) as weights, sdpa_kernel(SDPBackend.MATH):
        parameters = list(weights.values())
        tangents = [
            [v[at].to(w).reshape(w.shape) for w, at in zip(parameters, system.columns.values(), strict=True)]
            for v in vectors
        ]
        for group in grouped(task.train, system.draws, at_once):
            for rows in passes(task.train, group, system.draws, task, at_once):
                prediction, _ = task.forward(module, rows.batch, rows.draw)
                if not prediction.requires_grad:  # none of these parameters is used
                    continue
                # J v = d <J^T u, v> / du, because GroupNorm has no forward derivative for every memory layout.
                u = torch.zeros_like(prediction, requires_grad=True)
                pulled = _pull(prediction, parameters, u, create_graph=True)
                for row, tangent in zip(total, tangents, strict=True):
                    (change,) = torch.autograd.grad(pulled, u, tangent, retain_graph=True, materialize_grads=True)
                    bent = _bend(system, prediction.detach(), change, rows.draw.t)
                    for at, back in zip(system.columns.values(), _pull(prediction, parameters, bent), strict=True):
                        row[at] += back.flatten().double()
    return total / (len(task.train) * system.draws.count)


def _pull(
    prediction: Tensor, weights: list[Tensor], cotangent: Tensor, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """J^T u of each parameter."""
    return torch.autograd.grad(
        prediction, weights, cotangent, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def _rows_at_once(system: System) -> int:
    """More in small networks, where a pass costs the same for one row as for hundreds."""
    return max(ROWS_AT_ONCE, fill(system.module, system.task.train.batch([0]).x0))


def _bend(system: System, prediction: Tensor, change: Tensor, t: Tensor) -> Tensor:
    """d^2 f / d prediction^2 times a change of the prediction."""
    if system.output == outputs.cross_entropy:
        weighed = prediction.softmax(1) * change
        return weighed - prediction.softmax(1) * weighed.sum(1, keepdim=True)
    return squared_weight(system.output, system.task.forward, prediction, t) * change


def mean_eigenvalue(system: System) -> float:
    """tr F / min(d, n S D): the mean eigenvalue that is not zero, at full rank. tr F is a mean of z^T F z over signs z."""
    path = system.folder / "trace.safetensors"
    if not path.exists():
        signs = (_signs(system, k) for k in range(PROBES))
        found = [(z * product(system, z)).sum() for z in progress(signs, "mean curvature", total=PROBES)]
        write(path, {"trace": torch.stack(found).mean()}, PROBES)
    trace = float(read(path)[0]["trace"])
    if not trace > 0:
        raise WhenceError("all training features (or their curvature) are zero; nothing can be attributed with them")
    task = system.task
    (first, *_) = passes(task.train, [0], system.draws, task)
    with torch.no_grad():
        size = task.forward(system.module, first.batch, first.draw)[0][0].numel()
    return trace / min(_width(system), len(task.train) * system.draws.count * size)


def largest_eigenvalue(system: System) -> float:
    """A Rayleigh quotient after a power iteration: never above the largest eigenvalue of F, and close to it."""
    path = system.folder / "largest.safetensors"
    if not path.exists():
        start = normals(torch.tensor(seed_for(0, "power iteration")), (1, _width(system)), torch.float64)
        v, value = start.to(system.task.engine.device), torch.zeros((), dtype=torch.float64)
        for _ in progress(range(PRODUCTS), "largest curvature"):
            v = v / v.norm().clamp(min=torch.finfo(torch.float64).tiny)
            Fv = product(system, v)
            value, v = (v * Fv).sum(), Fv
        write(path, {"largest": value}, PRODUCTS)
    return float(read(path)[0]["largest"])


def _signs(system: System, number: int) -> Tensor:
    words = counters(torch.tensor(seed_for(0, f"trace {number}")), _width(system))
    return torch.where(words < 0, -1.0, 1.0).double()[None].to(system.task.engine.device)


def _width(system: System) -> int:
    return max(at.stop for at in system.columns.values())


@dataclass(frozen=True)
class IterativeSolution(Solution):
    """x = H^-1 psi of the queries, and what follows from it.

    Row scales that need H^-1 of every training image are refused: they would take as many solves.

    Args:
        train: rows of the training images [n, d].
        query: psi [m, d] float64.
        x: H^-1 psi [m, d].
        keep: gradient rows -> their float64 part that the system is about.
    """

    train: Rows
    query: Tensor
    x: Tensor
    keep: Callable[[Tensor], Tensor] = Tensor.double

    def beside(self, rows: Rows) -> Solution:
        return replace(self, train=rows)

    def kernel(self) -> Tensor:
        return torch.cat([self.x @ self.keep(values).T for _, values in self.train], dim=1)

    def train_self(self) -> Tensor:
        raise WhenceError(
            "scores refined in steps have no self-influence of training images; accepted: refine=0, a method that solves "
            "directly (ek_fac, influence, exact_influence), or no such scale"
        )

    def train_square(self) -> Tensor:
        return self.train_self()

    def query_self(self) -> Tensor:
        return (self.x * self.query).sum(1)

    def train_norm(self) -> Tensor:
        return torch.cat([torch.linalg.vector_norm(self.keep(values), dim=1) for _, values in self.train])


def iterate(
    path: Path,
    start: Callable[[], Sums],
    step: Callable[[Sums], Sums],
    active: Callable[[Sums], Tensor],
    steps: int,
    what: str,
    device: str,
    save_every: int = 1,
) -> Sums:
    """The state after some steps, or fewer where nothing is left to do; on disk at intervals and at the end.

    Args:
        path: where the state is kept.
        start: () -> the state before the first step.
        step: state -> the next one.
        active: state -> which rows are not done [m].
        steps: at most.
        what: for the progress bar.
        device: where the state lies.
        save_every: steps between two states on disk.
    """
    state, done = read(path) if path.exists() else (start(), 0)
    if done > steps:  # an earlier call went further than this one asks
        state, done = start(), 0
    state = {name: value.to(device) for name, value in state.items()}
    for number in progress(range(done, steps), what):
        if not active(state).any():
            break
        state = step(state)
        if (number + 1) % save_every == 0 or number + 1 == steps:
            write(path, state, number + 1)
    return state
