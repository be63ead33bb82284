"""What a method costs whose stages are not counted: it is run on a few images, queries and steps, and carried on in a line.

    f(n, m) = f(n1, m1) + a (n - n1) + b (m - m1) + c (n - n1)(m - m1)          from f at n1, n2 and m1, m2

n is the number of training images, or of the steps of a training for methods that train. Curvature, inner products and
passes over all images for each query are of this form. Nothing stays on the disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence.data.images import subset
from whence.doctor import machine
from whence.methods import entry
from whence.methods.metagradient import Metagradient
from whence.types import Method, Task, WhenceError

IMAGES, QUERIES, STEPS = (4, 12), (1, 2), (16, 32)
"""What a trial is given: few, so that it takes no longer than some forty images, or a hundred steps."""
MORE = (24, 48)
"""Training images for methods that need more, such as those that look for the first 20 of them."""
RESIDENT_UNTIL = 64
"""Images up to which memory grows with their number: later ones are read in shards."""


@dataclass(frozen=True)
class Point:
    """What a trial took.

    Args:
        seconds: it took.
        memory: bytes at most, the program included.
        disk: bytes that it wrote.
        device_memory: bytes of the GPU at most.
    """

    seconds: float
    memory: float
    disk: float
    device_memory: float = 0.0


Run = Callable[[int, int], Point]


def tried(name: str, method: Method, task: Task) -> Point:
    """What the method will take with all images, queries and steps of a task.

    Args:
        name: of the method.
        method: it itself.
        task: the question.
    """
    m, few = len(task.queries), two(QUERIES, len(task.queries))
    if (steps := _steps_of(name, method, task)) is not None:
        shorter, factor = _fewer_masks(method)
        found = carried_on(
            lambda s, q: once(*_with_steps(name, shorter, task, s), q), two(STEPS, steps), few, (steps, m), steps
        )
        return replace(found, seconds=factor * found.seconds, disk=factor * found.disk)
    n = len(task.train)
    for sizes in (IMAGES, MORE):
        try:
            return carried_on(
                lambda i, q: once(method, _of_images(task, i), q), two(sizes, n), few, (n, m), min(n, RESIDENT_UNTIL)
            )
        except WhenceError:
            if sizes is MORE or n <= MORE[0]:
                raise
    raise AssertionError


def carried_on(run: Run, at: tuple[int, int], few: tuple[int, int], whole: tuple[int, int], resident: int) -> Point:
    """The cost at (n, m) = whole.

    Args:
        run: the cost at n and m.
        at: two n.
        few: two m.
        whole: the n and m that are asked about.
        resident: the n at which memory is asked about.
    """
    run(1, 1)  # what is loaded and compiled once
    found = {(n, m): run(n, m) for n in sorted({*at}) for m in sorted({*few})}

    def value(what: str, n: int, m: int) -> float:
        f = {place: getattr(point, what) for place, point in found.items()}
        corner = f[at[0], few[0]]
        by_n, by_m = f[at[1], few[0]] - corner, f[at[0], few[1]] - corner
        both = f[at[1], few[1]] - corner - by_n - by_m
        x = (n - at[0]) / max(1, at[1] - at[0])
        y = (m - few[0]) / max(1, few[1] - few[0])
        return float(corner + max(0, by_n) * x + max(0, by_m) * y + max(0, both) * x * y)

    n, m = whole
    held = value("memory", resident, m), value("device_memory", resident, m)
    return Point(value("seconds", n, m), held[0], value("disk", n, m), held[1])


def once(method: Method, task: Task, queries: int) -> Point:
    """What the method takes of the first queries.

    Args:
        method: it itself.
        task: the question.
        queries: how many.
    """
    with tempfile.TemporaryDirectory(prefix=".whence-doctor-", dir=machine.standing(task.root)) as place, _quiet():
        asked = replace(task, queries=subset(task.queries, range(queries)), root=Path(place), index=None)
        machine.forget_peak(task.engine)
        begun = time.perf_counter()
        method(asked)
        seconds, (memory, on_gpu) = time.perf_counter() - begun, machine.peak(task.engine)
        disk = sum(path.stat().st_size for path in Path(place).rglob("*") if path.is_file())
    return Point(seconds, memory, disk, on_gpu)


def two(sizes: tuple[int, int], most: int) -> tuple[int, int]:
    """Two sizes, of which there are no more than so many.

    Args:
        sizes: those that are taken where there are as many.
        most: how many there are.
    """
    if most >= sizes[1]:
        return sizes
    return max(1, most // 3), most


def _of_images(task: Task, count: int) -> Task:
    """The same question about the first images."""
    return replace(task, train=subset(task.train, range(count)), scored=None)


def _steps_of(name: str, method: Any, task: Task) -> int | None:
    """The steps of what the method trains; None for one that trains nothing."""
    chosen = entry(name)
    if chosen.retrains and task.study is not None:
        return int(task.study.recipe.steps)
    return int(method.steps) if "short training" in chosen.cost and hasattr(method, "steps") else None


def _with_steps(name: str, method: Any, task: Task, steps: int) -> tuple[Method, Task]:
    """Method and question with trainings of so many steps."""
    if not entry(name).retrains:
        return replace(method, steps=steps), task
    study: Any = task.study
    recipe = study.recipe
    schedule = replace(recipe.schedule, steps=steps, warmup_steps=min(recipe.schedule.warmup_steps, steps))
    # Of one that was trained otherwise nothing is read again: it is trained anew.
    return method, replace(task, study=replace(study, recipe=replace(recipe, schedule=schedule)))


def _fewer_masks(method: Any) -> tuple[Any, float]:
    """The method with as few trainings as it can do with, and how many times as many it has: they are all alike."""
    if not hasattr(method, "masks") or isinstance(method, Metagradient):
        return method, 1.0
    least = 2 if method.pairs else 1
    return replace(method, masks=least, seeds=1), method.masks * method.seeds / least


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of what is only tried."""
    before = os.environ.get("WHENCE_QUIET")
    os.environ["WHENCE_QUIET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["WHENCE_QUIET"]
        else:
            os.environ["WHENCE_QUIET"] = before
