"""whence index build."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import (
    BY_DEFAULT,
    METHOD,
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
    Lora,
    MeasuredOutput,
    Methods,
    NoErrors,
    Noise,
    Output,
    Parameters,
    Ray,
    Resolution,
    Settings,
    Skip,
    TrainData,
    Workers,
    engine_on,
)
from whence.cli.options import Option, Verb
from whence.cli.settings import TYPED, settings_per_method
from whence.cli.terminal import say
from whence.cli.verbs import Later, Verbs


@dataclass(frozen=True)
class Build:
    """Measure a model's training images once, so that any pictures can be asked about later, in the time that these take."""

    model: Annotated[Path, Option("A diffusers pipeline folder.", "Arguments", argument=True, hub="model")]
    train_data_dir: TrainData
    lora: Lora = None
    custom_diffusion: CustomDiffusion = None
    ensemble: Ensemble = ()
    caption_column: CaptionColumn = None
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
    no_errors: NoErrors = False
    seed: Annotated[int, Option("Seed of a method's draws.", METHOD)] = 0
    output_dir: Output = Path("runs/index")
    feature_dtype: FeatureDtype = None
    batch_size: BatchSize = 16
    budget_mb: Budget = 256
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"


def build(options: Build) -> None:
    from whence.doctor.findings import in_bytes
    from whence.evaluation.index import Index
    from whence.models import adapter_of
    from whence.task import Request

    settings = vars(options)
    typed = {name: settings[name] for name in TYPED}
    methods = settings_per_method(options.method, typed, options.set, options.seed, options.lora is not None)
    engine = engine_on(
        options.device, options.batch_size, options.budget_mb, options.workers, options.ray, options.feature_dtype
    )
    request = Request(
        options.model,
        options.train_data_dir,
        options.train_data_dir,
        options.output_dir,
        adapter_of(options.lora, options.custom_diffusion),
        options.ensemble,
        options.resolution,
        options.caption_column,
        engine,
        options.classes,
        options.skip,
        options.output_dir,
        errors=not options.no_errors,
    )
    index = Index.build(request, methods)
    size = sum(path.stat().st_size for path in index.root.rglob("*") if path.is_file())
    say(f"index: {index.root} ({len(index.request.train_images):,} training images, {in_bytes(size)})")
    say(f"next: whence query {index.root} --query_data_dir PICTURES")


BUILD = Verb(build, Build)


class Indexes(Verbs):
    later = {"build": Later("index:BUILD", "Measure a model's training images once.")}  # noqa: RUF012


GROUP = Indexes(name="index", no_args_is_help=True, help="Measure training images once, for any pictures afterwards.")
