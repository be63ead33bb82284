"""whence attribute."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import (
    BY_DEFAULT,
    DATA,
    METHOD,
    RUNNING,
    BatchSize,
    Budget,
    CaptionColumn,
    Classes,
    CustomDiffusion,
    Damping,
    Device,
    Dim,
    Draws,
    Ensemble,
    FeatureDtype,
    Generate,
    GuidanceDrawn,
    Lora,
    MeasuredOutput,
    Methods,
    NoErrors,
    Noise,
    Output,
    Parameters,
    PromptsDrawn,
    QueryData,
    Ray,
    Resolution,
    Settings,
    Skip,
    StepsDrawn,
    Top,
    TrainData,
    Workers,
    engine_on,
    queries_of,
    refuse_guidance,
    say_report,
    write_config,
)
from whence.cli.options import Option, Verb, error
from whence.cli.settings import TYPED, settings_per_method
from whence.cli.terminal import say

if TYPE_CHECKING:
    from whence.methods.candidates import Candidates
    from whence.methods.question import Question
    from whence.methods.strongest import Strongest
    from whence.task import References, Request
    from whence.types import Task


@dataclass(frozen=True)
class Attribute:
    """Score every training image for every picture, and write a report."""

    model: Annotated[Path, Option("A diffusers pipeline folder.", "Arguments", argument=True, hub="model")]
    train_data_dir: TrainData
    query_data_dir: QueryData = None
    generate: Generate = None
    prompts: PromptsDrawn = None
    guidance_scale: GuidanceDrawn = None
    num_inference_steps: StepsDrawn = 50
    lora: Lora = None
    custom_diffusion: CustomDiffusion = None
    ensemble: Ensemble = ()
    caption_column: CaptionColumn = None
    query_caption_column: Annotated[
        str | None,
        Option("The same of the pictures to explain; as --caption_column, and text for drawn ones.", DATA),
    ] = None
    resolution: Resolution = None
    classes: Classes = None
    skip: Skip = False
    method: Methods = BY_DEFAULT
    draws: Draws = None
    noise: Noise = None
    dim: Dim = None
    damping: Damping = None
    output: MeasuredOutput = None
    parameters: Parameters = None
    set: Settings = ()
    mask: Annotated[
        Path | None,
        Option(
            "Ask about a part of the pictures: a grey picture of their shape, white where it is asked about.",
            METHOD,
            without=("candidates",),
        ),
    ] = None
    timesteps: Annotated[
        str | None,
        Option(
            "Ask about some timesteps, as LOW-HIGH: LOW to HIGH - 1 of the schedule, 0 the least noisy.",
            METHOD,
            without=("candidates",),
        ),
    ] = None
    candidates: Annotated[
        int | None,
        Option(
            "Score only the training images that a cheap method ranks among the first so many of any picture.",
            METHOD,
            min=1,
            without=("top",),
        ),
    ] = None
    candidates_by: Annotated[
        str,
        Option("The cheap method, with its own settings unless it is a --method too.", METHOD, needs=("candidates",)),
    ] = "pixel_cosine"
    top: Top = None
    no_errors: NoErrors = False
    reference_data_dir: Annotated[
        Path | None,
        Option(
            "Held-out pictures: whether a picture leans on single images more than these do is told.",
            DATA,
            without=("top",),
        ),
    ] = None
    false_discovery_rate: Annotated[
        float,
        Option(
            "Of the pictures that are said to lean on single images, the share that is so by chance.",
            DATA,
            needs=("reference_data_dir",),
        ),
    ] = 0.1
    statistic: Annotated[
        str,
        Option(
            "How much a picture leans on few images: by the mean of its ten largest scores, or by what stands out alone.",
            DATA,
            accepted=("first_mean", "largest", "first_share", "concentration"),
            needs=("reference_data_dir",),
        ),
    ] = "first_mean"
    copy_rate: Annotated[
        float,
        Option(
            "Warn of pictures that look like copies: the share that is flagged by chance, 0 for none.", DATA, min=0.0
        ),
    ] = 0.01
    seed: Annotated[int, Option("Seed of the drawn pictures and of a method's draws.", METHOD)] = 0
    output_dir: Output = Path("runs/attribute")
    index_dir: Annotated[
        Path | None,
        Option("Folder that several runs share: what is computed of the training images is kept there, once.", RUNNING),
    ] = None
    feature_dtype: FeatureDtype = None
    batch_size: BatchSize = 16
    budget_mb: Budget = 256
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"


def attribute(options: Attribute) -> None:
    from whence.evaluation.copies import check_rate
    from whence.methods import build, describe_parts
    from whence.task import TITLE, check_methods, explain

    if options.copy_rate:
        check_rate(options.copy_rate, "--copy_rate")
    settings = vars(options)
    typed = {name: settings[name] for name in TYPED}
    methods = settings_per_method(options.method, typed, options.set, options.seed, options.lora is not None)
    request, question = _request(options), _question(options)
    forward = request.opened.forward
    refuse_guidance(request.opened, options.guidance_scale)
    if options.seed != Attribute.seed and options.generate is None and not any("draws" in s for s in methods.values()):
        raise error(f"--seed: nothing is drawn by {', '.join(methods)}", accepted="--generate, or a method with draws")
    candidates = _candidates(options)
    named = {} if candidates is None else {candidates.by: candidates.settings}
    built = {name: build(name, forward, chosen) for name, chosen in {**named, **methods}.items()}
    if candidates is not None:
        candidates.check(built)
    for name, method in built.items():
        say(f"{name}: {json.dumps(describe_parts(method), default=str)}")
    if question is not None:
        for name, method in built.items():
            question.asked(
                name, method, forward, (1, request.size, request.size)
            )  # refused before anything is computed
    check_methods(request, built)
    references = _references(options, request)
    task, on = request.task(), request.adapter
    write_config(options, task.root)  # not before: a run that is refused changes nothing
    pictures = options.query_data_dir or options.output_dir / "generated"
    facts = {
        "Model": str(options.model) if on is None else f"{options.model} with {on.folder}",
        "Training images": f"{options.train_data_dir} ({len(task.train):,})",
        "Pictures explained": f"{pictures} ({len(task.queries):,})",
        **_copies(options, task),
    }
    if references is not None:
        facts["Compared with"] = f"{options.reference_data_dir} ({len(references.images):,} held-out pictures)"
    top = _top(options)
    if top is not None:
        top.check(len(task.queries), len(task.train))
        facts["Kept"] = f"the {options.top:,} strongest and weakest images of each picture"
    say_report(explain(task, methods, TITLE, facts, candidates, say, references, question, top))


def _top(options: Attribute) -> Strongest | None:
    from whence.methods.strongest import Strongest

    return None if options.top is None else Strongest(options.top)


def _references(options: Attribute, request: Request) -> References | None:
    from whence.task import References

    if options.reference_data_dir is None:
        return None
    rate = options.false_discovery_rate
    if not 0 < rate < 1:
        raise error(f"--false_discovery_rate {rate:g}", accepted="above 0 and below 1")
    return References(request.references(options.reference_data_dir), rate, options.statistic)


def _copies(options: Attribute, task: Task) -> dict[str, str]:
    """What the page says of how copies were looked for; what was found is kept in the run folder, for the page."""
    from whence.evaluation import copies
    from whence.storage.owned import claimed

    if options.copy_rate == 0:
        (task.root / copies.COPIES).unlink(missing_ok=True)
        return {}
    # With few training images the default finds exact copies alone; a rate that somebody asks for is kept or refused.
    how = copies.Look(options.copy_rate, exact_at_least=options.copy_rate == Attribute.copy_rate)
    with claimed(task.root, task.folder_of(task.train)):  # images are read here for the first time: some may be damaged
        found = copies.looked(task.root, task.train.pictures, task.queries.pictures, how, task.engine)
    for line in (*copies.lines(found), copies.summary(found)):
        say(f"copies: {line}")
    return {"Copies": copies.meaning(found["measures"][0])}


def _candidates(options: Attribute) -> Candidates | None:
    from whence.methods import settings_for
    from whence.methods.candidates import Candidates

    if options.candidates is None:
        return None
    by = options.candidates_by
    return Candidates(options.candidates, by, settings_for(by, {}, options.seed))


def _question(options: Attribute) -> Question | None:
    from whence.data.masks import read_mask
    from whence.methods.question import Question

    window = None
    if options.timesteps is not None:
        found = re.fullmatch(r"(\d+)-(\d+)", options.timesteps)
        if found is None:
            raise error(f"--timesteps {options.timesteps!r}", accepted="LOW-HIGH, like 0-100")
        window = int(found[1]), int(found[2])
    if options.mask is None and window is None:
        return None
    return Question(None if options.mask is None else read_mask(options.mask), window)


def _request(options: Attribute) -> Request:
    from whence.models import adapter_of
    from whence.task import Request

    return Request(
        options.model,
        options.train_data_dir,
        queries_of(options),
        options.output_dir,
        adapter_of(options.lora, options.custom_diffusion),
        options.ensemble,
        options.resolution,
        options.caption_column,
        engine_on(
            options.device, options.batch_size, options.budget_mb, options.workers, options.ray, options.feature_dtype
        ),
        options.classes,
        options.skip,
        options.index_dir,
        options.query_caption_column,
        not options.no_errors,
    )


VERB = Verb(attribute, Attribute, config=True)
