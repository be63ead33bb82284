"""Every method, by name. A method is its parts: see `inner_product` for the formula they fill in.

To add one: write a function that returns an `InnerProduct` (or any function Task -> Scores), put `@method` above it, and
import it here; or keep it in a file of your own and call it by its path (docs/extending.md).
"""

# ruff: isort: skip_file
# The imports stand in the order in which `whence methods` lists the methods.

from __future__ import annotations

import dataclasses
from types import FunctionType
from typing import Any

from whence.curvature.solve import NoPreconditioner
from whence.methods.similarity import (
    abc_cosine,
    clip_cosine,
    dino_cosine,
    pixel_cosine,
    pixel_dot,
    representation_cosine,
    representation_dot,
    representation_l2,
)
from whence.methods.distilled import distilled
from whence.methods.nda import nda
from whence.methods.tracin import (
    gas,
    gas_layerwise,
    gradient_cosine,
    gradient_dot,
    output_cosine,
    output_dot,
    tracin,
    tracin_last_layer,
    tracin_projected,
)
from whence.methods.last_layer import last_layer_ridge
from whence.methods.influence import exact_influence, influence, relatif_loss, relatif_theta, renormalized_influence
from whence.methods.curvature import datainf, ek_fac, ek_fac_refined, influence_cg, influence_lissa, k_fac, source
from whence.methods.trak import d_trak, trak
from whence.methods.block_trak import block_trak, weighted_d_trak
from whence.methods.journey import journey_trak
from whence.methods.retrac import diffusion_tracin, retrac
from whence.methods.das import das, das_function
from whence.methods.unlearning import abu, abu_ek_fac, mucs
from whence.methods.groups import guda
from whence.methods.monitor import MontrageStyle
from whence.methods.further import FurtherTraining
from whence.methods.metagradient import AveragedMetagradient, Metagradient
from whence.methods.aggregate import last
from whence.methods.inner_product import InnerProduct
from whence.methods.normalize import none
from whence.methods.needs import NEEDS
from whence.methods.registry import (
    METHODS,
    Entry,
    build,
    check_needs,
    entry,
    load,
    method,
    settings_for,
    settings_of,
    takes,
    unfit,
)
from whence.types import describe

__all__ = [
    "METHODS",
    "NEEDS",
    "AveragedMetagradient",
    "Entry",
    "FurtherTraining",
    "Metagradient",
    "MontrageStyle",
    "abc_cosine",
    "abu",
    "abu_ek_fac",
    "block_trak",
    "build",
    "check_needs",
    "clip_cosine",
    "d_trak",
    "das",
    "das_function",
    "datainf",
    "describe_parts",
    "diffusion_tracin",
    "dino_cosine",
    "distilled",
    "ek_fac",
    "ek_fac_refined",
    "entry",
    "exact_influence",
    "gas",
    "gas_layerwise",
    "gradient_cosine",
    "gradient_dot",
    "guda",
    "influence",
    "influence_cg",
    "influence_lissa",
    "journey_trak",
    "k_fac",
    "last_layer_ridge",
    "load",
    "method",
    "mucs",
    "nda",
    "output_cosine",
    "output_dot",
    "pixel_cosine",
    "pixel_dot",
    "relatif_loss",
    "relatif_theta",
    "renormalized_influence",
    "representation_cosine",
    "representation_dot",
    "representation_l2",
    "retrac",
    "settings_for",
    "settings_of",
    "short",
    "source",
    "takes",
    "tracin",
    "tracin_last_layer",
    "tracin_projected",
    "trak",
    "unfit",
    "weighted_d_trak",
]


def describe_parts(method: Any) -> dict[str, str]:
    """The parts of a method, one short text per slot that is filled."""
    if not isinstance(method, InnerProduct):
        if isinstance(method, FunctionType):
            return {"method": method.__name__}
        kept = ("name", *(f.name for f in dataclasses.fields(method) if f.default is dataclasses.MISSING))
        given = [f for f in dataclasses.fields(method) if f.name not in kept and vars(method)[f.name] != f.default]
        return {"method": type(method).__name__} | {f.name: short(vars(method)[f.name]) for f in given}
    parts = {"features": short(method.train)}
    if method.query is not None:
        parts["query"] = short(method.query)
    if method.precondition != NoPreconditioner():
        parts["precondition"] = short(method.precondition)
    if method.normalize is not none:
        parts["normalize"] = method.normalize.__name__
    if method.aggregate is not last:
        parts["checkpoints"] = method.aggregate.__name__
    if method.weight is not None:
        parts["weight"] = method.weight.output.name
    if method.square:
        parts["score"] = "squared"
    return parts


def short(part: object) -> str:
    """A setting as people write it: Gradient(loss, Grid(10), SJLT(4096))."""
    if dataclasses.is_dataclass(part) and not isinstance(describe(part), str):
        shown = [f for f in dataclasses.fields(part) if vars(part)[f.name] != f.default]
        inside = ", ".join(f.name if vars(part)[f.name] is True else short(vars(part)[f.name]) for f in shown)
        return f"{type(part).__name__}({inside})"
    if isinstance(part, tuple):
        return f"{len(part)} x {short(part[0])}"
    return str(describe(part))
