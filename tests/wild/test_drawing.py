"""Pictures are those of diffusers' own pipeline of the family, its defaults included, from the same noise."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from test_lora_files import conditions
from torch import Tensor

from agreement import close
from errors import refuses
from families import BY_DIFFUSERS, FAMILIES, save_index, save_whole
from test_cli import refused
from test_encode import CAPTIONS, pictures
from whence.data.images import image_folder
from whence.models import encode_images, guidance_of, open_model, sample, with_token
from whence.models.networks import NETWORKS as FAMILIES_OF_WHENCE
from whence.models.sampling import draw_with_text, noise_of
from whence.types import Engine

STEPS, PROMPTS = 4, [" A red Cat", "two birds"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawing")
    for name in BY_DIFFUSERS:
        if name != "dit":
            save_index(name, save_whole(name, root / name))
    thousand = replace(FAMILIES["dit"], config={**FAMILIES["dit"].config, "num_embeds_ada_norm": 1000})
    with mock.patch.dict(FAMILIES, dit=thousand):  # the number of classes that its pipeline knows
        save_index("dit", save_whole("dit", root / "dit"))
    return root


def edited(world: Path, name: str, to: Path, scheduler: dict[str, Any], index: dict[str, Any]) -> Path:
    folder = Path(shutil.copytree(world / name, to))
    for path, changes in (
        (folder / "scheduler" / "scheduler_config.json", scheduler),
        (folder / "model_index.json", index),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def by_pipeline(name: str, folder: Path, noise: Tensor, options: dict[str, Any]) -> Tensor:
    """As floats in [-1, 1]; by DDIM where the family is none of flow matching."""
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if not FAMILIES[name].flow:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": STEPS, "output_type": "pt", **options}
    if name == "dit":
        with mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=noise):
            return 2 * pipe([0, 1], **options).images - 1
    if name == "ddpm":
        with mock.patch("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", return_value=noise):
            options["output_type"] = "np"
            return 2 * torch.from_numpy(pipe(len(noise), **options).images).permute(0, 3, 1, 2) - 1
    if name.startswith("flux"):
        noise = pipe._pack_latents(noise, *noise.shape)
    if name.startswith("pixart"):
        options["use_resolution_binning"] = False
    return 2 * pipe(PROMPTS, height=8, width=8, latents=noise, **options).images - 1


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: family, changes of the scheduler's configuration, of model_index.json, options of both
    **{name: (name, {}, {}, {}) for name in BY_DIFFUSERS},
    "sd, guidance": ("sd", {}, {}, {"guidance_scale": 3.0}),
    "sd, no guidance": ("sd", {}, {}, {"guidance_scale": 1.0}),
    "sd, guidance below one": ("sd", {}, {}, {"guidance_scale": 0.5}),
    "sd, schedule of SD": ("sd", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {}, {}),
    "sd, v prediction": ("sd", {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}, {}, {}),
    "sd, zero terminal SNR": (
        "sd",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {},
        {},
    ),
    "sdxl, no zeros": ("sdxl", {}, {"force_zeros_for_empty_prompt": False}, {}),
    # A guidance of 9 multiplies the rounding of float32 by 17, on some processors beyond the bound.
    "sdxl, zeros": ("sdxl", {}, {"force_zeros_for_empty_prompt": True}, {"guidance_scale": 3.0}),
    "sdxl, not clipped": ("sdxl", {"clip_sample": False}, {}, {}),
    "sd3, shifted": ("sd3", {"shift": 3.0}, {}, {}),
    "sd3, shifted by size": ("sd3", {"use_dynamic_shifting": True, "base_image_seq_len": 2}, {}, {}),
    "flux, shifted": ("flux", {"shift": 3.0}, {}, {}),
    "flux, shifted by size": (
        "flux",
        {"use_dynamic_shifting": True, "base_image_seq_len": 2, "max_shift": 3.0},
        {},
        {},
    ),
    "flux, guidance": ("flux with guidance", {}, {}, {"guidance_scale": 700.0}),
    "pixart sigma": ("pixart", {"clip_sample": False}, {"_class_name": "PixArtSigmaPipeline"}, {}),
    "pixart, guidance": ("pixart", {}, {}, {"guidance_scale": 2.0}),
    "dit, no guidance": ("dit", {}, {}, {"guidance_scale": 1.0}),
    "ddpm, not clipped": ("ddpm", {"clip_sample": False, "timestep_spacing": "trailing"}, {}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_drawing_is_that_of_the_pipeline(case, world, tmp_path):
    name, scheduler, index, options = CASES[case]
    folder = edited(world, name, tmp_path / "model", scheduler, index)
    model = open_model(folder)
    noise = noise_of(model, range(2), 3, model.resolution if name in ("dit", "ddpm") else 8)
    theirs = by_pipeline(name, folder, noise.clone(), options)
    scale = options.get("guidance_scale")
    if name in ("dit", "ddpm"):
        labels = torch.arange(2) if name == "dit" else None
        ours = sample(model, 2, 3, STEPS, labels, guidance=scale)
    else:
        ours = draw_with_text(model, PROMPTS, 3, STEPS, scale, Engine(), 8)
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float(theirs.std()) > 1e-2


@pytest.mark.parametrize("schedule", ["sigmoid", "laplace"])
@pytest.mark.parametrize("zero", [True, False])
def test_schedules_that_ddim_does_not_know(schedule, zero, world, tmp_path):
    """Against the formula of DDIM: x0 and noise from v, and one step down."""
    changes = {"beta_schedule": schedule, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    folder = edited(
        world, "ddpm", tmp_path / "model", {**changes, "rescale_betas_zero_snr": zero, "clip_sample": False}, {}
    )
    model = open_model(folder)
    bar, network, x = model.forward.alphas_cumprod, model.final.load().eval(), noise_of(model, range(2), 3, 4)
    times = [999, 749, 499, 249]
    with torch.no_grad():
        for t, following in zip(times, [*times[1:], None], strict=True):
            a, s = bar[t].sqrt().float(), (1 - bar[t]).sqrt().float()
            v = network(x, torch.full((2,), t)).sample
            x0, eps = a * x - s * v, a * v + s * x
            after = torch.ones(()) if following is None else bar[following].float()
            x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    assert float((sample(model, 2, 3, STEPS) - x.clamp(-1, 1)).abs().max()) < 1e-4


@pytest.mark.parametrize(("name", "told"), [("ddpm", ()), ("flux", ("--prompts", "prompts.txt"))])
def test_guidance_that_a_model_does_not_have_is_refused(name, told, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat")
    assert guidance_of(open_model(world / name), 2.0) is None
    pictures(tmp_path / "train", CAPTIONS)
    drawn = ("--generate", 1, *told, "--guidance_scale", 2, "--output_dir", tmp_path / "run")
    refused(
        "attribute", world / name, "--train_data_dir", tmp_path / "train", *drawn, says="has no guidance; accepted: no"
    )


def masking(world: Path, name: str, to: Path) -> Path:
    """A pipeline whose text encoders ask for a mask of the tokens that only fill up."""
    folder = Path(shutil.copytree(world / name, to))
    for path in folder.glob("text_encoder*/config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_attention_mask": True}))
    return folder


@pytest.mark.parametrize(("name", "heeded"), [("sd", True), ("sdxl", False), ("sd3", False), ("flux", False)])
def test_a_mask_of_the_text_is_heeded_where_the_pipeline_heeds_it(name, heeded, world, tmp_path):
    """In embeddings, in their key and in drawing."""
    plain, folder = open_model(world / name), masking(world, name, tmp_path / "model")
    model, pipe = open_model(folder), BY_DIFFUSERS[name].from_pretrained(folder)
    images = image_folder(pictures(tmp_path / "train", [PROMPTS[0]]), 8)
    found, without = (encode_images(each, images, tmp_path / "run", tokens=7) for each in (model, plain))
    with torch.no_grad():
        expected = conditions(name, pipe, PROMPTS[0])
    for key, value in expected.items():
        close(found.batch([0]).cond[key], value, 1e-6)
    states = [each.batch([0]).cond["encoder_hidden_states"] for each in (found, without)]
    assert torch.allclose(*states, rtol=1e-3) != heeded
    assert ("masked" in found.describe()) == heeded
    noise = noise_of(model, range(2), 3, 8)
    drawn = draw_with_text(model, PROMPTS, 3, STEPS, None, Engine(), 8)
    assert float((drawn - by_pipeline(name, folder, noise, {})).abs().max()) < 1e-4


def test_a_mask_of_the_text_beside_custom_diffusion_is_refused(world, tmp_path):
    with refuses("use_attention_mask is set", "text_encoder/config.json", "a text encoder without it"):
        with_token(open_model(masking(world, "sd", tmp_path / "model")), "<new1>")


WILD = " A <person> at https://example.com/a.png &amp; 20% OFF!!!  --ar 16:9 #cat 12345678 "


def test_prompts_of_pixart_are_cleaned_as_its_pipeline_cleans_them(monkeypatch):
    """With both libraries; without one of them the pipeline does not clean, and that is told."""
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as theirs

    prompt = FAMILIES_OF_WHENCE["PixArtTransformer2DModel"].drawing.prompt
    pipe = diffusers.PixArtAlphaPipeline.__new__(diffusers.PixArtAlphaPipeline)
    for name in ("bs4", "ftfy"):
        monkeypatch.setattr(theirs, f"is_{name}_available", lambda: False)
    with pytest.warns(UserWarning, match="beautifulsoup4 and ftfy are not installed: .* not cleaned"):
        assert prompt(WILD) == pipe._text_preprocessing(WILD, clean_caption=True)[0] == WILD.lower().strip()
    for name in ("bs4", "ftfy"):
        monkeypatch.setattr(theirs, f"is_{name}_available", lambda: True)
    monkeypatch.setattr(theirs, "BeautifulSoup", lambda text, features: mock.Mock(text=text), raising=False)
    monkeypatch.setattr(theirs, "ftfy", mock.Mock(fix_text=lambda text: text.replace("  ", " ")), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompt(WILD) == pipe._text_preprocessing(WILD, clean_caption=True)[0]
        assert "<person>" not in prompt(WILD)
        assert "http" not in prompt(WILD)
