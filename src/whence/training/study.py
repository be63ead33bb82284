"""A training that can be repeated: a recipe, and what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from whence.diffusion.forward import Denoiser, FlowMatching
from whence.models import Prior
from whence.training.recipe import New, NewCustomDiffusion, Recipe
from whence.training.subjects import Subject, subject_of
from whence.types import WhenceError, describe


@dataclass(frozen=True, eq=False)
class Study:
    """A recipe with the files it needs. Networks that see latents and text are trained on `models.encode_images`.

    Args:
        recipe: of the training.
        prior: the prior images of Custom Diffusion, `recipe.data.prior` of them.
        initial: the weights that a training of all weights goes on from; those of its base by default.
        known: what a training of Text or Full was of, where it is repeated (see `subjects.subject_of`).
    """

    recipe: Recipe
    prior: Prior | None = None
    initial: Path | None = None
    known: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        given = 0 if self.prior is None else len(self.prior)
        if self.recipe.data.prior != given:
            raise WhenceError(f"prior is {self.recipe.data.prior}, but there are {given} prior images", "recipe: data")

    @cached_property
    def subject(self) -> Subject:
        """What is trained; a base is opened once."""
        if self.recipe.model is None:
            raise WhenceError(
                "the recipe does not say what is trained", "recipe: model", "New, Text, Full, NewLora ..."
            )
        return subject_of(self.recipe.model, self.prior, self.initial, self.known)

    @property
    def prior_weight(self) -> float:
        """What a prior image counts beside another."""
        model = self.recipe.model
        return model.prior_loss_weight if isinstance(model, NewCustomDiffusion) else 1.0

    def network_at(self, seed: int) -> nn.Module:
        """The network before training."""
        return self.subject.network_at(seed)

    def forward(self) -> Denoiser | FlowMatching:
        """How it is measured."""
        return self.recipe.objective.on(self.subject.forward())

    def at(self, seed: int) -> Recipe:
        """The recipe with another seed."""
        return replace(self.recipe, seed=seed)

    def describe(self) -> dict[str, object]:
        """The recipe, and what its model goes on from: by digest, not by a path, which may change."""
        found = {"is": "Study", "recipe": describe(self.recipe.on(None))}
        # A new network is all said in the recipe.
        return found if isinstance(self.recipe.model, New | None) else found | self.subject.facts()


def unet_config(
    resolution: int,
    channels: int = 3,
    widths: tuple[int, ...] = (32, 64, 64),
    layers: int = 1,
    dropout: float = 0.0,
    classes: int | None = None,
) -> dict[str, object]:
    """The configuration of a UNet2DModel with attention at its lowest level.

    Args:
        resolution: side of the images, in pixels.
        channels: of the images.
        widths: channels per level.
        layers: per level.
        dropout: chance that a unit is left out.
        classes: of a class-conditional one.
    """
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
        **({} if classes is None else {"num_class_embeds": classes}),
    }
