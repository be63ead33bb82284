"""EK-FAC against kronfluence 1.0.1, strategy "ekfac", in float64: factors, eigenvalues and scores.

kronfluence has no draws: its data set holds every (image, draw) as an item of its own, with our pseudo-gradient v, and its
train loss is <prediction, v> where it samples. Its B is a mean over positions too, ours is not; the eigenvectors are the
same and its Lambda ignores B. Its scores are g_q^T (F + lambda)^-1 g_i per pair of items; ours is their mean over draws / n.
Installed with --no-deps, because it asks for torchvision, which it does not use.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as TheirTask
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from whence.curvature import factors as fitting
from whence.curvature.factors import Factors, fit_factors
from whence.curvature.kfac import EKFAC, Eigen
from whence.curvature.layers import layer_parameters
from whence.curvature.solve import Problem
from whence.diffusion import outputs
from whence.diffusion.draws import once, uniform
from whence.diffusion.forward import Denoiser
from whence.diffusion.noise import seed_for
from whence.features.parts import Gradient
from whence.features.rows import prepare
from whence.methods.inner_product import InnerProduct
from whence.types import Engine, Images, Task
from worlds import checkpoint, classifier_task, tensors

DAMPING = 1e-3


class Net(nn.Module):
    """conv -> GroupNorm -> tanh -> Linear per pixel -> conv with stride and back to the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.GroupNorm(1, 3)
        self.pixel, self.last = nn.Linear(3, 4), nn.Conv2d(4, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)) * (1 + 0.1 * t.to(x)[:, None, None, None]))
        return self.last(torch.tanh(self.pixel(h.permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


@dataclass(frozen=True)
class World:
    task: Task
    part: Gradient


def denoiser(root: Path) -> World:
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(7, 1, 4, 4, generator=g) * torch.logspace(0.3, -0.7, 16).reshape(4, 4)

    def make() -> nn.Module:
        torch.manual_seed(1)
        return Net()

    forward = Denoiser(torch.linspace(0.9, 0.2, 4, dtype=torch.float64))
    images = tensors(x0[:5], "train"), tensors(x0[5:], "query")
    task = Task(forward, (checkpoint(make, "net"),), *images, root, Engine(dtype=torch.float64))
    return World(task, Gradient(outputs.loss, uniform(4), parameters=layer_parameters(Net())))


def classifier(root: Path) -> World:
    return World(classifier_task(root), Gradient(outputs.cross_entropy, once(), parameters="conv|head"))


class Theirs(TheirTask):
    def __init__(self, world: World):
        self.output = world.part.outputs[0]

    def compute_train_loss(self, batch: Sequence[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        *inputs, v, target = batch
        prediction = model(*inputs)
        return (prediction * v).sum() if sample else self.output.value(prediction, target).sum()

    def compute_measurement(self, batch: Sequence[Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def items(world: World, images: Images, purpose: str) -> TensorDataset:
    """(inputs of the network, pseudo-gradient, target) of every image and draw."""
    task, output = world.task, world.part.outputs[0]
    net, found = prepare(task.trajectory[-1], task.engine), []
    for i in range(len(images)):
        for rows in fitting.passes(images, [i], world.part.draws, task):
            seen: list[Tensor] = []

            def call(*inputs: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen += inputs
                return net(*inputs).detach()

            prediction, target = task.forward(call, rows.batch, rows.draw)
            seed = seed_for(0, purpose)
            (v,) = fitting.pseudo_gradients(output, task.forward, 1, seed, prediction, rows)
            found.append((*seen, v, target))
    return TensorDataset(*(torch.cat(column) for column in zip(*found, strict=True)))


@pytest.fixture(scope="module", params=[denoiser, classifier], ids=["denoiser", "classifier"])
def world(request, tmp_path_factory) -> World:
    return request.param(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def analyzer(world, tmp_path_factory) -> Analyzer:
    """kronfluence's factors, each pass on the pseudo-gradients of ours."""
    task = Theirs(world)
    net = prepare_model(copy.deepcopy(prepare(world.task.trajectory[-1], world.task.engine)), task)  # it is changed
    folder = str(tmp_path_factory.mktemp("theirs"))
    found = Analyzer("x", net, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)
    wide = torch.float64
    settings = FactorArguments("ekfac", activation_covariance_dtype=wide, gradient_covariance_dtype=wide)
    settings.per_sample_gradient_dtype, settings.lambda_dtype = wide, wide
    data = items(world, world.task.train, "factors")
    found.fit_covariance_matrices("f", data, per_device_batch_size=6, factor_args=settings)
    found.perform_eigendecomposition("f", factor_args=settings)
    data = items(world, world.task.train, "eigenvalues")
    found.fit_lambda_matrices("f", data, per_device_batch_size=6, factor_args=settings)
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def test_factors(world, analyzer, record_property):
    fit = fit_factors(Problem(world.task, world.task.trajectory[-1], world.part), Factors())
    ours, theirs, worst = fitting.factors(fit), analyzer.load_covariance_matrices("f"), 0.0
    count = len(world.task.train) * world.part.draws.count
    for block in fit.blocks:
        A = theirs["activation_covariance"][block.layer] / theirs["num_activation_covariance_processed"][block.layer]
        B = theirs["gradient_covariance"][block.layer] / count
        worst = max(worst, difference(ours[f"A {block.name}"], A), difference(ours[f"B {block.name}"], B))
    record_property("largest relative difference of A and B to kronfluence", worst)
    print(f"\nkronfluence 1.0.1: largest relative difference of A and B {worst:.1e}")
    assert worst < 1e-12


def test_eigenvalues(world, analyzer, record_property):
    """Q diag(Lambda) Q^T: signs of eigenvectors are free."""
    curvature = EKFAC(DAMPING).curvature(Problem(world.task, world.task.trajectory[-1], world.part))
    vectors, values, worst = analyzer.load_eigendecomposition("f"), analyzer.load_lambda_matrices("f"), 0.0
    for eigen in curvature:
        layer = eigen.block.layer
        QA, QB = vectors["activation_eigenvectors"][layer], vectors["gradient_eigenvectors"][layer]
        Lambda = values["lambda_matrix"][layer] / values["num_lambda_processed"][layer]
        worst = max(worst, difference(dense(eigen), dense(Eigen(eigen.block, QA, QB, Lambda))))
    record_property("largest relative difference of Q Lambda Q^T to kronfluence", worst)
    print(f"\nkronfluence 1.0.1: largest relative difference of Q diag(Lambda) Q^T {worst:.1e}")
    assert worst < 1e-10


def dense(eigen: Eigen) -> Tensor:
    Q = torch.kron(eigen.QB, eigen.QA)
    return Q @ torch.diag(eigen.values.flatten()) @ Q.T


@pytest.mark.parametrize("damping", [DAMPING, None], ids=["absolute", "a tenth of the mean"])
def test_scores(world, analyzer, record_property, damping):
    precondition = EKFAC(0.1) if damping is None else EKFAC(damping, absolute=True)
    ours = InnerProduct(world.part, precondition=precondition)(world.task).values
    wide = torch.float64
    settings = ScoreArguments(damping, per_sample_gradient_dtype=wide, precondition_dtype=wide, score_dtype=wide)
    train, queries = (items(world, images, "scores") for images in (world.task.train, world.task.queries))
    name = f"scores {damping}"
    analyzer.compute_pairwise_scores(name, "f", queries, train, 4, 6, score_args=settings)
    pairs = analyzer.load_pairwise_scores(name)["all_modules"]
    m, n, S = len(world.task.queries), len(world.task.train), world.part.draws.count
    theirs = pairs.reshape(m, S, n, S).mean((1, 3)) / n
    error = difference(ours, theirs)
    record_property("largest relative difference of scores to kronfluence", error)
    print(f"\nkronfluence 1.0.1: largest relative difference of scores {error:.1e}")
    assert error < 1e-10
