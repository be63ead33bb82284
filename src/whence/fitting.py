"""`whence train`: an architecture and a recipe become a diffusers pipeline folder with its checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from whence.adapters import (
    CUSTOM_FILE,
    LORA_FILE,
    NETWORKS,
    PRIOR_FILE,
    TARGETS,
    Model,
    Prior,
    WithText,
    forward_of,
    load_network,
    load_state,
    move_in,
    network_with_text,
    new_network,
    new_scheduler,
    open_model,
    save_checkpoint,
    save_custom,
    save_lora,
    save_pipeline,
    save_prior,
    scheduler_of,
    text_digest,
    weights_digest,
    with_new_lora,
    with_token,
    with_weights,
)
from whence.engine import progress
from whence.features import identity
from whence.forward import Declared, Denoiser, FlowMatching
from whence.outputs import OUTPUTS
from whence.store import read_json
from whence.training import Training, steps, taught
from whence.types import Engine, Forward, Images, Weights, WhenceError, describe

INITIAL = "initial"  # the folder with the weights that a training went on from


@dataclass(frozen=True, eq=False)
class Study:
    """What is trained, and how. network: the content of a unet/config.json; the next three its noise schedule, or schedule,
    the content of a scheduler_config.json. weights: the unet/ folder whose weights training goes on from; None for new ones,
    drawn from the seed. declared: see `forward.Declared`. Networks that see latents and text are trained on
    `adapters.encode_images`."""

    network: Mapping[str, Any]
    training: Training
    schedule_steps: int = 1000
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    schedule: Mapping[str, Any] | None = None
    weights: Path | None = None
    declared: Declared = Declared()

    def describe(self) -> dict[str, Any]:
        """As of any dataclass, without what plans of before do not name."""
        names = ("network", "training", "schedule_steps", "beta_schedule", "prediction_type")
        found = {"is": "Study", **{name: describe(getattr(self, name)) for name in names}}
        if self.schedule is not None:
            found["schedule"] = describe(self.schedule)
        if self.weights is not None:
            found["weights"] = weights_digest(self.weights)  # not its path, which may change
        return found | _besides(self.declared)

    def network_at(self, seed: int) -> nn.Module:
        """The network before training."""
        return new_network(self.network, seed) if self.weights is None else load_network(self.weights)

    def scheduler(self) -> Any:
        if self.schedule is not None:
            return scheduler_of(self.schedule)
        return new_scheduler(self.schedule_steps, self.beta_schedule, self.prediction_type)

    def forward(self) -> Denoiser | FlowMatching:
        """How it is measured."""
        return self.declared.of(forward_of(self.network_at(0), self.scheduler()))

    def at(self, seed: int) -> Training:
        """The recipe with another seed."""
        return replace(self.training, seed=seed)


def unet_config(
    resolution: int,
    channels: int = 3,
    widths: tuple[int, ...] = (32, 64, 64),
    layers: int = 1,
    dropout: float = 0.0,
    classes: int | None = None,
) -> dict[str, Any]:
    """The configuration of a UNet2DModel with attention at its lowest level. classes: for a class-conditional one."""
    if resolution % 2 ** (len(widths) - 1):
        raise WhenceError(f"{len(widths)} levels need a side that can be halved as often; {resolution} pixels cannot")
    plain = len(widths) - 1
    return {
        "_class_name": "UNet2DModel",
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": layers,
        "block_out_channels": list(widths),
        "down_block_types": [*["DownBlock2D"] * plain, "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", *["UpBlock2D"] * plain],
        "norm_num_groups": 8,
        "dropout": dropout,
        "num_class_embeds": classes,
    }


@dataclass(frozen=True, eq=False)
class LoraStudy:
    """A LoRA on the network of a pipeline folder, trained on what that network sees of pictures and captions
    (`adapters.encode_images`). rank, alpha, targets: see `adapters.lora`; A and B are all that is trained."""

    base: Path
    training: Training
    rank: int = 4
    alpha: float = 4.0
    targets: str = TARGETS
    declared: Declared = Declared()

    @cached_property
    def opened(self) -> Model:
        """The base, opened once: its digest reads every byte of its weights."""
        return open_model(self.base)

    def describe(self) -> dict[str, Any]:
        base = self.opened.final.digest  # not its path, which may change
        lora = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, **_besides(self.declared)}
        return {"is": "LoraStudy", "base": base, **lora, "training": describe(self.training)}

    def network_at(self, seed: int) -> nn.Module:
        """The network with a LoRA that does nothing yet."""
        return with_new_lora(self.base / self.opened.part, self.targets, self.rank, self.alpha, seed)

    def forward(self) -> Forward:
        return self.declared.of(self.opened.forward)

    def at(self, seed: int) -> Training:
        return replace(self.training, seed=seed)

    def write(self, folder: Path, weights: Weights) -> None:
        """The LoRA of these weights, as diffusers writes it."""
        save_lora(folder, self.opened.part, weights, self.rank, self.alpha)


@dataclass(frozen=True, eq=False)
class CustomStudy:
    """Custom Diffusion on a pipeline folder (see `adapters.custom`), trained on what its network sees of pictures whose
    captions name a new token. initializer: the token whose embedding it begins with; prior: the prior images, of which every
    step takes as many as of the others, at prior_weight. They are part of the recipe, not of what is attributed."""

    base: Path
    training: Training
    token: str = "<new1>"
    initializer: str = "ktn"
    prior: Prior | None = None
    prior_weight: float = 1.0
    declared: Declared = Declared()

    def __post_init__(self) -> None:
        if self.training.prior != (0 if self.prior is None else len(self.prior)):
            raise WhenceError(
                f"Custom Diffusion: Training(prior={self.training.prior}) is not the number of prior images"
            )
        if not self.token.strip() or set("/\\") & {*self.token}:
            raise WhenceError(
                f"modifier token {self.token!r}: its file is named after it; accepted: a word like <new1>"
            )

    @cached_property
    def opened(self) -> Model:
        """The base, opened once, with the new token."""
        return with_token(open_model(self.base), self.token)

    def describe(self) -> dict[str, Any]:
        base = [self.opened.final.digest, text_digest(self.base)]  # not its path, which may change
        prior = None if self.prior is None else identity(self.prior)
        told = {"token": self.token, "initializer": self.initializer, "prior_weight": self.prior_weight}
        told |= _besides(self.declared)
        return {"is": "CustomStudy", "base": base, **told, "prior": prior, "training": describe(self.training)}

    def network_at(self, seed: int) -> WithText:
        """The network before training, the same for all seeds."""
        return network_with_text(self.opened, self.initializer)

    def forward(self) -> Forward:
        return self.declared.of(self.opened.forward)

    def at(self, seed: int) -> Training:
        return replace(self.training, seed=seed)


def _besides(declared: Declared) -> dict[str, Any]:
    """What is noted of a training besides the plain loss: nothing where there is nothing, as notes of before."""
    return {} if declared == Declared() else {"declared": describe(declared)}


def _told(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a study that `_besides` noted."""
    return {"declared": Declared.told(notes["declared"])} if "declared" in notes else {}


