"""Solvers of the Gauss-Newton system, DataInf, the Hessian and SOURCE against dense linear algebra and explicit training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from errors import refuses
from recipes import recipe_of
from test_precondition import gauss_newton
from whence.curvature.datainf import DataInf
from whence.curvature.eigen import Eigen
from whence.curvature.exact import GaussNewton, Hessian
from whence.curvature.factors import Factors
from whence.curvature.layers import Block
from whence.curvature.lissa import LiSSA
from whence.curvature.pcg import ConjugateGradients
from whence.curvature.solve import NoPreconditioner, Preconditioner, Problem, Solution
from whence.curvature.system import gauss_newton_operator, largest_eigenvalue, mean_eigenvalue, product
from whence.curvature.unrolling import Segment, backwards, curvature, divide, forgotten, gained, rate_sums
from whence.diffusion import outputs
from whence.diffusion.draws import Even, once, uniform
from whence.diffusion.outputs import Output
from whence.evaluation.lds import lds
from whence.features.parts import Gradient
from whence.features.rows import rows
from whence.methods import build, normalize
from whence.methods.curvature import Source, source
from whence.methods.inner_product import InnerProduct
from whence.training.recipe import Recipe
from whence.types import Draw, Engine, Task
from worlds import DRAWS, checkpoint, classifier_task, half_masks, linear_world, tensors, unet_task


@dataclass(frozen=True)
class Regression:
    """prediction = net(x0), target 0.5; the draws are ignored."""

    timesteps: int = 1
    alphas_cumprod = None
    models = "any"
    prediction_type = "epsilon"
    density = Even()

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones(len(t))

    def __call__(self, call: Callable[..., Tensor], batch: Any, draw: Any) -> tuple[Tensor, Tensor]:
        prediction = call(batch.x0)
        return prediction, torch.full_like(prediction, 0.5)


def net_task(root: Path, make: Callable[[], nn.Module], n: int = 7, m: int = 2, size: int = 4) -> Task:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make().double()

    g = torch.Generator().manual_seed(2)
    x0 = torch.randn(n + m, size, generator=g, dtype=torch.float64) * torch.logspace(0.3, -0.7, size)
    points = (checkpoint(seeded, "net"),)
    return Task(Regression(), points, tensors(x0[:n], "train"), tensors(x0[n:], "query"), root, Engine(dtype=x0.dtype))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


ONCE = Gradient(outputs.loss, once())


def part_of(task: Task) -> Gradient:
    return Gradient(outputs.cross_entropy if task.forward.models == "classifier" else outputs.loss, once())


def pieces(task: Task, part: Gradient, precondition: Preconditioner) -> tuple[Solution, Tensor, Tensor]:
    """The system, psi and phi."""
    point = task.trajectory[-1]
    phi = rows(part, task, point, task.train, "train")
    psi = rows(part, task, point, task.queries, "queries").all().double()
    (system,) = precondition.solve(Problem(task, point, part), phi, psi, [None])
    return system, psi, phi.all().double()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


def scores(task: Task, part: Gradient, precondition: Preconditioner) -> Tensor:
    return InnerProduct(part, precondition=precondition)(task).values


# ----------------------------------------------------------------------------------------- products, CG, LiSSA

WORLDS: dict[str, Callable[[Path], Task]] = {
    "norms": lambda root: replace(net_task(root, small), forward=Plain()),
    "classifier": classifier_task,
}


@dataclass(frozen=True)
class Plain(Regression):
    models = "denoiser"


@pytest.fixture(params=WORLDS)
def task(request, tmp_path) -> Task:
    return WORLDS[request.param](tmp_path)


def dense(task: Task) -> Tensor:
    """F = (1/n) sum_i J_i^T f'' J_i of all parameters, norms included, through the exact matrix."""
    return gauss_newton(task, part_of(task)) / len(task.train)


def test_products_trace_and_largest_eigenvalue(task):
    F, system = dense(task), gauss_newton_operator(Problem(task, task.trajectory[-1], part_of(task)), "x")
    eye = torch.eye(len(F), dtype=F.dtype)
    close(product(system, eye), F, 1e-12)
    found = largest_eigenvalue(system)
    largest = float(torch.linalg.eigvalsh(F)[-1])
    assert 0.9 * largest < found <= largest * (1 + 1e-12)
    # tr F is exact for signs where F is diagonal; here it is an estimate.
    rank = min(len(F), len(task.train) * 3)
    assert mean_eigenvalue(system) == pytest.approx(float(F.trace()) / rank, rel=0.5)


def test_products_of_a_unet(tmp_path):
    """Attention, GroupNorm in both memory layouts, embeddings: F is symmetric, and z^T F z = mean |sqrt(f'') J z|^2, J z by
    central differences."""
    task = unet_task(tmp_path, n=2, dtype=torch.float64)
    part = Gradient(outputs.loss, uniform(2))
    system = gauss_newton_operator(Problem(task, task.trajectory[-1], part), "x")
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, max(at.stop for at in system.columns.values()), generator=g, dtype=torch.float64)
    Fz = product(system, z)
    close((z[0] * Fz[1]).sum(), (z[1] * Fz[0]).sum(), 1e-10)

    def predictions(step: float) -> Tensor:
        at = system.columns
        weights = {k: p.detach() + step * z[0, at[k]].view_as(p) for k, p in system.module.named_parameters()}
        batch = task.train.batch([0, 1]).to("cpu", torch.float64)
        every = part.draws(batch.keys, batch.x0.shape[1:], task.forward.timesteps, batch.x0.dtype)
        with torch.no_grad():
            draws = [Draw(every.t[:, s], every.noise[:, s]) for s in range(2)]
            return torch.stack(
                [task.forward(lambda *a: functional_call(system.module, weights, a), batch, d)[0] for d in draws]
            )

    slope = (predictions(1e-5) - predictions(-1e-5)) / 2e-5
    close((z[0] * Fz[0]).sum(), 2 * slope.square().mean(), 1e-6)


def test_conjugate_gradients_equal_the_exact_system(task):
    """All parameters, norms included; every piece that needs no solve of a training image."""
    part, n = part_of(task), len(task.train)
    exact, *_ = pieces(task, part, GaussNewton(n * 1e-3, absolute=True))
    found, *_ = pieces(task, part, ConjugateGradients(1e-3, absolute=True, tolerance=1e-11))
    for piece in ("kernel", "query_self", "train_norm"):
        close(getattr(found, piece)(), getattr(exact, piece)())
    with refuses("no self-influence of training images", accepted="refine=0, a method that solves"):
        normalize.relatif_loss(found)
    close(scores(task, part, ConjugateGradients(1e12, True)) * 1e12 * n, scores(task, part, NoPreconditioner()), 1e-6)


def test_conjugate_gradients_that_do_not_converge_are_refused_and_go_on(task):
    part = part_of(task)
    with refuses("relative residual ... after 3 steps, tolerance 1e-08", accepted="more steps"):
        scores(task, part, ConjugateGradients(1e-4, True, tolerance=1e-8, steps=3))
    gone_on = scores(task, part, ConjugateGradients(1e-4, True, tolerance=1e-8, steps=400))
    close(gone_on, scores(task, part, GaussNewton(1e-4 * len(task.train), True)), 1e-6)
    fewer = ConjugateGradients(1e-4, True, tolerance=1e-8, steps=4)
    with refuses("after 4 steps"):
        scores(task, part, fewer)
    with refuses("tolerance=2 in steps=5", accepted="a tolerance from"):
        ConjugateGradients(0.1, tolerance=2, steps=5)


def test_lissa_is_its_series_and_converges(task):
    """After J steps h is the sum of J + 1 powers of I - (F + lambda)/scale; with enough steps the exact inverse."""
    part, F, n, damping = part_of(task), dense(task), len(task.train), 0.5
    system, psi, phi = pieces(task, part, LiSSA(damping, True, depth=5, scale=3.0 * float(F.trace())))
    scale = 3.0 * float(F.trace())
    shrink = torch.eye(len(F), dtype=F.dtype) - (F + damping * torch.eye(len(F), dtype=F.dtype)) / scale
    h = sum(torch.linalg.matrix_power(shrink, j) for j in range(6)) / scale
    close(system.kernel(), psi @ h @ phi.T / n, 1e-10)
    exact = scores(task, part, GaussNewton(n * damping, True))
    for scale in (None, 0.6 * float(torch.linalg.eigvalsh(F)[-1] + damping)):
        close(scores(task, part, LiSSA(damping, True, depth=200, scale=scale)), exact)


@pytest.mark.parametrize("few", [20, 25], ids=["a state on disk", "between two"])
def test_lissa_goes_on_from_fewer_steps(tmp_path, few):
    """To the same bits as without a stop; and fewer steps than were made are fewer steps."""
    tasks = [replace(net_task(tmp_path / name, small), forward=Plain()) for name in ("stopped", "other")]
    before = scores(tasks[0], ONCE, LiSSA(0.1, depth=few))
    assert torch.equal(scores(tasks[0], ONCE, LiSSA(0.1, depth=50)), scores(tasks[1], ONCE, LiSSA(0.1, depth=50)))
    assert torch.equal(scores(tasks[1], ONCE, LiSSA(0.1, depth=few)), before)
    assert not torch.allclose(scores(tasks[1], ONCE, LiSSA(0.1, depth=50)), before, rtol=1e-3)


def test_lissa_that_diverges_is_refused(task):
    top = float(torch.linalg.eigvalsh(dense(task))[-1])
    with refuses("LiSSA: scale ... diverges at a curvature of", accepted="a scale above"):
        scores(task, part_of(task), LiSSA(1e-3, True, scale=0.4 * top))
    with refuses("depth=0, scale=None", accepted="a depth of 1 or more, a scale above 0"):
        LiSSA(0.1, depth=0)


@pytest.mark.parametrize("solver", [ConjugateGradients(0.1), LiSSA(0.1)], ids=["cg", "lissa"])
def test_systems_that_cannot_be_set_up_are_refused(task, solver):
    part = part_of(task)
    with refuses("needs unprojected gradients of one output (dim=None)"):
        scores(task, replace(part, output=outputs.probes(2)), solver)
    with refuses("does not know the curvature of output"):
        scores(
            task, replace(part, output=outputs.margin if task.forward.models == "classifier" else outputs.l2), solver
        )
    with refuses(accepted="unit=False"):
        scores(task, replace(part, draws=replace(once(), unit=True)), solver)


# ----------------------------------------------------------------------------------------------------- DataInf


def datainf(phi: Tensor, psi: Tensor, layers: list[slice], damping: float) -> dict[str, Tensor]:
    """The mean of the explicit inverses, layer by layer, over n: kernel and what the row scales need."""
    m, n = len(psi), len(phi)
    total, square = torch.zeros(m + n, m + n, dtype=phi.dtype), torch.zeros(n, dtype=phi.dtype)
    for columns in layers:
        g, both = phi[:, columns], torch.cat([psi, phi])[:, columns]
        eye = torch.eye(g.shape[1], dtype=g.dtype)
        lam = damping * g.square().sum(1).mean() / g.shape[1]
        inverse = torch.stack([torch.linalg.inv(torch.outer(row, row) + lam * eye) for row in g]).mean(0) / n
        total += both @ inverse @ both.T
        square += (g @ inverse).square().sum(1)
    return {
        "kernel": total[:m, m:],
        "query_self": total.diagonal()[:m],
        "train_self": total.diagonal()[m:],
        "train_square": square,
    }


def test_datainf_is_the_mean_of_inverses(task):
    part = part_of(task)
    system, psi, phi = pieces(task, part, DataInf(0.1))
    layers = system.layers
    assert len(layers) == 3
    assert layers[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(layers))
    assert layers[-1].stop == phi.shape[1]
    for piece, expected in datainf(phi, psi, layers, 0.1).items():
        close(getattr(system, piece)(), expected, 1e-9)
    close(system.train_norm(), phi.norm(dim=1))


def test_datainf_of_one_image_is_exact(tmp_path):
    """(g g^T + lambda)^-1 and nothing to exchange: the empirical Fisher of the one layer."""
    task = replace(net_task(tmp_path, lambda: nn.Sequential(nn.Linear(4, 3)), n=1), forward=Plain())
    system, psi, phi = pieces(task, ONCE, DataInf(0.1))
    lam = 0.1 * phi.square().sum() / phi.shape[1]
    eye = torch.eye(phi.shape[1], dtype=phi.dtype)
    close(system.kernel(), psi @ torch.linalg.inv(phi.T @ phi + lam * eye) @ phi.T, 1e-12)


def test_datainf_of_dead_layers(tmp_path):
    """A layer without training gradients changes no score; where all are, an error."""

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    task = replace(net_task(tmp_path, Idle), forward=Plain())
    close(scores(task, ONCE, DataInf(0.1)), scores(task, replace(ONCE, parameters="used"), DataInf(0.1)))
    with refuses("all training features are zero"):
        scores(task, replace(ONCE, parameters="idle"), DataInf(0.1))
    with refuses("DataInf needs unprojected gradients of one output"):
        scores(task, replace(ONCE, output=outputs.probes(2)), DataInf(0.1))


# ----------------------------------------------------------------------------------------------------- Hessian


def true_hessian(task: Task, output: Output) -> Tensor:
    net = task.trajectory[-1].load().double()
    names, start = (
        [name for name, _ in net.named_parameters()],
        torch.cat([p.detach().flatten() for p in net.parameters()]),
    )
    sizes, shapes = [p.numel() for p in net.parameters()], [p.shape for p in net.parameters()]
    batch = task.train.batch(range(len(task.train)))
    batch = batch.to("cpu", torch.float64)

    def total(theta: Tensor) -> Tensor:
        weights = {k: v.reshape(s) for k, v, s in zip(names, theta.split(sizes), shapes, strict=True)}
        prediction, target = task.forward(lambda *a: functional_call(net, weights, a), batch, None)
        return output.value(prediction, target).sum()

    return hessian(total, start)


def test_hessian_scores_equal_an_explicit_inverse(task):
    part = part_of(task)
    H = true_hessian(task, part.outputs[0])
    lowest = float(torch.linalg.eigvalsh(H)[0])
    assert lowest < -1e-3, "a network, not at its minimum"
    damping = -2 * lowest
    system, psi, phi = pieces(task, part, Hessian(damping, absolute=True))
    inverse = torch.linalg.inv(H + damping * torch.eye(len(H), dtype=H.dtype))
    close(system.kernel(), psi @ inverse @ phi.T)
    close(system.train_square(), (phi @ inverse).square().sum(1))
    close(system.query_self(), (psi @ inverse * psi).sum(1))
    with refuses("not positive definite", accepted="Gauss-Newton, or a damping above"):
        scores(task, part, Hessian(-0.9 * lowest, absolute=True))


def test_hessian_of_a_linear_model_is_gauss_newton(tmp_path):
    task = replace(net_task(tmp_path, lambda: nn.Linear(4, 3)), forward=Plain())
    close(scores(task, ONCE, Hessian(0.01)), scores(task, ONCE, GaussNewton(0.01)), 1e-9)


# ------------------------------------------------------------------------------------------------------ SOURCE


def quadratic(segments: int, per_segment: int, eta: float = 0.05, K: int = 40) -> float:
    """Gradient descent on (1/n) sum_i w_i (1/2) (a_i . theta - y_i)^2 (d = 5, n = 30): relative error of the
    segments against the derivative by w_i of the explicit run, with gradients at some checkpoints of each segment."""
    d, n = 5, 30
    g = torch.Generator().manual_seed(0)
    a, y, psi = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((n, d), (n,), (4, d)))
    a *= torch.logspace(0.4, -0.4, d)
    path = []

    def run(w: Tensor) -> Tensor:
        theta = torch.zeros(d, dtype=torch.float64)
        for _ in range(K):
            path.append(theta.detach())
            theta = theta - eta / n * ((a @ theta - y) * w) @ a
        return theta

    exact = -psi @ torch.autograd.functional.jacobian(run, torch.ones(n, dtype=torch.float64))
    values, Q = torch.linalg.eigh(a.T @ a / n)
    block = Block("theta", ("theta",), slice(0, d), None, (1, d))
    eigen = Eigen(block, Q, torch.ones(1, 1, dtype=torch.float64), values[None])
    parts = np.array_split(np.arange(K), segments)
    every = [Segment((), (eigen,), eta * len(part)) for part in parts]
    found = torch.zeros_like(exact)
    for part, x in zip(parts, backwards(psi, every), strict=True):
        last = [piece[-1] for piece in np.array_split(part, min(per_segment, len(part)))]
        mean = torch.stack([(a @ path[k] - y)[:, None] * a for k in last]).mean(0)
        found += x @ mean.T / n
    return float((found - exact).norm() / exact.norm())


def test_source_of_a_quadratic():
    """Relative errors .035, .023, .015, .0056 of 1, 2, 4, 40 segments with one checkpoint each, .033, .0098, .0064, .0056
    with gradients of every step. What is left then is exp(-eta s) for 1 - eta s: half as much at half the rate."""
    for each in (1, 40):
        errors = [quadratic(count, each) for count in (1, 2, 4, 40)]
        assert errors == sorted(errors, reverse=True)
        assert 0.02 < errors[0] < 0.05
        assert errors[3] < 0.006
    assert quadratic(2, 40) < 0.5 * quadratic(2, 1)
    assert quadratic(80, 1, eta=0.025, K=80) == pytest.approx(quadratic(40, 1) / 2, rel=0.05)


def test_source_functions_at_their_ends():
    values = torch.tensor([0.0, 1e-18, 0.3, 1e6], dtype=torch.float64)
    np.testing.assert_allclose(gained(2.0, values), [2, 2, (1 - np.exp(-0.6)) / 0.3, 1e-6], rtol=1e-12)
    close(forgotten(2.0, values), torch.exp(-2 * values), 1e-12)


def test_source_is_its_formula(tmp_path):
    """Two segments of one checkpoint, and one of two: dense matrices, their exponentials, sums by hand."""
    task, factors = classifier_task(tmp_path), Factors(skip_others=True)
    part = Gradient(outputs.cross_entropy, once())
    first, second = task.trajectory
    phi = [rows(part, task, point, task.train, "x").all() for point in (first, second)]
    psi = rows(part, task, second, task.queries, "x").all()
    S = [3 * 0.2, 9 * (0.2 + 0.05) / 2]  # steps 3 and 12
    assert rate_sums(task, divide(task, 2)) == pytest.approx(S)
    assert rate_sums(task, divide(task, 1)) == pytest.approx([sum(S)])

    def matrix(points: list[Any]) -> tuple[Tensor, Tensor]:
        """The curvature of all blocks and the projector on their parameters, by pushing unit vectors through."""
        eye = torch.eye(psi.shape[1], dtype=psi.dtype)
        total, kept = torch.zeros_like(eye), torch.zeros_like(eye)
        for eigen in curvature(task, part, points, factors):
            moved, same = torch.zeros_like(eye), torch.zeros_like(eye)
            eigen.block.scatter(eigen.back(eigen.rotate(eye) * eigen.values.flatten()), moved)
            eigen.block.scatter(eigen.block.gradient(eye), same)
            total, kept = total + moved, kept + same
        return total, kept

    def carried(F: Tensor, kept: Tensor, S: float) -> tuple[Tensor, Tensor]:
        """exp(-S F) and the integral of exp(-s F) over s in [0, S], by one exponential of twice the size."""
        zero = torch.zeros_like(F)
        both = torch.linalg.matrix_exp(S * torch.cat([torch.cat([-F, kept], 1), torch.cat([zero, zero], 1)]))
        half = len(F)
        return kept @ both[:half, :half], both[:half, half:]

    (B1, I1), (B2, I2) = (carried(*matrix([p]), s) for p, s in zip((first, second), S, strict=True))
    assert B1.shape == B2.shape
    found = Source("source", part, segments=2)(task)
    close(found.values, (psi @ I2 @ phi[1].T + psi @ B2 @ I1 @ phi[0].T) / len(task.train), 1e-9)
    _, whole_run = carried(*matrix([first, second]), 2 * sum(S))
    found = Source("source", part, segments=1, factor=2.0)(task)
    close(found.values, psi @ whole_run @ (phi[0] + phi[1]).T / 2 / len(task.train), 1e-9)
    assert found.scale == "rank", "on trained networks its scores are a fifth of the rise (benchmarks/scale.py)"


@dataclass(frozen=True)
class Known:
    recipe: Recipe


def test_rates_of_a_known_training_are_summed_exactly(tmp_path):
    task, training = classifier_task(tmp_path), recipe_of(steps=12, learning_rate=0.2, warmup_steps=2)
    task = replace(task, study=Known(training), trajectory=[replace(p, rate=None) for p in task.trajectory])
    rates = [training.rate_at(step) for step in range(12)]
    assert rate_sums(task, divide(task, 2)) == pytest.approx([sum(rates[:3]), sum(rates[3:])])


def test_runs_that_cannot_be_divided_are_refused(tmp_path):
    task = classifier_task(tmp_path)
    first, second = task.trajectory
    method = source(outputs.cross_entropy, once())

    def refused(what: str, *points: Any, accepted: str = "", segments: int = 2) -> None:
        with refuses(what, accepted=accepted):
            replace(method, segments=segments)(replace(task, trajectory=points))

    few = "3 segments ... need at least as many checkpoints ... only checkpoint-3, checkpoint-12"
    refused(few, first, second, segments=3)
    refused("2 segments ... only checkpoint-12", second)
    refused("there is only final", replace(first, step=None, name="final"), segments=1)
    refused("steps [12, 3]", second, first, accepted="those of one run")
    refused("checkpoint-3 does not say its learning rate", replace(first, rate=None), second)
    refused("up to checkpoint-3 sum to 0", replace(first, rate=0.0), second, accepted="above 0")
    with refuses("segments=0, factor=1.0", accepted="1 segment or more, and a factor above 0"):
        source(segments=0)


# ------------------------------------------------------------------------------------------------- linear world


@pytest.mark.parametrize(
    ("name", "settings", "least"),
    [
        ("k_fac", {"damping": 0.01}, 0.95),
        ("ek_fac", {"damping": 0.01}, 0.95),
        ("ek_fac_refined", {"damping": 0.01}, 0.95),
        ("influence_cg", {"damping": 0.01}, 0.95),
        ("influence_lissa", {"damping": 0.01}, 0.95),
        ("source", {"segments": 1, "factor": 1e4}, 0.95),
        ("datainf", {"damping": 0.1}, 0.5),
    ],
)
def test_lds_of_the_linear_world(linear, name, settings, least):
    """At a small damping, which training runs as long as those of SOURCE are too, all that have the curvature of this world
    come near exact influence. DataInf has the empirical Fisher, which is another one."""
    task, masks, retrained = linear
    task = replace(task, study=None)  # the rates of its checkpoints
    value = float(np.mean(lds(build(name, task.forward, {"draws": DRAWS, **settings})(task).values, masks, retrained)))
    assert value >= least


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> tuple[Task, np.ndarray, np.ndarray]:
    world, masks = linear_world(n=120, m=8, dim=6), half_masks(128, 120)
    return world.task(tmp_path_factory.mktemp("linear")), masks, world.retrained(masks)
