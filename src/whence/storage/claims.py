"""Who computes which part: claims on disk, by which processes and machines share one work without a word between them.

    NAME.claim      beside the part NAME while somebody computes it: {"place", "pid", "begun"}, touched every BEAT seconds

A claim holds while its process lives, which is seen on the same machine, and elsewhere while it goes on being touched. What
a dead process had claimed is taken over. Two that take over at once both compute: parts appear whole and are the same to the
bit, so that time is all that is lost.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from whence.plain import digest
from whence.storage.processes import name_of, runs

BEAT = 5.0
"""Seconds between two touches of a claim."""
SILENT = 60.0
"""Seconds after which a claim of another machine that nobody touched is one of the dead. By our own clock, since theirs may
be wrong: what counts is that its time of change stays the same."""
SUFFIX = ".claim"

_held: set[Path] = set()
_seen: dict[Path, tuple[int, float]] = {}


@cache
def here() -> str:
    """This machine and its space of process numbers: containers have their own."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with suppress(OSError):
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text())
    return digest(parts, 12)


def path_of(part: Path) -> Path:
    """Where the claim of a part lies."""
    return part.with_name(part.name + SUFFIX)


@contextmanager
def claimed_part(part: Path) -> Iterator[bool]:
    """Claim a part while the block runs: yields whether it is ours.

    Args:
        part: the file or folder that is computed; that of its claim is made where it is missing.
    """
    path = path_of(part).absolute()
    if not _take(path):
        yield False
        return
    _held.add(path)
    try:
        with _beating():
            yield True
    finally:
        _held.discard(path)
        path.unlink(missing_ok=True)


def holder(part: Path) -> str:
    """Who computes a part, in words; empty for nobody who lives."""
    path = path_of(part).absolute()
    note = _note(path)
    if note is None or _dead(path, note):
        return ""
    where = "this machine" if note.get("place") == here() else f"machine {note.get('node', 'unknown')}"
    return f"process {note.get('pid')} on {where}"


def forget_held() -> None:
    """Of a process that has just been forked: what its parent holds is not its own."""
    _held.clear()
    _seen.clear()


def sweep_claims(folder: Path) -> None:
    """Remove the claims of dead processes from a folder. One that cannot be written stays as it is."""
    for path in folder.glob(f"*{SUFFIX}"):
        note = _note(path)
        if note is not None and _dead(path.absolute(), note):
            with suppress(OSError):
                path.unlink()


def _take(path: Path) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        note = {"place": here(), "node": platform.node(), "pid": os.getpid(), "begun": time.time()}
        if _appears(path, json.dumps(note)):
            return True
        found = _note(path)
        if found is not None and not _dead(path, found):
            return False
        if found is not None:
            path.unlink(missing_ok=True)
    return False


def _appears(path: Path, content: str) -> bool:
    """Whether a file that was not there is there now, whole and ours."""
    temporary = name_of(path)
    try:
        _write(temporary, content, path)
        try:
            os.link(temporary, path)  # unlike a rename, it fails where a file is
        except FileExistsError:
            return False
        except OSError:  # a disk without links
            return _write(path, content, path, "x")
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _write(file: Path, content: str, claim: Path, mode: str = "w") -> bool:
    """Write a claim, or nothing; False where it must be new and another one is there."""
    try:
        opened = file.open(mode)
    except FileExistsError:
        return False
    try:
        with opened:
            opened.write(content)
    except OSError as error:  # of a full disk Python does not say the file
        file.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(claim)) from error
    return True


def _note(path: Path) -> dict[str, object] | None:
    """What a claim says; {} of one that is just being written, None of none."""
    try:
        found = json.loads(path.read_text()) if path.is_file() or not path.exists() else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _dead(path: Path, note: dict[str, object]) -> bool:
    pid = note.get("pid")
    if note.get("place") == here() and isinstance(pid, int):
        return path not in _held if pid == os.getpid() else not runs(pid)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return False  # it is gone, which is another matter
    known, since = _seen.get(path, (None, 0.0))
    if known != changed:
        _seen[path] = (changed, time.monotonic())
        return False
    return time.monotonic() - since > SILENT


@contextmanager
def _beating() -> Iterator[None]:
    """Touch all claims of this process now and then, from a thread that ends with the block."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            for path in list(_held):
                with suppress(OSError):
                    os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
