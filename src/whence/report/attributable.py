"""Does a picture lean on single training images more than pictures do that were never trained on?

    T = a statistic of a score row (see `STATISTICS`), larger = more on few images
    p[q] = (1 + #{references r : T[r] >= T[q]}) / (R + 1)           conformal; the references are held-out pictures
    a picture stands out where the p-values, adjusted by Benjamini & Hochberg over the pictures, are at most the rate

For a picture that is one more of the references' kind P(p <= a) <= a, whatever the method and the statistic: of what is said
to stand out, at most that rate is said so by chance, in expectation. Sources: conformal p-values, Vovk et al. 2005; false
discovery rate, Benjamini & Hochberg 1995, which holds for conformal p-values of one set of references, Bates et al. 2023
(2104.08279).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control

from whence.report.words import number
from whence.types import WhenceError

Array = NDArray[np.float64]
FEW = 20  # references; the smallest p-value that they allow is told below that
FIRST = 10  # images whose share is looked at


def conformal_p(values: ArrayLike, references: ArrayLike) -> Array:
    """p of each value [m] beside references [R], sorted ascending: (1 + #{references >= value}) / (R + 1)."""
    held = np.asarray(references, np.float64)
    reached = len(held) - np.searchsorted(held, np.asarray(values, np.float64), side="left")
    return np.asarray((1 + reached) / (len(held) + 1), np.float64)


def first_mean(rows: Array) -> Array:
    """The mean of the ten largest scores, in the units of the scores: [m]. Copies of one image share what it does for a
    picture and stand high together, where none of them stands out alone."""
    k = min(FIRST, rows.shape[1])
    return np.asarray(np.partition(rows, rows.shape[1] - k, axis=1)[:, rows.shape[1] - k :].mean(axis=1), np.float64)


def largest(rows: Array) -> Array:
    """How far the strongest image stands above the others: (max - median) / (1.4826 median |s - median|): [m]."""
    middle = np.median(rows, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(rows - middle), axis=1)
    return _ratio(rows.max(axis=1) - middle[:, 0], spread)


def first_share(rows: Array) -> Array:
    """The share of the positive mass in the first ten images: [m]."""
    positive = np.clip(rows, 0, None)
    k = min(FIRST, rows.shape[1])
    strongest = np.partition(positive, rows.shape[1] - k, axis=1)[:, rows.shape[1] - k :]
    return _ratio(strongest.sum(axis=1), positive.sum(axis=1))


def concentration(rows: Array) -> Array:
    """1 / the effective number of images, sum s+^2 / (sum s+)^2: [m]."""
    positive = np.clip(rows, 0, None)
    return _ratio((positive**2).sum(axis=1), positive.sum(axis=1) ** 2)


def _ratio(top: Array, bottom: Array) -> Array:
    """0 where nothing stands below: rows of equal scores, or of none above 0, lean on nobody."""
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


STATISTICS: dict[str, Callable[[Array], Array]] = {
    "first_mean": first_mean,
    "largest": largest,
    "first_share": first_share,
    "concentration": concentration,
}


@dataclass(frozen=True, eq=False)
class Attributability:
    """Which pictures lean on single training images.

    Args:
        statistic: which one was taken.
        rate: the false discovery rate.
        values: T of the pictures [m].
        references: T of the references [R].
        p: conformal p-values [m].
        adjusted: by Benjamini & Hochberg over the pictures [m].
    """

    statistic: str
    rate: float
    values: Array
    references: Array
    p: Array
    adjusted: Array

    @property
    def stands_out(self) -> list[bool]:
        """Of each picture."""
        return (self.adjusted <= self.rate + 1e-12).tolist()

    @property
    def least(self) -> float:
        """The smallest p-value that the references allow."""
        return 1 / (len(self.references) + 1)

    @property
    def doubt(self) -> str:
        """What the references cannot tell, in words; "" where there is nothing."""
        m, count = len(self.values), len(self.references)
        need = int(
            np.ceil(self.least * m / self.rate - 1e-9)
        )  # pictures at the smallest p-value that stand out together
        told = f"{count} references allow no p-value below {self.least:.2g}: at a rate of {self.rate:g} "
        if need > m:
            return f"{told}no picture can stand out; give {int(np.ceil(1 / self.rate - 1e-9)) - 1} or more"
        if need > 1:
            more = int(np.ceil(m / self.rate - 1e-9)) - 1
            return f"{told}a picture stands out only if {need} of the {m} do together; give {more} or more"
        return f"{told}this says little" if count < FEW else ""


@dataclass(frozen=True)
class Leaning:
    """Whether one picture leans on single training images.

    Args:
        p: its p-value.
        adjusted: over the pictures of the run.
        stands_out: whether that is at most the rate.
        references: pictures that it was compared with.
        rate: of false discoveries.
        doubt: what so few references cannot tell; "" for nothing.
    """

    p: float
    adjusted: float
    stands_out: bool
    references: int
    rate: float
    doubt: str = ""

    @property
    def verdict(self) -> tuple[str, str]:
        """The finding, and the numbers it rests on."""
        more = f"; {self.doubt}" if self.doubt else ""
        share = f"{number(100 * self.p, 2)}\N{NO-BREAK SPACE}%"
        if self.stands_out:
            return "It leans on single training images", (
                f"of {self.references:,} held-out pictures, which were never trained on, at most {share} lean on few images "
                f"as much (p = {number(self.p, 2)}, {number(self.adjusted, 2)} adjusted over the pictures; at most "
                f"{number(100 * self.rate, 2)}\N{NO-BREAK SPACE}% of those that are said to lean are so by chance){more}"
            )
        return "No single image stands out", (
            f"about {share} of {self.references:,} held-out pictures, which were never trained on, lean on few images as "
            f"much (p = {number(self.p, 2)}, {number(self.adjusted, 2)} adjusted over the pictures){more}"
        )


def attributability(
    scores: ArrayLike, references: ArrayLike, statistic: str = "first_mean", rate: float = 0.1
) -> Attributability:
    """Which pictures stand out against pictures that were never trained on.

    Args:
        scores: of the pictures [m, n], of a method with a sign.
        references: of held-out pictures by the same method, for the same training images [R, n].
        statistic: a key of `STATISTICS`.
        rate: of false discoveries among those that are said to stand out.
    """
    rows, others = (np.asarray(each, np.float64) for each in (scores, references))
    if rows.ndim != 2 or others.ndim != 2 or rows.shape[1] != others.shape[1] or not len(rows) or not len(others):
        told = f"scores of shape {rows.shape}, of references {others.shape}"
        raise WhenceError(told, "attributability", "[m, n] and [R, n] of the same training images")
    if not (np.isfinite(rows).all() and np.isfinite(others).all()):
        raise WhenceError("some scores are not finite", "attributability", "numbers")
    if statistic not in STATISTICS:
        raise WhenceError(f"no statistic {statistic!r}", "attributability", ", ".join(STATISTICS))
    if not 0 < rate < 1:
        raise WhenceError(f"a rate of {rate:g}", "attributability", "above 0 and below 1")
    own, held = STATISTICS[statistic](rows), np.sort(STATISTICS[statistic](others))
    p = conformal_p(own, held)
    return Attributability(statistic, rate, own, held, p, np.asarray(false_discovery_control(p), np.float64))
