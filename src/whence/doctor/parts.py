"""What a pipeline folder is: its family, its parts and how their weights are stored, and what it asks of images."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from whence.data.layout import Finding, some
from whence.doctor.findings import NOTHING, Findings, in_bytes, quiet, whole_number
from whence.models import NETWORKS
from whence.models.lora import attach, read_lora
from whence.models.pipeline import FLOW, PARTS
from whence.types import WhenceError

CLIP, CLIP_2, T5_3 = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3")
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "UNet2DModel": ("a denoiser of pixels", ()),
    "MLPDenoiser": ("a denoiser of pixels", ()),
    "UNet2DConditionModel": ("Stable Diffusion 1 or 2", ("vae", *CLIP)),
    "SDXL": ("Stable Diffusion XL", ("vae", *CLIP, *CLIP_2)),
    "DiTTransformer2DModel": ("DiT", ("vae",)),
    "PixArtTransformer2DModel": ("PixArt", ("vae", *CLIP)),
    "SD3Transformer2DModel": ("Stable Diffusion 3", ("vae", *CLIP, *CLIP_2)),
    "FluxTransformer2DModel": ("Flux", ("vae", *CLIP, *CLIP_2)),
}
"""Class of the network -> what it is called, and the parts without which pictures and captions cannot be encoded."""


def part_of(folder: Path) -> str:
    """The folder of the network: what is there, else what model_index.json promises, else unet."""
    there = [part for part in PARTS if (folder / part / "config.json").is_file()]
    promised = [part for part in PARTS if part in quiet(folder / "model_index.json")]
    return [*there, *promised, "unet"][0]


@dataclass(frozen=True)
class Requirements:
    """What a network asks of its images. side, channels: of the pictures, None where the folder does not say; classes:
    the number of its classes; shrink: pixels per latent, 1 without a VAE."""

    side: int | None = None
    channels: int | None = None
    labels: bool = False
    classes: int | None = None
    text: bool = False
    shrink: int = 1

    @property
    def latents(self) -> bool:
        return self.shrink > 1 or self.text


def requirements(folder: Path) -> Requirements:
    """As far as its JSON files can be read."""
    config, vae = quiet(folder / part_of(folder) / "config.json"), quiet(folder / "vae" / "config.json")
    needs = _needs(config)
    shrink = 2 ** (len(vae["block_out_channels"]) - 1) if isinstance(vae.get("block_out_channels"), list) else 1
    own = whole_number(config.get("sample_size"))
    classes = config.get("num_class_embeds", config.get("num_embeds_ada_norm"))
    channels = whole_number((vae or config).get("in_channels"))
    return Requirements(
        own and own * shrink,
        channels,
        "class_labels" in needs,
        whole_number(classes),
        "encoder_hidden_states" in needs,
        shrink,
    )


def _needs(config: Mapping[str, object]) -> tuple[str, ...]:
    kind = config.get("_class_name")
    try:
        return tuple(NETWORKS[kind].call(config).needs) if kind in NETWORKS else ()  # type: ignore[attr-defined]
    except WhenceError:  # told where the model is opened
        return ()


def family(folder: Path) -> Findings:
    """What it is, whether all parts are there, and how they are stored."""
    part, where = part_of(folder), str(folder)
    config, schedule = quiet(folder / part / "config.json"), quiet(folder / "scheduler" / "scheduler_config.json")
    kind = str(config.get("_class_name"))
    if kind not in FAMILIES:
        return []
    name, parts = FAMILIES["SDXL" if config.get("addition_embed_type") == "text_time" else kind]
    scheduler = schedule.get("_class_name")
    predicts = "flow matching" if scheduler in FLOW else f"predicts {schedule.get('prediction_type', 'epsilon')}"
    steps = schedule.get("num_train_timesteps", 1000)
    what = f"{name}: {kind}, {predicts}, {steps} timesteps of {scheduler}"
    findings = [Finding("note", what, where, NOTHING)]
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        inside = some(sorted(path.name for path in folder.iterdir()), 10)
        what = f"{', '.join(f'{part}/' for part in missing)} {'is' if len(missing) == 1 else 'are'} missing"
        fix = f"add {'it' if len(missing) == 1 else 'them'} as save_pretrained writes it (the folder holds {inside})"
        findings.append(Finding("error", what, where, fix))
    if kind == "SD3Transformer2DModel" and not (folder / T5_3[1]).is_dir():
        what = "text_encoder_3/ is missing, so T5's part of the text is zero, as the pipeline has it"
        findings.append(
            Finding("note", what, where, "add tokenizer_3/ and text_encoder_3/ if it was trained with them")
        )
    encoders = [name for name in (*parts, *T5_3) if not name.startswith("tokenizer") and (folder / name).is_dir()]
    for each in (part, *encoders):
        findings += _stored(folder / each)
    return findings


def _stored(folder: Path) -> Findings:
    """Number of parameters and their type, by the headers of the weight files that are opened."""
    shapes: Counter[str] = Counter()
    for path in weight_files(folder):
        shapes.update(_header(path))
    if not shapes:
        return []
    kinds = ", ".join(
        f"{kind}" if len(shapes) == 1 else f"{count / 1e6:,.1f} M in {kind}" for kind, count in shapes.items()
    )
    size = sum(path.stat().st_size for path in weight_files(folder))
    what = f"{shapes.total() / 1e6:,.1f} M parameters ({kinds}), {in_bytes(size)}"
    return [Finding("note", what, str(folder), "they are read as float32" if set(shapes) != {"F32"} else NOTHING)]


def _header(path: Path) -> Counter[str]:
    """Numbers of weights by type, {} for a file that is no safetensors: `model` tells."""
    found: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        for name, told in header.items():
            if name != "__metadata__":
                found[told["dtype"]] += math.prod(told["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError):
        return Counter()
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that are opened: whole, or the shards of an index."""
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
        index = quiet(folder / f"{name}.index.json").get("weight_map")
        if isinstance(index, dict):
            return [folder / shard for shard in sorted(set(index.values())) if (folder / shard).is_file()]
    return []


def lora_fits(folder: Path, lora: Path) -> Findings:
    """Whether a LoRA is for this network, by names and shapes."""
    part = part_of(folder)
    config = quiet(folder / part / "config.json")
    plain = {name: value for name, value in config.items() if not name.startswith("_")}
    pairs = read_lora(lora)
    bad = [name for name, pair in pairs.items() if not (pair.A.isfinite().all() and pair.B.isfinite().all())]
    if bad:
        what = f"{len(bad)} modules hold NaN or Inf: {some(bad)}"
        return [Finding("error", what, str(lora), "training diverged; take an earlier checkpoint")]
    with torch.device("meta"):
        attach(NETWORKS[str(config["_class_name"])].kind(**plain), pairs, str(lora))
    ranks = sorted({pair.A.shape[0] for pair in pairs.values()})
    count = sum(pair.A.numel() + pair.B.numel() for pair in pairs.values())
    what = f"LoRA of rank {some(ranks)} on {len(pairs)} modules, {count / 1e6:,.2f} M parameters; it fits this {part}"
    return [Finding("note", what, str(lora), "give --parameters lora to attribute by it alone")]
