"""LoRA files on a base network: W + scale B A, scale = alpha / r (alpha / sqrt(r) with use_rslora).

Read as they are written by diffusers (pytorch_lora_weights.safetensors, also its older names and those of LoRAAttnProcessor)
and by peft (adapter_model.safetensors beside adapter_config.json). Modules, ranks and scales are read from the file, and the
layers are put in by peft, in the same way for every class of networks: some have no loader of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers.models.embeddings import LabelEmbedding
from peft import LoraConfig, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from whence.diffusion.noise import normals, seed_for, stream
from whence.models.families.family import Config
from whence.models.networks import load_network
from whence.models.pipeline import Model, checkpoints_in
from whence.storage.arrays import write_tensors
from whence.storage.files import files_digest, read_json
from whence.types import Checkpoint, WhenceError, digest

DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
ACCEPTED = f"accepted: a folder with {DIFFUSERS} (diffusers) or {PEFT} and adapter_config.json (peft), or such a file"
PREFIX = re.compile(r"(base_model\.model|unet|transformer)\.")
NEW = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
OLD = re.compile(
    r"(?P<module>.+?)(\.processor)?(\.(?P<to>to_(q|k|v|out))_lora|\.lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight"
)


@dataclass(frozen=True)
class Pair:
    """One module's A and B.

    Args:
        A: [r, in].
        B: [out, r].
        scale: what B A is multiplied by.
    """

    A: Tensor
    B: Tensor
    scale: float


def lora_file(path: str | Path) -> Path:
    """The weights file that a path to a LoRA means."""
    path = Path(path)
    candidates = [path] if path.is_file() else [path / DIFFUSERS, path / PEFT]
    for file in candidates:
        if file.is_file() and file.suffix == ".safetensors":
            return file
    if not path.exists():
        raise WhenceError(f"LoRA {path} does not exist; {ACCEPTED}")
    pickled = [path] if path.suffix == ".bin" else sorted(path.glob("*.bin"))
    why = f"only {pickled[0].name}, a pickle, which whence never opens" if pickled else "no LoRA weights"
    raise WhenceError(f"{path} holds {why}; {ACCEPTED}")


def lora_digest(path: str | Path) -> str:
    """Fingerprint of a LoRA: the bytes of its weights and of its configuration."""
    file = lora_file(path)
    beside = file.with_name("adapter_config.json")
    return files_digest([file, beside] if beside.is_file() else [file])


def read_lora(path: str | Path) -> dict[str, Pair]:
    """The pairs of a LoRA by the name of their module in the network."""
    file = lora_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise WhenceError(f"{file} is damaged ({error}); copy or download it again") from None
    _only_the_network(file, tensors)
    sides: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        name = PREFIX.sub("", key, count=1) if PREFIX.match(key) else key
        found = NEW.fullmatch(name) or OLD.fullmatch(name)
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(value)
        elif found is None:
            raise WhenceError(f"{file}: {key} is no LoRA weight that whence knows; {ACCEPTED}")
        else:
            module, to = found["module"], found.groupdict().get("to")
            module += {None: "", "to_out": ".to_out.0"}.get(to, f".{to}")
            sides.setdefault(module, {})["A" if found["side"] in ("A", "down") else "B"] = value
    config = _configuration(file, header)
    lone = sorted(module for module, pair in sides.items() if len(pair) != 2)
    if lone or not sides:
        raise WhenceError(f"{file}: {lone[0] if lone else 'it'} has no pair of A and B; {ACCEPTED}")
    return {
        module: Pair(pair["A"], pair["B"], _scale(module, pair["B"].shape[1], config, alphas))
        for module, pair in sides.items()
    }


def _only_the_network(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what would be left out unnoticed, or read wrongly."""
    for kind, what, instead in (
        ("text_encoder", "adapts the text encoder too", "a LoRA of the network alone"),
        ("lora_unet_", "is in the format of kohya", "the same LoRA saved by diffusers"),
        ("lora_magnitude", "is a DoRA", "a plain LoRA"),
        ("lokr_", "is a LoKr", "a plain LoRA"),
    ):
        if any(key.startswith(kind) or f".{kind}" in key for key in tensors):
            raise WhenceError(f"{file} {what}, which is not supported; accepted: {instead}")


