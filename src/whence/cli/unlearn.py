"""whence unlearn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

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
from whence.cli.options import Option, Verb
from whence.cli.settings import settings_per_method


@dataclass(frozen=True)
class Unlearn:
    """Take a picture out of a model, write the model without it, and draw from both.

    It writes OUTPUT/model, a pipeline folder, OUTPUT/before and OUTPUT/after, and OUTPUT/unlearned.png.
    """

    model: Annotated[Path, Option("A diffusers pipeline folder.", "Arguments", argument=True)]
    train_data_dir: TrainData
    query_data_dir: Annotated[Path, Option("Folder of the pictures.", DATA)]
    query: Annotated[str, Option("The picture that is forgotten, by its name.", DATA)]
    caption_column: CaptionColumn = None
    resolution: Resolution = None
    method: Annotated[str, Option("How it is forgotten.", METHOD, accepted=("abu", "abu_ek_fac", "mucs"))] = "abu"
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

    engine, root, size = engine_on(options.device), options.output_dir, options.resolution
    settings = settings_per_method((options.method,), {}, options.set, 0)[options.method]
    request = Request(options.model, options.train_data_dir, options.query_data_dir, root, resolution=size,
                      caption_column=options.caption_column, engine=engine)  # fmt: skip
    opened = request.opened
    refuse_guidance(opened, options.guidance_scale)
    method = build(options.method, opened.forward, settings)
    texts = None if options.prompts is None else prompts_in(options.prompts)
    how = Sampling(options.generate, options.seed, options.num_inference_steps, texts, options.guidance_scale)
    draw = drawing(opened, how, engine, size)
    task = request.task()
    asked = {"model": opened.final.digest, "query": options.query, "method": describe(method), "drawn": describe(how)}
    claim_pictures(root / "asked.json", asked, root / "before", root / "after")
    if not (root / "unlearn.json").is_file():  # it is written last
        found = room.unlearned(task, method, options.query, opened, draw, root / "model")
        for kind, pictures in (("before", found.before), ("after", found.after)):
            kept_pictures(root / kind, pictures, how.names)
        room.plot(found, f"Without {options.query}, by {options.method}", root / "unlearned.png")
        write_config(options, root)
        write_json(root / "unlearn.json", {"query": options.query, "method": options.method, **found.facts})
    typer.echo(json.dumps(read_json(root / "unlearn.json")))
    typer.echo(f"model: {root / 'model'}")
    typer.echo(f"pictures: {root / 'unlearned.png'}")


VERB = Verb(unlearn, Unlearn, config=True)
