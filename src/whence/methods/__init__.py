"""Every method by name. A method is its parts: see `inner_product` for the formula they fill in.

To add one: write a function that returns an `InnerProduct` (or any function Task -> Scores) and give it a line here.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from whence.curvature.solve import NoPreconditioner
from whence.diffusion import draws, outputs
from whence.diffusion.draws import Draws
from whence.methods import (
    block_trak,
    curvature,
    das,
    influence,
    journey,
    last_layer,
    metagradient,
    nda,
    retrac,
    similarity,
    tracin,
    trak,
)
from whence.methods.aggregate import last
from whence.methods.inner_product import InnerProduct
from whence.methods.normalize import none
from whence.types import Forward, Method, WhenceError, describe


@dataclass(frozen=True)
class Entry:
    """make: settings -> method; cost: what it computes; classifier: settings for a classifier, None where the method is for
    denoisers only; needs: keys of `NEEDS`, what it asks for besides weights, training images and queries."""

    make: Callable[..., Method]
    paper: str
    year: int | None
    cost: str
    classifier: Mapping[str, Any] | None = field(default_factory=dict)
    needs: tuple[str, ...] = ()


NEEDS = {
    "checkpoints": "checkpoint-N folders with their learning rates",
    "training": "a model made by `whence train`, which can be trained again",
    "journey": "queries that whence sampled (--generate)",
    "encoder": "the folder of an encoder",
    "layers": "Linear or Conv2d layers",
}

_ONE_PASS = "a gradient per image"
_EVERY = "a gradient per image and checkpoint"
_FACTORS = "a gradient per image, and passes for the curvature"
_PRODUCTS = "passes over all images per step and query"
_SEGMENTS = "a gradient per image, and curvature, for every checkpoint"
_PROBES = "a gradient per image and probe"
_HIDDEN = "a forward pass per image and draw"
_SUM = ("checkpoints",)
_LAYERS = ("layers",)
_LABELS = {"output": outputs.cross_entropy, "draws": draws.once()}

METHODS: dict[str, Entry] = {
    "pixel_dot": Entry(similarity.pixel_dot, "baseline", None, "reads the images"),
    "pixel_cosine": Entry(similarity.pixel_cosine, "baseline", None, "reads the images"),
    "clip_cosine": Entry(similarity.clip_cosine, "Radford et al.", 2021, "embeds the images", needs=("encoder",)),
    "dino_cosine": Entry(similarity.dino_cosine, "Caron et al.", 2021, "embeds the images", needs=("encoder",)),
    "representation_dot": Entry(similarity.representation_dot, "Hanawa et al.", 2021, _HIDDEN, {"draws": draws.once()}),
    "representation_cosine": Entry(
        similarity.representation_cosine, "Hanawa et al.", 2021, _HIDDEN, {"draws": draws.once()}
    ),
    "representation_l2": Entry(similarity.representation_l2, "Hanawa et al.", 2021, _HIDDEN, {"draws": draws.once()}),
    "nda": Entry(nda.nda, "arXiv 2510.14269", 2025, "compares patches of the images", None),
    "gradient_dot": Entry(tracin.gradient_dot, "Charpiat et al.", 2019, _ONE_PASS, _LABELS),
    "gradient_cosine": Entry(tracin.gradient_cosine, "Charpiat et al.", 2019, _ONE_PASS, _LABELS),
    "output_dot": Entry(tracin.output_dot, "Charpiat et al.", 2019, _PROBES, {"draws": draws.once()}),
    "output_cosine": Entry(tracin.output_cosine, "Charpiat et al.", 2019, _PROBES, {"draws": draws.once()}),
    "tracin": Entry(tracin.tracin, "Pruthi et al.", 2020, _EVERY, _LABELS, _SUM),
    "gas": Entry(tracin.gas, "Hammoudeh & Lowd", 2022, _EVERY, _LABELS, _SUM),
    "tracin_last_layer": Entry(tracin.tracin_last_layer, "Pruthi et al.", 2020, _EVERY, _LABELS, _SUM),
    "gas_layerwise": Entry(tracin.gas_layerwise, "Hammoudeh & Lowd", 2022, _EVERY, _LABELS, _SUM),
    "tracin_projected": Entry(tracin.tracin_projected, "Pruthi et al.", 2020, _EVERY, _LABELS, _SUM),
    "last_layer_ridge": Entry(
        last_layer.last_layer_ridge, "Ling", 1984, "k x k systems, k inputs of the last layer", {"draws": draws.once()}
    ),
    "influence": Entry(influence.influence, "Koh & Liang", 2017, _ONE_PASS, _LABELS),
    "exact_influence": Entry(influence.exact_influence, "Koh & Liang", 2017, "d x d matrix: small networks", _LABELS),
    "k_fac": Entry(curvature.k_fac, "Martens & Grosse", 2015, _FACTORS, _LABELS, _LAYERS),
    "ek_fac": Entry(curvature.ek_fac, "Grosse et al.", 2023, _FACTORS, _LABELS, _LAYERS),
    "ek_fac_refined": Entry(curvature.ek_fac_refined, "Wang et al.", 2025, _PRODUCTS, _LABELS, _LAYERS),
    "influence_cg": Entry(curvature.influence_cg, "Koh & Liang", 2017, _PRODUCTS, _LABELS),
    "influence_lissa": Entry(curvature.influence_lissa, "Koh & Liang", 2017, _PRODUCTS, _LABELS),
    "datainf": Entry(curvature.datainf, "Kwon et al.", 2024, "three passes over stored gradients", _LABELS),
    "source": Entry(curvature.source, "Bae et al.", 2024, _SEGMENTS, _LABELS, (*_SUM, *_LAYERS)),
    "relatif_theta": Entry(influence.relatif_theta, "Barshan et al.", 2020, _ONE_PASS, _LABELS),
    "relatif_loss": Entry(influence.relatif_loss, "Barshan et al.", 2020, _ONE_PASS, _LABELS),
    "renormalized_influence": Entry(influence.renormalized_influence, "Hammoudeh & Lowd", 2022, _ONE_PASS, _LABELS),
    "trak": Entry(trak.trak, "Park et al.", 2023, _ONE_PASS, {"output": outputs.margin, "draws": draws.once()}),
    "d_trak": Entry(trak.d_trak, "Zheng et al.", 2024, _ONE_PASS, None),
    "block_trak": Entry(
        block_trak.block_trak, "Womp Labs", 2024, _ONE_PASS, {"output": outputs.margin, "draws": draws.once()}
    ),
    "weighted_d_trak": Entry(block_trak.weighted_d_trak, "arXiv 2506.05647", 2025, _ONE_PASS, None),
    "journey_trak": Entry(
        journey.journey_trak,
        "Georgiev et al.",
        2023,
        "a gradient per image, one per step of a query",
        None,
        ("journey",),
    ),
    "diffusion_tracin": Entry(retrac.diffusion_tracin, "Xie et al.", 2024, _EVERY, None, (*_SUM, "training")),
    "retrac": Entry(retrac.retrac, "Xie et al.", 2024, _EVERY, None, (*_SUM, "training")),
    "das": Entry(das.das, "Lin et al.", 2025, "a gradient and 100 predictions per image", None),
    "das_function": Entry(das.das_function, "Lin et al.", 2025, "a gradient per image, one per probe of a query", None),
    "metagradient": Entry(
        metagradient.Metagradient, "Engstrom et al.", 2025, "half a training per query", None, ("training",)
    ),
    "averaged_metagradient": Entry(
        metagradient.AveragedMetagradient, "whence", 2026, "half a training per query and mask", None, ("training",)
    ),
}


def entry(name: str) -> Entry:
    """The method of this name, or an error with the nearest names."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 3) or list(METHODS)
        raise WhenceError(f"unknown method {name!r}; did you mean {' or '.join(near)}? `whence methods` lists all")
    return METHODS[name]


