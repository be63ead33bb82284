"""PixArt: T5 and its attention mask; for some the size of the picture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as pipelines
from torch import Tensor

from whence.diffusion.forward import Predict
from whence.models.families.family import CLIP, Cond, Config, Drawing, Family, needs
from whence.models.parts import Parts
from whence.storage.files import read_object
from whence.types import Call

TOKENS = 120  # as diffusers' training scripts have them


@needs("encoder_hidden_states", "attention_mask")
def call_pixart(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """PixArtTransformer2DModel; encoder_hidden_states [b, tokens, width] of T5, attention_mask [b, tokens], 1 for a token
    that counts; resolution [b, 2] and aspect_ratio [b, 1] where the model has use_additional_conditions."""
    return _pixart(call, x_t, t, cond, {"resolution": None, "aspect_ratio": None})


@needs("encoder_hidden_states", "attention_mask", "resolution", "aspect_ratio")
def call_pixart_with_size(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The same, given the size of the picture."""
    return _pixart(call, x_t, t, cond, {name: cond[name] for name in ("resolution", "aspect_ratio")})


def _pixart(call: Call, x_t: Tensor, t: Tensor, cond: Cond, added: Mapping[str, Tensor | None]) -> Tensor:
    text, mask = cond["encoder_hidden_states"], cond["attention_mask"]
    return call(
        x_t,
        encoder_hidden_states=text,
        timestep=t,
        encoder_attention_mask=mask,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _call(config: Config) -> Predict:
    stated = config.get("use_additional_conditions")
    sized = config.get("sample_size", 128) == 128 if stated is None else stated  # the rule of diffusers
    return call_pixart_with_size if sized else call_pixart


def _text(parts: Parts, captions: Sequence[str], tokens: int | None) -> dict[str, Tensor]:
    t5, mask = parts.t5("", captions, TOKENS if tokens is None else tokens, masked=True)
    return {"encoder_hidden_states": t5, "attention_mask": mask}


def _sizes(height: float, width: float) -> dict[str, Tensor]:
    return {"resolution": torch.tensor([height, width]), "aspect_ratio": torch.tensor([height / width])}


def _tokens(folder: Path) -> int:
    """The pipeline of PixArt-Sigma reads longer prompts than that of PixArt-Alpha."""
    index = folder / "model_index.json"
    sigma = index.is_file() and "Sigma" in str(read_object(index).get("_class_name"))
    return 300 if sigma else TOKENS


def _prompt(text: str) -> str:
    """As the pipelines have it: cleaned by beautifulsoup4 and ftfy (their `clean_caption`), else in small letters."""
    if not (pipelines.is_bs4_available() and pipelines.is_ftfy_available()):
        told = "beautifulsoup4 and ftfy are not installed: prompts are put in small letters, and not cleaned"
        warnings.warn(f"{told}; so does the pipeline of PixArt then", stacklevel=2)
        return text.lower().strip()
    # Their function looks at nothing of a pipeline.
    pipeline = object.__new__(pipelines.PixArtAlphaPipeline)
    cleaned: str = pipeline._text_preprocessing(text, clean_caption=True)[0]
    return cleaned


PIXART = Family(
    PixArtTransformer2DModel,
    _call,
    folder="transformer",
    name="PixArt",
    text=_text,
    parts=("vae", *CLIP),
    tokens=TOKENS,
    sizes=_sizes,
    drawing=Drawing(guidance=4.5, tokens=_tokens, prompt=_prompt),
)
