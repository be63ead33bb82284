"""The names that LoRA files give to the modules of networks and text encoders.

    diffusers    unet.down_blocks.1.attentions.0...attn2.to_k.lora_A.weight, and its older endings
    peft         base_model.model. before the name
    kohya        lora_unet_, lora_te1_ ... before it, every dot an underscore, alpha beside each module
    ComfyUI      diffusion_model. before it
    x-labs       double_blocks.0.processor.qkv_lora1.down.weight, of Flux only

SDXL, SD3 and Flux are written by kohya and ComfyUI with the names of their first release, in which some layers are several
of diffusers' side by side (`Place`). The tables below go from diffusers' names to those, for the modules that a network has:
a name is found in them or it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

NETWORK = "network"
BEFORE = (
    (re.compile(r"(unet|transformer|model\.diffusion_model|diffusion_model|base_model\.model)\."), NETWORK),
    (re.compile(r"lora_(unet|transformer)_"), NETWORK),
    (re.compile(r"text_encoder\.|lora_te1?_|text_encoders\.clip_l\.(transformer\.)?"), "text_encoder"),
    (re.compile(r"text_encoder_2\.|lora_te2_|text_encoders\.clip_g\.(transformer\.)?"), "text_encoder_2"),
    (re.compile(r"text_encoder_3\.|lora_te3_|text_encoders\.t5xxl\.(transformer\.)?"), "text_encoder_3"),
)
NEW = re.compile(r"(?P<module>.+)\.lora_(?P<side>A|B|down|up)(\.(?P<adapter>[^.]+))?\.weight")
OLD = re.compile(r"(?P<module>.+?)(?P<spelled>_lora|\.lora|\.lora_linear_layer)\.(?P<side>down|up)\.weight")
XLABS = re.compile(
    r"(?P<block>(double|single)_blocks\.\d+)\.processor\.(?P<which>(qkv|proj)_lora[12]?)\.(?P<side>down|up)\.weight"
)
SIDES = {"down": "A", "up": "B"}
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """What one entry of a file is: side "A", "B" or "alpha" of a module of the network or of a text encoder."""

    part: str
    module: str
    side: str


def part_of_key(key: str) -> tuple[str, str]:
    """The part of the pipeline that a name begins with, the network where it does not say, and the rest of the name."""
    part, found = NETWORK, True
    while found:
        found = False
        for pattern, kind in BEFORE:
            match = pattern.match(key)
            if match:
                part, key, found = (part if kind == NETWORK else kind), key[match.end() :], True
    return part, key


def read_key(key: str) -> Key | None:
    """None for what is no entry of a LoRA."""
    part, name = part_of_key(key)
    if name.endswith(".alpha"):
        spelled = re.sub(r"(\.lora|\.lora_linear_layer)?\.alpha$", "", name)
        old = spelled.endswith("_lora")
        return Key(part, _module(part, spelled.removesuffix("_lora"), old), "alpha")
    found = NEW.fullmatch(name)
    if found is not None:
        return Key(part, found["module"], SIDES.get(found["side"], found["side"]))
    found = XLABS.fullmatch(name)
    if found is not None:
        return Key(part, f"{found['block']}.{found['which']}", SIDES[found["side"]])
    found = OLD.fullmatch(name)
    if found is None:
        return None
    return Key(part, _module(part, found["module"], found["spelled"] == "_lora"), SIDES[found["side"]])


def _module(part: str, name: str, old: bool) -> str:
    """The module of a name in which the first releases of diffusers spelled the attention (`processor.to_q_lora`)."""
    start, _, last = name.removesuffix(".processor").replace(".processor.", ".").rpartition(".")
    if old and part == NETWORK:
        last = "to_out.0" if last == "to_out" else last
    elif old:
        last = OLD_TEXT.get(last, last)
    return f"{start}.{last}" if start else last


# ------------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class Place:
    """Where a module of a file is in a network: the modules whose outputs lie side by side in it, or one. swapped: it makes
    shift and scale where diffusers makes scale and shift."""

    modules: tuple[str, ...]
    swapped: bool = False


def places(network: nn.Module) -> dict[str, Place]:
    """Every name that a module of a network may have in a file, dots as underscores."""
    names = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
    found: dict[str, Place] = {}
    for name in names:
        other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
        found[flat(name)] = found[flat(other)] = Place((name,))
    if isinstance(network, UNet2DConditionModel):
        found |= {flat(other): Place((name,)) for name, other in _sgm(names)}
    if isinstance(network, FluxTransformer2DModel):
        found |= _released(names, FLUX, FLUX_PLACES)
    if isinstance(network, SD3Transformer2DModel):
        found |= _released(names, SD3, SD3_PLACES)
    return found


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What a LoRA can be put on."""


