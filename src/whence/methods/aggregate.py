"""Which checkpoints count, and how much: each choice turns a task into [(checkpoint, eta)]."""

from __future__ import annotations

from collections.abc import Callable

from whence.types import Checkpoint, Task, WhenceError

Aggregate = Callable[[Task], list[tuple[Checkpoint, float]]]


def last(task: Task) -> list[tuple[Checkpoint, float]]:
    """The final weights only."""
    return [(task.trajectory[-1], 1.0)]


def mean(task: Task) -> list[tuple[Checkpoint, float]]:
    """The models of the ensemble and the final model alike: eta = 1/(E + 1). Earlier checkpoints do not count."""
    models = [*task.ensemble, task.trajectory[-1]]
    return [(model, 1 / len(models)) for model in models]


def rate_weighted(task: Task) -> list[tuple[Checkpoint, float]]:
    """eta_c = learning rate at checkpoint c (TracIn). Final weights that are no checkpoint of their own do not count."""
    checkpoints = [checkpoint for checkpoint in task.trajectory if checkpoint.step is not None]
    if not checkpoints:
        names = ", ".join(checkpoint.name for checkpoint in task.trajectory)
        raise WhenceError(f"this method sums over training checkpoints (checkpoint-N folders); there is only {names}")
    for checkpoint in checkpoints:
        if checkpoint.problem:
            raise WhenceError(checkpoint.problem)
        if checkpoint.rate is None:
            raise WhenceError(f"{checkpoint.name} does not say its learning rate; add it as `rate` to its whence.json")
    return [(checkpoint, float(checkpoint.rate or 0.0)) for checkpoint in checkpoints]
