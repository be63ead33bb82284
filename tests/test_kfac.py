"""K-FAC and EK-FAC against the dense Gauss-Newton matrix of small networks, factor by factor and score by score.

Eigenvectors are never compared (their signs and degenerate spaces are free), only Q diag(Lambda) Q^T and scores. Images
are anisotropic and dampings small, because isotropic data hide a rotation by Q instead of Q^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint as rerun

from errors import refuses
from whence.curvature import factors as fitting
from whence.curvature import pcg
from whence.curvature.exact import GaussNewton
from whence.curvature.factors import Factors, basis, eigenvalues, expand, fit_factors, reduce
from whence.curvature.kfac import EKFAC, KFAC, Eigen
from whence.curvature.layers import backward, layer_parameters, recording, sides
from whence.curvature.solve import Problem
from whence.data.images import TensorImages, subset
from whence.diffusion import draws, outputs
from whence.diffusion.draws import Draws, Even, uniform
from whence.diffusion.forward import Denoiser, MinSNR
from whence.diffusion.outputs import Output
from whence.evaluation.lds import lds
from whence.features.parts import Gradient
from whence.features.projections import Rademacher
from whence.features.rows import prepare, rows
from whence.methods import normalize
from whence.methods.curvature import ek_fac, k_fac
from whence.methods.inner_product import InnerProduct
from whence.types import Batch, Draw, Engine, Task
from worlds import DRAWS, LinearWorld, checkpoint, classifier_task, half_masks, linear_world, tensors, unet_task

EXACT = Factors(samples=None)

# ---------------------------------------------------------------------------------------------------------- the networks


@dataclass(frozen=True)
class Regression:
    """prediction = net(x0); the draws are ignored."""

    timesteps: int = 1
    alphas_cumprod = None
    models = "any"
    prediction_type = "epsilon"
    density = Even()

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones(len(t))

    def __call__(self, call: Callable[..., Tensor], batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        prediction = call(batch.x0)
        return prediction, torch.zeros_like(prediction)


def anisotropic(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Correlated images whose directions differ in scale by a factor of 30."""
    g = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape))
    mixing = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q
    mixing = mixing * torch.logspace(0.5, -1, size, dtype=torch.float64)
    return (0.3 + torch.randn(n, size, generator=g, dtype=torch.float64) @ mixing.T).reshape(n, *shape)


def task_of(
    root: Path, make: Callable[[], nn.Module], forward: Any, *shape: int, n: int = 4, m: int = 2, **engine: Any
) -> Task:
    """A network with random weights; float64."""

    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make().double()

    x0 = anisotropic(n + m, *shape)
    point = (checkpoint(seeded, type(make()).__name__),)
    settings = {"dtype": torch.float64, **engine}
    return Task(forward, point, tensors(x0[:n], "train"), tensors(x0[n:], "query"), root, Engine(**settings))


class ConvNet(nn.Module):
    """conv -> GroupNorm -> tanh -> the same Linear at every pixel -> tanh -> conv, with a time scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.GroupNorm(1, 2)
        self.pixel = nn.Linear(2, 3)
        self.last = nn.Conv2d(3, 1, 2, padding="same", bias=False)

    def layers(self, x: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(input, output) of first, pixel and last: the forward pass written out."""
        one = self.first(x)
        h = torch.tanh(self.norm(one) * (1 + t.to(x)[:, None, None, None])).permute(0, 2, 3, 1)
        two = self.pixel(h)
        back = torch.tanh(two).permute(0, 3, 1, 2)
        return [(x, one), (h, two), (back, self.last(back))]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(x, t)[-1][1]


FORWARD = Denoiser(torch.linspace(0.9, 0.2, 3, dtype=torch.float64))
CONV = layer_parameters(ConvNet())


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return task_of(tmp_path, ConvNet, FORWARD, 1, 3, 3)


def part_of(output: Output = outputs.loss, parameters: str = CONV, count: int = 3) -> Gradient:
    return Gradient(output, uniform(count), parameters=parameters)


def problem_of(task: Task, part: Gradient | None = None) -> Problem:
    return Problem(task, task.trajectory[-1], part or part_of())


# ------------------------------------------------------------------------------------------------------------ the truth


def samples_of(task: Task, draws: Draws) -> list[tuple[Batch, Draw]]:
    """Every (image, draw) as a batch of one."""
    found = []
    for i in range(len(task.train)):
        batch = task.train.batch([i]).to("cpu", task.engine.dtype)
        every = draws(batch.keys, batch.x0.shape[1:], task.forward.timesteps, batch.x0.dtype)
        found += [(batch, Draw(every.t[:, s], every.noise[:, s])) for s in range(draws.count)]
    return found


def net_of(task: Task) -> nn.Module:
    return prepare(task.trajectory[-1], task.engine)


