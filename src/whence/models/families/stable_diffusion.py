"""Stable Diffusion 1 and 2: latents, and CLIP's last hidden state."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers import UNet2DConditionModel
from torch import Tensor

from whence.diffusion.forward import Predict
from whence.models.families.family import CLIP, Cond, Config, Drawing, Family, needs, refuse
from whence.models.families.stable_diffusion_xl import STABLE_DIFFUSION_XL, UNKNOWN
from whence.models.parts import Parts
from whence.types import Call


@needs("encoder_hidden_states")
def call_unet_with_text(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DConditionModel of Stable Diffusion 1 and 2; encoder_hidden_states [b, tokens, width]."""
    return call(x_t, t, encoder_hidden_states=cond["encoder_hidden_states"], return_dict=False)[0]


@needs("input_ids")
def call_unet_with_tokens(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The same with its text encoder inside (`models.custom_diffusion.WithText`); input_ids [b, tokens]."""
    return call(x_t, t, cond["input_ids"])


def _call(config: Config) -> Predict:
    refuse(UNet2DConditionModel, config, "class_embed_type", "num_class_embeds", "addition_embed_type", *UNKNOWN)
    return call_unet_with_text


def _text(parts: Parts, captions: Sequence[str], tokens: int | None) -> dict[str, Tensor]:
    found = parts.clip("", captions, projected=False, masked=parts.masks_text)
    return {"encoder_hidden_states": found.last_hidden_state}


STABLE_DIFFUSION = Family(
    UNet2DConditionModel,
    _call,
    name="Stable Diffusion 1 or 2",
    text=_text,
    masks_text=True,
    parts=("vae", *CLIP),
    drawing=Drawing(guidance=7.5, scheduler={"clip_sample": False, "steps_offset": 1}),
    variants=(STABLE_DIFFUSION_XL,),
)
