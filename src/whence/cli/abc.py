"""whence abc build | fit | judge | shares."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import (
    DATA,
    DRAWING,
    METHOD,
    RUNNING,
    CaptionColumn,
    Device,
    Dim,
    Draws,
    Guidance,
    InferenceSteps,
    Noise,
    Output,
    Prompts,
    Resolution,
    TrainData,
    engine_on,
    write_config,
)
from whence.cli.options import Option, Verb, error
from whence.cli.settings import settings_per_method
from whence.cli.terminal import console, say
from whence.cli.verbs import Later, Verbs
from whence.training.optimizer import AdamW
from whence.training.recipe import Augmentation, Full, NewCustomDiffusion, NewLora, Recipe, Schedule

if TYPE_CHECKING:
    from whence.training.recipe import OnBase

FINE = "Fine-tunes"
FOR_MAPS = 6
TELLING = 20
Benchmark = Annotated[Path, Option("A folder that `whence abc build` wrote.", "Arguments", argument=True)]
Learned = Annotated[Path, Option("A folder of maps that `whence abc fit` wrote.", METHOD)]


@dataclass(frozen=True)
class Build:
    """Make a benchmark whose truth is known by construction: fine-tunes on exemplars, and pictures that they draw.

    Run again with the same options to go on after an interruption."""

    model: Annotated[Path, Option("A diffusers pipeline folder, the base.", "Arguments", argument=True, hub="model")]
    train_data_dir: TrainData
    exemplar_data_dir: Annotated[Path, Option("Images that the base was not trained on.", DATA)]
    resolution: Resolution = None
    caption_column: CaptionColumn = None
    kind: Annotated[str, Option("What is fine-tuned.", FINE, accepted=("full", "lora", "custom"))] = "full"
    models: Annotated[
        int, Option("Fine-tunes; the first half to learn on (6 for maps), the rest to judge.", FINE, min=2)
    ] = 8
    exemplars: Annotated[int, Option("Images that each is fine-tuned on.", FINE, min=1)] = 1
    max_train_steps: Annotated[int, Option("Steps of each.", FINE, min=1)] = 100
    learning_rate: Annotated[float, Option("Of AdamW, constant.", FINE)] = 1e-4
    random_flip: Annotated[bool, Option("Mirror images at random.", FINE)] = False
    rank: Annotated[int, Option("Rank of the LoRA.", FINE, min=1, needs=("kind=lora",))] = NewLora.rank
    modifier_token: Annotated[str, Option("The new token; all captions hold it.", FINE, needs=("kind=custom",))] = (
        NewCustomDiffusion.modifier_token
    )
    initializer_token: Annotated[
        str, Option("The token whose embedding the new one begins with.", FINE, needs=("kind=custom",))
    ] = NewCustomDiffusion.initializer_token
    generate: Annotated[int, Option("Pictures that each draws.", DRAWING, min=1)] = 10
    prompts: Prompts = None
    guidance_scale: Guidance = None
    num_inference_steps: InferenceSteps = 50
    seed: Annotated[int, Option("Seed of everything random.", RUNNING)] = 0
    output_dir: Output = Path("runs/abc")
    device: Device = "cpu"


def build(options: Build) -> None:
    from whence.evaluation.exemplars import FineTunes, Sources, build
    from whence.task import Sampling, prompts_in

    texts = None if options.prompts is None else prompts_in(options.prompts)
    draw = Sampling(options.generate, options.seed, options.num_inference_steps, texts, options.guidance_scale)
    recipe = Recipe(
        _trained(options),
        AdamW(options.learning_rate, beta1=0.9, eps_root=0.0),
        Schedule(options.max_train_steps, 0, "constant"),
        data=Augmentation(options.random_flip),
        ema=0.0,
        seed=options.seed,
    )
    sources = Sources(options.train_data_dir, options.exemplar_data_dir, options.resolution, options.caption_column)
    how = FineTunes(recipe, options.models, options.exemplars, draw, options.seed)
    notes = build(sources, how, options.output_dir, engine_on(options.device))
    write_config(options, options.output_dir)
    say(
        f"benchmark: {options.output_dir}: {options.models} fine-tunes ({options.kind}) on {options.exemplars} exemplars "
        f"each, {options.generate} pictures each, {notes['count']:,} distractors"
    )
    if options.models < FOR_MAPS:
        say(f"`whence abc fit` needs 3 fine-tunes to learn on: --models {FOR_MAPS} or more")


def _trained(options: Build) -> OnBase:
    if options.kind == "lora":
        return NewLora(options.model, options.rank)
    if options.kind == "custom":
        return NewCustomDiffusion(options.model, options.modifier_token, options.initializer_token)
    return Full(options.model)


@dataclass(frozen=True)
class Fit:
    """Learn maps of an encoder on the first half of the fine-tunes, and calibrate them: for the method abc_cosine."""

    benchmark: Benchmark
    train_data_dir: TrainData
    encoder: Annotated[str, Option("pixels, or the folder of a CLIP, ViT or DINO model.", METHOD)] = "pixels"
    kind: Annotated[str, Option("Of the maps.", METHOD, accepted=("linear", "channel", "network"))] = "linear"
    steps: Annotated[int, Option("Of learning.", METHOD, min=1)] = 200
    output_dir: Annotated[Path, Option("Folder of the maps, a new one.", RUNNING)] = Path("runs/maps")


def fit(options: Fit) -> None:
    from whence.evaluation.exemplars import Exemplars
    from whence.evaluation.maps import LABEL, Learning
    from whence.evaluation.retrieved import fit
    from whence.features.maps import encoder_named

    encoder_named(options.encoder)
    benchmark = Exemplars.read(options.benchmark, options.train_data_dir)
    maps = fit(benchmark, options.encoder, Learning(options.kind, steps=options.steps), options.output_dir)
    raw, learned = (float(str(maps.notes[key])) for key in ("encoder_alone", "left_out"))
    say(f"average precision on fine-tunes left out: {options.encoder} alone {raw:.3f}, with maps {learned:.3f}")
    if learned <= raw:
        say("the maps find exemplars no better than the encoder alone: more fine-tunes, or another kind, may help")
    say(f"maps: {options.output_dir} (--method abc_cosine --set encoder={options.output_dir})")
    say(f"its shares are a {LABEL}")


@dataclass(frozen=True)
class Judge:
    """How well methods find the exemplars of the other half of the fine-tunes among the base's own images."""

    benchmark: Benchmark
    train_data_dir: TrainData
    method: Annotated[tuple[str, ...], Option("As `whence methods` lists them; may be repeated.", METHOD)] = (
        "pixel_cosine",
        "d_trak",
        "ek_fac",
    )
    maps: Annotated[Path | None, Option("Maps of `whence abc fit`: abc_cosine is judged, too.", METHOD)] = None
    draws: Draws = None
    noise: Noise = None
    dim: Dim = None
    set: Annotated[
        tuple[str, ...], Option("name=value of a setting of a method, like damping=0.01; may be repeated.", METHOD)
    ] = ()
    seed: Annotated[int, Option("Of the methods' draws.", METHOD)] = 0
    output_dir: Output = Path("runs/abc-judged")
    device: Device = "cpu"


