"""Judging scores against retrained models: LDS, its intervals, the ceiling seed noise puts on it, and retrieval.

Nothing here knows how a score was made. Shapes: scores [m, n], masks bool [r, n], outputs [r, m], with n training images,
m queries, r retraining runs. A larger score = the image did more FOR the query; `better` says whether a good fit makes the
output "lower" (a loss) or "higher" (a margin, a log-probability). Correlations are dimensionless, in [-1, 1]; where one is
not defined (a constant column) it is NaN and counted, never 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from whence.types import WhenceError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Setting = TypeVar("Setting", bound=Hashable)


@dataclass(frozen=True)
class Interval:
    """A statistic on all rows, its interval, and the number of queries that had no value and were left out."""

    estimate: float
    low: float
    high: float
    undefined: int = 0

    @property
    def width(self) -> float:
        return self.high - self.low


# ---------------------------------------------------------------------------------------------------------------- LDS


def predict(scores: ArrayLike, masks: ArrayLike) -> Array:
    """What the scores say about each run: pred[j, q] = sum_{i in S_j} scores[q, i].  [m, n], [r, n] -> [r, m].

    Sums that differ by no more than the rounding of the summation are made equal, so that equal subsets and constant
    scores are ties for the ranks that follow, on every machine.
    """
    tau, kept = _matrix("scores", scores), _masks(masks)
    if tau.shape[1] != kept.shape[1]:
        raise WhenceError(f"scores {tau.shape} and masks {kept.shape} must have one column per training image each")
    rounding = np.finfo(np.float64).eps * np.sqrt(tau.shape[1]) * np.abs(tau).sum(axis=1)
    return _join(kept.astype(np.float64) @ tau.T, rounding)


def spearman(a: ArrayLike, b: ArrayLike) -> Array:
    """Spearman correlation of each pair of columns, [r, m] and [r, m] -> [m]: Pearson of average ranks, NaN if constant."""
    a, b = _matrix("the first table", a), _matrix("the second table", b)
    if a.shape != b.shape or len(a) < 2:
        raise WhenceError(
            f"cannot correlate columns of {a.shape} with {b.shape}; two equal shapes with >= 2 rows can be"
        )
    return _pearson(rankdata(a, axis=0), rankdata(b, axis=0))


def lds(scores: ArrayLike, masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Array:
    """Linear datamodelling score of each query [m]; the LDS of a method is its mean.

        pred[j, q] = sum_{i in S_j} scores[q, i];   LDS[q] = Spearman_j( pred[j, q], orient(outputs[j, q]) )

    scores [m, n]; masks bool [r, n]; outputs [r, m], already averaged over the seeds of each subset; orient = -outputs
    where lower is better. Adding a constant to the scores changes nothing on masks of one size, but does on others.
    Errors: WhenceError for shapes that do not fit, entries that are not finite, masks that are not 0/1.
    Source: Park et al. 2023 (2303.14186). Differs from released code: outputs are averaged before they are ranked, and
    a constant row is NaN.
    """
    return spearman(predict(scores, masks), _orient(outputs, better))


@dataclass(frozen=True)
class Bootstrap:
    """Resampled LDS of several methods on the same resamples, so that differences are paired.

    lds[name]: [m] on all runs; resampled[name]: [B, m]; query_counts: [B, m], how often each query was drawn.
    """

    lds: Mapping[str, Array]
    resampled: Mapping[str, Array]
    query_counts: Array
    level: float

    def interval(self, method: str) -> Interval:
        """Mean LDS over the queries, with its two-way interval."""
        return _two_way(self.lds[self._known(method)], self.resampled[method], self.query_counts, self.level)

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

    predictions[name]: [r, m] from `predict`; outputs [r, m]. In a resample with counts w_j, the centred average rank of
    run j is c_j = ½ Σ_k w_k sign(x_j - x_k), ties and repeated runs included, so that all resamples of a query are ranked
    by one product [B, r] @ [r, r] (fp32, where these integers are exact), and LDS* = Σ w c^x c^y / √(Σ w c^x² Σ w c^y²).

    Interval: the quantiles of the resampled mean, corrected twice.
    * Centre. The estimate is always the statistic on all rows. Spearman is low by about ρ/(r+1) in a sample, and repeated
      runs lower it as much again in a resample; the interval is moved up by that bias and so aims at the LDS of
      infinitely many subsets.
    * Width. Resampling both axes counts the variance of a single cell three times (Owen 2007). With the variances of
      resampling runs only, queries only and both, V_cell = V_both - V_runs - V_queries, and the distribution is scaled to
      the variance V_runs + V_queries - V_cell.
    Coverage of the 95 % interval on simulated banks of 32-96 subsets and 12-200 queries: 94-96 %.
    Errors: WhenceError for fewer than 3 runs, other shapes, or fewer than 100 resamples.
    """
    y = _orient(outputs, better)
    x = {name: _matrix(f"predictions {name!r}", table) for name, table in predictions.items()}
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
            resampled[name][:, q] = _ratio(np.einsum("br,br->b", weighted_y, rank_x), np.sqrt(var_x * var_y))
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
    runs = _weighted_mean(resampled, np.ones_like(counts))
    queries = _weighted_mean(np.broadcast_to(full, counts.shape), counts)
    both = _weighted_mean(resampled, counts)
    # Few queries or runs can leave a resample without any defined value.
    v_runs, v_queries, v_both = (float(np.nanvar(values)) for values in (runs, queries, both))
    v_cell = min(max(v_both - v_runs - v_queries, 0.0), v_runs, v_queries)
    v_queries *= len(full) / max(len(full) - 1, 1)  # queries resampled from m of them vary by (m-1)/m only
    scale = np.sqrt((v_runs + v_queries - v_cell) / v_both) if v_both > 0 else 0.0
    # Repeated runs lower a resample as much as a finite number of runs lowered the estimate.
    centre = 2 * estimate - float(np.nanmean(both))
    low, high = _around(centre, both, level, scale)
    return Interval(estimate, low, high, undefined)


