"""The register of methods: `@method` puts a function into METHODS, with its paper, its price and what it needs.

The name and the settings of a method are read from the function itself. A method of one's own is called by its path,
`package.module:function`, wherever a name is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import numbers
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from whence.diffusion import outputs
from whence.diffusion.draws import Draws, once
from whence.methods.inner_product import FeatureMethod
from whence.methods.needs import NEEDS
from whence.methods.removal import READERS
from whence.types import Forward, Method, Task, WhenceError

Make = TypeVar("Make", bound=Callable[..., Any])

# What a method computes, in the words of `whence methods`.
ONE_PASS = "a gradient per image"
EVERY_CHECKPOINT = "a gradient per image and checkpoint"
WITH_CURVATURE = "a gradient per image, and passes for the curvature"
PRODUCTS = "passes over all images per step and query"
SEGMENTS = "a gradient per image, and curvature, for every checkpoint"
PROBES = "a gradient per image and probe"
PICTURES_ALONE = READS, EMBEDS, PATCHES = "reads the images", "embeds the images", "compares patches of the images"
HIDDEN = "a forward pass per image and draw"
EMBEDS_FITTED = "embeds the images by a network fitted to scores"

# Settings for a classifier, which ignores the draw.
NOTHING: Mapping[str, object] = {}
ONCE: Mapping[str, object] = {"draws": once()}
LABELS: Mapping[str, object] = {"output": outputs.cross_entropy, "draws": once()}
MARGIN: Mapping[str, object] = {"output": outputs.margin, "draws": once()}


@dataclass(frozen=True)
class Trial:
    """How `whence bench` tries a method, where it is not tried like the others.

    Args:
        own_draws: it measures pictures in a way of its own, and keeps its draws.
        measured: it measures queries on the draws of the bank alone; so does what trains again.
        fewer_draws: it gets the draws of the others divided by this.
        grid: a setting, and the values of it that are tried in place of dampings.
        ensemble: there is a row of its mean over models, too.
        sharpened: there is a row of its scores raised to powers, too.
        on_request: it takes hours, and is computed where it is named.
        baseline: the one that all are compared with.
    """

    own_draws: bool = False
    measured: bool = False
    fewer_draws: int = 1
    grid: tuple[str, tuple[float, ...]] | None = None
    ensemble: bool = False
    sharpened: bool = False
    on_request: bool = False
    baseline: bool = False


LIKE_THE_OTHERS = Trial()


@dataclass(frozen=True)
class Entry:
    """A method and what is known of it.

    Args:
        make: settings -> method.
        paper: who proposed it.
        year: when; None for a baseline without a paper.
        cost: what it computes.
        classifier: its settings for a classifier; None where it is for denoisers only.
        needs: keys of `NEEDS`, what it asks for besides weights, training images and queries.
        trial: how `whence bench` tries it.
    """

    make: Callable[..., Method]
    paper: str
    year: int | None
    cost: str
    classifier: Mapping[str, object] | None = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    trial: Trial = LIKE_THE_OTHERS

    @property
    def pictures_alone(self) -> bool:
        """Whether it never asks the model."""
        return self.cost in PICTURES_ALONE

    @property
    def retrains(self) -> bool:
        """Whether it trains the model again; one that asks for checkpoints as well only reads how it was trained."""
        return "training" in self.needs and "checkpoints" not in self.needs

    @property
    def measured(self) -> bool:
        """Whether `whence bench` has it measure queries on the draws of the bank alone."""
        return self.retrains or self.trial.measured


METHODS: dict[str, Entry] = {}


def method(
    paper: str,
    year: int | None,
    cost: str,
    classifier: Mapping[str, object] | None = NOTHING,
    needs: tuple[str, ...] = (),
    trial: Trial = LIKE_THE_OTHERS,
) -> Callable[[Make], Make]:
    """Put a function (or a class of settings) into METHODS under its own name; the method it returns is called so, too.

    Args:
        paper: who proposed it.
        year: when; None for a baseline without a paper.
        cost: what it computes.
        classifier: its settings for a classifier; None where it is for denoisers only.
        needs: keys of `NEEDS`.
        trial: how `whence bench` tries it.
    """

    def register(make: Make) -> Make:
        name = _own_name(make)
        if name in METHODS:
            raise WhenceError(f"there is a method {name!r} already", accepted="a function of another name")
        make = _naming(make)
        METHODS[name] = Entry(make, paper, year, cost, classifier, needs, trial)
        return make

    return register


def _own_name(make: Callable[..., Any]) -> str:
    """The name of a function; that of a class in lower case: AveragedMetagradient -> averaged_metagradient."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", make.__name__).lower()


