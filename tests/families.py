"""The families of diffusion models, each as a tiny random network of diffusers with what it is conditioned on."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TEXT, TOKENS, POOLED = 8, 5, 6  # widths and number of tokens of the conditions

UNET = {
    "sample_size": 4,
    "layers_per_block": 1,
    "block_out_channels": (4, 8),
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
CROSS = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT,
}
PIXELS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
SD3 = {"joint_attention_dim": TEXT, "caption_projection_dim": 8, "pooled_projection_dim": POOLED}
FLUX = {"in_channels": 16, "num_single_layers": 1, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
PIXART = {"cross_attention_dim": 8, "caption_channels": TEXT, "out_channels": 8, "sample_size": 4}


@dataclass(frozen=True)
class Family:
    """kind: the class of the network; cond: the names of its conditions; flow: by flow matching."""

    kind: str
    config: Mapping[str, Any]
    cond: tuple[str, ...] = ()
    flow: bool = False
    learned_sigma: bool = False

    @property
    def channels(self) -> int:
        return 3 if self.kind == "UNet2DModel" else 4

    @property
    def part(self) -> str:
        return "unet" if self.kind.startswith("UNet") else "transformer"

    def network(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        net = getattr(diffusers, self.kind)(**copy.deepcopy(dict(self.config))).eval()
        with torch.no_grad():  # some start at exactly 0, which would hide an error in what comes before
            for p in net.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return net

    def save(self, folder: Path, **scheduler: Any) -> Path:
        """A pipeline folder with network and scheduler."""
        self.network().save_pretrained(folder / self.part)
        kind = "FlowMatchEulerDiscreteScheduler" if self.flow else "DDPMScheduler"
        getattr(diffusers, scheduler.pop("kind", kind))(**scheduler).save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiffusionPipeline"}))
        return folder

    def conditions(self, count: int, seed: int = 0) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        every = {
            "class_labels": torch.randint(5, (count,), generator=g),
            "encoder_hidden_states": torch.randn(count, TOKENS, TEXT, generator=g),
            "text_embeds": torch.randn(count, POOLED, generator=g),
            "pooled_projections": torch.randn(count, POOLED, generator=g),
            "time_ids": torch.tensor([32.0, 32, 0, 0, 32, 32]).expand(count, -1).clone(),
            "attention_mask": (torch.arange(TOKENS) < torch.randint(2, TOKENS + 1, (count, 1), generator=g)).long(),
            "resolution": torch.full((count, 2), 32.0),
            "aspect_ratio": torch.ones(count, 1),
        }
        return {name: every[name] for name in self.cond}


FAMILIES = {
    "ddpm": Family("UNet2DModel", UNET | PIXELS),
    "ddpm with labels": Family("UNet2DModel", UNET | PIXELS | {"num_class_embeds": 5}, ("class_labels",)),
    "sd": Family("UNet2DConditionModel", UNET | CROSS, ("encoder_hidden_states",)),
    "sdxl": Family(
        "UNet2DConditionModel",
        UNET
        | CROSS
        | {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": POOLED + 24,
        },
        ("encoder_hidden_states", "text_embeds", "time_ids"),
    ),
    "dit": Family(
        "DiTTransformer2DModel",
        BLOCKS | {"sample_size": 4, "out_channels": 8, "num_embeds_ada_norm": 5},
        ("class_labels",),
        learned_sigma=True,
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        BLOCKS | PIXART,
        ("encoder_hidden_states", "attention_mask"),
        learned_sigma=True,
    ),
    "pixart with sizes": Family(
        "PixArtTransformer2DModel",
        # The embeddings of three numbers take a third of the width each.
        BLOCKS | PIXART | {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 12},
        ("encoder_hidden_states", "attention_mask", "resolution", "aspect_ratio"),
        learned_sigma=True,
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        BLOCKS | SD3 | {"sample_size": 4, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 4},
        ("encoder_hidden_states", "pooled_projections"),
        flow=True,
    ),
    "flux": Family(
        "FluxTransformer2DModel",
        BLOCKS | FLUX | {"attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)},
        ("encoder_hidden_states", "pooled_projections"),
        flow=True,
    ),
    "flux with guidance": Family(
        "FluxTransformer2DModel",
        BLOCKS | FLUX | {"attention_head_dim": 8, "axes_dims_rope": (2, 2, 4), "guidance_embeds": True},
        ("encoder_hidden_states", "pooled_projections"),
        flow=True,
    ),
}


# ---------------------------------------------------------------------------------------------------- whole pipelines

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_vae(folder: Path, channels: int = 4, **config: Any) -> None:
    torch.manual_seed(5)
    diffusers.AutoencoderKL(
        latent_channels=channels,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        **config,
    ).save_pretrained(folder / "vae")


def save_clip(folder: Path, at: str = "", width: int = TEXT, projection: int | None = None) -> None:
    """A CLIP of letters: tokenizer and text encoder number `at`, with a projection where one is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    words = [letter + end for letter in LETTERS for end in ("", "</w>")]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    source = folder / f"tokenizer{at}"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(source, model_max_length=12).save_pretrained(source)
    torch.manual_seed(6 + len(at))
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection or 4,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    kind(config).save_pretrained(folder / f"text_encoder{at}")


def save_t5(folder: Path, at: str = "") -> None:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    T5Tokenizer(vocab=vocab, extra_ids=0).save_pretrained(folder / f"tokenizer{at}")
    torch.manual_seed(8)
    config = T5Config(vocab_size=32, d_model=TEXT, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(folder / f"text_encoder{at}")


def save_whole(name: str, folder: Path) -> Path:
    """A pipeline folder with everything: network, scheduler, VAE, tokenizers, text encoders."""
    FAMILIES[name].save(folder)
    if name.startswith("ddpm"):
        return folder
    save_vae(folder, shift_factor=0.3 if FAMILIES[name].flow else None, scaling_factor=0.7)
    if name == "sd":
        save_clip(folder)
    if name == "sdxl":
        save_clip(folder, width=4)
        save_clip(folder, "_2", width=4, projection=POOLED)
    if name == "sd3":
        save_clip(folder, width=4, projection=2)
        save_clip(folder, "_2", width=2, projection=4)
        save_t5(folder, "_3")
    if name.startswith("flux"):
        save_clip(folder, width=POOLED)
        save_t5(folder, "_2")
    if name.startswith("pixart"):
        save_t5(folder)
    return folder


BY_DIFFUSERS: dict[str, Any] = {
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
    "flux": diffusers.FluxPipeline,
    "flux with guidance": diffusers.FluxPipeline,
    "pixart": diffusers.PixArtAlphaPipeline,
    "dit": diffusers.DiTPipeline,
    "ddpm": diffusers.DDIMPipeline,
}


def save_index(name: str, folder: Path, kind: type | None = None) -> Path:
    """The model_index.json by which diffusers opens a folder of `save_whole`."""
    entries: dict[str, Any] = {"_class_name": (kind or BY_DIFFUSERS[name]).__name__, "_diffusers_version": "0.30.0"}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found = {file.name: json.loads(file.read_text()) for file in path.glob("*config.json")}
            told = found.get("config.json", found.get("scheduler_config.json", found.get("tokenizer_config.json", {})))
            library = "diffusers" if "_class_name" in told else "transformers"
            entries[path.name] = [
                library,
                told.get("_class_name") or told.get("tokenizer_class") or told["architectures"][0],
            ]
    for absent in ("safety_checker", "feature_extractor", "image_encoder"):
        entries[absent] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(entries))
    return folder
