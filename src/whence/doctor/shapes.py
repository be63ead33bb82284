"""What attribution will cost, counted from shapes alone: nothing is loaded, no weight is needed, only config.json files.

Networks are built without memory (torch's meta device) and run once, forward and backward, while a counter adds up the
operations: multiplications and additions of matrix products, convolutions and attention, which is nearly everything. Times
follow from an assumed speed and are estimates; operations and bytes are counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from whence.doctor.findings import in_bytes, in_millions, in_operations, in_time, whole_number
from whence.features.gradients import select
from whence.models import NETWORKS, TARGETS, Family, needs_of
from whence.models.autoencoders import autoencoder_of
from whence.models.lora import layers_of
from whence.models.pipeline import PARTS
from whence.storage.files import read_object
from whence.types import WhenceError

SPEED = 125e12  # operations per second: 40 % of the bf16 peak of an A100 with 80 GB


@dataclass(frozen=True)
class Shape:
    """The size of one network and choice of parameters.

    Args:
        weights: number of parameters.
        chosen: number of chosen parameters.
        forward: operations of a forward pass, for one picture and draw.
        backward: operations of the backward pass.
        activations: bytes kept between the two, in bfloat16.
    """

    weights: int
    chosen: int
    forward: float
    backward: float
    activations: int

    def gradients(self, rows: int, draws: int) -> float:
        """Seconds for the gradients of so many pictures, at SPEED."""
        return rows * draws * (self.forward + self.backward) / SPEED

    def memory(self, draws: int) -> int:
        """Bytes while `draws` draws of one picture are in work: bf16 weights and activations, a float32 gradient."""
        return 2 * self.weights + 4 * self.chosen + draws * self.activations


def shape_of(
    kind: str, config: Mapping[str, object], side: int | None = None, parameters: str = "trained", rank: int = 4
) -> Shape:
    """Count one network.

    Args:
        kind: its class.
        config: the content of its config.json.
        side: of its latents or pixels; the config's by default.
        parameters: as everywhere, or "lora" for a LoRA on the projections of attention.
        rank: of such a LoRA.
    """
    return _shape(kind, json.dumps(config, sort_keys=True), side, parameters, rank)


@lru_cache(maxsize=256)
def _shape(kind: str, text: str, side: int | None, parameters: str, rank: int) -> Shape:
    config: dict[str, object] = json.loads(text)
    if kind not in NETWORKS:
        raise WhenceError(f"{kind} is not known; accepted: {', '.join(NETWORKS)}")
    family = NETWORKS[kind].of(config)
    with torch.device("meta"):
        network = family.new(config).to(torch.bfloat16)
    weights = sum(p.numel() for p in network.parameters())
    if parameters == "lora":
        layers = layers_of(network, TARGETS)
        names = [f"{name}.weight" for name in layers]
        chosen = sum(rank * sum(layer.weight.shape) for layer in layers.values())
    else:
        names = select(network, parameters)
        chosen = sum(p.numel() for name, p in network.named_parameters() if name in set(names))
    for name, p in network.named_parameters():
        p.requires_grad_(name in set(names))
    # Of a LoRA no gradients of the weights themselves, but of what passes through all of them.
    config = dict(network.config)  # with the defaults of the class
    return Shape(weights, chosen, *_counted(family, config, network, side, through=parameters == "lora"))


def _counted(
    family: Family, config: Mapping[str, object], network: nn.Module, side: int | None, through: bool
) -> tuple[float, float, int]:
    """Operations forward and backward, and bytes kept. through: backward as many as forward."""
    x_t, t, cond = _inputs(family, config, side)
    kept = 0

    def pack(value: Tensor) -> Tensor:
        nonlocal kept
        if not isinstance(value, nn.Parameter):
            kept += value.numel() * value.element_size()
        return value

    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, saved_tensors_hooks(pack, lambda value: value):
        out = family.call(config)(network, x_t, t, cond)
        forward = counter.get_total_flops()
        if through:
            return float(forward), float(forward), kept
        out.float().square().mean().backward()
    return float(forward), float(counter.get_total_flops() - forward), kept


def _inputs(family: Family, config: Mapping[str, object], side: int | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A picture of this network on the meta device, its time and conditions."""
    channels = _size(config, "in_channels") // family.packing
    side = side or _size(config, "sample_size", otherwise=0)
    if not side:
        raise WhenceError(f"{family.kind.__name__}: its config says no sample_size; give --resolution")
    width = _size(config, "joint_attention_dim", "caption_channels", "cross_attention_dim")
    times = 6 * _size(config, "addition_time_embed_dim", otherwise=0)
    pooled = _size(
        config, "pooled_projection_dim", otherwise=_size(config, "projection_class_embeddings_input_dim") - times
    )

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="meta")

    conditions = {
        "encoder_hidden_states": empty(1, family.tokens, width),
        "attention_mask": empty(1, family.tokens),
        "pooled_projections": empty(1, pooled),
        "text_embeds": empty(1, max(1, pooled)),
        "time_ids": empty(1, 6),
        "resolution": empty(1, 2),
        "aspect_ratio": empty(1, 1),
        "class_labels": torch.empty(1, dtype=torch.int64, device="meta"),
    }
    needed = needs_of(family.call(config))
    return empty(1, channels, side, side), empty(1), {name: conditions[name] for name in needed}


def _size(config: Mapping[str, object], *names: str, otherwise: int = 1) -> int:
    """The first of some entries that is a whole number above 0."""
    return next((size for name in names if (size := whole_number(config.get(name)))), otherwise)


def lines(folder: Path, images: int, draws: int, dim: int | None, resolution: int | None = None) -> list[str]:
    """What `whence attribute` will take on a pipeline folder, of which only config.json files are read.

    Args:
        folder: of the pipeline.
        images: training images.
        draws: of each image.
        dim: columns of the projection; None for exact gradients.
        resolution: side of the pictures; the model's own by default.
    """
    part = next((name for name in PARTS if (folder / name / "config.json").is_file()), None)
    if part is None:
        raise WhenceError(f"{folder} has neither unet/config.json nor transformer/config.json; give a pipeline folder")
    config, vae = read_object(folder / part / "config.json"), autoencoder_of(folder)
    shrink = 1 if vae is None else vae.shrink
    side = None if resolution is None else resolution // shrink
    found = [
        f"{config.get('_class_name')}, counted from its shapes: {images:,} images, {draws} draws, "
        f"{SPEED / 1e12:.0f} TFLOP/s assumed (40 % of an A100's bf16 peak), no gradient checkpointing"
    ]
    for parameters in ("all", "attention", "lora"):
        shape = shape_of(str(config.get("_class_name")), config, side, parameters)
        width = min(dim or shape.chosen, shape.chosen)
        found.append(
            f"{parameters:>10}: {in_millions(shape.chosen)} of {in_millions(shape.weights)} parameters, "
            f"{in_operations(shape.forward + shape.backward)} and {in_bytes(shape.activations)} of activations per "
            f"picture and draw, {in_bytes(shape.memory(1))} of GPU memory at one draw at a time, "
            f"features {in_bytes(8 * images * width)} (half of that with --no_errors), "
            f"{in_time(shape.gradients(images, draws))}"
        )
    return found
