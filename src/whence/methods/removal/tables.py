"""Checked tables of masks and outcomes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from whence.storage.tables import Array, Mask, checked_masks, matrix, sign_of
from whence.types import WhenceError


def side_means(weights: Array, y: Array) -> tuple[Array, Array]:
    """Weighted mean of the outputs over runs [n, m] and the variance of that mean, from weights [r, n] and y [r, m]."""
    total = counts(weights)[:, None]
    mean = weights.T @ y / total
    squared = weights**2
    square = squared.T @ y**2 - 2 * mean * (squared.T @ y) + mean**2 * squared.sum(axis=0)[:, None]
    effective = total**2 / squared.sum(axis=0)[:, None]
    return mean, spread_of_mean(square / total**2 * effective**2, effective)


def spread_of_mean(square: Array, count: Array) -> Array:
    """Σ(y-ȳ)² and a count -> the variance of the mean, NaN for a single run."""
    lone = count < 1 + 1e-9
    return np.where(lone, np.nan, np.maximum(square, 0) / np.where(lone, 1, count * (count - 1)))


def mean_variance(table: Array) -> Array:
    """Variance of the mean over seeds: [R, m] -> [m]."""
    return spread_of_mean(((table - table.mean(axis=0)) ** 2).sum(axis=0), np.full(table.shape[1], float(len(table))))


def counts(weights: Array) -> Array:
    """How much weight each image has [n], none of it 0."""
    total = np.asarray(weights.sum(axis=0), np.float64)
    if (total <= 0).any():
        raise WhenceError(
            f"image {int(total.argmin())} is in every run or in none; needs runs with and without each image"
        )
    return total


def checked_table(masks: ArrayLike, outputs: ArrayLike, better: str) -> tuple[Mask, Array, float]:
    """Masks, outputs and the sign of `better`; WhenceError where they do not fit.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        better: of an output, "lower" or "higher".
    """
    kept, y = checked_masks(masks), matrix("outputs", outputs)
    if len(kept) != len(y):
        raise WhenceError(f"masks {kept.shape} and outputs {y.shape} must have one row per run each")
    return kept, y, sign_of(better)


def checked_sizes(sizes: ArrayLike, players: int) -> Array:
    """Probabilities of coalition sizes [n]; WhenceError where they are none."""
    law = np.asarray(sizes, np.float64)
    if law.shape != (players,) or (law < 0).any() or not np.isclose(law.sum(), 1):
        raise WhenceError(
            f"sizes {law.shape} of {players} players; {players} probabilities, as from beta_sizes, are accepted"
        )
    return law


def checked_positive(name: str, values: ArrayLike, length: int | None = None) -> Array:
    """A list of positive numbers; WhenceError where they are not.

    Args:
        name: for the error.
        values: the numbers, or one that stands for `length` of them.
        length: how many; None for any number.
    """
    numbers = np.atleast_1d(np.asarray(values, np.float64))
    if length is not None and numbers.shape == (1,):
        numbers = np.repeat(numbers, length)
    if numbers.ndim != 1 or length not in (None, len(numbers)) or not (numbers > 0).all() or np.isinf(numbers).any():
        raise WhenceError(
            f"{name} of shape {numbers.shape}: needs positive numbers" + (f", 1 or {length}" if length else "")
        )
    return numbers
