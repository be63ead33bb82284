"""whence train new | text | full | lora | custom: each with its own options, and no others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from whence.cli.common import DATA, MODEL, RUNNING, Device, Output, TrainData, engine_on
from whence.cli.options import Option, Verb, error
from whence.cli.verbs import Later, Verbs

if TYPE_CHECKING:
    from whence.diffusion.forward import Declared
    from whence.models import Model
    from whence.training.recipe import Training
    from whence.types import Images

OPTIMIZER, LOSS, SCHEDULE = "Optimizer", "Loss", "Noise schedule"
ADAMW, NETWORK = ("sgd_momentum",), ("model_config_name_or_path",)


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every training."""

    train_data_dir: TrainData
    output_dir: Output
    resolution: Annotated[int | None, Option("Side of the square images are brought to.", DATA)] = None
    random_flip: Annotated[bool, Option("Mirror images at random.", DATA)] = False
    max_train_steps: Annotated[int, Option("Steps of the optimizer.", OPTIMIZER, min=1)] = 5000
    train_batch_size: Annotated[int, Option("Images per step.", OPTIMIZER, min=1)] = 64
    learning_rate: Annotated[float, Option("At its height.", OPTIMIZER)] = 1e-3
    lr_warmup_steps: Annotated[int, Option("Steps in which the rate rises from 0.", OPTIMIZER, min=0)] = 200
    lr_scheduler: Annotated[
        str, Option("How the rate goes on: cosine or constant.", OPTIMIZER, accepted=("cosine", "constant"))
    ] = "cosine"
    adam_weight_decay: Annotated[float, Option("Decoupled weight decay.", OPTIMIZER)] = 1e-6
    adam_eps_root: Annotated[
        float, Option("Added under AdamW's square root: smooth above 0.", OPTIMIZER, min=0.0, without=ADAMW)
    ] = 1e-8
    sgd_momentum: Annotated[
        float | None, Option("SGD with this momentum, 0 for none, in place of AdamW.", OPTIMIZER, min=0.0)
    ] = None
    max_grad_norm: Annotated[float, Option("Largest gradient norm; 0 for no limit.", OPTIMIZER, min=0.0)] = 1.0
    ema_decay: Annotated[
        float, Option("Of the average of the weights; 0 for no averaging.", OPTIMIZER, min=0.0, max=1.0)
    ] = 0.999
    snr_gamma: Annotated[float | None, Option("Weigh the loss by min-SNR; not for flow matching.", LOSS)] = None
    seed: Annotated[int, Option("Of everything random.", RUNNING)] = 0
    checkpointing_steps: Annotated[int, Option("Steps between checkpoints.", RUNNING, min=1)] = 1000
    device: Device = "cpu"


@dataclass(frozen=True, kw_only=True)
class New(Common):
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
    ddpm_num_steps: Annotated[int, Option("Timesteps.", SCHEDULE, min=1)] = 1000
    ddpm_beta_schedule: Annotated[str, Option("As diffusers names it: linear, squaredcos_cap_v2 ...", SCHEDULE)] = (
        "linear"
    )
    prediction_type: Annotated[
        str,
        Option("What the network predicts.", SCHEDULE, accepted=("epsilon", "v_prediction", "sample")),
    ] = "epsilon"


@dataclass(frozen=True, kw_only=True)
class OnBase(Common):
    """Options of trainings on the pictures and captions that a pipeline's network sees."""

    pretrained_model_name_or_path: Annotated[Path, Option("A pipeline folder, the base.", MODEL)]
    caption_column: Annotated[str | None, Option("Column of the captions; text by default.", DATA)] = None
    proportion_empty_prompts: Annotated[
        float, Option("Captions left out, for guidance later.", DATA, min=0.0, max=1.0)
    ] = 0.0
    weighting_scheme: Annotated[
        str,
        Option(
            "logit_normal or mode: density of the timesteps; sigma_sqrt or cosmap: weight of the loss (flow matching).",
            LOSS,
            accepted=("none", "logit_normal", "mode", "sigma_sqrt", "cosmap"),
        ),
    ] = "none"
    logit_mean: Annotated[float, Option("Of the density.", LOSS, needs=("weighting_scheme=logit_normal",))] = 0.0
    logit_std: Annotated[float, Option("Of the density.", LOSS, needs=("weighting_scheme=logit_normal",))] = 1.0
    mode_scale: Annotated[float, Option("Of the density.", LOSS, needs=("weighting_scheme=mode",))] = 1.29


@dataclass(frozen=True, kw_only=True)
class Text(OnBase):
    """Train the network of a pipeline, unet/config.json, anew on pictures and captions; the rest of the pipeline is copied.

    Run again with the same options to go on after an interruption."""


