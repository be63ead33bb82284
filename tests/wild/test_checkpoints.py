"""Folders called checkpoint-something, of which not all are checkpoints."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from errors import refuses
from families import FAMILIES
from test_encode import CAPTIONS, pictures
from test_lora import peft_lora
from whence import d_trak, task_from_pretrained, tracin, uniform
from whence.models import Lora, open_model
from whence.types import WhenceError


def deepspeed(folder: Path) -> None:
    (folder / "pytorch_model").mkdir(parents=True)
    (folder / "pytorch_model" / "mp_rank_00_model_states.pt").write_bytes(b"")
    (folder / "random_states_0.pkl").write_bytes(b"")


def empty(folder: Path) -> None:
    folder.mkdir()


def pickled(folder: Path) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")


SITUATIONS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "DeepSpeed state": (
        "checkpoint-7",
        deepspeed,
        r"checkpoint-7 has no unet/ \(it holds pytorch_model, random_states_0",
    ),
    "empty": ("checkpoint-7", empty, r"checkpoint-7 has no unet/ \(it holds nothing"),
    "backup": ("checkpoint-3.bak", empty, "checkpoint-3.bak: expected a folder named checkpoint-<step>"),
    "best": ("checkpoint-best", empty, "checkpoint-best: expected a folder named checkpoint-<step>"),
    "pickles": ("checkpoint-7", pickled, "only pickles, which whence never opens"),
}


@pytest.mark.parametrize("case", SITUATIONS)
def test_only_methods_that_read_checkpoints_are_stopped(case, tmp_path):
    name, make, says = SITUATIONS[case]
    model = FAMILIES["ddpm"].save(tmp_path / "model")
    shutil.copytree(model / "unet", model / "checkpoint-3" / "unet")
    (model / "checkpoint-3" / "whence.json").write_text('{"rate": 0.1}')
    make(model / name)
    sides = (pictures(tmp_path / "train", CAPTIONS), pictures(tmp_path / "queries", ["a", "b"], seed=1))
    task = task_from_pretrained(model, *sides, tmp_path / "run", resolution=4)
    assert torch.isfinite(d_trak(draws=uniform(3), dim=8, damping=0.1)(task).values).all()
    with pytest.raises(WhenceError) as error:
        tracin(draws=uniform(3))(task)
    assert re.search(says, str(error.value))
    assert "\n" not in str(error.value)
    shutil.rmtree(model / name)
    again = task_from_pretrained(model, *sides, tmp_path / "run", resolution=4)
    assert torch.isfinite(tracin(draws=uniform(3))(again).values).all()


def test_checkpoints_beside_a_lora(tmp_path):
    base = FAMILIES["sd"].save(tmp_path / "base")
    peft_lora("sd", tmp_path / "lora")
    deepspeed(tmp_path / "lora" / "checkpoint-7")
    model = open_model(base, adapter=Lora(tmp_path / "lora"))
    assert [point.step for point in model.checkpoints] == [7]
    with refuses("checkpoint-7 holds no LoRA weights"):
        model.checkpoints[0].load()
