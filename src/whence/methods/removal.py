"""Readers of retraining results: leave-one-out, influence, semivalues, KNN-Shapley, datamodels.

Pure functions of what retrained models said: masks bool [r, n], outputs [r, m] (n training images or players, m queries,
r runs). Each returns an `Estimate` in our sign, larger = the image did more FOR the query, whatever the output measures:
`better` = "lower" for a loss, "higher" for a margin, a log-probability or a utility. Values are in units of the output: by
how much it is better with the image than without ("removal" scale). Standard errors are those of repeating the runs with
other masks and seeds; NaN where a single run cannot tell, 0 where nothing was sampled.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import comb
from scipy.stats import betabinom, binom
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, lasso_path

from whence.types import WhenceError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

MOST_PLAYERS = 12  # 4096 retrainings: beyond this nobody enumerates


@dataclass(frozen=True)
class Estimate:
    """values [m, n]: what each image did FOR each query; stderr [m, n]: standard error; runs: trainings it rests on."""

    values: Array
    stderr: Array
    runs: int


# ------------------------------------------------------------------------------------------- with and without an image


def leave_one_out(full: ArrayLike, left_out: Sequence[ArrayLike], better: str = "lower") -> Estimate:
    """Retraining without one image, averaged over seeds.

        τ[q, i] = ± ( mean_R y_q(all) - mean_R' y_q(all∖i) )      SE² = s²/R + s_i²/R'

    full [R, m]: outputs of R trainings on everything; left_out: n tables [R', m], trained without image i (an array
    [n, R', m] will do). The effect is O(1/n) and sits below the seed noise for single images of real models: read it
    with its error, or leave out groups. The error assumes independent seeds; paired same-seed runs make it too large.
    Errors: WhenceError for shapes that do not fit or entries that are not finite.
    """
    sign = _sign(better)
    everything = _matrix("outputs of the full model", full)
    without = [_matrix(f"outputs without image {i}", table) for i, table in enumerate(left_out)]
    if {table.shape[1] for table in without} != {everything.shape[1]}:
        shapes = sorted({table.shape for table in without})
        raise WhenceError(
            f"full outputs {everything.shape}, left-out ones {shapes}; needs the same queries in all of them"
        )
    values = sign * (everything.mean(axis=0)[:, None] - np.stack([table.mean(axis=0) for table in without], axis=1))
    variance = _mean_variance(everything)[:, None] + np.stack([_mean_variance(table) for table in without], axis=1)
    return Estimate(values, np.sqrt(variance), len(everything) + sum(map(len, without)))


def empirical_influence(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Mean output with an image minus mean output without it, over models trained on random subsets.

        τ[q, i] = ± ( mean(y_q | i ∈ S) - mean(y_q | i ∉ S) )      SE² = s1²/n1 + s0²/n0

    On fixed-size masks an additive world β gives β_i - mean_{j≠i} β_j. Source: Feldman & Zhang 2020.
    Errors: WhenceError naming an image that is in every run or in none. Differs from released code, which divides by
    max(count, 1) and so reports a whole mean as an influence.
    """
    kept, y, sign = _table(masks, outputs, better)
    side = kept.astype(np.float64)
    shift = y.mean(axis=0)
    (mean1, var1), (mean0, var0) = (_side(part, y - shift) for part in (side, 1 - side))
    return Estimate(sign * (mean1 - mean0).T, np.sqrt(var1 + var0).T, len(y))


def memorization(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Influence of every training image on itself: the diagonal of `empirical_influence` without the rest.

    masks [r, n]; outputs [r, n], of run j on training image i. Values and errors [1, n]. Errors: as there.
    """
    kept, y, sign = _table(masks, outputs, better)
    if kept.shape != y.shape:
        raise WhenceError(f"masks {kept.shape} and outputs {y.shape}: memorization needs one output per training image")
    shifted = y - y.mean(axis=0)
    sides = []
    for part in (kept, ~kept):
        count = _counts(part.astype(np.float64))
        mean = np.where(part, shifted, 0.0).sum(axis=0) / count
        square = np.where(part, (shifted - mean) ** 2, 0.0).sum(axis=0)
        sides.append((mean, _spread_of_mean(square, count)))
    (mean1, var1), (mean0, var0) = sides
    return Estimate(sign * (mean1 - mean0)[None], np.sqrt(var1 + var0)[None], len(y))


def banzhaf(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Banzhaf value by maximum sample reuse: with-minus-without over fair-coin masks, every run serving all images.

    The same number as `empirical_influence`; what makes it Banzhaf is the design (each image in with probability ½,
    independently). With probability p it is the p-Banzhaf value. Source: Wang & Jia 2023 (2205.15466).
    """
    return empirical_influence(masks, outputs, better)


# ---------------------------------------------------------------------------------------------------------- semivalues


def banzhaf_sizes(players: int, p: float = 0.5) -> Array:
    """How often p-Banzhaf meets an image with k others: Binomial(n-1, p) at k = 0..n-1. Banzhaf has p = ½."""
    if players < 1 or not 0 < p < 1:
        raise WhenceError(f"p-Banzhaf of {players} players at p={p}; needs >= 1 and p in (0, 1)")
    return np.asarray(binom.pmf(np.arange(players), players - 1, p), np.float64)


def beta_sizes(players: int, alpha: float = 1.0, beta: float = 1.0) -> Array:
    """How often Beta(α, β)-Shapley meets an image with k others: beta-binomial, k = 0..n-1. α = β = 1 is Shapley.

        C(n-1, k) B(k+β, n-1-k+α) / B(α, β) = E[ Binomial(n-1, p)(k) ],  p of density ∝ p^(β-1) (1-p)^(α-1)

    Large α weighs small coalitions. Source: Kwon & Zou 2022 (2110.14049). Differs from released code: there, `alpha` is
    the paper's β.
    """
    if players < 1 or not (alpha > 0 and beta > 0):
        raise WhenceError(f"Beta({alpha}, {beta})-Shapley of {players} players; needs >= 1, and α, β > 0")
    return np.asarray(betabinom.pmf(np.arange(players), players - 1, beta, alpha), np.float64)


def all_masks(players: int) -> Mask:
    """Every subset of up to 12 players, [2^n, n]; row s holds the bits of s."""
    if not 1 <= players <= MOST_PLAYERS:
        raise WhenceError(f"cannot enumerate {players} players; 1 to {MOST_PLAYERS} can be, sample masks for more")
    return (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)


def semivalue(masks: ArrayLike, outputs: ArrayLike, sizes: ArrayLike, better: str = "lower") -> Estimate:
    """Exact semivalue from every subset of at most 12 players.

        φ_i = Σ_{S∌i} w(|S|) ( v(S+i) - v(S) ),      w(k) = sizes[k] / C(n-1, k),      v = ± y

    masks [2^n, n], all subsets in any order; outputs [2^n, m]; sizes [n] from `banzhaf_sizes` or `beta_sizes`.
    Nothing is sampled: errors are 0. Errors raised: WhenceError when a subset is missing or repeated, or n > 12.
    """
    kept, y, sign = _table(masks, outputs, better)
    n = kept.shape[1]
    law = _sizes(sizes, n)
    complete = n <= MOST_PLAYERS and np.array_equal(np.sort(kept @ 2 ** np.arange(n)), np.arange(2**n))
    if not complete:
        raise WhenceError(f"masks {kept.shape} are no complete enumeration; needs each subset of <= 12 players once")
    w = law / comb(n - 1, np.arange(n))
    size = kept.sum(axis=1)[:, None]
    # The value is linear in v: w(|S|-1) where i is in S, -w(|S|) where it is not.
    coefficients = np.where(kept, w[np.maximum(size - 1, 0)], -w[np.minimum(size, n - 1)])
    values = sign * y.T @ coefficients
    return Estimate(values, np.zeros_like(values), len(y))


def shapley(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Exact Shapley value from every subset of at most 12 players: `semivalue` with `beta_sizes(n, 1, 1)`."""
    kept = _masks(masks)
    return semivalue(kept, outputs, beta_sizes(kept.shape[1]), better)


def sampled_semivalue(
    masks: ArrayLike, outputs: ArrayLike, probabilities: ArrayLike, sizes: ArrayLike, better: str = "lower"
) -> Estimate:
    """Semivalue from runs on Bernoulli masks, every run serving all images.

        φ_i = Σ_{j: i∈S_j} ω1(k_j - 1) v_j / Σ ω1  -  Σ_{j: i∉S_j} ω0(k_j) v_j / Σ ω0,      k_j = |S_j|
        ω1(s) = sizes[s] / Σ_l p_l B(s; n-1, p_l)        ω0(s) = sizes[s] / Σ_l (1-p_l) B(s; n-1, p_l)

    B = binomial probability; p_l = the probability with which run l took in each image, independently: probabilities [r],
    or one number for all. The weights turn the sizes that were drawn into those the semivalue asks for (self-normalised
    importance sampling under the mixture of all runs' designs). One p and `banzhaf_sizes(n, p)` give with-minus-without;
    for Shapley draw p uniformly. SE² = Σ ω² (v - mean)² / (Σω)² · e/(e-1), e = (Σω)² / Σω², for both sides.
    Errors: WhenceError when p is not in (0, 1), or naming an image that is in every run or in none.
    """
    kept, y, sign = _table(masks, outputs, better)
    r, n = kept.shape
    p = np.asarray(probabilities, np.float64)
    if p.shape not in ((), (r,)) or not ((p > 0) & (p < 1)).all():
        raise WhenceError(f"inclusion probabilities {p.shape} for {r} runs; one, or one per run, in (0, 1) is accepted")
    p = np.broadcast_to(p, r)
    law = _sizes(sizes, n)
    drawn = binom.pmf(np.arange(n)[:, None], n - 1, p)
    # A size no design ever draws gets no weight; runs of that size do not occur.
    with_it, without = (np.divide(law, mix, out=np.zeros(n), where=mix > 0) for mix in (drawn @ p, drawn @ (1 - p)))
    size = kept.sum(axis=1)
    shifted = y - y.mean(axis=0)
    mean1, var1 = _side(kept * with_it[np.maximum(size - 1, 0)][:, None], shifted)
    mean0, var0 = _side(~kept * without[np.minimum(size, n - 1)][:, None], shifted)
    return Estimate(sign * (mean1 - mean0).T, np.sqrt(var1 + var0).T, r)


def permutation_shapley(
    output: Callable[[Mask], ArrayLike],
    players: int,
    permutations: int,
    seed: int = 0,
    truncation: float = 0.0,
    tolerance: float = 0.0,
    better: str = "lower",
) -> Estimate:
    """Shapley value by growing random chains of players: φ = mean over permutations of v(prefix + i) - v(prefix).

    output: mask [n] -> outputs [m] of a model trained on that subset; it may train, or look up a ledger. Permutation t
    depends on (seed, t) alone, so a longer or resumed series repeats the trainings of a shorter one.
    truncation: a chain ends after more than 5 steps in a row with |v - v(all)| <= truncation·|v(all)| for every query, the
    rest counting 0 (TMC; 0 = never). The rule is relative to v itself: set it for outputs whose 0 means something.
    tolerance: stop once max over the last 100 permutations t of mean |φᵗ - φᵀ| / (|φᵀ| + 1e-12) is below it (0 = never).
    SE: standard deviation over permutations / √permutations. Errors: WhenceError for fewer than 1 player or permutation.
    Source: Ghorbani & Zou 2019 (1904.02868). Differs from released code: v(∅) is a real training, not a majority rate.
    """
    if players < 1 or permutations < 1:
        raise WhenceError(f"{permutations} permutations of {players} players; needs >= 1 of both")
    sign = _sign(better)
    runs = 0

    def value(mask: Mask) -> Array:
        nonlocal runs
        runs += 1
        return sign * _matrix("the output of a subset", np.atleast_2d(np.asarray(output(mask.copy()), np.float64)))[0]

    everyone = np.ones(players, bool)
    full, empty = value(everyone), value(~everyone)
    mean, squares = np.zeros((len(full), players)), np.zeros((len(full), players))
    history: deque[Array] = deque(maxlen=100)
    for t in range(permutations):
        order = np.random.default_rng([seed, t]).permutation(players)
        marginals = _chain(value, order, full, empty, truncation)
        step = marginals - mean
        mean = mean + step / (t + 1)
        squares = squares + step * (marginals - mean)
        history.append(mean)
        if len(history) == 100 and _drift(history) < tolerance:
            break
    error = np.sqrt(squares / t / (t + 1)) if t else np.full_like(mean, np.nan)
    return Estimate(mean, error, runs)


def _chain(
    value: Callable[[Mask], Array], order: NDArray[np.int64], full: Array, empty: Array, truncation: float
) -> Array:
    """What each player adds to the prefix before it: [m, n]."""
    marginals = np.zeros((len(full), len(order)))
    mask = np.zeros(len(order), bool)
    before, near = empty, 0
    for i in order:
        mask[i] = True
        now = full if mask.all() else value(mask)
        marginals[:, i] = now - before
        before = now
        near = near + 1 if (np.abs(now - full) <= truncation * np.abs(full)).all() else 0
        if truncation > 0 and near > 5:
            break
    return marginals


def _drift(history: Iterable[Array]) -> float:
    """Largest mean relative change between the running means and the last of them."""
    means = np.stack(list(history))
    return float((np.abs(means - means[-1]) / (np.abs(means[-1]) + 1e-12)).mean(axis=(1, 2)).max())


def kernel_masks(players: int, runs: int, seed: int = 0) -> Mask:
    """Coalitions for `kernel_shap` [r, n]: size s with probability ∝ (n-1) / (s (n-s)), uniform within a size."""
    if players < 2 or runs < 1:
        raise WhenceError(f"{runs} coalitions of {players} players; needs >= 1 coalitions of >= 2 players")
    rng = np.random.default_rng(seed)
    s = np.arange(1, players)
    law = 1 / (s * (players - s))
    size = rng.choice(s, size=runs, p=law / law.sum())
    place = rng.random((runs, players)).argsort(axis=1).argsort(axis=1)
    return np.asarray(place < size[:, None], np.bool_)


def kernel_shap(
    masks: ArrayLike, outputs: ArrayLike, empty: ArrayLike, full: ArrayLike, better: str = "lower"
) -> Estimate:
    """Shapley value as the least-squares fit of an additive game to coalitions from `kernel_masks`.

        A = XᵀX/r     b = Xᵀ(v - v0)/r     φ = A⁻¹ ( b - 1 (1ᵀA⁻¹b - v1 + v0) / (1ᵀA⁻¹1) )     Σφ = v1 - v0 exactly

    masks X [r, n]; outputs [r, m]; empty, full [m]: v0 of no player, v1 of all. SE: sandwich over coalitions, with
    P = A⁻¹ - A⁻¹11ᵀA⁻¹/(1ᵀA⁻¹1) and residuals e: SE² = Σ_j (P x_j e_j)² / (r (r-n)). v0 and v1 count as known.
    Errors: WhenceError when the coalitions do not tell the players apart. Source: Lundberg & Lee 2017; Covert & Lee 2021.
    """
    kept, y, sign = _table(masks, outputs, better)
    r, n = kept.shape
    v0, v1 = (sign * _matrix(name, np.atleast_2d(v))[0] for name, v in (("empty", empty), ("full", full)))
    if not len(v0) == len(v1) == y.shape[1]:
        raise WhenceError(
            f"{len(v0)} empty and {len(v1)} full outputs for {y.shape[1]} queries; needs one of each per query"
        )
    x = kept.astype(np.float64)
    a = x.T @ x / r
    if r <= n or np.linalg.matrix_rank(a, hermitian=True) < n:
        raise WhenceError(f"{r} coalitions do not tell {n} players apart; needs more of them, from `kernel_masks`")
    inverse = np.linalg.inv(a)
    ones = inverse.sum(axis=1)
    gain = sign * y - v0
    free = inverse @ (x.T @ gain / r)
    phi = free - np.outer(ones / ones.sum(), free.sum(axis=0) - (v1 - v0))
    reach = x @ (inverse - np.outer(ones, ones) / ones.sum())
    variance = (reach**2).T @ (gain - x @ phi) ** 2 / (r * (r - n))
    return Estimate(phi.T, np.sqrt(variance).T, r + 2)


def knn_shapley(distances: ArrayLike, train_labels: ArrayLike, query_labels: ArrayLike, neighbours: int) -> Estimate:
    """Exact Shapley value of the K-nearest-neighbour vote for the query's label; no retraining.

        v(S) = (1/K) Σ over the min(K, |S|) nearest of S of 1[label = label of q];   images sorted by distance to q:
        s_(n) = 1[y_n = y_q] min(K, n) / (K n)
        s_(i) = s_(i+1) + ( 1[y_i = y_q] - 1[y_(i+1) = y_q] ) / K · min(K, i) / i

    distances [m, n]; train_labels [n]; query_labels [m]; images at equal distance keep their order. Exact: errors are 0.
    Source: Jia et al. 2019 (1908.08619). Differs from released code: its base 1/n holds for n >= K only.
    """
    d = _matrix("distances", distances)
    m, n = d.shape
    train, query = np.asarray(train_labels), np.asarray(query_labels)
    if train.shape != (n,) or query.shape != (m,) or neighbours < 1:
        raise WhenceError(f"labels {train.shape}, {query.shape}, K={neighbours}: needs [n] = {n}, [m] = {m} and K >= 1")
    order = np.argsort(d, axis=1, kind="stable")
    match = (train[order] == query[:, None]).astype(np.float64)
    i = np.arange(1, n)
    steps = np.empty_like(d)
    steps[:, :-1] = (match[:, :-1] - match[:, 1:]) * np.minimum(neighbours, i) / (neighbours * i)
    steps[:, -1] = match[:, -1] * min(neighbours, n) / (neighbours * n)
    values = np.empty_like(d)
    np.put_along_axis(values, order, np.cumsum(steps[:, ::-1], axis=1)[:, ::-1], axis=1)
    return Estimate(values, np.zeros_like(values), 0)


# ---------------------------------------------------------------------------------------------------------- datamodels


def ridge(masks: ArrayLike, outputs: ArrayLike, penalty: ArrayLike, better: str = "lower") -> Estimate:
    """Ridge datamodel of every query at once, in the run kernel.

        min_{w,b} ‖Xw + b - y‖² + λ‖w‖²:      w = Xᵀ (XXᵀ + λI)⁻¹ (y - ȳ),   X = masks with centred columns

    masks [r, n]; outputs [r, m]; penalty λ > 0: one number, or one per query [m] (`ridge_penalty`). Effects are per
    inclusion. One r×r eigendecomposition serves all queries and penalties, and n enters through products only.
    SE: delete-one jackknife over runs in closed form, λ held: with A = Xᵀ(XXᵀ+λI)⁻¹, e residuals, h leverages (1/r
    included), leaving run j out moves w_i by A_ij e_j/(1-h_j), and SE² = (r-1)/r · Σ_j ( A_ij e_j/(1-h_j) )².
    It measures the spread of w, not the shrinkage λ puts on it. Errors: WhenceError for shapes, λ <= 0, fewer than 3 runs.
    Source: Ilyas et al. 2022 (2202.00622), with ridge for LASSO.
    """
    fit = _RidgeFit.of(masks, outputs, better)
    r, m = fit.y.shape
    lam = _positive("penalty", penalty, m)
    values, variance = np.empty((fit.x.shape[1], m)), np.empty((fit.x.shape[1], m))
    for one in np.unique(lam):
        here = lam == one
        smoother = (fit.u / (fit.sigma + one)) @ fit.u.T
        back = fit.x.T @ smoother
        values[:, here] = fit.x.T @ (smoother @ fit.y[:, here])
        variance[:, here] = back**2 @ fit.left_out(one)[:, here] ** 2
    return Estimate(fit.sign * values.T, np.sqrt((r - 1) / r * variance).T, r)


def ridge_penalty(masks: ArrayLike, outputs: ArrayLike, penalties: ArrayLike) -> Array:
    """The penalty of each query [m] with the least leave-one-run-out error, (y_j - ŷ_j) / (1 - h_j), on the fitted runs."""
    fit = _RidgeFit.of(masks, outputs)
    grid = _positive("penalties", penalties)
    errors = np.stack([(fit.left_out(one) ** 2).mean(axis=0) for one in grid])
    return grid[errors.argmin(axis=0)]


def ridge_penalty_on(
    masks: ArrayLike, outputs: ArrayLike, tune_masks: ArrayLike, tune_outputs: ArrayLike, penalties: ArrayLike
) -> Array:
    """The penalty of each query [m] with the least squared error on tune runs. Errors: WhenceError on shared subsets."""
    fit = _RidgeFit.of(masks, outputs)
    grid = _positive("penalties", penalties)
    tune_x, tune_y = _tune(masks, outputs, tune_masks, tune_outputs)
    across = ((tune_x - fit.mean_x) @ fit.x.T) @ fit.u
    inner, target = fit.u.T @ fit.y, tune_y - fit.mean_y
    errors = np.stack([((across / (fit.sigma + one) @ inner - target) ** 2).mean(axis=0) for one in grid])
    return grid[errors.argmin(axis=0)]


@dataclass(frozen=True)
class _RidgeFit:
    """Centred masks x [r, n] and outputs y [r, m], with xxᵀ = u diag(sigma) uᵀ."""

    x: Array
    y: Array
    mean_x: Array
    mean_y: Array
    u: Array
    sigma: Array
    sign: float

    @staticmethod
    def of(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> _RidgeFit:
        kept, y, sign = _table(masks, outputs, better)
        if len(y) < 3:
            raise WhenceError(f"a datamodel of {len(y)} runs; needs >= 3")
        mean_x, mean_y = kept.mean(axis=0), y.mean(axis=0)
        x = kept - mean_x
        return _RidgeFit(x, y - mean_y, mean_x, mean_y, *_run_spectrum(x), sign)

    def left_out(self, penalty: float) -> Array:
        """Error of each run under the fit without it [r, m]: e_j / (1 - h_j)."""
        shrink = self.sigma / (self.sigma + penalty)
        residual = self.y - (self.u * shrink) @ (self.u.T @ self.y)
        leverage = 1 / len(self.y) + (self.u**2 * shrink).sum(axis=1)
        return np.asarray(residual / (1 - leverage)[:, None], np.float64)


def _run_spectrum(x: Array) -> tuple[Array, Array]:
    """u [r, k], sigma [k] with xxᵀ = u diag(sigma) uᵀ, from the smaller of the two Gram matrices."""
    r, n = x.shape
    values, vectors = np.linalg.eigh(x @ x.T if r <= n else x.T @ x)
    kept = values > values[-1] * max(r, n) * np.finfo(np.float64).eps
    sigma, vectors = values[kept], vectors[:, kept]
    return (vectors if r <= n else x @ vectors / np.sqrt(sigma)), sigma


def lasso(
    masks: ArrayLike, outputs: ArrayLike, penalty: ArrayLike, resamples: int, seed: int = 0, better: str = "lower"
) -> Estimate:
    """LASSO datamodel, one coordinate descent per query; for few images, where effects are sparse.

        min_{w,b} ‖Xw + b - y‖² / (2r) + λ‖w‖₁          w = 0 from λ_max = max_i |X_iᵀ(y - ȳ)|/r on, X centred

    masks [r, n]; outputs [r, m]; penalty λ > 0: one number, or one per query [m] (`lasso_penalty_on`). SE: standard
    deviation over `resamples` bootstraps of the runs, λ held; with 0 resamples NaN. Effects are per inclusion.
    Errors: WhenceError for shapes or λ <= 0. Source: Ilyas et al. 2022 (2202.00622). Differs from released code: masks
    are not divided by their standard deviation, after which a weight would be per standard deviation.
    """
    kept, y, sign = _table(masks, outputs, better)
    lam = _positive("penalty", penalty, y.shape[1])
    x = kept.astype(np.float64)
    values = _lasso_weights(x, y, lam)
    error = np.full_like(values, np.nan)
    if resamples > 1:
        rng = np.random.default_rng(seed)
        drawn = (rng.integers(0, len(y), len(y)) for _ in range(resamples))
        error = np.std([_lasso_weights(x[rows], y[rows], lam) for rows in drawn], axis=0, ddof=1)
    return Estimate(sign * values, error, len(y))


def lasso_penalty_on(
    masks: ArrayLike, outputs: ArrayLike, tune_masks: ArrayLike, tune_outputs: ArrayLike, fractions: ArrayLike
) -> Array:
    """The penalty of each query [m], out of `fractions` of its λ_max, with the least squared error on tune runs.

    The published path has 100 fractions from 1 down to 1e-6. Errors: WhenceError on shared subsets, or where a query's
    outputs do not vary, so that every penalty is the same.
    """
    kept, y, _ = _table(masks, outputs, "lower")
    parts = np.sort(_positive("fractions", fractions))[::-1]
    tune_x, tune_y = _tune(masks, outputs, tune_masks, tune_outputs)
    x, centred = kept - kept.mean(axis=0), y - y.mean(axis=0)
    highest = np.abs(x.T @ centred).max(axis=0) / len(y)
    if (highest <= 0).any():
        raise WhenceError(f"query {int(highest.argmin())} has no LASSO path: its outputs do not vary with the masks")
    chosen = np.empty(y.shape[1])
    for q, top in enumerate(highest):
        with _converging():
            grid, weights, _ = lasso_path(x, centred[:, q], alphas=parts * top, max_iter=20_000)
        errors = ((tune_x - kept.mean(axis=0)) @ weights - (tune_y[:, q] - y[:, q].mean())[:, None]) ** 2
        chosen[q] = grid[errors.mean(axis=0).argmin()]
    return chosen


def _lasso_weights(x: Array, y: Array, penalty: Array) -> Array:
    with _converging():
        fits = [Lasso(alpha=one, max_iter=20_000, tol=1e-8).fit(x, y[:, q]) for q, one in enumerate(penalty)]
    return np.stack([fit.coef_ for fit in fits])


@contextmanager
def _converging() -> Iterator[None]:
    """Coordinate descent that stops short is an error, not a warning beside a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            yield
        except ConvergenceWarning as error:
            raise WhenceError(f"LASSO did not converge; larger penalties are accepted ({error})") from error


# --------------------------------------------------------------------------------------------------------------- parts


def _side(weights: Array, y: Array) -> tuple[Array, Array]:
    """Weighted mean of the outputs over runs [n, m] and the variance of that mean, from weights [r, n] and y [r, m]."""
    total = _counts(weights)[:, None]
    mean = weights.T @ y / total
    squared = weights**2
    square = squared.T @ y**2 - 2 * mean * (squared.T @ y) + mean**2 * squared.sum(axis=0)[:, None]
    effective = total**2 / squared.sum(axis=0)[:, None]
    return mean, _spread_of_mean(square / total**2 * effective**2, effective)


def _spread_of_mean(square: Array, count: Array) -> Array:
    """Σ(y-ȳ)² and a count -> the variance of the mean, NaN for a single run."""
    lone = count < 1 + 1e-9
    return np.where(lone, np.nan, np.maximum(square, 0) / np.where(lone, 1, count * (count - 1)))


def _mean_variance(table: Array) -> Array:
    """Variance of the mean over seeds: [R, m] -> [m]."""
    return _spread_of_mean(((table - table.mean(axis=0)) ** 2).sum(axis=0), np.full(table.shape[1], float(len(table))))


def _counts(weights: Array) -> Array:
    """How much weight each image has [n], none of it 0."""
    total = np.asarray(weights.sum(axis=0), np.float64)
    if (total <= 0).any():
        raise WhenceError(
            f"image {int(total.argmin())} is in every run or in none; needs runs with and without each image"
        )
    return total


def _table(masks: ArrayLike, outputs: ArrayLike, better: str) -> tuple[Mask, Array, float]:
    kept, y = _masks(masks), _matrix("outputs", outputs)
    if len(kept) != len(y):
        raise WhenceError(f"masks {kept.shape} and outputs {y.shape} must have one row per run each")
    return kept, y, _sign(better)


def _tune(masks: ArrayLike, outputs: ArrayLike, tune_masks: ArrayLike, tune_outputs: ArrayLike) -> tuple[Array, Array]:
    """Tune masks and outputs, once they are known to fit the fitted ones and to share no subset with them."""
    kept, y, _ = _table(masks, outputs, "lower")
    tune_kept, tune_y, _ = _table(tune_masks, tune_outputs, "lower")
    if tune_kept.shape[1] != kept.shape[1] or tune_y.shape[1] != y.shape[1]:
        raise WhenceError(f"tune runs {tune_kept.shape}, {tune_y.shape} do not fit {kept.shape}, {y.shape}")
    fitted, tuned = ({row.tobytes() for row in np.packbits(table, axis=1)} for table in (kept, tune_kept))
    if fitted & tuned:
        raise WhenceError(f"{len(fitted & tuned)} subsets stand in the fitted and the tune runs; they must share none")
    return tune_kept.astype(np.float64), tune_y


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


def _sizes(sizes: ArrayLike, players: int) -> Array:
    law = np.asarray(sizes, np.float64)
    if law.shape != (players,) or (law < 0).any() or not np.isclose(law.sum(), 1):
        raise WhenceError(
            f"sizes {law.shape} of {players} players; {players} probabilities, as from beta_sizes, are accepted"
        )
    return law


def _positive(name: str, values: ArrayLike, length: int | None = None) -> Array:
    """A list of positive numbers; one number stands for `length` of them."""
    numbers = np.atleast_1d(np.asarray(values, np.float64))
    if length is not None and numbers.shape == (1,):
        numbers = np.repeat(numbers, length)
    if numbers.ndim != 1 or length not in (None, len(numbers)) or not (numbers > 0).all() or np.isinf(numbers).any():
        raise WhenceError(
            f"{name} of shape {numbers.shape}: needs positive numbers" + (f", 1 or {length}" if length else "")
        )
    return numbers


def _sign(better: str) -> float:
    signs = {"lower": -1.0, "higher": 1.0}
    if better not in signs:
        raise WhenceError(f"better={better!r} says nothing about the output; 'lower' (a loss) or 'higher' is accepted")
    return signs[better]
