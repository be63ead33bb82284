"""`whence train`: an architecture and a recipe become a diffusers pipeline folder with its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from whence.features.rows import identity
from whence.models import (
    CUSTOM_FILE,
    LORA_FILE,
    NETWORKS,
    save_custom,
    save_pipeline,
    save_prior,
    weights_digest,
    with_weights,
)
from whence.storage.files import building, move_in, progress
from whence.training.checkpoints import INITIAL, load_state, save_checkpoint
from whence.training.loop import steps
from whence.training.order import with_prior_images
from whence.training.study import CustomStudy, LoraStudy, Study, declared_notes
from whence.types import Engine, Images, Weights, WhenceError, describe


def train_model(
    study: Study, images: Images, folder: Path, every: int, engine: Engine = Engine(), parts: Path | None = None
) -> None:
    """Train, writing checkpoint-N every `every` steps and the pipeline (averaged weights) at the end.

    parts: the pipeline folder whose VAE, tokenizers and text encoders made what the network sees, if any; the result holds
    copies. Weights that training goes on from are copied to initial/, so that the folder can replay its training.

    Goes on from the last checkpoint in the folder; a folder of another recipe or data set is refused, and so is one that
    holds a model which was not trained here.
    """
    network = study.network_at(study.training.seed)
    part = NETWORKS[type(network).__name__].folder
    channels, wanted = images.batch([0]).x0.shape[1], study.network["in_channels"]
    if parts is None and channels != wanted:  # with parts, `encode_images` knows better (Flux packs its latents)
        raise WhenceError(f"images have {channels} channels, the model takes {wanted}")
    data = {
        "images": identity(images),
        "network": describe(study.network),
        # Not diffusers' own notes (_use_default_values): a list in the order of a set, another one in every process.
        "schedule": {k: v for k, v in describe(study.scheduler().config).items() if not k.startswith("_")},
    }
    if study.schedule is not None:
        data["scheduler"] = study.schedule["_class_name"]
    if study.weights is not None:
        data["initial"] = weights_digest(study.weights)
    data |= declared_notes(study.declared)

    def write(to: Path, weights: Weights) -> None:
        with_weights(network, weights).save_pretrained(to / part)

    results = (folder / "model_index.json", folder / part)
    weights = _train(study, network, images, folder, every, engine, data, results, write)
    _publish(folder, study, network, weights, parts)


def train_lora(study: LoraStudy, images: Images, folder: Path, every: int, engine: Engine = Engine()) -> None:
    """Train a LoRA likewise: checkpoint-N every `every` steps, and the LoRA of the averaged weights at the end."""
    network = study.network_at(study.training.seed)
    told = {name: value for name, value in study.describe().items() if name not in ("is", "training")}
    data = {"images": identity(images), "lora": told}
    weights = _train(study, network, images, folder, every, engine, data, (folder / LORA_FILE,), study.write)
    study.write(folder, weights)


def train_custom(study: CustomStudy, images: Images, folder: Path, every: int, engine: Engine = Engine()) -> None:
    """Train Custom Diffusion likewise; prior images are kept beside the result, so that it can be trained again."""
    network = study.network_at(study.training.seed)
    seen = images.batch(range(len(images))).cond["input_ids"]
    without = (seen != network.word.number).all(1).nonzero()
    if len(without):
        name = images.ids[int(without[0])]
        raise WhenceError(
            f"image {name!r}: its caption lacks the modifier token {study.token!r}; write it in every caption"
        )
    told = {name: value for name, value in study.describe().items() if name not in ("is", "training")}
    data = {"images": identity(images), "custom": told}

    def write(to: Path, weights: Weights) -> None:
        save_custom(to, network, study.token, weights)

    weights = _train(study, network, images, folder, every, engine, data, (folder / CUSTOM_FILE,), write)
    if study.prior is not None:
        save_prior(folder, study.prior)
    write(folder, weights)


def _train(
    study: Study | LoraStudy | CustomStudy,
    network: nn.Module,
    images: Images,
    folder: Path,
    every: int,
    engine: Engine,
    data: Mapping[str, Any],
    results: Sequence[Path],
    write: Callable[[Path, Weights], None],
) -> Weights:
    """The averaged weights of a run, which goes on from its last checkpoint. results: what only a finished run leaves."""
    training = study.training
    done = sorted(folder.glob("checkpoint-*/whence.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    ours = {path.parent for path in done}
    foreign = [path for path in folder.glob("checkpoint-*") if path not in ours]
    foreign += [path for path in results if path.exists() and not ours]
    if foreign:
        raise WhenceError(f"{foreign[0]} was not written by whence train; choose another --output_dir")
    state = load_state(done[-1].parent, training, data) if done else None
    begun = state.step if state else 0
    images, weights = with_prior_images(study, images)
    run = steps(network, study.forward(), images, training, weights, state=state, engine=engine)
    for state, _ in progress(run, "training", total=training.steps - begun):
        if state.step % every == 0 or state.step == training.steps:
            save_checkpoint(folder, partial(_written, write, state.weights), state, training, data)
    assert state is not None
    return state.ema


def _written(write: Callable[[Path, Weights], None], weights: Weights, folder: Path) -> None:
    write(folder, weights)


LAST = ("scheduler", "model_index.json")  # appear in this order: the last says that all are there


def _publish(folder: Path, study: Study, network: nn.Module, weights: Weights, parts: Path | None) -> None:
    """Write the pipeline beside its place, then move it in part by part."""
    with building(folder / "pipeline") as new:
        save_pipeline(new, network, weights, study.scheduler(), parts)
        if study.weights is not None:
            shutil.copytree(study.weights, new / INITIAL)
        every = sorted(path.name for path in new.iterdir())
        for part in [*(name for name in every if name not in LAST), *(name for name in LAST if name in every)]:
            move_in(new / part, folder / part)
