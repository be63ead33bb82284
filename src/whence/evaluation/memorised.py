"""The neurons of memorised prompts, the model without them as a pipeline folder, and what it draws then.

asked.json            whose folder this is
references.safetensors, prompts/00000.json     what is known of each prompt as it is found; a run that was cut off goes on
model/, before/, after/, neurons.png           where neurons were found: the pipeline, and what both draw from the same noise
neurons.json          all of it; written last
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

from diffusers import ModelMixin
from transformers import CLIPTokenizer

from whence.data.layout import some
from whence.evaluation.neurons import (
    FEWEST,
    WHERE,
    Neuron,
    NeuronSearch,
    PromptNeurons,
    References,
    ValueLayers,
    neurons_of,
)
from whence.evaluation.preview import plot_rows
from whence.evaluation.same_prompt import FirstStep
from whence.evaluation.unlearned import write_pipeline
from whence.models import Model
from whence.storage.arrays import refuse_changed, seal_of_tensors, write_tensors
from whence.storage.files import FORMAT_VERSION, progress, read_json, telling, write_json
from whence.storage.opening import tensors_in
from whence.task import Sampling, claim_pictures, drawing, kept_pictures
from whence.types import Engine, WhenceError, describe

ORDINARY = tuple(
    f"{what} {where}"
    for what in (
        "a photo of a dog",
        "a painting of a house",
        "a drawing of two people",
        "a portrait of a woman",
        "a red car",
    )
    for where in ("in the snow", "by the sea", "at night", "in a garden", "on a street", "under a blue sky")
)
"""Prompts that hardly any model has learned by heart, for whoever gives no others."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a model.

    Args:
        prompts: that may bring back a memorised picture.
        reference: prompts that surely do not.
        first: how the first steps are looked at.
        search: how neurons are looked for.
        drawn: how many pictures are drawn of each memorised prompt, and how; its prompts are those.
    """

    prompts: tuple[str, ...]
    reference: tuple[str, ...] = ORDINARY
    first: FirstStep = field(default_factory=FirstStep)
    search: NeuronSearch = field(default_factory=NeuronSearch)
    drawn: Sampling = field(default_factory=lambda: Sampling(4))

    def __post_init__(self) -> None:
        both = [prompt for prompt in self.prompts if prompt in self.reference]
        if both:
            raise WhenceError(f"{both[0]!r} is asked about and a reference prompt", WHERE, "one of both")
        if len({*self.reference}) < FEWEST:
            told = f"{len({*self.reference})} reference prompts"
            raise WhenceError(told, WHERE, f"{FEWEST} or more different ones; 100 tell the threshold better")


def memorised(opened: Model, asked: Asked, root: Path, engine: Engine = Engine()) -> dict[str, object]:
    """Find the neurons, write the model without them, and draw from both: what neurons.json holds from now on.

    Args:
        opened: the model.
        asked: the prompts, and how they are looked at.
        root: the folder of the results.
        engine: how the work is carried out.
    """
    layers = ValueLayers(opened, asked.first, engine)
    how = replace(asked.drawn, prompts=asked.prompts)
    drawing(opened, how, engine, asked.first.resolution)  # refuses what it cannot draw, before the work
    identity = {"model": opened.final.digest, "asked": describe(asked)}
    claim_pictures(root / "asked.json", identity, root / "before", root / "after")
    if (root / "neurons.json").is_file():
        return cast("dict[str, object]", read_json(root / "neurons.json", dict))
    _tell_cut(opened, (*asked.reference, *asked.prompts), engine)
    references = _references(layers, _once(asked.reference), root / "references.safetensors")
    prompts = _once(asked.prompts)
    found = [
        _kept(root / "prompts" / f"{i:05d}.json", prompt, layers, references, asked.search)
        for i, prompt in enumerate(progress(prompts, "prompts"))
    ]
    off = {(neuron.layer, neuron.unit) for each in found for neuron in each.neurons}
    if off:
        _write_without(opened, asked, layers, [each for each in found if each.neurons], root, engine)
    result = _plain(found, references, layers, asked.search, len(off))
    write_json(root / "neurons.json", result)
    return result


def _once(prompts: Sequence[str]) -> tuple[str, ...]:
    """Prompts without repetitions, which are told."""
    found = tuple(dict.fromkeys(prompts))
    if len(found) < len(prompts):
        warnings.warn(f"prompts that repeat others, and count once: {len(prompts) - len(found)}", stacklevel=4)
    return found


def _tell_cut(opened: Model, prompts: Sequence[str], engine: Engine) -> None:
    """Warn of prompts of which the model reads only the beginning."""
    tokenizer = opened.parts(engine).load("tokenizer", CLIPTokenizer)
    most = int(tokenizer.model_max_length)
    long = [prompt for prompt in prompts if len(tokenizer(prompt, truncation=False).input_ids) > most]
    if long:
        told = f"prompts of more than the {most} tokens that {opened.folder} reads, which are cut: {len(long)}"
        warnings.warn(f"{told}, such as {some((repr(prompt[:40]) for prompt in long), 2)}", stacklevel=3)


def _references(layers: ValueLayers, prompts: Sequence[str], path: Path) -> References:
    if not path.is_file():
        found = layers.references(progress(prompts, "reference prompts"))
        tensors = {"similarity": found.similarity, "activations": found.activations}
        # One entry for both: the order of several is another one in every process.
        write_tensors(path, tensors, {"scales": f"{found.scales} {seal_of_tensors(tensors, str(found.scales))}"})
    again = "remove it, to run the reference prompts again"
    with telling(path, again), tensors_in(path, again) as opened:
        tensors = {name: opened.get_tensor(name) for name in ("similarity", "activations")}
        scales, _, seal = opened.metadata()["scales"].partition(" ")
    if seal:  # earlier versions wrote none
        refuse_changed(path, seal, tensors, scales, again)
    return References(**tensors, scales=int(scales))


def _kept(path: Path, prompt: str, layers: ValueLayers, references: References, how: NeuronSearch) -> PromptNeurons:
    """What is known of a prompt; from its file where it is there."""
    if not path.is_file():
        write_json(path, asdict(neurons_of(prompt, layers, references, how)))
    told = read_json(path, dict)
    with telling(path):
        return PromptNeurons(**{**told, "neurons": tuple(Neuron(**each) for each in told["neurons"])})


def _write_without(
    opened: Model, asked: Asked, layers: ValueLayers, found: Sequence[PromptNeurons], root: Path, engine: Engine
) -> None:
    """The pipeline without the neurons of some prompts, and pictures of these from both."""
    number = {unit: i for i, unit in enumerate(layers.units)}
    off = {number[neuron.layer, neuron.unit] for each in found for neuron in each.neurons}
    weights = {key: w.cpu() for key, w in layers.weights_without(off).items()}
    prompts = [each.prompt for each in found]
    how = replace(asked.drawn, count=asked.drawn.count * len(prompts), prompts=prompts)
    draw = drawing(opened, how, engine, asked.first.resolution)
    network = cast(ModelMixin, opened.final.load())
    rows = {"the model": draw(None).cpu().float()}
    write_pipeline(
        root / "model", opened, network, {key: w.to(network.get_parameter(key)) for key, w in weights.items()}
    )
    rows["without the neurons"] = draw(network).cpu().float()
    columns = [{"text": text} for text in how.texts or ()]
    for kind, pictures in zip(("before", "after"), rows.values(), strict=True):
        kept_pictures(root / kind, pictures, how.names, columns, root / "asked.json")
    before, after = rows.values()
    plot_rows(
        rows,
        ("change", after - before),
        f"Neurons switched off: {len(off)}, for {some(prompts, 2)}",
        root / "neurons.png",
    )


def _plain(
    found: Sequence[PromptNeurons], references: References, layers: ValueLayers, how: NeuronSearch, off: int
) -> dict[str, object]:
    threshold = references.threshold(how.deviations)
    return {
        "format_version": FORMAT_VERSION,
        "threshold": threshold,
        "nominal_rate": how.rate,
        "references": len(references.similarity),
        "references_above": int((references.similarity > threshold).sum()),
        "scales": references.scales,
        "layers": {name: layer.out_features for name, layer in layers.layers.items()},
        "prompts": [asdict(each) for each in found],
        "switched_off": off,
    }


def lines(result: Mapping[str, object]) -> list[str]:
    """What was found, for a terminal.

    Args:
        result: what `memorised` returns.
    """
    n, above = result["references"], result["references_above"]
    prompts = cast("list[dict[str, object]]", result["prompts"])
    flagged = [each for each in prompts if each["memorised"]]
    told = [_sentence(each) for each in flagged]
    threshold = f"threshold {result['threshold']:.3f}: {above} of the {n} reference prompts are above it"
    told += [f"{threshold} (nominally {100 * cast(float, result['nominal_rate']):.2g} %)"]
    if cast(int, result["scales"]) < 3:
        told += [f"the network's pictures are small: compared at {result['scales']} of 3 scales"]
    return [
        *told,
        f"{len(flagged)} of {len(prompts)} prompts look memorised; neurons switched off: {result['switched_off']}",
    ]


def _sentence(each: Mapping[str, object]) -> str:
    prompt, neurons = each["prompt"], cast("list[dict[str, object]]", each["neurons"])
    begin = f"{prompt!r} looks memorised: similarity {each['similarity']:.3f}, p = {each['p']:.2g}"
    if not neurons:
        return f"{begin}; no neurons do it: with all units off it is still {each['without']:.3f}"
    which = some(f"{neuron['layer']} {neuron['unit']}" for neuron in neurons)
    return f"{begin}; {each['without']:.3f} without {len(neurons)} of {each['candidates']} candidates: {which}"