def jacobians(task: Task, part: Gradient) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Of every (image, draw): J by parameter [D, numel], and the curvature of the measure in the prediction [D, D]."""
    net, (output,) = net_of(task), part.outputs
    weights = {name: p.detach() for name, p in net.named_parameters() if name in part.sizes(net)}
    found = []
    for batch, draw in samples_of(task, part.draws):

        def predict(w: dict[str, Tensor], batch: Batch = batch, draw: Draw = draw) -> Tensor:
            return task.forward(lambda *x: functional_call(net, w, x), batch, draw)[0].flatten()

        with torch.no_grad():
            J = {name: j.flatten(1) for name, j in jacrev(predict)(weights).items()}
        prediction, target = task.forward(net, batch, draw)
        prediction = prediction.detach()

        def value(p: Tensor, y: Tensor = target, t: Tensor = draw.t, shape: Any = prediction.shape) -> Tensor:
            return output.of(p.reshape(shape), y, t, task.forward)[0]

        found.append((J, torch.autograd.functional.hessian(value, prediction.flatten())))
    return found


def gauss_newton(task: Task, part: Gradient, eigen: Eigen, every: list[Any] | None = None) -> Tensor:
    """The block of F: mean over images and draws of J^T H J, with the parameters ordered as G.flatten(), [d_o d_i]^2."""
    total: Tensor | float = 0.0
    every = jacobians(task, part) if every is None else every
    for J, H in every:
        G = torch.cat([J[name].reshape(len(H), eigen.block.shape[0], -1) for name in eigen.block.names], dim=2).flatten(
            1
        )
        total = total + G.T @ H @ G / len(every)
    assert isinstance(total, Tensor)
    return total


def dense(eigen: Eigen, values: Tensor | None = None) -> Tensor:
    """(Q_B (x) Q_A) diag(Lambda) (Q_B (x) Q_A)^T."""
    Q = torch.kron(eigen.QB, eigen.QA)
    return Q @ torch.diag((eigen.values if values is None else values).flatten()) @ Q.T


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Entry by entry, relative to the largest."""
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=tolerance)


def naive_factors(task: Task, part: Gradient, layer: int, sharing: str, joint: bool) -> tuple[Tensor, Tensor]:
    """A and B of a layer of ConvNet with all directions of the prediction, from loops over pixels."""
    net = net_of(task)
    assert isinstance(net, ConvNet)
    A, B, every = torch.zeros(()), torch.zeros(()), samples_of(task, part.draws)
    for batch, draw in every:
        signal = FORWARD.alphas_cumprod[draw.t][0]
        x = signal.sqrt() * batch.x0 + (1 - signal).sqrt() * draw.noise
        record = net.layers(x, draw.t)
        inputs, output = record[layer]
        a = patches(layer, inputs[0])
        a = torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1) if joint else a
        a = a.mean(0, keepdim=True) if sharing == "reduce" else a
        A = A + sum(torch.outer(row, row) for row in a) / len(a) / len(every)
        for value in record[-1][1].flatten():
            (g,) = torch.autograd.grad(value * (2 / 9) ** 0.5, output, retain_graph=True)
            s = g[0].reshape(-1, g.shape[-1]) if layer == 1 else g[0].flatten(1).T
            s = s.sum(0, keepdim=True) if sharing == "reduce" else s
            B = B + sum(torch.outer(row, row) for row in s) / len(every)
    return A.detach(), B


def patches(layer: int, x: Tensor) -> Tensor:
    """Rows that the weight multiplies, pixel by pixel. The 2x2 kernel with padding "same" pads on the right and below."""
    if layer == 1:
        return x.reshape(-1, x.shape[-1])
    k, before = (3, 1) if layer == 0 else (2, 0)
    padded = torch.zeros(len(x), 5, 5, dtype=x.dtype)
    padded[:, before : before + 3, before : before + 3] = x
    return torch.stack([padded[:, i : i + k, j : j + k].flatten() for i in range(3) for j in range(3)])


# -------------------------------------------------------------------------------------------- factors and eigenvalues (O1)

NAMES = (("first.weight", "first.bias"), ("pixel.weight", "pixel.bias"), ("last.weight",))


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("sharing", [expand, reduce], ids=["expand", "reduce"])
def test_factors_equal_a_loop_over_pixels(task, sharing, joint):
    fit = fit_factors(problem_of(task), Factors(sharing, samples=None, joint_bias=joint))
    found = fitting.factors(fit)
    assert len(found) == 2 * len(fit.blocks) == (6 if joint else 10)
    for number, names in enumerate(NAMES):
        with_bias = joint and len(names) == 2
        A, B = naive_factors(task, part_of(), number, sharing.__name__, with_bias)
        name = "+".join(names) if with_bias else names[0]
        close(found[f"A {name}"], A)
        close(found[f"B {name}"], B)
        if not joint and len(names) == 2:
            assert found[f"A {names[1]}"].tolist() == [[1.0]]
            close(found[f"B {names[1]}"], B)


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("sharing", [expand, reduce], ids=["expand", "reduce"])
def test_ekfac_is_the_diagonal_of_gauss_newton_in_the_basis_of_the_factors(task, sharing, joint):
    """Also O4: its trace is that of the Gauss-Newton block. 24 draws, so that no A is singular: the basis of a null space
    is arbitrary."""
    problem = problem_of(task, part_of(count=6))
    every = jacobians(task, problem.part)
    for eigen in EKFAC(0.1, factors=Factors(sharing, samples=None, joint_bias=joint)).curvature(problem):
        F = gauss_newton(task, problem.part, eigen, every)
        number = next(i for i, names in enumerate(NAMES) if eigen.block.names[0] in names)
        A, B = naive_factors(task, problem.part, number, sharing.__name__, eigen.block.bias is not None)
        if eigen.block.weight is None:
            A = torch.ones(1, 1, dtype=torch.float64)
        Q = torch.kron(torch.linalg.eigh(B).eigenvectors, torch.linalg.eigh(A).eigenvectors)
        close(dense(eigen), Q @ torch.diag((Q.T @ F @ Q).diagonal()) @ Q.T, 1e-9)
        assert float(eigen.values.sum()) == pytest.approx(float(F.trace()), rel=1e-10)


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_scores_equal_an_explicit_inverse(task, method):
    """psi^T (n (Q diag(Lambda) Q^T + lambda))^-1 phi and the other pieces, block by block; dampings of 1e-4 and 0.1 of the
    mean eigenvalue, and absolute ones."""
    problem = problem_of(task)
    phi = rows(problem.part, task, problem.checkpoint, task.train, "train")
    psi = rows(problem.part, task, problem.checkpoint, task.queries, "queries").all()
    for damping, absolute in ((1e-4, False), (0.1, False), (1e-6, True)):
        precondition = method(damping, absolute, EXACT)
        (system,) = precondition.solve(problem, phi, psi, [None])
        expected = explicit(precondition.curvature(problem), phi.all(), psi, damping, absolute)
        for name, value in expected.items():
            close(getattr(system, name)(), value, 1e-8)


