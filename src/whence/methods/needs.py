"""What methods ask for besides weights, training images and queries, and whether a task has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from whence.methods.aggregate import rate_weighted
from whence.types import Task, Trainable, Trajectory, WhenceError, image_by_image


@dataclass(frozen=True)
class Need:
    """One thing that a method asks for.

    Args:
        words: what it is, after "needs".
        check: (name of the method, task) -> anything; raises where the task lacks it. None for what shows only while the
            method computes.
        setting: of the method, without which it cannot be; "" for none.
    """

    words: str
    check: Callable[[str, Task], object] | None = None
    setting: str = ""


def known_study(name: str, task: Task) -> Trainable:
    """How the model was trained.

    Args:
        name: of the method that asks.
        task: the question.
    """
    if task.study is None:
        raise WhenceError(
            f"{name} trains the model again, and it is not known how this one was trained; accepted: a folder of "
            "`whence train` with the images it was trained on, or Task(study=...)"
        )
    return task.study


def known_sampling(name: str, task: Task) -> Trajectory:
    """How the queries were sampled; the arguments as for `known_study`."""
    if task.sampled is None:
        raise WhenceError(
            f"{name} needs to know how the queries were sampled; accepted: `whence attribute --generate N`, the "
            "generated/ folder of a run as queries, or a Task with a journey"
        )
    return task.sampled


def check_scored(name: str, method: object, task: Task) -> None:
    """Refuse a task of which some training images are scored, for a method that looks at all of them together.

    Args:
        name: of the method.
        method: it itself.
        task: the question.
    """
    if task.scored is not None:
        check_by_image(name, method)


def check_by_image(name: str, method: object) -> None:
    """Refuse a method that cannot score some training images apart from the others; the arguments as for `check_scored`."""
    if not image_by_image(method):
        raise WhenceError(
            f"{name} takes all training images together, so that it cannot score some of them alone",
            "candidates",
            "a method that scores image by image, like ek_fac, influence_cg, source or tracin; or no candidates",
        )


NEEDS = {
    "checkpoints": Need("checkpoint-N folders with their learning rates", lambda name, task: rate_weighted(task)),
    "training": Need("a model made by `whence train`, which can be trained again", known_study),
    "journey": Need("queries that whence sampled (--generate)", known_sampling),
    "encoder": Need("the folder of an encoder", setting="encoder"),
    "student": Need("a student of `whence distill` for the same training images", setting="student"),
    "layers": Need("Linear or Conv2d layers"),
}
