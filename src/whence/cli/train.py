"""whence train new | text | full | lora | custom: each with its own options, and no others; and whence train RECIPE.toml."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from whence.cli.common import DATA, MODEL, RUNNING, Classes, Device, Output, ReportTo, Skip, TrainData, engine_on
from whence.cli.options import Option, Verb, error
from whence.cli.terminal import say
from whence.cli.verbs import Later, Verbs
from whence.diffusion.draws import Density, Even, LogitNormal, Mode
from whence.diffusion.forward import CosMap, MinSNR, SigmaSqrt, Weight
from whence.training.optimizer import SGD, AdamW
from whence.training.recipe import (
    Augmentation,
    Full,
    New,
    NewCustomDiffusion,
    NewLora,
    NoiseSchedule,
    Objective,
    OnBase,
    Recipe,
    Schedule,
    Text,
    Trained,
)

if TYPE_CHECKING:
    from whence.training.runs import Pictures

OPTIMIZER, LOSS, SCHEDULE = "Optimizer", "Loss", "Noise schedule"
NAMES = (
    "Names of the model's classes in its order: a file with one per line, or names with commas; kept with the model."
)
Validation = Annotated[
    Path | None,
    Option("Pictures that do not train; their loss is measured at every checkpoint and kept in validation.json.", DATA),
]
Without = Annotated[
    tuple[Path, ...], Option("A file with names of images to leave out, one a line; may be repeated.", DATA)
]
ADAMW, NETWORK = ("sgd_momentum",), ("model_config_name_or_path",)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every training."""

    train_data_dir: TrainData
    output_dir: Output
    resolution: Annotated[int | None, Option("Side of the square images are brought to.", DATA)] = None
    skip: Skip = False
    without: Without = ()
    validation_data_dir: Validation = None
    random_flip: Annotated[bool, Option("Mirror images at random.", DATA)] = False
    max_train_steps: Annotated[int, Option("Steps of the optimizer.", OPTIMIZER, min=1)] = Schedule.steps
    train_batch_size: Annotated[int, Option("Images per step.", OPTIMIZER, min=1)] = Recipe.batch_size
    learning_rate: Annotated[float, Option("The highest one, after the warm-up.", OPTIMIZER)] = AdamW.learning_rate
    lr_warmup_steps: Annotated[int, Option("Steps in which the rate rises from 0.", OPTIMIZER, min=0)] = (
        Schedule.warmup_steps
    )
    lr_scheduler: Annotated[
        str,
        Option(
            "How the rate goes after the warm-up: cosine (to 0) or constant.",
            OPTIMIZER,
            accepted=("cosine", "constant"),
        ),
    ] = Schedule.kind
    adam_weight_decay: Annotated[float, Option("Decoupled weight decay, of SGD as well.", OPTIMIZER)] = (
        AdamW.weight_decay
    )
    adam_eps_root: Annotated[
        float, Option("Added under AdamW's square root: smooth above 0.", OPTIMIZER, min=0.0, without=ADAMW)
    ] = AdamW.eps_root
    sgd_momentum: Annotated[
        float | None, Option("SGD with this momentum, 0 for none, in place of AdamW.", OPTIMIZER, min=0.0)
    ] = None
    max_grad_norm: Annotated[float, Option("Largest gradient norm; 0 for no limit.", OPTIMIZER, min=0.0)] = (
        Recipe.max_grad_norm
    )
    ema_decay: Annotated[
        float,
        Option("Decay of the average of the weights, which is sampled from; 0 for none.", OPTIMIZER, min=0.0, max=1.0),
    ] = Recipe.ema
    snr_gamma: Annotated[
        float | None, Option("Weigh the loss by min-SNR with this gamma; not for flow matching.", LOSS)
    ] = None
    seed: Annotated[int, Option("Seed of everything random.", RUNNING)] = Recipe.seed
    checkpointing_steps: Annotated[int, Option("Steps between checkpoints.", RUNNING, min=1)] = 1000
    report_to: ReportTo = None
    device: Device = "cpu"


