"""Settings: what options say becomes a method's own terms, and what is not said stays the method's own."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from functools import partial
from inspect import Parameter, signature
from types import UnionType
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import whence
from errors import refuses
from whence.cli.settings import settings_per_method
from whence.diffusion import draws, outputs
from whence.diffusion.draws import Cumulative, Draws, Fixed, Grid, LogitNormal, Quantiles, Repeated, Steps
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.features.gradients import TRAINED, select
from whence.methods import METHODS, build, settings_for, settings_of, takes, unfit
from whence.methods.inner_product import InnerProduct
from whence.types import WhenceError

DRAWING = [name for name in METHODS if "draws" in settings_of(name)]
RULES = (
    *(Grid(6), Cumulative(6), draws.Random(6), draws.Stratified(6), draws.Linspace(6), Fixed(3, 6)),
    *(Quantiles(6, LogitNormal(0.5)), Repeated(Grid(3), 2), Repeated(Fixed(3, 3), 2)),
)


@pytest.mark.parametrize("name", DRAWING)
def test_the_own_count_of_draws_is_the_default(name):
    """Law 12: an option at its default value changes nothing; only the count changes at any other."""
    own = settings_of(name)
    assert own | settings_for(name, {"draws": own["draws"].count}, 0) == own
    assert own | settings_for(name, {}, 0) == own
    assert settings_for(name, {}, 7)["draws"] == replace(own["draws"], seed=7)
    if isinstance(own["draws"].timesteps, Steps):
        own_count = f"{own['draws'].count}, or draws with other steps"
        with refuses(f"{name}: draws: 8 draws asked, but this rule names its steps", accepted=own_count):
            settings_for(name, {"draws": 8}, 0)
        return
    found = settings_for(name, {"draws": 8}, 5)
    rule = own["draws"].timesteps
    assert found == {"draws": replace(own["draws"], timesteps=replace(rule, count=8), seed=5)}


def test_defaults_live_once():
    """What a method is asked by has the defaults of what computes it: a reader finds one number, whichever he looks at."""
    found, compared = {}, 0
    for name, entry in METHODS.items():
        if isinstance(entry.make, type) or any(
            p.default is Parameter.empty for p in signature(entry.make).parameters.values()
        ):
            continue  # its settings are its fields; or it needs a folder
        made, given = entry.make(), settings_of(name)
        for field in fields(made):
            alike = field.name in given and field.default is not MISSING and type(made) is not InnerProduct
            compared += alike
            if alike and field.default != given[field.name]:
                found[name, field.name] = (given[field.name], field.default)
    assert compared > 3
    assert found == {}


def test_noise_is_shared_or_own_and_nothing_else_of_the_draws_changes():
    for name in DRAWING:
        own = settings_of(name)["draws"]
        for noise, shared in (("shared", True), ("own", False)):
            assert settings_for(name, {"noise": noise}, 3)["draws"] == replace(own, seed=3, shared=shared)
        if not isinstance(own.timesteps, Steps):
            found = settings_for(name, {"noise": "own", "draws": 8}, 0)["draws"]
            assert found == replace(own.with_count(8), shared=False)
        assert takes(name)["noise"] == ("shared" if own.shared else "own")
    assert "noise" not in takes("pixel_cosine")
    assert settings_for("pixel_cosine", {"noise": "own"}, 0) == {}


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_rule_with_another_count_is_the_same_rule(rule):
    keys = torch.arange(3)
    assert rule.with_count(6) == rule
    assert rule.with_count(4).count == 4
    assert rule.with_count(4)(1, keys, 1000).shape == (3, 4)
    assert rule.with_count(4).with_count(6) == rule
    whole = Draws(rule, seed=3, unit=True, shared=True, antithetic=True, group=2)
    assert whole.with_count(4) == replace(whole, timesteps=rule.with_count(4))
    with pytest.raises(WhenceError, match=r"odd|multiples of 2"):
        whole.with_count(5)


def test_names_of_outputs_and_no_projection():
    given = {"output": "rmse", "dim": 0, "damping": 0.5, "ensemble": ["folder"], "factor": 3.0}
    found = settings_for("d_trak", given, 0)
    assert found["output"] is outputs.rmse
    assert found["dim"] is None
    assert (found["damping"], found["ensemble"]) == (0.5, True)
    assert "factor" not in found
    assert settings_for("pixel_dot", {"draws": 4}, 0) == {}
    with refuses("d_trak: unknown output 'nonsense'", accepted="loss, elbo"):
        settings_for("d_trak", {"output": "nonsense"}, 0)


PLAIN = {bool: (True, ("yes", 1)), int: (3, (2.5, "3", True)), float: (0.5, ("0.5", True)), str: ("all", (1,))}
HINTS = [
    (name, key, get_args(hint) if isinstance(hint, UnionType) else (hint,))
    for name in METHODS
    for key, hint in get_type_hints(METHODS[name].make).items()
    if key != "return"
]


@pytest.mark.parametrize(("name", "key", "kinds"), HINTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_setting_takes_values_of_its_own_kind_and_no_others(name, key, kinds):
    """In Python and by --set alike: what is refused here would be a traceback there, or a wrong answer."""
    make = METHODS[name].make
    for kind in [kind for kind in kinds if kind in PLAIN]:
        fits, others = PLAIN[kind]
        assert not unfit(make, key, fits)
        for other in others:
            assert unfit(make, key, other), f"{key}={other!r}"
    assert (unfit(make, key, None) == "") == (type(None) in kinds)
    assert unfit(make, key, object())


def test_a_method_of_ones_own_needs_no_annotations():
    def mine(dim=64, power=2, name="x"):
        return dim, power, name

    for fits in ({"dim": None}, {"power": 2.5}, {"name": "y"}):
        assert not [unfit(mine, key, value) for key, value in fits.items() if unfit(mine, key, value)]
    assert unfit(mine, "power", "2") == "a number or none (null), like power=2"


def test_settings_of_another_kind_are_refused_wherever_a_method_is_made():
    for wrong in ({"damping": "0.1"}, {"dim": 32.0}, {"draws": "10"}, {"ensemble": "no"}):
        (key,) = wrong
        for make in (whence.trak, partial(build, "trak", Denoiser(linear_schedule(10)))):
            with refuses(f"{key} is {wrong[key]!r}", where="setting", accepted="like"):
                make(**wrong) if make is whence.trak else make(wrong)
    with refuses("--set rank=2.5", accepted="a whole number or none (null)"):
        settings_per_method(["metagradient"], {}, ["rank=2.5"], 0)
    found = settings_per_method(["averaged_metagradient"], {}, ["resample_draws=null"], 0)["averaged_metagradient"]
    assert found["resample_draws"] is None, "as docs/through-training.md has it"
    assert whence.trak(dim=np.int64(32)) == whence.trak(dim=32)


@pytest.mark.parametrize("name", [name for name in METHODS if "parameters" in settings_of(name)])
def test_gradients_are_of_what_was_trained(name):
    expected = "last-layer" if name == "tracin_last_layer" else TRAINED
    assert settings_of(name)["parameters"] == expected


def test_trained_is_what_asks_for_gradients():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    every = [name for name, _ in net.named_parameters()]
    assert select(net, TRAINED) == select(net, "all") == every
    net[0].requires_grad_(False)
    assert select(net, TRAINED) == ["1.weight", "1.bias"]
    assert select(net, "all") == every
    with refuses("'trained': all parameters of this Sequential are frozen", accepted="requires_grad_()"):
        select(net.requires_grad_(False), TRAINED)
