"""Whatever `attribute` refuses of a model, `doctor` has found before."""

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
from test_encode import CAPTIONS, pictures
from whence import Sampling, d_trak, task_from_pretrained, uniform
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


WEIGHTS, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
REFUSED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "LCM": ("sd", change("unet/config.json", time_cond_proj_dim=8)),
    "pictures as prompts": ("sd", change("unet/config.json", encoder_hid_dim_type="ip_image_proj")),
    "classes of SD": ("sd", change("unet/config.json", class_embed_type="timestep")),
    "a network that is not known": ("sd", change("unet/config.json", _class_name="UNet3DConditionModel")),
    "a scheduler that is not known": ("sd", change(SCHEDULER, _class_name="EDMEulerScheduler")),
    "a schedule that is not known": ("sd", change(SCHEDULER, beta_schedule="odd")),
    "a prediction that is not known": ("sd", change(SCHEDULER, prediction_type="flow_prediction")),
    "an autoencoder that is not known": ("sd", change("vae/config.json", _class_name="ConsistencyDecoderVAE")),
    "latents of other channels": ("sd", change("vae/config.json", latent_channels=8)),
    "means of latents": ("sd", change("vae/config.json", latents_mean=[0.0] * 4)),
    "a part that is not known": ("sd", change("model_index.json", controlnet=["diffusers", "ControlNetModel"])),
    "no VAE": ("sd", remove("vae")),
    "no VAE of a pixel's channels": ("ddpm", change("model_index.json", vqvae=["diffusers", "VQModel"])),
    "no tokenizer": ("sdxl", remove("tokenizer_2")),
    "weights that are NaN": ("sd", spoil(WEIGHTS, torch.nan)),
    "a VAE that is NaN": ("sd", spoil("vae/diffusion_pytorch_model.safetensors", torch.nan, "encoder.conv_in")),
    "a text encoder that is Inf": ("sd", spoil("text_encoder/model.safetensors", torch.inf)),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("doctor")
    for name in ("sd", "sdxl", "ddpm"):
        save_index(name, save_whole(name, root / name))
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


@pytest.mark.parametrize("case", REFUSED)
def test_what_attribute_refuses_the_doctor_finds(case, world, tmp_path):
    name, damage = REFUSED[case]
    folder = Path(shutil.copytree(world / name, tmp_path / "model"))
    damage(folder)
    side = 4 if name == "ddpm" else 8
    found = examine(Inputs(folder, world / "train", world / "queries", tmp_path / "run", side))
    assert any(finding.level == "error" for finding in found), [*map(str, found)]
    assert not any("bug in whence" in str(finding) for finding in found)

    def run() -> None:
        task = task_from_pretrained(folder, world / "train", world / "queries", tmp_path / "run", resolution=side)
        d_trak(draws=uniform(2), dim=4, damping=0.1)(task)

    with pytest.raises(WhenceError) as error:
        run()
    assert "\n" not in str(error.value)


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
