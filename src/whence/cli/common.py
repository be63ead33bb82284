"""Options that several verbs have, and what verbs do with options before the work begins. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from whence.cli.options import Option, config_of, error
from whence.cli.terminal import say

if TYPE_CHECKING:
    from whence.models import Model
    from whence.task import Sampling
    from whence.types import Engine

DATA, MODEL, METHOD, RUNNING, DRAWING = "Images", "Model", "Method", "Running", "Drawing pictures"

TrainData = Annotated[Path, Option("Training images: an imagefolder, or .tar or .parquet files.", DATA, hub="dataset")]
Prompts = Annotated[Path | None, Option("A file with a prompt per line, for a model that reads text.", DRAWING)]
Guidance = Annotated[
    float | None,
    Option("Of classifier-free guidance, 1 for none; by default that of the model's pipeline.", DRAWING, min=0.0),
]
QueryData = Annotated[
    Path | None,
    Option("Pictures to explain: a folder, or .tar or .parquet files.", DATA, without=("generate",), hub="dataset"),
]
Generate = Annotated[
    int | None,
    Option("Draw this many pictures from the model and explain them.", DRAWING, min=1, without=("query_data_dir",)),
]
PromptsDrawn = Annotated[
    Path | None, Option("A file with a prompt per line, for a model that reads text.", DRAWING, needs=("generate",))
]
GuidanceDrawn = Annotated[
    float | None,
    Option(
        "Of classifier-free guidance, 1 for none; by default that of the model's pipeline.",
        DRAWING,
        min=0.0,
        needs=("generate",),
    ),
]
StepsDrawn = Annotated[int, Option("Steps of the sampler.", DRAWING, min=1, needs=("generate",))]
InferenceSteps = Annotated[int, Option("Steps of the sampler.", DRAWING, min=1)]
NoiseSeed = Annotated[int, Option("Seed of the noise that the pictures begin with.", DRAWING)]
Output = Annotated[Path, Option("Folder of the work; a run that was cut off goes on in it.", RUNNING)]
Device = Annotated[str, Option("cpu, cuda, cuda:1 ...", RUNNING)]
Budget = Annotated[int, Option("Megabytes for per-image gradients; never changes a result.", RUNNING, min=1)]
ReportTo = Annotated[
    str | None,
    Option(
        "A tracker that gets the losses; its files lie in logs/ of the folder.",
        RUNNING,
        accepted=("tensorboard", "wandb"),
    ),
]
Shard = Annotated[str, Option("i/N: this process takes every N-th block, from i.", RUNNING)]
Lora = Annotated[
    Path | None,
    Option(
        "A LoRA on the model: a folder or file of diffusers, peft or kohya.",
        MODEL,
        without=("custom_diffusion",),
        hub="model",
    ),
]
CustomDiffusion = Annotated[Path | None, Option("Custom Diffusion on the model: a folder.", MODEL, without=("lora",))]
CaptionColumn = Annotated[
    str | None, Option("Column of the captions, for a model that reads text; text by default.", DATA)
]
Classes = Annotated[
    str | None,
    Option("Names of the model's classes in its order: a file with one per line, or names with commas.", DATA),
]
Skip = Annotated[bool, Option("Leave out files in the folders that are not read, however many.", DATA)]
Resolution = Annotated[int | None, Option("Side of the square images are brought to; the model's by default.", DATA)]
Draws = Annotated[int | None, Option("(timestep, noise) pairs per image; the method's own by default.", METHOD, min=1)]
Noise = Annotated[
    str | None,
    Option(
        "Whether all images are measured at the same draws, or each at its own; the method's own by default.",
        METHOD,
        accepted=("shared", "own"),
    ),
]
Dim = Annotated[
    int | None, Option("Columns of the projection, if there are more parameters; 0 for none.", METHOD, min=0)
]
Parameters = Annotated[
    str | None, Option("Which parameters: all, attention, up-blocks ... or a regular expression.", METHOD)
]
BANKS = ("digits", "icons", "photos", "creators", "cifar2", "cifar2-1000")
BankName = Annotated[str, Option("Which bank.", DATA, argument=True, accepted=BANKS)]
BankData = Annotated[
    Path | None,
    Option(
        "Folder with train/ and val/ of the bank's pictures; not for digits.",
        DATA,
        needs=tuple(f"name={name}" for name in BANKS[1:]),
    ),
]
BankFolder = Annotated[Path | None, Option("A bank built here; the shipped one by default.", DATA)]


Workers = Annotated[
    int | None,
    Option(
        "Processes that share the work; by default the cores that there are, by torch's threads.",
        RUNNING,
        min=1,
        without=("ray",),
    ),
]
Ray = Annotated[
    str | None,
    Option("A Ray cluster that shares the work: auto, or HOST:PORT of its head.", RUNNING, without=("workers",)),
]


Ensemble = Annotated[
    tuple[Path, ...], Option("A further model trained alike, to average over; may be repeated.", MODEL, hub="model")
]
BY_DEFAULT = ("das",)  # above raw pixels on all three banks (docs/noise.md)
Methods = Annotated[tuple[str, ...], Option("As `whence methods` names them; may be repeated.", METHOD)]
Damping = Annotated[float | None, Option("Added to the curvature, in units of its mean eigenvalue.", METHOD)]
MeasuredOutput = Annotated[str | None, Option("Output function that is measured: loss, elbo, squared_norm ...", METHOD)]
Settings = Annotated[tuple[str, ...], Option("Any other setting of a method, as name=value; may be repeated.", METHOD)]
NoErrors = Annotated[bool, Option("Do not measure standard errors: half the room for features.", METHOD)]
Top = Annotated[
    int | None,
    Option(
        "Keep the scores of this many of the strongest and of the weakest images of each picture alone.", METHOD, min=1
    ),
]
BatchSize = Annotated[int, Option("Images read at a time; never changes a result.", RUNNING, min=1)]
FeatureDtype = Annotated[
    str | None,
    Option(
        "Number format in which features of training images are kept: half the room as bfloat16.",
        RUNNING,
        accepted=("float32", "bfloat16", "float16"),
    ),
]


def engine_on(
    device: str,
    batch_size: int | None = None,
    budget_mb: int | None = None,
    workers: int | None = 1,
    ray: str | None = None,
    feature_dtype: str | None = None,
) -> Engine:
    """How the work is carried out, on a device that this machine has.

    Args:
        device: cpu, cuda ...
        batch_size: images read at a time.
        budget_mb: megabytes for per-image gradients.
        workers: processes; None for as many as there are cores.
        ray: the address of a cluster; None for none.
        feature_dtype: the number format of stored features; None for that of the model.
    """
    import torch

    from whence.storage.cluster import connected
    from whence.storage.workers import default_workers
    from whence.types import Engine

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as problem:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise error(f"--device {device}: {str(problem).splitlines()[0]}", accepted=f"here {there}") from None
    plain, kept = Engine(), None if feature_dtype is None else getattr(torch, feature_dtype)
    budget = plain.budget if budget_mb is None else budget_mb * 2**20
    if ray is not None:
        connected(ray)  # refused before anything is computed
        return Engine(device, batch_size=batch_size or plain.batch_size, budget=budget, ray=ray, feature_dtype=kept)
    if workers is None:
        workers = default_workers() if device == "cpu" else 1
    if workers > 1 and device != "cpu":
        told = f"--workers {workers}: they are processes on the CPU, and --device is {device}"
        raise error(told, accepted="no such option; for several GPUs the same command once for each, in one folder")
    return Engine(device, batch_size=batch_size or plain.batch_size, budget=budget, workers=workers, feature_dtype=kept)


class AsksAbout(Protocol):
    """Options of pictures that lie somewhere or are to be drawn."""

    @property
    def query_data_dir(self) -> Path | None: ...
    @property
    def generate(self) -> int | None: ...
    @property
    def prompts(self) -> Path | None: ...
    @property
    def guidance_scale(self) -> float | None: ...
    @property
    def num_inference_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def queries_of(options: AsksAbout) -> Path | Sampling:
    """The pictures to explain: where they are, or how they are to be drawn."""
    from whence.task import Sampling, prompts_in

    if (options.query_data_dir is None) == (options.generate is None):
        raise error("give the pictures to explain either as --query_data_dir FOLDER or as --generate N")
    if options.generate is None:
        assert options.query_data_dir is not None
        return options.query_data_dir
    texts = None if options.prompts is None else prompts_in(options.prompts)
    return Sampling(options.generate, options.seed, options.num_inference_steps, texts, options.guidance_scale)


def shard_of(text: str) -> tuple[int, int]:
    """i/N as numbers."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise error(f"--shard {text!r}", accepted="i/N, like 0/2") from None
    return index, count


def refuse_guidance(model: Model, scale: float | None) -> None:
    """Refuse a scale of guidance for a model that has none."""
    from whence.models import guidance_of

    if scale is not None and guidance_of(model, scale) is None:
        raise error(f"--guidance_scale: {model.folder} has no guidance", accepted="no such option")


def write_config(options: object, folder: Path) -> None:
    """All options of a run, so that `--config` can give them again."""
    from whence.storage.files import write_bytes

    write_bytes(folder / "config.toml", config_of(options).encode())


def say_report(path: Path) -> None:
    """Where the results of a run are, and how to read them."""
    say(f"report: {path}")
    say(f"gallery: {path.with_name('gallery.png')}")
    say("positive = proponent: the image pushed the model towards this picture")
