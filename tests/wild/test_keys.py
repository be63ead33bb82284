"""Stored features are served only for what they were computed for: the same network, loss and attributes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import refuses
from whence import task_from_module
from whence.data.images import tensor_images
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Custom, Denoiser, linear_schedule
from whence.diffusion.outputs import Output, loss
from whence.features.encoders import Function
from whence.features.parts import Gradient
from whence.features.projections import Identity
from whence.features.rows import rows
from whence.plain import describe
from whence.types import Batch, Draw, Engine

FORWARD = Denoiser(linear_schedule(50))


class Net(nn.Module):
    def __init__(self, activation: nn.Module | None = None, temperature: float = 1.0, scale: object = 1.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.activation, self.temperature, self.scale = (
            nn.Linear(4, 4),
            activation or nn.ReLU(),
            temperature,
            scale,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        factor = self.scale(1.0) if callable(self.scale) else 1.0
        return self.activation(self.layer(x)) / self.temperature * factor


class Doubling(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 2 * super().forward(x, t)


def hooked() -> nn.Module:
    net = Net()
    net.layer.register_forward_hook(lambda module, given, result: 3 * result)
    return net


def with_buffer(value: float) -> nn.Module:
    net = Net()
    net.register_buffer("shift", torch.full((1,), value), persistent=False)
    return net


def scaled(x: float, by: float = 2.0) -> float:
    return by * x


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "activation": (Net, lambda: Net(nn.Tanh())),
    "attribute": (Net, lambda: Net(temperature=2.0)),
    "attribute of a layer": (lambda: Net(nn.LeakyReLU(0.1)), lambda: Net(nn.LeakyReLU(0.2))),
    "class": (Net, Doubling),
    "hook": (Net, hooked),
    "buffer": (lambda: with_buffer(0.0), lambda: with_buffer(1.0)),
    "function": (lambda: Net(scale=scaled), lambda: Net(scale=partial(scaled, by=3.0))),
    "partial": (lambda: Net(scale=partial(scaled, by=2.5)), lambda: Net(scale=partial(scaled, by=3.0))),
    "lambda": (lambda: Net(scale=lambda x: x), lambda: Net(scale=lambda x: x + 1)),
}


def stored(tmp_path, net: nn.Module, output: Output = loss, forward=FORWARD) -> Tensor:
    images = tensor_images(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    task = task_from_module(net, forward, images, images, tmp_path)
    return rows(Gradient(output, uniform(2), Identity()), task, task.trajectory[0], images, "features").all()


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_has_features_of_its_own(name, tmp_path):
    make, other = NETWORKS[name]
    first = stored(tmp_path / "run", make())
    assert torch.equal(stored(tmp_path / "run", make()), first), "the same network made again finds them"
    folders = len(list((tmp_path / "run" / "features").iterdir()))
    assert folders == 1
    fresh = stored(tmp_path / "fresh", other())
    with refuses(what="belongs to another model"):
        stored(tmp_path / "run", other())
    assert len(list((tmp_path / "fresh" / "features").iterdir())) == 1
    assert name == "buffer" or not torch.equal(fresh, first)


def power(exponent: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda p, y: (p - y).abs().pow(exponent).mean(1)


def written_twice(first: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Two functions of one name."""
    if first:

        def error(p: Tensor, y: Tensor) -> Tensor:
            return (p - y).abs().mean(1)

    else:

        def error(p: Tensor, y: Tensor) -> Tensor:
            return (p - y).square().mean(1)

    return error


