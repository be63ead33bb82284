"""Readers of retraining results against closed forms, enumeration, and brute force."""

from itertools import permutations as orders

import numpy as np
import pytest
from scipy.stats import beta as beta_law
from sklearn.linear_model import Ridge, RidgeCV

import games
from errors import refuses
from whence.methods.removal import datamodels, leave_out, semivalues
from whence.types import WhenceError

N = 7
MASKS = semivalues.all_masks(N)
GAME = games.pairwise(N)


def close(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def within(estimate, truth, errors=4):
    """Unbiased as far as its own error can tell, and the error is no excuse: it must be finite and above zero."""
    assert (estimate.stderr > 0).all()
    assert (np.abs(estimate.values - truth) <= errors * estimate.stderr).all()


def half_masks(r, n, seed=0, k=None):
    rng = np.random.default_rng(seed)
    return rng.random((r, n)).argsort(axis=1) < (n // 2 if k is None else k)


# ---------------------------------------------------------------------------------------------------------------- exact


def test_exact_semivalues_of_the_pairwise_game():
    close(semivalues.shapley(MASKS, GAME(MASKS), "higher").values, GAME.shapley)
    for p in (0.1, 0.5, 0.8):
        exact = semivalues.semivalue(MASKS, GAME(MASKS), semivalues.banzhaf_sizes(N, p), "higher")
        close(exact.values, GAME.p_banzhaf(p))
        assert (exact.stderr == 0).all()


def test_semivalues_do_not_depend_on_the_order_of_the_runs():
    shuffled = np.random.default_rng(0).permutation(MASKS)
    close(semivalues.shapley(shuffled, GAME(shuffled), "higher").values, GAME.shapley)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (4, 1), (1, 16), (0.5, 2.5)])
def test_beta_shapley_is_p_banzhaf_averaged_over_a_beta_law(alpha, beta):
    # p of density ∝ p^(β-1) (1-p)^(α-1), so that large α looks at small coalitions
    nodes, weight = np.polynomial.legendre.leggauss(400)
    p = (nodes + 1) / 2
    density = beta_law(beta, alpha).pdf(p) * weight / 2
    mixed = sum(d * semivalues.banzhaf_sizes(N, q) for d, q in zip(density, p, strict=True)) / density.sum()
    tolerance = 1e-12 if min(alpha, beta) >= 1 else 5e-3
    close(semivalues.beta_sizes(N, alpha, beta), mixed, tolerance)
    assert semivalues.beta_sizes(N, 4, 1)[0] > semivalues.beta_sizes(N, 1, 1)[0] > semivalues.beta_sizes(N, 1, 4)[0]


def test_shapley_is_the_integral_of_p_banzhaf():
    nodes, weight = np.polynomial.legendre.leggauss(16)
    values = np.random.default_rng(5).normal(size=(len(MASKS), 2))  # any game, not only the pairwise one
    parts = [semivalues.semivalue(MASKS, values, semivalues.banzhaf_sizes(N, (x + 1) / 2)).values for x in nodes]
    close(sum(w / 2 * part for w, part in zip(weight, parts, strict=True)), semivalues.shapley(MASKS, values).values)


def test_shapley_is_the_mean_over_all_orders():
    values = {
        tuple(mask): v
        for mask, v in zip(semivalues.all_masks(5), np.random.default_rng(1).normal(size=32), strict=True)
    }
    brute = np.zeros(5)
    for order in orders(range(5)):
        mask = np.zeros(5, bool)
        for i in order:
            before = values[tuple(mask)]
            mask[i] = True
            brute[i] += (values[tuple(mask)] - before) / 120
    close(
        semivalues.shapley(semivalues.all_masks(5), np.array(list(values.values()))[:, None], "higher").values[0], brute
    )


