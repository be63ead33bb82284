"""Pipelines and checkpoints that we write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

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


def save_pipeline(folder: Path, network: Any, weights: Weights, scheduler: DDPMScheduler) -> None:
    """Write a folder that DDPMPipeline.from_pretrained (for UNet2DModel) and `open_model` read."""
    with_weights(network, weights)
    if isinstance(network, UNet2DModel):
        DDPMPipeline(network, scheduler).save_pretrained(folder)
    else:
        network.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")


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
