"""Commands in forks of this process: what they need is imported once, and each has memory, signals and an end of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from whence.cli import main as cli

KILLED = 77
POINTS = ("replace", "rename", "link", "fsync", "mkdir")


@dataclass
class Fork:
    """A command that runs; `code` waits for it."""

    pid: int
    output: Path
    _code: int | None = field(default=None)

    @property
    def code(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    @property
    def told(self) -> str:
        """What it wrote on stderr."""
        assert self.code is not None
        return self.output.read_text()


def fork(words: tuple[object, ...], output: Path, before: Callable[[], None] = lambda: None) -> Fork:
    """`whence WORDS` in a fork. before: called in it first, to get something in its way."""

    def command() -> None:
        before()
        with mock.patch.object(sys, "argv", ["whence", *map(str, words)]):
            cli.main()

    return forked(command, output)


def forked(work: Callable[[], None], output: Path) -> Fork:
    """`work` in a fork: its code is that of the SystemExit it ends by, 0 without, 99 where it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            torch.set_num_threads(1)
            work()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return Fork(pid, output)


def at_the_point(
    number: int, act: Callable[[str], None], counted: Path | None = None, for_good: bool = True
) -> Callable[[], None]:
    """Patches every rename, link, fsync and mkdir, and acts before the one of this number (from 0; none below). counted: a
    file that gets a line for each; for_good: at all that follow, too."""

    def install() -> None:
        seen = [0]

        def watched(name: str, real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **more: object) -> object:
                if counted is not None:
                    with counted.open("a") as file:
                        file.write(f"{name} {args[0]}\n")
                seen[0] += 1
                if seen[0] > number >= 0 and (for_good or seen[0] == number + 1):
                    act(name)
                return real(*args, **more)

            return call

        for name in POINTS:
            setattr(os, name, watched(name, getattr(os, name)))

    return install


def die(name: str) -> None:
    """As kill -9 ends a process: nothing is cleaned up."""
    os._exit(KILLED)


def contents(root: Path) -> dict[str, bytes]:
    """Every file by its bytes, `.tmp` included."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Which file it is and when it changed, of every file and folder."""
    found = {str(path.relative_to(root)): path.stat() for path in [root, *root.rglob("*")]}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def empty(root: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    return root
