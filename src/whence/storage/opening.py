"""What may be opened: files. Whoever opens a pipe that lies in a folder waits for ever, and a device never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from whence.types import WhenceError

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
