"""A pipeline folder, opened: its network, its noise schedule and its training checkpoints."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from whence.adapters.networks import NETWORKS, call_unet, call_unet_with_labels, known, load_network
from whence.forward import Denoiser
from whence.store import read_json
from whence.types import Checkpoint, WhenceError

SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")


@dataclass(frozen=True)
class Model:
    """A pipeline folder, opened: what its network is, how it is measured, and its training checkpoints by step."""

    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    forward: Denoiser
    final: Checkpoint
    along: tuple[Checkpoint, ...]

    @property
    def resolution(self) -> int:
        side = self.config.get("sample_size")
        if type(side) is not int:
            raise WhenceError(f"{self.folder / 'unet'}: sample_size is {side!r}, not one number; give --resolution")
        return side

    @property
    def channels(self) -> int:
        return int(self.config["in_channels"])


def open_model(folder: str | Path) -> Model:
    """Read a diffusers pipeline folder. Nothing is loaded yet but its JSON files and the digest of its weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WhenceError(f"model folder {folder} does not exist; expected a folder written by save_pretrained")
    config = _config(folder, "unet", "config.json")
    scheduler = _config(folder, "scheduler", "scheduler_config.json")
    known("network", config.get("_class_name"), NETWORKS, folder / "unet")
    known("scheduler", scheduler.get("_class_name"), SCHEDULERS, folder / "scheduler")
    along = sorted((_along(path) for path in folder.glob("checkpoint-*") if path.is_dir()), key=lambda c: c.step or 0)
    return Model(folder, config, scheduler, _forward(config, scheduler), _final(folder / "unet"), tuple(along))


def _config(folder: Path, part: str, name: str) -> dict[str, Any]:
    path = folder / part / name
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise WhenceError(
            f"{folder} has no {part}/{name} (it holds {inside}); expected a diffusers pipeline with unet/ and scheduler/"
        )
    return read_json(path)


def _forward(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Denoiser:
    # diffusers builds the schedule (linear, scaled_linear, cosine, trained betas, zero-SNR rescaling ...); we only read it.
    schedule = DDPMScheduler.from_config({k: v for k, v in scheduler.items() if k != "_class_name"})
    labelled = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    predict = call_unet_with_labels if labelled else call_unet
    return Denoiser(schedule.alphas_cumprod.double(), str(schedule.config.prediction_type), predict)


def _final(folder: Path) -> Checkpoint:
    return Checkpoint(partial(load_network, folder), _digest(folder), folder.parent.name)


def _along(folder: Path) -> Checkpoint:
    """A checkpoint-N folder: raw weights in unet/, step from its name, rate from whence.json where our trainer wrote it."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if match is None or not (folder / "unet").is_dir():
        raise WhenceError(f"{folder}: expected a folder named checkpoint-<step> that contains unet/")
    notes = read_json(folder / "whence.json") if (folder / "whence.json").is_file() else {}
    load = partial(load_network, folder / "unet")
    return Checkpoint(load, _digest(folder / "unet"), folder.name, int(match[1]), notes.get("rate"))


def _digest(folder: Path) -> str:
    """Fingerprint of weights and configuration, by their bytes."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only {pickled[0]}, a pickle, which whence never opens" if pickled else "no weights"
        raise WhenceError(
            f"{folder} holds {why}; expected *.safetensors (save_pretrained(..., safe_serialization=True))"
        )
    total = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def forward_of(network: Any, scheduler: Any) -> Denoiser:
    """How a network is measured under a schedule."""
    return _forward(network.config, scheduler.config)
