"""whence preview."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import (
    DATA,
    DRAWING,
    CaptionColumn,
    CustomDiffusion,
    Device,
    Guidance,
    InferenceSteps,
    Lora,
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
from whence.cli.terminal import say


@dataclass(frozen=True)
class Preview:
    """The model's pictures as they would be without some images, by differentiating its training, without training again."""

    model: Annotated[
        Path,
        Option(
            "A folder of `whence train`, or what a LoRA or Custom Diffusion lies on.",
            "Arguments",
            argument=True,
            hub="model",
        ),
    ]
    train_data_dir: TrainData
    without: Annotated[
        tuple[str, ...], Option("Images to leave out: column=value, id=NAME or a file of names; may be repeated.", DATA)
    ]
    caption_column: CaptionColumn = None
    resolution: Resolution = None
    lora: Lora = None
    custom_diffusion: CustomDiffusion = None
    generate: Annotated[int, Option("Pictures to draw.", DRAWING, min=1)] = 8
    prompts: Prompts = None
    guidance_scale: Guidance = None
    num_inference_steps: InferenceSteps = 50
    seed: NoiseSeed = 0
    points: Annotated[
        int,
        Option("Trainings differentiated on the way to the model without; more for more images.", "Method", min=1),
    ] = 1
    retrain: Annotated[bool, Option("Train the truth, too, and compare.", "Method")] = False
    output_dir: Output = Path("runs/preview")
    device: Device = "cpu"


KINDS = ("before", "predicted", "retrained")


def preview(options: Preview) -> None:
    from whence.evaluation import preview as room
    from whence.evaluation.source import Source
    from whence.features.rows import identity
    from whence.models import adapter_of
    from whence.storage.files import read_json, write_json
    from whence.storage.leftovers import sweep
    from whence.task import Sampling, claim_pictures, drawing, kept_pictures, prompts_in
    from whence.types import describe

    engine, root, size = engine_on(options.device), options.output_dir, options.resolution
    source = Source(options.model, adapter_of(options.lora, options.custom_diffusion), options.caption_column)
    opened = source.opened
    refuse_guidance(opened, options.guidance_scale)
    images = source.images(options.train_data_dir, size, root)
    removed = room.chosen(images, options.without)
    texts = None if options.prompts is None else prompts_in(options.prompts)
    how = Sampling(options.generate, options.seed, options.num_inference_steps, texts, options.guidance_scale)
    draw = drawing(opened, how, engine, size)
    asked: dict[str, object] = {
        "model": opened.final.digest,
        "images": identity(images),
        "without": list(options.without),
    }
    asked |= {"drawn": describe(how), "points": options.points, "retrain": options.retrain}
    claim_pictures(root / "asked.json", asked, *(root / kind for kind in KINDS))
    sweep(root)
    if not (root / "preview.json").is_file():  # it is written last
        study, network = source.study(images), opened.final.load()
        found = room.preview(network, study, images, removed, draw, options.retrain, engine, options.points)
        for kind, pictures in zip(KINDS, (found.before, found.predicted, found.retrained), strict=True):
            if pictures is not None:
                kept_pictures(root / kind, pictures, how.names, note=root / "asked.json")
        facts = {"without": list(options.without), "images": int(removed.sum()), "of": len(images), **found.facts()}
        title = f"Without {', '.join(options.without)}: {facts['images']} of {len(images)} images"
        room.plot(found, title, root / "preview.png")
        write_config(options, root)
        write_json(root / "preview.json", facts)
    say(json.dumps(read_json(root / "preview.json", dict)))
    say(f"pictures: {root / 'preview.png'}")


VERB = Verb(preview, Preview, config=True)
