"""Tables of numbers and masks that are checked before anything is computed from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from whence.types import WhenceError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def matrix(name: str, values: ArrayLike) -> Array:
    """A table of two axes, every entry finite; `name` says what it is in the error."""
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.size == 0:
        raise WhenceError(f"{name} have shape {table.shape}; a table of two axes is accepted")
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        raise WhenceError(f"{len(bad)} entries of {name} are not finite; the first is at {tuple(map(int, bad[0]))}")
    return table


def checked_masks(values: ArrayLike) -> Mask:
    """Which images each run trained on: [r, n] of 0 and 1."""
    table = np.asarray(values)
    if table.ndim != 2 or table.size == 0 or not (table.dtype == bool or np.isin(table, (0, 1)).all()):
        raise WhenceError(
            f"masks have shape {table.shape} and type {table.dtype}; a table [r, n] of 0 and 1 is accepted, "
            "1 where the run trained on the image"
        )
    return table.astype(bool)


def sign_of(better: str) -> float:
    """What an output is multiplied by so that larger is better."""
    signs = {"lower": -1.0, "higher": 1.0}
    if better not in signs:
        raise WhenceError(f"better={better!r} says nothing about the output; 'lower' (a loss) or 'higher' is accepted")
    return signs[better]
