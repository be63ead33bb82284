"""The linear datamodeling score and its two-way bootstrap."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from whence.evaluation.tables import join, oriented, pearson_columns, ratio, weighted_mean
from whence.storage.tables import Array, checked_masks, matrix
from whence.types import WhenceError

Setting = TypeVar("Setting", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A statistic and its interval.

    Args:
        estimate: on all rows.
        low: end of the interval.
        high: end of the interval.
        undefined: queries that had no value and were left out.
        centre: the estimate for infinitely many runs, which the ends are about: of an LDS a little above the estimate, as a
            rank correlation is low in a sample. NaN where the estimate is that itself.
    """

    estimate: float
    low: float
    high: float
    undefined: int = 0
    centre: float = float("nan")

    @property
    def width(self) -> float:
        return self.high - self.low


def predict(scores: ArrayLike, masks: ArrayLike) -> Array:
    """What the scores say about each run: pred[j, q] = sum_{i in S_j} scores[q, i].  [m, n], [r, n] -> [r, m].

    Sums that differ by no more than the rounding of the summation are made equal, so that equal subsets and constant
    scores are ties for the ranks that follow, on every machine.
    """
    tau, kept = matrix("scores", scores), checked_masks(masks)
    if tau.shape[1] != kept.shape[1]:
        raise WhenceError(f"scores {tau.shape} and masks {kept.shape} must have one column per training image each")
    rounding = np.finfo(np.float64).eps * np.sqrt(tau.shape[1]) * np.abs(tau).sum(axis=1)
    return join(kept.astype(np.float64) @ tau.T, rounding)


def spearman(a: ArrayLike, b: ArrayLike) -> Array:
    """Spearman correlation of each pair of columns, [r, m] and [r, m] -> [m]: Pearson of average ranks, NaN if constant."""
    a, b = matrix("the first table", a), matrix("the second table", b)
    if a.shape != b.shape or len(a) < 2:
        raise WhenceError(
            f"cannot correlate columns of {a.shape} with {b.shape}; two equal shapes with >= 2 rows can be"
        )
    return pearson_columns(rankdata(a, axis=0), rankdata(b, axis=0))


