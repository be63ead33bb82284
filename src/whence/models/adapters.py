"""A model, with or without an adapter on it."""

from __future__ import annotations

from pathlib import Path

from whence.models.custom_diffusion import CustomDiffusion
from whence.models.lora import Lora
from whence.models.pipeline import Model, open_pipeline, with_checkpoints
from whence.types import WhenceError

Adapter = Lora | CustomDiffusion
"""What was trained on a pipeline, in a folder of its own; it alone asks for gradients."""


def open_model(folder: str | Path, adapter: Adapter | None = None, trained: bool = True) -> Model:
    """Read a diffusers pipeline folder. Nothing is loaded yet but JSON files and digests of weights.

    Args:
        folder: as `save_pretrained` writes it.
        adapter: what lies on it; the checkpoints of training are then those beside the adapter.
        trained: False for a folder whose network is still to be trained: its weights are not looked for.
    """
    base = open_pipeline(folder, trained)
    return with_checkpoints(base) if adapter is None else adapter.on(base)


def adapter_of(lora: Path | None, custom_diffusion: Path | None) -> Adapter | None:
    """The adapter that two options name, of which one at most is given."""
    if lora is not None and custom_diffusion is not None:
        raise WhenceError("give a LoRA or a Custom Diffusion folder, not both")
    if lora is not None:
        return Lora(lora)
    return None if custom_diffusion is None else CustomDiffusion(custom_diffusion)
