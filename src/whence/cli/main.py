"""The command line. Option names are those of diffusers' own training scripts; 0 done, 2 bad input, 1 our bug."""

from __future__ import annotations

import errno
import json
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from whence import doctor as doctors
from whence.cli.demo import demo as run_demo
from whence.cli.ledger import register
from whence.data.sources import layout_of
from whence.diffusion.draws import LogitNormal, Mode
from whence.diffusion.forward import CosMap, Declared, MinSNR, SigmaSqrt
from whence.diffusion.outputs import OUTPUTS
from whence.doctor.shapes import lines as shape_lines
from whence.methods import METHODS, NEEDS, Entry, build, describe_parts, settings_for, settings_of
from whence.models import TARGETS, Prior, adapter_of, encode_images, open_model, with_token
from whence.storage.files import read_json
from whence.task import (
    explain,
    folder_images,
    generated,
    prompts_in,
    report_again,
    run_folder,
    task_from_pretrained,
)
from whence.training.recipe import Training
from whence.training.runs import train_custom, train_lora, train_model
from whence.training.study import CustomStudy, LoraStudy, Study, part_study, unet_config
from whence.types import VERSION, Engine, WhenceError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Which training images made this picture, and how sure are we? Positive = proponent.",
)
register(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"whence {VERSION}")
        raise typer.Exit()


