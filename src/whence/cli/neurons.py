"""whence neurons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import (
    DATA,
    DRAWING,
    METHOD,
    Device,
    Guidance,
    InferenceSteps,
    NoiseSeed,
    Output,
    Resolution,
    engine_on,
    refuse_guidance,
    write_config,
)
from whence.cli.options import Option, Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Neurons:
    """Find the neurons that bring back memorised pictures (NeMo), write the model without them, and draw from both.

    It writes OUTPUT/neurons.json, and where neurons are found OUTPUT/model, a pipeline folder, OUTPUT/before, OUTPUT/after
    and OUTPUT/neurons.png.
    """

    model: Annotated[
        Path, Option("A diffusers pipeline folder that reads text.", "Arguments", argument=True, hub="model")
    ]
    prompts: Annotated[Path, Option("A file with a prompt per line, which may bring back a memorised picture.", DATA)]
    reference_prompts: Annotated[
        Path | None,
        Option("A file with a prompt per line that surely does not, 10 or more; 30 plain ones by default.", DATA),
    ] = None
    resolution: Resolution = None
    noises: Annotated[int, Option("Noises whose first steps are compared.", METHOD, min=2)] = 10
    deviations: Annotated[
        float, Option("Standard deviations above the mean of the reference prompts where memorised ones begin.", METHOD)
    ] = 1.0
    generate: Annotated[int, Option("Pictures of each memorised prompt to draw from both.", DRAWING, min=1)] = 4
    guidance_scale: Guidance = None
    num_inference_steps: InferenceSteps = 50
    seed: NoiseSeed = 0
    output_dir: Output = Path("runs/neurons")
    device: Device = "cpu"


def neurons(options: Neurons) -> None:
    from whence.evaluation import memorised as room
    from whence.evaluation.neurons import NeuronSearch
    from whence.evaluation.same_prompt import FirstStep
    from whence.models import open_model
    from whence.task import Sampling, prompts_in

    engine, root, steps = engine_on(options.device), options.output_dir, options.num_inference_steps
    opened = open_model(options.model)
    refuse_guidance(opened, options.guidance_scale)
    reference = room.ORDINARY if options.reference_prompts is None else tuple(prompts_in(options.reference_prompts))
    first = FirstStep(options.noises, options.seed, steps, options.resolution)
    drawn = Sampling(options.generate, options.seed, steps, None, options.guidance_scale)
    prompts, search = tuple(prompts_in(options.prompts)), NeuronSearch(options.deviations)
    result = room.memorised(opened, room.Asked(prompts, reference, first, search, drawn), root, engine)
    write_config(options, root)
    for line in room.lines(result):
        say(line)
    if result["switched_off"]:
        say(f"model: {root / 'model'}")
        say(f"pictures: {root / 'neurons.png'}")
    say(f"details: {root / 'neurons.json'}")


VERB = Verb(neurons, Neurons, config=True)
