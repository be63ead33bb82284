"""TracIn against captum 0.9.0's TracInCP: two checkpoints with their learning rates, summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from whence.diffusion.draws import once
from whence.diffusion.outputs import cross_entropy
from whence.methods.tracin import tracin
from whence.types import Checkpoint, Images, Task
from worlds import classifier_task


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return classifier_task(tmp_path_factory.mktemp("ours"), dtype=torch.float32)


def parts_of(images: Images) -> tuple[Tensor, Tensor]:
    batch = images.batch(range(len(images)))
    return batch.x0, batch.cond["class_labels"]


def load(model: nn.Module, point: Checkpoint) -> float:
    model.load_state_dict(point.load().state_dict())
    assert point.rate is not None
    return point.rate


def theirs(task: Task) -> Tensor:
    """captum's scores, [m, n]."""
    influence = TracInCP(
        model=task.trajectory[0].load(),
        train_dataset=TensorDataset(*parts_of(task.train)),
        checkpoints=list(task.trajectory),
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=7,
    )
    return influence.influence(parts_of(task.queries)).double()


@pytest.mark.parametrize("points", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["first", "second", "both"])
def test_tracin(task, record_property, points):
    task = replace(task, trajectory=task.trajectory[points])
    found, expected = tracin(cross_entropy, once(), dim=None)(task).values, theirs(task)
    error = float((found - expected).abs().max() / expected.abs().max())
    record_property("largest relative difference to captum", error)
    print(f"\ncaptum 0.9.0, {len(task.trajectory)} checkpoints: largest relative difference {error:.1e}")
    assert error < 1e-5
