"""`--report_to`: what a tracker gets, and what is said where it is not installed. Trackers are stood in for, but one."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate.tracking
import pytest

from errors import refuses
from test_cli import TRAINING, World, refused, succeeds, world  # noqa: F401
from whence.storage import trackers
from whence.storage.files import file_digest
from whence.storage.trackers import flat, tracked

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class Kept:
    """Stands for accelerate's TensorBoardTracker and WandBTracker."""

    made: list[tuple[Any, ...]] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    finished: int = 0

    def __call__(self, *words: object, **more: object) -> Kept:
        self.made.append((*words, more))
        return self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, object]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int) -> None:
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def kept(monkeypatch) -> Kept:
    """Both trackers are there, and remember."""
    found = Kept()
    for name in trackers.TRACKERS:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("TensorBoardTracker", "WandBTracker"):
        monkeypatch.setattr(accelerate.tracking, name, found)
    return found


def train(world: World, output: Path, *more: object) -> tuple[object, ...]:  # noqa: F811
    return ("train", "new", "--train_data_dir", world.images, "--output_dir", output, *TRAINING, *more)


def test_a_training_tells_every_step_and_is_the_same(world, kept, tmp_path):  # noqa: F811
    succeeds(*train(world, tmp_path / "a", "--report_to", "tensorboard"))
    assert file_digest(tmp_path / "a" / WEIGHTS) == file_digest(world.model / WEIGHTS)
    assert [step for step, _ in kept.points] == [1, 2, 3, 4, 5, 6]
    assert all(set(values) == {"loss", "learning_rate"} and values["loss"] > 0 for _, values in kept.points)
    assert kept.settings["schedule.steps"] == 6
    assert kept.made == [("whence", str(tmp_path / "a" / "logs"), {})]
    assert kept.finished == 1


def test_a_ledger_tells_every_training(world, kept, tmp_path):  # noqa: F811
    root = tmp_path / "ledger"
    data = ("--train_data_dir", world.images)
    succeeds(
        "ledger", "plan", root, "--model", world.model, *data, "--test", 3, "--tune", 0, "--seeds", 1, "--stack", 1
    )
    succeeds("ledger", "run", root, *data, "--report_to", "tensorboard", "--workers", 1)
    assert [step for step, _ in kept.points] == [0, 1, 2, 3]
    assert all(set(values) == {"last_loss", "seconds", "images"} for _, values in kept.points)
    assert kept.finished == 1
    succeeds("ledger", "verify", root, *data)  # logs/ is no damage


def test_wandb_stays_offline_unless_its_own_variable_says_otherwise(kept, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for mode in (None, "online"):
        if mode:
            monkeypatch.setenv("WANDB_MODE", mode)
        with tracked("wandb", tmp_path, {}):
            pass
        assert kept.made[-1][-1] == {"dir": str(tmp_path / "logs"), "mode": mode or "offline"}


def test_what_goes_wrong_ends_the_tracker_too(kept, tmp_path):
    with pytest.raises(KeyError), tracked("tensorboard", tmp_path, {}):
        raise KeyError
    assert kept.finished == 1


def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(world, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    refused(
        *train(world, tmp_path / "a", "--report_to", "wandb"),
        says="wandb is not installed; accepted: pip install wandb",
    )
    assert not (tmp_path / "a" / "unet").exists()
    refused(
        "ledger", "run", "/nowhere", "--train_data_dir", "/t", "--report_to", "wandb", says="wandb is not installed"
    )
    refused(*train(world, tmp_path / "a", "--report_to", "mlflow"), says="mlflow.*accepted: tensorboard, wandb")
    with refuses("no tracker 'x'", "--report_to", "tensorboard, wandb"), tracked("x", tmp_path, {}):
        pass


def test_settings_have_one_name_each():
    assert flat({"a": {"b": 1, "c": None}, "d": True}) == {"a.b": 1, "a.c": "None", "d": True}


def test_tensorboard_reads_it(world, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    succeeds(*train(world, tmp_path / "a", "--report_to", "tensorboard"))
    found = EventAccumulator(str(tmp_path / "a" / "logs" / "whence")).Reload()
    assert [point.step for point in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert found.Scalars("loss")[0].value > 0