def _naming(make: Make) -> Make:
    """The function; what it returns is called by the function's name where it has none."""
    if isinstance(make, type):
        return make

    @functools.wraps(make)
    def named(*given: object, **settings: object) -> object:
        made = make(*given, **understood(make, settings))
        return made.called(make.__name__) if isinstance(made, FeatureMethod) else made

    return cast(Make, named)


def understood(make: Callable[..., object], given: Mapping[str, object]) -> dict[str, object]:
    """Settings with a number for `draws`, which changes the count of the method's own rule, and a name for `output`; numbers
    of numpy as Python's own. What the method does not take is left to Python's own error.

    Args:
        make: settings -> method.
        given: setting -> value.
    """
    own = inspect.signature(make).parameters
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
    draws, rule, output = found.get("draws"), "draws" in own and own["draws"].default, found.get("output")
    if isinstance(draws, int) and not isinstance(draws, bool) and isinstance(rule, Draws):
        found["draws"] = rule.with_count(draws)
    if isinstance(output, str):
        found["output"] = outputs.Output.named(output)
    for name, value in found.items():
        if name in own and (accepted := unfit(make, name, value)):
            raise WhenceError(f"{name} is {value!r}", "setting", accepted)
    return found


PLAIN: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
PLAIN |= {type(None): "none (null)", outputs.Output: f"the name of one ({', '.join(outputs.OUTPUTS)}), or an Output"}
PLAIN |= {Draws: "how many, or draws like whence.uniform(10)"}


def unfit(make: Callable[..., object], name: str, value: object) -> str:
    """What a setting accepts, in words, where a value is nothing of it; empty where it is.

    Args:
        make: settings -> method. Its annotations say what its settings are; where there is none, its default and None fit.
        name: of the setting.
        value: for it.
    """
    default = inspect.signature(make).parameters[name].default
    known = default is not None and default is not inspect.Parameter.empty
    try:
        hint = typing.get_type_hints(make).get(name) or (_like(default) if known else object)
    except NameError:  # a user's own annotation, of what is imported for checkers of types alone
        return ""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if any(_is(value, typing.get_origin(kind) or kind) for kind in kinds):
        return ""
    words = " or ".join(PLAIN.get(kind) or f"a {kind.__name__ if isinstance(kind, type) else kind}" for kind in kinds)
    if kinds[0] in (Draws, outputs.Output):
        return words
    return f"{words}, like {name}={str(default).lower() if isinstance(default, bool) else default}" if known else words


def _like(default: object) -> object:
    """What a setting without an annotation takes: whole numbers may stand for any, and None may switch it off."""
    return (float if isinstance(default, int) and not isinstance(default, bool) else type(default)) | None


def _is(value: object, kind: object) -> bool:
    if kind in (int, float):  # a truth value is none, though Python counts it as one
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    try:
        return not isinstance(kind, type) or isinstance(value, kind)
    except TypeError:  # a protocol can only be tried
        return True


def load(path: str) -> Entry:
    """The method at `package.module:function`, imported as `python -m` would: the current folder comes first.

    Args:
        path: of a function that returns a method (settings -> method), or of a method itself (task -> scores, its one
            argument called `task`).
    """
    module, _, name = path.partition(":")
    if sys.path[0] != "":
        sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise WhenceError(
            f"method {path!r} cannot be imported ({error})", accepted="package.module:function, found from this folder"
        ) from None
    known = {id(known.make): known for known in METHODS.values()}
    if id(make) in known:
        return known[id(make)]
    if not callable(make):
        raise WhenceError(f"{path!r} is a {type(make).__name__}, no method", accepted="a function: settings -> method")
    if list(inspect.signature(make).parameters) == ["task"]:
        return Entry(lambda: make, "your own", None, "what it computes")
    return Entry(_naming(make), "your own", None, "what it computes")


def spelled(name: str) -> str:
    """A method's name as we write it: papers and people write D-TRAK, EK-FAC or TracIn. Others stay as they are.

    Args:
        name: as it was given; whence bench has names with an ending, too.
    """
    plain = {one.replace("_", ""): one for one in (*METHODS, *READERS)}
    squashed = re.sub(r"[-_ ]", "", name).lower()
    for ending in ("", "sharpened", "ensemble"):
        if squashed.endswith(ending) and (found := plain.get(squashed.removesuffix(ending))):
            return f"{found}_{ending}" if ending else found
    return name


