"""The noise ceiling: what a perfect predictor of the expected outcome could reach, given the noise between seeds."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from whence.evaluation.lds import Interval, around
from whence.evaluation.tables import nanmean, pearson_columns, ratio
from whence.storage.tables import Array
from whence.types import WhenceError


@dataclass(frozen=True)
class Reliability:
    """Share of the variance over subsets that is not seed noise, per query, clipped to [0, 1]; NaN where undefined.

    Args:
        one_seed: ρ of a single seed [m].
        mean_of_seeds: R of the mean over `seeds` seeds per subset [m].
        seeds: K0, the effective number of seeds where subsets have unequal numbers [m].
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
class SubsetPlan:
    """What a bank would buy.

    Args:
        pearson: the ceiling of the mean output.
        spearman: the same for rank correlation, which the LDS is.
        width: the expected full width of the 95 % interval of the LDS.
    """

    pearson: float
    spearman: float
    width: float


def reliability(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> Reliability:
    """Reliability of retraining outputs by one-way analysis of variance, unequal seeds per subset allowed.

        MSB = Σ_j K_j (ȳ_j - ȳ)² / (M-1)      MSW = Σ_jk (y_jk - ȳ_j)² / Σ_j (K_j - 1)
        K0  = (ΣK_j - ΣK_j²/ΣK_j) / (M-1)     u = (MSW/MSB) (M-3)/(M-1)
        R   = 1 - u                           ρ = (1-u) / (1 + (K0-1) u)

    Errors: WhenceError where no subset has two seeds, or with fewer than 4 subsets.
    Source: intraclass correlation ICC(1), Shrout & Fleiss 1979. Differs from the usual form by (M-3)/(M-1), the inverse
    mean of MSW/MSB under normal noise; without it R is low by 2(1-R)/(M-3), and scores seem to reach their ceiling.

    Args:
        outputs_by_seed: one row per trained model, NaN = not measured [runs, m].
        subset_index: which subset each row was trained on [runs], M different values.
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
    pairs = [pearson_columns(slots[a], slots[b]) for a in range(len(slots)) for b in range(a)]
    return nanmean(np.stack(pairs), axis=0)


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

    Args:
        outputs_by_seed: one row per trained model, NaN = not measured [runs, m].
        subset_index: which subset each row was trained on [runs].
        resamples: of the interval, at least 100.
        seed: of the resamples.
        level: of the interval.
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
        mean = nanmean(values[:, defined], axis=1)
        estimate = float(mean[0])
        low, high = np.clip(around(estimate, mean[1:], level), 0, 1)
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
) -> SubsetPlan:
    """Expected ceiling and width of the 95 % interval of a bank that is not trained yet.

        v = (1 - lds²)² (1 + lds²/2) / (subsets - 3)                         one query's Spearman (Bonett & Wright 2000)
        width = 2·1.96·√( spread²/queries + v·(shared + (1 - shared)/queries) )

    The zero defaults give the narrowest interval a bank can have for its size; take the three from a pilot to be realistic.
    Errors: WhenceError where a number is outside its range.

    Args:
        subsets: more than 3.
        seeds: per subset, at least 1.
        queries: at least 1.
        reliability: ρ of one seed, in [0, 1].
        lds: the mean LDS expected, in (-1, 1).
        spread: standard deviation of the true LDS between queries.
        shared: correlation of two queries' errors, in [0, 1] (they are judged on the same subsets).
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
    return SubsetPlan(
        float(pearson), float(_to_spearman(pearson)), 2 * NormalDist().inv_cdf(0.975) * float(np.sqrt(variance))
    )


def _by_subset(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> tuple[Array, Array, Array]:
    """Per subset and query [M, m]: number of seeds, mean over them (grand mean removed), sum of squares within."""
    table, subsets = _runs(outputs_by_seed, subset_index)
    table = table - nanmean(table, axis=0)
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
    squares = weights @ (counts * means**2) - ratio((weights @ (counts * means)) ** 2, total)
    between = ratio(squares, between_df)
    noise = ratio(weights @ within, weights @ np.maximum(counts - 1, 0))
    seeds = ratio(total - ratio(weights @ counts**2, total), between_df)
    share = ratio(noise, between) * (between_df - 2) / between_df
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
