"""The histogram of one query's scores, as numbers to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from whence.report.words import all_equal, number

LEFT, RIGHT, SKY, FLOOR = 10, 410, 22, 98  # the plot within the 420 x 136 box of the histogram in report.html


@dataclass(frozen=True)
class Histogram:
    """Counts of one query's scores, ready to be drawn. Places are x coordinates in px.

    Args:
        bars: all of them as one SVG path.
        tallest: images in the fullest bar.
        ticks: (place, text) of each.
        zero: place of a score of 0; None where it is outside.
        top: places of the strongest images.
        bottom: places of the strongest opponents.
    """

    bars: str
    tallest: int
    ticks: list[tuple[float, str]]
    zero: float | None
    top: list[float]
    bottom: list[float]


def histogram_of(
    row: np.ndarray,
    top: Sequence[int],
    bottom: Sequence[int],
    counted: tuple[Tensor, Tensor] | None = None,
    bins: int = 60,
) -> Histogram:
    """The histogram of a query.

    Args:
        row: its scores [n].
        top: rows of the strongest images.
        bottom: rows of the strongest opponents.
        counted: (counts, edges) of all scores, where the row has the first and last of them alone.
        bins: bars.
    """
    low, high = float(row.min()), float(row.max())
    if all_equal(row):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def place(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1)

    if counted is None:
        counts, edges = np.histogram(row, bins=bins, range=(low, high))
    else:  # each of the fine bars goes where its middle is
        fine, at = (each.double().numpy() for each in counted)
        middle = ((at[:-1] + at[1:]) / 2).clip(low, high)
        counts, edges = np.histogram(middle, bins=bins, range=(low, high), weights=fine)
    # Every bar that holds an image is at least 1.5 high: a lone image far out must not vanish.
    heights = [max(1.5, (FLOOR - SKY) * count / counts.max()) for count in counts]
    bars = [
        f"M{place(left)} {FLOOR}V{FLOOR - height:.1f}H{place(right) - 0.6:.1f}V{FLOOR}Z"
        for left, right, height, count in zip(edges[:-1], edges[1:], heights, counts, strict=True)
        if count
    ]
    return Histogram(
        bars="".join(bars),
        tallest=int(counts.max()),
        ticks=[(place(value), text) for value, text in _ticks(low, high)],
        zero=place(0.0) if low < 0 < high else None,
        top=[place(row[i]) for i in top],
        bottom=[place(row[i]) for i in bottom],
    )


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """A few round numbers between two scores, written with just the digits that tell them apart."""
    values = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    step = float(values[1] - values[0])
    inside = [0.0 if abs(value) < step / 1e6 else float(value) for value in values if low <= value <= high]
    return [(value, number(value, 1 + _power(value) - _power(step)) if value else "0") for value in inside]


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)
