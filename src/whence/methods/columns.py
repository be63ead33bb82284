"""Methods whose projections have no fewer columns than the network has parameters.

A random projection is there to save room, and moves every inner product a little. Where it would save none, the gradients
themselves stand in its place: `dim` is how many columns there are at most.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

from whence.diffusion.halves import can_be_halved
from whence.features.gradients import select
from whence.features.halves import halves_of
from whence.features.parts import Gradient, Pullbacks
from whence.features.projections import unprojected
from whence.features.rows import absent, prepare
from whence.types import Checkpoint, Task

Chosen = TypeVar("Chosen")


def fitted(method: Chosen, task: Task) -> Chosen:
    """The method with the gradients themselves where there are no more parameters than columns.

    Args:
        method: any; what has no projection stays as it is.
        task: whose network it is.
    """
    if not is_dataclass(method) or isinstance(method, type):
        return method
    found: dict[str, Any] = {}
    points = _points(method, task)
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, Gradient | Pullbacks):
            exact = _exact(value.projection, value, points, task)
            if exact is not None:
                found[field.name] = replace(value, projection=exact)
        elif field.name == "projection":
            exact = _exact(value, method, points, task)
            if exact is not None:
                found[field.name] = exact
    return replace(method, **found) if found else method


def told(method: object, used: object, task: Task) -> str:
    """What is said where a method is used without its projection; "" where it is used as it is.

    Args:
        method: as it was asked for.
        used: what `fitted` made of it.
        task: the question.
    """
    if used == method or not is_dataclass(method):
        return ""
    parts = [method, *(getattr(method, field.name) for field in dataclasses.fields(method))]
    part = next(part for part in parts if hasattr(part, "projection"))
    projection = getattr(part.projection, "inner", part.projection)
    count = _count(part.parameters, _points(method, task)[0], task)
    return f"exact gradients of {count:,} parameters, which are no more than {projection.k:,} columns"


def _exact(projection: object, part: Any, points: Sequence[Checkpoint], task: Task) -> Any:
    """What stands for a projection, None where it stays."""
    if unprojected(projection, 1) is None or (isinstance(part, Gradient) and _begun(part, points, task)):
        return None
    return unprojected(projection, _count(part.parameters, points[0], task))


def _begun(part: Gradient, points: Sequence[Checkpoint], task: Task) -> bool:
    """Whether rows of this projection are there: then it fits, and the network need not be loaded to know that."""
    halves = halves_of(part) if part.averaged and can_be_halved(part.draws) else ()
    images = task.to_score
    every = itertools.product((part, *halves), points)
    return any(absent(each, task, point, images) < len(images) for each, point in every)


@runtime_checkable
class Checkpointed(Protocol):
    """What says at which checkpoints it looks."""

    def checkpoints(self, task: Task) -> Sequence[tuple[Checkpoint, float]]: ...


def _points(method: object, task: Task) -> list[Checkpoint]:
    """The networks that a method looks at, all alike in their parameters; no other one is loaded to count them."""
    if isinstance(method, Checkpointed):
        return [point for point, _ in method.checkpoints(task)]
    return [task.trajectory[-1]]


def _count(parameters: str, point: Checkpoint, task: Task) -> int:
    """How many numbers the chosen parameters of a network have."""
    module = prepare(point, task.engine)
    weights = dict(module.named_parameters())
    return sum(weights[name].numel() for name in select(module, parameters))