@dataclass(frozen=True, kw_only=True)
class Full(OnBase):
    """Train all weights of a pipeline's network further; the rest of the pipeline is copied.

    Run again with the same options to go on after an interruption."""


@dataclass(frozen=True, kw_only=True)
class Lora(OnBase):
    """Train a LoRA on the network of a pipeline, and write a file as diffusers does.

    Run again with the same options to go on after an interruption."""

    rank: Annotated[int, Option("Of the LoRA.", MODEL, min=1)] = 4
    lora_alpha: Annotated[float | None, Option("Its scale is alpha / rank; the rank by default.", MODEL)] = None
    lora_targets: Annotated[
        str | None,
        Option("Regular expression for the ends of the names of Linear layers; attention by default.", MODEL),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CustomDiffusion(OnBase):
    """Train a pipeline's cross-attention and one new token.

    Run again with the same options to go on after an interruption."""

    modifier_token: Annotated[str, Option("The new token; all captions hold it.", MODEL)] = "<new1>"
    initializer_token: Annotated[str, Option("The token whose embedding the new one begins with.", MODEL)] = "ktn"
    prior_data_dir: Annotated[Path | None, Option("Imagefolder of prior images.", DATA)] = None
    prior_loss_weight: Annotated[float, Option("Of the prior images.", LOSS, min=0.0, needs=("prior_data_dir",))] = 1.0


def new(options: New) -> None:
    from whence.data.images import ImageFolder
    from whence.task import folder_images
    from whence.training.runs import train_model
    from whence.training.study import Study

    data, size, channels, root = options.train_data_dir, options.resolution, options.channels, options.output_dir
    declared, engine = _declared(options), engine_on(options.device)
    training = _training(options, declared)
    images = folder_images(data, size, channels, root)
    height, width = images.batch([0]).x0.shape[-2:]
    if height != width:
        raise error(f"{data}: the images are {width}x{height}; give --resolution for square ones")
    if size is None:  # by their size, as `attribute` will read them: the same images then have the same name
        images = folder_images(data, width, channels, root)
    assert isinstance(images, ImageFolder)
    network = _network(options, images, width)
    noise = (options.ddpm_num_steps, options.ddpm_beta_schedule, options.prediction_type)
    train_model(Study(network, training, *noise, declared=declared), images, root, options.checkpointing_steps, engine)
    typer.echo(f"model: {root}")


def _network(options: New, images: Any, width: int) -> dict[str, Any]:
    from whence.training.study import unet_config

    if options.model_config_name_or_path is not None:
        return _network_in(options.model_config_name_or_path, width)
    classes = None
    if options.class_conditional:
        if images.labels is None:
            raise error("--class_conditional needs labels: class folders or a `label` column in metadata.jsonl")
        classes = int(images.labels.max()) + 1
    try:
        widths = tuple(int(part) for part in options.block_out_channels.split(","))
    except ValueError:
        accepted = "whole numbers separated by commas, like 32,64,64"
        raise error(f"--block_out_channels {options.block_out_channels!r}", accepted=accepted) from None
    return unet_config(width, options.channels, widths, options.layers_per_block, options.dropout, classes)


def _network_in(path: Path, size: int) -> dict[str, Any]:
    """The configuration of a network in a file, for images of this size."""
    from whence.storage.files import read_json

    if not path.is_file():
        raise error(f"--model_config_name_or_path {path}: no such file", accepted="the config.json of a UNet2DModel")
    network = read_json(path)
    if not isinstance(network, dict) or network.get("sample_size") != size:
        found = network.get("sample_size") if isinstance(network, dict) else None
        raise error(f"{path}: sample_size is {found}, but the images are {size}x{size}; give --resolution {found}")
    return network


def text(options: Text) -> None:
    _whole(options, anew=True)


def full(options: Full) -> None:
    _whole(options, anew=False)


def _whole(options: OnBase, anew: bool) -> None:
    from whence.training.runs import train_model
    from whence.training.study import part_study

    base, declared = options.pretrained_model_name_or_path, _declared(options)
    opened, engine = _opened(options, trained=not anew), engine_on(options.device)
    if anew and not opened.reads_text:
        raise error(
            f"{base}: its network reads no text", accepted="one that does; `whence train new` for one of pixels"
        )
    seen = _seen(options, opened, options.train_data_dir)
    study = part_study(base, seen.batch([0]).x0.shape[-1], _training(options, declared), not anew, declared)
    train_model(study, seen, options.output_dir, options.checkpointing_steps, engine, base)
    typer.echo(f"model: {options.output_dir}")


def lora(options: Lora) -> None:
    from whence.models import TARGETS
    from whence.training.runs import train_lora
    from whence.training.study import LoraStudy

    declared, engine = _declared(options), engine_on(options.device)
    seen = _seen(options, _opened(options), options.train_data_dir)
    alpha, targets = options.lora_alpha or float(options.rank), options.lora_targets or TARGETS
    base = options.pretrained_model_name_or_path
    study = LoraStudy(base, _training(options, declared), options.rank, alpha, targets, declared)
    train_lora(study, seen, options.output_dir, options.checkpointing_steps, engine)
    typer.echo(f"LoRA: {options.output_dir}")


def custom(options: CustomDiffusion) -> None:
    from whence.models import Prior, with_token
    from whence.training.runs import train_custom
    from whence.training.study import CustomStudy

    declared, engine = _declared(options), engine_on(options.device)
    opened = with_token(_opened(options), options.modifier_token)
    prior = None if options.prior_data_dir is None else Prior.of(_seen(options, opened, options.prior_data_dir))
    training = replace(_training(options, declared), prior=0 if prior is None else len(prior))
    tokens = (options.modifier_token, options.initializer_token)
    base = options.pretrained_model_name_or_path
    study = CustomStudy(base, training, *tokens, prior, options.prior_loss_weight, declared)
    seen = _seen(options, opened, options.train_data_dir)
    train_custom(study, seen, options.output_dir, options.checkpointing_steps, engine)
    typer.echo(f"Custom Diffusion: {options.output_dir}")


def _opened(options: OnBase, trained: bool = True) -> Model:
    from whence.models import open_model

    return open_model(options.pretrained_model_name_or_path, trained=trained)


def _seen(options: OnBase, base: Model, folder: Path) -> Images:
    """Pictures and captions as the network sees them."""
    from whence.models import encode_images
    from whence.task import folder_images

    pictures = folder_images(folder, options.resolution or base.resolution, base.channels, options.output_dir)
    return encode_images(
        base, pictures, options.output_dir, engine_on(options.device), options.caption_column or "text"
    )


def _declared(options: Common) -> Declared:
    """The density of the timesteps and the weight of the loss."""
    from whence.diffusion.draws import LogitNormal, Mode
    from whence.diffusion.forward import CosMap, Declared, MinSNR, SigmaSqrt

    scheme, declared = "none", Declared()
    if isinstance(options, OnBase):
        scheme = options.weighting_scheme
        declared = {
            "none": Declared(),
            "logit_normal": Declared(density=LogitNormal(options.logit_mean, options.logit_std)),
            "mode": Declared(density=Mode(options.mode_scale)),
            "sigma_sqrt": Declared(SigmaSqrt()),
            "cosmap": Declared(CosMap()),
        }[scheme]
    if options.snr_gamma is None:
        return declared
    if declared.weighting is not None:
        raise error(f"--snr_gamma and --weighting_scheme {scheme} both weigh the loss; give one")
    return replace(declared, weighting=MinSNR(options.snr_gamma))


def _training(options: Common, declared: Declared) -> Training:
    from whence.diffusion.outputs import OUTPUTS
    from whence.training.recipe import Training

    return Training(
        steps=options.max_train_steps,
        batch_size=options.train_batch_size,
        rate=options.learning_rate,
        warmup=options.lr_warmup_steps,
        schedule=options.lr_scheduler,
        decay=options.adam_weight_decay,
        eps_root=options.adam_eps_root,
        momentum=options.sgd_momentum,
        clip=options.max_grad_norm or None,
        ema=options.ema_decay or None,
        flip=options.random_flip,
        empty_caption=options.proportion_empty_prompts if isinstance(options, OnBase) else 0.0,
        output=OUTPUTS["loss" if declared.weighting is None else "weighted"],
        seed=options.seed,
    )


NEW, TEXT, FULL, LORA = Verb(new, New), Verb(text, Text), Verb(full, Full), Verb(lora, Lora)
CUSTOM = Verb(custom, CustomDiffusion)


class Trainings(Verbs):
    later = {  # noqa: RUF012
        "new": Later("train:NEW", "A small diffusion model of pixels."),
        "text": Later("train:TEXT", "A pipeline's network, anew, on pictures and captions."),
        "full": Later("train:FULL", "All weights of a pipeline's network, further."),
        "lora": Later("train:LORA", "A LoRA on a pipeline."),
        "custom": Later("train:CUSTOM", "Custom Diffusion: cross-attention and one new token."),
    }


GROUP = Trainings(
    name="train", no_args_is_help=True, help="Train a model whose every step can be reproduced, or go on training one."
)