def test_voting_airport_and_null_player():
    masks = semivalues.all_masks(8)
    close(semivalues.shapley(masks, games.voting(masks), "higher").values, np.full((1, 8), 1 / 8))
    exact = semivalues.semivalue(masks, games.voting(masks), semivalues.banzhaf_sizes(8), "higher").values
    close(exact, np.full((1, 8), games.voting_banzhaf(8)))
    airport = games.Airport(np.array([0.0, 1.0, 1.5, 4.0, 4.5, 7.0]))
    masks = semivalues.all_masks(6)
    values = semivalues.shapley(masks, airport(masks), "higher").values[0]
    close(values, airport.shapley)
    assert values[0] == pytest.approx(0, abs=1e-15)  # needs no runway: a null player


def test_every_semivalue_of_an_additive_game_is_its_effects():
    game = games.additive(N)
    for sizes in (semivalues.beta_sizes(N), semivalues.beta_sizes(N, 16, 1), semivalues.banzhaf_sizes(N, 0.3)):
        close(semivalues.semivalue(MASKS, game(MASKS), sizes, "higher").values, game.b)


def test_incomplete_repeated_or_large_enumerations_are_refused():
    for masks in (MASKS[1:], np.concatenate([MASKS[:1], MASKS[:-1]]), np.zeros((4, 13), bool)):
        with refuses("enumeration"):
            semivalues.shapley(masks, np.zeros((len(masks), 1)))
    with refuses("1 to 12"):
        semivalues.all_masks(13)


# ------------------------------------------------------------------------------------------------ with and without image


def test_leave_one_out_of_the_pairwise_game():
    full, out = np.ones((1, N), bool), ~np.eye(N, dtype=bool)
    estimate = leave_out.leave_one_out(GAME(full), GAME(out)[:, None, :], "higher")
    close(estimate.values, GAME.leave_one_out)
    assert np.isnan(estimate.stderr).all()  # one seed cannot tell its noise


def test_leave_one_out_errors_follow_the_seeds():
    rng = np.random.default_rng(0)
    full = rng.normal(size=(4, 3))
    out = [rng.normal(size=(2 + i, 3)) for i in range(5)]
    estimate = leave_out.leave_one_out(full, out, "lower")
    for i, table in enumerate(out):
        close(estimate.values[:, i], table.mean(0) - full.mean(0))
        close(estimate.stderr[:, i] ** 2, full.var(0, ddof=1) / 4 + table.var(0, ddof=1) / len(table))
    assert estimate.runs == 4 + 2 + 3 + 4 + 5 + 6


def test_influence_is_least_squares_is_banzhaf_on_all_masks():
    values = np.random.default_rng(3).normal(size=(len(MASKS), 2))
    difference = semivalues.banzhaf(MASKS, values, "higher").values
    design = np.column_stack([np.ones(len(MASKS)), MASKS])
    close(difference, np.linalg.lstsq(design, values, rcond=None)[0][1:].T, 1e-10)
    close(difference, semivalues.semivalue(MASKS, values, semivalues.banzhaf_sizes(N), "higher").values, 1e-10)


def test_influence_matches_a_plain_loop():
    masks, y = half_masks(40, 9), np.random.default_rng(1).normal(size=(40, 4)) + 100
    estimate = leave_out.empirical_influence(masks, y, "lower")
    for i in range(9):
        a, b = y[masks[:, i]], y[~masks[:, i]]
        close(estimate.values[:, i], b.mean(0) - a.mean(0))
        close(estimate.stderr[:, i] ** 2, a.var(0, ddof=1) / len(a) + b.var(0, ddof=1) / len(b))
    square = np.random.default_rng(2).normal(size=(40, 9))
    whole, diagonal = leave_out.empirical_influence(masks, square), leave_out.memorization(masks, square)
    close(diagonal.values[0], np.diag(whole.values))
    close(diagonal.stderr[0], np.diag(whole.stderr))


