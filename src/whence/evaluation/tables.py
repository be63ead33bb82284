"""What is computed column by column of a table of scores or outcomes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from whence.storage.tables import Array, matrix, sign_of


def oriented(outputs: ArrayLike, better: str) -> Array:
    """Outputs with larger = better fit."""
    return sign_of(better) * matrix("outputs", outputs)


def join(table: Array, gap: Array) -> Array:
    """Each column [r, m] with neighbours closer than its gap [m] made equal to the lowest of them."""
    order = np.argsort(table, axis=0, kind="stable")
    ranked = np.take_along_axis(table, order, axis=0)
    starts = np.diff(ranked, axis=0, prepend=-np.inf) > gap
    first = np.maximum.accumulate(np.where(starts, np.arange(len(table))[:, None], 0), axis=0)
    joined = np.empty_like(table)
    np.put_along_axis(joined, order, np.take_along_axis(ranked, first, axis=0), axis=0)
    return joined


def pearson_columns(a: Array, b: Array) -> Array:
    """Pearson correlation of paired columns [r, m], over the rows where both are known; NaN where one is constant."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = (_centred(np.where(known, table, np.nan)) for table in (a, b))
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    # Rounding can leave the last bit above 1.
    return np.clip(ratio((a * b).sum(axis=0), scale), -1, 1)


def _centred(table: Array) -> Array:
    """Columns minus their mean, unknown entries 0; a constant column is exactly 0, whatever the rounding of its mean."""
    known = np.isfinite(table)
    highest, lowest = np.where(known, table, -np.inf).max(axis=0), np.where(known, table, np.inf).min(axis=0)
    return np.where(known & (highest > lowest), table - nanmean(table, axis=0), 0.0)


def weighted_mean(values: Array, counts: Array) -> Array:
    """Mean over the last axis of the defined values: [B, m], [B, m] -> [B]."""
    known = np.isfinite(values)
    return ratio((np.where(known, values, 0.0) * counts).sum(axis=-1), (known * counts).sum(axis=-1))


def nanmean(table: Array, axis: int) -> Array:
    known = np.isfinite(table)
    return ratio(np.where(known, table, 0.0).sum(axis=axis), known.sum(axis=axis))


def ratio(top: ArrayLike, bottom: ArrayLike) -> Array:
    """top / bottom, NaN where bottom is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(top, np.float64), np.asarray(bottom, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
