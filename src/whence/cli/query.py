"""whence query."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import (
    DATA,
    DRAWING,
    METHOD,
    RUNNING,
    BatchSize,
    Budget,
    Device,
    Generate,
    GuidanceDrawn,
    PromptsDrawn,
    QueryData,
    Ray,
    StepsDrawn,
    Top,
    Workers,
    engine_on,
    queries_of,
    refuse_guidance,
    say_report,
)
from whence.cli.options import Option, Verb, error
from whence.cli.terminal import say


@dataclass(frozen=True)
class Query:
    """Ask an index, or a finished run folder, about other pictures: same model, same training images, same methods."""

    index: Annotated[Path, Option("What `whence index build` made, or a run folder.", "Arguments", argument=True)]
    query_data_dir: QueryData = None
    generate: Generate = None
    prompts: PromptsDrawn = None
    guidance_scale: GuidanceDrawn = None
    num_inference_steps: StepsDrawn = 50
    seed: Annotated[int, Option("Seed of the drawn pictures.", DRAWING, needs=("generate",))] = 0
    method: Annotated[
        tuple[str, ...], Option("Some of the methods of the index; all by default. May be repeated.", METHOD)
    ] = ()
    top: Top = None
    model: Annotated[Path | None, Option("Where the model is now; where it was by default.", DATA)] = None
    train_data_dir: Annotated[
        Path | None, Option("Where the training images are now; where they were by default.", DATA)
    ] = None
    output_dir: Annotated[
        Path | None, Option("Run folder of these pictures; one in the index by default, named by them.", RUNNING)
    ] = None
    batch_size: BatchSize = 16
    budget_mb: Budget = 256
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"


def query(options: Query) -> None:
    from whence.evaluation.index import Index
    from whence.methods.strongest import Strongest
    from whence.task import TITLE, explain

    pictures = queries_of(options)
    engine = engine_on(options.device, options.batch_size, options.budget_mb, options.workers, options.ray)
    index = Index.open(options.index, engine, options.model, options.train_data_dir)
    methods = index.chosen(options.method)
    refuse_guidance(index.request.opened, options.guidance_scale)
    if options.generate is not None and options.output_dir is None:
        raise error("--generate: drawn pictures need a run folder", accepted="--output_dir with it")
    request = index.asking(pictures, options.output_dir)
    task, on = request.task(), request.adapter
    facts = {
        "Model": seen(request.model) if on is None else f"{seen(request.model)} with {seen(on.folder)}",
        "Training images": f"{seen(request.train)} ({len(task.train):,})",
        "Pictures explained": f"{options.query_data_dir or task.root / 'generated'} ({len(task.queries):,})",
        "Index": str(index.root),
    }
    top = None if options.top is None else Strongest(options.top)
    if top is not None:
        top.check(len(task.queries), len(task.train))
    say_report(explain(task, methods, TITLE, facts, say=say, top=top))


def seen(path: object) -> str:
    """A path from here, without what goes down and up again."""
    return os.path.relpath(os.path.realpath(str(path)))


VERB = Verb(query, Query)