def test_fixed_size_masks_shift_the_influence_of_an_additive_game():
    game = games.additive(8)
    masks = semivalues.all_masks(8)
    masks = masks[masks.sum(axis=1) == 3]
    others = (game.b.sum(axis=1, keepdims=True) - game.b) / 7
    close(leave_out.empirical_influence(masks, game(masks), "higher").values, game.b - others)


def test_influence_names_the_image_that_is_always_in():
    masks = half_masks(10, 4)
    masks[:, 2] = True
    with refuses("image 2"):
        leave_out.empirical_influence(masks, np.zeros((10, 1)))


# ---------------------------------------------------------------------------------------------------------- Monte Carlo


def noisy(masks, seed=0):
    return GAME(masks) + 0.1 * np.random.default_rng(seed).normal(size=(len(masks), len(GAME.b)))


def test_banzhaf_from_samples():
    masks = np.random.default_rng(0).random((3000, N)) < 0.5
    within(semivalues.banzhaf(masks, noisy(masks), "higher"), GAME.shapley)


@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (4, 1), (1, 4)])
def test_sampled_semivalues_from_mixed_probabilities(alpha, beta):
    rng = np.random.default_rng(1)
    p = rng.uniform(size=6000)
    masks = rng.random((6000, N)) < p[:, None]
    sizes = semivalues.beta_sizes(N, alpha, beta)
    truth = semivalues.semivalue(MASKS, GAME(MASKS), sizes, "higher").values
    within(semivalues.sampled_semivalue(masks, noisy(masks), p, sizes, "higher"), truth)


def test_sampled_semivalue_errors_are_the_spread_of_repetitions():
    rng = np.random.default_rng(2)
    sizes, values, errors = semivalues.beta_sizes(N), [], []
    for _ in range(200):
        p = rng.choice([0.2, 0.4, 0.6, 0.8], size=400)
        masks = rng.random((400, N)) < p[:, None]
        estimate = semivalues.sampled_semivalue(masks, GAME(masks), p, sizes, "higher")
        values.append(estimate.values)
        errors.append(estimate.stderr)
    np.testing.assert_allclose(np.mean(errors, axis=0), np.std(values, axis=0), rtol=0.25)


def test_one_probability_gives_with_minus_without():
    masks = np.random.default_rng(4).random((200, 30)) < 0.3
    y = np.random.default_rng(5).normal(size=(200, 2))
    a = semivalues.sampled_semivalue(masks, y, 0.3, semivalues.banzhaf_sizes(30, 0.3))
    b = leave_out.empirical_influence(masks, y)
    close(a.values, b.values)
    close(a.stderr, b.stderr)


def test_sampled_semivalues_do_not_underflow_at_image_level():
    rng = np.random.default_rng(6)
    p = rng.uniform(0.1, 0.9, size=50)
    masks = rng.random((50, 5000)) < p[:, None]
    estimate = semivalues.sampled_semivalue(masks, rng.normal(size=(50, 1)), p, semivalues.beta_sizes(5000))
    assert np.isfinite(estimate.values).all()


def test_permutation_shapley_with_truncation_off_is_unbiased_and_efficient():
    estimate = semivalues.permutation_shapley(lambda mask: GAME(mask)[0], N, 300, better="higher")
    within(estimate, GAME.shapley)
    gain = (GAME(np.ones(N)) - GAME(np.zeros(N)))[0]
    close(estimate.values.sum(axis=1), gain)
    assert estimate.runs == 2 + 300 * (N - 1)


def test_permutation_errors_are_the_spread_of_repetitions():
    parts = [semivalues.permutation_shapley(lambda mask: GAME(mask)[0], N, 20, seed) for seed in range(100)]
    spread = np.std([e.values for e in parts], axis=0)
    np.testing.assert_allclose(np.mean([e.stderr for e in parts], axis=0), spread, rtol=0.25)


