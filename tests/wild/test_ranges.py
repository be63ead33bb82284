"""Which numbers are black and white: said, or plain, or asked for; the same pictures give the same scores in every range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_tensors import FORWARDS, Net
from torch import Tensor, nn

from agreement import close
from errors import refuses
from whence import Classifier, attribute, image_folder, tensor_images
from whence.data.images import subset
from whence.data.saving import save_png
from whence.types import Images

BYTES = torch.randint(0, 256, (8, 1, 4, 4), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
X = BYTES.float() / 127.5 - 1
UNIT = BYTES.float() / 255
OVERSHOOT = UNIT * 1.06 - 0.03  # as after a bicubic resize
DENOISER, CLASSIFIER = (Net(), FORWARDS["epsilon"]), (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), Classifier())


def scores(train: object, queries: object, root: Path) -> Tensor:
    return attribute(DENOISER, train, queries, "gradient_dot", root, dim=None, draws=3).values  # type: ignore[arg-type]


def pil(x: Tensor) -> list[Image.Image]:
    return [Image.fromarray(one[0].numpy()) for one in x]


SAID: dict[str, Callable[[slice], Images]] = {
    "[0, 1]": lambda at: tensor_images(UNIT[at], value_range=(0, 1)),
    "doubles": lambda at: tensor_images(UNIT.double()[at], value_range=(0, 1)),
    "halves": lambda at: tensor_images(BYTES[at].half(), value_range=(0, 255)),
    "bytes": lambda at: tensor_images(BYTES[at], value_range=(0, 255)),
    "floats to 255": lambda at: tensor_images(BYTES[at].float(), value_range=(0, 255)),
    "16 bits": lambda at: tensor_images(BYTES[at].numpy().astype(np.uint16) * 257, value_range=(0, 65535)),
    "an array": lambda at: tensor_images(UNIT[at].numpy(), value_range=(0, 1)),
    "a list of arrays": lambda at: tensor_images([one.numpy() for one in BYTES[at]], value_range=(0, 255)),
    "pictures of PIL": lambda at: tensor_images(pil(BYTES[at])),
    "as the network takes them": lambda at: tensor_images(X[at], value_range=(-1, 1)),
}


@pytest.mark.parametrize("name", SAID)
def test_a_range_that_is_said_is_brought_to_that_of_the_network(name):
    found = SAID[name](slice(0, 8))
    assert found.batch([0]).x0.is_floating_point()
    close(found.batch(range(8)).x0.float(), X)


TRAIN, QUERIES = slice(0, 5), slice(5, 8)
GIVEN: dict[str, tuple[object, object]] = {
    "[-1, 1]": (X[TRAIN], X[QUERIES]),
    "bytes and [-1, 1]": (SAID["bytes"](TRAIN), X[QUERIES]),
    "[-1, 1] and PIL": (X[TRAIN], pil(BYTES[QUERIES])),
    "PIL": (pil(BYTES[TRAIN]), pil(BYTES[QUERIES])),
    "bright ones, said": (X[TRAIN], tensor_images(X[QUERIES].abs(), value_range=(-1, 1))),
    "[0, 1], as the network takes them": tuple(
        tensor_images(UNIT[at], value_range=(-1, 1)) for at in (TRAIN, QUERIES)
    ),
}  # fmt: skip


def test_ranges_that_are_known_are_taken(tmp_path):
    """The noise is keyed by content, which rounding changes: the same bytes in the same form."""
    found = {name: scores(*given, tmp_path / str(i)) for i, (name, given) in enumerate(GIVEN.items())}
    assert all(torch.isfinite(each).all() for each in found.values())
    assert not torch.allclose(found["[0, 1], as the network takes them"], found["[-1, 1]"])


ASKED: dict[str, tuple[object, object, str, str]] = {
    "[0, 1]": (UNIT[TRAIN], X[QUERIES], "train", "value_range=(0, 1)) for black and white"),
    "[0, 1] resized": (OVERSHOOT[TRAIN], X[QUERIES], "train", "value_range=(0, 1)"),
    "an array": (UNIT[TRAIN].numpy(), X[QUERIES], "train", "value_range=(0, 1)"),
    "a list": (list(UNIT[TRAIN]), X[QUERIES], "train", "value_range=(0, 1)"),
    "Images": (tensor_images(UNIT[TRAIN]), X[QUERIES], "train", "value_range=(0, 1)"),
    "some of others": (subset(tensor_images(UNIT), [0, 1]), X[QUERIES], "train", "value_range=(0, 1)"),
    "floats to 255": (BYTES[TRAIN].float(), X[QUERIES], "train", "value_range=(0, 255)"),
    "bytes as Images": (tensor_images(BYTES[TRAIN]), X[QUERIES], "train", "value_range=(0, 255)"),
    "truth values": (BYTES[TRAIN] > 100, X[QUERIES], "train", "value_range=(0, 1)"),
    "queries": (X[TRAIN], UNIT[QUERIES], "queries", "value_range=(0, 1)"),
    "queries beside said ones": (SAID["[0, 1]"](TRAIN), UNIT[QUERIES], "queries", "value_range=(0, 1)"),
    "queries of another range": (
        tensor_images(UNIT[TRAIN], value_range=(-1, 1)), X[QUERIES], "queries", "(-1, 1)), in the same range",
    ),
    "queries brought to another range": (
        tensor_images(UNIT[TRAIN], value_range=(-1, 1)), SAID["[0, 1]"](QUERIES), "queries", "in the same range",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_ranges_are_not_guessed(name, tmp_path):
    """Before the run folder is bound to pictures in the wrong range."""
    train, queries, where, accepted = ASKED[name]
    with refuses(where=where, accepted=accepted):
        scores(train, queries, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_beside_other_ranges(tmp_path):
    save_png(tmp_path / "queries", X[QUERIES], ["a", "b", "c"])
    folder = image_folder(tmp_path / "queries", channels=1)
    assert torch.isfinite(scores(X[TRAIN], folder, tmp_path / "run")).all()
    with refuses("training images are taken as they are, from 0 to 1", "queries", "value_range=(-1, 1)"):
        scores(tensor_images(UNIT[TRAIN], value_range=(-1, 1)), folder, tmp_path / "other")


def test_a_classifier_takes_what_it_was_trained_on(tmp_path):
    images = tensor_images(UNIT, labels=[0, 1, 2, 0, 1, 2, 0, 1])
    found = attribute(CLASSIFIER, images, images, "gradient_dot", tmp_path, dim=None).values
    assert torch.isfinite(found).all()


WRONG: dict[str, tuple[object, object, str, str]] = {
    "turned": (UNIT, (1, 0), "(1, 0) is no range", "(0, 1), (0, 255)"),
    "one number": (UNIT, 255, "255 is no range", "(0, 1), (0, 255)"),
    "infinite": (UNIT, (0, float("inf")), "is no range", "(0, 1), (0, 255)"),
    "too narrow": (BYTES, (0, 1), "they go from 0 to 255", "values in (0, 1)"),
    "negative": (X, (0, 1), "they go from -1 to 1", "values in (0, 1)"),
    "resized": (OVERSHOOT, (0, 1), "they go from -0.03 to 1.03", "values in (0, 1)"),
    "too wide": (UNIT, (0, 255), "a hundredth of (0, 255)", "value_range=(0, 1)"),
    "of pictures of PIL": (pil(BYTES), (0, 1), "have bytes, not (0, 1)", "no value_range"),
    "mixed modes": ([*pil(BYTES), Image.new("RGB", (4, 4))], None, "as L 4x4, RGB 4x4", "all RGB or all L"),
    "other modes": ([Image.new("RGBA", (4, 4))], None, "as RGBA 4x4", "convert('RGB')"),
    "sizes": ([Image.new("L", (4, 4)), Image.new("L", (5, 4))], None, "as L 4x4, L 5x4", "of one size"),
    "a picture and an array": ([*pil(BYTES), BYTES[0].numpy()], None, "as L 4x4, ndarray", "all RGB or all L"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_range_that_does_not_fit_is_refused(name):
    given, value_range, what, accepted = WRONG[name]
    with refuses(what=what, accepted=accepted):
        tensor_images(given, value_range=value_range)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_of_pil_are_what_their_files_are(mode, tmp_path):
    count = {"L": 1, "RGB": 3}[mode]
    x0 = torch.randint(0, 256, (3, count, 5, 4), generator=torch.Generator().manual_seed(5)).float() / 127.5 - 1
    save_png(tmp_path / "a", x0, ["a", "b", "c"])
    files = image_folder(tmp_path / "a", channels=count)
    opened = [Image.open(tmp_path / "a" / name) for name in files.ids]
    assert torch.equal(tensor_images(opened).x0, files.batch([0, 1, 2]).x0)


def test_a_black_picture_is_one():
    assert torch.equal(tensor_images(torch.zeros(1, 1, 4, 4), value_range=(0, 1)).x0, -torch.ones(1, 1, 4, 4))
