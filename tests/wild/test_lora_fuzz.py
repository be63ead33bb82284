"""LoRA files and their settings, changed at random: refused in one line that names the file, or every entry is used and the
network is the one that peft or diffusers makes of the file. 60 cases; WHENCE_FUZZ=1000 for more."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from families import FAMILIES
from whence.models.lora import attach
from whence.models.lora_files import read_lora, read_parts
from whence.models.lora_settings import READ
from whence.types import WhenceError

CASES = int(os.environ.get("WHENCE_FUZZ", "30"))
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=CASES == 30, suppress_health_check=[HealthCheck.too_slow]
)
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LAYERS = ("attn1.to_q", "attn2.to_k")
ENDS = {
    "peft": (f"base_model.model.{BLOCK}.{{}}", ".lora_A.weight", ".lora_B.weight"),
    "diffusers": (f"unet.{BLOCK}.{{}}", ".lora_A.weight", ".lora_B.weight"),
    "older": (f"unet.{BLOCK}.{{}}", ".lora.down.weight", ".lora.up.weight"),
    "kohya": (f"lora_unet_{BLOCK.replace('.', '_')}_{{}}", ".lora_down.weight", ".lora_up.weight"),
    "x-labs": ("double_blocks.0.processor.{}", ".down.weight", ".up.weight"),
}
XLABS = ("qkv_lora1", "proj_lora2")
TOLD = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k"], "peft_type": "LORA"}


def sizes(style: str, layer: str) -> tuple[int, int]:
    """Outputs and inputs of a layer of the tiny networks."""
    return (48 if "qkv" in layer else 16, 16) if style == "x-labs" else (8, 8)


def whole(style: str) -> dict[str, Tensor]:
    """A file as its trainer writes it."""
    g, found = torch.Generator().manual_seed(1), {}
    name, down, up = ENDS[style]
    for layer in XLABS if style == "x-labs" else LAYERS:
        outs, ins = sizes(style, layer)
        module = name.format(layer.replace(".", "_") if style == "kohya" else layer)
        found |= {module + down: torch.randn(2, ins, generator=g), module + up: torch.randn(outs, 2, generator=g)}
        if style == "kohya":
            found[f"{module}.alpha"] = torch.tensor(3.0)
    return found


TENSORS = {
    "turned": lambda t: t.T if t.ndim == 2 else t[None],
    "a pixel": lambda t: t[..., None, None],
    "flat": lambda t: t.flatten(),
    "a row more": lambda t: torch.cat([t, t[:1]]) if t.ndim else torch.stack([t, t]),
    "a row less": lambda t: t[1:] if t.ndim else t,
    "nothing": lambda t: t.flatten()[:0],
    "a column more": lambda t: torch.cat([t, t[:, :1]], 1) if t.ndim == 2 else t,
    "NaN": lambda t: torch.full_like(t, torch.nan),
    "Inf": lambda t: torch.full_like(t, torch.inf),
    "zero": torch.zeros_like,
    "negative": lambda t: -t,
    **{str(kind): lambda t, kind=kind: t.to(kind) for kind in (
        torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool,
        torch.complex64)},
}  # fmt: skip
NAMES = {
    "no .weight": lambda key: key.removesuffix(".weight"),
    "another side": lambda key: key.replace("lora_A", "lora_B").replace("down", "up"),
    "another layer": lambda key: key.replace("to_q", "to_v").replace("qkv_lora1", "qkv_lora2"),
    "no layer": lambda key: key.replace("to_k", "to_x").replace("proj", "prox"),
    "a norm": lambda key: key.replace("attn1.to_q", "norm1").replace("attn1_to_q", "norm1"),
    "a prefix": lambda key: f"unet.{key}",
    "two prefixes": lambda key: f"diffusion_model.{key}",
    "a text encoder": lambda key: f"text_encoder.{key}",
    "an adapter": lambda key: key.replace("lora_A.", "lora_A.other.").replace("lora_B.", "lora_B.other."),
    "a bias": lambda key: key.replace(".weight", ".bias"),
    "an alpha": lambda key: key.split(".lora")[0].split(".down")[0] + ".alpha",
    "DoRA": lambda key: key.split(".lora")[0] + ".lora_magnitude_vector",
    "something": lambda key: "something",
    "capitals": str.upper,
    "unicode": lambda key: f"é{key}",
}
KEY = some.integers(0, 5)
CHANGES = some.one_of(
    some.tuples(some.just("drop"), KEY),
    some.tuples(some.just("rename"), KEY, some.sampled_from(sorted(NAMES))),
    some.tuples(some.just("double"), KEY, some.sampled_from(sorted(NAMES))),
    some.tuples(some.just("tensor"), KEY, some.sampled_from(sorted(TENSORS))),
)


def changed(tensors: dict[str, Tensor], changes: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    found = dict(tensors)
    for kind, at, *how in changes:
        if not found:
            break
        key = sorted(found)[at % len(found)]
        if kind == "drop":
            del found[key]
        elif kind == "tensor":
            found[key] = TENSORS[how[0]](found[key]).contiguous().clone()
        else:
            value = found[key] if kind == "double" else found.pop(key)
            found[NAMES[how[0]](key)] = value.clone()
    return found


ODD = some.sampled_from(
    [None, True, False, 0, 1, 2, 3, -1, 2.5, float("nan"), float("inf"), 10**40, "2", "", "to_q", "all-linear", ".*", "(",
     [], {}, ["to_q"], ["to_v"], [1], {"to_q": 4}, {"to_k": 2}, {"(": 1}, {"to_q": "4"}, {"attn1.to_q": 0}, [[1]],
     "lora_only"]
)  # fmt: skip
ENTRY = some.tuples(
    some.sampled_from([*READ, "unheard_of"]) | some.sampled_from(sorted(field.name for field in fields(LoraConfig))),
    some.just("drop") | ODD,
)


@contextmanager
def kept(tensors: dict[str, Tensor], style: str, told: dict[str, Any]) -> Iterator[Path]:
    """The file, and what peft was told, as each trainer keeps it."""
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        names = {"peft": "adapter_model", "diffusers": "pytorch_lora_weights", "older": "pytorch_lora_weights"}
        header = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in told.items()})}
        path = folder / f"{names.get(style, 'style')}.safetensors"
        save_file(tensors, path, header if style == "diffusers" else None)
        if style == "peft":
            (folder / "adapter_config.json").write_text(json.dumps(told))
        yield folder


def deltas(network: nn.Module) -> dict[str, Tensor]:
    """What a LoRA adds to each weight."""
    found = {}
    for name, module in network.named_modules():
        for adapter in getattr(module, "lora_A", {}):
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            found[name.removeprefix("base_model.model.")] = module.scaling[adapter] * b.flatten(1) @ a.flatten(1)
    return {name: value.detach() for name, value in found.items() if value.any()}


def of_all(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    inside = [p.flatten().tolist() for name, p in network.named_parameters() if ".lora_" in name]
    sides = [value.float().flatten().tolist() for key, value in tensors.items() if not key.endswith(".alpha")]
    return deltas(network) if all(side in inside for side in sides) else None


def theirs(style: str, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What peft or diffusers makes of the file, None where they cannot, or leave entries out."""
    network: Any = FAMILIES["sd"].network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if style == "peft":
                return of_all(PeftModel.from_pretrained(network, str(folder)), tensors)
            state, alphas, header = StableDiffusionPipeline.lora_state_dict(folder, return_lora_metadata=True)
            network.load_lora_adapter(state, prefix="unet", network_alphas=alphas, metadata=header)
            return of_all(network, tensors)
        except Exception:  # what they raise is not said anywhere
            return None