def explicit(curvature: Sequence[Eigen], phi: Tensor, psi: Tensor, damping: float, absolute: bool) -> dict[str, Tensor]:
    n, H, order = len(phi), [], []
    for eigen in curvature:
        unit = 1.0 if absolute else float(eigen.values.mean())
        H.append(len(phi) * (dense(eigen) + unit * damping * torch.eye(eigen.values.numel(), dtype=torch.float64)))
        index = torch.arange(phi.shape[1])[None]
        order.append(eigen.block.gradient(index).flatten())
    inverse, at = torch.linalg.inv(torch.block_diag(*H)), torch.cat(order)
    assert sorted(at.tolist()) == list(range(phi.shape[1]))
    assert n == len(phi)
    phi, psi = phi[:, at], psi[:, at]
    return {
        "kernel": psi @ inverse @ phi.T,
        "train_self": (phi @ inverse * phi).sum(1),
        "train_square": (phi @ inverse).square().sum(1),
        "query_self": (psi @ inverse * psi).sum(1),
        "train_norm": phi.norm(dim=1),
    }


@pytest.mark.parametrize(
    "output", [outputs.loss, outputs.elbo, outputs.weighted, outputs.squared_norm], ids=lambda o: o.name
)
def test_curvature_of_denoiser_outputs(task, output):
    """Weights of the output are in it (those of min-SNR in `weighted`), targets are not: the trace of every block against
    the dense one."""
    task = replace(task, forward=replace(task.forward, weighting=MinSNR(0.5)))
    problem = problem_of(task, part_of(output))
    for eigen in EKFAC(0.1, factors=EXACT).curvature(problem):
        assert float(eigen.values.sum()) == pytest.approx(
            float(gauss_newton(task, problem.part, eigen).trace()), rel=1e-10
        )


def test_curvature_of_a_classifier(tmp_path):
    task = classifier_task(tmp_path)
    part = Gradient(outputs.cross_entropy, draws.once(), parameters="conv|head")
    for eigen in EKFAC(0.1, factors=EXACT).curvature(problem_of(task, part)):
        F = gauss_newton(task, part, eigen)
        Q = torch.kron(eigen.QB, eigen.QA)
        close(eigen.values.flatten(), (Q.T @ F @ Q).diagonal())


# ------------------------------------------------------------------------------------------- where K-FAC is exact (O2, O3)


class Tokens(nn.Module):
    """Two linear layers applied to each token; the mean over tokens where `pooled`."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled, self.one, self.two = pooled, nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x))
        return y.mean(1) if self.pooled else y


@pytest.mark.parametrize("pooled", [False, True], ids=["per token", "pooled"])
@pytest.mark.parametrize("sharing", [expand, reduce], ids=["expand", "reduce"])
def test_kfac_is_exact_for_linear_networks(tmp_path, pooled, sharing):
    """Expand where every token has its loss, reduce where they are pooled; and neither where the other is."""
    task = task_of(tmp_path, lambda: Tokens(pooled), Regression(), 5, 3, n=6)
    part = Gradient(outputs.loss, draws.once())
    curvature = KFAC(0.1, factors=Factors(sharing, samples=None)).curvature(problem_of(task, part))
    errors = []
    for eigen in curvature:
        F = gauss_newton(task, part, eigen)
        errors.append(float((dense(eigen) - F).norm() / F.norm()))
    if pooled == (sharing is reduce):
        assert max(errors) < 1e-12
    else:
        assert min(errors) > 0.1


# ----------------------------------------------------------------------------------------------------- Monte Carlo (O4, O5)


def test_one_draw_of_one_image(tmp_path):
    """O4: Lambda is the squared rotated gradient of <prediction, v>, v from the documented stream."""
    from whence.diffusion.noise import normals, seed_for, stream

    task = task_of(tmp_path, ConvNet, FORWARD, 1, 3, 3, n=1)
    problem = problem_of(task, part_of(count=1))
    (batch, draw), net = samples_of(task, problem.part.draws)[0], net_of(task)
    seed = seed_for(seed_for(7, "eigenvalues"), "pseudo-gradient 0")
    v = normals(stream(seed, 0, batch.keys), batch.x0.shape[1:], torch.float64) * (2 / 9) ** 0.5
    prediction, _ = task.forward(net, batch, draw)
    for eigen in EKFAC(0.1, factors=Factors(seed=7)).curvature(problem):
        weights = [net.get_parameter(name) for name in eigen.block.names]
        G = torch.cat(
            [g.reshape(eigen.block.shape[0], -1) for g in torch.autograd.grad(prediction, weights, v, True)], 1
        )
        close(eigen.values, (eigen.QB.T @ G @ eigen.QA).square(), 1e-9)


WORLDS: dict[str, Callable[[Path], tuple[Task, Gradient]]] = {
    "denoiser": lambda root: (task_of(root, ConvNet, FORWARD, 1, 3, 3), part_of()),
    "classifier": lambda root: (
        classifier_task(root),
        Gradient(outputs.cross_entropy, draws.once(), parameters="conv|head"),
    ),
}


@pytest.mark.parametrize("world", WORLDS)
def test_monte_carlo_converges_to_all_directions(tmp_path, world):
    """O5: without bias, and with an error that falls as 1/sqrt(samples), for B and for Lambda in one basis."""
    task, part = WORLDS[world](tmp_path)
    problem = problem_of(task, part)
    true = fit_factors(problem, EXACT)
    Q = basis(true)
    expected = {**fitting.factors(true), **eigenvalues(true, Q, part.draws)}

    def error(samples: int) -> float:
        squares = []
        for seed in range(3):
            fit = fit_factors(problem, Factors(samples=samples, seed=seed))
            found = {**fitting.factors(fit), **eigenvalues(fit, Q, part.draws)}
            errors = [float((found[name] - e).norm() / e.norm()) for name, e in expected.items() if name[:2] != "A "]
            squares.append(np.mean(np.square(errors)))
        return float(np.mean(squares)) ** 0.5

    few, many = error(4), error(64)
    assert (
        2.5 < few / many < 8
    )  # 4 by the law, 1 where samples are not independent and 16 where errors fall as 1/samples
    assert many < 0.15


def test_pseudo_gradients_belong_to_the_image(task):
    """The factors of a set are the mean of those of its images: no image's noise depends on the others."""
    problem = problem_of(task)
    together = fitting.factors(fit_factors(problem, Factors()))
    alone = []
    for i in range(len(task.train)):
        one = replace(task, train=subset(task.train, [i]))
        alone.append(fitting.factors(fit_factors(Problem(one, problem.checkpoint, problem.part), Factors())))
    for name, value in together.items():
        close(value, torch.stack([found[name] for found in alone]).mean(0), 1e-12)


