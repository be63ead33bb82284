"""A system per group of parameters: one group is TRAK, several are sums of TRAKs, and weights find the group that knows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from errors import refuses
from test_precondition import explicit
from whence.curvature.blocks import BlockGram
from whence.curvature.gram import Gram
from whence.curvature.solve import Problem
from whence.diffusion import outputs
from whence.diffusion.draws import once, uniform
from whence.features.parts import Gradient
from whence.features.projections import SJLT, Grouped, Identity
from whence.features.rows import prepare, rows
from whence.methods.block_trak import block_trak, layer_weights, weighted_d_trak
from whence.methods.inner_product import InnerProduct
from whence.methods.trak import trak
from whence.types import Task
from worlds import classifier_task, linear_world, unet_task

SHAPES = {
    "into.weight": (5, 8),
    "into.bias": (5,),
    "mid.0.a.weight": (3, 2, 5),
    "mid.0.b.weight": (8,),
    "mid.1.a.weight": (6,),
    "scale": (2,),
}
GROUPS = ["conv", "norm", "head"]  # of the classifier


def blocks(n: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(n, *shape, generator=g) for name, shape in SHAPES.items()}


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return classifier_task(tmp_path_factory.mktemp("blocks"))


# ---------------------------------------------------------------------------------------------------------- projection


def test_groups_are_the_first_parts_of_the_path():
    two, one = Grouped(None, 2).groups(SHAPES), Grouped(None, 1).groups(SHAPES)
    assert list(two) == ["into", "mid.0", "mid.1", "scale"]
    assert two["mid.0"] == ["mid.0.a.weight", "mid.0.b.weight"]
    assert list(one) == ["into", "mid", "scale"]


def test_groups_stand_side_by_side():
    """Wide groups are sketched, narrow ones kept, and each is what it would be alone."""
    made, given = Grouped(32, 2, seed=3), blocks()
    columns = made.columns(SHAPES)
    assert {group: own.stop - own.start for group, own in columns.items()} == {
        "into": 8,
        "mid.0": 8,
        "mid.1": 6,
        "scale": 2,
    }
    row = made(given)
    assert row.shape == (3, made.width(SHAPES)) == (3, 24)
    for group, names in made.groups(SHAPES).items():
        alone = {name: given[name] for name in names}
        expected = SJLT(8, 3)(alone) if group in ("into", "mid.0") else Identity()(alone)
        assert torch.equal(row[:, columns[group]], expected)
    assert torch.equal(Grouped(None)(given), Identity()(given))


@pytest.mark.parametrize(
    ("k", "what", "accepted"),
    [(3, "there are 4 groups of parameters", "4 to 91"), (92, "there are 91 parameters", "1 to 91")],
)
def test_widths_that_do_not_fit_are_refused(k, what, accepted):
    with refuses(what, accepted=accepted):
        Grouped(k, 2).width(SHAPES)
    with refuses("at least 1 part"):
        Grouped(k, 0)


# -------------------------------------------------------------------------------------------------------------- system


def alone(group: str, task: Task, damping: float, **settings: object) -> torch.Tensor:
    return trak(outputs.cross_entropy, once(), None, damping, parameters=f"^{group}", **settings)(task).values


@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_blocks_are_traks_of_their_parameters(task, damping):
    """The sum over groups of TRAK on that group alone: weights lambda_b by the mean eigenvalue of each."""
    found = block_trak(outputs.cross_entropy, once(), None, damping)(task).values
    same(found, torch.stack([alone(group, task, damping) for group in GROUPS]).sum(0))
    assert float((found - trak(outputs.cross_entropy, once(), None, damping)(task).values).norm() / found.norm()) > 0.05


def test_one_block_is_trak(task, tmp_path):
    """Exact and sketched; with TRAK's Q and over an ensemble too."""
    task = replace(task, ensemble=task.trajectory[:1])
    for dim in (None, 20):
        settings = {"output": outputs.margin, "draws": once(), "dim": dim, "parameters": "^head", "ensemble": True}
        same(block_trak(**settings)(task).values, trak(**settings)(task).values)
    world = linear_world(n=14, m=3, dim=4).task(tmp_path)
    for dim in (None, 24):
        same(block_trak(draws=uniform(6), dim=dim)(world).values, trak(draws=uniform(6), dim=dim)(world).values)


