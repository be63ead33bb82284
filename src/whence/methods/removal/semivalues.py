"""Readers of retraining results: leave-one-out, influence, semivalues, KNN-Shapley, datamodels.

Pure functions of what retrained models said: masks bool [r, n], outputs [r, m] (n training images or players, m queries,
r runs). Each returns an `Estimate` in our sign, larger = the image did more FOR the query, whatever the output measures:
`better` = "lower" for a loss, "higher" for a margin, a log-probability or a utility. Values are in units of the output: by
how much it is better with the image than without ("removal" scale). Standard errors are those of repeating the runs with
other masks and seeds; NaN where a single run cannot tell, 0 where nothing was sampled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import comb
from scipy.stats import betabinom, binom

from whence.methods.removal.leave_out import Estimate, empirical_influence
from whence.methods.removal.tables import checked_sizes, checked_table, side_means
from whence.storage.tables import Array, Mask, checked_masks, matrix, sign_of
from whence.types import WhenceError

MAX_PLAYERS = 12  # 4096 retrainings: too many to enumerate beyond that


def banzhaf(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Banzhaf value by maximum sample reuse: with-minus-without over fair-coin masks, every run serving all images.

    The same number as `empirical_influence`; what makes it Banzhaf is the design (each image in with probability ½,
    independently). With probability p it is the p-Banzhaf value. Source: Wang & Jia 2023 (2205.15466).

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        better: of an output, "lower" or "higher".
    """
    return empirical_influence(masks, outputs, better)


def banzhaf_sizes(players: int, p: float = 0.5) -> Array:
    """How often p-Banzhaf meets an image with k others: Binomial(n-1, p) at k = 0..n-1. Banzhaf has p = ½."""
    if players < 1 or not 0 < p < 1:
        raise WhenceError(f"p-Banzhaf of {players} players at p={p}; needs >= 1 and p in (0, 1)")
    return np.asarray(binom.pmf(np.arange(players), players - 1, p), np.float64)


def beta_sizes(players: int, alpha: float = 1.0, beta: float = 1.0) -> Array:
    """How often Beta(α, β)-Shapley meets an image with k others: beta-binomial, k = 0..n-1. α = β = 1 is Shapley.

        C(n-1, k) B(k+β, n-1-k+α) / B(α, β) = E[ Binomial(n-1, p)(k) ],  p of density ∝ p^(β-1) (1-p)^(α-1)

    Source: Kwon & Zou 2022 (2110.14049). Differs from released code: there, `alpha` is the paper's β.

    Args:
        players: n.
        alpha: a large α weighs small coalitions.
        beta: a large β weighs large ones.
    """
    if players < 1 or not (alpha > 0 and beta > 0):
        raise WhenceError(
            f"alpha={alpha:g}, beta={beta:g} of {players} players",
            "beta_shapley",
            "alpha and beta above 0, 1 player or more",
        )
    return np.asarray(betabinom.pmf(np.arange(players), players - 1, beta, alpha), np.float64)


def all_masks(players: int) -> Mask:
    """Every subset of up to 12 players, [2^n, n]; row s holds the bits of s."""
    if not 1 <= players <= MAX_PLAYERS:
        raise WhenceError(f"cannot enumerate {players} players; 1 to {MAX_PLAYERS} can be, sample masks for more")
    return (np.arange(2**players)[:, None] >> np.arange(players) & 1).astype(bool)


def semivalue(masks: ArrayLike, outputs: ArrayLike, sizes: ArrayLike, better: str = "lower") -> Estimate:
    """Exact semivalue from every subset of at most 12 players.

        φ_i = Σ_{S∌i} w(|S|) ( v(S+i) - v(S) ),      w(k) = sizes[k] / C(n-1, k),      v = ± y

    Nothing is sampled: errors are 0. Errors raised: WhenceError when a subset is missing or repeated, or n > 12.

    Args:
        masks: all subsets in any order, bool [2^n, n].
        outputs: of each [2^n, m].
        sizes: probabilities [n] from `banzhaf_sizes` or `beta_sizes`.
        better: of an output, "lower" or "higher".
    """
    kept, y, sign = checked_table(masks, outputs, better)
    values = sign * y.T @ semivalue_weights(kept, sizes)
    return Estimate(values, np.zeros_like(values), len(y))


def semivalue_weights(masks: ArrayLike, sizes: ArrayLike) -> Array:
    """What each subset's value counts in the semivalue of each player, which is linear in v: [2^n, n].

        w(|S|-1) where i is in S, -w(|S|) where it is not,      w(k) = sizes[k] / C(n-1, k)

    Errors raised: as by `semivalue`.

    Args:
        masks: all subsets in any order, bool [2^n, n].
        sizes: probabilities [n] from `banzhaf_sizes` or `beta_sizes`.
    """
    kept = checked_masks(masks)
    n = kept.shape[1]
    law = checked_sizes(sizes, n)
    complete = n <= MAX_PLAYERS and np.array_equal(np.sort(kept @ 2 ** np.arange(n)), np.arange(2**n))
    if not complete:
        raise WhenceError(f"masks {kept.shape} are no complete enumeration; needs each subset of <= 12 players once")
    w = law / comb(n - 1, np.arange(n))
    size = kept.sum(axis=1)[:, None]
    return np.asarray(np.where(kept, w[np.maximum(size - 1, 0)], -w[np.minimum(size, n - 1)]), np.float64)


