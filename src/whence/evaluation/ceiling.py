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


def reliability(
    outputs_by_seed: ArrayLike, subset_index: ArrayLike, seed_index: ArrayLike | None = None
) -> Reliability:
    """Reliability of retraining outputs by analysis of variance; unequal seeds per subset and gaps allowed.

        y_jk = μ + a_j + e_jk                 subsets j with seeds of their own: one-way
        y_jk = μ + a_j + b_k + e_jk           subsets j trained with the same seeds k: two-way

        MSE = Σ (y - fit)² / df_e             fit: least squares of the model, df_e its degrees of freedom
        MSA = (Σ (y - ȳ_k)² - Σ (y - fit)²) / df_a                   the rest over its own, M-1 where all is connected
        K0  = (N - Σ_k Σ_j n_jk² / N_k) / df_a                       ȳ_k, N_k, n_jk: of one k, or of all in one-way
        u   = (MSE/MSA) (df_a-2)/df_a         R = 1 - u              ρ = (1-u) / (1 + (K0-1) u)

    b_k moves all subsets alike, so that no rank sees it: it is no noise. e_jk is, what seed k makes of subset j alone: a
    share 1 - ρ of what one seed says about subsets is that seed's own. With complete tables K0 = K.
    Errors: WhenceError where no subset has two seeds, or with fewer than 4 subsets.
    Source: intraclass correlation ICC(1) and ICC(3), Shrout & Fleiss 1979; Henderson's method 3 for gaps. Differs from the
    usual form by (df_a-2)/df_a, the inverse mean of MSE/MSA under normal noise; without it R is low by 2(1-R)/(M-3), and
    scores seem to reach their ceiling.

    Args:
        outputs_by_seed: one row per trained model, NaN = not measured [runs, m].
        subset_index: which subset each row was trained on [runs], M different values.
        seed_index: with which seed [runs]; None where no two subsets share one. Seeds are compared across subsets only
            where they were meant to be: as soon as one is met in two subsets, those met in one only are left out.
    """
    cells = _Cells.of(outputs_by_seed, subset_index, seed_index)
    rho, reliable, seeds = _anova(np.ones((1, cells.subsets)), cells)
    return Reliability(np.clip(rho[0], 0, 1), np.clip(reliable[0], 0, 1), seeds[0])


def seed_effects(outputs_by_seed: ArrayLike, subset_index: ArrayLike, seed_index: ArrayLike) -> Array:
    """b_k of the model of `reliability` for each row, by least squares: [runs, m]; NaN for seeds that are left out.

    0 where no two subsets share a seed. Errors and arguments as `reliability`, but for the numbers of subsets and seeds.
    """
    table, subsets = _table(outputs_by_seed, subset_index)
    levels = _levels(subsets, seed_index)
    cells = _Cells.from_rows(table, subsets, levels)
    found = _fit(np.ones((1, cells.subsets)), cells)[0][0]
    return np.where(levels[:, None] >= 0, found[levels], np.nan)


def spearman_brown(one_seed: ArrayLike, seeds: ArrayLike) -> Array:
    """Reliability of a mean of K seeds from that of one: R_K = Kρ / (1 + (K-1)ρ)."""
    rho, k = np.asarray(one_seed, np.float64), np.asarray(seeds, np.float64)
    return np.asarray(k * rho / (1 + (k - 1) * rho), np.float64)


def replicate_correlation(
    outputs_by_seed: ArrayLike, subset_index: ArrayLike, seed_index: ArrayLike | None = None
) -> Array:
    """Pearson correlation over subsets between two trainings that differ in the seed alone, per query [m].

    Mean over all pairs of seeds, or (a-th run, b-th run of a subset) where subsets have seeds of their own, each over the
    subsets that have both; its mean over queries estimates ρ, the reliability of one seed. Arguments and errors as
    `reliability`; NaN where a query is constant.
    """
    table, subsets = _runs(outputs_by_seed, subset_index)
    turn = _levels(subsets, seed_index)
    if turn.max() < 1:
        turn = np.array([int((subsets[:row] == subset).sum()) for row, subset in enumerate(subsets)])
    slots = np.full((turn.max() + 1, subsets.max() + 1, table.shape[1]), np.nan)
    slots[turn[turn >= 0], subsets[turn >= 0]] = table[turn >= 0]
    pairs = [pearson_columns(slots[a], slots[b]) for a in range(len(slots)) for b in range(a)]
    return nanmean(np.stack(pairs), axis=0)


