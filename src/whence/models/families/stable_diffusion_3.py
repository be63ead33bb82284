"""Stable Diffusion 3: both CLIPs' last hidden states but one, side by side and filled up with zeros to the width of T5, then
T5 as further tokens; and both projections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor

from whence.models.families.family import CLIP, CLIP_2, T5_3, Cond, Drawing, Family, needs
from whence.models.parts import Parts
from whence.storage.files import read_object
from whence.types import Call

CLIP_TOKENS = T5_TOKENS = 77  # as diffusers' training scripts have them


@needs("encoder_hidden_states", "pooled_projections")
def call_sd3(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """SD3Transformer2DModel, at timestep 1000 sigma; encoder_hidden_states [b, tokens, width], pooled_projections [b, k]."""
    text, pooled = cond["encoder_hidden_states"], cond["pooled_projections"]
    return call(x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]


def _text(parts: Parts, captions: Sequence[str], tokens: int | None) -> dict[str, Tensor]:
    found = [parts.clip(at, captions, projected=True) for at in ("", "_2")]
    states = torch.cat([clip.last_but_one for clip in found], dim=-1)
    length = T5_TOKENS if tokens is None else tokens
    if (parts.folder / "text_encoder_3").is_dir():
        t5, _ = parts.t5("_3", captions, length)
    else:  # as the pipeline does without its third encoder
        width = int(read_object(parts.folder / "transformer" / "config.json").get("joint_attention_dim", 4096))
        t5 = torch.zeros(len(captions), length, width)
    states = torch.cat([F.pad(states, (0, t5.shape[-1] - states.shape[-1])), t5], dim=1)
    return {"encoder_hidden_states": states, "pooled_projections": torch.cat([clip.pooled for clip in found], dim=-1)}


STABLE_DIFFUSION_3 = Family(
    SD3Transformer2DModel,
    lambda config: call_sd3,
    folder="transformer",
    name="Stable Diffusion 3",
    text=_text,
    parts=("vae", *CLIP, *CLIP_2),
    optional=T5_3,
    without="T5's part of the text is zero, as the pipeline has it",
    tokens=CLIP_TOKENS + T5_TOKENS,
    drawing=Drawing(guidance=7.0, tokens=lambda folder: 256, max_shift=1.16),
)
