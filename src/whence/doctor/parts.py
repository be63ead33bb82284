"""What a pipeline folder is: its family, its parts and how their weights are stored, and what it asks of images."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from whence.data.layout import Finding, some
from whence.doctor.findings import NOTHING, Findings, in_bytes, quiet, whole_number
from whence.models import NETWORKS, Family, family_of, needs_of
from whence.models.autoencoders import Autoencoder, autoencoder_of
from whence.models.lora import additions_of, attach
from whence.models.lora_files import read_parts
from whence.models.lora_keys import NETWORK
from whence.models.pipeline import FLOW, PARTS
from whence.types import WhenceError


def part_of(folder: Path) -> str:
    """The folder of the network: what is there, else what model_index.json promises, else unet."""
    there = [part for part in PARTS if (folder / part / "config.json").is_file()]
    promised = [part for part in PARTS if part in quiet(folder / "model_index.json")]
    return [*there, *promised, "unet"][0]


@dataclass(frozen=True)
class Requirements:
    """What a network asks of its images.

    Args:
        side: of the pictures, in pixels; None where the folder does not say.
        channels: of the pictures; None where the folder does not say.
        labels: whether it needs their classes.
        classes: how many it has; None for none.
        text: whether it reads captions.
        shrink: pixels per latent; 1 without a VAE.
    """

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
    config, vae = quiet(folder / part_of(folder) / "config.json"), autoencoder(folder)
    family = known_family(config)
    needs = () if family is None else _needs(family, config)
    shrink = 1 if vae is None else vae.shrink
    own = whole_number(config.get("sample_size"))
    classes = None if family is None else config.get(family.classes)
    channels = whole_number(config.get("in_channels")) if vae is None else vae.channels
    return Requirements(
        own and own * shrink,
        channels,
        "class_labels" in needs,
        whole_number(classes),
        "encoder_hidden_states" in needs,
        shrink,
    )


def autoencoder(folder: Path) -> Autoencoder | None:
    """That of a pipeline, None where there is none that is read: `model` tells."""
    try:
        return autoencoder_of(folder)
    except WhenceError:
        return None


def known_family(config: Mapping[str, object]) -> Family | None:
    """The family of a network, None where the class is not known."""
    return family_of(config) if config.get("_class_name") in NETWORKS else None


def _needs(family: Family, config: Mapping[str, object]) -> tuple[str, ...]:
    try:
        return needs_of(family.call(config))
    except WhenceError:  # an error where the model is opened
        return ()


def family(folder: Path) -> Findings:
    """What it is, whether all parts are there, and how they are stored."""
    part, where = part_of(folder), str(folder)
    config, schedule = quiet(folder / part / "config.json"), quiet(folder / "scheduler" / "scheduler_config.json")
    found = known_family(config)
    if found is None:
        return []
    scheduler = schedule.get("_class_name")
    predicts = "flow matching" if scheduler in FLOW else f"predicts {schedule.get('prediction_type', 'epsilon')}"
    steps = schedule.get("num_train_timesteps", 1000)
    name = f"{found.name}: {found.kind.__name__}" if found.name else found.kind.__name__
    what = f"{name}, {predicts}, {steps} timesteps of {scheduler}"
    findings = [Finding("note", what, where, NOTHING)]
    vae = autoencoder(folder)
    instead = {} if vae is None else {"vae": vae.part}
    missing = [part for part in found.parts if not (folder / instead.get(part, part)).is_dir()]
    if missing:
        inside = some(sorted(path.name for path in folder.iterdir()), 10)
        what = f"{', '.join(f'{part}/' for part in missing)} {'is' if len(missing) == 1 else 'are'} missing"
        fix = f"add {'it' if len(missing) == 1 else 'them'} as save_pretrained writes it (the folder holds {inside})"
        findings.append(Finding("error", what, where, fix))
    encoders = [instead.get(name, name) for name in (*found.parts, *found.optional) if not name.startswith("tokenizer")]
    absent = [name for name in encoders if name in found.optional and not (folder / name).is_dir()]
    if absent:
        fix = f"add {' and '.join(f'{part}/' for part in found.optional)} if it was trained with them"
        findings.append(Finding("note", f"{absent[0]}/ is missing, so {found.without}", where, fix))
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
        for name, entry in header.items():
            if name != "__metadata__":
                found[entry["dtype"]] += math.prod(entry["shape"])
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
    """Whether a LoRA is for this network and its text encoders, by names and shapes."""
    part = part_of(folder)
    config = quiet(folder / part / "config.json")
    found = read_parts(lora)
    every = {f"{at} {name}": pair for at, pairs in found.items() for name, pair in pairs.items()}
    bad = [name for name, pair in every.items() if not (pair.A.isfinite().all() and pair.B.isfinite().all())]
    if bad:
        what = f"{len(bad)} modules hold NaN or Inf: {some(bad)}"
        return [Finding("error", what, str(lora), "training diverged; take an earlier checkpoint")]
    pairs = found.get(NETWORK, {})
    with torch.device("meta"):
        attach(family_of(config).new(config), pairs, str(lora))
        for at, addition in additions_of(folder, family_of(config), lora).items():
            addition.put_in(_encoder(folder / at))
    ranks = sorted({pair.A.shape[0] for pair in pairs.values()})
    count = sum(pair.A.numel() + pair.B.numel() for pair in pairs.values())
    what = f"LoRA of rank {some(ranks)} on {len(pairs)} modules, {count / 1e6:,.2f} M parameters; it fits this {part}"
    notes = [Finding("note", what, str(lora), "give --parameters lora to attribute by it alone")]
    for at in sorted(set(found) - {NETWORK}):
        what = f"it adapts {at} too, on {len(found[at])} modules: captions are encoded with them"
        notes.append(Finding("note", what, str(lora), "nothing of it is attributed but the LoRA of the network"))
    return notes


def _encoder(folder: Path) -> nn.Module:
    """A text encoder without its weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    names = config.architectures or []
    return next((kind for kind in ENCODERS if kind.__name__ in names), ENCODERS[0])(config)


ENCODERS: tuple[type[CLIPTextModel] | type[CLIPTextModelWithProjection] | type[T5EncoderModel], ...] = (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
)
