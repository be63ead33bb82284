"""Flux: latents in patches of 2x2; T5, and CLIP's pooled state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from whence.diffusion.forward import Predict
from whence.models.families.family import CLIP, CLIP_2, Cond, Config, Drawing, Family, present
from whence.models.parts import Parts
from whence.types import Call, WhenceError

TOKENS = 512  # as diffusers' training scripts have them


@dataclass(frozen=True)
class CallFlux:
    """FluxTransformer2DModel on patches of 2x2 latents, at timestep sigma (1000 sigma / 1000).

    Conditions: encoder_hidden_states [b, tokens, width] of T5, pooled_projections [b, width] of CLIP; guidance [b] where it
    is there, in place of that below.

    Args:
        guidance: the scale that guidance-distilled models (Flux-dev) take as input; None for models without
            guidance_embeds (Flux-schnell).
    """

    guidance: float | None = None
    needs = ("encoder_hidden_states", "pooled_projections")

    def __call__(self, call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        present(self.needs, cond)
        text, (height, width) = cond["encoder_hidden_states"], x_t.shape[-2:]
        if height % 2 or width % 2:
            raise WhenceError(f"Flux takes latents in patches of 2x2; these are {width}x{height}")
        given = cond.get("guidance", None if self.guidance is None else torch.full_like(t, self.guidance))
        out = call(
            hidden_states=pack(x_t),
            timestep=t / 1000,
            guidance=None if self.guidance is None else given,
            pooled_projections=cond["pooled_projections"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3).to(x_t),
            img_ids=patch_ids(height // 2, width // 2).to(x_t),
            return_dict=False,
        )[0]
        return unpack(out, height, width)


def pack(x: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, h/2 w/2, 4c]: rows of 2x2 patches, channels first within a patch."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(x: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`: [b, c, h, w].

    Args:
        x: rows of patches [b, h/2 w/2, 4c].
        h: height of the latents.
        w: width of the latents.
    """
    b, _, c = x.shape
    return x.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def patch_ids(rows: int, columns: int) -> Tensor:
    """(0, row, column) of every patch: [rows columns, 3]."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return ids.flatten(0, 1)


def _call(config: Config) -> Predict:
    # 3.5 is what diffusers' training scripts tell the model (--guidance_scale).
    return CallFlux(3.5 if config.get("guidance_embeds") else None)


def _text(parts: Parts, captions: Sequence[str], tokens: int | None) -> dict[str, Tensor]:
    t5, _ = parts.t5("_2", captions, TOKENS if tokens is None else tokens)
    return {"encoder_hidden_states": t5, "pooled_projections": parts.clip("", captions, projected=False).pooled}


FLUX = Family(
    FluxTransformer2DModel,
    _call,
    folder="transformer",
    name="Flux",
    text=_text,
    parts=("vae", *CLIP, *CLIP_2),
    tokens=TOKENS,
    packing=4,
    guidance_is_input=True,
    drawing=Drawing(guidance=3.5, even=True),
)
