"""Pipelines and checkpoints that we write."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

import diffusers
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin, SchedulerMixin, UNet2DModel

from whence.models.autoencoders import autoencoder_of
from whence.models.families.family import Config
from whence.models.networks import NETWORKS, known
from whence.models.others import refusing
from whence.models.pipeline import BETA_SCHEDULES, SCHEDULERS
from whence.storage.files import read_object, write_bytes
from whence.storage.jsons import plain_text
from whence.types import Weights


def new_scheduler(steps: int, beta_schedule: str, prediction_type: str) -> DDPMScheduler:
    """The noise schedule of a new model.

    Args:
        steps: timesteps.
        beta_schedule: linear, scaled_linear or squaredcos_cap_v2.
        prediction_type: epsilon, v_prediction or sample.
    """
    with refusing("diffusers cannot build the noise schedule", "scheduler", BETA_SCHEDULES):
        return DDPMScheduler(num_train_timesteps=steps, beta_schedule=beta_schedule, prediction_type=prediction_type)


def scheduler_of(config: Config) -> SchedulerMixin:
    """The noise schedule of a scheduler_config.json."""
    name = config.get("_class_name")
    known("scheduler", name, SCHEDULERS, Path("scheduler_config.json"))
    with refusing(f"scheduler class {name!r} cannot be built", "scheduler_config.json"):
        return getattr(diffusers, str(name)).from_config({k: v for k, v in config.items() if not k.startswith("_")})


def save_pipeline(
    folder: Path, network: ModelMixin, weights: Weights, scheduler: SchedulerMixin, parts: Path | None = None
) -> None:
    """Write a folder that DiffusionPipeline.from_pretrained (for the networks of diffusers) and `open_model` read.

    Args:
        folder: where it is written.
        network: the network.
        weights: that it is given.
        scheduler: its noise schedule.
        parts: the pipeline folder whose other parts (VAE, tokenizers, text encoders) belong to the network; None for none.
    """
    with_weights(network, weights)
    if parts is None and isinstance(network, UNet2DModel):
        DDPMPipeline(network, scheduler).save_pretrained(folder)
        return
    name = type(network).__name__
    network.save_pretrained(folder / NETWORKS[name].folder)
    scheduler.save_pretrained(folder / "scheduler")
    if parts is not None:
        autoencoder = autoencoder_of(parts)
        wanted = OTHERS if autoencoder is None else (*OTHERS, autoencoder.part)
        others = [path for path in sorted(parts.iterdir()) if path.name in wanted and path.is_dir()]
        for path in others:
            shutil.copytree(path, folder / path.name)
        own = {NETWORKS[name].folder: ["diffusers", name], "scheduler": ["diffusers", type(scheduler).__name__]}
        index = _index(parts, {path.name for path in others}, own)
        write_bytes(folder / "model_index.json", plain_text(index) + b"\n")  # diffusers knows no checksum


OTHERS = (
    *("vae", "image_encoder", "feature_extractor", "safety_checker"),
    *(f"{part}{at}" for part in ("tokenizer", "text_encoder") for at in ("", "_2", "_3")),
)
"""The parts of a pipeline besides its network and scheduler."""

STABLE_DIFFUSION = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": diffusers.__version__,
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}


def _index(parts: Path, there: Collection[str], own: Config) -> Config:
    """The model_index.json of a pipeline with the other parts of a folder: its own, or that of Stable Diffusion where it has
    those parts and does not say what it is."""
    path = parts / "model_index.json"
    found = read_object(path) if path.is_file() else {}
    if found.get("_class_name", "DiffusionPipeline") == "DiffusionPipeline" and "unet" in own:
        found = STABLE_DIFFUSION if {"vae", "text_encoder", "tokenizer"} <= {*there} else found
    absent = [name for name, kind in found.items() if isinstance(kind, list) and name not in there]
    return {**found, **{name: [None, None] for name in absent}, **own}


def with_weights(network: ModelMixin, weights: Weights) -> ModelMixin:
    """The network, now holding these weights."""
    network.load_state_dict(weights, strict=False)
    return network
