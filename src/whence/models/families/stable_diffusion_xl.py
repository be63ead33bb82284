"""SDXL: the UNet of Stable Diffusion, with both CLIPs' last hidden states but one, side by side; the projection of the
second; and the size of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from whence.diffusion.forward import Predict
from whence.models.families.family import CLIP, CLIP_2, Cond, Config, Drawing, Family, needs, refuse
from whence.models.parts import Parts
from whence.storage.files import read_object
from whence.types import Call

UNKNOWN = ("time_cond_proj_dim", "encoder_hid_dim_type")
"""Further inputs of a UNet2DConditionModel: the guidance of LCM, and pictures."""


@needs("encoder_hidden_states", "text_embeds", "time_ids")
def call_sdxl(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DConditionModel of SDXL; besides the text of both encoders text_embeds [b, width], the pooled text, and
    time_ids [b, 6]: (original height, width, top, left of the crop, target height, width)."""
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    text = cond["encoder_hidden_states"]
    return call(x_t, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


def _call(config: Config) -> Predict:
    refuse(UNet2DConditionModel, config, "class_embed_type", "num_class_embeds", *UNKNOWN)
    return call_sdxl


def _text(parts: Parts, captions: Sequence[str], tokens: int | None) -> dict[str, Tensor]:
    found = [parts.clip("", captions, projected=False), parts.clip("_2", captions, projected=True)]
    states = torch.cat([clip.last_but_one for clip in found], dim=-1)
    return {"encoder_hidden_states": states, "text_embeds": found[1].pooled}


def _sizes(height: float, width: float) -> dict[str, Tensor]:
    """As the picture is read, nothing cropped away."""
    return {"time_ids": torch.tensor([height, width, 0.0, 0.0, height, width])}


def _nothing(parts: Parts, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in place of an empty text, unless the pipeline says otherwise."""
    index = parts.folder / "model_index.json"
    if index.is_file() and not read_object(index).get("force_zeros_for_empty_prompt", True):
        return cond
    return {**cond, **{name: torch.zeros_like(cond[name]) for name in ("encoder_hidden_states", "text_embeds")}}


STABLE_DIFFUSION_XL = Family(
    UNet2DConditionModel,
    _call,
    name="Stable Diffusion XL",
    text=_text,
    parts=("vae", *CLIP, *CLIP_2),
    sizes=_sizes,
    drawing=Drawing(guidance=5.0, nothing=_nothing),
    fits=lambda config: config.get("addition_embed_type") == "text_time",
)