def entry(name: str) -> Entry:
    """The method of this name, or an error with the nearest names."""
    if ":" in name:
        return load(name)
    name = spelled(name)
    if name in READERS:
        raise WhenceError(
            f"{name} reads retrained models",
            "method",
            f"`whence values LEDGER --method {name}`, or whence.values(ledger)",
        )
    if name not in METHODS:
        near = difflib.get_close_matches(name.lower(), METHODS, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ";"
        raise WhenceError(f"unknown method {name!r}{meant} `whence methods` lists all {len(METHODS)}")
    return METHODS[name]


def settings_of(name: str) -> dict[str, Any]:
    """The settings a method takes, with their defaults."""
    parameters = inspect.signature(entry(name).make).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "name"}


NOISE = {"shared": True, "own": False}


def takes(name: str) -> dict[str, Any]:
    """The settings that options can give a method, with their defaults: its own, and `noise` where it draws."""
    accepted = settings_of(name)
    own = accepted.get("draws")
    return accepted | ({"noise": "shared" if own.shared else "own"} if isinstance(own, Draws) else {})


def settings_for(name: str, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Plain values, as options and files have them, in a method's own terms.

    What the method does not take is left out, so that several methods may share the values.

    Args:
        name: of the method.
        given: setting -> value. An int for `draws` changes the count of the method's own rule and nothing else of it;
            `output` may be a name; `dim` 0 stands for no projection; `ensemble` for whether there is one; `noise` is
            "shared" or "own" (see `draws.Draws`).
        seed: of the draws.
    """
    accepted = settings_of(name)
    chosen = {key: value for key, value in given.items() if key in accepted}
    if isinstance(accepted.get("draws"), Draws):
        chosen["draws"] = _own_draws(name, accepted["draws"], chosen.get("draws"), seed)
        if "noise" in given:
            chosen["draws"] = dataclasses.replace(chosen["draws"], shared=NOISE[given["noise"]])
    if isinstance(output := chosen.get("output"), str):
        if output not in outputs.OUTPUTS:
            raise WhenceError(f"{name}: unknown output {output!r}; accepted: {', '.join(outputs.OUTPUTS)}")
        chosen["output"] = outputs.OUTPUTS[output]
    if "dim" in chosen:
        chosen["dim"] = chosen["dim"] or None
    if "ensemble" in chosen:
        chosen["ensemble"] = bool(chosen["ensemble"])
    return chosen


def _own_draws(name: str, own: Draws, asked: Draws | int | None, seed: int) -> Draws:
    if isinstance(asked, Draws):
        return asked
    try:
        return dataclasses.replace(own if asked is None else own.with_count(asked), seed=seed)
    except WhenceError as error:
        raise WhenceError(f"{name}: {error}") from None


def check_needs(name: str, task: Task) -> None:
    """Refuse a task that lacks what a method asks for, before anything is computed.

    Args:
        name: of the method, as in METHODS, or package.module:function.
        task: the question.
    """
    for need in entry(name).needs:
        check = NEEDS[need].check
        if check is not None:
            check(name, task)


def build(name: str, forward: Forward, settings: Mapping[str, object]) -> Method:
    """A method by name, with the settings that suit the kind of model and those given.

    Args:
        name: as in METHODS, or package.module:function.
        forward: says whether the model is a classifier.
        settings: those that are not the method's own.
    """
    chosen = entry(name)
    accepted = settings_of(name)
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise WhenceError(f"{name} has no setting {unknown[0]!r}; it takes {', '.join(accepted) or 'none'}")
    classifier = forward.models == "classifier"
    if classifier and chosen.classifier is None:
        raise WhenceError(f"{name} is for denoisers; this model is a classifier")
    given = {**(chosen.classifier or {} if classifier else {}), **understood(chosen.make, settings)}
    for setting in (NEEDS[need].setting for need in chosen.needs):
        if setting and not given.get(setting):  # before anything is computed for other methods
            told = f"{name} needs a folder, and none is given"
            raise WhenceError(told, "method", f"--set {setting}=FOLDER; docs/methods.md says of what")
    return chosen.make(**given)