def test_settings_change_the_noise_they_name(task):
    problem = problem_of(task)
    plain = fitting.factors(fit_factors(problem, Factors()))
    for other in (Factors(seed=1), Factors(samples=2), Factors(draws=uniform(3, seed=1))):
        name = "B pixel.weight+pixel.bias"
        assert not torch.allclose(fitting.factors(fit_factors(problem, other))[name], plain[name], rtol=1e-3)
    values = EKFAC(0.1).curvature(problem)[0].values
    again = EKFAC(0.1, draws=uniform(3, seed=1)).curvature(problem)[0].values
    assert not torch.allclose(values, again, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ the layers

CONVS = {
    "stride": {"stride": 2},
    "stride, kernel": {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"padding": "same", "kernel_size": (2, 3)},
    "valid": {"padding": "valid"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect, same": {"padding": "same", "padding_mode": "reflect"},
    "pointwise": {"kernel_size": 1},
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("settings", CONVS.values(), ids=list(CONVS))
def test_inputs_and_output_gradients_give_the_gradient_of_each_draw(settings, memory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, **{"kernel_size": 3, **settings}), nn.ReLU(inplace=True), nn.Flatten()).double()
    x = anisotropic(4, 2, 5, 5).contiguous(memory_format=memory)
    with recording({"0": net[0]}) as calls:
        prediction = net(x)
    v = torch.randn_like(prediction)
    a, s = sides("0", net[0], calls["0"], backward(prediction, calls, v, keep=True)["0"], 4)
    for b in range(4):
        probe = torch.zeros_like(v)
        probe[b] = v[b]
        weight, bias = torch.autograd.grad(prediction, [net[0].weight, net[0].bias], probe, retain_graph=True)
        close(s[:, b] @ a[:, b].T, torch.cat([weight.flatten(1), bias[:, None]], dim=1))


def test_all_orders_of_rotation_agree():
    """The four ways to form Q_B^T G Q_A, and the short one for a single position."""
    g = torch.Generator().manual_seed(0)
    for d_i, d_o, positions in ((3, 4, 2), (9, 4, 6), (4, 9, 6), (3, 4, 20), (5, 6, 1), (1, 6, 1), (6, 1, 1)):
        a = torch.randn(d_i, 7, positions, generator=g, dtype=torch.float64)
        s = torch.randn(d_o, 7, positions, generator=g, dtype=torch.float64)
        QA, QB = (torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q for d in (d_i, d_o))
        expected = sum((QB.T @ s[:, b] @ a[:, b].T @ QA).square() for b in range(7))
        close(fitting.squares(a, s, QA, QB), expected)


class Twice(nn.Module):
    """One Linear applied twice, and once more to something that does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.layer(x + 1)
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_used_twice(tmp_path):
    """Its gradients are summed before squaring: Lambda is the diagonal of the true block, not of two."""
    task = task_of(tmp_path, Twice, Regression(), 4, n=6)
    part = Gradient(outputs.loss, draws.once())
    (eigen,) = EKFAC(0.1, factors=EXACT).curvature(problem_of(task, part))
    F, Q = gauss_newton(task, part, eigen), torch.kron(eigen.QB, eigen.QA)
    close(eigen.values.flatten(), (Q.T @ F @ Q).diagonal())


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

        return inner(x) if self.reentrant is None else rerun(inner, x, use_reentrant=self.reentrant)


def test_gradient_checkpointing(tmp_path):
    """It runs the layers again in the backward pass, which must not count twice."""

    def curvature(reentrant: bool | None) -> list[Eigen]:
        task = task_of(tmp_path / str(reentrant), lambda: Checkpointed(reentrant), Regression(), 4)
        return EKFAC(0.1, factors=EXACT).curvature(problem_of(task, Gradient(outputs.loss, draws.once())))

    for found, expected in zip(curvature(False), curvature(None), strict=True):
        close(dense(found), dense(expected))
    with refuses("layer 'one' runs without gradients ... switch gradient checkpointing off"):
        curvature(True)


class Bypassed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.one(x)), self.two.weight)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y - y.mean(0)


class Swapped(Mixing):
    """Tokens first: the rows of the input are no draws."""

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.reshape(len(x), 2, 4).transpose(0, 1).reshape(-1, 4)).reshape(2, len(x), 3).transpose(0, 1)


class Lookup(Mixing):
    """A table that all rows share."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] * self.one(torch.ones(3, 4, dtype=x.dtype))[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plain = nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.conv(x))


LAYERS = "`parameters` of Linear and Conv2d layers"
REFUSED: dict[str, tuple[Any, ...]] = {  # a network, the shape of its images, what is wrong, what is accepted
    "bypassed": (Bypassed, (4,), "layer 'two': its inputs ...F.linear"),
    "changed": (lambda: nn.Sequential(Scaled(4, 3)), (4,), "layer '0': its inputs and output gradients do not give"),
    "mixing": (Mixing, (4,), "layer 'one' mixes the rows of a batch"),
    "swapped": (Swapped, (8,), "layer 'one' mixes the rows of a batch"),
    "shared input": (Lookup, (4,), "layer 'one': the first axis of its input [3, 4] is not the batch of 4"),
    "tied": (Tied, (4,), "one.weight and two.weight are one tied parameter"),
    "grouped": (Grouped, (2, 4, 4), "no Kronecker factors for 'conv.weight' of a Conv2d with 2 groups", LAYERS),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), (4,), "'1.weight' of a LayerNorm"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 1, 3)), (2, 4), "'0.weight' of a Conv1d"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_networks_without_factors_are_refused(tmp_path, name):
    make, shape, what, *accepted = REFUSED[name]
    task = task_of(tmp_path, make, Regression(), *shape)
    with refuses(what, accepted="".join(accepted)):
        EKFAC(0.1).curvature(problem_of(task, Gradient(outputs.loss, draws.once())))


