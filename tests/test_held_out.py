"""`whence train --validation_data_dir`: the loss of pictures that do not train is shown and kept, and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from test_cli import TRAINING, noise, refused, succeeds
from test_cli import whence as shell
from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.features.gradients import measure
from whence.models import open_model
from whence.training.checkpoints import study_of
from whence.training.held_out import DRAWS
from whence.types import Draw


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained beside held-out pictures."""
    folder = tmp_path_factory.mktemp("held")
    save_png(folder / "images", noise(8, 0), [f"{i:02d}" for i in range(8)])
    save_png(folder / "held", noise(3, 1), [f"q{i}" for i in range(3)])
    told = succeeds(*words(folder, "model"), "--validation_data_dir", folder / "held").out
    assert f"held-out loss: {losses(folder / 'model')[-1][1]:.4g} after 6 steps" in told
    return folder


def words(root: Path, name: str) -> tuple[object, ...]:
    return ("train", "new", "--train_data_dir", root / "images", "--output_dir", root / name, *TRAINING)


def losses(model: Path) -> list[list[float]]:
    found: list[list[float]] = json.loads((model / "validation.json").read_text())["losses"]
    return found


def test_what_is_kept_is_the_loss_of_the_model_that_is_written(root: Path) -> None:
    model, images = open_model(root / "model"), image_folder(root / "held", 8, 1)
    network, study = model.final.load().eval(), study_of(root / "model")
    forward, batch = study.forward(), images.batch(range(3))
    draw = DRAWS(batch.keys, batch.x0.shape[1:], forward.timesteps, torch.float32)
    with torch.no_grad():
        each = [
            measure(network, {}, forward, study.recipe.loss, batch, Draw(draw.t[:, k], draw.noise[:, k]))
            for k in range(DRAWS.count)
        ]
    assert [step for step, _ in losses(root / "model")] == [3, 6]
    assert losses(root / "model")[-1][1] == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


def test_it_changes_nothing_and_may_be_asked_for_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training without it ends with the same bytes; asked about when it is over, the last loss is told."""
    succeeds(*words(root, "plain"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (root / "plain" / weights).read_bytes() == (root / "model" / weights).read_bytes()
    assert not (root / "plain" / "validation.json").exists()
    succeeds(*words(root, "plain"), "--validation_data_dir", root / "held")
    assert losses(root / "plain") == losses(root / "model")[-1:]


def test_it_is_shown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHENCE_QUIET", "0")
    recipe = ("train", root / "model" / "recipe.toml", "--train_data_dir", root / "images", "--checkpointing_steps", 3)
    done = shell(*recipe, "--output_dir", root / "again", "--validation_data_dir", root / "held")
    assert "held out" in done.err
    assert losses(root / "again") == losses(root / "model")


def test_training_images_are_not_held_out(root: Path, tmp_path: Path) -> None:
    says = "8 of 8 pictures are training images, such as '00.png'; accepted: pictures that do not train the model"
    refused(*words(root, "other"), "--validation_data_dir", root / "images", says=says)
    assert not list((root / "other").glob("checkpoint-*"))
