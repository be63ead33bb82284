"""What a pipeline folder is: its family, its parts and how their weights are stored, and what it asks of images."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from whence.data.layout import Finding, some
from whence.doctor.findings import NOTHING, Findings, in_bytes, in_millions
from whence.models import Model
from whence.models.lora import additions_of, attach
from whence.models.lora_files import read_parts
from whence.models.lora_keys import NETWORK
from whence.models.pipeline import FLOW
from whence.models.weights import weight_files
from whence.storage.opening import regular
from whence.types import WhenceError


@dataclass(frozen=True)
class Requirements:
    """What a network asks of its images.

    Args:
        side: of the pictures, in pixels; None where the folder does not say.
        channels: of the pictures; None where the folder does not say.
        text: whether it reads captions.
        shrink: pixels per latent; 1 without a VAE.
    """

    side: int | None = None
    channels: int | None = None
    text: bool = False
    shrink: int = 1

    @property
    def latents(self) -> bool:
        return self.shrink > 1 or self.text


def requirements(model: Model) -> Requirements:
    """What a model asks of its images."""
    side = model.config.get("sample_size")
    shrink = 1 if model.vae is None else model.vae.shrink
    known = side * shrink if isinstance(side, int) and side > 0 else None
    return Requirements(known, model.channels, "encoder_hidden_states" in model.needs, shrink)


def family(model: Model) -> Findings:
    """What it is, which parts it does without, and how they are stored."""
    folder, found, schedule = model.folder, model.family, model.scheduler
    scheduler, where = schedule.get("_class_name"), str(model.folder)
    predicts = "flow matching" if scheduler in FLOW else f"predicts {schedule.get('prediction_type', 'epsilon')}"
    steps = schedule.get("num_train_timesteps", 1000)
    name = f"{found.name}: {found.kind.__name__}" if found.name else found.kind.__name__
    what = f"{name}, {predicts}, {steps} timesteps of {scheduler}"
    findings = [Finding("note", what, where, NOTHING)]
    instead = {} if model.vae is None else {"vae": model.vae.part}
    encoders = [instead.get(name, name) for name in (*found.parts, *found.optional) if not name.startswith("tokenizer")]
    absent = [name for name in encoders if name in found.optional and not (folder / name).is_dir()]
    if absent:
        fix = f"add {' and '.join(f'{part}/' for part in found.optional)} if it was trained with them"
        findings.append(Finding("note", f"{absent[0]}/ is missing, so {found.without}", where, fix))
    for each in (model.part, *encoders):
        if (folder / each).is_dir():
            findings += _stored(folder / each)
    return findings


def _stored(folder: Path) -> Findings:
    """Number of parameters and their type, by the headers of the weight files that are opened."""
    shapes: Counter[str] = Counter()
    try:
        files = weight_files(folder)
    except WhenceError:  # which is told where it is loaded
        return []
    for path in files:
        shapes.update(_header(path))
    if not shapes:
        return []
    kinds = ", ".join(
        f"{kind}" if len(shapes) == 1 else f"{in_millions(count)} in {kind}" for kind, count in shapes.items()
    )
    size = sum(path.stat().st_size for path in files)
    what = f"{in_millions(shapes.total())} parameters ({kinds}), {in_bytes(size)}"
    return [Finding("note", what, str(folder), "they are read as float32" if set(shapes) != {"F32"} else NOTHING)]


def _header(path: Path) -> Counter[str]:
    """Numbers of weights by type, {} for a file that is no safetensors: `model` tells."""
    found: Counter[str] = Counter()
    try:
        with regular(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, path.stat().st_size)))
        for name, entry in header.items():
            if name != "__metadata__":
                found[entry["dtype"]] += math.prod(entry["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError):
        return Counter()
    return found


def lora_fits(model: Model, lora: Path) -> Findings:
    """Whether a LoRA is for this network and its text encoders, by names and shapes."""
    folder, found = model.folder, read_parts(lora)
    pairs = found.get(NETWORK, {})
    with torch.device("meta"):
        attach(model.family.kind.from_config(model.config), pairs, str(lora))
        for at, addition in additions_of(folder, model.family, lora).items():
            addition.put_in(_encoder(folder / at))
    ranks = sorted({pair.A.shape[0] for pair in pairs.values()})
    count = sum(pair.A.numel() + pair.B.numel() for pair in pairs.values())
    what = f"LoRA of rank {some(ranks)} on {len(pairs)} modules, {in_millions(count)} parameters; it fits this {model.part}"
    notes = [Finding("note", what, str(lora), "give --parameters lora to attribute by it alone")]
    for at in sorted(set(found) - {NETWORK}):
        what = f"it adapts {at} too, on {len(found[at])} modules: captions are encoded with them"
        notes.append(Finding("note", what, str(lora), "nothing of it is attributed but the LoRA of the network"))
    return notes


def _encoder(folder: Path) -> nn.Module:
    """A text encoder without its weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    names = config.architectures or []
    return next((kind for kind in ENCODERS if kind.__name__ in names), ENCODERS[0])(config)


ENCODERS: tuple[type[CLIPTextModel] | type[CLIPTextModelWithProjection] | type[T5EncoderModel], ...] = (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
)
