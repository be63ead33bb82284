"""Latent models whose autoencoder is of another class, or lies elsewhere; and pipelines with parts that we do not know."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from agreement import close
from errors import refuses
from families import FAMILIES, UNET, save_index, save_whole
from test_encode import CAPTIONS, pictures
from whence import Sampling, d_trak, task_from_pretrained, uniform
from whence.data.images import image_folder
from whence.doctor import Inputs, examine
from whence.models import encode_images, open_model, sample
from whence.types import Engine, WhenceError

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DC = {
    "attention_head_dim": 2, "encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4),
    "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock", "encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ()),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**BLOCKS, "block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 4},
    "AsymmetricAutoencoderKL": {
        **BLOCKS, "down_block_out_channels": (4, 4), "up_block_out_channels": (4, 4), "norm_num_groups": 2,
    },
    "VQModel": {
        **BLOCKS, "block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 6, "vq_embed_dim": 4,
        "num_vq_embeddings": 16,
    },
    "AutoencoderTiny": {
        "encoder_block_out_channels": (4, 4), "decoder_block_out_channels": (4, 4), "num_encoder_blocks": (1, 1),
        "num_decoder_blocks": (1, 1),
    },
    "AutoencoderDC": {**DC, "latent_channels": 4},
}  # fmt: skip


def latent_model(folder: Path, kind: str, part: str, **changes: Any) -> Path:
    """A Stable Diffusion with another autoencoder."""
    save_whole("sd", folder)
    shutil.rmtree(folder / "vae")
    torch.manual_seed(5)
    getattr(diffusers, kind)(**{**KINDS[kind], **changes}).save_pretrained(folder / part)
    return save_index("sd", folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


@pytest.mark.parametrize(
    ("kind", "part"),  # where it lies and what it is are found apart
    [*((kind, "vae") for kind in KINDS), *zip(KINDS, ("movq", "first_stage", "vqvae"), strict=False)],
)
def test_every_image_autoencoder_is_read(kind, part, data, tmp_path):
    """Latents and their inverse are its own; the doctor finds nothing wrong, and there are scores."""
    folder = latent_model(tmp_path / "model", kind, part)
    images = image_folder(data / "train", 8)
    model = open_model(folder)
    assert (model.resolution, model.channels) == (8, 3)
    vae = getattr(diffusers, kind).from_pretrained(folder / part).eval()
    with torch.no_grad():
        made = vae.encode(images.batch(range(6)).x0, return_dict=False)[0]
        z = made.mode() if "KL" in kind else made
        expected = (z - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
        back = vae.decode(z).sample.clamp(-1, 1)
    found = encode_images(model, images, tmp_path / "run").batch(range(6)).x0
    close(found, expected, 1e-5)
    close(model.parts(_ENGINE).pictures(found, 4), back, 1e-4)
    told = examine(Inputs(folder, data / "train", data / "queries", tmp_path / "run", 8))
    assert [str(finding) for finding in told if finding.level == "error"] == []
    if part != "vae":
        return
    task = task_from_pretrained(folder, data / "train", data / "queries", tmp_path / "scores", resolution=8)
    assert torch.isfinite(d_trak(draws=uniform(3), dim=8, damping=0.1)(task).values).all()


def unconditional(folder: Path, channels: int = 3) -> Path:
    """As CompVis/ldm-celebahq-256 is: UNet2DModel of three channels, and a VQModel in vqvae/."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    torch.manual_seed(3)
    config = {**UNET, **blocks, "in_channels": channels, "out_channels": channels}
    diffusers.UNet2DModel(**config).save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    vq = {**KINDS["VQModel"], "latent_channels": 3, "vq_embed_dim": None}
    diffusers.VQModel(**vq).save_pretrained(folder / "vqvae")
    return save_index("sd", folder, diffusers.DiffusionPipeline)


_ENGINE = Engine()