def test_permutation_series_are_prefixes_of_each_other():
    seen = []
    semivalues.permutation_shapley(lambda mask: seen.append(mask) or [0.0], 5, 3, seed=7)
    short, seen = seen, []
    semivalues.permutation_shapley(lambda mask: seen.append(mask) or [0.0], 5, 6, seed=7)
    np.testing.assert_array_equal(short, seen[: len(short)])


def test_truncation_stops_a_chain_after_more_than_five_near_steps():
    # saturates with the first player, so every step is "near": the sixth in a row ends the chain
    def output(mask):
        return [1.0 if mask.any() else 0.0]

    estimate = semivalues.permutation_shapley(output, 20, 50, truncation=0.01, better="higher")
    assert estimate.runs == 2 + 50 * 6
    assert estimate.values.sum() == pytest.approx(1)
    assert semivalues.permutation_shapley(output, 20, 50, better="higher").runs == 2 + 50 * 19


def test_convergence_uses_the_size_of_negative_values():
    # without abs in the denominator a negative value "converges" at once; the rule needs 100 permutations and real agreement
    rng = np.random.default_rng(0)

    def output(mask):
        return [-float(mask.sum()) + rng.normal()]

    loose = semivalues.permutation_shapley(output, 3, 400, tolerance=10.0, better="higher")
    strict = semivalues.permutation_shapley(output, 3, 400, tolerance=1e-9, better="higher")
    assert loose.runs == 2 + 100 * 2
    assert strict.runs == 2 + 400 * 2


def test_kernel_shap_is_efficient_and_finds_shapley():
    masks = semivalues.kernel_masks(N, 4000)
    empty, full = GAME(np.zeros(N))[0], GAME(np.ones(N))[0]
    estimate = semivalues.kernel_shap(masks, noisy(masks), empty, full, "higher")
    close(estimate.values.sum(axis=1), full - empty, 1e-11)
    within(estimate, GAME.shapley)


def test_kernel_shap_errors_are_the_delete_one_jackknife():
    empty, full = GAME(np.zeros(N))[0], GAME(np.ones(N))[0]
    masks = semivalues.kernel_masks(N, 400)
    y = GAME(masks) + 5 * np.random.default_rng(0).normal(size=(400, 3))
    whole = semivalues.kernel_shap(masks, y, empty, full)
    without = [
        semivalues.kernel_shap(np.delete(masks, j, 0), np.delete(y, j, 0), empty, full).values for j in range(400)
    ]
    brute = np.sqrt(399 / 400 * sum((part - whole.values) ** 2 for part in without))
    np.testing.assert_allclose(whole.stderr, brute, rtol=0.03)


def test_kernel_masks_follow_the_shapley_kernel():
    masks = semivalues.kernel_masks(5, 20_000)
    share = np.bincount(masks.sum(axis=1), minlength=6) / 20_000
    law = np.array([0, 1 / 4, 1 / 6, 1 / 6, 1 / 4, 0])
    close(share, law / law.sum(), 0.015)
    close(masks.mean(axis=0), np.full(5, 0.5), 0.015)
    with refuses("apart"):
        semivalues.kernel_shap(masks[:4], np.zeros((4, 1)), [0.0], [1.0])


@pytest.mark.parametrize("neighbours", [1, 3, 6, 10])  # 10 > n: there the published base 1/n is wrong
def test_knn_shapley_is_the_enumerated_value(neighbours):
    rng = np.random.default_rng(neighbours)
    distances, train, query = rng.random((4, 6)), rng.integers(0, 2, 6), rng.integers(0, 2, 4)
    masks = semivalues.all_masks(6)
    votes = np.zeros((64, 4))
    for j, mask in enumerate(masks):
        for q in range(4):
            near = [i for i in np.argsort(distances[q]) if mask[i]][:neighbours]
            votes[j, q] = sum(train[i] == query[q] for i in near) / neighbours
    exact = semivalues.shapley(masks, votes, "higher").values
    close(semivalues.knn_shapley(distances, train, query, neighbours).values, exact)


# ----------------------------------------------------------------------------------------------------------- datamodels


