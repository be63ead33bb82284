"""LoRA files, read: A, B and scale of every module. Each entry of a file is used, or the file is refused.

scale = alpha / r
alpha   an entry of the file (kohya), its header (diffusers), adapter_config.json (peft, see `lora_settings`); r where a file
        of diffusers or kohya says none, as these two take it then
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whence.models.lora_keys import NETWORK, read_key
from whence.models.lora_settings import ACCEPTED, DIFFUSERS, PEFT, Settings, settings_of
from whence.models.weights import finite
from whence.storage.files import files_digest
from whence.storage.opening import regular
from whence.types import WhenceError


@dataclass(frozen=True)
class Pair:
    """One module's A [r, in] and B [out, r], and what their product is multiplied by."""

    A: Tensor
    B: Tensor
    scale: float


def lora_file(path: str | Path) -> Path:
    """The weights file that a path to a LoRA means."""
    path = Path(path)
    if not path.exists():
        raise WhenceError(f"LoRA {path} does not exist; {ACCEPTED}")
    if path.is_file():
        candidates = [path]
    else:
        others = sorted(path.glob("*.safetensors"))
        named = [file for file in (path / DIFFUSERS, path / PEFT) if file in others]
        candidates = named or others
        if not named and len(others) > 1:
            raise WhenceError(
                f"{path} holds {len(others)} files of weights; accepted: one of them, such as {others[0]}"
            )
    if candidates and candidates[0].suffix == ".safetensors":
        return candidates[0]
    pickled = [path] if path.suffix in (".bin", ".pt", ".ckpt") else sorted(path.glob("*.bin"))
    why = f"only {pickled[0].name}, a pickle, which whence never opens" if pickled else "no LoRA weights"
    raise WhenceError(f"{path} holds {why}; {ACCEPTED}")


def lora_digest(path: str | Path) -> str:
    """Fingerprint of a LoRA: the bytes of its weights and of its configuration."""
    file = lora_file(path)
    beside = file.with_name("adapter_config.json")
    return files_digest([file, beside] if beside.is_file() else [file])


def read_lora(path: str | Path) -> dict[str, Pair]:
    """The pairs of the network, by the name that the file has for their module."""
    return read_parts(path).get(NETWORK, {})


def read_parts(path: str | Path) -> dict[str, dict[str, Pair]]:
    """The pairs of the network and of each text encoder that a LoRA adapts."""
    file = lora_file(path)
    try:
        with safe_open(regular(file), framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WhenceError(f"{file} is damaged ({error}); copy or download it again") from None
    _refuse_others(file, tensors)
    sides: dict[str, dict[str, dict[str, Tensor]]] = {}
    for name, value in tensors.items():
        key = read_key(name)
        if key is None:
            raise WhenceError(f"{file}: {name} is no LoRA weight that whence knows; {ACCEPTED}")
        module = sides.setdefault(key.part, {}).setdefault(key.module, {})
        if key.side in module:
            raise WhenceError(f"{file}: {name} stands for {key.module} a second time; accepted: a file with one LoRA")
        module[key.side] = value
    told = settings_of(file, header, tensors)
    if not sides:
        raise WhenceError(f"{file}: it has no pair of A and B; {ACCEPTED}")
    told.check(sides)
    return {part: _pairs(file, found, told(part)) for part, found in sides.items()}


def _pairs(file: Path, sides: Mapping[str, Mapping[str, Tensor]], settings: Settings) -> dict[str, Pair]:
    lone = sorted(module for module, found in sides.items() if not {"A", "B"} <= found.keys())
    if lone:
        alone = "an alpha, but" if {*sides[lone[0]]} == {"alpha"} else ""
        raise WhenceError(f"{file}: {lone[0]} has {alone} no pair of A and B; {ACCEPTED}".replace("  ", " "))
    told = sorted(module for module, found in sides.items() if "alpha" in found)
    if told and len(told) < len(sides):
        without = min({*sides} - {*told})
        raise WhenceError(
            f"{file}: {without} has no alpha, {told[0]} has one; accepted: an alpha for every module or none"
        )
    return {module: _pair(file, module, found, settings) for module, found in sides.items()}


def _pair(file: Path, module: str, found: Mapping[str, Tensor], told: Settings) -> Pair:
    a, b, alpha = found["A"], found["B"], found.get("alpha", torch.zeros(1))
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape) or alpha.numel() != 1:
        shapes = f"B {list(b.shape)}, A {list(a.shape)}" + (f", alpha {list(alpha.shape)}" if "alpha" in found else "")
        raise WhenceError(
            f"{file}: {module} has {shapes}; accepted: B [out, rank, ...], A [rank, in, ...] and one alpha"
        )
    kinds = sorted({str(side.dtype) for side in (a, b) if not side.is_floating_point()})
    if kinds or alpha.is_complex() or alpha.dtype == torch.bool:
        raise WhenceError(f"{file}: {module} is of {', '.join(kinds) or alpha.dtype}; accepted: floating point numbers")
    a, b = (side.float() if side.dtype.itemsize == 1 else side for side in (a, b))  # 8 bits know no arithmetic
    scale = told.scale(module, b.shape[1], float(alpha) if "alpha" in found else None)
    if not math.isfinite(scale) or scale == 0:
        raise WhenceError(f"{file}: the scale of {module} is {scale}; accepted: a number other than 0")
    if not (finite(a) and finite(b)):
        raise WhenceError(f"{file}: {module} holds NaN or Inf: training diverged; accepted: an earlier checkpoint")
    return Pair(a, b, scale)


OTHERS = {
    "DoRA": r"lora_magnitude|dora_scale",
    "LoKr": r"lokr_",
    "LoHa": r"hada_",
    "OFT or BOFT": r"b?oft_",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with a third factor": r"lora_mid",
    "LoRA of an embedding": r"lora_embedding_",
    "LoRA with biases": r"lora_(A|B|up|down)(\.default)?\.bias$",
    "LoRA with whole differences of weights": r"\.diff(_b)?$",
    "LoRA with a new embedding": r"bundle_emb\.|emb_params",
    "control LoRA of Flux, with norms": r"(query|key)_norm\.scale$",
}
"""What else is kept in files like these, and what its names hold."""


def _refuse_others(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse by name what is no plain LoRA, and would be left out in silence or read wrongly."""
    for kind, mark in OTHERS.items():
        found = next((key for key in tensors if re.search(mark, key)), None)
        if found is not None:
            raise WhenceError(f"{file} is a {kind} ({found}), which is not supported; accepted: a plain LoRA")
