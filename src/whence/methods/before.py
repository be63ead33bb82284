"""What a run refuses before anything is drawn, encoded or computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from whence.features.gradients import check as check_output
from whence.features.gradients import select
from whence.features.parts import Gradient
from whence.features.rows import prepare
from whence.methods.inner_product import FeatureMethod
from whence.methods.registry import check_needs
from whence.types import Method, Task

IN_ANY = ("trained", "all")


def check_before(name: str, method: Method, task: Task) -> None:
    """Refuse a method that asks for what the task lacks, or measures what its network does not have.

    Args:
        name: as in METHODS, or package.module:function.
        method: it itself, with its settings.
        task: the question; of its queries nothing is read.
    """
    check_needs(name, task)
    if isinstance(method, FeatureMethod):
        method.check((method.damping,))
    for part in _gradients(method):
        for output in part.outputs:
            check_output(output, task.forward)
        if part.parameters not in IN_ANY:  # no network is loaded to find what every one has
            select(prepare(task.trajectory[-1], task.engine), part.parameters)


def _gradients(method: object) -> Iterator[Gradient]:
    """The gradients that a method measures, as far as they stand among its settings."""
    if dataclasses.is_dataclass(method):
        values = (getattr(method, field.name) for field in dataclasses.fields(method))
        yield from (value for value in values if isinstance(value, Gradient))
