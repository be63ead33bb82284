"""The networks we know, and how each is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

from whence.diffusion.forward import Predict
from whence.diffusion.noise import seed_for
from whence.models.mlp import MLPDenoiser
from whence.types import WhenceError

Call = Callable[..., Any]
Cond = Mapping[str, Tensor]

WHERE = {
    "class_labels": "this model is class-conditional: the images need class folders or a `label` column",
    "encoder_hidden_states": "this model reads text: the images need captions, a column `text` in metadata.jsonl",
}
"""What is missing where a condition is: said once, as it is for people who have folders."""


def needs(*names: str) -> Callable[[Predict], Predict]:
    """Mark a call with the conditions it cannot do without, each [b, ...]; what is absent is told before the call."""

    def mark(call: Predict) -> Predict:
        @wraps(call)
        def checked(net: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            _present(names, cond)
            return call(net, x_t, t, cond)

        checked.needs = names  # type: ignore[attr-defined]
        return checked

    return mark


def _present(names: Sequence[str], cond: Cond) -> None:
    missing = [name for name in names if name not in cond]
    if missing:
        told = WHERE.get(missing[0], f"this model needs the condition {missing[0]!r}")
        raise WhenceError(f"{told} (cond has {', '.join(cond) or 'nothing'}; needed: {', '.join(names)})")


@needs()
def call_unet(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DModel(sample, timestep).sample"""
    return call(x_t, t, return_dict=False)[0]