@pytest.mark.parametrize("indexed", [True, False])
def test_latents_of_three_channels_are_no_pixels(indexed, data, tmp_path):
    folder = unconditional(tmp_path / "model")
    if not indexed:
        (folder / "model_index.json").write_text('{"_class_name": "LDMPipeline"}')
    model = open_model(folder)
    assert model.resolution == 8
    assert sample(model, 2, 0, 3).shape == (2, 3, 8, 8)
    assert encode_images(model, image_folder(data / "train", 8), tmp_path / "run").batch([0]).x0.shape == (1, 3, 4, 4)
    assert (
        task_from_pretrained(folder, data / "train", Sampling(2, 0, 3), tmp_path / "drawn").queries.batch([0]).x0.shape
    )


def test_an_autoencoder_that_is_promised_and_not_there(data, tmp_path):
    folder = unconditional(tmp_path / "model")
    shutil.rmtree(folder / "vqvae")
    with refuses("vqvae/ is missing, but the network takes latents"):
        encode_images(open_model(folder), image_folder(data / "train", 4), tmp_path / "run")
    found = examine(Inputs(folder, None, None, tmp_path / "run", 4))
    assert any(finding.level == "error" and "vqvae/ is missing" in str(finding) for finding in found)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    # entries of model_index.json, classes of further folders, what is said
    "a video autoencoder": ({}, {"vae": "AutoencoderKLTemporalDecoder"}, "'AutoencoderKLTemporalDecoder' is not supported"),
    "an autoencoder of another kind": ({}, {"vae": "ConsistencyDecoderVAE"}, "'ConsistencyDecoderVAE' is not supported"),
    "two autoencoders": ({"movq": ["diffusers", "VQModel"]}, {"movq": "VQModel"}, "has 2 autoencoders"),
    "a ControlNet": ({"controlnet": ["diffusers", "ControlNetModel"]}, {}, r"the part controlnet \(ControlNetM"),
    "a prior": ({"prior": ["diffusers", "PriorTransformer"]}, {}, r"the part prior \(PriorTransformer\) of this"),
    "a second network": ({"unet_2": ["diffusers", "UNet2DConditionModel"]}, {}, r"the part unet_2 \(UNet2DCond"),
    "BERT": ({"bert": ["latent_diffusion", "LDMBertModel"]}, {}, r"the part bert \(LDMBertModel\) of this"),
    "a text encoder too many": ({"text_encoder_2": ["transformers", "T5EncoderModel"]}, {}, r"the part text_encoder_2 \(T5"),
    "a network that lies there": ({}, {"controlnet": "ControlNetModel"}, r"the part controlnet \(ControlNetModel\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_no_part_is_left_out_in_silence(case, tmp_path):
    entries, classes, says = REFUSED[case]
    folder = save_index("sd", save_whole("sd", tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    for name, kind in classes.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(WhenceError) as error:
        encode_images(open_model(folder), None, tmp_path)  # type: ignore[arg-type]
    assert re.search(says, str(error.value))
    assert "\n" not in str(error.value)
    found = examine(Inputs(folder, None, None, tmp_path / "run", 8))
    assert any(finding.level == "error" and re.search(says, str(finding)) for finding in found)


@pytest.mark.parametrize("name", ["safety_checker", "feature_extractor", "image_encoder"])
def test_parts_that_touch_nothing_are_no_hindrance(name, tmp_path):
    folder = save_index("sd", save_whole("sd", tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), name: ["transformers", "Anything"]}))
    open_model(folder)


def test_a_sample_is_refused_where_there_is_none(data, tmp_path):
    folder = latent_model(tmp_path / "model", "AutoencoderTiny", "vae")
    with refuses("AutoencoderTiny has no posterior to draw a sample from"):
        encode_images(open_model(folder), image_folder(data / "train", 8), tmp_path / "run", sample=0)


def test_every_family_with_its_index_is_opened(tmp_path):
    """The parts that a family has are known."""
    from families import BY_DIFFUSERS

    for name in BY_DIFFUSERS:
        assert open_model(save_index(name, save_whole(name, tmp_path / name))).part == FAMILIES[name].part
