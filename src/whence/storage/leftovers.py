"""Temporary names, and what killed processes leave under them.

    NAME.HOST-PID-N.tmp       a file being written, beside NAME          .NAME.HOST-PID-N.tmp    a folder being filled

The name says whose it is, so that what belongs to a process that is gone can be told from what another one is writing now.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from whence.storage.claims import SUFFIX, sweep_claims
from whence.storage.processes import HOST, runs

NAMES = re.compile(r"(?P<target>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-\d+\.tmp")
# As earlier versions called them, where nobody else would; a user's own backup.2024.tmp is none of ours.
EARLIER = re.compile(r"(?P<target>\..+|.+\.(?:json|jsonl|toml|html|png|parquet|safetensors))\.(?P<pid>\d+)\.tmp")
WITHIN = (
    "",
    "features/*",
    "curvature/*",
    "scores/*",
    "rows/*",
    "measurements/*",
    "units",
    "queries",
    "queries/features/*",
)
"""Where runs, trainings and ledgers write."""
FORGOTTEN = 24 * 3600  # seconds: what nobody has touched for so long, on whatever machine, nobody is writing

_in_use: set[Path] = set()


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """While this process writes it."""
    _in_use.add(path.absolute())
    try:
        yield
    finally:
        _in_use.discard(path.absolute())


def sweep(root: Path) -> None:
    """Remove what killed processes left in a folder of ours. A folder that cannot be written stays as it is."""
    for where in WITHIN:
        for folder in root.glob(where) if where else [root]:
            sweep_claims(folder)
            for path in folder.glob("*.tmp"):
                with suppress(OSError):  # another process removes it, too
                    if _left(path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_temporary(path: Path) -> bool:
    """Whether a path is, or lies in, something that is being written or was left by a killed process."""
    named = any(NAMES.fullmatch(part) or EARLIER.fullmatch(part) for part in path.parts)
    return named or path.suffix == SUFFIX


def _left(path: Path) -> bool:
    found = NAMES.fullmatch(path.name) or EARLIER.fullmatch(path.name)
    if found is None or path.absolute() in _in_use:
        return False
    if time.time() - path.stat().st_mtime > FORGOTTEN:
        return True
    here = found.groupdict().get("host", HOST) == HOST
    return here and not runs(int(found["pid"]))