def ceiling(
    outputs_by_seed: ArrayLike,
    subset_index: ArrayLike,
    seed_index: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Ceiling:
    """The highest correlation with the seed-averaged outputs that seed noise leaves to any score.

        Pearson √R;   Spearman (6/π) asin(√R / 2), exact for a bivariate normal;   both averaged over queries

    R as in `reliability`, clipped to [0, 1]; the root makes the mean slightly low (< .005 for R > .5, .02 near R = .35).
    Interval: subsets resampled, queries held; quantiles centred on the estimate, because what repeated subsets take from
    R in a resample is no bias of R; clipped to [0, 1]. Simulated coverage 95-100 % (R > .4), 80 % near R = .35. Effects of
    subsets that are far from normal, a few subsets unlike all others, leave Spearman less than this: with t effects of 3
    degrees of freedom and normal noise .80 where .86 is said, .93 where .96 is.
    A *linear* score stays below it by the nonlinear share. Queries without variance are left out and counted.
    Errors: WhenceError with one seed per subset: noise and signal cannot be separated.

    Args:
        outputs_by_seed: one row per trained model, NaN = not measured [runs, m].
        subset_index: which subset each row was trained on [runs].
        seed_index: with which seed [runs]; None where no two subsets share one.
        resamples: of the interval, at least 100.
        seed: of the resamples.
        level: of the interval.
    """
    cells = _Cells.of(outputs_by_seed, subset_index, seed_index)
    subsets, m = cells.subsets, cells.sums.shape[2]
    if resamples < 100 or not 0 < level < 1:
        raise WhenceError(f"bootstrap of {resamples} resamples, level {level}: needs >= 100, in (0, 1)")
    drawn = np.random.default_rng(seed).multinomial(subsets, np.full(subsets, 1 / subsets), size=resamples)
    weights = np.concatenate([np.ones((1, subsets)), drawn])
    pearson = np.sqrt(np.clip(_anova(weights, cells)[1], 0, 1))
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


@dataclass(frozen=True, eq=False)
class _Cells:
    """What the analysis of variance needs, for subsets j, seeds k and queries (grand mean removed): counts and sums of the
    cells [M, L, m], sums of squares of the subsets [M, m]. One-way: a single k. Queries measured in the same runs share one
    table of counts [M, L, 1]."""

    counts: Array
    sums: Array
    squares: Array

    @classmethod
    def of(cls, outputs_by_seed: ArrayLike, subset_index: ArrayLike, seed_index: ArrayLike | None) -> _Cells:
        table, subsets = _runs(outputs_by_seed, subset_index)
        return cls.from_rows(table, subsets, _levels(subsets, seed_index))

    @classmethod
    def from_rows(cls, table: Array, subsets: NDArray[np.int64], levels: NDArray[np.int64]) -> _Cells:
        table = table - nanmean(table, axis=0)
        shape = (subsets.max() + 1, levels.max() + 1, table.shape[1])
        counts, sums, squares = np.zeros(shape), np.zeros(shape), np.zeros((shape[0], shape[2]))
        seen = np.isfinite(table) & (levels >= 0)[:, None]
        values = np.where(seen, table, 0.0)
        cells = subsets, np.maximum(levels, 0)
        for total, place, added in ((counts, cells, seen), (sums, cells, values), (squares, subsets, values**2)):
            np.add.at(total, place, added)
        return cls(counts[:, :, :1] if (counts == counts[:, :, :1]).all() else counts, sums, squares)

    @property
    def subsets(self) -> int:
        return len(self.counts)


def _levels(subsets: NDArray[np.int64], seed_index: ArrayLike | None) -> NDArray[np.int64]:
    """k of each run: 0 for all where no seed is met in two subsets; else the seed's number, -1 for seeds met in one only."""
    if seed_index is None:
        return np.zeros_like(subsets)
    seeds = np.asarray(seed_index)
    if seeds.shape != subsets.shape:
        raise WhenceError(f"seeds {seeds.shape} of runs {subsets.shape}: needs one per run")
    index = np.unique(seeds, return_inverse=True)[1]
    shared = np.bincount(np.unique(np.stack([index, subsets]), axis=1)[0]) > 1  # met in more than one subset
    if not shared.any():
        return np.zeros_like(subsets)
    return np.where(shared, np.cumsum(shared) - 1, -1)[index].astype(np.int64)


def _fit(weights: Array, cells: _Cells) -> tuple[Array, Array, Array]:
    """b of each weighting of the subsets [B, L, m], its sum of squares [B, m] and its degrees of freedom [B, 1 or m].

    The a_j are eliminated: (Σ_j w_j (diag n_j - n_j n_jᵀ / K_j)) b = Σ_j w_j (y_j - n_j ȳ_j), y_j: sums of the cells.
    """
    n, total = cells.counts, np.maximum(cells.counts.sum(1), 1)
    shared = n / total[:, None]
    right = np.einsum("bj,jkm->bkm", weights, cells.sums - shared * cells.sums.sum(1)[:, None])
    if n.shape[1] == 1:  # one-way
        return np.zeros_like(right), np.zeros_like(right[:, 0]), np.zeros_like(right[:, 0, :1])
    left = -np.einsum("bj,jkm,jlm->bmkl", weights, n, shared, optimize=True)
    diagonal = np.arange(n.shape[1])
    left[..., diagonal, diagonal] += np.einsum("bj,jkm->bmk", weights, n)
    values, vectors = np.linalg.eigh(left)
    kept = values > 1e-9 * values.max(-1, keepdims=True)
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
    turned = np.einsum("bmkl,bkm->bml", vectors, right, optimize=True)
    effects = np.einsum("bmkl,bml->bkm", vectors, inverse * turned, optimize=True)
    return effects, (inverse * turned**2).sum(-1), kept.sum(-1).astype(np.float64)


def _anova(weights: Array, cells: _Cells) -> tuple[Array, Array, Array]:
    """ρ, R and K0 of each weighting of the subsets [B, M]: three tables [B, m], not clipped."""
    n, runs = cells.counts, cells.counts.sum(1)
    _, explained, rank = _fit(weights, cells)
    within = weights @ (cells.squares - cells.sums.sum(1) ** 2 / np.maximum(runs, 1)) - explained
    noise_df = weights @ np.maximum(runs - 1, 0) - rank
    of_seed = np.einsum("bj,jkm->bkm", weights, n)
    total = of_seed.sum(1)
    parts = np.einsum("bj,jkm->bkm", weights, cells.sums) ** 2
    squares = weights @ cells.squares - _over(parts, of_seed) - within
    df = total - (of_seed > 0).sum(1) - noise_df
    noise, between = ratio(within, noise_df), ratio(squares, df)
    seeds = ratio(total - _over(np.einsum("bj,jkm->bkm", weights, n**2), of_seed), df)
    share = ratio(noise, between) * ratio(df - 2, df)
    return (1 - share) / (1 + (seeds - 1) * share), 1 - share, np.broadcast_to(seeds, share.shape)


def _over(top: Array, bottom: Array) -> Array:
    """Sum over k of top / bottom, 0 where a seed is missing: [B, m]."""
    found: Array = np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom > 0)
    return np.asarray(found.sum(1), np.float64)


def _to_spearman(pearson: ArrayLike) -> Array:
    return np.asarray(6 / np.pi * np.arcsin(np.asarray(pearson) / 2), np.float64)


def _table(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """The outputs, and the subsets numbered from 0."""
    table = np.asarray(outputs_by_seed, np.float64)
    subsets = np.asarray(subset_index)
    if table.ndim != 2 or subsets.shape != table.shape[:1] or np.isinf(table).any():
        raise WhenceError(f"outputs {table.shape} by subset {subsets.shape}: needs [runs, m] without Inf, and [runs]")
    return table, np.unique(subsets, return_inverse=True)[1].astype(np.int64)


def _runs(outputs_by_seed: ArrayLike, subset_index: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    table, subsets = _table(outputs_by_seed, subset_index)
    counts = np.bincount(subsets)
    if len(counts) < 4 or counts.max() < 2:
        raise WhenceError(
            f"{len(counts)} subsets with at most {counts.max(initial=0)} seeds each cannot tell seed noise from signal; "
            "needs >= 4 subsets, some of them with >= 2 seeds"
        )
    return table, subsets
