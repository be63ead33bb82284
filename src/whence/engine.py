"""Progress that everybody sees, and files that appear whole."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from whence.types import WhenceError

Item = TypeVar("Item")


def progress(items: Sequence[Item] | Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """A tqdm bar on a terminal, a plain line about every ten seconds elsewhere; silent with WHENCE_QUIET=1."""
    terminal = sys.stderr.isatty()
    yield from tqdm(
        items,
        desc=what,
        total=total,
        file=None if terminal else _Lines(),
        disable=os.environ.get("WHENCE_QUIET") == "1",
        mininterval=0.1 if terminal else 10.0,
        ascii=not terminal,
        ncols=None if terminal else 100,
        leave=True,
    )


class _Lines:
    """stderr for what is no terminal: a line of its own for each state of the bar, instead of one that is overwritten."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip("\r\n") + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Write a file that appears whole or not at all: yields a temporary path, then fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise WhenceError(
            f"the disk is full: could not write {path}; free some space and run again to go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