def lds(scores: ArrayLike, masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Array:
    """Linear datamodelling score of each query [m]; the LDS of a method is its mean.

        pred[j, q] = sum_{i in S_j} scores[q, i];   LDS[q] = Spearman_j( pred[j, q], orient(outputs[j, q]) )

    orient = -outputs where lower is better. Adding a constant to the scores changes nothing on masks of one size, but
    does on others. Errors: WhenceError for shapes that do not fit, entries that are not finite, masks that are not 0/1.
    Source: Park et al. 2023 (2303.14186). Differs from released code: outputs are averaged before they are ranked, and
    a constant row is NaN.

    Args:
        scores: [m, n].
        masks: which images each run was trained on, bool [r, n].
        outputs: [r, m], already averaged over the seeds of each subset.
        better: of an output, "lower" or "higher".
    """
    return spearman(predict(scores, masks), oriented(outputs, better))


@dataclass(frozen=True)
class Bootstrap:
    """Resampled LDS of several methods on the same resamples, so that differences are paired.

    Args:
        lds: method -> on all runs [m].
        resampled: method -> in each resample [B, m].
        query_counts: how often each query was drawn [B, m].
        level: of the intervals.
    """

    lds: Mapping[str, Array]
    resampled: Mapping[str, Array]
    query_counts: Array
    level: float

    def interval(self, method: str) -> Interval:
        """Mean LDS over the queries, with its two-way interval, which ends at 1 as the LDS does."""
        found = _two_way(self.lds[self._known(method)], self.resampled[method], self.query_counts, self.level)
        ends = (max(-1.0, min(end, 1.0)) for end in (found.low, found.high, found.centre))
        low, high, centre = ends if np.isfinite(found.estimate) else (np.nan,) * 3
        return replace(found, low=low, high=high, centre=centre)

    def difference(self, method: str, other: str) -> Interval:
        """Mean LDS of `method` minus that of `other`, paired by subset and query."""
        a, b = self._known(method), self._known(other)
        return _two_way(self.lds[a] - self.lds[b], self.resampled[a] - self.resampled[b], self.query_counts, self.level)

    def _known(self, method: str) -> str:
        if method not in self.lds:
            raise WhenceError(f"no method {method!r} was resampled; there is {sorted(self.lds)}")
        return method


def bootstrap(
    predictions: Mapping[str, ArrayLike],
    outputs: ArrayLike,
    better: str = "lower",
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Bootstrap:
    """Two-way bootstrap of the LDS: subsets and queries are both drawn again, the same way for every method.

    In a resample with counts w_j, the centred average rank of run j is c_j = ½ Σ_k w_k sign(x_j - x_k), ties and repeated
    runs included, so that all resamples of a query are ranked by one product [B, r] @ [r, r] (fp32, where these integers are
    exact), and LDS* = Σ w c^x c^y / √(Σ w c^x² Σ w c^y²).

    Interval: the quantiles of the resampled mean, corrected twice.
    * Centre. The estimate is always the statistic on all rows. Spearman is low by about ρ/(r+1) in a sample, and repeated
      runs lower it as much again in a resample; the interval is moved up by that bias and so aims at the LDS of
      infinitely many subsets, `Interval.centre`.
    * Width. Resampling both axes counts the variance of a single cell three times (Owen 2007). With the variances of
      resampling runs only, queries only and both, V_cell = V_both - V_runs - V_queries, and the distribution is scaled to
      the variance V_runs + V_queries - V_cell.
    Coverage of the 95 % interval on simulated banks of 32-96 subsets and 12-200 queries: 94-96 %.
    Errors: WhenceError for fewer than 3 runs, other shapes, or fewer than 100 resamples.

    Args:
        predictions: method -> [r, m] from `predict`.
        outputs: [r, m], averaged over the seeds of each subset.
        better: of an output, "lower" or "higher".
        resamples: B.
        seed: of the resamples.
        level: of the intervals.
    """
    y = oriented(outputs, better)
    x = {name: matrix(f"predictions {name!r}", table) for name, table in predictions.items()}
    for name, table in x.items():
        if table.shape != y.shape:
            raise WhenceError(
                f"predictions {name!r} have shape {table.shape}, the outputs {y.shape}; they must be equal"
            )
    r, m = y.shape
    if r < 3 or resamples < 100 or not 0 < level < 1:
        raise WhenceError(f"bootstrap of {r} runs, {resamples} resamples, level {level}: needs >= 3, >= 100, in (0, 1)")
    rng = np.random.default_rng(seed)
    runs = rng.multinomial(r, np.full(r, 1 / r), size=resamples).astype(np.float32)
    queries = rng.multinomial(m, np.full(m, 1 / m), size=resamples).astype(np.float64)
    resampled = {name: np.empty((resamples, m)) for name in x}
    for q in range(m):
        rank_y = _resampled_ranks(y[:, q], runs)
        weighted_y = runs * rank_y
        var_y = np.einsum("br,br->b", weighted_y, rank_y)
        for name, table in x.items():
            rank_x = _resampled_ranks(table[:, q], runs)
            var_x = np.einsum("br,br,br->b", runs, rank_x, rank_x)
            resampled[name][:, q] = ratio(np.einsum("br,br->b", weighted_y, rank_x), np.sqrt(var_x * var_y))
    return Bootstrap({name: spearman(table, y) for name, table in x.items()}, resampled, queries, level)


def _resampled_ranks(column: Array, runs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centred average ranks of a column [r] in every resample: [B, r]."""
    return runs @ (0.5 * np.sign(column[None, :] - column[:, None])).astype(np.float32)


def _two_way(full: Array, resampled: Array, counts: Array, level: float) -> Interval:
    """Interval of the mean over queries from per-query values [m], resampled values and query counts [B, m] each."""
    defined = np.isfinite(full)
    undefined = int((~defined).sum())
    if not defined.any():
        return Interval(np.nan, np.nan, np.nan, undefined)
    full, resampled, counts = full[defined], resampled[:, defined], counts[:, defined]
    estimate = float(full.mean())
    runs = weighted_mean(resampled, np.ones_like(counts))
    queries = weighted_mean(np.broadcast_to(full, counts.shape), counts)
    both = weighted_mean(resampled, counts)
    # Few queries or runs can leave a resample without any defined value.
    v_runs, v_queries, v_both = (float(np.nanvar(values)) for values in (runs, queries, both))
    v_cell = min(max(v_both - v_runs - v_queries, 0.0), v_runs, v_queries)
    v_queries *= len(full) / max(len(full) - 1, 1)  # queries resampled from m of them vary by (m-1)/m only
    scale = np.sqrt((v_runs + v_queries - v_cell) / v_both) if v_both > 0 else 0.0
    # Repeated runs lower a resample as much as a finite number of runs lowered the estimate.
    centre = 2 * estimate - float(np.nanmean(both))
    low, high = around(centre, both, level, scale)
    return Interval(estimate, low, high, undefined, centre)


def around(centre: float, resampled: Array, level: float, scale: float = 1.0) -> tuple[float, float]:
    """Quantiles of a resampled statistic, scaled about their mean and moved so that the mean stands at the centre.

    Args:
        centre: where the mean is to stand.
        resampled: the statistic in each resample [B].
        level: share between the quantiles.
        scale: of the distance from the mean.
    """
    known = resampled[np.isfinite(resampled)]
    if not known.size:
        return np.nan, np.nan
    low, high = centre + scale * (np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) - known.mean())
    return float(low), float(high)