def flat(name: str) -> str:
    return name.replace(".", "_")


def _released(names: list[str], one: Mapping[str, str], several: Mapping[str, Place]) -> dict[str, Place]:
    """Names of the first release, {i} for the number of a block."""
    found: dict[str, Place] = {}
    numbers = {int(match[1]) for name in names if (match := re.match(r"\w*transformer_blocks\.(\d+)\.", name))}
    table = {**{theirs: Place((ours,)) for theirs, ours in one.items()}, **several}
    for theirs, place in table.items():
        for number in sorted(numbers) if "{i}" in theirs else [0]:
            modules = tuple(name.format(i=number) for name in place.modules)
            if {*modules} <= {*names}:
                found[flat(theirs.format(i=number))] = Place(modules, place.swapped or modules in _last_norms(names))
    return found


def _last_norms(names: list[str]) -> set[tuple[str, ...]]:
    """The last block of SD3 does not change the text, so that its normalisation is one of shift and scale."""
    blocks = [
        int(match[1]) for name in names if (match := re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.to_q", name))
    ]
    last = f"transformer_blocks.{max(blocks, default=0)}"
    there = f"{last}.norm1_context.linear" in names and f"{last}.ff_context.net.2" not in names
    return {(f"{last}.norm1_context.linear",)} if there else set()


TIME = {
    "timestep_embedder": ("time_in.in_layer", "time_in.out_layer"),
    "text_embedder": ("vector_in.in_layer", "vector_in.out_layer"),
    "guidance_embedder": ("guidance_in.in_layer", "guidance_in.out_layer"),
}
FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    **{theirs: f"time_text_embed.{ours}.linear_{n}" for ours, both in TIME.items() for n, theirs in enumerate(both, 1)},
    "double_blocks.{i}.img_attn.proj": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.txt_attn.proj": "transformer_blocks.{i}.attn.to_add_out",
    "double_blocks.{i}.img_mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
    "double_blocks.{i}.img_mlp.2": "transformer_blocks.{i}.ff.net.2",
    "double_blocks.{i}.txt_mlp.0": "transformer_blocks.{i}.ff_context.net.0.proj",
    "double_blocks.{i}.txt_mlp.2": "transformer_blocks.{i}.ff_context.net.2",
    "double_blocks.{i}.img_mod.lin": "transformer_blocks.{i}.norm1.linear",
    "double_blocks.{i}.txt_mod.lin": "transformer_blocks.{i}.norm1_context.linear",
    "single_blocks.{i}.linear2": "single_transformer_blocks.{i}.proj_out",
    "single_blocks.{i}.modulation.lin": "single_transformer_blocks.{i}.norm.linear",
    "double_blocks.{i}.proj_lora1": "transformer_blocks.{i}.attn.to_out.0",
    "double_blocks.{i}.proj_lora2": "transformer_blocks.{i}.attn.to_add_out",
    "single_blocks.{i}.proj_lora": "single_transformer_blocks.{i}.proj_out",
}
PICTURE = tuple(f"transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv")
CAPTION = tuple(f"transformer_blocks.{{i}}.attn.add_{x}_proj" for x in "qkv")
FINAL = {"final_layer.adaLN_modulation.1": Place(("norm_out.linear",), swapped=True)}
SINGLE = tuple(f"single_transformer_blocks.{{i}}.attn.to_{x}" for x in "qkv")
FLUX_PLACES = {
    **FINAL,
    "double_blocks.{i}.qkv_lora1": Place(PICTURE),
    "double_blocks.{i}.qkv_lora2": Place(CAPTION),
    "single_blocks.{i}.qkv_lora": Place(SINGLE),
    "double_blocks.{i}.img_attn.qkv": Place(PICTURE),
    "double_blocks.{i}.txt_attn.qkv": Place(CAPTION),
    "single_blocks.{i}.linear1": Place((*SINGLE, "single_transformer_blocks.{i}.proj_mlp")),
}
SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    **{
        f"{theirs}.mlp.{2 * n - 2}": f"time_text_embed.{ours}.linear_{n}"
        for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
        for n in (1, 2)
    },
    "joint_blocks.{i}.x_block.attn.proj": "transformer_blocks.{i}.attn.to_out.0",
    "joint_blocks.{i}.x_block.attn2.proj": "transformer_blocks.{i}.attn2.to_out.0",
    "joint_blocks.{i}.x_block.mlp.fc1": "transformer_blocks.{i}.ff.net.0.proj",
    "joint_blocks.{i}.x_block.mlp.fc2": "transformer_blocks.{i}.ff.net.2",
    "joint_blocks.{i}.x_block.adaLN_modulation.1": "transformer_blocks.{i}.norm1.linear",
    "joint_blocks.{i}.context_block.attn.proj": "transformer_blocks.{i}.attn.to_add_out",
    "joint_blocks.{i}.context_block.mlp.fc1": "transformer_blocks.{i}.ff_context.net.0.proj",
    "joint_blocks.{i}.context_block.mlp.fc2": "transformer_blocks.{i}.ff_context.net.2",
    "joint_blocks.{i}.context_block.adaLN_modulation.1": "transformer_blocks.{i}.norm1_context.linear",
}
SD3_PLACES = {
    **FINAL,
    "joint_blocks.{i}.x_block.attn.qkv": Place(PICTURE),
    "joint_blocks.{i}.x_block.attn2.qkv": Place(tuple(name.replace("attn", "attn2") for name in PICTURE)),
    "joint_blocks.{i}.context_block.attn.qkv": Place(CAPTION),
}