def test_features_and_outputs_without_factors_are_refused(task):
    good = part_of()

    def fit(part: Gradient, settings: Factors = Factors()) -> None:
        fit_factors(problem_of(task, part), settings)

    with refuses("unprojected gradients of one output (dim=None)"):
        fit(replace(good, projection=Rademacher(4)))
    with refuses("unprojected gradients of one output"):
        fit(replace(good, output=outputs.probes(2)))
    with refuses(accepted="unit=False"):
        fit(replace(good, draws=uniform(3, unit=True)))
    with refuses("output 'mean'", accepted="loss, elbo, weighted, squared_norm, cross_entropy"):
        fit(replace(good, output=outputs.mean))
    with refuses("this model is a denoiser"):
        fit(replace(good, output=outputs.cross_entropy))
    with refuses("samples=0", accepted="1 or more"):
        fit(good, Factors(samples=0))
    for damping in (0.0, -1.0, float("nan")):
        with refuses("above 0 and finite"):
            EKFAC(damping)
    with refuses("none of the chosen ... 'norm.weight') belongs to a Linear layer"):
        EKFAC(0.1, factors=Factors(skip_others=True)).curvature(problem_of(task, part_of(parameters="norm")))


def test_other_parameters_stay_outside(task):
    """Left out of curvature and inner product by skip_others, which equals not choosing them; refused without it."""
    everything = part_of(parameters="all")
    with refuses("'norm.weight' of a GroupNorm", accepted="skip_others=True"):
        EKFAC(0.1).curvature(problem_of(task, everything))
    skipping = InnerProduct(everything, precondition=EKFAC(0.1, factors=Factors(skip_others=True)))
    choosing = InnerProduct(part_of(), precondition=EKFAC(0.1))
    close(skipping(task).values, choosing(task).values)
    named = ["first.weight", "first.bias", "pixel.weight", "pixel.bias", "last.weight"]
    assert list(part_of(parameters=layer_parameters(net_of(task))).sizes(net_of(task))) == named
    assert list(part_of(parameters=layer_parameters(net_of(task), "pixel")).sizes(net_of(task))) == named[2:4]
    with refuses("none of them belongs to a Linear layer or a Conv2d without groups"):
        layer_parameters(net_of(task), "norm")


@pytest.mark.parametrize("chosen", ["first.weight", "first.bias", "pixel"])
def test_some_parameters_are_their_own_block(task, chosen):
    """Weight without bias, bias without weight: the block of those alone."""
    problem = problem_of(task, part_of(parameters=chosen))
    (eigen,) = EKFAC(0.1, factors=EXACT).curvature(problem)
    F, Q = gauss_newton(task, problem.part, eigen), torch.kron(eigen.QB, eigen.QA)
    assert eigen.values.numel() == sum(problem.part.sizes(net_of(task)).values())
    close(eigen.values.flatten(), (Q.T @ F @ Q).diagonal())