@dataclass(frozen=True, kw_only=True)
class NewOptions(Common):
    """Train a small diffusion model of pixels, and write a diffusers pipeline folder.

    Run again with the same options to go on after an interruption."""

    channels: Annotated[int, Option("3 (RGB) or 1 (grey).", DATA, min=1, max=3)] = 3
    model_config_name_or_path: Annotated[Path | None, Option("config.json of a UNet2DModel.", MODEL)] = None
    block_out_channels: Annotated[str, Option("Channels per level, comma separated.", MODEL, without=NETWORK)] = (
        "32,64,64"
    )
    layers_per_block: Annotated[int, Option("Layers per level.", MODEL, min=1, without=NETWORK)] = 1
    dropout: Annotated[float, Option("Chance that a unit is left out.", MODEL, min=0.0, max=0.9, without=NETWORK)] = 0.0
    class_conditional: Annotated[bool, Option("Condition on the class labels.", MODEL, without=NETWORK)] = False
    classes: Annotated[str | None, Option(NAMES, DATA, needs=("class_conditional", "model_config_name_or_path"))] = None
    ddpm_num_steps: Annotated[int, Option("Timesteps.", SCHEDULE, min=1)] = NoiseSchedule.steps
    ddpm_beta_schedule: Annotated[str, Option("As diffusers names it: linear, squaredcos_cap_v2 ...", SCHEDULE)] = (
        NoiseSchedule.beta_schedule
    )
    prediction_type: Annotated[
        str,
        Option("What the network predicts.", SCHEDULE, accepted=("epsilon", "v_prediction", "sample")),
    ] = NoiseSchedule.prediction_type


@dataclass(frozen=True, kw_only=True)
class OnBaseOptions(Common):
    """Options of trainings on the pictures and captions that a pipeline's network sees."""

    pretrained_model_name_or_path: Annotated[Path, Option("A pipeline folder, the base.", MODEL, hub="model")]
    caption_column: Annotated[str | None, Option("Column of the captions; text by default.", DATA)] = None
    proportion_empty_prompts: Annotated[
        float, Option("Share of captions left out, for guidance later.", DATA, min=0.0, max=1.0)
    ] = Augmentation.empty_caption
    weighting_scheme: Annotated[
        str,
        Option(
            "logit_normal or mode: density of the timesteps; sigma_sqrt or cosmap: weight of the loss (flow matching).",
            LOSS,
            accepted=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        ),
    ] = "none"
    logit_mean: Annotated[
        float, Option("Mean of the normal behind logit_normal.", LOSS, needs=("weighting_scheme=logit_normal",))
    ] = LogitNormal.mean
    logit_std: Annotated[float, Option("Its standard deviation.", LOSS, needs=("weighting_scheme=logit_normal",))] = (
        LogitNormal.std
    )
    mode_scale: Annotated[float, Option("Scale of the density mode.", LOSS, needs=("weighting_scheme=mode",))] = (
        Mode.scale
    )


@dataclass(frozen=True, kw_only=True)
class TextOptions(OnBaseOptions):
    """Train the network of a pipeline, unet/config.json, anew on pictures and captions; the rest of the pipeline is copied.

    Run again with the same options to go on after an interruption."""


@dataclass(frozen=True, kw_only=True)
class FullOptions(OnBaseOptions):
    """Train all weights of a pipeline's network further; the rest of the pipeline is copied.

    Run again with the same options to go on after an interruption."""

    classes: Classes = None