@pytest.mark.parametrize(("r", "n"), [(30, 80), (90, 20), (40, 40)])
def test_ridge_is_scikit_learns_ridge_per_query(r, n):
    masks, y = half_masks(r, n), np.random.default_rng(1).normal(size=(r, 5))
    penalty = np.array([0.1, 3.0, 3.0, 50.0, 0.7])
    ours = datamodels.ridge(masks, y, penalty, "higher").values
    theirs = [Ridge(alpha=lam).fit(masks.astype(float), y[:, q]).coef_ for q, lam in enumerate(penalty)]
    close(ours, theirs, 1e-8)


@pytest.mark.parametrize(("r", "n"), [(15, 40), (40, 6)])
def test_ridge_errors_are_the_delete_one_jackknife(r, n):
    masks, y = np.random.default_rng(0).random((r, n)) < 0.5, np.random.default_rng(1).normal(size=(r, 3))
    whole = datamodels.ridge(masks, y, 2.0)
    without = [datamodels.ridge(np.delete(masks, j, 0), np.delete(y, j, 0), 2.0).values for j in range(r)]
    brute = (r - 1) / r * sum((part - whole.values) ** 2 for part in without)
    close(whole.stderr, np.sqrt(brute), 1e-10)


def test_ridge_errors_are_about_the_spread_of_repetitions():
    beta = np.random.default_rng(0).normal(size=(2, 60))
    estimates = []
    for seed in range(150):
        masks = half_masks(40, 60, seed)
        y = masks @ beta.T + 2 * np.random.default_rng(1000 + seed).normal(size=(40, 2))
        estimates.append(datamodels.ridge(masks, y, 5.0, "higher"))
    spread = np.std([e.values for e in estimates], axis=0)
    ratio = np.mean([e.stderr for e in estimates], axis=0) / spread
    assert 0.9 < ratio.mean() < 1.3


def test_penalty_by_leave_one_out_is_scikit_learns():
    masks = half_masks(40, 25)
    y = masks @ np.random.default_rng(0).normal(size=(25, 6)) + np.random.default_rng(1).normal(size=(40, 6)) * [
        1,
        2,
        4,
        8,
        16,
        32,
    ]
    grid = [0.1, 1.0, 10.0, 100.0, 1000.0]
    theirs = [RidgeCV(alphas=grid).fit(masks.astype(float), y[:, q]).alpha_ for q in range(6)]
    ours = datamodels.ridge_penalty(masks, y, grid)
    np.testing.assert_array_equal(ours, theirs)
    assert len(set(ours)) > 1


def test_penalty_on_tune_runs_is_the_brute_choice():
    rng = np.random.default_rng(1)
    masks, tune = rng.random((40, 25)) < 0.7, rng.random((30, 25)) < 0.2
    beta = np.random.default_rng(0).normal(size=(25, 3))
    y, z = (part @ beta + rng.normal(size=(len(part), 3)) * [0.5, 3, 20] for part in (masks, tune))
    grid = np.logspace(-2, 4, 60)
    for q in range(3):
        fits = [Ridge(alpha=lam).fit(masks.astype(float), y[:, q]) for lam in grid]
        best = grid[np.argmin([((fit.predict(tune.astype(float)) - z[:, q]) ** 2).mean() for fit in fits])]
        assert datamodels.ridge_penalty_on(masks, y, tune, z, grid)[q] == best
    with refuses("share none"):
        datamodels.ridge_penalty_on(masks, y, masks[:3], y[:3], grid)
    with refuses("share none"):
        datamodels.lasso_penalty_on(masks, y, masks[:3], y[:3], [0.1])


def test_datamodels_recover_a_linear_world():
    masks = np.random.default_rng(0).random((200, 10)) < 0.5
    beta = np.random.default_rng(1).normal(size=(4, 10))
    y = masks @ beta.T + 3.0
    close(datamodels.ridge(masks, y, 1e-6, "higher").values, beta, 1e-4)
    close(datamodels.lasso(masks, y, 1e-6, resamples=0, better="higher").values, beta, 1e-4)


