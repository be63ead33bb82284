"""A model that has forgotten a picture, or a group of its images, as a pipeline folder, and what it draws then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from whence.data.images import subset
from whence.evaluation.preview import plot_rows
from whence.methods.forgetting import Forgotten
from whence.methods.groups import GroupUnlearning
from whence.methods.unlearning import Unlearning
from whence.models import Model, encode_images
from whence.models.saving import save_pipeline, scheduler_of
from whence.plain import row_of_picture
from whence.storage.files import building, move_in
from whence.task import Request
from whence.training.checkpoints import say_of_other_images, study_on
from whence.types import Method, Task, Weights, WhenceError


@dataclass(frozen=True, eq=False)
class Unlearned:
    """What came out.

    Args:
        before: pictures that the model draws [m, C, H, W].
        after: from the same noise, without what was forgotten.
        facts: how far it was forgotten.
    """

    before: Tensor
    after: Tensor
    facts: dict[str, float]


def task_without_queries(request: Request) -> Task:
    """The question that a group is forgotten for, which asks about no picture.

    Args:
        request: whose model and training images are taken.
    """
    opened, root = request.opened, request.claim()
    images = encode_images(opened, request.train_images, root, request.engine, request.caption_column)
    study = study_on(opened.folder, request.adapter, images)
    say_of_other_images(opened.folder, images)
    forward = opened.forward if study is None else study.forward()
    return Task(forward, (opened.final,), images, subset(images, [0]), root, request.engine, study=study)


def known(task: Task, method: Method, name: str) -> Callable[[], Forgotten]:
    """What forgets a picture or a group; one that is not there is refused now, before anything is claimed for it.

    Args:
        task: the question; the picture is one of its queries.
        method: one of those that forget.
        name: of the picture, or of the group.
    """
    if isinstance(method, GroupUnlearning):
        method.rows_of(task, name)
        return lambda: method.forgotten(task, name)
    if isinstance(method, Unlearning):
        row = row_of_picture(name, {each: row for row, each in enumerate(task.queries.ids)})
        return lambda: method.forgotten(task, row)
    raise WhenceError(f"{type(method).__name__} forgets nothing", "--method", "abu, abu_ek_fac, mucs, guda")


def unlearned(
    task: Task, method: Method, name: str, opened: Model, draw: Callable[[nn.Module | None], Tensor], folder: Path
) -> Unlearned:
    """Forget a picture or a group, write FOLDER, a pipeline like the model's, and draw from both.

    Args:
        task: the question; the picture is one of its queries.
        method: one of those that forget.
        name: of the picture, or of the group.
        opened: the pipeline.
        draw: pictures from the model's network, or from another in its place.
        folder: of the pipeline that is written.
    """
    found = known(task, method, name)()
    network = opened.final.load()
    before = {key: network.get_parameter(key).detach().clone() for key in found.weights}
    weights = {key: w.to(before[key]) for key, w in found.weights.items()}
    write_pipeline(folder, opened, network, weights)
    moved = sum(float((w - before[key]).square().sum()) for key, w in weights.items()) ** 0.5
    return Unlearned(draw(None), draw(network), {**found.facts, "moved": moved})


def write_pipeline(folder: Path, opened: Model, network: nn.Module, weights: Weights) -> None:
    """A pipeline folder like the model's, with other weights; the network holds them from now on.

    Args:
        folder: that is written; it appears whole.
        opened: the model's pipeline.
        network: of the model.
        weights: those that change, by name.
    """
    with building(folder) as new:
        save_pipeline(new, network, weights, scheduler_of(opened.scheduler), opened.folder)
        move_in(new, folder)


def plot(found: Unlearned, title: str, path: Path) -> None:
    """Before, after, and what changed."""
    rows = {"the model": found.before, "without": found.after}
    plot_rows(rows, ("change", found.after - found.before), title, path)