def settings_of(name: str) -> dict[str, Any]:
    """The settings a method takes, with their defaults."""
    parameters = inspect.signature(entry(name).make).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "name"}


def settings_for(name: str, given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Plain values, as options and files have them, in a method's own terms; what the method does not take is left out, so
    that several methods may share them.

    An int for `draws` changes the count of the method's own rule and nothing else of it; the draws take the seed. `output`
    may be a name, `dim` 0 stands for no projection, and `ensemble` for whether there is one.
    """
    accepted = settings_of(name)
    chosen = {key: value for key, value in given.items() if key in accepted}
    if isinstance(accepted.get("draws"), Draws):
        chosen["draws"] = _own_draws(name, accepted["draws"], chosen.get("draws"), seed)
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


def build(name: str, forward: Forward, settings: Mapping[str, Any]) -> Method:
    """A method by name, with the settings that suit the kind of model and those given."""
    chosen = entry(name)
    accepted = settings_of(name)
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise WhenceError(f"{name} has no setting {unknown[0]!r}; it takes {', '.join(accepted) or 'none'}")
    classifier = getattr(forward, "models", "denoiser") == "classifier"
    if classifier and chosen.classifier is None:
        raise WhenceError(f"{name} is for denoisers; this model is a classifier")
    return chosen.make(**{**(chosen.classifier or {} if classifier else {}), **settings})


def describe_parts(method: Any) -> dict[str, str]:
    """The parts of a method, one short text per slot that is filled."""
    if not isinstance(method, InnerProduct):
        return {"method": getattr(method, "__name__", type(method).__name__)}
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


def short(part: Any) -> str:
    """A setting as people write it: Gradient(loss, Grid(10), SJLT(4096))."""
    if dataclasses.is_dataclass(part) and not isinstance(describe(part), str):
        shown = [f for f in dataclasses.fields(part) if getattr(part, f.name) != f.default]
        inside = ", ".join(short(getattr(part, f.name)) for f in shown)
        return f"{type(part).__name__}({inside})"
    if isinstance(part, tuple):
        return f"{len(part)} x {short(part[0])}"
    return str(describe(part))