def judge(options: Judge) -> None:
    from whence.evaluation.exemplars import Exemplars
    from whence.evaluation.retrieved import Asked, judge

    if "abc_cosine" in options.method:
        raise error("--method abc_cosine", accepted="--maps FOLDER, which judges it")
    values = {"draws": options.draws, "noise": options.noise, "dim": options.dim}
    methods: dict[str, dict[str, object]] = {
        name: dict(settings)
        for name, settings in settings_per_method(options.method, values, options.set, options.seed).items()
    }
    if options.maps is not None:
        methods["abc_cosine"] = {"encoder": str(options.maps)}
    benchmark = Exemplars.read(options.benchmark, options.train_data_dir)
    result = judge(benchmark, Asked(methods, engine_on(options.device)), options.output_dir)
    write_config(options, options.output_dir)
    _print(result)
    say(f"table: {options.output_dir / 'judged.json'}")


def _print(result: dict[str, object]) -> None:
    from rich.table import Table

    rows = json.loads(json.dumps(result["rows"]))
    columns = [name for name in next(iter(rows.values())) if name.startswith("recall@")]
    shown = console(soft_wrap=True)
    table = Table("method", "average precision", *columns, "calibration error", "seconds", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["map"][0]):
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*row["map"]), *(f"{row[key][0]:.3f}" for key in columns)]
        wrong = row["calibration_error"]
        table.add_row(name, *cells, "" if wrong is None else f"{wrong:.3f}", f"{row['seconds']:.1f}")
    shown.print(table)
    told = f"{result['queries']} pictures of {len(result['fine_tunes'])} fine-tunes"  # type: ignore[arg-type]
    say(f"{told}, their exemplars among {result['distractors']:,} images of the base; 95 % intervals")
    if len(result["fine_tunes"]) < TELLING:  # type: ignore[arg-type]
        say("so few fine-tunes tell few methods apart: look at the intervals, not at the order")
    say("a fine-tune's pictures look like its exemplars: this favours similarity, and is no counterfactual")