def part_study(base: Path, size: int, training: Training, full: bool = False, declared: Declared = Declared()) -> Study:
    """The study of the network of a pipeline folder that may have a VAE and text encoders: as its config.json says, with new
    weights, or (full) going on from those it has. size: side of what the network sees, latents or pictures."""
    opened = open_model(base, trained=full)
    network, schedule = (_without_notes(config) for config in (opened.config, opened.scheduler))
    if opened.part == "unet":
        network["sample_size"] = size
    weights = base / opened.part if full else None
    return Study(network, training, schedule=schedule, weights=weights, declared=declared)


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what diffusers notes of its own version and of where it was read."""
    return {name: value for name, value in config.items() if name == "_class_name" or not name.startswith("_")}


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
    data |= _besides(study.declared)

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
    images, weights = taught(study, images)
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
    building = folder / f".pipeline.{os.getpid()}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    try:
        save_pipeline(building, network, weights, study.scheduler(), parts)
        if study.weights is not None:
            shutil.copytree(study.weights, building / INITIAL)
        every = sorted(path.name for path in building.iterdir())
        for part in [*(name for name in every if name not in LAST), *(name for name in LAST if name in every)]:
            move_in(building / part, folder / part)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def study_of(model: Path) -> Study:
    """The study that made a model folder of `whence train`, to be repeated on other images or with other seeds."""
    found = known_study(model)
    if found is None:
        raise WhenceError(
            f"{model} has no checkpoint-N/whence.json; only models made by `whence train` can be repeated"
        )
    return found


def known_study(model: Path, images: Images | None = None) -> Study | None:
    """The same, or None where the model was not made by `whence train`, or not from these images."""
    found = _notes(model, images)
    if found is None or "network" not in found["data"]:
        return None
    schedule, network = found["data"]["schedule"], found["data"]["network"]
    if "scheduler" in found["data"]:
        weights = model / INITIAL if "initial" in found["data"] else None
        if weights is not None and (not weights.is_dir() or weights_digest(weights) != found["data"]["initial"]):
            return None
        return Study(
            network,
            _training(found),
            schedule={"_class_name": found["data"]["scheduler"], **schedule},
            weights=weights,
            **_told(found["data"]),
        )
    return Study(
        network,
        _training(found),
        schedule["num_train_timesteps"],
        schedule["beta_schedule"],
        schedule["prediction_type"],
        **_told(found["data"]),
    )


def known_lora_study(base: Path, lora: Path, images: Images) -> LoraStudy | None:
    """The study that made a LoRA folder of `whence train` from these images, or None."""
    found = _notes(lora, images) if lora.is_dir() else None
    if found is None or "lora" not in found["data"]:
        return None
    told = {name: value for name, value in found["data"]["lora"].items() if name != "base"}
    study = LoraStudy(base, _training(found), **{**told, **_told(told)})
    return study if study.describe()["base"] == found["data"]["lora"]["base"] else None


def known_custom_study(base: Path, custom: Path, images: Images) -> CustomStudy | None:
    """The study that made a Custom Diffusion folder of `whence train` from these images, or None."""
    found = _notes(custom, images)
    if found is None or "custom" not in found["data"]:
        return None
    told = {name: value for name, value in found["data"]["custom"].items() if name not in ("base", "prior")}
    held = found["data"]["custom"]["prior"]
    if held is not None and not (custom / PRIOR_FILE).is_file():
        return None
    study = CustomStudy(
        base, _training(found), prior=None if held is None else Prior.read(custom), **{**told, **_told(told)}
    )
    known = study.describe()
    return study if all(known[name] == found["data"]["custom"][name] for name in ("base", "prior")) else None


def _notes(folder: Path, images: Images | None) -> dict[str, Any] | None:
    """What our trainer noted beside its last checkpoint; None where it did not, or trained on other images."""
    notes = sorted(folder.glob("checkpoint-*/whence.json"), key=lambda path: int(path.parent.name.split("-")[1]))
    found = read_json(notes[-1]) if notes else {}
    if "training" not in found or "data" not in found:  # a note of somebody else, that gives a learning rate
        return None
    if images is not None and found["data"]["images"] != identity(images):
        return None
    return found


def _training(found: Mapping[str, Any]) -> Training:
    recipe = {key: value for key, value in found["training"].items() if key != "is"}
    return Training(**{**recipe, "output": OUTPUTS[recipe["output"]]})
