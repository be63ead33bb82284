"""A model that has forgotten a picture, as a pipeline folder, and what it draws then."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from whence.evaluation.preview import plot_rows
from whence.methods.unlearning import Unlearning
from whence.models import Model
from whence.models.saving import with_weights
from whence.storage.files import building, move_in
from whence.types import Method, Task, Weights, WhenceError

OF_TRAINING = ("checkpoint-*", "digests.json", "recipe.toml", "initial", "features", "generated")
"""What belongs to how the model was made, and is not true of what it is without a picture."""


@dataclass(frozen=True, eq=False)
class Unlearned:
    """What came out.

    Args:
        before: pictures that the model draws [m, C, H, W].
        after: from the same noise, without the picture.
        facts: how far it was forgotten.
    """

    before: Tensor
    after: Tensor
    facts: dict[str, float]


def unlearned(
    task: Task, method: Method, name: str, opened: Model, draw: Callable[[nn.Module | None], Tensor], folder: Path
) -> Unlearned:
    """Forget a picture, write FOLDER, a pipeline like the model's, and draw from both.

    Args:
        task: the question; the picture is one of its queries.
        method: one of those that forget.
        name: of the picture.
        opened: the pipeline.
        draw: pictures from the model's network, or from another in its place.
        folder: of the pipeline that is written.
    """
    if not isinstance(method, Unlearning):
        raise WhenceError(f"{type(method).__name__} forgets nothing", "--method", "abu, abu_ek_fac, mucs")
    ids = list(task.queries.ids)
    if name not in ids:
        near = difflib.get_close_matches(name, ids, 3) or ids[:3]
        raise WhenceError(f"there is no picture {name!r}", f"--query {name}", f"{', '.join(near)} ...")
    found = method.forgotten(task, ids.index(name))
    network = opened.final.load()
    weights = {key: w.to(network.get_parameter(key)) for key, w in found.weights.items()}
    write_pipeline(opened, with_weights(network, weights), folder)
    moved = sum(float((w - dict_of(opened)[key]).square().sum()) for key, w in weights.items()) ** 0.5
    return Unlearned(draw(None), draw(network), {**found.facts, "moved": moved})


def dict_of(opened: Model) -> Weights:
    """The weights of a pipeline's network."""
    return {name: p.detach() for name, p in opened.final.load().named_parameters()}


def write_pipeline(opened: Model, network: nn.Module, folder: Path) -> None:
    """A pipeline folder with another network; it appears whole.

    Args:
        opened: the pipeline.
        network: in place of its own.
        folder: where it is written.
    """
    if folder.exists():
        return
    with building(folder) as new:
        shutil.copytree(opened.folder, new, ignore=shutil.ignore_patterns(*OF_TRAINING), dirs_exist_ok=True)
        shutil.rmtree(new / opened.part)
        network.save_pretrained(new / opened.part)  # type: ignore[operator]  # a ModelMixin
        move_in(new, folder)


def plot(found: Unlearned, title: str, path: Path) -> None:
    """Before, after, and what changed."""
    rows = {"the model": found.before, "without the picture": found.after}
    plot_rows(rows, ("change", found.after - found.before), title, path)