@needs("class_labels")
def call_unet_with_labels(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DModel(sample, timestep, class_labels).sample; class_labels [b] int64."""
    return call(x_t, t, class_labels=cond["class_labels"], return_dict=False)[0]


@needs("encoder_hidden_states")
def call_unet_with_text(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DConditionModel of Stable Diffusion 1 and 2; encoder_hidden_states [b, tokens, width]."""
    return call(x_t, t, encoder_hidden_states=cond["encoder_hidden_states"], return_dict=False)[0]


@needs("input_ids")
def call_unet_with_tokens(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The same with its text encoder inside (`models.custom_diffusion.WithText`); input_ids [b, tokens]."""
    return call(x_t, t, cond["input_ids"])


@needs("encoder_hidden_states", "text_embeds", "time_ids")
def call_sdxl(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """UNet2DConditionModel of SDXL; besides the text of both encoders text_embeds [b, width], the pooled text, and
    time_ids [b, 6]: (original height, width, top, left of the crop, target height, width)."""
    added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
    text = cond["encoder_hidden_states"]
    return call(x_t, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]


@needs("class_labels")
def call_dit(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """DiTTransformer2DModel(hidden_states, timestep, class_labels).sample; class_labels [b] int64."""
    return call(x_t, timestep=t, class_labels=cond["class_labels"], return_dict=False)[0]


@needs("encoder_hidden_states", "attention_mask")
def call_pixart(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """PixArtTransformer2DModel; encoder_hidden_states [b, tokens, width] of T5, attention_mask [b, tokens], 1 for a token
    that counts; resolution [b, 2] and aspect_ratio [b, 1] where the model has use_additional_conditions."""
    return _pixart(call, x_t, t, cond, {"resolution": None, "aspect_ratio": None})


@needs("encoder_hidden_states", "attention_mask", "resolution", "aspect_ratio")
def call_pixart_with_size(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """The same, told the size of the picture."""
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


@needs("encoder_hidden_states", "pooled_projections")
def call_sd3(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """SD3Transformer2DModel, at timestep 1000 sigma; encoder_hidden_states [b, tokens, width], pooled_projections [b, k]."""
    text, pooled = cond["encoder_hidden_states"], cond["pooled_projections"]
    return call(x_t, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]


@dataclass(frozen=True)
class CallFlux:
    """FluxTransformer2DModel on patches of 2x2 latents; encoder_hidden_states [b, tokens, width] of T5,
    pooled_projections [b, width] of CLIP, timestep sigma (1000 sigma / 1000).

    guidance: what the guidance-distilled models (Flux-dev) are told; cond["guidance"] [b], where it is there, comes first.
    None for models without guidance_embeds (Flux-schnell).
    """

    guidance: float | None = None
    needs = ("encoder_hidden_states", "pooled_projections")

    def __call__(self, call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        _present(self.needs, cond)
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
    """The inverse of `pack`."""
    b, _, c = x.shape
    return x.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def patch_ids(rows: int, columns: int) -> Tensor:
    """(0, row, column) of every patch: [rows columns, 3]."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return ids.flatten(0, 1)


@dataclass(frozen=True)
class Network:
    """A class of networks: how one with a given configuration is called, and the folder of a pipeline it lies in."""

    kind: Any
    call: Callable[[Mapping[str, Any]], Predict]
    folder: str = "unet"


def _unet(config: Mapping[str, Any]) -> Predict:
    labelled = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    return call_unet_with_labels if labelled else call_unet


def _unet_with_text(config: Mapping[str, Any]) -> Predict:
    kind = config.get("addition_embed_type")
    for name in ("class_embed_type", "num_class_embeds"):
        if config.get(name) is not None:
            raise WhenceError(f"UNet2DConditionModel with {name} {config[name]!r} is not known; {HOOK}")
    if kind not in (None, "text_time"):
        raise WhenceError(f"UNet2DConditionModel with addition_embed_type {kind!r} is not known; {HOOK}")
    return call_unet_with_text if kind is None else call_sdxl


def _pixart_call(config: Mapping[str, Any]) -> Predict:
    told = config.get("use_additional_conditions")
    sized = config.get("sample_size", 128) == 128 if told is None else told  # the rule of diffusers
    return call_pixart_with_size if sized else call_pixart


def _flux(config: Mapping[str, Any]) -> Predict:
    # 3.5 is what diffusers' training scripts tell the model (--guidance_scale).
    return CallFlux(3.5 if config.get("guidance_embeds") else None)


HOOK = "any other model: whence.Custom(predict, target, timesteps) with task_from_module"

NETWORKS = {
    "UNet2DModel": Network(UNet2DModel, _unet),
    "MLPDenoiser": Network(MLPDenoiser, _unet),
    "UNet2DConditionModel": Network(UNet2DConditionModel, _unet_with_text),
    "DiTTransformer2DModel": Network(DiTTransformer2DModel, lambda config: call_dit, "transformer"),
    "PixArtTransformer2DModel": Network(PixArtTransformer2DModel, _pixart_call, "transformer"),
    "SD3Transformer2DModel": Network(SD3Transformer2DModel, lambda config: call_sd3, "transformer"),
    "FluxTransformer2DModel": Network(FluxTransformer2DModel, _flux, "transformer"),
}


def known(what: str, name: Any, accepted: Mapping[str, Any] | Sequence[str], where: Path) -> None:
    if name not in accepted:
        raise WhenceError(f"{where}: {what} class {name!r} is not supported; accepted: {', '.join(accepted)}; {HOOK}")


def load_network(folder: Path) -> nn.Module:
    """The network of one unet/ folder; weights that are missing from the file are an error, not random numbers."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        network, loaded = NETWORKS[name].kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise WhenceError(
            f"{folder}: the weights cannot be loaded as {name}: {' '.join(str(error).split())}"
        ) from error
    for what, names in (("lacks", loaded["missing_keys"]), ("holds the unknown", loaded["unexpected_keys"])):
        if names:
            raise WhenceError(f"{folder}: the weights file {what} {sorted(names)[0]} ({len(names)} such weights)")
    return network


def new_network(config: Mapping[str, Any], seed: int) -> nn.Module:
    """A network with initial weights drawn from the seed; config as in a unet/config.json, UNet2DModel by default."""
    name = config.get("_class_name", "UNet2DModel")
    known("network", name, NETWORKS, Path("model config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        try:
            return NETWORKS[name].kind(**{k: v for k, v in config.items() if not k.startswith("_")})
        except (TypeError, ValueError) as error:
            raise WhenceError(f"model config: {str(error).splitlines()[0]}") from error