def shapley(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Exact Shapley value from every subset of at most 12 players: `semivalue` with `beta_sizes(n, 1, 1)`.

    Args:
        masks: all subsets in any order, bool [2^n, n].
        outputs: of each [2^n, m].
        better: of an output, "lower" or "higher".
    """
    kept = checked_masks(masks)
    return semivalue(kept, outputs, beta_sizes(kept.shape[1]), better)


def sampled_semivalue(
    masks: ArrayLike, outputs: ArrayLike, probabilities: ArrayLike, sizes: ArrayLike, better: str = "lower"
) -> Estimate:
    """Semivalue from runs on Bernoulli masks, every run serving all images.

        φ_i = Σ_{j: i∈S_j} ω1(k_j - 1) v_j / Σ ω1  -  Σ_{j: i∉S_j} ω0(k_j) v_j / Σ ω0,      k_j = |S_j|
        ω1(s) = sizes[s] / Σ_l p_l B(s; n-1, p_l)        ω0(s) = sizes[s] / Σ_l (1-p_l) B(s; n-1, p_l)

    B = binomial probability. The weights turn the sizes that were drawn into those the semivalue asks for (self-normalised
    importance sampling under the mixture of all runs' designs). One p and `banzhaf_sizes(n, p)` give with-minus-without;
    for Shapley draw p uniformly. SE² = Σ ω² (v - mean)² / (Σω)² · e/(e-1), e = (Σω)² / Σω², for both sides.
    Errors: WhenceError when p is not in (0, 1), or naming an image that is in every run or in none.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        probabilities: p_l, with which run l took in each image, independently [r]; or one number for all.
        sizes: probabilities [n] from `banzhaf_sizes` or `beta_sizes`.
        better: of an output, "lower" or "higher".
    """
    kept, y, sign = checked_table(masks, outputs, better)
    r, n = kept.shape
    p = np.asarray(probabilities, np.float64)
    if p.shape not in ((), (r,)) or not ((p > 0) & (p < 1)).all():
        raise WhenceError(f"inclusion probabilities {p.shape} for {r} runs; one, or one per run, in (0, 1) is accepted")
    p = np.broadcast_to(p, r)
    law = checked_sizes(sizes, n)
    drawn = binom.pmf(np.arange(n)[:, None], n - 1, p)
    # A size no design ever draws gets no weight; runs of that size do not occur.
    with_it, without = (np.divide(law, mix, out=np.zeros(n), where=mix > 0) for mix in (drawn @ p, drawn @ (1 - p)))
    size = kept.sum(axis=1)
    shifted = y - y.mean(axis=0)
    mean1, var1 = side_means(kept * with_it[np.maximum(size - 1, 0)][:, None], shifted)
    mean0, var0 = side_means(~kept * without[np.minimum(size, n - 1)][:, None], shifted)
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

    Permutation t depends on (seed, t) alone, so a longer or resumed series repeats the trainings of a shorter one.
    SE: standard deviation over permutations / √permutations. Errors: WhenceError for fewer than 1 player or permutation.
    Source: Ghorbani & Zou 2019 (1904.02868). Differs from released code: v(∅) is a real training, not a majority rate.

    Args:
        output: mask [n] -> outputs [m] of a model trained on that subset; it may train, or look up a ledger.
        players: n.
        permutations: at most.
        seed: of the permutations.
        truncation: a chain ends after more than 5 steps in a row with |v - v(all)| <= truncation·|v(all)| for every query,
            the rest counting 0 (TMC); 0 for never. The rule is relative to v itself: set it for outputs whose 0 means
            something.
        tolerance: stop once the largest mean |φᵗ - φᵀ| / (|φᵀ| + 1e-12) over the last 100 permutations t is below it; 0
            for never.
        better: of an output, "lower" or "higher".
    """
    if players < 1 or permutations < 1:
        raise WhenceError(f"{permutations} permutations of {players} players; needs >= 1 of both")
    sign = sign_of(better)
    runs = 0

    def value(mask: Mask) -> Array:
        nonlocal runs
        runs += 1
        return sign * matrix("the output of a subset", np.atleast_2d(np.asarray(output(mask.copy()), np.float64)))[0]

    all_players = np.ones(players, bool)
    full, empty = value(all_players), value(~all_players)
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
    """Coalitions for `kernel_shap` [r, n]: size s with probability ∝ (n-1) / (s (n-s)), uniform within a size.

    Args:
        players: n.
        runs: r.
        seed: of the masks.
    """
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

    SE: sandwich over coalitions, with P = A⁻¹ - A⁻¹11ᵀA⁻¹/(1ᵀA⁻¹1) and residuals e: SE² = Σ_j (P x_j e_j)² / (r (r-n)).
    v0 and v1 count as known. Errors: WhenceError when the coalitions do not tell the players apart.
    Source: Lundberg & Lee 2017; Covert & Lee 2021.

    Args:
        masks: X, bool [r, n].
        outputs: of each coalition [r, m].
        empty: v0, of no player [m].
        full: v1, of all [m].
        better: of an output, "lower" or "higher".
    """
    kept, y, sign = checked_table(masks, outputs, better)
    r, n = kept.shape
    v0, v1 = (sign * matrix(name, np.atleast_2d(v))[0] for name, v in (("empty", empty), ("full", full)))
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

    Images at equal distance keep their order. Exact: errors are 0.
    Source: Jia et al. 2019 (1908.08619). Differs from released code: its base 1/n holds for n >= K only.

    Args:
        distances: of queries and training images [m, n].
        train_labels: [n].
        query_labels: [m].
        neighbours: K.
    """
    d = matrix("distances", distances)
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
