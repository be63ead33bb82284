"""Pictures, models and outputs in memory, of whatever type: they are seen, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from agreement import close
from errors import refuses
from whence import Classifier, attribute, d_trak, task_from_module, trak
from whence.data.images import tensor_images
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Denoiser, FlowMatching, linear_schedule
from whence.diffusion.outputs import OUTPUTS, Output
from whence.features.gradients import measure
from whence.types import Batch, Draw, Engine

T = 1000
FORWARDS = {
    "epsilon": Denoiser(linear_schedule(T)),
    "v_prediction": Denoiser(linear_schedule(T), "v_prediction"),
    "sample": Denoiser(linear_schedule(T), "sample"),
    "float32 schedule": Denoiser(linear_schedule(T).float()),
    "flow": FlowMatching(torch.linspace(1e-3, 1, T, dtype=torch.float64)),
    "preconditioned": FlowMatching(torch.linspace(1e-3, 1, T, dtype=torch.float64), preconditioned=True),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x.flatten(1)).reshape(x.shape)


def scores(x0: Tensor, forward: object, root, dtype: torch.dtype = torch.float32) -> Tensor:
    train, queries = tensor_images(x0[:6]), tensor_images(x0[6:])
    task = task_from_module(Net(), forward, train, queries, root, Engine(dtype=dtype))
    return d_trak(draws=uniform(5), dim=None, damping=0.1)(task).values


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("name", FORWARDS)
def test_integer_pictures_are_seen(name, dtype, tmp_path):
    """Black and white: as they are, whatever the type. The noise is keyed by content, so it is given the same."""
    x0 = (torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5).to(dtype)
    batch = Batch(x0, torch.arange(8))
    at = Draw(torch.tensor([0, 1, 10, 100, 300, 500, 900, 999]), torch.randn(8, 1, 4, 4))
    seen = FORWARDS[name](lambda x, t: x, batch, at)
    expected = FORWARDS[name](lambda x, t: x, Batch(x0.float(), batch.keys), at)
    for found, truth in zip(seen, expected, strict=True):
        assert torch.equal(found, truth)
    assert torch.isfinite(scores(x0, FORWARDS[name], tmp_path)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORWARDS)
def test_schedules_are_exact_in_every_precision(name, dtype):
    """The noise scale of each timestep, to the precision of the pictures: not that of 1 - abar in it."""
    forward, noise = FORWARDS[name], torch.ones(T, 1, dtype=dtype)
    at = Draw(torch.arange(T), noise)
    levels = []
    for kind in (dtype, torch.float64):
        given: list[Tensor] = []

        def look(x: Tensor, t: Tensor, given: list[Tensor] = given) -> Tensor:
            given.append(x)
            return x

        forward(look, Batch(torch.zeros(T, 1, dtype=kind), torch.arange(T)), Draw(at.t, noise.to(kind)))
        levels.append(given[0].double())
    assert float(levels[0].min()) > 0
    assert float(((levels[0] - levels[1]) / levels[1]).abs().max()) <= 2 * torch.finfo(dtype).eps


def test_doubt_is_above_zero_as_long_as_a_number_can_be():
    """1 - p of the class at margins up to 80: against float64."""
    margins = torch.linspace(-20, 80, 101)
    logits = torch.stack([margins, torch.zeros(101)], dim=1)
    label = torch.zeros(101, dtype=torch.int64)
    found = OUTPUTS["doubt"].value(logits, label)
    truth = 1 / (1 + margins.double().exp())
    assert (found > 0).all()
    assert float(((found.double() - truth) / truth).abs().max()) < 1e-4
    three = torch.cat([logits, logits[:, 1:]], dim=1)
    close(OUTPUTS["doubt"].value(three, label).double(), 2 / (2 + margins.double().exp()))


class Sure(nn.Module):
    """A classifier whose margins are about 60."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight = nn.Parameter(torch.eye(2) * 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_trak_of_a_classifier_that_is_sure_is_not_zero(tmp_path):
    labels = torch.arange(8) % 2
    x0 = nn.functional.one_hot(labels).float() * 2 - 1 + 0.1 * torch.randn(8, 2)
    task = task_from_module(
        Sure(), Classifier(), tensor_images(x0, labels=labels), tensor_images(x0, labels=labels), tmp_path
    )
    assert (trak(dim=None, output=OUTPUTS["margin"])(task).values != 0).all()


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number": lambda p, y: (p - y).square().mean(),
    "elements": lambda p, y: (p - y).square(),
    "a column": lambda p, y: (p - y).square().flatten(1).mean(1, keepdim=True),
    "channels": lambda p, y: (p - y).square().mean((2, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_output_of_another_shape_is_refused(name, tmp_path):
    mine, x0 = Output("mine", SHAPES[name], "lower"), torch.randn(3, 1, 4, 4)
    batch, at = Batch(x0, torch.arange(3)), Draw(torch.tensor([1, 2, 3]), torch.randn_like(x0))
    with refuses(what="returns shape", where="output 'mine'", accepted="one number per row"):
        measure(Net(), {}, FORWARDS["epsilon"], mine, batch, at)
    images = tensor_images(x0)
    with refuses(where="output 'mine'"):
        attribute((Net(), FORWARDS["epsilon"]), images, images, "d_trak", tmp_path, output=mine, dim=None)
