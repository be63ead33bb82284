"""What may be opened: files. Whoever opens a pipe that lies in a folder waits for ever, and a device never ends."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from whence.plain import WhenceError

GIVEN = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")


def regular(path: Path) -> Path:
    """A path of a file, or of nothing.

    Args:
        path: that is to be opened. What a shell hands over is a pipe, and meant.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return path  # whoever opens it says why
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(path).startswith(GIVEN)):
        raise WhenceError("is a pipe, a socket or a device", str(path), "a file")
    return path


@contextmanager
def tensors_in(path: Path, then: str = "copy or download it again") -> Iterator[safe_open]:
    """A safetensors file to be read; one that is missing or damaged is told.

    Args:
        path: of the file.
        then: what to do with one that is damaged.
    """
    try:
        with safe_open(regular(path), framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise WhenceError(f"{path} is missing; {then}") from None
    except (SafetensorError, OSError) as error:
        raise WhenceError(f"{path} is damaged ({' '.join(str(error).split())}); {then}") from None
