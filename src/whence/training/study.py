"""What is trained, and how: a network with its noise schedule, or an adapter on a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from whence.diffusion.forward import Declared, Denoiser, FlowMatching
from whence.features.rows import identity
from whence.models import (
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
    save_lora,
    scheduler_of,
    text_digest,
    weights_digest,
    with_new_lora,
    with_token,
)
from whence.training.recipe import Training
from whence.types import Forward, Weights, WhenceError, describe


@dataclass(frozen=True, eq=False)
class Study:
    """What is trained, and how. network: the content of a unet/config.json; the next three its noise schedule, or schedule,
    the content of a scheduler_config.json. weights: the unet/ folder whose weights training goes on from; None for new ones,
    drawn from the seed. declared: see `forward.Declared`. Networks that see latents and text are trained on
    `models.encode_images`."""

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
        return found | declared_notes(self.declared)

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
    (`models.encode_images`). rank, alpha, targets: see `models.lora`; A and B are all that is trained."""

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
        lora = {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, **declared_notes(self.declared)}
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
    """Custom Diffusion on a pipeline folder (see `models.custom_diffusion`), trained on what its network sees of pictures
    whose captions name a new token. initializer: the token whose embedding it begins with; prior: the prior images, of
    which every step takes as many as of the others, at prior_weight. They are part of the recipe, not of what is
    attributed."""

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
        told |= declared_notes(self.declared)
        return {"is": "CustomStudy", "base": base, **told, "prior": prior, "training": describe(self.training)}

    def network_at(self, seed: int) -> WithText:
        """The network before training, the same for all seeds."""
        return network_with_text(self.opened, self.initializer)

    def forward(self) -> Forward:
        return self.declared.of(self.opened.forward)

    def at(self, seed: int) -> Training:
        return replace(self.training, seed=seed)


def declared_notes(declared: Declared) -> dict[str, Any]:
    """What is noted of a training besides the plain loss: nothing where there is nothing, as notes of before."""
    return {} if declared == Declared() else {"declared": describe(declared)}


def declared_from(notes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a study that `declared_notes` noted."""
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
