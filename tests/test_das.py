"""DAS, scalar and in the space of functions, against gradients taken here and against exact retraining."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from errors import refuses
from whence.curvature.exact import GaussNewton
from whence.diffusion import outputs
from whence.diffusion.draws import Draws, Grid, Repeated, fixed, random, uniform
from whence.diffusion.forward import Denoiser
from whence.diffusion.outputs import loss, probes
from whence.features.parts import Gradient, Pullbacks, Value, unit_average
from whence.features.rows import rows
from whence.methods.das import das, das_function
from whence.methods.normalize import below_one
from whence.types import Draw, Images, Task
from worlds import LinearNet, checkpoint, linear_world, tensors

DAMPING = 0.05


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return linear_world(n=14, m=3, dim=4).task(tmp_path_factory.mktemp("das"))


def per_draw(task: Task, images: Images, d: Draws, value) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [b, S, d] of value(prediction [D], number of the draw), predictions and noise [b, S, D]."""
    net = task.trajectory[-1].load().double()
    grads, predictions, noise = [], [], []
    for i in range(len(images)):
        image = images.batch([i])
        draw = d(image.keys, image.x0.shape[1:], task.forward.timesteps, torch.float64)
        for s in range(d.count):
            prediction, _ = task.forward(net, image, Draw(draw.t[:, s], draw.noise[:, s]))
            (g,) = torch.autograd.grad(value(prediction[0], s), [net.linear.weight])
            grads.append(g.flatten())
            predictions.append(prediction[0].detach())
            noise.append(draw.noise[0, s])
    return tuple(torch.stack(v).reshape(len(images), d.count, -1) for v in (grads, predictions, noise))


def damped(phi: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(phi.T @ phi)
    unit = values[values > 1e-10 * values[-1]].mean()
    return torch.linalg.inv(phi.T @ phi + DAMPING * unit * torch.eye(phi.shape[1], dtype=phi.dtype))


# ------------------------------------------------------------------------------------------------------------- scalar


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("leverage", [True, False])
@pytest.mark.parametrize("residual", [6, 0])
def test_das_is_its_formula(task, unit, leverage, residual):
    d = uniform(6)
    q, x = (per_draw(task, images, d, lambda p, s: p.mean())[0] for images in (task.queries, task.train))
    if unit:
        q, x = (g / g.norm(dim=2, keepdim=True) for g in (q, x))
    q, x = q.mean(1), x.mean(1)
    expected = q @ damped(x) @ x.T
    if residual:
        _, prediction, noise = per_draw(task, task.train, uniform(6), lambda p, s: p.mean())
        e = (prediction - noise).square().mean(2).sqrt()
        expected = expected * (e / e.norm(dim=1, keepdim=True)).mean(1)
    if leverage:
        expected = expected / (1 - (x @ damped(x) @ x.T).diagonal())
    settings = {"draws": d, "dim": None, "damping": DAMPING, "unit": unit, "residual": residual, "leverage": leverage}
    found = das(**settings)(task)
    assert found.signed
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-14)
    squared = das(**settings, square=True)(task)
    assert not squared.signed
    torch.testing.assert_close(squared.values, expected.square(), rtol=1e-9, atol=1e-20)


def test_the_parts_of_das_matter(task):
    """Norms, residual and leverage each change the ranking of some query."""
    plain = das(draws=uniform(6), dim=None, damping=DAMPING)(task).values
    for change in ({"unit": False}, {"residual": 0}, {"leverage": True}, {"output": outputs.l2}):
        other = das(**{"draws": uniform(6), "dim": None, "damping": DAMPING, **change})(task).values
        assert (plain.argsort(1) != other.argsort(1)).any(), change


def test_residual_is_between_0_and_the_even_spread(task):
    """mean(e) / ||e|| is largest, 1 / sqrt(S), where all e are equal; many draws go through the network in pieces."""
    point = task.trajectory[-1]
    value = rows(Value(outputs.rmse, uniform(70), unit_average), task, point, task.train, "x").all()
    assert (value > 0).all()
    assert (value < 70**-0.5).all()
    assert unit_average(torch.full((9,), 3.0)) == pytest.approx(1 / 3)
    assert unit_average(torch.zeros(4)) == 0
    with refuses("residual is -1 steps", accepted="1 and more, or 0"):
        das(residual=-1)


# ----------------------------------------------------------------------------------------------------------- function


def test_das_function_is_its_formula(task):
    """With the Gram matrix of loss gradients, two probes per draw."""
    d, signs = uniform(6), [p.value for p in probes(12)]
    g = rows(Gradient(loss, d), task, task.trajectory[-1], task.train, "x").all()
    u = torch.cat(
        [per_draw(task, task.queries, d, lambda p, s, v=v: signs[2 * s + v](p[None], p[None])[0])[0] for v in (0, 1)], 1
    )
    h = (g @ damped(g) @ g.T).diagonal()
    expected = ((u @ damped(g) @ g.T) / (1 - h)).square().mean(1)
    found = das_function(draws=d, dim=None, damping=DAMPING, count=2)(task)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-14)
    assert not found.signed