@pytest.mark.parametrize("dim", [None, 90])
def test_blocks_are_inverses_of_their_own(task, dim):
    """Dual or primal, each is what an explicit inverse of its columns gives; every row scale, too, is a sum over blocks."""
    part = Gradient(outputs.cross_entropy, once(), Grouped(dim, 1))
    point = task.trajectory[-1]
    train = rows(part, task, point, task.train, "x")
    query = rows(part, task, point, task.queries, "x").all().double()
    problem = Problem(task, point, part)
    expected = {name: torch.zeros(()) for name in ("kernel", "train_self", "train_square", "query_self")}
    forms = set()
    for group, (block,) in BlockGram(0.01).blocks(problem, train, query, [None]).items():
        own = part.projection.columns(part.shapes(prepare(point, task.engine)))[group]
        phi, psi = train.all()[:, own].double(), query[:, own]
        unit = float(phi.square().sum() / torch.linalg.matrix_rank(phi))
        alone = explicit(phi, psi, 0.01 * unit)
        expected = {name: total + alone[name] for name, total in expected.items()}
        forms.add(type(block))
    assert len(forms) > 1  # primal, dual; by Cholesky, or by eigenvectors where the rank is not full
    (system,) = BlockGram(0.01).solve(problem, train, query, [None])
    for name, value in expected.items():
        same(getattr(system, name)(), value)
    same(system.train_norm(), train.all().norm(dim=1))
    (own,) = BlockGram(0.01).solve(problem, train, train.all().double(), [None])
    same(own.kernel().diagonal(), own.train_self())
    same(own.query_self(), own.train_self())


def test_a_block_without_gradient_has_no_part(task):
    """Parameters that are not used, beside others that are."""

    class Idle:
        def __init__(self, load):
            self.load = load

        def __call__(self):
            net = self.load()
            net.register_parameter("idle", torch.nn.Parameter(torch.ones(3)))
            return net

    point = task.trajectory[-1]
    idle = replace(task, trajectory=(replace(point, load=Idle(point.load), digest="idle"),))
    settings = {"output": outputs.cross_entropy, "draws": once(), "dim": None}
    same(block_trak(**settings)(idle).values, block_trak(**settings)(task).values)


def test_other_projections_are_refused(task):
    method = InnerProduct(Gradient(outputs.cross_entropy, once()), precondition=BlockGram(0.1))
    with refuses("under a Grouped projection"):
        method(task)
    assert Gram(0.1).damping == BlockGram(0.1).damping


# ------------------------------------------------------------------------------------------------------------- weights


def spiked(groups: int, m: int = 4, n: int = 200, signal: int = 0) -> torch.Tensor:
    """Noise of norm about 1, and in one group ten images that stand out."""
    kernels = torch.randn(groups, m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / n**0.5
    kernels[signal, :, :10] += 0.5
    return kernels


def test_weight_goes_to_the_group_that_knows():
    for signal in (0, 3):
        found = layer_weights(spiked(5, signal=signal), 10)
        same(found.sum(1), torch.ones(4, dtype=torch.float64))
        assert (found[:, signal] > 0.75).all(), found  # even weights would be 0.2
    noise = layer_weights(spiked(5)[1:], 10)
    assert float(noise.max(1).values.mean()) < 0.6, "noise alone has no group that knows"


def test_weights_are_the_best_of_a_line():
    """Two groups: no other weight on a grid of 1000 does better by more than 5e-4."""
    kernels = spiked(2)
    kernels[1, :, 10:20] += 0.2

    def objective(w: torch.Tensor) -> torch.Tensor:
        tau = torch.einsum("mj,jmn->mn", w, kernels)
        return tau.topk(10).values.mean(1) / tau.norm(dim=1)

    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    best = torch.stack([objective(torch.tensor([[w, 1 - w]]).expand(4, 2)) for w in grid]).max(0).values
    assert (objective(layer_weights(kernels, 10)) > best - 5e-4).all()


def test_weights_of_a_query_are_its_own():
    kernels = spiked(3)
    torch.testing.assert_close(
        layer_weights(kernels[:, 2:3], 10), layer_weights(kernels, 10)[2:3], rtol=1e-9, atol=1e-12
    )
    assert torch.isfinite(layer_weights(torch.zeros(3, 2, 20, dtype=torch.float64), 5)).all()
    with refuses("the 21 best of 20 images", accepted="1 to 20"):
        layer_weights(torch.zeros(3, 2, 20), 21)


def test_weighted_d_trak_is_its_formula(tmp_path):
    """On a network of two parts: kernels of D-TRAK on each part alone, weighted."""
    task = unet_task(tmp_path, n=5, dtype=torch.float64)
    settings = {"draws": uniform(4), "dim": None, "parameters": "^conv_(in|out)", "damping": 0.05}
    parts = [
        trak(outputs.squared_norm, **{**settings, "parameters": f"^{group}"})(task).values
        for group in ("conv_in", "conv_out")
    ]
    kernels = torch.stack(parts)
    expected = torch.einsum("mj,jmn->mn", layer_weights(kernels, 2), kernels)
    same(weighted_d_trak(top=2, **settings)(task).values, expected)
