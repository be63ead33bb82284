"""`whence attribute --reference_data_dir`: whether a picture leans on single images at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from test_cli import World, noise, refused, succeeds
from whence.data.saving import save_png
from whence.storage.files import read_json

MANY = 39


@pytest.fixture(scope="module")
def sides(small: World, tmp_path_factory) -> tuple[Path, Path]:
    """Pictures of which the first is a training image with little noise on it, and held-out ones."""
    root = tmp_path_factory.mktemp("references")
    near = (0.97 * noise(1, 0) + 0.03 * noise(1, 7)).clamp(-1, 1)
    save_png(root / "asked", torch.cat([near, noise(3, 8)]), ["near", "a", "b", "c"])
    save_png(root / "held", noise(MANY, 9), [f"h{i:02d}" for i in range(MANY)])
    for side in ("asked", "held"):
        (root / side / "metadata.jsonl").unlink(missing_ok=True)  # what is copied beside them is read, too
    return root / "asked", root / "held"


def call(small: World, sides: tuple[Path, Path], out: Path, *more: object) -> tuple[object, ...]:
    asked = ("--query_data_dir", sides[0], "--reference_data_dir", sides[1], "--copy_rate", 0)
    return ("attribute", small.model, "--train_data_dir", small.images, *asked, "--output_dir", out, "--method", *more)


def test_a_picture_near_a_training_image_stands_out_and_others_do_not(small, sides, tmp_path):
    said = succeeds(*call(small, sides, tmp_path, "pixel_cosine")).out
    assert f"pixel_cosine: 1 of 4 pictures lean on single images more than {MANY} references do" in said
    note = read_json(tmp_path / "scores/pixel_cosine/attributable.json")
    out = dict(zip(note["query_ids"], note["stands_out"], strict=True))
    assert out == {"a.png": False, "b.png": False, "c.png": False, "near.png": True}
    page = (tmp_path / "report.html").read_text()
    assert page.count("No single image stands out:") == 3
    assert page.count("It leans on single training images:") == 1
    assert page.count('<details class="folded">') == 3, "such a ranking is folded away"
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    succeeds("report", tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_later_run_without_references_says_nothing_of_them(small, sides, tmp_path):
    succeeds(*call(small, sides, tmp_path, "pixel_cosine"))
    words = [word for word in call(small, sides, tmp_path, "pixel_cosine")]
    at = words.index("--reference_data_dir")
    succeeds(*words[:at], *words[at + 2 :])
    assert not (tmp_path / "scores/pixel_cosine/attributable.json").exists()
    assert "No single image stands out:" not in (tmp_path / "report.html").read_text()


def test_few_references_say_what_they_cannot_tell(small, sides, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for number in range(5):
        shutil.copy(sides[1] / f"h{number:02d}.png", few)
    succeeds(
        *call(small, (sides[0], few), tmp_path / "run", "pixel_cosine"),
        warns="5 references allow no p-value below 0.17: at a rate of 0.1 no picture can stand out; give 9 or more",
    )


def test_mistakes_with_references(small, sides, tmp_path):
    trained = tmp_path / "trained"
    shutil.copytree(sides[1], trained)
    shutil.copy(small.images / "03.png", trained / "mine.png")
    refused(
        *call(small, (sides[0], trained), tmp_path / "run", "pixel_cosine"),
        says="references: 1 of 40 references are training images: mine.png = 03.png; accepted: pictures that are neither",
    )
    asked = tmp_path / "asked"
    shutil.copytree(sides[1], asked)
    shutil.copy(sides[0] / "a.png", asked / "again.png")
    refused(
        *call(small, (sides[0], asked), tmp_path / "run", "pixel_cosine"),
        says="1 of 40 references are pictures to explain: again.png = a.png",
    )
    refused(*call(small, (sides[0], tmp_path / "nowhere"), tmp_path / "run", "pixel_cosine"), says="nowhere")
    refused(
        *call(small, sides, tmp_path / "run", "pixel_cosine", "--false_discovery_rate", 10),
        says="--false_discovery_rate 10; accepted: above 0 and below 1",
    )
    words = ("attribute", small.model, "--train_data_dir", small.images, "--query_data_dir", sides[0])
    refused(
        *words, "--output_dir", tmp_path / "run", "--false_discovery_rate", 0.2,
        says="--false_discovery_rate applies only with --reference_data_dir",
    )  # fmt: skip
    assert not (tmp_path / "run/scores").exists()
