"""whence unlearn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import (
    DATA,
    DRAWING,
    METHOD,
    CaptionColumn,
    Device,
    Guidance,
    InferenceSteps,
    NoiseSeed,
    Output,
    Prompts,
    Resolution,
    TrainData,
    engine_on,
    refuse_guidance,
    write_config,
)
from whence.cli.options import Option, Verb, error
from whence.cli.settings import settings_per_method
from whence.cli.terminal import say


@dataclass(frozen=True)
class Unlearn:
    """Take a picture, or a group of training images, out of a model, write the model without it, and draw from both.

    It writes OUTPUT/model, a pipeline folder, OUTPUT/before and OUTPUT/after, and OUTPUT/unlearned.png.
    """

    model: Annotated[Path, Option("A diffusers pipeline folder.", "Arguments", argument=True, hub="model")]
    train_data_dir: TrainData
    query_data_dir: Annotated[Path | None, Option("Folder of the pictures.", DATA, needs=("query",))] = None
    query: Annotated[
        str | None, Option("The picture that is forgotten, by its name.", DATA, needs=("query_data_dir",))
    ] = None
    group: Annotated[
        str | None,
        Option("Training images that are forgotten, as column=value, like creator=anna.", DATA, without=("query",)),
    ] = None
    caption_column: CaptionColumn = None
    resolution: Resolution = None
    method: Annotated[
        str | None,
        Option(
            "How it is forgotten: abu (by default), abu_ek_fac or mucs a picture, guda a group.",
            METHOD,
            accepted=("abu", "abu_ek_fac", "mucs", "guda"),
        ),
    ] = None
    set: Annotated[
        tuple[str, ...], Option("name=value of a setting of the method, like rise=0.5; may be repeated.", METHOD)
    ] = ()
    generate: Annotated[int, Option("Pictures to draw from both.", DRAWING, min=1)] = 8
    prompts: Prompts = None
    guidance_scale: Guidance = None
    num_inference_steps: InferenceSteps = 50
    seed: NoiseSeed = 0
    output_dir: Output = Path("runs/unlearn")
    device: Device = "cpu"


def unlearn(options: Unlearn) -> None:
    from whence.evaluation import unlearned as room
    from whence.methods import build
    from whence.storage.files import read_json, write_json
    from whence.task import Request, Sampling, claim_pictures, drawing, kept_pictures, prompts_in
    from whence.types import describe

    name, what, column = _forgotten(options)
    engine, root, size = engine_on(options.device), options.output_dir, options.resolution
    pairs = options.set if column is None else (*options.set, f"by={json.dumps(column)}")
    settings = settings_per_method((name,), {}, pairs, 0)[name]
    pictures = options.query_data_dir or options.train_data_dir  # a group asks about none
    request = Request(options.model, options.train_data_dir, pictures, root, resolution=size,
                      caption_column=options.caption_column, engine=engine)  # fmt: skip
    opened = request.opened
    refuse_guidance(opened, options.guidance_scale)
    method = build(name, opened.forward, settings)
    texts = None if options.prompts is None else prompts_in(options.prompts)
    how = Sampling(options.generate, options.seed, options.num_inference_steps, texts, options.guidance_scale)
    draw = drawing(opened, how, engine, size)
    task = request.task() if column is None else room.task_without_queries(request)
    room.known(task, method, what)
    asked = {"model": opened.final.digest, "query": what, "method": describe(method), "drawn": describe(how)}
    claim_pictures(root / "asked.json", asked, root / "before", root / "after")
    if not (root / "unlearn.json").is_file():  # it is written last
        found = room.unlearned(task, method, what, opened, draw, root / "model")
        for kind, drawn in (("before", found.before), ("after", found.after)):
            kept_pictures(root / kind, drawn, how.names, note=root / "asked.json")
        title = what if column is None else f"the {found.facts['images']:g} images of {column} {what}"
        room.plot(found, f"Without {title}, by {name}", root / "unlearned.png")
        write_config(options, root)
        write_json(root / "unlearn.json", {"query": what, "method": name, **found.facts})
    told = read_json(root / "unlearn.json", dict)
    say(json.dumps(told))
    if column is not None:
        rises = f"{told['forgotten']:.3g} times what it was, that of the others {told['retained']:.3g} times"
        say(f"the loss of the {told['images']:g} images of {column} {what} is {rises}")
    say(f"model: {root / 'model'}")
    say(f"pictures: {root / 'unlearned.png'}")


def _forgotten(options: Unlearn) -> tuple[str, str, str | None]:
    """The method, what is forgotten, and the column that names it where it is a group."""
    if (options.query is None) == (options.group is None):
        told = "--query and --group" if options.group else "nothing to forget"
        raise error(told, accepted="--query PICTURE with --query_data_dir, or --group column=value")
    if options.group is None:
        name = options.method or "abu"
        if name == "guda":
            raise error("--method guda forgets groups", accepted="--group column=value, or abu, abu_ek_fac, mucs")
        return name, str(options.query), None
    column, sign, value = options.group.partition("=")
    if not (column and sign and value):
        raise error(f"--group {options.group!r}", accepted="column=value, like creator=anna")
    if options.method not in (None, "guda"):
        raise error(f"--method {options.method} forgets pictures", accepted="guda")
    return "guda", value, column


VERB = Verb(unlearn, Unlearn, config=True)
