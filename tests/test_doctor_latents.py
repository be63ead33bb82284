"""The doctor on folders of latent and text-conditioned models: what they are, what is missing, what they will cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import FAMILIES, save_whole
from test_cli import succeeds, whence
from test_doctor import edit, levels, serious
from test_encode import CAPTIONS, pictures
from test_lora import peft_lora
from whence.doctor import Inputs, examine, requirements
from whence.models import Lora, open_model

SIDE = {"ddpm": 4, "ddpm with labels": 4}  # pixels of the others: 4 latents of a VAE that halves


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    for name in FAMILIES:
        save_whole(name, root / name)
        peft_lora(name, root / "lora" / name)
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_understood(name: str, world: Path, tmp_path: Path) -> None:
    family = FAMILIES[name]
    sides = (world / "train", world / "queries", tmp_path / "run", SIDE.get(name, 8))
    findings = examine(Inputs(world / name, *sides, Lora(world / "lora" / name)))
    assert [line for line in serious(findings) if "get shrunk" not in line] == []
    predicts = "flow matching" if family.flow else "predicts epsilon"
    assert levels(findings, f": {family.kind}, {predicts}, 1000 timesteps of ") == ["note"]
    count = sum(value.numel() for value in family.network().state_dict().values())  # SD3 keeps a buffer, too
    assert levels(findings, f"{name}/{family.part}: {count:,} parameters (F32), ") == ["note"]
    assert levels(findings, f"it fits this {family.part}") == ["note"]
    reads_text = "encoder_hidden_states" in family.cond
    assert levels(findings, "different captions in 'text'") == ["note"] * 2 * reads_text
    told = requirements(open_model(world / name))
    assert told.text == reads_text
    assert told.side == (None if family.config.get("sample_size") is None else SIDE.get(name, 8))


def remove(*parts: str) -> Callable[[Path], None]:
    return lambda folder: [shutil.rmtree(folder / part) for part in parts] and None


def config(path: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / path, **changes)


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new) and None


def not_finite(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).fill_(torch.inf)
    save_file(weights, path)


WEIGHTS, ENCODER = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
BROKEN: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "no VAE": ("sd", remove("vae"), ("vae/ is missing, but the network takes latents", "the VAE it was trained with")),
    "no tokenizer": ("sd", remove("tokenizer"), ("tokenizer/ is missing", "all parts, as save_pretrained writes them")),
    "no encoders": ("flux", remove("text_encoder_2", "tokenizer_2"), ("tokenizer_2/, text_encoder_2/ are missing",)),
    "no network": ("flux", remove("transformer"), ("transformer/ is missing (it holds",)),
    "no scheduler": ("sd3", remove("scheduler"), ("scheduler/ is missing",)),
    "other VAE": ("sd", config("vae/config.json", latent_channels=16), ("the VAE makes 16 channels, the network takes 4",)),
    "inpainting": ("sd", config("unet/config.json", in_channels=9), ("makes 4 channels, the network takes 9", "inpainting")),
    "means": ("sd3", config("vae/config.json", latents_mean=[0.0]), ("latents_mean is set", "accepted: a VAE with shift")),
    "pickled VAE": ("sd", rename(WEIGHTS, "vae/diffusion_pytorch_model.bin"), ("vae: only pickles", ".bin")),
    "variant": ("sd", rename(ENCODER, "text_encoder/model.fp16.safetensors"), ("fp16.safetensors", "without `variant`")),
    "cut": ("sd", lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]) and None, (WEIGHTS, "truncated or")),
    "infinite": ("sd", not_finite, (ENCODER, "weights hold NaN or Inf")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders(case: str, world: Path, tmp_path: Path) -> None:
    name, damage, texts = BROKEN[case]
    folder = Path(shutil.copytree(world / name, tmp_path / "model"))
    (folder / "model_index.json").write_text(json.dumps({FAMILIES[name].part: ["diffusers", FAMILIES[name].kind]}))
    damage(folder)
    findings = examine(Inputs(folder, None, None, tmp_path / "run", 8))
    assert levels(findings, *texts) == ["error"], [str(f) for f in findings]
    assert not levels(findings, "bug in whence")


def test_sizes_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    findings = examine(Inputs(world / "sd", None, None, tmp_path, 9))
    assert levels(findings, "pictures of 9x9 do not fit this VAE; accepted: a --resolution that 2 divides") == ["error"]
    assert levels(examine(Inputs(world / "flux", None, None, tmp_path)), "sample_size is None", "--resolution") == [
        "error"
    ]
    findings = examine(Inputs(world / "sd", world / "train", None, tmp_path, 16))
    assert levels(findings, "brought to 16x16, but the model is for 8x8") == ["warning"]


def test_sd3_without_t5(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "sd3", tmp_path / "model"))
    remove("text_encoder_3", "tokenizer_3")(folder)
    findings = examine(Inputs(folder, None, None, tmp_path / "run"))
    assert levels(findings, "text_encoder_3/ is missing, so T5's part of the text is zero") == ["note"]
    assert serious(findings) == []


def test_weights_in_half_precision(world: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world / "sd", tmp_path / "model"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: value.half() if "conv" in name else value for name, value in load_file(path).items()}
    save_file(weights, path)
    sizes = [sum(v.numel() for v in weights.values() if v.dtype == kind) for kind in (torch.float16, torch.float32)]
    findings = examine(Inputs(folder, None, None, tmp_path / "run"))
    assert levels(findings, f"{sizes[0]:,} in F16", "they are read as float32") == ["note"]
    assert levels(findings, f"{sizes[1]:,} in F32", "they are read as float32") == ["note"]


def test_weights_that_are_too_many_to_load(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("whence.doctor.model.machine_memory", lambda: (2000, 1000))
    findings = examine(Inputs(world / "sd", None, None, tmp_path))
    assert levels(findings, "too many to be loaded for a check in 1.0 KB of memory") == ["note"]


def test_captions_and_loras_that_do_not_fit(world: Path, tmp_path: Path) -> None:
    one = pictures(tmp_path / "one", CAPTIONS, column="caption")
    findings = examine(Inputs(world / "sd", one, world / "queries", tmp_path / "run"))
    assert levels(findings, "training images", "no column 'text' (columns: caption, label)", "--caption_column") == [
        "error"
    ]
    assert levels(findings, "query images", "2 different captions") == ["note"]
    findings = examine(Inputs(world / "sd", one, None, tmp_path / "run", caption_column="caption"))
    assert levels(findings, "4 different captions in 'caption'") == ["note"]
    rows = [json.loads(line) for line in (one / "metadata.jsonl").read_text().splitlines()]
    rows[1]["caption"] = None
    (one / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    findings = examine(Inputs(world / "sd", one, None, tmp_path / "run", caption_column="caption"))
    assert levels(findings, "1 of 6 images have no caption in 'caption': ", "1.png") == ["error"]
    findings = examine(Inputs(world / "sd", None, None, tmp_path / "run", adapter=Lora(world / "lora" / "flux")))
    assert levels(findings, "is for another base") == ["error"]
    findings = examine(Inputs(world / "sd", None, None, tmp_path / "run", adapter=Lora(world / "train")))
    assert levels(findings, "no LoRA weights", "accepted: a folder with") == ["error"]


def test_command_line(world: Path, tmp_path: Path) -> None:
    """Findings, then the cost by shapes: for the images that are given, else for a thousand."""
    run = ("--output_dir", tmp_path / "run")
    told = succeeds("doctor", world / "sd", *run).out
    assert "Stable Diffusion 1 or 2: UNet2DConditionModel, predicts epsilon, 1000 timesteps of DDPMScheduler" in told
    assert "nothing is wrong" in told or "1 warning" in told
    assert "counted from its shapes: 1,000 images, 10 draws" in told
    data = ("--train_data_dir", world / "train", "--query_data_dir", world / "queries", "--lora", world / "lora" / "sd")
    told = succeeds("doctor", world / "sd", *data, *run, "--draws", 3).out
    assert "counted from its shapes: 6 images, 3 draws" in told
    assert [line.split(":")[0].strip() for line in told.splitlines()[-3:]] == ["all", "attention", "lora"]
    assert not (tmp_path / "run").exists()
    folder = Path(shutil.copytree(world / "sd", tmp_path / "broken"))
    remove("tokenizer")(folder)
    done = whence("doctor", folder, *run)
    assert done.code == 2
    assert "tokenizer/ is missing" in done.out
    assert "counted from its shapes" not in done.out