def judge(style: str, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    with kept(tensors, style, told) as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = FAMILIES["flux" if style == "x-labs" else "sd"].network()
        try:
            parts = read_parts(folder)
            ours = deltas(attach(network, read_lora(folder), str(folder)))
        except WhenceError as error:
            line = str(error)
            assert len(line.splitlines()) == 1, line
            assert str(folder) in line, line
            return
        pairs = [pair for part in parts.values() for pair in part.values()]
        alphas = sum(key.endswith(".alpha") for key in tensors)
        assert 2 * len(pairs) + alphas == len(tensors), "every entry is used"
        unknown = [name for name in told if name not in {field.name for field in fields(LoraConfig)}]
        assert all(any(name in str(one.message) for one in said) for name in unknown if style in ("peft", "diffusers"))
        expected = None if style == "x-labs" else theirs(style, folder, tensors)
        if expected is not None:
            assert ours.keys() == expected.keys()
            for name, value in ours.items():
                assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name


@fuzz
@given(some.sampled_from(sorted(ENDS)), some.lists(CHANGES, max_size=2))
@example("kohya", [])
@example("peft", [])
@example("diffusers", [])
@example("older", [])
@example("x-labs", [])
def test_files(style: str, changes: list[tuple[Any, ...]]) -> None:
    judge(style, changed(whole(style), changes), TOLD)


@fuzz
@given(some.sampled_from(["peft", "diffusers"]), some.lists(ENTRY, min_size=1, max_size=2))
@example("peft", [("r", 8)])
@example("peft", [("r", "drop")])
@example("diffusers", [("lora_alpha", "drop")])
@example("peft", [("target_modules", ["to_v"])])
def test_settings(style: str, entries: list[tuple[str, Any]]) -> None:
    told: dict[str, Any] = dict(TOLD)
    for name, value in entries:
        told[name] = value
        if value == "drop":
            del told[name]
    judge(style, whole(style), told)