def _sgm(names: list[str]) -> Iterator[tuple[str, str]]:
    """Modules of a UNet2DConditionModel, and their names in the UNet that SDXL was released with."""
    down, up = (_stages(names, side) for side in ("down", "up"))
    for name in names:
        if name in SGM:
            yield name, SGM[name]
            continue
        found = re.fullmatch(
            r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
        )
        if found is None:
            continue
        side, block, kind, layer, rest = found.groups()
        inner = RESNET.get(rest, rest)
        if side is None:
            yield name, f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{inner}"
            continue
        starts, attentive = down if side == "down" else up
        start, prefix = starts[int(block)], "input_blocks" if side == "down" else "output_blocks"
        if kind == "downsamplers":
            yield name, f"input_blocks.{starts[int(block) + 1] - 1}.0.op"
        elif kind == "upsamplers":
            yield name, f"output_blocks.{starts[int(block) + 1] - 1}.{2 if int(block) in attentive else 1}.conv"
        else:
            yield name, f"{prefix}.{start + int(layer)}.{1 if kind == 'attentions' else 0}.{inner}"


def _stages(names: list[str], side: str) -> tuple[list[int], set[int]]:
    """The number of the first released block of every stage and of one after the last; the stages with attention."""
    layers: dict[int, set[str]] = {}
    attentive: set[int] = set()
    for name in names:
        found = re.match(rf"{side}_blocks\.(\d+)\.(resnets\.\d+|downsamplers|attentions)\.", name)
        if found is not None and found[2] != "attentions":
            layers.setdefault(int(found[1]), set()).add(found[2])
        elif found is not None:
            attentive.add(int(found[1]))
    starts = [1 if side == "down" else 0]
    for block in sorted(layers):
        starts.append(starts[-1] + len(layers[block]))
    return starts, attentive


SGM = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
