"""A stranger's first day: what newcomers do with the defaults, and what they are told before anything is spent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import whence
from errors import refuses
from families import save_whole
from test_cli import refused, succeeds
from test_encode import CAPTIONS, pictures
from test_lora import peft_lora
from whence.data.images import TensorImages
from whence.methods import METHODS, build, settings_of
from whence.methods.columns import fitted
from whence.storage.arrays import Store
from whence.storage.scores import load_scores
from worlds import trained_task, unet_task


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion, tiny, a LoRA on it, and pictures with captions."""
    root = tmp_path_factory.mktemp("sd")
    save_whole("sd", root / "sd")
    peft_lora("sd", root / "lora")
    pictures(root / "images", CAPTIONS)
    (root / "prompts.txt").write_text("a red cat\ntwo birds\n")
    return root


# ------------------------------------------------------------------------- columns, and what is refused before it is drawn


def digits() -> tuple[torch.nn.Module, TensorImages, TensorImages]:
    """The classifier of the README: 650 parameters."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    train = whence.tensor_images(torch.rand(20, 1, 8, 8), labels=torch.arange(20) % 10)
    return net, train, whence.tensor_images(torch.rand(3, 1, 8, 8), labels=[3, 1, 4])


@pytest.mark.parametrize("method", ["trak", "gradient_dot", "block_trak", "renormalized_influence", "output_dot"])
def test_the_default_width_takes_a_small_network_as_it_is(method: str, tmp_path: Path) -> None:
    """No more parameters than columns: the exact gradients, which the recipe says; more: the projection."""
    net, *sides = digits()
    model = net, whence.Classifier()
    scores = whence.attribute(model, *sides, method, tmp_path)
    exact = whence.attribute(model, *sides, method, tmp_path, dim=None)
    assert torch.equal(scores.values, exact.values)
    assert scores.recipe["method"] == exact.recipe["method"]
    assert torch.equal(whence.attribute(model, *sides, method, tmp_path, dim=650).values, exact.values)
    narrower = whence.attribute(model, *sides, method, tmp_path, dim=649)
    assert not torch.allclose(narrower.values, exact.values)
    assert "649" in json.dumps(narrower.recipe["method"])


@pytest.mark.parametrize("method", [name for name in METHODS if settings_of(name).get("dim")])
def test_no_method_fails_below_its_columns(method: str, tmp_path: Path) -> None:
    """Of every method that projects by default: no projection is left that has more columns than there are parameters."""
    task = trained_task(tmp_path)
    count = sum(p.numel() for p in task.trajectory[-1].load().parameters())
    made = build(method, task.forward, {"dim": count})
    exact = build(method, task.forward, {"dim": None})
    assert fitted(made, task) == exact
    assert fitted(build(method, task.forward, {"dim": count - 1}), task) != exact


def test_rows_of_a_projection_are_known_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = unet_task(tmp_path)
    first = whence.d_trak(dim=64, draws=2)(task)
    monkeypatch.setattr("whence.methods.columns.prepare", lambda *given: pytest.fail("the network was loaded"))
    assert torch.equal(whence.d_trak(dim=64, draws=2)(task).values, first.values)


def test_the_documented_recipe_of_a_lora(sd: Path, tmp_path: Path) -> None:
    """docs/stable-diffusion.md, with a LoRA of fewer parameters than columns: it is said, and errors are those of draws."""
    words = ("attribute", sd / "sd", "--lora", sd / "lora", "--train_data_dir", sd / "images", "--parameters", "lora")
    drawn = ("--generate", 2, "--prompts", sd / "prompts.txt", "--num_inference_steps", 2, "--draws", 4)
    done = succeeds(*words, *drawn, "--method", "d_trak", "--output_dir", tmp_path)
    (said,) = [line for line in done.out.splitlines() if "exact gradients of" in line]
    count = sum(tensor.numel() for tensor in load_file(sd / "lora" / "adapter_model.safetensors").values())
    assert said == f"d_trak: exact gradients of {count:,} parameters, which are no more than 4,096 columns"
    assert count in {array.width for array in Store(tmp_path).arrays()}
    scores = load_scores(tmp_path / "scores" / "d_trak")
    assert "projection" not in scores.stderr_of
    assert "Identity" in json.dumps(scores.recipe["method"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "tracin"), "checkpoint-N folders"),
        (("--method", "metagradient"), "trains the model again"),
        (("--method", "ek_fac", "--parameters", "lora"), "match none of"),
        (("--method", "d_trak", "--output", "margin"), "for a classifier"),
        (("--method", "pixel_dot", "--method", "d_trak", "--damping", -1), "damping -1"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_drawn(more: tuple, says: str, sd: Path, tmp_path: Path) -> None:
    drawn = ("--generate", 2, "--prompts", sd / "prompts.txt", "--output_dir", tmp_path)
    refused("attribute", sd / "sd", "--train_data_dir", sd / "images", *drawn, *more, says=says)
    assert not (tmp_path / "generated").exists()
    assert not (tmp_path / "latents").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"digests.json"}  # what the images are, for the next try


def test_the_same_in_python(sd: Path, tmp_path: Path) -> None:
    drawn = whence.Sampling(2, 0, 2, ("a red cat", "two birds"))
    for settings, what in (({"draw": 3}, "no setting"), ({"output": "margin"}, "classifier")):
        with refuses(what):
            whence.attribute(sd / "sd", sd / "images", drawn, "d_trak", tmp_path, **settings)
    assert not (tmp_path / "generated").exists()