@app.callback()
def base(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
BatchSize = Annotated[int, typer.Option("--batch_size", min=1, help="Images read at a time; never changes a result.")]
Output = Annotated[Path, typer.Option("--output_dir", help="The run folder; a run that was cut off goes on in it.")]
Draws = Annotated[int | None, typer.Option(min=1, help="(timestep, noise) pairs per image.")]
Dim = Annotated[int | None, typer.Option(min=0, help="Columns of the projection; 0 for exact gradients.")]
Parameters = Annotated[str | None, typer.Option(help="all, attention, up-blocks ... or a regular expression.")]

Budget = Annotated[
    int, typer.Option("--budget_mb", min=1, help="Memory for per-image gradients; never changes a result.")
]

TrainData = Annotated[
    Path, typer.Option("--train_data_dir", help="Training images: an imagefolder, or .tar or .parquet files.")
]


@app.command()
def demo(output_dir: Output = Path("demo"), device: Device = "cpu") -> None:
    """Train a small DDPM on digits, draw sixteen, and show which digits made them."""
    _report(run_demo(output_dir, _engine(device)))


@app.command()
def train(
    train_data_dir: TrainData,
    output_dir: Output,
    resolution: Annotated[int | None, typer.Option(help="Side of the square images are brought to.")] = None,
    channels: Annotated[int, typer.Option(help="3 (RGB) or 1 (grey).")] = 3,
    model_config_name_or_path: Annotated[
        Path | None,
        typer.Option("--model_config_name_or_path", help="config.json of a UNet2DModel, instead of the next options."),
    ] = None,
    block_out_channels: Annotated[
        str, typer.Option("--block_out_channels", help="Channels per level, comma separated.")
    ] = "32,64,64",
    layers_per_block: Annotated[int, typer.Option("--layers_per_block", min=1)] = 1,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9)] = 0.0,
    class_conditional: Annotated[
        bool, typer.Option("--class_conditional", help="Condition on the class labels.")
    ] = False,
    max_train_steps: Annotated[int, typer.Option("--max_train_steps", min=1)] = 5000,
    train_batch_size: Annotated[int, typer.Option("--train_batch_size", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option("--learning_rate")] = 1e-3,
    lr_warmup_steps: Annotated[int, typer.Option("--lr_warmup_steps", min=0)] = 200,
    lr_scheduler: Annotated[str, typer.Option("--lr_scheduler", help="cosine or constant.")] = "cosine",
    adam_weight_decay: Annotated[float, typer.Option("--adam_weight_decay")] = 1e-6,
    adam_eps_root: Annotated[
        float, typer.Option("--adam_eps_root", min=0.0, help="Added under AdamW's square root: smooth above 0.")
    ] = 1e-8,
    sgd_momentum: Annotated[
        float | None,
        typer.Option("--sgd_momentum", min=0.0, help="SGD with this momentum, 0 for none, in place of AdamW."),
    ] = None,
    max_grad_norm: Annotated[float, typer.Option("--max_grad_norm", help="0 for no limit.")] = 1.0,
    ema_decay: Annotated[float, typer.Option("--ema_decay", min=0.0, max=1.0, help="0 for no averaging.")] = 0.999,
    random_flip: Annotated[bool, typer.Option("--random_flip")] = False,
    ddpm_num_steps: Annotated[int, typer.Option("--ddpm_num_steps", min=1)] = 1000,
    ddpm_beta_schedule: Annotated[str, typer.Option("--ddpm_beta_schedule")] = "linear",
    prediction_type: Annotated[
        str, typer.Option("--prediction_type", help="epsilon, v_prediction or sample.")
    ] = "epsilon",
    checkpointing_steps: Annotated[int, typer.Option("--checkpointing_steps", min=1)] = 1000,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train a LoRA on --pretrained_model_name_or_path instead of a new model.")
    ] = False,
    pretrained_model: Annotated[
        Path | None,
        typer.Option(
            "--pretrained_model_name_or_path", help="A pipeline folder, the base of --lora, --text or --full."
        ),
    ] = None,
    text: Annotated[
        bool,
        typer.Option("--text", help="Train the network of the base, unet/config.json, anew on pictures and captions."),
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Train all weights of the base's network further.")] = False,
    custom_diffusion: Annotated[
        bool,
        typer.Option(
            "--custom_diffusion", "--custom-diffusion", help="Train the base's cross-attention and one new token."
        ),
    ] = False,
    modifier_token: Annotated[
        str, typer.Option("--modifier_token", help="The new token of --custom_diffusion; all captions hold it.")
    ] = "<new1>",
    initializer_token: Annotated[
        str, typer.Option("--initializer_token", help="The token whose embedding the new one begins with.")
    ] = "ktn",
    prior_data_dir: Annotated[
        Path | None, typer.Option("--prior_data_dir", help="Imagefolder of prior images for --custom_diffusion.")
    ] = None,
    prior_loss_weight: Annotated[float, typer.Option("--prior_loss_weight", min=0.0)] = 1.0,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 4,
    lora_alpha: Annotated[float | None, typer.Option("--lora_alpha", help="Default: the rank.")] = None,
    lora_targets: Annotated[
        str, typer.Option("--lora_targets", help="Regular expression for the ends of the names of Linear layers.")
    ] = TARGETS,
    caption_column: Annotated[
        str, typer.Option("--caption_column", help="Of the images, for a base that reads text.")
    ] = "text",
    proportion_empty_prompts: Annotated[
        float,
        typer.Option("--proportion_empty_prompts", min=0.0, max=1.0, help="Captions left out, for guidance later."),
    ] = 0.0,
    snr_gamma: Annotated[
        float | None, typer.Option("--snr_gamma", help="Weigh the loss by min-SNR; not for flow matching.")
    ] = None,
    weighting_scheme: Annotated[
        str,
        typer.Option(
            "--weighting_scheme",
            help="logit_normal or mode: density of the timesteps; sigma_sqrt or cosmap: weight of the loss (flow matching).",
        ),
    ] = "none",
    logit_mean: Annotated[float, typer.Option("--logit_mean")] = 0.0,
    logit_std: Annotated[float, typer.Option("--logit_std")] = 1.0,
    mode_scale: Annotated[float, typer.Option("--mode_scale")] = 1.29,
    seed: int = 0,
    device: Device = "cpu",
) -> None:
    """Train a small diffusion model whose every step can be replayed; writes a diffusers pipeline folder, or a LoRA file.

    Run again with the same options to go on after an interruption.
    """
    kinds = {"--lora": lora, "--text": text, "--full": full, "--custom_diffusion": custom_diffusion}
    kind = _kind(kinds, pretrained_model)
    if prior_data_dir is not None and not custom_diffusion:
        raise WhenceError("--prior_data_dir is of --custom_diffusion alone")
    schemes = {
        "none": Declared(),
        "logit_normal": Declared(density=LogitNormal(logit_mean, logit_std)),
        "mode": Declared(density=Mode(mode_scale)),
        "sigma_sqrt": Declared(SigmaSqrt()),
        "cosmap": Declared(CosMap()),
    }
    if weighting_scheme not in schemes:
        raise WhenceError(f"--weighting_scheme {weighting_scheme!r}; accepted: {', '.join(schemes)}")
    declared = schemes[weighting_scheme]
    if snr_gamma is not None:
        if declared.weighting is not None:
            raise WhenceError(f"--snr_gamma and --weighting_scheme {weighting_scheme} both weigh the loss; give one")
        declared = replace(declared, weighting=MinSNR(snr_gamma))
    training = Training(
        steps=max_train_steps,
        batch_size=train_batch_size,
        rate=learning_rate,
        warmup=lr_warmup_steps,
        schedule=lr_scheduler,
        decay=adam_weight_decay,
        eps_root=adam_eps_root,
        momentum=sgd_momentum,
        clip=max_grad_norm or None,
        ema=ema_decay or None,
        flip=random_flip,
        untold=proportion_empty_prompts,
        output=OUTPUTS["loss" if declared.weighting is None else "weighted"],
        seed=seed,
    )
    engine = _engine(device)
    if pretrained_model is not None:
        base = open_model(pretrained_model, trained=not text)
        if text and not base.reads_text:
            raise WhenceError(f"--text: the network of {pretrained_model} reads no text; accepted: one that does")
        size = resolution or base.resolution
        pictures = folder_images(train_data_dir, size, base.channels, output_dir)
        if kind in ("--text", "--full"):
            seen = encode_images(base, pictures, output_dir, engine, caption_column)
            whole = part_study(pretrained_model, seen.batch([0]).x0.shape[-1], training, full, declared)
            train_model(whole, seen, output_dir, checkpointing_steps, engine, pretrained_model)
            typer.echo(f"model: {output_dir}")
            return
        if custom_diffusion:
            base = with_token(base, modifier_token)
            prior = None if prior_data_dir is None else folder_images(prior_data_dir, size, base.channels, output_dir)
            held = None if prior is None else Prior.of(encode_images(base, prior, output_dir, engine, caption_column))
            recipe = replace(training, prior=0 if held is None else len(held))
            given = (pretrained_model, recipe, modifier_token, initializer_token, held, prior_loss_weight, declared)
            seen = encode_images(base, pictures, output_dir, engine, caption_column)
            train_custom(CustomStudy(*given), seen, output_dir, checkpointing_steps, engine)
            typer.echo(f"Custom Diffusion: {output_dir}")
            return
        lora_study = LoraStudy(pretrained_model, training, rank, lora_alpha or float(rank), lora_targets, declared)
        seen = encode_images(base, pictures, output_dir, engine, caption_column)
        train_lora(lora_study, seen, output_dir, checkpointing_steps, engine)
        typer.echo(f"LoRA: {output_dir}")
        return
    images = folder_images(train_data_dir, resolution, channels, output_dir)
    labels = getattr(images, "labels", None)
    if class_conditional and labels is None:
        raise WhenceError("--class_conditional needs labels: class folders or a `label` column in metadata.jsonl")
    height, width = images.batch([0]).x0.shape[-2:]
    if height != width:
        raise WhenceError(f"{train_data_dir}: the images are {width}x{height}; give --resolution for square ones")
    if resolution is None:  # by their size, as `attribute` will read them: the same images then have the same name
        images = folder_images(train_data_dir, width, channels, output_dir)
    widths = tuple(_numbers(block_out_channels, "--block_out_channels"))
    if model_config_name_or_path is None:
        classes = None if labels is None or not class_conditional else int(labels.max()) + 1
        network = unet_config(width, channels, widths, layers_per_block, dropout, classes)
    else:
        network = _network(model_config_name_or_path, width)
    study = Study(network, training, ddpm_num_steps, ddpm_beta_schedule, prediction_type, declared=declared)
    train_model(study, images, output_dir, checkpointing_steps, engine)
    typer.echo(f"model: {output_dir}")


