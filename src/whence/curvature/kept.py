"""What is made of the rows of the training images alone, kept where several runs share an index.

Whoever asks about other pictures then reads a factor in place of all rows. A run folder of one set of pictures keeps none of
it: there it is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from whence.curvature.solve import Problem
from whence.storage.arrays import Rows, read_checked, tensor_digest, write_checked
from whence.storage.files import FORMAT_VERSION, note_once
from whence.types import describe, digest

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """Tensors by name, in a folder; made each time where there is none.

    Args:
        folder: None for none.
    """

    folder: Path | None = None

    def __call__(self, name: str, make: Callable[[], Tensors]) -> Tensors:
        """Those of a name: read where they are there, else made and kept.

        Args:
            name: of the file.
            make: () -> what it holds.
        """
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return read_checked(path)
        found = make()
        write_checked(path, found)
        return found


NOT_KEPT = Kept()


def kept_of(problem: Problem, train: Rows, settings: Mapping[str, object]) -> Kept:
    """Where what is made of some rows is kept.

    Args:
        problem: whose it is.
        train: the rows; rows in memory have no name to keep anything under.
        settings: what else it depends on.
    """
    task, rows = problem.task, _named(train)
    if rows is None or task is None or task.index is None or task.index.absolute() == task.root.absolute():
        return NOT_KEPT
    key = describe({**settings, "rows": rows})
    folder = task.index / "systems" / digest(key)
    note_once(folder / "manifest.json", {"format_version": FORMAT_VERSION, "key": key})
    return Kept(folder)


def _named(rows: Rows) -> dict[str, object] | None:
    """What tells these rows from any others: the names of their folders, which are digests of all that they depend on."""
    if rows.folder == Path() or not rows.folder.name:
        return None
    found: dict[str, object] = {"features": rows.folder.name, "columns": None}
    if rows.columns is not None:
        found["columns"] = [rows.columns.start, rows.columns.stop]
    if rows.factors is not None:
        found["factors"] = tensor_digest(rows.factors)
    if rows.mixed is not None:
        share, other, others = rows.mixed
        found["mixed"] = [share, _named(other), others]
    return found
