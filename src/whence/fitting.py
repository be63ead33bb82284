"""`whence train`: an architecture and a recipe become a diffusers pipeline folder with its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whence.adapters import forward_of, load_state, new_scheduler, new_unet, save_checkpoint, save_pipeline
from whence.engine import progress
from whence.features import identity
from whence.store import read_json
from whence.training import Training, steps
from whence.types import Engine, Images, WhenceError, describe


@dataclass(frozen=True)
class Architecture:
    """A UNet2DModel (attention at the lowest level) and its noise schedule. config: a diffusers config.json instead."""

    channels: int = 3
    widths: tuple[int, ...] = (32, 64, 64)
    layers: int = 1
    dropout: float = 0.0
    class_conditional: bool = False
    config: Path | None = None
    schedule_steps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"

    def unet(self, resolution: int, classes: int | None) -> Mapping[str, Any]:
        """The configuration of the network for images of this size."""
        if self.config is not None:
            return read_json(self.config)
        if resolution % 2 ** (len(self.widths) - 1):
            raise WhenceError(
                f"{len(self.widths)} levels need a side that can be halved as often; {resolution} pixels cannot"
            )
        plain = len(self.widths) - 1
        return {
            "sample_size": resolution,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "layers_per_block": self.layers,
            "block_out_channels": self.widths,
            "down_block_types": (*["DownBlock2D"] * plain, "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", *["UpBlock2D"] * plain),
            "norm_num_groups": 8,
            "dropout": self.dropout,
            "num_class_embeds": classes,
        }


def train_model(
    architecture: Architecture, training: Training, images: Images, folder: Path, every: int, engine: Engine
) -> None:
    """Train, writing checkpoint-N every `every` steps and the pipeline (averaged weights) at the end.

    Goes on from the last checkpoint in the folder; a folder of another recipe or data set is refused.
    """
    first = images.batch([0])
    classes = len(set(images.meta["label"])) if architecture.class_conditional and "label" in images.meta else None
    if architecture.class_conditional and classes is None:
        raise WhenceError("--class_conditional needs labels: class folders or a `label` column in metadata.jsonl")
    network = new_unet(architecture.unet(first.x0.shape[-1], classes), training.seed)
    if first.x0.shape[1] != architecture.channels:
        raise WhenceError(f"images have {first.x0.shape[1]} channels, the model {architecture.channels}")
    scheduler = new_scheduler(architecture.schedule_steps, architecture.beta_schedule, architecture.prediction_type)
    data = {"images": identity(images), "architecture": describe(architecture)}
    done = sorted(folder.glob("checkpoint-*/whence.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    state = load_state(done[-1].parent, training, data) if done else None
    begun = state.step if state else 0
    run = steps(network, forward_of(network, scheduler), images, training, state=state, engine=engine)
    for state, _ in progress(run, "training", total=training.steps - begun):
        if state.step % every == 0 or state.step == training.steps:
            save_checkpoint(folder, network, state, training, data)
    assert state is not None
    save_pipeline(folder, network, state.ema, scheduler)