def test_lasso_finds_the_few_effects_and_its_path_ends_at_zero():
    rng = np.random.default_rng(0)
    masks, tune = half_masks(120, 30), half_masks(80, 30, seed=5)
    beta = np.zeros((2, 30))
    beta[0, :3], beta[1, 10:12] = 2.0, -3.0
    y, z = (part @ beta.T + 0.3 * rng.normal(size=(len(part), 2)) for part in (masks, tune))
    centred = masks - masks.mean(0)
    highest = np.abs(centred.T @ (y - y.mean(0))).max(0) / len(y)
    assert (datamodels.lasso(masks, y, highest * 1.001, resamples=0).values == 0).all()
    assert (datamodels.lasso(masks, y, highest * 0.999, resamples=0).values != 0).any(axis=1).all()
    penalty = datamodels.lasso_penalty_on(masks, y, tune, z, np.logspace(0, -4, 30))
    np.testing.assert_allclose(datamodels.lasso_penalty_on(masks, y, tune, z, [1.0]), highest)
    estimate = datamodels.lasso(masks, y, penalty, resamples=20, better="higher")
    big = np.abs(beta) > 0
    assert np.abs(estimate.values[big] - beta[big]).max() < 0.4
    assert np.abs(estimate.values[~big]).max() < 0.4
    assert (estimate.stderr[big] > 0).all()
    assert np.isnan(datamodels.lasso(masks, y, penalty, resamples=0).stderr).all()


def test_ridge_on_half_masks_ranks_like_empirical_influence():
    # D-TRAK's "datamodel" is ridge on half masks: with a large penalty it is influence up to one scale
    masks, y = half_masks(60, 200, k=100), np.random.default_rng(0).normal(size=(60, 3))
    weights = datamodels.ridge(masks, y, 1e9).values.ravel()
    balanced = masks.sum(axis=0)[None] * (60 - masks.sum(axis=0))[None] / 60
    close(np.corrcoef(weights, (leave_out.empirical_influence(masks, y).values * balanced).ravel())[0, 1], 1, 1e-9)


# ------------------------------------------------------------------------------------------------------- laws of them all

READERS = {
    "influence": leave_out.empirical_influence,
    "banzhaf": semivalues.banzhaf,
    "sampled": lambda x, y, b: semivalues.sampled_semivalue(x, y, 0.5, semivalues.beta_sizes(x.shape[1]), b),
    "ridge": lambda x, y, b: datamodels.ridge(x, y, 1.0, b),
    "lasso": lambda x, y, b: datamodels.lasso(x, y, 0.01, 2, better=b),
    "kernel": lambda x, y, b: semivalues.kernel_shap(x, y, y.min(0), y.max(0), b),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_laws_of_every_reader(reader):
    masks, y = half_masks(40, 8), np.random.default_rng(0).normal(size=(40, 3))
    lower, higher = reader(masks, y, "lower"), reader(masks, y, "higher")
    np.testing.assert_array_equal(lower.values, -higher.values)
    np.testing.assert_array_equal(lower.stderr, higher.stderr)
    assert lower.values.shape == lower.stderr.shape == (3, 8)
    assert np.abs(lower.values).max() > 0.01
    swap = np.random.default_rng(1).permutation(8)
    close(reader(masks[:, swap], y, "lower").values, lower.values[:, swap], 1e-7)
    close(reader(masks, y[:, :1], "lower").values, lower.values[:1])
    for bad in (np.where(np.eye(40, 3) > 0, np.nan, y), y[:-1], y[:, 0]):
        with pytest.raises(WhenceError):
            reader(masks, bad, "lower")
    with refuses("higher"):
        reader(masks, y, "loss")
    with refuses("masks"):
        reader(masks * 0.5, y, "lower")
