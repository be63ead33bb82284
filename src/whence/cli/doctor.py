"""whence doctor."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from whence.cli.common import BY_DEFAULT, DATA, METHOD, MODEL, RUNNING, Resolution, engine_on
from whence.cli.options import Option, Verb, error
from whence.cli.settings import settings_per_method
from whence.cli.terminal import say

COUNTED = ("shapes",)  # counting from shapes looks at nothing else
_MODEL, _DATA = ("model",), ("train_data_dir",)
_ANY_DATA = ("train_data_dir", "query_data_dir")


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with model, data, disk or device, and what a run will cost, before it starts: measured for a model
    of pixels, counted from shapes (for 1,000 images, if none are given) for one of latents or text."""

    model: Annotated[Path | None, Option("A diffusers pipeline folder.", "Arguments", argument=True, hub="model")] = (
        None
    )
    train_data_dir: Annotated[Path | None, Option("Training images.", DATA, without=COUNTED, hub="dataset")] = None
    query_data_dir: Annotated[Path | None, Option("Pictures to explain.", DATA, without=COUNTED, hub="dataset")] = None
    resolution: Resolution = None
    caption_column: Annotated[
        str | None, Option("Column of the captions, text by default.", DATA, needs=_MODEL, without=COUNTED)
    ] = None
    classes: Annotated[
        str | None,
        Option("Names of the model's classes: a file, or names with commas.", DATA, needs=_MODEL, without=COUNTED),
    ] = None
    skip: Annotated[bool, Option("Leave out files that are not read.", DATA, needs=_ANY_DATA, without=COUNTED)] = False
    query_caption_column: Annotated[
        str | None,
        Option(
            "The same of the pictures to explain; as --caption_column by default.", DATA, needs=_MODEL, without=COUNTED
        ),
    ] = None
    lora: Annotated[Path | None, Option("A LoRA on the model.", MODEL, needs=_MODEL, without=COUNTED, hub="model")] = (
        None
    )
    shapes: Annotated[
        int | None,
        Option("Only count, from config.json files alone, for so many training images.", MODEL, min=1, needs=_MODEL),
    ] = None
    method: Annotated[tuple[str, ...], Option("Predict the cost of these.", METHOD, needs=_DATA, without=COUNTED)] = (
        BY_DEFAULT
    )
    draws: Annotated[int | None, Option("(timestep, noise) pairs per image.", METHOD, min=1, needs=_MODEL)] = None
    dim: Annotated[
        int | None,
        Option("Columns of the projection, if there are more parameters; 0 for none.", METHOD, min=0, needs=_MODEL),
    ] = None
    parameters: Annotated[
        str | None, Option("all, attention ... or a regular expression.", METHOD, needs=_DATA, without=COUNTED)
    ] = None
    no_errors: Annotated[bool, Option("Standard errors are not measured.", METHOD, needs=_DATA, without=COUNTED)] = (
        False
    )
    output_dir: Annotated[Path, Option("The run folder to be.", RUNNING, without=COUNTED)] = Path("runs/attribute")
    index_dir: Annotated[
        Path | None,
        Option(
            "The folder that runs share; what is there already is not counted.", RUNNING, needs=_DATA, without=COUNTED
        ),
    ] = None
    budget_mb: Annotated[int, Option("Megabytes for per-image gradients.", RUNNING, min=1, without=COUNTED)] = 256
    device: Annotated[str, Option("cpu, cuda, cuda:1 ...", RUNNING, without=COUNTED)] = "cpu"


def doctor(options: Doctor) -> None:
    from whence import doctor as room
    from whence.data.sources import layout_of
    from whence.models import adapter_of

    model, data = options.model, options.train_data_dir
    if options.shapes is not None:
        _count(options, options.shapes)
        return
    typed = {"draws": options.draws, "dim": options.dim, "parameters": options.parameters}
    methods = settings_per_method(options.method, typed, (), 0, options.lora is not None)
    engine = engine_on(options.device, budget_mb=options.budget_mb)
    adapter = adapter_of(options.lora, None)
    sides = (options.query_data_dir, options.output_dir, options.resolution)
    classes, skip, theirs = options.classes, options.skip, options.query_caption_column
    index = options.index_dir
    inputs = room.Inputs(
        model, data, *sides, adapter, options.caption_column, classes, skip, theirs, index, not options.no_errors
    )
    findings = room.examine(inputs)
    cost, latents = None, inputs.requirements.latents
    broken = any(finding.level == "error" for finding in findings)
    if not broken:
        _refuse_what_is_not_looked_at(options, latents)
    if not broken and model and data and not latents:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pictures: they are among the findings
            cost = room.predict(room.plan(inputs, engine), methods)
        broken = any(finding.level == "error" for finding in cost.findings)
    for line in room.lines(findings, cost):
        say(line)
    if not broken and model and latents:
        _count(options, 1000 if data is None else len(layout_of(data).names))
    if broken:
        raise typer.Exit(2)


def _refuse_what_is_not_looked_at(options: Doctor, latents: bool) -> None:
    """Which settings count depends on the model: what a method costs is measured for models of pixels only."""
    if latents and (options.method != BY_DEFAULT or options.parameters is not None):
        what = f"{options.model} sees latents or text: its cost is counted from shapes, whatever the method"
        raise error(what, accepted="no --method and no --parameters")
    if not latents and options.train_data_dir is None and (options.draws, options.dim) != (None, None):
        raise error("--draws and --dim: nothing is measured without images", accepted="--train_data_dir with them")


def _count(options: Doctor, images: int) -> None:
    from whence.doctor.shapes import lines

    if options.model is None:
        raise error("--shapes counts for a model; give its folder first")
    dim = 4096 if options.dim is None else options.dim or None  # 4096 columns is what methods project to by default
    for line in lines(options.model, images, options.draws or 10, dim, options.resolution):
        say(line)


VERB = Verb(doctor, Doctor)
