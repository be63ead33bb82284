"""Which process is meant: its machine and number, names that it alone gives, and whether it runs."""

from __future__ import annotations

import os
import platform
from itertools import count
from pathlib import Path

from whence.plain import digest

HOST = digest(platform.node(), 8)
_numbers = count()


def name_of(target: Path, hidden: bool = False) -> Path:
    """A name beside a file or folder that no other process, thread or call has."""
    return target.with_name(f"{'.' * hidden}{target.name}.{HOST}-{os.getpid()}-{next(_numbers)}.tmp")


def runs(pid: int) -> bool:
    """Whether another process of this number runs. Our own number is that of an earlier one: containers give it again."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
        # One that has ended and was not waited for is still there, by its number.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (ProcessLookupError, OverflowError):
        return False
    except (PermissionError, FileNotFoundError, IndexError):
        pass
    return True