@app.command()
def attribute(
    model: Annotated[Path, typer.Argument(help="A diffusers pipeline folder.")],
    train_data_dir: TrainData,
    query_data_dir: Annotated[
        Path | None, typer.Option("--query_data_dir", help="Pictures to explain, likewise.")
    ] = None,
    generate: Annotated[int | None, typer.Option(min=1, help="Or: draw this many from the model.")] = None,
    method: Annotated[list[str], typer.Option(help="As `whence methods` names them; may be repeated.")] = ["d_trak"],  # noqa: B006
    prompts: Annotated[
        Path | None, typer.Option(help="A prompt per line, for --generate with a model that reads text.")
    ] = None,
    guidance_scale: Annotated[
        float,
        typer.Option("--guidance_scale", min=0.0, help="Classifier-free, of --generate with prompts; 1 for none."),
    ] = 7.5,
    lora: Annotated[
        Path | None, typer.Option(help="A LoRA on the model: a folder or file as diffusers or peft writes it.")
    ] = None,
    custom_diffusion: Annotated[
        Path | None,
        typer.Option("--custom_diffusion", "--custom-diffusion", help="Custom Diffusion on the model: a folder."),
    ] = None,
    caption_column: Annotated[
        str, typer.Option("--caption_column", help="Column of the captions in the metadata of both folders.")
    ] = "text",
    output_dir: Output = Path("runs/attribute"),
    ensemble: Annotated[
        list[Path], typer.Option(help="A further model trained alike, to average over; may be repeated.")
    ] = [],  # noqa: B006
    resolution: Annotated[int | None, typer.Option(help="Default: the model's sample size.")] = None,
    num_inference_steps: Annotated[
        int, typer.Option("--num_inference_steps", min=1, help="DDIM steps of --generate.")
    ] = 50,
    draws: Draws = None,
    dim: Dim = None,
    damping: Annotated[float | None, typer.Option(help="In units of the mean eigenvalue.")] = None,
    output: Annotated[str | None, typer.Option(help=f"What is measured: {', '.join(OUTPUTS)}.")] = None,
    parameters: Parameters = None,
    setting: Annotated[list[str], typer.Option("--set", help="Any other setting of a method, as name=value.")] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Of --generate and of the draws.")] = 0,
    batch_size: BatchSize = 16,
    budget_mb: Budget = 256,
    device: Device = "cpu",
) -> None:
    """Score every training image for every picture, and write a report."""
    if (query_data_dir is None) == (generate is None):
        raise WhenceError("give the pictures to explain either as --query_data_dir FOLDER or as --generate N")
    settings: dict[str, Any] = {"damping": damping, "parameters": parameters, "dim": dim, "ensemble": ensemble or None}
    settings |= {"draws": draws, "output": None if output is None else _named_output(output)}
    settings = {name: value for name, value in settings.items() if value is not None} | _settings(setting)
    _check_settings(settings, method)
    methods = {name: settings_for(name, settings, seed) for name in method}
    engine = replace(_engine(device), batch_size=batch_size, budget=budget_mb * 2**20)
    adapter = adapter_of(lora, custom_diffusion)
    opened = open_model(model, adapter)
    for name, given in methods.items():
        made = build(name, opened.forward, given)
        typer.echo(f"{name}: {json.dumps(describe_parts(made), default=str)}")
    train = folder_images(train_data_dir, resolution or opened.resolution, opened.channels, output_dir)
    run_folder(output_dir, opened.final, train)
    if generate is not None:
        texts = None if prompts is None else prompts_in(prompts)
        query_data_dir = generated(
            opened, output_dir, generate, seed, num_inference_steps, engine, texts, guidance_scale, resolution
        )
    assert query_data_dir is not None
    task = task_from_pretrained(
        model, train, query_data_dir, output_dir, ensemble, resolution, engine, adapter, caption_column
    )
    with_it = None if adapter is None else adapter.folder
    facts = {
        "Model": str(model) if with_it is None else f"{model} with {with_it}",
        "Training images": f"{train_data_dir} ({len(task.train):,})",
        "Pictures explained": f"{query_data_dir} ({len(task.queries):,})",
    }
    _report(explain(task, methods, "Which training images made these pictures?", facts))


