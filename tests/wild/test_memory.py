"""Pictures in memory beside a model folder: seen as the same pictures in a folder, or refused in one line."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from PIL import Image
from test_autoencoders import KINDS
from torch import Tensor

from agreement import close
from errors import refuses
from families import save_index, save_whole
from whence import d_trak, task_from_pretrained, tensor_images, uniform
from whence.data.images import TensorImages, subset
from whence.data.saving import save_png
from whence.types import Batch, Images

CAPTIONS = [{"text": text} for text in ("a red cat", "two birds", "a red cat", "")]
BYTES = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
UNIT, X = BYTES.float() / 255, BYTES.float() / 127.5 - 1
TEXT = {"text": [row["text"] for row in CAPTIONS]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    for name in ("sd", "ddpm"):
        save_index(name, save_whole(name, root / name))
    vae = {**KINDS["VQModel"], "latent_channels": 3, "vq_embed_dim": 3}  # whose latents look like pictures
    VQModel(**vae).save_pretrained(save_index("ddpm", save_whole("ddpm", root / "ldm")) / "vqvae")
    save_png(root / "train", X, list("abcd"), CAPTIONS)
    return root


def seen(model: Path, train: object, root: Path) -> Batch:
    """What the network sees of training images that are the pictures to explain, too."""
    task = task_from_pretrained(model, train, train, root, resolution=8)  # type: ignore[arg-type]
    assert torch.isfinite(d_trak(draws=uniform(2), dim=4, damping=0.1)(task).values).all()
    return task.train.batch(range(len(task.train)))


def named(x: object, **more: object) -> TensorImages:
    return tensor_images(x, ids=list("abcd"), meta=TEXT, **more)  # type: ignore[arg-type]


SAME: dict[str, Images] = {
    "[0, 1]": named(UNIT, value_range=(0, 1)),
    "pictures of PIL": named([Image.fromarray(x.permute(1, 2, 0).numpy()) for x in BYTES]),
    "[-1, 1]": named(X, value_range=(-1, 1)),
    "some of others": subset(tensor_images(X.repeat(2, 1, 1, 1), meta={"text": TEXT["text"] * 2}, value_range=(-1, 1),
                                           ids=list("abcdefgh")), range(4)),
}  # fmt: skip


@pytest.mark.parametrize("model", ["sd", "ldm", "ddpm"])
def test_pictures_in_memory_are_seen_as_those_of_a_folder(model, world, tmp_path):
    expected = seen(world / model, world / "train", tmp_path / "folder")
    for i, images in enumerate(SAME.values()):
        found = seen(world / model, images, tmp_path / str(i))
        close(found.x0, expected.x0)
        assert {*found.cond} == {*expected.cond}
        for key, value in expected.cond.items():
            close(found.cond[key], value)


REFUSED: dict[str, tuple[str, Images, str, str, str]] = {
    "a range that is not said": ("ddpm", named(UNIT), "train", "from 0 to 1", "value_range=(0, 1)"),
    "pictures or latents": ("ldm", named(X), "train", "whether these are or are pictures", "value_range=(-1, 1)"),
    "no caption": ("sd", tensor_images(X), "", "no column 'text'", ""),
    "latents of SD": ("sd", named(torch.randn(4, 4, 4, 4)), "train", "shape [n, 4, 4, 4]", "[n, 3, H, W]"),
    "grey for RGB": ("ddpm", named(X[:, :1]), "train", "shape [n, 1, 8, 8]", "[n, 3, H, W]"),
    "rows": ("ddpm", named(X.flatten(1)), "train", "shape [n, 192]", "[n, 3, H, W]"),
    "beyond [-1, 1]": ("sd", named(torch.cat([X[:3], 40 * X[3:]])), "", "image 'd': a VAE takes floats in", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused(name, world, tmp_path):
    model, images, where, what, accepted = REFUSED[name]
    with refuses(what, where, accepted):
        seen(world / model, images, tmp_path / "run")


def test_another_size_than_that_of_the_model_is_told(world, tmp_path):
    with pytest.warns(UserWarning, match="train: pictures in memory are not resized: 8x8, .* a folder are 4x4"):
        task_from_pretrained(world / "ddpm", named(X), world / "train", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task_from_pretrained(world / "ddpm", named(X), world / "train", tmp_path, resolution=8)


class Ready(TensorImages):
    """What the network takes, by a class of one's own."""

    def batch(self, rows: Sequence[int]) -> Batch:
        found = super().batch(rows)
        return Batch(found.x0, found.keys, {"encoder_hidden_states": torch.ones(len(rows), 5, 8)})


def test_images_of_another_class_are_taken_as_they_are(world, tmp_path):
    latents: Tensor = torch.rand(4, 4, 4, 4)
    images = Ready(**vars(named(latents)))
    assert torch.equal(seen(world / "sd", images, tmp_path).x0, latents)
