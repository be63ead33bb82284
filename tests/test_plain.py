"""Settings are written down so that they can be read back: from_plain(describe(x)) == x, by way of JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from errors import refuses
from recipes import recipe_of
from whence.curvature.gram import Gram
from whence.diffusion import draws
from whence.diffusion.forward import CosMap, MinSNR, SigmaSqrt
from whence.diffusion.outputs import OUTPUTS, Output, probes
from whence.features.parts import Gradient, Value, unit_average
from whence.features.projections import SJLT, Gaussian, Grouped, Identity, Layerwise, Rademacher, TwoSided
from whence.methods import METHODS, entry, settings_of
from whence.training.recipe import Objective
from whence.types import describe, from_plain

SETTINGS: list[Any] = [
    draws.uniform(7, seed=3, unit=True),
    draws.stratified(8, seed=1),
    draws.Draws(draws.Repeated(draws.Linspace(5), 4), group=4, unit=True, shared=True),
    draws.Draws(draws.Quantiles(6, draws.LogitNormal(0.5, 2.0))),
    draws.Draws(draws.Steps((3, 1, 4))),
    draws.fixed(12, 3),
    draws.random(5),
    draws.cumulative(5),
    Identity(),
    SJLT(64, 3),
    Rademacher(16),
    Gaussian(16, 2),
    Layerwise(SJLT(32)),
    Grouped(None, 3),
    TwoSided(256),
    Objective(None, MinSNR(4.0)),
    Objective(None, SigmaSqrt(), draws.Mode(1.5)),
    Objective(OUTPUTS["elbo"], CosMap()),
    Gradient(OUTPUTS["loss"], draws.uniform(2), SJLT(8), "up-blocks"),
    Value(OUTPUTS["rmse"], draws.uniform(2), unit_average),
    Gram(0.3),
    recipe_of(10, output=OUTPUTS["weighted"], ema=0.9, flip=True),
]


def again(value: Any, hint: Any = Any) -> Any:
    return from_plain(json.loads(json.dumps(describe(value))), hint)


@pytest.mark.parametrize("value", SETTINGS, ids=lambda value: type(value).__name__)
def test_every_setting_is_read_back(value):
    assert again(value) == value


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=list(OUTPUTS))
def test_outputs_are_read_back_by_name(output):
    assert again(output, Output) is output


@pytest.mark.parametrize("name", METHODS)
def test_the_defaults_of_every_method_are_read_back(name):
    for setting, value in settings_of(name).items():
        assert again(value, type(value)) == value, setting


# What is described by the digest of files, or by directions that are drawn, is not made again from its name.
DIGESTED = {"clip_cosine", "dino_cosine", "abc_cosine"}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in DIGESTED])
def test_every_method_is_read_back(name):
    method = entry(name).make()
    assert again(method) == method


def test_a_name_that_nobody_has():
    with refuses("'Nonsense'"):
        from_plain({"is": "Nonsense"})


def test_a_field_that_the_class_has_not():
    with refuses("'width'", accepted="k, seed"):
        from_plain({"is": "SJLT", "k": 3, "width": 4})


def test_probes_are_read_back_from_their_names():
    assert again(probes(3, 5), tuple[Output, ...]) == probes(3, 5)
