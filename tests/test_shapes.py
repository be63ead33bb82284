"""Costs counted from shapes: the published sizes of the big models, and plain networks counted by hand."""

import json

import pytest
import torch

from errors import refuses
from families import FAMILIES
from test_cli import refused, succeeds
from whence.doctor.shapes import SPEED, shape_of
from whence.models import TARGETS
from whence.models.lora import new_pairs

SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15 = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, **SD15}
HALF = SD15 | {
    "layers_per_block": 1,
    "block_out_channels": (320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def test_the_unet_of_stable_diffusion():
    """859.52 million parameters; its forward pass about 0.8 TFLOP at 64x64 latents, its backward pass twice that."""
    shape = shape_of("UNet2DConditionModel", SD15)
    assert shape.weights == shape.chosen == 859_520_964
    assert 0.6e12 < shape.forward < 1e12
    assert shape.backward / shape.forward == pytest.approx(2, rel=0.05)
    attention = shape_of("UNet2DConditionModel", SD15, parameters="attention")
    assert attention.chosen < attention.weights == shape.weights
    assert attention.forward == shape.forward
    assert attention.backward < shape.backward
    assert shape.gradients(10, 3) == pytest.approx(30 * (shape.forward + shape.backward) / SPEED)


def test_a_perceptron_by_hand():
    """2 (multiply, add) times every weight of a Linear layer; backward twice that, less the gradient of the input."""
    config = {"sample_size": 8, "in_channels": 1, "width": 32, "layers": 1}
    shape = shape_of("MLPDenoiser", config)
    linears = [(64, 32), (64, 32), (32, 32), *[(32, 32)] * 3, (32, 64)]
    assert shape.forward == 2 * sum(a * b for a, b in linears)
    assert shape.forward < shape.backward <= 2 * shape.forward


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_counted(name):
    family = FAMILIES[name]
    shape = shape_of(family.kind, family.config, 4)
    assert shape.weights == sum(p.numel() for p in family.network().parameters())
    assert shape.activations > 0 < shape.forward < shape.backward
    lora = shape_of(family.kind, family.config, 4, "lora", rank=2)
    pairs = new_pairs(family.network(), TARGETS, 2, 2.0, 0)
    assert lora.chosen == sum(pair.A.numel() + pair.B.numel() for pair in pairs.values())


def test_from_the_command_line(tmp_path):
    (tmp_path / "sd" / "unet").mkdir(parents=True)
    (tmp_path / "sd" / "vae").mkdir()
    (tmp_path / "sd" / "unet" / "config.json").write_text(json.dumps(HALF))
    (tmp_path / "sd" / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [1, 2, 3, 4]}))
    told = succeeds("doctor", tmp_path / "sd", "--shapes", 5000, "--draws", 10).out
    assert "5,000 images, 10 draws" in told
    weights = shape_of("UNet2DConditionModel", HALF).weights
    assert f" {weights / 1e6:.1f} M of {weights / 1e6:.1f} M parameters" in told
    assert [line.split(":")[0].strip() for line in told.splitlines()[1:]] == ["all", "attention", "lora"]
    half = succeeds("doctor", tmp_path / "sd", "--shapes", 5000, "--draws", 10, "--resolution", 256).out
    assert half != told
    refused("doctor", tmp_path, "--shapes", 5, says="neither unet/config.json nor transformer/config.json")
    refused("doctor", "--shapes", 5, says="--shapes applies only with MODEL")
    with refuses("NoSuchNet is not known", accepted="UNet2DModel"):
        shape_of("NoSuchNet", {})
    assert torch.get_default_device() == torch.device("cpu")
