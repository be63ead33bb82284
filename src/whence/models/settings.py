"""Entries of the configurations of models and schedulers: refused by name where their type or value means nothing.

Types are those of the class's own arguments in diffusers, read leniently: null is taken where it is the default, and entries
that a class does not know stay as they are (they are named elsewhere). Values are bounded by name: a number is finite, and
not negative unless its name is among those that may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from whence.storage.jsons import shortly
from whence.types import WhenceError

Bounds = tuple[float, float]  # both included
LARGE, TINY = 1e9, 1e-12
BOUNDS: Mapping[str, Bounds] = {
    "*num_train_timesteps": (1, 1_000_000),
    "beta_start": (TINY, 1),
    "beta_end": (TINY, 1),
    "trained_betas": (0, 1),
    "*dropout*": (0, 1),
    "*layers*": (0, 1000),
    "dual_attention_layers": (0, 1000),
    "norm_eps": (TINY, 1),
    "dynamic_thresholding_ratio": (TINY, 1),
    "clip_sample_range": (TINY, LARGE),
    "sample_max_value": (TINY, LARGE),
    "scaling_factor": (TINY, LARGE),
    "mid_block_scale_factor": (TINY, LARGE),
    "in_channels": (1, 65_536),
    "out_channels": (1, 65_536),
    "block_out_channels": (1, 65_536),
    "num_class_embeds": (1, 10_000_000),
    "sample_size": (1, 65_536),
    "attention_head_dim": (1, 65_536),
    "patch_size": (1, 65_536),
    "shift": (TINY, LARGE),
    "steps_offset": (0, 1_000_000),
    "solver_order": (1, 3),
    "shift_factor": (-LARGE, LARGE),
    "latents_mean": (-LARGE, LARGE),
    "lambda_min_clipped": (-math.inf, LARGE),
    "*": (0, LARGE),
}
"""By name, the first that fits; of lists, each number in them."""
CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
}


def refuse_settings(kind: type, config: Mapping[str, Any], where: Path) -> None:
    """Refuse entries of a configuration that the class cannot mean.

    Args:
        kind: a class of diffusers.
        config: the content of a file.
        where: the file.
    """
    hints = hints_of(kind)
    for name, value in config.items():
        if name.startswith("_"):
            continue
        refuse_value(name, value, where)
        if name in hints and not fits(value, hints[name]):
            if value is None and default_of(kind, name) is None:
                continue
            raise WhenceError(f"{name} is {shortly(value)}", str(where), words(hints[name]) or "another value")


def refuse_value(name: str, value: object, where: Path) -> None:
    """Refuse an entry with a number, or a choice, that no class can mean.

    Args:
        name: of the entry.
        value: of the entry.
        where: the file.
    """
    low, high = next(bounds for pattern, bounds in BOUNDS.items() if fnmatch(name, pattern))
    for number in _numbers(value):
        if not low <= number <= high:  # NaN is in no range
            least = "above 0" if low == TINY else f"{low:g} or more"
            raise WhenceError(f"{name} is {shortly(number)}", str(where), f"{least}, {high:g} at most")
    if name in CHOICES and value not in CHOICES[name]:
        raise WhenceError(f"{name} is {shortly(value)}", str(where), ", ".join(one or "null" for one in CHOICES[name]))


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@cache
def hints_of(kind: type) -> Mapping[str, Any]:
    """The types of the arguments of a class; {} where its annotations cannot be read."""
    try:
        return {name: hint for name, hint in get_type_hints(vars(kind)["__init__"]).items() if name != "return"}
    except (KeyError, NameError, TypeError, AttributeError):
        return {}


def default_of(kind: type, name: str) -> object:
    """What a class takes where an entry is left out."""
    found = signature(kind).parameters.get(name)
    return None if found is None or found.default is found.empty else found.default


def fits(value: object, hint: Any) -> bool:
    """Whether a value of JSON is one that an annotation of diffusers means."""
    origin, inner = get_origin(hint), get_args(hint)
    if value is None or hint is Any:
        return hint not in LEAVES  # null, where an annotation does not say that it is none
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner if one is not NoneType)
    if origin in (tuple, list) or hint in (tuple, list, np.ndarray):
        return isinstance(value, list) and (not inner or all(fits(one, inner[0]) for one in value))
    return LEAVES[hint](value) if hint in LEAVES else True


LEAVES: Mapping[Any, Callable[[object], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: type(value) is int,
    float: lambda value: type(value) in (int, float),
    str: lambda value: isinstance(value, str),
}
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def words(hint: Any) -> str:
    """What an annotation means, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(words, inner))))
    if origin in (tuple, list) or hint in (tuple, list, np.ndarray):
        return "a list"
    return "null" if hint is NoneType else NAMES.get(hint, "")