def test_a_unet_of_diffusers(tmp_path):
    """Attention, time embedding, skip connections: the trace of a block of each kind is that of the Gauss-Newton matrix."""
    task = unet_task(tmp_path, n=1, dtype=torch.float64)
    part = Gradient(
        outputs.loss, uniform(2), parameters=r"down.*(to_q|conv_in|time_emb_proj|conv_shortcut)\.(weight|bias)"
    )
    curvature = EKFAC(0.1, factors=EXACT).curvature(problem_of(task, part))
    net, traces = net_of(task), torch.zeros(len(curvature), dtype=torch.float64)
    weights = [[net.get_parameter(name) for name in eigen.block.names] for eigen in curvature]
    for batch, draw in samples_of(task, part.draws):
        for value in task.forward(net, batch, draw)[0].flatten():
            grads = torch.autograd.grad(value, [w for each in weights for w in each], retain_graph=True)
            found = iter(grads)
            traces += torch.stack([sum(next(found).square().sum() for _ in each) for each in weights]) * 2 / 16 / 2
    assert len(curvature) > 3
    close(torch.stack([eigen.values.sum() for eigen in curvature]) / traces, torch.ones(len(curvature)).double())


# ------------------------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("precondition", [KFAC(0.01), EKFAC(0.01, draws=uniform(5, seed=1))], ids=["kfac", "ekfac"])
def test_a_grid_of_dampings_equals_one_at_a_time(task, precondition):
    grid = [1e-6, 1e-3, 1.0]
    method = InnerProduct(part_of(), precondition=precondition)
    for damping, scores in zip(grid, method.grid(task, grid), strict=True):
        alone = replace(method, precondition=replace(precondition, damping=damping))(task)
        assert torch.equal(scores.values, alone.values)
        assert scores.recipe == alone.recipe


def test_batch_size_budget_and_order_do_not_change_a_bit_of_the_curvature(task, tmp_path):
    """Nor does an image's name; 70 draws need more than one pass per image."""
    part = part_of(count=70)
    expected = EKFAC(0.1).curvature(problem_of(task, part))
    variants = [
        replace(task, root=tmp_path / "1", engine=replace(task.engine, batch_size=1, budget=1)),
        replace(task, root=tmp_path / "2", train=subset(task.train, [2, 0, 3, 1])),
    ]
    for other in variants:
        for found, eigen in zip(EKFAC(0.1).curvature(problem_of(other, part)), expected, strict=True):
            assert torch.equal(found.values, eigen.values)
            assert torch.equal(found.QA, eigen.QA)


def test_permuting_the_training_images_permutes_the_columns(task):
    order = [2, 0, 3, 1]
    values = InnerProduct(part_of(), precondition=EKFAC(1e-3))(task).values
    permuted = InnerProduct(part_of(), precondition=EKFAC(1e-3))(replace(task, train=subset(task.train, order)))
    close(permuted.values, values[:, order], 1e-12)


def test_more_images_than_one_pass_takes(tmp_path):
    """A classifier's draws are single: 64 images stand in one pass, and the last pass is short."""
    part = Gradient(outputs.loss, draws.once())
    task = task_of(tmp_path, lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), Regression(), 4, n=67)
    for eigen in EKFAC(0.1, factors=EXACT).curvature(problem_of(task, part)):
        F, Q = gauss_newton(task, part, eigen), torch.kron(eigen.QB, eigen.QA)
        close(eigen.values.flatten(), (Q.T @ F @ Q).diagonal())


@pytest.mark.parametrize("precondition", [KFAC(1e12, True), EKFAC(1e12, True)], ids=["kfac", "ekfac"])
def test_a_large_damping_leaves_the_dot_product(task, precondition):
    problem = problem_of(task)
    phi = rows(problem.part, task, problem.checkpoint, task.train, "train")
    psi = rows(problem.part, task, problem.checkpoint, task.queries, "queries").all()
    (system,) = precondition.solve(problem, phi, psi, [None])
    close(system.kernel() * 1e12 * len(phi), psi @ phi.all().T)
    close(normalize.cosine(system), psi @ phi.all().T / psi.norm(dim=1)[:, None] / phi.all().norm(dim=1))


def test_float32_is_close_to_float64(task, tmp_path):
    """Sums, eigenvectors and products are float64 either way."""
    single = replace(task, root=tmp_path / "single", engine=replace(task.engine, dtype=torch.float32))
    method = InnerProduct(part_of(), precondition=EKFAC(0.01))
    close(method(single).values, method(task).values, 1e-3)


# ------------------------------------------------------------------------------------- conjugate gradients (O10)


def whole(task: Task, part: Gradient) -> Tensor:
    """F of all chosen parameters, cross terms between layers included: [d, d]."""
    every = jacobians(task, part)
    stacked = [(torch.cat([J[name] for name in part.sizes(net_of(task))], dim=1), H) for J, H in every]
    return torch.stack([J.T @ H @ J for J, H in stacked]).mean(0)


def exact_scores(task: Task, part: Gradient, damping: float) -> Tensor:
    """psi^T (n (F + lambda))^-1 phi with the whole F and an absolute lambda."""
    F = whole(task, part)
    point = task.trajectory[-1]
    phi, psi = (rows(part, task, point, images, "x").all() for images in (task.train, task.queries))
    return psi @ torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), phi.T) / len(phi)


