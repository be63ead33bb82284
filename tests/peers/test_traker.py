"""TRAK against the authors' library `traker` 0.3.2, in float32 and without projection (handbook 5.2).

traker: X = grad/sqrt(p), C = X^T X + lambda I, scores = X (C^-1 / mean|C^-1|) X_q^T * (1 - p_i), kernels and 1 - p averaged
over models apart. Ours: G = grad^T grad, kernel = grad_q (G + p lambda I)^-1 grad, which is mean|C^-1| times theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trak import TRAKer
from trak.projectors import NoOpProjector

from agreement import close
from whence.curvature.gram import Gram
from whence.diffusion.draws import once
from whence.diffusion.outputs import margin
from whence.methods.trak import trak
from whence.types import Images, Scores, Task
from worlds import classifier_task

DAMPING = 1e-2  # 4 % of the mean eigenvalue of C. What differs is traker's float32 inverse: 3e-6 here, tenfold at 1e-3


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return classifier_task(tmp_path_factory.mktemp("ours"), dtype=torch.float32)


def parts_of(images: Images) -> list[Tensor]:
    batch = images.batch(range(len(images)))
    return [batch.x0, batch.cond["class_labels"]]


def theirs(task: Task, models: Sequence[int], folder: Path) -> Tensor:
    """traker's scores, [m, n]."""
    traker = TRAKer(
        model=task.trajectory[0].load(),
        task="image_classification",
        train_set_size=len(task.train),
        save_dir=str(folder),
        device="cpu",
        projector=NoOpProjector(device="cpu"),
        use_half_precision=False,
        lambda_reg=DAMPING,
        logging_level=50,
    )
    for number in models:
        traker.load_checkpoint(task.trajectory[number].load().state_dict(), model_id=number)
        traker.featurize(batch=parts_of(task.train), num_samples=len(task.train))
    traker.finalize_features()
    for number in models:
        weights = task.trajectory[number].load().state_dict()
        traker.start_scoring_checkpoint("queries", weights, model_id=number, num_targets=len(task.queries))
        traker.score(batch=parts_of(task.queries), num_samples=len(task.queries))
    return torch.from_numpy(traker.finalize_scores("queries").copy()).T.double()


def size(task: Task) -> int:
    return sum(p.numel() for p in task.trajectory[0].load().parameters())


def ours(task: Task, number: int, weighted: bool = True) -> Scores:
    """TRAK of one checkpoint at traker's damping, with or without the weight 1 - p."""
    method = replace(trak(margin, once(), dim=None), precondition=Gram(size(task) * DAMPING, absolute=True))
    task = replace(task, trajectory=task.trajectory[: number + 1])
    return (method if weighted else replace(method, weight=None))(task)


def mean_inverse(task: Task, number: int) -> float:
    """mean |(X^T X + lambda I)^-1| of traker, from gradients taken here one by one."""
    net = task.trajectory[number].load()
    x0, labels = parts_of(task.train)
    rows = []
    for image, label in zip(x0, labels, strict=True):
        logits = net(image[None])[0]
        value = logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).logsumexp(0)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]))
    X = torch.stack(rows).double() / size(task) ** 0.5
    return float(torch.linalg.inv(X.T @ X + DAMPING * torch.eye(size(task), dtype=torch.float64)).abs().mean())


def agreement(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest score."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("number", [0, 1])
def test_trak_of_one_model(task, tmp_path, record_property, number):
    found = ours(task, number).values / mean_inverse(task, number)
    error = agreement(found, theirs(task, [number], tmp_path))
    record_property("largest relative difference to traker", error)
    print(f"\ntraker 0.3.2, checkpoint {number}: largest relative difference {error:.1e}")
    assert error < 2e-5


def test_trak_of_an_ensemble(task, tmp_path, record_property):
    """Product of averages: mean kernel times mean of 1 - p. traker's scale of each kernel has to be put back."""
    kernels = [ours(task, c, weighted=False).values / mean_inverse(task, c) for c in (0, 1)]
    plain = [ours(task, c, weighted=False).values[0] for c in (0, 1)]
    doubt = [ours(task, c).values[0] / kernel for c, kernel in enumerate(plain)]
    found = (kernels[0] + kernels[1]) / 2 * (doubt[0] + doubt[1]) / 2
    error = agreement(found, theirs(task, [0, 1], tmp_path))
    record_property("largest relative difference to traker", error)
    print(f"\ntraker 0.3.2, two checkpoints: largest relative difference {error:.1e}")
    assert error < 2e-5
    # Our own ensemble is the same product of averages, without traker's scale of each kernel.
    method = replace(
        trak(margin, once(), dim=None, ensemble=True), precondition=Gram(size(task) * DAMPING, absolute=True)
    )
    own = (ours(task, 0, False).values + ours(task, 1, False).values) / 2 * (doubt[0] + doubt[1]) / 2
    task = replace(task, ensemble=task.trajectory[:1], trajectory=task.trajectory[1:])
    close(method(task).values, own, 1e-6)
