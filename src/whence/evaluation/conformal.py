"""How unusual a similarity is beside those of things that are known to be no copies: conformal p-values.

    p(s) = (1 + #{i : c_i >= s}) / (n + 1)        c_1 ... c_n  the similarities of what is known

If s is one more of the same kind (exchangeable with the c_i), then P(p <= rate) <= rate for every rate (Vovk et al. 2005,
"Algorithmic Learning in a Random World"): whatever the distribution, at most that share of what is ordinary is flagged, in
expectation. p <= rate is the same as s above the threshold, the k-th largest c with k = floor(rate (n + 1)); a similarity
that equals the threshold is not flagged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from whence.report.attributable import conformal_p
from whence.types import WhenceError


def check_rate(rate: float, where: str) -> None:
    """Refuse a share that is none.

    Args:
        rate: the share.
        where: the option or argument that it was given by.
    """
    if not 0 < rate < 1:
        raise WhenceError(f"a rate of {rate:g}", where, "above 0 and below 1: .01 flags 1 % of what is no copy")


def least_rate(n: int) -> float:
    """The smallest rate that n similarities allow, 1 / (n + 1), rounded up to two digits."""
    exact = 1 / (n + 1)
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return min(1.0, round(math.ceil(exact / unit - 1e-9) * unit, 12))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Similarities of what is no copy, and the share of such that may be flagged.

    Args:
        values: c, finite, in any order [n].
        rate: above 0, below 1, and at least 1 / (n + 1).
        where: what to name in errors.
    """

    values: np.ndarray
    rate: float
    where: str = "rate"

    def __post_init__(self) -> None:
        check_rate(self.rate, self.where)
        object.__setattr__(self, "values", np.sort(np.asarray(self.values, np.float64)))
        n = len(self.values)
        if not np.isfinite(self.values).all():
            raise WhenceError("similarities that are not finite", self.where, "finite numbers")
        if self._allowed < 1:
            told = f"{n} similarities to compare with are too few for a rate of {self.rate:g}"
            raise WhenceError(
                told, self.where, f"{least_rate(n):g} or more, or {math.ceil(1 / self.rate - 1e-9) - 1:,}"
            )

    @property
    def _allowed(self) -> int:
        """floor(rate (n + 1)), safe from the rounding of the product."""
        return min(len(self.values), math.floor(self.rate * (len(self.values) + 1) + 1e-9))

    @property
    def threshold(self) -> float:
        """What a similarity must be above to be flagged."""
        return float(self.values[len(self.values) - self._allowed])

    def p(self, similarity: float) -> float:
        """(1 + #{c >= s}) / (n + 1)."""
        return float(conformal_p(similarity, self.values))

    def flags(self, similarity: float) -> bool:
        """Whether p <= rate."""
        return similarity > self.threshold