@pytest.mark.parametrize("world", WORLDS)
def test_refinement_converges_to_the_whole_system(tmp_path, world):
    """The error falls with the steps, the first few take most of it, and it ends at rounding. psi^T x rises to psi^T H^-1
    psi with every step, as conjugate gradients have it. 1e-2 is small here: EK-FAC alone is wrong by its own size."""
    task, part = WORLDS[world](tmp_path)
    exact, problem = exact_scores(task, part, 1e-2), problem_of(task, part)
    phi = rows(part, task, problem.checkpoint, task.train, "train")
    psi = rows(part, task, problem.checkpoint, task.queries, "queries").all()
    errors, captured = [], []
    for steps in (0, 5, 20, 150):
        (system,) = EKFAC(1e-2, True, Factors(samples=8), refine=steps).solve(problem, phi, psi, [None])
        errors.append(float((system.kernel() - exact).norm() / exact.norm()))
        captured.append(system.query_self())
    assert errors[0] > 0.5
    assert errors[1] < 0.7 * errors[0]
    assert errors[2] < 0.3 * errors[1]
    assert errors[3] < 1e-8
    assert (captured[1] < captured[2]).all()
    assert (captured[2] < 1.001 * captured[3]).all()  # to what rounding leaves of conjugate directions


def test_refinement_takes_each_query_for_itself(task):
    method = InnerProduct(part_of(), precondition=EKFAC(1e-3, refine=6))
    values = method(task).values
    for j in range(2):
        close(method(replace(task, queries=subset(task.queries, [j]))).values, values[j : j + 1], 1e-9)
    grid = method.grid(task, [1e-3, 1.0])
    close(grid[0].values, values, 1e-12)
    alone = replace(method, precondition=EKFAC(1.0, refine=6))(task)
    close(grid[1].values, alone.values, 1e-12)


def test_refinement_of_a_large_damping_and_of_some_parameters(task):
    """lambda -> infinity leaves the dot product; parameters without factors stay outside here as well."""
    everything = part_of(parameters="all")
    skipping = Factors(skip_others=True)
    problem = problem_of(task, everything)
    phi = rows(everything, task, problem.checkpoint, task.train, "train")
    psi = rows(everything, task, problem.checkpoint, task.queries, "queries").all()
    (system,) = EKFAC(1e12, True, skipping, refine=2).solve(problem, phi, psi, [None])
    dot = InnerProduct(part_of())(task).values
    close(system.kernel() * 1e12 * len(phi), dot)
    plain = Factors()
    found = InnerProduct(everything, precondition=EKFAC(1e-3, factors=skipping, refine=4))(task).values
    close(found, InnerProduct(part_of(), precondition=EKFAC(1e-3, factors=plain, refine=4))(task).values)
    (unrefined,) = EKFAC(1e12, True, skipping).solve(problem, phi, psi, [None])
    for piece in ("query_self", "train_norm"):
        close(getattr(system, piece)(), getattr(unrefined, piece)(), 1e-9)
    with refuses("no self-influence of training images", accepted="refine=0"):
        normalize.relatif_loss(system)
    with refuses("refine=-1", accepted="a number of steps, or 0"):
        EKFAC(0.1, refine=-1)


def test_a_killed_refinement_goes_on(task, tmp_path, monkeypatch):
    """A product of the whole system is the work of a step; none is done twice, and more steps go on from fewer."""
    expected = InnerProduct(part_of(), precondition=EKFAC(1e-3, refine=5))(task).values
    task, product, products = replace(task, root=tmp_path / "killed"), pcg.product, []

    def dying(*arguments: Any) -> Tensor:
        products.append(1)
        if len(products) == 3:
            raise KeyboardInterrupt
        return product(*arguments)

    monkeypatch.setattr(pcg, "product", dying)
    with pytest.raises(KeyboardInterrupt):
        InnerProduct(part_of(), precondition=EKFAC(1e-3, refine=5))(task)
    InnerProduct(part_of(), precondition=EKFAC(1e-3, refine=4))(task)
    found = InnerProduct(part_of(), precondition=EKFAC(1e-3, refine=5))(task)
    assert len(products) == 6
    assert torch.equal(found.values, expected)


