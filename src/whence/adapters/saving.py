"""Pipelines and checkpoints that we write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from whence.adapters.folders import SCHEDULERS
from whence.adapters.networks import NETWORKS, known
from whence.store import differences, read_json, write_json
from whence.training import State, Training
from whence.types import Weights, WhenceError, describe


def new_scheduler(steps: int, beta_schedule: str, prediction_type: str) -> DDPMScheduler:
    """The noise schedule of a new model."""
    try:
        return DDPMScheduler(num_train_timesteps=steps, beta_schedule=beta_schedule, prediction_type=prediction_type)
    except (NotImplementedError, ValueError) as error:
        raise WhenceError(
            f"scheduler: {error}; accepted beta schedules: linear, scaled_linear, squaredcos_cap_v2"
        ) from None


def scheduler_of(config: Mapping[str, Any]) -> Any:
    """The noise schedule of a scheduler_config.json."""
    name = config.get("_class_name")
    known("scheduler", name, SCHEDULERS, Path("scheduler_config.json"))
    return getattr(diffusers, str(name)).from_config({k: v for k, v in config.items() if not k.startswith("_")})


def save_pipeline(folder: Path, network: Any, weights: Weights, scheduler: Any, parts: Path | None = None) -> None:
    """Write a folder that DiffusionPipeline.from_pretrained (for the networks of diffusers) and `open_model` read.

    parts: the pipeline folder whose other parts (VAE, tokenizers, text encoders) belong to the network, if any do.
    """
    with_weights(network, weights)
    if parts is None and isinstance(network, UNet2DModel):
        DDPMPipeline(network, scheduler).save_pretrained(folder)
        return
    name = type(network).__name__
    network.save_pretrained(folder / NETWORKS[name].folder)
    scheduler.save_pretrained(folder / "scheduler")
    if parts is not None:
        others = [path for path in sorted(parts.iterdir()) if path.name in OTHERS and path.is_dir()]
        for path in others:
            shutil.copytree(path, folder / path.name)
        own = {NETWORKS[name].folder: ["diffusers", name], "scheduler": ["diffusers", type(scheduler).__name__]}
        write_json(folder / "model_index.json", _index(parts, {path.name for path in others}, own))


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


def _index(parts: Path, there: Collection[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """The model_index.json of a pipeline with the other parts of a folder: its own, or that of Stable Diffusion where it has
    those parts and does not say what it is."""
    path = parts / "model_index.json"
    found = read_json(path) if path.is_file() else {}
    if found.get("_class_name", "DiffusionPipeline") == "DiffusionPipeline" and "unet" in own:
        found = STABLE_DIFFUSION if {"vae", "text_encoder", "tokenizer"} <= {*there} else found
    absent = [name for name, kind in found.items() if isinstance(kind, list) and name not in there]
    return {**found, **{name: [None, None] for name in absent}, **own}


def save_checkpoint(
    folder: Path, write: Callable[[Path], object], state: State, training: Training, data: Mapping[str, Any]
) -> None:
    """checkpoint-N: raw weights as `write` writes them, the optimiser's state, our notes. Appears whole, by one rename."""
    target = folder / f"checkpoint-{state.step}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    parts = {"weights": state.weights, "m": state.m, "v": state.v, "ema": state.ema}
    flat = {f"{part}/{name}": w.contiguous().clone() for part, values in parts.items() for name, w in values.items()}
    save_file(flat, temporary / "state.safetensors")
    # The rate in force at this checkpoint is that of the step that led here.
    notes = {"step": state.step, "rate": training.rate_at(state.step - 1), "training": describe(training), "data": data}
    write_json(temporary / "whence.json", notes)
    move_in(temporary, target)


def move_in(source: Path, target: Path) -> None:
    """Rename, or leave what is there: another process that does the same work was faster, and its bytes are the same."""
    try:
        if not target.exists():
            source.rename(target)
    except OSError:
        if not target.exists():
            raise
    if source.is_dir():
        shutil.rmtree(source)


def load_state(folder: Path, training: Training, data: Mapping[str, Any]) -> State:
    """Go on from a checkpoint-N folder, or refuse one that another recipe or another data set made."""
    notes = read_json(folder / "whence.json")
    expected = {"training": describe(training), "data": describe(data)}
    different = differences(expected, {k: notes.get(k) for k in expected})
    if different:
        raise WhenceError(
            f"{folder} is from another run ({different[0]}); use the same options or another --output_dir"
        )
    flat = load_file(folder / "state.safetensors")
    parts: dict[str, Weights] = {"weights": {}, "m": {}, "v": {}, "ema": {}}
    for key, value in flat.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return State(**parts, step=int(notes["step"]))


def with_weights(network: Any, weights: Weights) -> Any:
    """The network, now holding these weights."""
    network.load_state_dict(weights, strict=False)
    return network
