"""What is trained: a network with its noise schedule, a LoRA on one, or Custom Diffusion; each the same to its trainer.

A subject knows the network before training, how it is measured, what it is (its digests, for plans and checkpoints), and how
weights are written: raw ones in checkpoints, the averaged ones as the result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torch import nn

from whence.diffusion.forward import Denoiser, FlowMatching
from whence.features.rows import identity
from whence.models import (
    CUSTOM_FILE,
    LORA_FILE,
    NETWORKS,
    TARGETS,
    Model,
    Prior,
    WithText,
    forward_of,
    load_network,
    network_with_text,
    new_network,
    new_scheduler,
    open_model,
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
from whence.models.families.family import Config
from whence.storage.files import building, file_digest, move_in, read_object
from whence.training.recipe import Full, New, NewCustomDiffusion, NewLora, Text, Trained
from whence.types import Images, Weights, WhenceError, describe

INITIAL = "initial"  # the folder with the weights that a training of all weights went on from
LAST = ("scheduler", "model_index.json")  # appear in this order: the last says that all are there


class Subject(Protocol):
    """What is trained."""

    @property
    def results(self) -> tuple[str, ...]:
        """Files and folders in the output folder that only a finished training leaves."""

    def network_at(self, seed: int) -> nn.Module:
        """The network before training."""

    def forward(self) -> Denoiser | FlowMatching:
        """How it is measured."""

    def facts(self) -> dict[str, object]:
        """What it is besides the settings in the recipe: configurations and digests, no paths."""

    def check(self, network: nn.Module, images: Images) -> None:
        """Refuse images that it cannot be trained on."""

    def write(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        """Weights as a checkpoint holds them.

        Args:
            folder: of the checkpoint.
            network: the one that was trained.
            weights: that are written.
        """

    def finish(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        """Weights as the result.

        Args:
            folder: of the training.
            network: the one that was trained.
            weights: that are written.
        """


def refuse_changed(made: Path, there: Path) -> None:
    """Refuse a part of a result that is there and is not what this training gives, weights and configurations: a finished
    training that is repeated is not to be taken for a check that says nothing.

    Args:
        made: the part as it is made now, a file or a folder.
        there: in its place.
    """
    files = [made] if made.is_file() else sorted(path for path in made.rglob("*") if path.is_file())
    for file in files if there.exists() else ():
        path = there / file.relative_to(made)
        same = path.is_file() and (file_digest(path) == file_digest(file) or _says_the_same(path, file))
        if not same:
            raise WhenceError("is not what this training gives", str(path), f"{there} removed, to write it again")


def _says_the_same(path: Path, made: Path) -> bool:
    """Whether two configurations differ in nothing but notes, such as the version of diffusers."""
    if path.suffix != ".json":
        return False
    one, other = ({k: v for k, v in read_object(at).items() if not k.startswith("_d")} for at in (path, made))
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)  # not ==, for which true is 1


@dataclass(frozen=True, eq=False)
class Network:
    """A network with its noise schedule.

    Args:
        config: the content of its config.json.
        scheduler: that of scheduler_config.json.
        weights: the folder whose weights training goes on from; None for new ones, drawn from the seed.
        parts: the pipeline folder whose VAE, tokenizers and text encoders belong to it, if any do; the result holds copies.
    """

    config: Config
    scheduler: Config
    weights: Path | None = None
    parts: Path | None = None

    @property
    def part(self) -> str:
        return NETWORKS[self.config["_class_name"]].folder

    @property
    def results(self) -> tuple[str, ...]:
        return "model_index.json", self.part

    def network_at(self, seed: int) -> nn.Module:
        return new_network(self.config, seed) if self.weights is None else load_network(self.weights)

    def forward(self) -> Denoiser | FlowMatching:
        return forward_of(self.network_at(0), scheduler_of(self.scheduler))

    def facts(self) -> dict[str, object]:
        found = {"network": describe(self.config), "scheduler": describe(self.scheduler)}
        return found if self.weights is None else found | {"initial": weights_digest(self.weights)}

    def check(self, network: nn.Module, images: Images) -> None:
        channels, wanted = images.batch([0]).x0.shape[1], self.config["in_channels"]
        if (
            self.parts is None and channels != wanted
        ):  # with parts, `encode_images` knows better (Flux packs its latents)
            raise WhenceError(f"images have {channels} channels, the model takes {wanted}")

    def write(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        with_weights(network, weights).save_pretrained(folder / self.part)

    def finish(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        """The pipeline is written beside its place, then moved in part by part. Weights that training went on from are
        copied to initial/, so that the folder can repeat its training."""
        with building(folder / "pipeline") as new:
            save_pipeline(new, network, weights, scheduler_of(self.scheduler), self.parts)
            if self.weights is not None:
                shutil.copytree(self.weights, new / INITIAL)
            parts = sorted(path.name for path in new.iterdir())
            for part in parts:
                refuse_changed(new / part, folder / part)
            for part in [*(name for name in parts if name not in LAST), *(name for name in LAST if name in parts)]:
                move_in(new / part, folder / part)


@dataclass(frozen=True, eq=False)
class OnPipeline:
    """A LoRA on the network of a pipeline, trained on what that network sees of pictures and captions
    (`models.encode_images`). A and B are all that is trained."""

    base: Path
    settings: NewLora

    results = (LORA_FILE,)

    @cached_property
    def opened(self) -> Model:
        """The base, opened once: its digest reads every byte of its weights."""
        return open_model(self.base)

    @property
    def alpha(self) -> float:
        return float(self.settings.rank if self.settings.alpha is None else self.settings.alpha)

    def network_at(self, seed: int) -> nn.Module:
        """The network with a LoRA that does nothing yet."""
        targets = self.settings.targets or TARGETS
        return with_new_lora(self.base / self.opened.part, targets, self.settings.rank, self.alpha, seed)

    def forward(self) -> Denoiser | FlowMatching:
        return self.opened.forward

    def facts(self) -> dict[str, object]:
        return {"base": self.opened.final.digest}

    def check(self, network: nn.Module, images: Images) -> None:
        pass

    def write(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        save_lora(folder, self.opened.part, weights, self.settings.rank, self.alpha)

    finish = write


@dataclass(frozen=True, eq=False)
class WithNewToken:
    """Custom Diffusion on a pipeline (see `models.custom_diffusion`), trained on what its network sees of pictures whose
    captions name a new token.

    Args:
        base: the pipeline folder.
        settings: of the recipe.
        prior: the prior images, of which every step takes as many as of the others. They are part of the training, not of
            what is attributed. None for none.
    """

    base: Path
    settings: NewCustomDiffusion
    prior: Prior | None = None

    results = (CUSTOM_FILE,)

    @cached_property
    def opened(self) -> Model:
        """The base, opened once, with the new token."""
        return with_token(open_model(self.base), self.settings.modifier_token)

    def network_at(self, seed: int) -> WithText:
        """The network before training, the same for all seeds."""
        return network_with_text(self.opened, self.settings.initializer_token)

    def forward(self) -> Denoiser | FlowMatching:
        return self.opened.forward

    def facts(self) -> dict[str, object]:
        prior = None if self.prior is None else identity(self.prior)
        return {"base": [self.opened.final.digest, text_digest(self.base)], "prior": prior}

    def check(self, network: nn.Module, images: Images) -> None:
        assert isinstance(network, WithText)
        seen = images.batch(range(len(images))).cond["input_ids"]
        without = (seen != network.word.number).all(1).nonzero()
        if len(without):
            name, token = images.ids[int(without[0])], self.settings.modifier_token
            raise WhenceError(
                f"image {name!r}: its caption lacks the modifier token {token!r}; write it in every caption"
            )

    def write(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        assert isinstance(network, WithText)
        save_custom(folder, network, self.settings.modifier_token, weights)

    def finish(self, folder: Path, network: nn.Module, weights: Weights) -> None:
        """Prior images are kept beside the result, so that it can be trained again."""
        if self.prior is not None:
            save_prior(folder, self.prior)
        self.write(folder, network, weights)


def subject_of(
    model: Trained,
    prior: Prior | None = None,
    initial: Path | None = None,
    known: Config | None = None,
) -> Subject:
    """What a recipe trains.

    Args:
        model: of the recipe.
        prior: the prior images of Custom Diffusion.
        initial: the weights that a training of all weights goes on from; those of its base by default.
        known: `facts` of a training of Text or Full that is repeated; those of its base by default.
    """
    if isinstance(model, New):
        noise = model.noise
        plain = new_scheduler(noise.steps, noise.beta_schedule, noise.prediction_type)
        return Network(model.network, {"_class_name": type(plain).__name__, **_without_notes(plain.config)})
    if isinstance(model, Text) and known is not None:
        return Network(known["network"], known["scheduler"], parts=model.base)
    if model.base is None:
        raise WhenceError("base is missing", f"model {type(model).__name__}", "a pipeline folder")
    if isinstance(model, NewLora):
        return OnPipeline(model.base, model)
    if isinstance(model, NewCustomDiffusion):
        return WithNewToken(model.base, model, prior)
    full = isinstance(model, Full)
    if known is not None:
        return Network(known["network"], known["scheduler"], initial, model.base)
    opened = open_model(model.base, trained=full)
    config, scheduler = _without_notes(opened.config), _without_notes(opened.scheduler)
    if isinstance(model, Text) and model.sample_size is not None and opened.part == "unet":
        config["sample_size"] = model.sample_size
    weights = (initial or model.base / opened.part) if full else None
    return Network(config, scheduler, weights, model.base)


def _without_notes(config: Mapping[str, object]) -> dict[str, object]:
    """A configuration without what diffusers notes of its own version and of where it was read."""
    return {name: value for name, value in config.items() if name == "_class_name" or not name.startswith("_")}
