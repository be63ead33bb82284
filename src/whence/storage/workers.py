"""Several processes for the parts of one work: shards of features, retrained models, derivatives of trainings.

Each takes the first part that is not there and that nobody has claimed, until all are there. Which process computes a part
changes nothing of it. Processes of other machines that were started on the same folder take part in the same way.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from whence.storage.claims import claimed_part, forget_held, holder, sweep_claims
from whence.storage.files import progress
from whence.types import Engine

Part = TypeVar("Part")
Result = TypeVar("Result")
PAUSE = 0.05, 2.0
"""Seconds between two looks for what others compute: the first pause, and the longest."""
PATIENCE = 5.0
"""Seconds after which is said for whom we wait."""


@dataclass(frozen=True)
class Work(Generic[Part, Result]):
    """What is done to each part.

    Args:
        done: part -> whether it is there.
        place: part -> the file or folder it is kept in, where nobody else writes.
        compute: what was read -> the result; anywhere.
        keep: part, result -> nothing: where the files are.
        read: part -> what `compute` takes: where the pictures are. The part itself by default.
    """

    done: Callable[[Part], bool]
    place: Callable[[Part], Path]
    compute: Callable[[Iterable[Any]], Result]
    keep: Callable[[Part, Result], None]
    read: Callable[[Part], Iterable[Any]] = lambda part: (part,)


def share(parts: Sequence[Part], work: Work[Part, Result], what: str, engine: Engine) -> None:
    """Do all parts of a work, with other processes that do the same. When it returns, all are done.

    A part that fails in another process is tried in this one, which raises what is wrong with it.

    Args:
        parts: of the work.
        work: what is done to each.
        what: for the progress bar; "" for none.
        engine: says how many processes there are on this machine, or which cluster.
    """
    todo = [part for part in parts if not work.done(part)]
    if not todo:
        return
    if engine.ray:
        from whence.storage.cluster import share_on

        finished = share_on(engine.ray, todo, work)
        for _ in progress(finished, what, total=len(todo)) if what else finished:
            pass
    else:
        with _crew(min(engine.workers, len(todo)) - 1, lambda: [_ for _ in _labour(todo, work, "")]):
            finished = _labour(todo, work, what)
            for _ in progress(finished, what, total=len(todo)) if what else finished:
                pass
    for folder in {work.place(part).parent for part in todo}:
        sweep_claims(folder)  # of workers that were killed when their part was there


def default_workers() -> int:
    """The cores that this process may use, divided by the threads that torch takes for one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, quota()) // torch.get_num_threads())


def quota() -> int:
    """Whole processors that the control group of a container allows; as many as there are where it says nothing."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # "max", or another kind of control groups
        return os.cpu_count() or 1


def _labour(todo: Sequence[Part], work: Work[Part, Result], what: str) -> Iterator[Part]:
    """Yields each part when it is there, by whomever; the arguments are those of `share`."""
    left, pause, since = list(todo), PAUSE[0], time.monotonic()
    while left:
        later: list[Part] = []
        for part in left:
            if not work.done(part):
                with claimed_part(work.place(part)) as ours:
                    if not ours:
                        later.append(part)
                        continue
                    if not work.done(part):
                        work.keep(part, work.compute(work.read(part)))
                        pause, since = PAUSE[0], time.monotonic()
            yield part
        if len(later) == len(left):
            if what and time.monotonic() - since > PATIENCE:
                say_waiting(what, [holder(work.place(part)) for part in later])
                since = float("inf")
            time.sleep(pause)
            pause = min(2 * pause, PAUSE[1])
        left = later


def say_waiting(what: str, holders: Sequence[str]) -> None:
    """Say for whom we wait."""
    names = sorted({name for name in holders if name})
    if names and os.environ.get("WHENCE_QUIET") != "1":
        sys.stderr.write(f"{what}: {len(holders)} parts are left, which {', '.join(names)} computes\n")


@contextmanager
def _crew(count: int, labour: Callable[[], object]) -> Iterator[None]:
    """Further processes that do the same, while the block runs; they are forked, and share what was loaded.

    Args:
        count: of them.
        labour: what each does.
    """
    mates = [_fork(labour) for _ in range(count)]
    try:
        yield
        for pid in mates:
            _end(pid, told=True)
    except BaseException:
        for pid in mates:
            os.kill(pid, signal.SIGKILL)
            _end(pid, told=False)
        raise


def _end(pid: int, told: bool) -> None:
    """Wait for the end of a worker, and say so where it was killed."""
    _, status = os.waitpid(pid, 0)
    if told and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        warnings.warn(
            "a worker was killed, perhaps for lack of memory; the others did its parts. Give fewer --workers or a smaller "
            "--budget_mb, which is that of each worker",
            stacklevel=4,
        )


def _fork(labour: Callable[[], object]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads; ours only touch claims
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        forget_held()
        torch.set_num_threads(1)  # the threads of the parent are not here
        os.environ["WHENCE_QUIET"] = "1"
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        with open(os.devnull, "w") as nothing:
            sys.stdout = sys.stderr = nothing
            labour()
        code = 0
    except BaseException:
        pass  # the parent meets the same, and tells it
    finally:
        os._exit(code)


def _end_with(parent: int) -> None:
    """End where the parent has been killed: nobody waits for us."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
