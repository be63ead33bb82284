"""Projected TracIn: P1^T G P2 of each parameter against explicit Kronecker matrices, TracIn, and on average over seeds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from whence.diffusion import outputs
from whence.diffusion.draws import once
from whence.features.parts import Gradient
from whence.features.projections import TwoSided
from whence.features.rows import rows
from whence.methods.tracin import tracin, tracin_projected
from whence.types import Task
from worlds import classifier_task

SHAPES = {"a.weight": (7, 2, 3, 2), "a.bias": (7,), "scale": ()}
SIZES = {"a.weight": 84, "a.bias": 7, "scale": 1}


def blocks_of(count: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, size, generator=g, dtype=torch.float64) for name, size in SIZES.items()}


def shaped(blocks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: block.reshape(len(block), *SHAPES[name]) for name, block in blocks.items()}


def test_a_row_is_the_kronecker_product_of_both_sides_times_the_gradient():
    two, blocks = TwoSided(17), blocks_of(3)
    P1, P2 = two.side("a.weight output", 7).double(), two.side("a.weight input", 12).double()
    bias = two.side("a.bias output", 7).double()
    expected = [blocks["a.weight"] @ torch.kron(P1, P2), blocks["a.bias"] @ bias, blocks["scale"]]
    found = two(shaped(blocks))
    assert found.shape == (3, two.width(SHAPES)) == (3, 16 + 4 + 1)
    torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(found[1:2], two(shaped({name: block[1:2] for name, block in blocks.items()})))


def test_one_position_needs_only_its_two_vectors():
    """G = delta x^T: (P1^T delta)(P2^T x)^T, as published."""
    two, delta, x = TwoSided(9), torch.randn(7).double(), torch.randn(12).double()
    P1, P2 = two.side("a.weight output", 7).double(), two.side("a.weight input", 12).double()
    found = two(shaped({"a.weight": torch.outer(delta, x).reshape(1, -1)}))
    torch.testing.assert_close(found[0], torch.outer(P1.T @ delta, P2.T @ x).flatten(), rtol=1e-12, atol=1e-12)


def test_inner_products_are_right_on_average_and_better_with_more_columns():
    rows = blocks_of(2)
    true = sum(float(block[0] @ block[1]) for block in rows.values())
    errors = []
    for k in (4, 36):
        found = torch.tensor([float(u @ v) for u, v in (TwoSided(k, seed)(shaped(rows)) for seed in range(600))])
        assert abs(float(found.mean()) - true) < 4 * float(found.std()) / 600**0.5
        errors.append(float(found.std()))
    assert errors[1] < errors[0] / 2


@pytest.fixture
def task(tmp_path) -> Task:
    return classifier_task(tmp_path)


def test_scores_are_sums_over_checkpoints_of_projected_products(task):
    """The rows are those of exact TracIn's gradients, projected; the same P at every checkpoint."""
    part, expected = Gradient(outputs.cross_entropy, once()), torch.zeros(())
    assert len({point.rate for point in task.trajectory}) > 1
    for point in task.trajectory:
        parameters = dict(point.load().named_parameters())
        sizes = [p.numel() for p in parameters.values()]
        psi, phi = (
            TwoSided(5)(
                {
                    name: block.reshape(-1, *p.shape)
                    for (name, p), block in zip(parameters.items(), row.split(sizes, 1), strict=True)
                }
            )
            for row in (rows(part, task, point, images, "rows").all() for images in (task.queries, task.train))
        )
        expected = expected + point.rate * psi @ phi.T
    found = tracin_projected(outputs.cross_entropy, once(), dim=5)(task).values
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_enough_columns_are_all_of_them(task):
    """A side not longer than sqrt(k) is left as it is, so that nothing is lost where that holds for all."""
    blocks = blocks_of(3)
    assert torch.equal(TwoSided(144)(shaped(blocks)), torch.cat(list(blocks.values()), 1))
    settings = {"output": outputs.cross_entropy, "draws": once()}
    exact = tracin(dim=None, **settings)(task).values
    assert torch.equal(tracin_projected(dim=None, **settings)(task).values, exact)
    assert not torch.allclose(tracin_projected(dim=4, **settings)(task).values, exact, rtol=1e-2)