@app.command("methods")
def list_methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table of the README.")] = False,
) -> None:
    """Print every method, its parts, its paper, what it computes and what it needs."""
    if markdown:
        typer.echo("| method | paper | computes | needs | settings |\n|---|---|---|---|---|")
        for name, entry in METHODS.items():
            cells = (f"`{name}`", _paper(entry), entry.cost, _needs(entry), ", ".join(settings_of(name)))
            typer.echo(f"| {' | '.join(cells)} |")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "parts", "paper", "year", "computes", "needs", "settings"):
        table.add_column(column)
    for name, entry in METHODS.items():
        parts = describe_parts(entry.make())
        shown = "; ".join(f"{slot}: {value}" for slot, value in parts.items())
        year = "" if entry.year is None else str(entry.year)
        table.add_row(name, shown, entry.paper, year, entry.cost, _needs(entry), ", ".join(settings_of(name)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _paper(entry: Entry) -> str:
    return entry.paper if entry.year is None else f"{entry.paper} {entry.year}"


def _needs(entry: Entry) -> str:
    return "; ".join(NEEDS[need] for need in entry.needs)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    train_data_dir: Annotated[
        Path | None, typer.Option("--train_data_dir", help="Where the training images are now, if they moved.")
    ] = None,
    query_data_dir: Annotated[
        Path | None, typer.Option("--query_data_dir", help="Where the pictures are now, if they moved.")
    ] = None,
) -> None:
    """Write the report of a finished run again, with all methods that have scores in it."""
    _report(report_again(run, train_data_dir, query_data_dir))


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Argument(help="A diffusers pipeline folder.")] = None,
    train_data_dir: Annotated[Path | None, typer.Option("--train_data_dir")] = None,
    query_data_dir: Annotated[Path | None, typer.Option("--query_data_dir")] = None,
    method: Annotated[list[str], typer.Option(help="Predict the cost of these.")] = ["d_trak"],  # noqa: B006
    output_dir: Output = Path("runs/attribute"),
    resolution: Annotated[int | None, typer.Option(help="Default: the model's sample size.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA on the model.")] = None,
    caption_column: Annotated[
        str, typer.Option("--caption_column", help="Column of the captions, for a model that reads text.")
    ] = "text",
    draws: Draws = None,
    dim: Dim = None,
    parameters: Parameters = None,
    shapes: Annotated[
        int | None, typer.Option(min=1, help="Only count, from config.json files alone, for so many training images.")
    ] = None,
    budget_mb: Budget = 256,
    device: Device = "cpu",
) -> None:
    """Say what is wrong with model, data, disk or device, and what a run will cost, before it starts: measured for a model
    of pixels, counted from shapes (for 1,000 images, if none are given) for one of latents or text."""

    def count(model: Path, images: int) -> None:
        # 4096 columns is what methods project to by default.
        for line in shape_lines(model, images, draws or 10, 4096 if dim is None else dim or None, resolution):
            typer.echo(line)

    if shapes is not None:
        if model is None:
            raise WhenceError("--shapes counts for a model; give its folder first")
        count(model, shapes)
        return
    settings = {"draws": draws, "dim": dim, "parameters": parameters}
    settings = {name: value for name, value in settings.items() if value is not None}
    _check_settings(settings, method)
    methods = {name: settings_for(name, settings, 0) for name in method}
    engine = replace(_engine(device), budget=budget_mb * 2**20)
    findings = doctors.examine(
        model, train_data_dir, query_data_dir, output_dir, resolution, adapter_of(lora, None), caption_column
    )
    cost, latents = None, model is not None and doctors.requirements(model).latents
    broken = any(finding.level == "error" for finding in findings)
    if not broken and model and train_data_dir and not latents:
        task = doctors.plan(
            model, train_data_dir, query_data_dir, output_dir, resolution, engine, adapter=adapter_of(lora, None)
        )
        cost = doctors.predict(task, methods)
        broken = any(finding.level == "error" for finding in cost.findings)
    for line in doctors.lines(findings, cost):
        typer.echo(line)
    if not broken and model and latents:
        count(model, 1000 if train_data_dir is None else len(layout_of(train_data_dir).names))
    if broken:
        raise typer.Exit(2)