def test_pullbacks_give_the_square_of_a_change(task):
    """mean over pieces of (u^T delta)^2 -> E (1/D) ||J delta||^2, and the handbook's ratio of 1.002 for enough probes."""
    part = Pullbacks(80, uniform(6))
    u = rows(part, task, task.trajectory[-1], task.queries, "x").all().reshape(3, 480, -1)
    g = torch.Generator().manual_seed(0)
    delta = torch.randn(5, u.shape[2], generator=g, dtype=torch.float64)
    net = task.trajectory[-1].load().double()
    weight = net.linear.weight.detach()

    def change(p: Tensor, s: int) -> Tensor:
        return p.sum()

    before = per_draw(task, task.queries, uniform(6), change)[1]
    exact = []
    for row in delta:
        moved = LinearNet(torch.zeros(6, 4, 4, dtype=torch.float64))
        moved.linear.weight.data = weight + row.reshape(weight.shape)
        other = replace(task, trajectory=(checkpoint(lambda moved=moved: moved, "moved"),))
        exact.append((per_draw(other, task.queries, uniform(6), change)[1] - before).square().mean((1, 2)))
    ratio = (u @ delta.T).square().mean(1) / torch.stack(exact, 1)
    assert float((ratio - 1).abs().max()) < 0.25
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)


class Small:
    """A linear denoiser of D outputs whose loss has one draw per image, fitted with a ridge; leaving an image out is a
    refit."""

    def __init__(self, draws: Draws, dim: int, root: Path, n: int = 40, m: int = 4, ridge: float = 0.5):
        g = torch.Generator().manual_seed(1)
        x0 = torch.randn(n + m, dim, generator=g, dtype=torch.float64)
        self.train, self.queries, self.draws, self.ridge = (
            tensors(x0[:n], "train"),
            tensors(x0[n:], "query"),
            draws,
            ridge,
        )
        self.forward = Denoiser(torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64))
        self.z, self.eps, self.t = self.noisy(self.train, draws)
        weight = self.fit(range(n))
        self.task = Task(
            self.forward, (checkpoint(lambda: LinearNet(weight), "small"),), self.train, self.queries, root
        )
        self.task = replace(self.task, engine=replace(self.task.engine, dtype=torch.float64))

    def noisy(self, images: Images, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        batch = images.batch(range(len(images)))
        draw = draws(batch.keys, batch.x0.shape[1:], 3, torch.float64)
        signal = self.forward.alphas_cumprod[draw.t][..., None]
        return signal.sqrt() * batch.x0[:, None] + (1 - signal).sqrt() * draw.noise, draw.noise, draw.t

    def fit(self, kept) -> Tensor:
        """argmin sum_i loss_i + ridge/2 ||W||^2, loss_i = mean_s (1/D) ||W_t z - eps||^2."""
        kept, dim = list(kept), self.z.shape[-1]
        weights = []
        for step in range(3):
            at = (self.t[kept] == step).reshape(-1)
            z, eps = (v[kept].reshape(-1, dim)[at] for v in (self.z, self.eps))
            scale = 2 / (self.draws.count * dim)
            A = scale * z.T @ z + self.ridge * torch.eye(dim, dtype=torch.float64)
            weights.append(torch.linalg.solve(A, scale * z.T @ eps).T)
        return torch.stack(weights)

    def change(self, draws: Draws) -> Tensor:
        """E_s (1/D) ||prediction - prediction without image i||^2 at every query, by refitting: [m, n]."""
        n = len(self.train)
        z, _, t = self.noisy(self.queries, draws)
        full = self.fit(range(n))
        columns = []
        for i in range(n):
            difference = self.fit([j for j in range(n) if j != i]) - full
            moved = torch.einsum("qsab,qsb->qsa", difference[t], z)
            columns.append(moved.square().mean((1, 2)))
        return torch.stack(columns, 1)


def all_signs(dim: int) -> tuple[outputs.Output, ...]:
    """Orthogonal sign vectors (Hadamard): with all of them the mean over probes is exact."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return tuple(outputs.Output(f"sign {i}", lambda p, _, v=v: p @ v / dim**0.5, None) for i, v in enumerate(matrix))


@pytest.mark.parametrize("dim", [1, 4])
def test_das_function_is_exact_leave_one_out(tmp_path, monkeypatch, dim):
    """One draw per training image, exact curvature, no projection: the change of the function on removal and refitting, for
    one output and for several (the outputs share their curvature, so that h_i stands for the whole block)."""
    monkeypatch.setattr("whence.features.parts.probes", lambda count, seed: all_signs(dim))
    small = Small(random(1), dim, tmp_path)
    method = das_function(random(1), None, count=dim)
    method = replace(method, precondition=GaussNewton(small.ridge, absolute=True))
    expected = small.change(random(1))
    found = method(small.task).values
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-18)
    without = replace(method, leverage=False)(small.task).values
    assert float((without / expected - 1)[expected > 1e-12].abs().max()) > 0.1, "the leverage matters"


def test_leverage_of_several_draws_is_close(tmp_path, monkeypatch):
    """Two noises per step and three steps: K_i is no multiple of the identity. One number for it comes closer to the exact
    change than none: relative error 0.26 against 0.45."""
    monkeypatch.setattr("whence.features.parts.probes", lambda count, seed: all_signs(4) * 6)
    d = Draws(Repeated(Grid(3), 2))
    small = Small(d, 4, tmp_path, n=24, ridge=0.2)
    method = das_function(d, None, count=4)
    method = replace(method, precondition=GaussNewton(small.ridge, absolute=True))
    expected = small.change(d)

    def error(leverage: bool) -> float:
        found = replace(method, leverage=leverage)(small.task).values
        return float((found - expected).norm() / expected.norm())

    assert error(True) < 0.65 * error(False)
    found = method(small.task).values
    assert float(torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]) > 0.97


def test_das_function_refuses_what_it_cannot_do(task):
    with refuses("above 0"):
        das_function(dim=None).grid(task, [None])
    with refuses("leverage 1 of a training image is not below 1"):
        below_one(torch.tensor([0.2, 1.0]))
    with refuses("at least 1 is needed"):
        das_function(draws=fixed(1), dim=None, count=0)(task)