# ----------------------------------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("stage", ["factors", "eigenvalues"])
def test_a_killed_run_goes_on_to_the_same_bits(task, tmp_path, monkeypatch, stage):
    """Sums are noted after each image here; a run that dies in the third goes on there, and does no image twice."""
    monkeypatch.setattr(fitting, "ROWS_AT_ONCE", 1)
    expected = EKFAC(0.1).curvature(problem_of(task))
    monkeypatch.setattr(fitting, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(fitting, "monotonic", lambda: 0.0)
    task, every_pass, passes = replace(task, root=tmp_path / "killed"), fitting.passes, []

    class Killed(BaseException):
        pass

    def dying(*arguments: Any) -> Iterator[Any]:
        for drawn in every_pass(*arguments):
            passes.append(1)
            if len(passes) == (8 if stage == "factors" else 20):
                raise Killed
            yield drawn

    monkeypatch.setattr(fitting, "passes", dying)
    with pytest.raises(Killed):
        EKFAC(0.1).curvature(problem_of(task))
    before = len(passes)
    found = EKFAC(0.1).curvature(problem_of(task))
    assert before == (8 if stage == "factors" else 20)
    assert len(passes) == 24 + 2, "the two passes of the image that was not noted are done again"
    EKFAC(0.3).curvature(problem_of(task))
    KFAC(0.3).curvature(problem_of(task))
    assert len(passes) == 26, "everything is read from disk now"
    for eigen, other in zip(found, expected, strict=True):
        assert torch.equal(eigen.values, other.values)
        assert torch.equal(eigen.QB, other.QB)


def test_a_damaged_file_is_told(task):
    EKFAC(0.1).curvature(problem_of(task))
    (path,) = task.root.glob("curvature/*/eigenvectors.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with refuses("eigenvectors.safetensors is damaged ...; delete it and run again"):
        EKFAC(0.1).curvature(problem_of(task))


class Exploding(nn.Module):
    """NaN for bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * torch.where(x.sum(1, keepdim=True) > 50, torch.nan, 1.0)


def test_an_image_with_a_prediction_of_nan_is_named(tmp_path):
    task = task_of(tmp_path, Exploding, Regression(), 4)
    train = task.train
    assert isinstance(train, TensorImages)
    x0 = train.x0.clone()
    x0[2] = 100.0
    with refuses("training image 'train-0002' hold NaN or Inf"):
        EKFAC(0.1).curvature(
            problem_of(replace(task, train=tensors(x0, "train")), Gradient(outputs.loss, draws.once()))
        )


# ------------------------------------------------------------------------------------------------------------ dead layers


class Gated(nn.Module):
    """`idle` is never used; `gated` is only where the first pixel is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gated, self.idle = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.gated(x) * (x[:, :1] > 50)


def test_layers_without_curvature(tmp_path):
    """They change nothing where no training gradient lies in them, stand at 1/lambda with an absolute damping, and are
    refused where a relative damping would divide by 0."""
    task = task_of(tmp_path, Gated, Regression(), 4)
    once = Gradient(outputs.loss, draws.once())
    dead = InnerProduct(once, precondition=EKFAC(0.1, factors=EXACT))(task)
    alive = InnerProduct(replace(once, parameters=r"^layer"), precondition=EKFAC(0.1, factors=EXACT))(task)
    close(dead.values, alive.values)
    assert torch.isfinite(InnerProduct(once, precondition=EKFAC(0.1, True, EXACT))(task).values).all()
    with refuses("are zero; nothing can be attributed"):
        InnerProduct(replace(once, parameters="idle|gated"), precondition=EKFAC(0.1))(task)
    problem = problem_of(task, once)
    phi = rows(once, task, problem.checkpoint, task.train, "train")
    values = phi.all()
    values[0, -1] = 1.0  # a gradient of `idle` that the draws of the curvature did not see
    phi.write(slice(0, len(values)), values)
    with refuses("idle.weight+idle.bias has training gradients but no curvature"):
        EKFAC(0.1).solve(problem, phi, values[:1], [None])


# ------------------------------------------------------------------------------------------------------------ linear world


class OneHot(nn.Module):
    """The linear denoiser as one Linear layer: prediction = W (onehot(t) (x) x_t), for which F = A (x) (2/D) I exactly."""

    def __init__(self, weight: Tensor) -> None:  # [T, D, D]
        super().__init__()
        self.steps, self.linear = (
            len(weight),
            nn.Linear(weight[0].numel() * len(weight) // weight.shape[1], weight.shape[1], False),
        )
        self.linear.weight = nn.Parameter(weight.transpose(0, 1).flatten(1).clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hot = (torch.arange(self.steps) == t[:, None]).to(x)  # not one_hot: it looks at the values, which vmap cannot
        return self.linear((hot[:, :, None] * x[:, None]).flatten(1))


@pytest.fixture(scope="module")
def world() -> LinearWorld:
    return linear_world(n=200, m=15, dim=6)


@pytest.fixture(scope="module")
def retrained(world) -> np.ndarray:
    return world.retrained(half_masks(128, 200))


def linear_task(world: LinearWorld, root: Path) -> Task:
    weight = world.fit()
    return replace(world.task(root), trajectory=(checkpoint(lambda: OneHot(weight), "onehot"),))


def test_kfac_of_the_linear_world_is_exact_influence(world, tmp_path):
    """With all directions K-FAC and EK-FAC equal the dense Gauss-Newton system entry by entry, at lambda_sum = n lambda."""
    task = linear_task(world, tmp_path)
    task = replace(task, train=subset(task.train, range(40)))
    part = Gradient(outputs.loss, DRAWS)
    exact = InnerProduct(part, precondition=GaussNewton(40 * 1e-3, absolute=True))(task).values
    for method in (KFAC, EKFAC):
        close(InnerProduct(part, precondition=method(1e-3, True, EXACT))(task).values, exact, 1e-9)


@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_lds_of_the_linear_world(world, retrained, tmp_path, method):
    """One pseudo-gradient per draw costs next to nothing: exact influence reaches 0.97 here. Scale and sign are those of
    leave-one-out, a little small as for exact influence."""
    task = linear_task(world, tmp_path)
    precondition = method(world.damping / 200, absolute=True)
    scores = InnerProduct(Gradient(outputs.loss, DRAWS), precondition=precondition, scale="removal")(task)
    value = float(np.mean(lds(scores.values, half_masks(128, 200), retrained)))
    assert value > 0.95
    loo = world.leave_one_out()
    slope = np.vdot(scores.values, loo) / np.vdot(loo, loo)
    assert 0.85 < slope < 1.05


# ----------------------------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("recipe", [k_fac, ek_fac])
def test_recipes(tmp_path, recipe):
    """All parameters of a UNet: norms stay outside. The classifier settings are those of the other gradient methods."""
    task = unet_task(tmp_path)
    scores = recipe(draws=uniform(4), damping=0.1)(task)
    assert scores.scale == "rank"
    assert scores.recipe["method"]["precondition"]["factors"]["skip_others"] is True
    assert torch.isfinite(scores.values).all()
    assert scores.values.std() > 0
