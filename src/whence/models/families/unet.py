"""Denoisers of pixels, with or without classes (DDPM)."""

from __future__ import annotations

from diffusers import UNet2DModel
from torch import Tensor

from whence.diffusion.forward import Predict
from whence.models.families.family import Cond, Config, Family, needs
from whence.types import Call


@needs()
def call_unet(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DModel(sample, timestep).sample"""
    return call(x_t, t, return_dict=False)[0]


@needs("class_labels")
def call_unet_with_labels(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DModel(sample, timestep, class_labels).sample; class_labels [b] int64."""
    return call(x_t, t, class_labels=cond["class_labels"], return_dict=False)[0]


def _call(config: Config) -> Predict:
    labelled = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    return call_unet_with_labels if labelled else call_unet


UNET = Family(UNet2DModel, _call, name="a denoiser of pixels")