@dataclass(frozen=True)
class Shares:
    """The scores of abc_cosine in a run as calibrated probabilities, with what remains for all other images."""

    run: Annotated[Path, Option("A run folder with scores of abc_cosine.", "Arguments", argument=True)]
    maps: Learned
    top: Annotated[int, Option("Images that are listed for each picture.", METHOD, min=1)] = 5


def shares(options: Shares) -> None:
    from whence.evaluation.maps import LABEL
    from whence.evaluation.retrieved import shares
    from whence.features.maps import Maps
    from whence.storage.columns import as_csv
    from whence.storage.files import write_bytes
    from whence.storage.notes import scored
    from whence.storage.scores import load_scores

    maps, there = Maps.read(options.maps), scored(options.run)
    if "abc_cosine" not in there:
        known = ", ".join(there) or "none"
        raise error(f"{options.run} has no scores of abc_cosine", accepted=f"a run with them; there are {known}")
    scores = load_scores(there["abc_cosine"])
    found, rows = shares(scores, maps), list[tuple[str, str, float]]()
    for name, row in zip(scores.query_ids, found, strict=True):
        order = (-row).argsort(kind="stable")[: options.top].tolist()
        say(f"{name}:")
        for at in order:
            rows.append((name, scores.train_ids[at], float(row[at])))
            say(f"  {100 * row[at]:5.1f} %  {scores.train_ids[at]}")
        rest = max(0.0, 1.0 - float(row[order].sum()))
        rows.append((name, "all other images", rest))
        say(f"  {100 * rest:5.1f} %  all other images")
    path = options.run / f"shares-{str(maps.notes['tensors'])[:8]}.csv"  # other maps have a table of their own
    columns = ("picture", "image", "probability")
    write_bytes(path, as_csv({column: [row[i] for row in rows] for i, column in enumerate(columns)}))
    say(f"table: {path}")
    say(f"a share is a {LABEL}")
    if float(str(maps.notes["left_out"])) <= float(str(maps.notes["encoder_alone"])):
        say("the maps found exemplars of other fine-tunes no better than their encoder alone")


BUILD, FIT = Verb(build, Build, config=True), Verb(fit, Fit)
JUDGE, SHARES = Verb(judge, Judge, config=True), Verb(shares, Shares)


class Abc(Verbs):
    """The steps of attribution by customization."""

    later = {  # noqa: RUF012
        "build": Later("abc:BUILD", "Fine-tunes on exemplars, and what they draw."),
        "fit": Later("abc:FIT", "Maps of an encoder, learned on half of them."),
        "judge": Later("abc:JUDGE", "How well methods find the exemplars of the other half."),
        "shares": Later("abc:SHARES", "Scores of abc_cosine as calibrated probabilities."),
    }


GROUP = Abc(
    name="abc",
    no_args_is_help=True,
    help="A benchmark whose truth is known by construction, and a method learned on it.",
)
