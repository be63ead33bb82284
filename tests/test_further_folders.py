"""further_training from nothing but a folder and its images: models that no command of whence has trained."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from families import save_index, save_whole
from test_cli import whence
from test_lora import peft_lora
from whence.data.saving import save_png
from whence.storage.files import file_digest
from whence.storage.scores import load_scores

SHORT = (
    "--method",
    "further_training",
    "--set",
    "masks=2",
    "--set",
    "steps=3",
    "--set",
    "resample_draws=2",
    "--draws",
    20,
)


def plain_script(images, folder):
    """What people write: nothing of whence, no log, no seed that is kept."""
    names = sorted(images.glob("*.png"))
    x = torch.stack([torch.frombuffer(bytearray(Image.open(n).tobytes()), dtype=torch.uint8) for n in names])
    x = x.reshape(len(names), 8, 8, 3).permute(0, 3, 1, 2) / 127.5 - 1
    net = UNet2DModel(8, 3, 3, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                      down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    scheduler, optimizer = DDPMScheduler(), torch.optim.AdamW(net.parameters(), 5e-3)
    for _ in range(100):
        batch, t = x[torch.randperm(len(x))[:8]], torch.randint(1000, (8,))
        noise = torch.randn_like(batch)
        loss = (net(scheduler.add_noise(batch, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    DDPMPipeline(net, scheduler).save_pretrained(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixteen pictures of plain colours with some noise; the queries are eight of them."""
    root = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(0)
    colours = (torch.rand(16, 3, 1, 1, generator=g) * 2 - 1).expand(16, 3, 8, 8)
    x0 = (colours + 0.1 * torch.randn(16, 3, 8, 8, generator=g)).clamp(-1, 1)
    save_png(root / "images", x0, [f"{i:02d}" for i in range(16)], [{"text": "a b", "label": i % 2} for i in range(16)])
    save_png(root / "queries", x0[:8], [f"q{i}" for i in range(8)], [{"text": "a b", "label": i % 2} for i in range(8)])
    return root


def attributed(model, pictures, root, *options):
    """The scores, and what was said; the model's files are as they were."""
    before = {path: file_digest(path) for path in model.rglob("*") if path.is_file()}
    done = whence("attribute", model, "--train_data_dir", pictures / "images", "--query_data_dir",
                    pictures / "queries", "--output_dir", root, *SHORT, *options)  # fmt: skip
    assert done.code == 0, done.err
    assert {path: file_digest(path) for path in model.rglob("*") if path.is_file()} == before
    return load_scores(root / "scores" / "further_training").values, done.out + done.err


def test_a_model_of_a_plain_script_finds_the_picture_itself(pictures, tmp_path):
    torch.manual_seed(0)
    plain_script(pictures / "images", tmp_path / "model")
    scores, _ = attributed(tmp_path / "model", pictures, tmp_path / "run", "--set", "steps=10")
    places = (scores > scores.diagonal()[:, None]).sum(1).double()
    assert float(places.mean()) < 4.5, "each query is one of the sixteen pictures; by chance its place would be 7.5"


def test_a_lora_that_peft_saved(pictures, tmp_path):
    model = save_whole("sd", tmp_path / "sd")
    save_index("sd", model)
    peft_lora("sd", tmp_path / "lora")
    scores, _ = attributed(model, pictures, tmp_path / "run", "--lora", tmp_path / "lora")
    assert scores.shape == (8, 16)
    assert bool((scores != 0).any(1).all())


def test_a_class_conditional_transformer(pictures, tmp_path):
    model = save_whole("dit", tmp_path / "dit")
    save_index("dit", model)
    scores, _ = attributed(model, pictures, tmp_path / "run")
    assert bool((scores != 0).any(1).all())