@dataclass(frozen=True, kw_only=True)
class LoraOptions(OnBaseOptions):
    """Train a LoRA on the network of a pipeline, and write a file as diffusers does.

    Run again with the same options to go on after an interruption."""

    classes: Classes = None
    rank: Annotated[int, Option("Rank of the LoRA.", MODEL, min=1)] = NewLora.rank
    lora_alpha: Annotated[float | None, Option("The LoRA counts by alpha / rank; the rank by default.", MODEL)] = None
    lora_targets: Annotated[
        str | None,
        Option("Regular expression for the ends of the names of Linear layers; attention by default.", MODEL),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CustomOptions(OnBaseOptions):
    """Train a pipeline's cross-attention and one new token.

    Run again with the same options to go on after an interruption."""

    modifier_token: Annotated[str, Option("The new token; all captions hold it.", MODEL)] = (
        NewCustomDiffusion.modifier_token
    )
    initializer_token: Annotated[str, Option("The token whose embedding the new one begins with.", MODEL)] = (
        NewCustomDiffusion.initializer_token
    )
    prior_data_dir: Annotated[Path | None, Option("Imagefolder of prior images.", DATA, hub="dataset")] = None
    prior_loss_weight: Annotated[
        float, Option("Weight of the prior images in the loss.", LOSS, min=0.0, needs=("prior_data_dir",))
    ] = NewCustomDiffusion.prior_loss_weight


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """Train by a recipe file: recipe.toml of a model folder, or one of your own (see docs/training.md).

    Run again with the same options to go on after an interruption."""

    recipe: Annotated[Path, Option("The .toml file, or a model folder that holds recipe.toml.", MODEL, argument=True)]
    train_data_dir: TrainData
    output_dir: Output
    set: Annotated[
        tuple[str, ...], Option("KEY=VALUE in place of the file's, like optimizer.learning_rate=1e-4.", MODEL)
    ] = ()
    pretrained_model_name_or_path: Annotated[
        Path | None, Option("The base, in place of the file's.", MODEL, hub="model")
    ] = None
    resolution: Annotated[int | None, Option("Side of the square images are brought to.", DATA)] = None
    caption_column: Annotated[str | None, Option("Column of the captions; text by default.", DATA)] = None
    prior_data_dir: Annotated[Path | None, Option("Imagefolder of prior images.", DATA, hub="dataset")] = None
    classes: Classes = None
    skip: Skip = False
    without: Without = ()
    validation_data_dir: Validation = None
    checkpointing_steps: Annotated[int, Option("Steps between checkpoints.", RUNNING, min=1)] = (
        Common.checkpointing_steps
    )
    report_to: ReportTo = None
    device: Device = "cpu"


def new(options: NewOptions) -> None:
    from whence.data.classes import class_names
    from whence.training.runs import Pictures, pixel_images

    names = options.classes if options.class_conditional else None  # else config.json says how many there are
    count = None if names is None else len(class_names(names))
    pictures = Pictures(
        options.train_data_dir, options.resolution, classes=names, skip=options.skip, without=options.without
    )
    images, side = pixel_images(pictures, options.channels, options.output_dir, count)
    noise = NoiseSchedule(options.ddpm_num_steps, options.ddpm_beta_schedule, options.prediction_type)
    recipe = _recipe(options, New(_network(options, images, side, count), noise))
    _train(options, recipe, replace(pictures, resolution=side, classes=options.classes), "model")


def _network(options: NewOptions, images: Any, width: int, classes: int | None) -> dict[str, object]:
    from whence.training.study import unet_config

    if options.model_config_name_or_path is not None:
        return _network_in(options.model_config_name_or_path, width)
    if options.class_conditional:
        if images.labels is None:
            raise error("--class_conditional needs labels: class folders or a `label` column in metadata.jsonl")
        classes = classes or int(images.labels.max()) + 1
    try:
        widths = tuple(int(part) for part in options.block_out_channels.split(","))
    except ValueError:
        accepted = "whole numbers separated by commas, like 32,64,64"
        raise error(f"--block_out_channels {options.block_out_channels!r}", accepted=accepted) from None
    return unet_config(width, options.channels, widths, options.layers_per_block, options.dropout, classes)


def _network_in(path: Path, size: int) -> dict[str, object]:
    """The configuration of a network in a file, for images of this size."""
    from whence.storage.files import read_object

    if not path.is_file():
        raise error(f"--model_config_name_or_path {path}: no such file", accepted="the config.json of a UNet2DModel")
    network = read_object(path)
    if (found := network.get("sample_size")) != size:
        raise error(f"{path}: sample_size is {found}, but the images are {size}x{size}; give --resolution {found}")
    return network


def text(options: TextOptions) -> None:
    _on_base(options, Text(options.pretrained_model_name_or_path), "model")


def full(options: FullOptions) -> None:
    _on_base(options, Full(options.pretrained_model_name_or_path), "model")


def lora(options: LoraOptions) -> None:
    base, rank = options.pretrained_model_name_or_path, options.rank
    _on_base(options, NewLora(base, rank, options.lora_alpha, options.lora_targets), "LoRA")


def custom(options: CustomOptions) -> None:
    tokens = options.modifier_token, options.initializer_token
    model = NewCustomDiffusion(options.pretrained_model_name_or_path, *tokens, options.prior_loss_weight)
    _on_base(options, model, "Custom Diffusion", options.prior_data_dir)


def by_recipe(options: RecipeOptions) -> None:
    from whence.training.recipe_file import read_recipe
    from whence.training.runs import Pictures

    recipe = read_recipe(options.recipe, options.set)
    if options.pretrained_model_name_or_path is not None:
        if recipe.model is None or isinstance(recipe.model, New):
            raise error("--pretrained_model_name_or_path: the recipe trains a new network", accepted="no such option")
        recipe = recipe.on(options.pretrained_model_name_or_path)
    folders = options.train_data_dir, options.resolution, options.caption_column, options.prior_data_dir
    pictures = Pictures(*folders, options.classes, options.skip, options.without)
    _train(options, recipe, pictures, "model")


def _on_base(options: OnBaseOptions, model: OnBase, what: str, prior: Path | None = None) -> None:
    from whence.training.runs import Pictures

    classes = options.classes if isinstance(options, FullOptions | LoraOptions) else None
    folders = options.train_data_dir, options.resolution, options.caption_column, prior
    pictures = Pictures(*folders, classes, options.skip, options.without)
    _train(options, _recipe(options, model), pictures, what)


def _train(options: Common | RecipeOptions, recipe: Recipe, pictures: Pictures, what: str) -> None:
    from whence.training.runs import train

    pictures = replace(pictures, validation=options.validation_data_dir)
    engine, every = engine_on(options.device), options.checkpointing_steps
    train(recipe, pictures, options.output_dir, every, engine, options.report_to)
    if options.validation_data_dir is not None:
        _say_held_out(options.output_dir)
    say(f"{what}: {options.output_dir}")


def _say_held_out(folder: Path) -> None:
    """The loss of held-out pictures at the end, and where it was lowest."""
    from whence.storage.files import readable
    from whence.training.held_out import FILE, Note

    losses = readable(folder / FILE, Note)["losses"]
    step, last = losses[-1]
    best, lowest = min(losses, key=lambda one: one[1])
    said = f"held-out loss: {last:.4g} after {step:,} steps"
    say(
        said
        if best == step
        else f"{said}; it was lower, {lowest:.4g}, after {best:,}: the model learns its images by heart"
    )


def _recipe(options: Common, model: Trained) -> Recipe:
    rate, decay = options.learning_rate, options.adam_weight_decay
    empty = options.proportion_empty_prompts if isinstance(options, OnBaseOptions) else Augmentation.empty_caption
    if options.sgd_momentum is None:
        optimizer: AdamW | SGD = AdamW(rate, weight_decay=decay, eps_root=options.adam_eps_root)
    else:
        optimizer = SGD(rate, options.sgd_momentum, decay)
    return Recipe(
        model,
        optimizer,
        Schedule(options.max_train_steps, options.lr_warmup_steps, options.lr_scheduler),
        _objective(options),
        Augmentation(options.random_flip, empty),
        options.train_batch_size,
        options.max_grad_norm,
        options.ema_decay,
        options.seed,
    )


def _objective(options: Common) -> Objective:
    """The density of the timesteps and the weight of the loss."""
    density: Density = Even()
    weighting: Weight | None = None
    scheme = options.weighting_scheme if isinstance(options, OnBaseOptions) else "none"
    if isinstance(options, OnBaseOptions):
        if scheme == "logit_normal":
            density = LogitNormal(options.logit_mean, options.logit_std)
        elif scheme == "mode":
            density = Mode(options.mode_scale)
        elif scheme == "sigma_sqrt":
            weighting = SigmaSqrt()
        elif scheme == "cosmap":
            weighting = CosMap()
    if options.snr_gamma is None:
        return Objective(None, weighting, density)
    if weighting is not None:
        raise error(f"--snr_gamma and --weighting_scheme {scheme} both weigh the loss; give one")
    return Objective(None, MinSNR(options.snr_gamma), density)


NEW, TEXT, FULL = Verb(new, NewOptions), Verb(text, TextOptions), Verb(full, FullOptions)
LORA, CUSTOM, RECIPE = Verb(lora, LoraOptions), Verb(custom, CustomOptions), Verb(by_recipe, RecipeOptions)


class Trainings(Verbs):
    """The kinds of training; a path of a recipe stands for the kind that it says."""

    later = {  # noqa: RUF012
        "new": Later("train:NEW", "A small diffusion model of pixels."),
        "text": Later("train:TEXT", "A pipeline's network, anew, on pictures and captions."),
        "full": Later("train:FULL", "All weights of a pipeline's network, further."),
        "lora": Later("train:LORA", "A LoRA on a pipeline."),
        "custom": Later("train:CUSTOM", "Custom Diffusion: cross-attention and one new token."),
        "recipe": Later("train:RECIPE", "By a recipe file, or again by that of a model folder."),
    }

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.later and (args[0].endswith(".toml") or Path(args[0]).is_dir()):
            return super().resolve_command(ctx, ["recipe", *args])
        return super().resolve_command(ctx, args)


GROUP = Trainings(
    name="train", no_args_is_help=True, help="Train a model whose every step can be reproduced, or go on training one."
)
