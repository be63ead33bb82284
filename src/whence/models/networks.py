"""The networks we know."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from inspect import signature
from pathlib import Path

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from whence.data.layout import some
from whence.diffusion.noise import seed_for
from whence.models.families.dit import DIT
from whence.models.families.family import HOOK, Config, Family
from whence.models.families.flux import FLUX
from whence.models.families.perceptron import PERCEPTRON
from whence.models.families.pixart import PIXART
from whence.models.families.stable_diffusion import STABLE_DIFFUSION
from whence.models.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from whence.models.families.unet import UNET
from whence.models.others import refusing
from whence.models.settings import refuse_settings
from whence.models.weights import refuse_damaged, refuse_loaded
from whence.storage.files import read_object
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
    if not isinstance(name, str) or name not in accepted:
        raise WhenceError(f"{where}: {what} class {name!r} is not supported; accepted: {', '.join(accepted)}; {HOOK}")


def buildable(config: Config, where: Path) -> None:
    """Refuse a configuration of a known class that diffusers cannot build, and name the entries that it ignores.

    Args:
        config: of the network.
        where: its file.
    """
    kind = NETWORKS[config["_class_name"]].kind
    refuse_settings(kind, config, where)
    name_ignored(config, signature(kind).parameters, kind.__name__, where)
    _built(json.dumps(config, sort_keys=True), str(where))


def name_ignored(config: Config, known: Collection[str], kind: str, where: Path) -> None:
    """Warn of entries that a class of diffusers ignores.

    Args:
        config: the content of a file.
        known: the entries of the class.
        kind: the class in words.
        where: the file.
    """
    ignored = sorted(name for name in config if not name.startswith("_") and name not in known)
    if ignored:
        told = f"{len(ignored)} entries are unknown to {kind} of this diffusers, which ignores them"
        warnings.warn(f"{where}: {told}: {some(ignored, 5)}", stacklevel=3)


@lru_cache(maxsize=256)
def _built(text: str, where: str) -> None:
    config: Config = json.loads(text)
    kind = NETWORKS[config["_class_name"]].kind
    with refusing(f"diffusers cannot build a {kind.__name__} from it", where), torch.device("meta"):
        kind.from_config(config)


def load_network(folder: Path) -> nn.Module:
    """The network of one unet/ folder; weights that are missing from the file are an error, not random numbers."""
    config = read_object(folder / "config.json")
    known("network", config.get("_class_name"), NETWORKS, folder)
    buildable(config, folder / "config.json")
    refuse_damaged(folder)
    name = config["_class_name"]
    with refusing(f"the weights cannot be loaded as {name}", str(folder), "weights and config.json of one model"):
        network, loaded = NETWORKS[name].kind.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    for names, what in (
        (loaded["missing_keys"], f"weights of {name} are missing and would be random"),
        (loaded["unexpected_keys"], f"weights are no part of {name}"),
    ):
        if names:
            told, accepted = f"{len(names)} {what}: {some(sorted(names))}", "weights and config.json of one model"
            raise WhenceError(told, str(folder), accepted)
    refuse_loaded(network, folder)
    return network


def tell_labels(network: nn.Module) -> nn.Module:
    """The network, in place, with class labels that are not dropped at random in training (DiT): diffusers draws that from a
    generator that cannot be replayed."""
    for layer in network.modules():
        if isinstance(layer, LabelEmbedding):
            layer.dropout_prob = 0.0
    return network


def new_network(config: Config, seed: int) -> nn.Module:
    """A network with initial weights drawn from the seed; config as in a unet/config.json, UNet2DModel by default."""
    name = config.get("_class_name", "UNet2DModel")
    known("network", name, NETWORKS, Path("model config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        with refusing(f"diffusers cannot build a {name} from it", "model config", "what its class takes"):
            return NETWORKS[name].new(config)
