"""The networks we know, and how each is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from whence.networks import MLPDenoiser
from whence.noise import seed_for
from whence.types import WhenceError

NETWORKS = {"UNet2DModel": UNet2DModel, "MLPDenoiser": MLPDenoiser}


def call_unet(call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DModel(sample, timestep).sample"""
    return call(x_t, t, return_dict=False)[0]


def call_unet_with_labels(call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DModel(sample, timestep, class_labels).sample"""
    if "class_labels" not in cond:
        raise WhenceError("this model is class-conditional: the images need class folders or a `label` column")
    return call(x_t, t, class_labels=cond["class_labels"], return_dict=False)[0]


def known(what: str, name: Any, accepted: Mapping[str, Any] | Sequence[str], where: Path) -> None:
    if name not in accepted:
        raise WhenceError(f"{where}: {what} class {name!r} is not supported; accepted: {', '.join(accepted)}")


def load_network(folder: Path) -> nn.Module:
    """The network of one unet/ folder; weights that are missing from the file are an error, not random numbers."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        network, loaded = NETWORKS[name].from_pretrained(folder, **options)
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
            return NETWORKS[name](**{k: v for k, v in config.items() if not k.startswith("_")})
        except (TypeError, ValueError) as error:
            raise WhenceError(f"model config: {str(error).splitlines()[0]}") from error