FACTOR = torch.tensor(2.0)
OUTPUTS = {
    "edited under its name": (
        Output("mine", written_twice(True), "lower"),
        Output("mine", written_twice(False), "lower"),
    ),
    "closure": (Output("mine", power(1.0), "lower"), Output("mine", power(2.0), "lower")),
    "named like a built-in": (loss, Output("loss", written_twice(True), "lower")),
    "lambdas": (
        Output("mine", lambda p, y: (p - y).abs().mean(1), "lower"),
        Output("mine", lambda p, y: (p + y).abs().mean(1), "lower"),
    ),
    "weight": (
        Output("mine", written_twice(True), "lower", weight=lambda forward, t: t + 1),
        Output("mine", written_twice(True), "lower", weight=lambda forward, t: t + 2),
    ),
    "partial": (
        Output("mine", partial(lambda p, y, by: by * (p - y).abs().mean(1), by=1.0), "lower"),
        Output("mine", partial(lambda p, y, by: by * (p - y).abs().mean(1), by=0.1), "lower"),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_another_output_has_features_of_its_own(name, tmp_path):
    first, second = (stored(tmp_path / "run", Net(), output) for output in OUTPUTS[name])
    assert not torch.equal(first, second)
    assert torch.equal(stored(tmp_path / "fresh", Net(), OUTPUTS[name][1]), second)
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2


def test_a_tensor_in_a_global_is_part_of_a_function():
    def error(p: Tensor, y: Tensor) -> Tensor:
        return FACTOR * (p - y).abs().mean(1)

    before = describe(error)
    FACTOR.fill_(3.0)
    after = describe(error)
    FACTOR.fill_(2.0)
    assert before != after
    assert describe(error) == before


@pytest.mark.parametrize("change", ["predict", "target", "state"])
def test_an_own_forward_is_known_by_its_code(change, tmp_path):
    class Shift:
        def __init__(self, by: float):
            self.by = by

        def __call__(self, call: Callable[..., Tensor], batch: Batch, draw: Draw) -> Tensor:
            return call(batch.x0 + self.by, draw.t)

    def forward(changed: bool) -> Custom:
        predict = Shift(1.0 if changed and change == "state" else 0.0)
        if change == "predict" and changed:
            return Custom(lambda call, batch, draw: call(batch.x0 - 1, draw.t), lambda batch, draw: draw.noise, 50)
        if change == "target" and changed:
            return Custom(predict, lambda batch, draw: 2 * draw.noise, 50)
        return Custom(predict, lambda batch, draw: draw.noise, 50)

    first, second = (stored(tmp_path, Net(), loss, forward(changed)) for changed in (False, True))
    assert not torch.equal(first, second)


def test_what_cannot_be_known_is_computed_anew_and_said(tmp_path):
    with open(__file__) as file:
        strange = Output("mine", lambda p, y: (p - y).abs().mean(1) * bool(file), "lower")
        with pytest.warns(UserWarning, match="computed anew in every process"):
            first = stored(tmp_path, Net(), strange)
        assert torch.equal(stored(tmp_path, Net(), strange), first), "within a process they are found"
        assert len(list((tmp_path / "features").iterdir())) == 1
        again = Output("mine", lambda p, y: (p - y).abs().mean(1) * bool(file), "lower")
        with pytest.warns(UserWarning, match="computed anew in every process"):
            stored(tmp_path, Net(), again)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_a_network_that_is_trained_on_after_the_task_was_made_is_refused(tmp_path):
    net, images = Net(), tensor_images(torch.randn(3, 4))
    task = task_from_module(net, FORWARD, images, images, tmp_path)
    with torch.no_grad():
        net.layer.weight.add_(1.0)
    part = Gradient(loss, uniform(2), Identity())
    with refuses(what="changed after the task was made", accepted="when training is done"):
        rows(part, task, task.trajectory[0], images, "features")


def test_the_network_of_the_user_stays_as_it_was(tmp_path):
    net = Net().train()
    net.layer.weight.grad = torch.ones(4, 4)
    before = copy.deepcopy(net.state_dict())
    images = tensor_images(torch.randn(3, 4))
    task = task_from_module(net, FORWARD, images, images, tmp_path, Engine(dtype=torch.float64))
    found = rows(Gradient(loss, uniform(2), Identity()), task, task.trajectory[0], images, "features").all()
    assert found.dtype == torch.float64
    assert net.training
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.layer.weight.grad, torch.ones(4, 4))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert not net.layer._forward_hooks


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compiled"])
def test_a_wrapped_network_is_the_network_in_it(wrap, tmp_path):
    assert torch.equal(stored(tmp_path, wrap(Net())), stored(tmp_path, Net()))
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_functions_of_libraries_are_known_by_name():
    assert describe(F.relu) == "torch.nn.functional.relu"
    assert describe(torch.relu) == "torch._VariableFunctionsClass.relu" or "relu" in describe(torch.relu)
    assert describe(Function(np.tanh, "d", name="tanh"))["name"] == "tanh"


def test_a_class_of_which_nothing_lasting_is_known_is_said_too():
    """A user's setting whose code holds an open file: no traceback, and nothing stored is used for it."""
    with open(__file__) as file:

        @dataclass(frozen=True)
        class Strange:
            size: int = 1

            def __call__(self) -> object:
                return file

        for thing in (Strange, Strange()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert describe(thing) == describe(thing)

        class Another(Strange):
            pass

        class Third(Strange):
            pass

        for thing in (Another, Third()):
            with pytest.warns(UserWarning, match="computed anew in every process"):
                describe(thing)
