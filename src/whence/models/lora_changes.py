"""What LoRAs change, layer by layer, under names that do not depend on who wrote the file; and the LoRAs below a folder.

    dW = scale B A        of a convolution B [out, r] A [r, in * height * width], as its kernel in one row

A and B themselves say nothing: (B R^-1)(R A) is the same change for any R that can be inverted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from whence.data.layout import is_hidden, walk
from whence.models.lora_files import Pair, lora_file, read_parts
from whence.models.lora_keys import flat
from whence.models.lora_settings import DIFFUSERS, PEFT
from whence.storage.files import read_object
from whence.storage.opening import regular
from whence.types import WhenceError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, eq=False)
class Change:
    """dW = scale B A of one layer.

    Args:
        B: [out, r].
        A: [r, in], the kernel of a convolution in one row.
        scale: of their product.
        shape: of dW, as the layer has it; a convolution of 1x1 and a Linear layer are the same.
    """

    B: Tensor
    A: Tensor
    scale: float
    shape: tuple[int, ...]


def changes(path: str | Path) -> dict[str, Change]:
    """What a LoRA changes, by part of the pipeline and layer.

    Args:
        path: of a LoRA, as `Lora` takes it.
    """
    found: dict[str, Change] = {}
    for part, pairs in read_parts(path).items():
        for module, pair in pairs.items():
            name = f"{part} {flat(module).removeprefix('text_model_')}"
            if name in found:
                raise WhenceError(f"{module} stands for a layer a second time", str(path), "a file with one LoRA")
            found[name] = _change(pair, f"{path}: {module}")
    return found


def _change(pair: Pair, where: str) -> Change:
    kernel = pair.A.shape[2:]
    if any(size != 1 for size in pair.B.shape[2:]):
        raise WhenceError(f"B is {list(pair.B.shape)}", where, "B of 1x1, as all trainers write it")
    shape = (pair.B.shape[0], pair.A.shape[1], *(kernel if any(size != 1 for size in kernel) else ()))
    return Change(pair.B.flatten(1), pair.A.flatten(1), pair.scale, shape)


def base_told(path: str | Path) -> str:
    """What a LoRA says of its base, "" for nothing: by `adapter_config.json`, or the header as kohya writes it.

    Args:
        path: of the LoRA, which has been read.
    """
    file = lora_file(path)
    with safe_open(regular(file), framework="pt") as opened:
        header = opened.metadata() or {}
    beside = file.with_name("adapter_config.json")
    told = read_object(beside).get("base_model_name_or_path") if beside.is_file() else None
    return str(told or header.get("ss_sd_model_name") or header.get("ss_base_model_version") or "")


# ------------------------------------------------------------------------------------------------------- a folder of them


@dataclass(frozen=True)
class Collection:
    """The LoRAs below a folder, by name: the folder of one that diffusers or peft wrote, else its file.

    Args:
        loras: where each lies.
        others: what is no LoRA and may be thought to be one: why it is none.
        inside: files in the folders of LoRAs besides their weights, such as checkpoints, which are left out.
    """

    loras: Mapping[str, Path]
    others: Mapping[str, str]
    inside: tuple[str, ...]


def lora_collection(folder: str | Path) -> Collection:
    """The LoRAs below a folder; nothing is read yet.

    Args:
        folder: with the files or folders of several, in subfolders or not.

    Raises:
        WhenceError: no such folder, or the folder of a single LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WhenceError("there is no such folder", str(folder), "a folder of several LoRAs")
    every = list(walk(folder))
    files = [name for name in every if name.endswith((".safetensors", *PICKLES))]
    own = {os.path.dirname(name) for name in files if os.path.basename(name) in (DIFFUSERS, PEFT)}
    if "" in own:
        raise WhenceError("it is one LoRA", str(folder), "a folder of several, such as the one it lies in")
    loras, others, inside = dict[str, Path](), dict[str, str](), list[str]()
    for name in files:
        place, last = os.path.split(name)
        if place in own and last in (DIFFUSERS, PEFT) and own.isdisjoint(_above(os.path.dirname(place))):
            loras[place] = folder / place
        elif not own.isdisjoint(_above(place)):
            inside.append(name)
        elif name.endswith(PICKLES):
            others[name] = "a pickle, which whence never opens"
        else:
            loras[name] = folder / name
    reached = {name.split("/")[0] for name in files}
    empty = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and path.name not in reached]
    others |= {f"{name}/": "it holds no file of weights" for name in empty if not is_hidden(name)}
    return Collection(loras, others, tuple(inside))


def _above(place: str) -> Iterator[str]:
    """A folder and those that it lies in."""
    while place:
        yield place
        place = os.path.dirname(place)