def _around(centre: float, resampled: Array, level: float, scale: float = 1.0) -> tuple[float, float]:
    """Quantiles of a resampled statistic [B], scaled about their mean and moved so that the mean stands at the centre."""
    known = resampled[np.isfinite(resampled)]
    if not known.size:
        return np.nan, np.nan
    low, high = centre + scale * (np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) - known.mean())
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------------ noise ceiling


@dataclass(frozen=True)
class Reliability:
    """Share of the variance over subsets that is not seed noise, per query, clipped to [0, 1]; NaN where undefined.

    one_seed [m]: ρ of a single seed; mean_of_seeds [m]: R of the mean over `seeds` [m] seeds per subset (K0, the
    effective number where subsets have unequal numbers).
    """

    one_seed: Array
    mean_of_seeds: Array
    seeds: Array


@dataclass(frozen=True)
class Ceiling:
    """The mean over queries of the best correlation an oracle that knows E[output | subset] could reach."""

    pearson: Interval
    spearman: Interval


@dataclass(frozen=True)
class Plan:
    """What a bank would buy: ceilings of the mean output, and the expected full width of the 95 % interval of the LDS."""

    pearson: float
    spearman: float
    width: float


def reliability(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> Reliability:
    """Reliability of retraining outputs by one-way analysis of variance, unequal seeds per subset allowed.

        MSB = Σ_j K_j (ȳ_j - ȳ)² / (M-1)      MSW = Σ_jk (y_jk - ȳ_j)² / Σ_j (K_j - 1)
        K0  = (ΣK_j - ΣK_j²/ΣK_j) / (M-1)     u = (MSW/MSB) (M-3)/(M-1)
        R   = 1 - u                           ρ = (1-u) / (1 + (K0-1) u)

    outputs_by_seed [runs, m]: one row per trained model, NaN = not measured; subset_index [runs]: which subset each row
    was trained on (M different values). Errors: WhenceError where no subset has two seeds, or with fewer than 4 subsets.
    Source: intraclass correlation ICC(1), Shrout & Fleiss 1979. Differs from the usual form by (M-3)/(M-1), the inverse
    mean of MSW/MSB under normal noise; without it R is low by 2(1-R)/(M-3), and scores seem to reach their ceiling.
    """
    counts, means, within = _by_subset(outputs_by_seed, subset_index)
    rho, reliable, seeds = _anova(np.ones((1, len(counts))), counts, means, within)
    return Reliability(np.clip(rho[0], 0, 1), np.clip(reliable[0], 0, 1), seeds[0])


def spearman_brown(one_seed: ArrayLike, seeds: ArrayLike) -> Array:
    """Reliability of a mean of K seeds from that of one: R_K = Kρ / (1 + (K-1)ρ)."""
    rho, k = np.asarray(one_seed, np.float64), np.asarray(seeds, np.float64)
    return np.asarray(k * rho / (1 + (k - 1) * rho), np.float64)


def replicate_correlation(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> Array:
    """Pearson correlation over subsets between two trainings that differ in the seed alone, per query [m].

    Mean over all pairs (a-th run, b-th run of a subset), each over the subsets that have both; its mean over queries
    estimates ρ, the reliability of one seed. Arguments and errors as `reliability`; NaN where a query is constant.
    """
    table, subsets = _runs(outputs_by_seed, subset_index)
    turn = np.array([int((subsets[:row] == subset).sum()) for row, subset in enumerate(subsets)])
    slots = np.full((turn.max() + 1, subsets.max() + 1, table.shape[1]), np.nan)
    slots[turn, subsets] = table
    pairs = [_pearson(slots[a], slots[b]) for a in range(len(slots)) for b in range(a)]
    return _nanmean(np.stack(pairs), axis=0)


def ceiling(
    outputs_by_seed: ArrayLike, subset_index: ArrayLike, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Ceiling:
    """The highest correlation with the seed-averaged outputs that seed noise leaves to any score.

        Pearson √R;   Spearman (6/π) asin(√R / 2), exact for a bivariate normal;   both averaged over queries

    R as in `reliability`, clipped to [0, 1]; the root makes the mean slightly low (< .005 for R > .5, .02 near R = .35).
    Interval: subsets resampled, queries held; quantiles centred on the estimate, because what repeated subsets take from
    R in a resample is no bias of R; clipped to [0, 1]. Simulated coverage 95-100 % (R > .4), 80 % near R = .35.
    A *linear* score stays below it by the nonlinear share. Queries without variance are left out and counted.
    Errors: WhenceError with one seed per subset: its noise cannot be told from its signal.
    """
    counts, means, within = _by_subset(outputs_by_seed, subset_index)
    subsets, m = counts.shape
    if resamples < 100 or not 0 < level < 1:
        raise WhenceError(f"bootstrap of {resamples} resamples, level {level}: needs >= 100, in (0, 1)")
    drawn = np.random.default_rng(seed).multinomial(subsets, np.full(subsets, 1 / subsets), size=resamples)
    weights = np.concatenate([np.ones((1, subsets)), drawn])
    pearson = np.sqrt(np.clip(_anova(weights, counts, means, within)[1], 0, 1))
    defined = np.isfinite(pearson[0])

    def interval(values: Array) -> Interval:
        mean = _nanmean(values[:, defined], axis=1)
        estimate = float(mean[0])
        low, high = np.clip(_around(estimate, mean[1:], level), 0, 1)
        return Interval(estimate, float(low), float(high), m - int(defined.sum()))

    return Ceiling(interval(pearson), interval(_to_spearman(pearson)))


def planner(
    subsets: int,
    seeds: int,
    queries: int,
    reliability: float,
    lds: float = 0.0,
    spread: float = 0.0,
    shared: float = 0.0,
) -> Plan:
    """Expected ceiling and width of the 95 % interval of a bank that is not trained yet.

        v = (1 - lds²)² (1 + lds²/2) / (subsets - 3)                         one query's Spearman (Bonett & Wright 2000)
        width = 2·1.96·√( spread²/queries + v·(shared + (1 - shared)/queries) )

    reliability: ρ of one seed, in [0, 1]; lds: the mean LDS expected; spread: standard deviation of the true LDS between
    queries; shared: correlation of two queries' errors (they are judged on the same subsets). The zero defaults give the
    narrowest interval a bank can have for its size; take the three from a pilot to be realistic.
    Errors: WhenceError outside subsets > 3, seeds and queries >= 1, correlations and ρ in their range.
    """
    sizes = subsets > 3 and seeds >= 1 and queries >= 1
    if not (sizes and 0 <= reliability <= 1 and -1 < lds < 1 and spread >= 0 and 0 <= shared <= 1):
        raise WhenceError(
            f"cannot plan {subsets} subsets, {seeds} seeds, {queries} queries, reliability {reliability}, lds {lds}, "
            f"spread {spread}, shared {shared}: needs > 3, >= 1, >= 1, [0, 1], (-1, 1), >= 0, [0, 1]"
        )
    pearson = np.sqrt(spearman_brown(reliability, seeds))
    one_query = (1 - lds**2) ** 2 * (1 + lds**2 / 2) / (subsets - 3)
    variance = spread**2 / queries + one_query * (shared + (1 - shared) / queries)
    return Plan(
        float(pearson), float(_to_spearman(pearson)), 2 * NormalDist().inv_cdf(0.975) * float(np.sqrt(variance))
    )


def _by_subset(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> tuple[Array, Array, Array]:
    """Per subset and query [M, m]: number of seeds, mean over them (grand mean removed), sum of squares within."""
    table, subsets = _runs(outputs_by_seed, subset_index)
    table = table - _nanmean(table, axis=0)
    member = np.equal.outer(np.arange(subsets.max() + 1), subsets).astype(np.float64)
    seen = np.isfinite(table)
    values = np.where(seen, table, 0.0)
    counts = member @ seen
    means = (member @ values) / np.maximum(counts, 1)
    within = member @ np.where(seen, (values - means[subsets]) ** 2, 0.0)
    return counts, means, within


def _anova(weights: Array, counts: Array, means: Array, within: Array) -> tuple[Array, Array, Array]:
    """ρ, R and K0 of each weighting of the subsets [B, M]: three tables [B, m], not clipped."""
    total = weights @ counts
    between_df = weights @ (counts > 0) - 1
    squares = weights @ (counts * means**2) - _ratio((weights @ (counts * means)) ** 2, total)
    between = _ratio(squares, between_df)
    noise = _ratio(weights @ within, weights @ np.maximum(counts - 1, 0))
    seeds = _ratio(total - _ratio(weights @ counts**2, total), between_df)
    share = _ratio(noise, between) * (between_df - 2) / between_df
    return (1 - share) / (1 + (seeds - 1) * share), 1 - share, seeds


def _to_spearman(pearson: ArrayLike) -> Array:
    return np.asarray(6 / np.pi * np.arcsin(np.asarray(pearson) / 2), np.float64)


def _runs(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    table = np.asarray(outputs_by_seed, np.float64)
    subsets = np.asarray(subset_index)
    if table.ndim != 2 or subsets.shape != table.shape[:1] or np.isinf(table).any():
        raise WhenceError(f"outputs {table.shape} by subset {subsets.shape}: needs [runs, m] without Inf, and [runs]")
    names, index, counts = np.unique(subsets, return_inverse=True, return_counts=True)
    if len(names) < 4 or counts.max() < 2:
        raise WhenceError(
            f"{len(names)} subsets with at most {counts.max(initial=0)} seeds each cannot tell seed noise from signal; "
            "needs >= 4 subsets, some of them with >= 2 seeds"
        )
    return table, index.astype(np.int64)


# ------------------------------------------------------------------------------------------------------ nested choice


@dataclass(frozen=True)
class Nested:
    """A setting chosen on tune runs and judged on test runs.

    lds: the mean LDS on the test runs of the setting chosen on the tune runs, the number to report; optimism: how much
    higher the best setting on the test runs stands; tune, test: both curves, setting -> mean LDS.
    """

    setting: Any
    lds: float
    optimism: float
    tune: Mapping[Any, float]
    test: Mapping[Any, float]


def choose(
    candidates: Mapping[Setting, ArrayLike], tune_masks: ArrayLike, tune_outputs: ArrayLike, better: str = "lower"
) -> Setting:
    """The setting whose scores [m, n] have the highest mean LDS on the tune runs; the first of equals.

    A query about which a candidate predicts nothing (constant) counts 0 for it in the choice; a query without variance
    is left out for all. Errors: WhenceError when there is no candidate or no query has variance.
    """
    curve = _curve(candidates, tune_masks, tune_outputs, better)
    return max(curve, key=lambda setting: curve[setting])


def nested(
    candidates: Mapping[Setting, ArrayLike],
    tune_masks: ArrayLike,
    tune_outputs: ArrayLike,
    test_masks: ArrayLike,
    test_outputs: ArrayLike,
    better: str = "lower",
) -> Nested:
    """Choose on tune runs, report on test runs, and say what choosing on the test runs would have pretended.

    Errors: WhenceError when a subset stands in both, or as `choose`.
    """
    tuned, tested = _masks(tune_masks), _masks(test_masks)
    shared = {row.tobytes() for row in np.packbits(tuned, axis=1)} & {
        row.tobytes() for row in np.packbits(tested, axis=1)
    }
    if shared:
        raise WhenceError(f"{len(shared)} subsets stand in the tune and the test runs; they must have none in common")
    tune = _curve(candidates, tuned, tune_outputs, better)
    test = _curve(candidates, tested, test_outputs, better)
    setting = max(tune, key=lambda key: tune[key])
    return Nested(setting, test[setting], max(test.values()) - test[setting], tune, test)


def _curve(
    candidates: Mapping[Setting, ArrayLike], masks: ArrayLike, outputs: ArrayLike, better: str
) -> dict[Setting, float]:
    varies = np.ptp(_matrix("outputs", outputs), axis=0) > 0
    if not candidates or not varies.any():
        raise WhenceError(
            f"cannot choose between {len(candidates)} candidates on {varies.sum()} queries that vary; needs 1"
        )
    judged = {setting: lds(scores, masks, outputs, better)[varies] for setting, scores in candidates.items()}
    return {setting: float(np.nan_to_num(values).mean()) for setting, values in judged.items()}


def sharpen(scores: ArrayLike, power: float) -> Array:
    """sign(tau) |tau|^power: large scores stand out of the sum over a subset, small ones drop out. Any shape -> the same.

    The order of a query's scores, and with it removal and retrieval, stays; only sums (LDS) change. The power is chosen on
    tune rows, as a damping is: `nested({p: sharpen(tau, p) for p in powers}, ...)`. Errors: a power that is not above 0.
    """
    if not 0 < power < np.inf:
        raise WhenceError(f"sharpen: power {power}; it must be above 0 and finite, or the order of the scores is lost")
    tau = np.asarray(scores, dtype=np.float64)
    return np.sign(tau) * np.abs(tau) ** power


# ---------------------------------------------------------------------------------------------------------- retrieval


def recall_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Array:
    """Share of each query's relevant images (planted duplicates) among its k highest scores: [m], NaN without any.

    scores [m, n]; relevant bool [m, n]. Of images that tie for the last places the expected number counts, so neither the
    order of the images nor a constant score can win. Errors: WhenceError for other shapes or k outside 1..n.
    """
    hits, wanted = _hits(scores, relevant, k)
    return _ratio(hits, wanted)


def precision_at_k(scores: ArrayLike, train_labels: ArrayLike, query_labels: ArrayLike, k: int) -> Array:
    """Share of each query's k highest scores that carry the query's label (class retrieval): [m]. Ties as `recall_at_k`.

    scores [m, n]; train_labels [n]; query_labels [m]. Looks alike, not: made it. Class retrieval is no counterfactual.
    """
    hits, _ = _hits(scores, np.equal.outer(np.asarray(query_labels), np.asarray(train_labels)), k)
    return hits / k


def mislabel_auroc(self_influence: ArrayLike, mislabelled: ArrayLike) -> float:
    """Probability that a mislabelled image has a higher self-influence than a clean one, ties counting half.

    self_influence [n]; mislabelled bool [n]. Errors: WhenceError for other shapes, or without images of both kinds.
    """
    values, bad = _matrix("self-influence", np.atleast_2d(self_influence))[0], np.asarray(mislabelled, bool)
    if values.shape != bad.shape or bad.all() or not bad.any():
        raise WhenceError(
            f"{bad.sum()} of {bad.size} images marked, {values.size} scored: needs both kinds, equally long"
        )
    positive, negative = int(bad.sum()), int((~bad).sum())
    return float((rankdata(values)[bad].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _hits(scores: ArrayLike, relevant: ArrayLike, k: int) -> tuple[Array, Array]:
    """Expected number of relevant images among the k highest, and number of relevant images: [m] each."""
    tau, wanted = _matrix("scores", scores), np.asarray(relevant, bool)
    if tau.shape != wanted.shape or not 1 <= k <= tau.shape[1]:
        raise WhenceError(f"top {k} of scores {tau.shape} against {wanted.shape}: needs equal shapes and k in 1..n")
    last = -np.partition(-tau, k - 1, axis=1)[:, k - 1 : k]
    above, tied = tau > last, tau == last
    share = (k - above.sum(axis=1)) / tied.sum(axis=1)
    return (above & wanted).sum(axis=1) + share * (tied & wanted).sum(axis=1), wanted.sum(axis=1).astype(np.float64)


# -------------------------------------------------------------------------------------------------------------- parts


def _matrix(name: str, values: ArrayLike) -> Array:
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or table.size == 0:
        raise WhenceError(f"{name} have shape {table.shape}; a table of two axes is accepted")
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        raise WhenceError(f"{len(bad)} entries of {name} are not finite; the first is at {tuple(map(int, bad[0]))}")
    return table


def _masks(values: ArrayLike) -> Mask:
    table = np.asarray(values)
    if table.ndim != 2 or table.size == 0 or not (table.dtype == bool or np.isin(table, (0, 1)).all()):
        raise WhenceError(
            f"masks have shape {table.shape} and type {table.dtype}; a table [r, n] of 0 and 1 is accepted, "
            "1 where the run trained on the image"
        )
    return table.astype(bool)


def _orient(outputs: ArrayLike, better: str) -> Array:
    """Outputs with larger = better fit."""
    signs = {"lower": -1.0, "higher": 1.0}
    if better not in signs:
        raise WhenceError(f"better={better!r} says nothing about the output; 'lower' (a loss) or 'higher' is accepted")
    return signs[better] * _matrix("outputs", outputs)


def _join(table: Array, gap: Array) -> Array:
    """Each column [r, m] with neighbours closer than its gap [m] made equal to the lowest of them."""
    order = np.argsort(table, axis=0, kind="stable")
    ranked = np.take_along_axis(table, order, axis=0)
    starts = np.diff(ranked, axis=0, prepend=-np.inf) > gap
    first = np.maximum.accumulate(np.where(starts, np.arange(len(table))[:, None], 0), axis=0)
    joined = np.empty_like(table)
    np.put_along_axis(joined, order, np.take_along_axis(ranked, first, axis=0), axis=0)
    return joined


def _pearson(a: Array, b: Array) -> Array:
    """Pearson correlation of paired columns [r, m], over the rows where both are known; NaN where one is constant."""
    known = np.isfinite(a) & np.isfinite(b)
    a, b = (_centred(np.where(known, table, np.nan)) for table in (a, b))
    scale = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    # Rounding can leave the last bit above 1.
    return np.clip(_ratio((a * b).sum(axis=0), scale), -1, 1)


def _centred(table: Array) -> Array:
    """Columns minus their mean, unknown entries 0; a constant column is exactly 0, whatever the rounding of its mean."""
    known = np.isfinite(table)
    highest, lowest = np.where(known, table, -np.inf).max(axis=0), np.where(known, table, np.inf).min(axis=0)
    return np.where(known & (highest > lowest), table - _nanmean(table, axis=0), 0.0)


def _weighted_mean(values: Array, counts: Array) -> Array:
    """Mean over the last axis of the defined values: [B, m], [B, m] -> [B]."""
    known = np.isfinite(values)
    return _ratio((np.where(known, values, 0.0) * counts).sum(axis=-1), (known * counts).sum(axis=-1))


def _nanmean(table: Array, axis: int) -> Array:
    known = np.isfinite(table)
    return _ratio(np.where(known, table, 0.0).sum(axis=axis), known.sum(axis=axis))


def _ratio(top: Any, bottom: Any) -> Array:
    """top / bottom, NaN where bottom is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(top, np.float64), np.asarray(bottom, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
