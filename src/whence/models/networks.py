"""The networks we know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from whence.diffusion.noise import seed_for
from whence.models.families.dit import DIT
from whence.models.families.family import HOOK, Config, Family
from whence.models.families.flux import FLUX
from whence.models.families.perceptron import PERCEPTRON
from whence.models.families.pixart import PIXART
from whence.models.families.stable_diffusion import STABLE_DIFFUSION
from whence.models.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from whence.models.families.unet import UNET
from whence.types import WhenceError

NETWORKS: dict[str, Family] = {
    family.kind.__name__: family
    for family in (UNET, PERCEPTRON, STABLE_DIFFUSION, DIT, PIXART, STABLE_DIFFUSION_3, FLUX)
}
"""By the name of their class, as config.json has it."""


def family_of(config: Config) -> Family:
    """The family of the network with a config.json."""
    return NETWORKS[config["_class_name"]].of(config)


def known(what: str, name: object, accepted: Mapping[str, Family] | Sequence[str], where: Path) -> None:
    """Refuse a class that is not among those we know.

    Args:
        what: the class is of.
        name: of the class.
        accepted: names of the known ones.
        where: it stands, for the error.
    """
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


def new_network(config: Config, seed: int) -> nn.Module:
    """A network with initial weights drawn from the seed; config as in a unet/config.json, UNet2DModel by default."""
    name = config.get("_class_name", "UNet2DModel")
    known("network", name, NETWORKS, Path("model config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        try:
            return NETWORKS[name].new(config)
        except (TypeError, ValueError) as error:
            raise WhenceError(f"model config: {str(error).splitlines()[0]}") from error
