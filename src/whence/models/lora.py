"""LoRAs on a base network and on its text encoders: W + scale B A.

The layers are put in by peft, in the same way for every class of networks: some have no loader of their own. What files hold
is read in `lora_files`, by the names of `lora_keys`.

A LoRA of a text encoder changes what the network is told, and with it the stored embeddings and their key. Its own
parameters are not attributed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from whence.diffusion.noise import normals, seed_for, stream
from whence.models.families.family import Family
from whence.models.lora_files import DIFFUSERS, Pair, lora_digest, lora_file, read_lora, read_parts
from whence.models.lora_keys import LAYERS, NETWORK, Place, flat, places
from whence.models.networks import load_network, tell_labels
from whence.models.parts import Addition
from whence.models.pipeline import Model, checkpoints_in
from whence.storage.arrays import tensor_digest, write_tensors
from whence.storage.files import made
from whence.types import Checkpoint, WhenceError, digest


def placed(network: nn.Module, written: Mapping[str, Pair], where: str) -> dict[str, Pair]:
    """The pairs by the modules of a network, whatever the file calls them. where: the file.

    A module of the file that is several side by side in the network gives each its rows of B, and all of A: so far as these
    share A, its gradient is split among them.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}
    table = places(network)
    absent = sorted(name for name in written if name not in layers and flat(name) not in table)
    if absent:
        raise WhenceError(
            f"{where} is for another base: {len(absent)} of its {len(written)} modules are not in this "
            f"{type(network).__name__}, such as {absent[0]}"
        )
    found: dict[str, Pair] = {}
    for name, pair in written.items():
        place = Place((name,)) if name in layers else table[flat(name)]
        for module, piece in zip(place.modules, _split(name, pair, place, layers, where), strict=True):
            if module in found:
                raise WhenceError(f"{where}: {name} stands for {module} a second time; accepted: a file with one LoRA")
            found[module] = _shaped(module, piece, layers[module], where)
    return found


def _split(name: str, pair: Pair, place: Place, layers: Mapping[str, nn.Module], where: str) -> list[Pair]:
    """The pair of each of a place's modules."""
    if place.swapped:
        pair = replace(pair, B=torch.cat(pair.B.chunk(2)[::-1]))
    if len(place.modules) == 1:
        return [pair]
    sizes = [len(cast(Tensor, layers[module].weight)) for module in place.modules]
    if sum(sizes) != len(pair.B):
        raise WhenceError(
            f"{where} is for another base: {name} has {len(pair.B)} outputs, but here there are {sum(sizes)}"
        )
    count, rank = len(sizes), len(pair.A)
    own = [(piece.tensor_split(count, dim=1), i) for i, piece in enumerate(pair.B.split(sizes))]
    # Trained for each of the modules, then written side by side: each has ranks of its own.
    if rank % count == 0 and all(not piece[k].any() for piece, i in own for k in range(count) if k != i):
        return [Pair(a, piece[i], pair.scale) for a, (piece, i) in zip(pair.A.chunk(count), own, strict=True)]
    return [replace(pair, B=rows) for rows in pair.B.split(sizes)]


def _shaped(name: str, pair: Pair, layer: nn.Module, where: str) -> Pair:
    """The pair in the shapes that peft gives it on this layer; a convolution of 1x1 and a Linear layer are the same."""
    weight = cast(Tensor, layer.weight)
    rank, kernel = pair.A.shape[0], weight.shape[2:]
    a, b = pair.A, pair.B
    if a.ndim != weight.ndim and {*a.shape[2:], *b.shape[2:], *kernel} <= {1}:
        a, b = a.reshape(*a.shape[:2], *kernel), b.reshape(*b.shape[:2], *kernel)
    fits = (a.shape, b.shape) == ((rank, *weight.shape[1:]), (len(weight), rank, *(1 for _ in kernel)))
    if not fits:
        shapes = f"B {list(pair.B.shape)} A {list(pair.A.shape)}"
        raise WhenceError(
            f"{where} is for another base: {name} has {shapes}, but the weight here is {list(weight.shape)}"
        )
    return Pair(a, b, pair.scale)


def attach(network: nn.Module, written: Mapping[str, Pair], where: str) -> nn.Module:
    """The network with the pairs in it, under peft's names: <module>.lora_A.default.weight, <module>.base_layer.weight.

    A LoRA for another base is an error that names the first module that does not fit. where: the file.
    """
    pairs = placed(network, written, where)
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
    """A LoRA on a pipeline. folder: as diffusers or peft wrote it, or its weights file, or one of kohya's."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    def on(self, base: Model) -> Model:
        """The base with this LoRA; the checkpoints of training are those beside the LoRA."""
        additions = additions_of(base.folder, base.family, self.folder)

        def point(at: Path) -> Checkpoint:
            def load() -> nn.Module:
                if at != self.folder and additions_of(base.folder, base.family, at) != additions:
                    raise WhenceError(
                        f"{at} has other text encoders than {self.folder}, by which the captions are encoded; accepted: "
                        "methods that read no checkpoints, or a LoRA of the network alone"
                    )
                return load_with_lora(base.folder / base.part, at)

            return Checkpoint(load, digest([base.final.digest, lora_digest(at)], 64), at.name)

        final, checkpoints = point(self.folder), checkpoints_in(self.folder, point)
        trained_in = lora_file(self.folder).parent
        return replace(base, final=final, checkpoints=checkpoints, additions=additions, trained_in=trained_in)


def additions_of(base: Path, family: Family, lora: Path) -> dict[str, Addition]:
    """What a LoRA adds to the text encoders of a pipeline folder, by their folder."""
    found = read_parts(lora)
    if NETWORK not in found:
        adapted = ", ".join(sorted(found))
        raise WhenceError(
            f"{lora} adapts {adapted} alone, which is not attributed; accepted: a LoRA of the network too"
        )
    additions: dict[str, Addition] = {}
    for part, pairs in found.items():
        if part != NETWORK:
            folder = family.encoder_of(part, base)
            if folder is None:
                inside = ", ".join(sorted(path.name for path in base.iterdir())[:10])
                raise WhenceError(f"{lora} adapts {part}, which {base} does not have (it holds {inside})")
            if folder in additions:
                raise WhenceError(f"{lora} adapts {folder} under two names; accepted: a file with one LoRA")
            known = [[name, pair.scale, tensor_digest(pair.A), tensor_digest(pair.B)] for name, pair in pairs.items()]
            additions[folder] = Addition(digest(known, 64), partial(_put_in, pairs, f"{lora} ({folder})"))
    return additions


def _put_in(pairs: Mapping[str, Pair], where: str, encoder: nn.Module) -> None:
    attach(encoder, pairs, where)


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

    Args:
        folder: of the network.
        targets: a regular expression for the ends of the names of Linear layers.
        rank: of B A.
        alpha: the LoRA counts by alpha / rank.
        seed: of A.
    """
    network = tell_labels(load_network(folder).requires_grad_(False))
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
    made(folder)
    tensors = {f"{part}.{name.replace('.default.', '.')}": w for name, w in weights.items()}
    # All that peft must know: diffusers derives nothing where it is given something.
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({name.split(".lora_")[0] for name in weights})}
    # One entry only: the order of several is another one in every process, and with it the digest of the file.
    header = {"lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in settings.items()})}
    write_tensors(folder / DIFFUSERS, tensors, header)