def _report(path: Path) -> None:
    typer.echo(f"report: {path}")
    typer.echo(f"gallery: {path.with_name('gallery.png')}")
    typer.echo("positive = proponent: the image pushed the model towards this picture")


def _named_output(name: str) -> Any:
    if name not in OUTPUTS:
        raise WhenceError(f"unknown output {name!r}; accepted: {', '.join(OUTPUTS)}")
    return OUTPUTS[name]


def _kind(kinds: Mapping[str, bool], base: Path | None) -> str | None:
    """What is trained on a base, None for a new model."""
    chosen = [name for name, on in kinds.items() if on]
    if len(chosen) > 1:
        raise WhenceError(f"{' and '.join(chosen)}: these are trainings of their own; choose one")
    if bool(chosen) != (base is not None):
        which = chosen[0] if chosen else f"one of {', '.join(kinds)}"
        raise WhenceError(
            f"this training needs both {which} and --pretrained_model_name_or_path FOLDER; a new model neither"
        )
    return chosen[0] if chosen else None


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise WhenceError(f"{option} {text!r}; accepted: whole numbers separated by commas, like 32,64,64") from None


TYPED = ("draws", "dim", "damping", "output", "parameters", "ensemble")  # settings with an option of their own


def _settings(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise WhenceError(f"--set {pair!r}; accepted: name=value, like count=8")
        if name in TYPED:
            raise WhenceError(f"--set {pair!r}: {name} has an option of its own; accepted: --{name}")
        try:
            given = json.loads(value)
            found[name] = tuple(given) if isinstance(given, list) else given
        except json.JSONDecodeError:
            found[name] = value
    return found


def _check_settings(settings: Mapping[str, Any], methods: Sequence[str]) -> None:
    """Each setting is known to at least one method and is of the kind it takes."""
    for name, value in settings.items():
        defaults = [settings_of(method)[name] for method in methods if name in settings_of(method)]
        if not defaults:
            takes = "; ".join(f"{method} takes {', '.join(settings_of(method)) or 'none'}" for method in methods)
            raise WhenceError(f"no setting {name!r}: {takes}")
        default = defaults[0]
        fits = default is None or type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if name not in TYPED and not fits:
            raise WhenceError(f"--set {name}={value}; accepted: a {type(default).__name__}, like {name}={default}")


def _engine(device: str) -> Engine:
    """The device, if this machine has it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise WhenceError(f"--device {device}: {str(error).splitlines()[0]}; accepted here: {there}") from None
    return Engine(device)


def _network(path: Path, size: int) -> dict[str, Any]:
    """The configuration of a network in a file, for images of this size."""
    if not path.is_file():
        raise WhenceError(
            f"--model_config_name_or_path {path}: no such file; accepted: the config.json of a UNet2DModel"
        )
    network = read_json(path)
    if not isinstance(network, dict) or network.get("sample_size") != size:
        found = network.get("sample_size") if isinstance(network, dict) else None
        raise WhenceError(
            f"{path}: sample_size is {found}, but the images are {size}x{size}; give --resolution {found}"
        )
    return network


STOPPED = 130  # by Ctrl-C, as shells have it


# What the machine refuses is no bug of ours: full disks, folders that may not be written, files in the way.
REFUSED = {
    errno.ENOSPC: "free some space and run the same command again to go on",
    errno.EDQUOT: "free some space and run the same command again to go on",
    errno.EACCES: "make it readable and writable, or give another folder",
    errno.EPERM: "make it readable and writable, or give another folder",
    errno.EROFS: "give a folder on a disk that can be written",
    errno.ENOTDIR: "a folder is needed there; give another one",
    errno.EEXIST: "a folder is needed there; give another one",
    errno.EISDIR: "a file is needed there; give another one",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "the disk may be failing; give another one",
}


def main() -> None:
    """Run the command line with the promised exit codes."""
    warnings.showwarning = _warn
    try:
        code = app(standalone_mode=False) or 0  # typer.Exit, and Ctrl-C, come back as their code
        sys.exit(_stopped() if code == STOPPED else code)
    except WhenceError as error:
        sys.exit(_fail(str(error), 2))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(_stopped())
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own complaints about options; empty where it printed the help
            sys.exit(_fail(error.format_message(), 2) if error.format_message().strip() else 2)
        if isinstance(error, OSError) and error.errno in REFUSED:
            sys.exit(_fail(f"{error.filename or 'the disk'}: {error.strerror}; {REFUSED[error.errno]}", 2))
        traceback.print_exc()
        sys.exit(_fail(f"this is a bug in whence {VERSION}; please report it with the lines above", 1))


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    typer.echo(f"whence: warning: {' '.join(str(message).split())}", err=True)


def _stopped() -> int:
    return _fail("stopped; what is finished is kept, run the same command again to go on", STOPPED)


def _fail(message: str, code: int) -> int:
    typer.echo(f"whence: {' '.join(message.split())}", err=True)
    return code


if __name__ == "__main__":
    main()