def _configuration(file: Path, header: Mapping[str, str]) -> Config:
    """peft's configuration, from adapter_config.json or from the header of diffusers' file; {} where unknown."""
    beside = file.with_name("adapter_config.json")
    if beside.is_file():
        config = read_json(beside)
    else:
        if file.name == PEFT:
            raise WhenceError(
                f"{file.parent} has no adapter_config.json, which tells the scale of its LoRA; {ACCEPTED}"
            )
        flat = json.loads(header.get("lora_adapter_metadata", "{}"))
        config = {PREFIX.sub("", name, count=1): value for name, value in flat.items()}
    for name, plain in (("peft_type", "LORA"), ("use_dora", False), ("bias", "none"), ("lora_bias", False)):
        if config.get(name, plain) not in (plain, None):
            raise WhenceError(f"{file}: {name} is {config[name]!r}, which is not supported; accepted: {plain!r}")
    return config


def _scale(module: str, rank: int, config: Config, alphas: Mapping[str, float]) -> float:
    """alpha / r; alpha is r where it is not given, as in diffusers."""
    alpha = alphas.get(module, config.get("lora_alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # peft's rule
            alpha = value
            break
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def attach(network: nn.Module, pairs: Mapping[str, Pair], where: str) -> nn.Module:
    """The network with the pairs in it, under peft's names: <module>.lora_A.default.weight, <module>.base_layer.weight.

    A LoRA for another base is an error that names the first module that does not fit.

    Args:
        network: the base.
        pairs: by the name of their module.
        where: they come from, for the error.
    """
    kind, modules = type(network).__name__, {name for name, _ in network.named_modules()}
    weights = dict(network.named_parameters(remove_duplicate=False))
    absent = sorted(set(pairs) - modules)
    if absent:
        raise WhenceError(
            f"{where} is for another base: {len(absent)} of its {len(pairs)} modules are not in this {kind}, "
            f"such as {absent[0]}"
        )
    for name, pair in pairs.items():
        weight = weights.get(f"{name}.weight", torch.empty(0))
        fits = weight.ndim >= 2 and (pair.B.shape[0], pair.A.shape[1]) == tuple(weight.shape[:2])
        if not fits or pair.A.shape[2:] != weight.shape[2:] or pair.A.shape[0] != pair.B.shape[1]:
            shapes = f"B {list(pair.B.shape)} A {list(pair.A.shape)}"
            raise WhenceError(
                f"{where} is for another base: {name} has {shapes}, but the weight here is {list(weight.shape)}"
            )
    exact = {name: f"^{re.escape(name)}" for name in pairs}
    config = LoraConfig(
        target_modules="|".join(re.escape(name) for name in pairs),
        rank_pattern={exact[name]: pair.A.shape[0] for name, pair in pairs.items()},
        # Through alpha = scale * r, so that peft's own division gives the scale again.
        alpha_pattern={exact[name]: pair.scale * pair.A.shape[0] for name, pair in pairs.items()},
    )
    inject_adapter_in_model(config, network)
    with torch.no_grad():
        weights = dict(network.named_parameters(remove_duplicate=False))
        for name, pair in pairs.items():
            weights[f"{name}.lora_A.default.weight"].copy_(pair.A)
            weights[f"{name}.lora_B.default.weight"].copy_(pair.B)
    return network


def trained_alone(network: nn.Module) -> nn.Module:
    """The network, of which A and B alone ask for gradients."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return network


def load_with_lora(folder: Path, lora: Path) -> nn.Module:
    """The network of one unet/ or transformer/ folder, with a LoRA in it."""
    return trained_alone(attach(load_network(folder), read_lora(lora), str(lora)))


@dataclass(frozen=True)
class Lora:
    """A LoRA on a pipeline.

    Args:
        folder: as diffusers or peft wrote it, or its weights file.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    def on(self, base: Model) -> Model:
        """The base with this LoRA; the checkpoints of training are those beside the LoRA."""

        def point(at: Path) -> Checkpoint:
            load = partial(load_with_lora, base.folder / base.part, at)
            return Checkpoint(load, digest([base.final.digest, lora_digest(at)], 64), at.name)

        return replace(base, final=point(self.folder), checkpoints=checkpoints_in(self.folder, point))


TARGETS = r"to_(q|k|v|out\.0|out)|add_(q|k|v)_proj"  # of module names that end so: the projections of attention


def layers_of(network: nn.Module, targets: str) -> dict[str, nn.Linear]:
    """The Linear layers whose name ends in `targets`, a regular expression."""
    try:
        wanted = re.compile(rf"(.*\.)?({targets})")
    except re.error as error:
        raise WhenceError(f"LoRA targets {targets!r} are not a regular expression: {error}") from None
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if wanted.fullmatch(name)}
    if not layers:
        some = ", ".join(list(linear)[:3])
        raise WhenceError(f"LoRA targets {targets!r} match no Linear layer of this network, which has {some} ...")
    return layers


def new_pairs(network: nn.Module, targets: str, rank: int, alpha: float, seed: int) -> dict[str, Pair]:
    """A LoRA before training: A normal with variance 1/rank, B = 0.

    Args:
        network: the base.
        targets: a regular expression for the ends of the names of Linear layers (see `layers_of`).
        rank: of B A.
        alpha: the LoRA counts by alpha / rank.
        seed: of A.
    """
    layers = layers_of(network, targets)
    widest = min(min(layer.weight.shape) for layer in layers.values())
    if not 1 <= rank <= widest:
        raise WhenceError(f"LoRA rank {rank}; accepted: 1 to {widest}, the smallest side of the layers it is for")
    pairs = {}
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape
        A = normals(stream(seed_for(seed, f"lora {name}"), 0, torch.zeros(1, dtype=torch.int64)), (rank, inputs))[0]
        pairs[name] = Pair(A / rank**0.5, torch.zeros(outputs, rank), alpha / rank)
    return pairs


def with_new_lora(folder: Path, targets: str, rank: int, alpha: float, seed: int) -> nn.Module:
    """The network of one unet/ or transformer/ folder with a LoRA in it that is all that can be trained.

    Class labels are not dropped at random (DiT), because diffusers draws that from a generator that cannot be replayed.

    Args:
        folder: of the network.
        targets: a regular expression for the ends of the names of Linear layers.
        rank: of B A.
        alpha: the LoRA counts by alpha / rank.
        seed: of A.
    """
    network = load_network(folder).requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, LabelEmbedding):
            layer.dropout_prob = 0.0
    return trained_alone(attach(network, new_pairs(network, targets, rank, alpha, seed), "the new LoRA"))


def save_lora(folder: Path, part: str, weights: Mapping[str, Tensor], rank: int, alpha: float) -> None:
    """Write A and B as diffusers does: load_lora_weights and `read_lora` read it.

    Args:
        folder: where they are written.
        part: folder of the network in its pipeline.
        weights: A and B by peft's names.
        rank: of B A.
        alpha: the LoRA counts by alpha / rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{name.replace('.default.', '.')}": w for name, w in weights.items()}
    # All that peft must know: diffusers derives nothing where it is given something.
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({name.split(".lora_")[0] for name in weights})}
    # One entry only: the order of several is another one in every process, and with it the digest of the file.
    header = {"lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in settings.items()})}
    write_tensors(folder / DIFFUSERS, tensors, header)
