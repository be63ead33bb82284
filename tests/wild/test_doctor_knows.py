"""Whatever `attribute` refuses, `doctor` has found before: they go through one list."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import refuses
from families import FAMILIES, save_index, save_whole
from test_encode import pictures
from whence import Lora, Request, Sampling, d_trak, task_from_pretrained, uniform
from whence.doctor import Inputs, examine
from whence.types import WhenceError


def change(path: str, **entries: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps({**found, **entries}))

    return edit


def remove(part: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / part)


def spoil(path: str, value: float, name: str = "") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / path)
        next(weights[key] for key in weights if name in key).fill_(value)
        save_file(weights, folder / path, {"format": "pt"})

    return edit


def write(path: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(content) and None


def cut(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:-40]) and None


def rename(path: str, to: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).rename(folder / to) and None


def unlabelled(folder: Path) -> None:
    change("unet/config.json", num_class_embeds=3)(folder)
    weights = load_file(folder / WEIGHTS)
    weights["class_embedding.weight"] = torch.zeros(3, 16)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


WEIGHTS, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
VAE, ENCODER = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
MODELS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no folder": ("ddpm", shutil.rmtree),
    "only parts of one": ("ddpm", remove("scheduler")),
    "no network": ("sd", remove("unet")),
    "config of another program": ("ddpm", write("unet/config.json", b"[]")),
    "no JSON": ("ddpm", cut(SCHEDULER)),
    "no UTF-8": ("ddpm", write("model_index.json", b"\xff\xfe{}")),
    "a VAE's config that is a list": ("sd", write("vae/config.json", b"[]")),
    "sizes that diffusers cannot build": ("ddpm", change("unet/config.json", attention_head_dim=0)),
    "weights of another network": ("ddpm", change("unet/config.json", block_out_channels=[8, 8])),
    "blocks that have no weights": ("ddpm", change("unet/config.json", layers_per_block=2)),
    "weights that no block has": ("ddpm", change("unet/config.json", mid_block_type=None)),
    "two sides": ("ddpm", change("unet/config.json", sample_size=[4, 4])),
    "channels of nothing": ("ddpm", change("unet/config.json", in_channels="3")),
    "other channels out": ("ddpm", change("unet/config.json", out_channels=5)),
    "LCM": ("sd", change("unet/config.json", time_cond_proj_dim=8)),
    "pictures as prompts": ("sd", change("unet/config.json", encoder_hid_dim_type="ip_image_proj")),
    "classes of SD": ("sd", change("unet/config.json", class_embed_type="timestep")),
    "a network that is not known": ("sd", change("unet/config.json", _class_name="UNet3DConditionModel")),
    "a scheduler that is not known": ("sd", change(SCHEDULER, _class_name="EDMEulerScheduler")),
    "a schedule that is not known": ("sd", change(SCHEDULER, beta_schedule="odd")),
    "a schedule beyond noise": ("sd", change(SCHEDULER, beta_end=3.0)),
    "no timesteps": ("sd", change(SCHEDULER, num_train_timesteps=0)),
    "a prediction that is not known": ("sd", change(SCHEDULER, prediction_type="flow_prediction")),
    "an autoencoder that is not known": ("sd", change("vae/config.json", _class_name="ConsistencyDecoderVAE")),
    "latents of other channels": ("sd", change("vae/config.json", latent_channels=8)),
    "means of latents": ("sd", change("vae/config.json", latents_mean=[0.0] * 4)),
    "a part that is not known": ("sd", change("model_index.json", controlnet=["diffusers", "ControlNetModel"])),
    "no VAE": ("sd", remove("vae")),
    "no VAE of a pixel's channels": ("ddpm", change("model_index.json", vqvae=["diffusers", "VQModel"])),
    "no tokenizer": ("sdxl", remove("tokenizer_2")),
    "no weights": ("ddpm", rename(WEIGHTS, "unet/weights.bin")),
    "a variant": ("ddpm", rename(WEIGHTS, "unet/diffusion_pytorch_model.fp16.safetensors")),
    "a pointer": ("ddpm", write(WEIGHTS, LFS)),
    "weights that are cut": ("ddpm", cut(WEIGHTS)),
    "a VAE that is cut": ("sd", cut(VAE)),
    "pickles of a text encoder": ("sd", rename(ENCODER, "text_encoder/pytorch_model.bin")),
    "weights that are NaN": ("sd", spoil(WEIGHTS, torch.nan)),
    "a VAE that is NaN": ("sd", spoil(VAE, torch.nan, "encoder.conv_in")),
    "a text encoder that is Inf": ("sd", spoil(ENCODER, torch.inf)),
    "a tokenizer of nothing": ("sd", write("tokenizer/tokenizer_config.json", b"{")),
    "classes, and no labels": ("ddpm", unlabelled),
}
PICTURES: dict[str, Callable[[Path], None]] = {
    "none": shutil.rmtree,
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()] and None,
    "a damaged one": cut("1.png"),
    "one of no bytes": write("1.png", b""),
    "one that is absent": lambda folder: (folder / "1.png").unlink(),
    "no JSON": write("metadata.jsonl", b'{"file_name": "0.png"'),
    "another column": write("metadata.jsonl", b'{"file_name": "0.png", "caption": "a"}'),
    "no caption of one": write("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}'),
    "others between": lambda folder: [(folder / f"{i}.npy").write_bytes(b"x") for i in range(4)] and None,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    for name in ("sd", "sdxl", "ddpm"):
        save_index(name, save_whole(name, root / name))
    for name, seed in (("train", 0), ("queries", 1)):
        pictures(root / name, ["a cat", "birds"], seed=seed)
        rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(["a cat", "birds"])]
        (root / name / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return root


def the_same_refusal(folder: Path, train: Path, queries: Path, run: Path, **more: Any) -> None:
    """By the doctor, who changes nothing, and by a run, in the same sentence."""
    side = more.pop("resolution", 4 if folder.parent.name == "ddpm" else 8)
    found = examine(Inputs(folder, train, queries, run, side, **more))
    assert not run.exists()
    told = [str(finding) for finding in found if finding.level == "error"]
    assert not any("bug in whence" in line for line in told), told

    def attribute() -> None:
        task = Request(folder, train, queries, run, resolution=side, **more).task()
        d_trak(draws=uniform(2), dim=4, damping=0.1)(task)

    with pytest.raises(WhenceError) as error:
        attribute()
    assert "\n" not in str(error.value)
    assert any(str(error.value) in line for line in told), (str(error.value), told)


@pytest.mark.parametrize("case", MODELS)
def test_what_attribute_refuses_of_a_model_the_doctor_finds(case, world, tmp_path):
    name, damage = MODELS[case]
    folder = Path(shutil.copytree(world / name, tmp_path / name / "model"))
    damage(folder)
    size = {"resolution": None} if case == "two sides" else {}
    the_same_refusal(folder, world / "train", world / "queries", tmp_path / "run", **size)


@pytest.mark.parametrize("side", ["train", "queries"])
@pytest.mark.parametrize("case", PICTURES)
def test_what_attribute_refuses_of_pictures_the_doctor_finds(case, side, world, tmp_path):
    folder = Path(shutil.copytree(world / side, tmp_path / side))
    PICTURES[case](folder)
    sides = {"train": world / "train", "queries": world / "queries"} | {side: folder}
    the_same_refusal(world / "sd", **sides, run=tmp_path / "run")


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "a column of no text": ("ddpm", {"caption_column": "text"}),
    "another column": ("sd", {"query_caption_column": "caption"}),
    "a side that the VAE does not divide": ("sd", {"resolution": 9}),
    "classes of none": ("ddpm", {"classes": "cat,dog"}),
    "no LoRA": ("sd", {"adapter": Lora(Path("nowhere"))}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_attribute_refuses_of_options_the_doctor_finds(case, world, tmp_path):
    name, more = OPTIONS[case]
    the_same_refusal(
        Path(shutil.copytree(world / name, tmp_path / name / "model")), world / "train", world / "queries",
        tmp_path / "run", **more,
    )  # fmt: skip


@pytest.mark.parametrize("folder", ["run", "index"])
def test_folders_of_other_runs_are_found(folder, world, tmp_path):
    sides = (world / "train", world / "queries")
    Request(world / "ddpm", *sides[::-1], tmp_path / folder, resolution=4).claim()
    (tmp_path / folder / "scores").mkdir()  # without results it goes on with the images that are the same
    before = sorted(tmp_path.rglob("*"))
    index = tmp_path / "index" if folder == "index" else None
    found = examine(Inputs(world / "ddpm", *sides, tmp_path / "run", 4, index=index))
    told = [str(finding) for finding in found if finding.level == "error"]
    assert sorted(tmp_path.rglob("*")) == before
    with refuses("belongs to another model or data set") as error:
        Request(world / "ddpm", *sides, tmp_path / "run", resolution=4, index=index).task()
    assert [str(error.value) in line for line in told] == [True]


def test_zero_terminal_snr_with_epsilon(world, tmp_path):
    """Pictures that are given are explained; none can be drawn from pure noise, which is told before the first step."""
    folder = Path(shutil.copytree(world / "ddpm", tmp_path / "model"))
    change(SCHEDULER, rescale_betas_zero_snr=True, timestep_spacing="trailing")(folder)
    found = examine(Inputs(folder, None, None, tmp_path / "run", 4))
    assert [finding.level for finding in found if "zero terminal SNR" in str(finding)] == ["warning"]
    with refuses("zero terminal SNR with prediction_type 'epsilon'"):
        task_from_pretrained(folder, world / "train", Sampling(2, 0, 4), tmp_path / "run", resolution=4)
    sides = (world / "train", world / "queries")
    task = task_from_pretrained(folder, *sides, tmp_path / "given", resolution=4)
    assert torch.isfinite(d_trak(draws=uniform(3), dim=8, damping=0.1)(task).values).all()


@pytest.mark.parametrize("name", ["sd", "sdxl", "ddpm"])
def test_what_the_doctor_finds_whole_is_attributed(name, world, tmp_path):
    side = 4 if name == "ddpm" else 8
    found = examine(Inputs(world / name, world / "train", world / "queries", tmp_path / "run", side))
    assert [str(finding) for finding in found if finding.level == "error"] == []
    task = task_from_pretrained(world / name, world / "train", world / "queries", tmp_path / "run", resolution=side)
    assert torch.isfinite(d_trak(draws=uniform(2), dim=4, damping=0.1)(task).values).all()
    assert FAMILIES[name].part == "unet"
