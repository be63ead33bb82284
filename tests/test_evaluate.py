"""LDS, intervals, ceiling, nested choice and retrieval against scipy, hand-made cases and simulated banks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from agreement import close
from errors import refuses
from whence.evaluation import ceiling, choice, lds, retrieval

M, Nn, R = 5, 30, 40


def world(seed=0, r=R, n=Nn, m=M, noise=1.0):
    """Half masks, true effects [m, n] and losses of an additive world with seed noise."""
    rng = np.random.default_rng(seed)
    masks = rng.random((r, n)).argsort(axis=1) < n // 2
    beta = rng.normal(size=(m, n))
    return masks, beta, -(masks @ beta.T) + noise * rng.normal(size=(r, m))


def bank(rng, r, m, correlation, spread=0.0, shared=0.0):
    """Predictions and outputs [r, m] whose true correlation per query is known; `shared` noise is common to the queries."""
    rho = np.clip(correlation + spread * rng.normal(size=m), -0.95, 0.95)

    def normal():
        return np.sqrt(shared) * rng.normal(size=(r, 1)) + np.sqrt(1 - shared) * rng.normal(size=(r, m))

    x = normal()
    return x, rho * x + np.sqrt(1 - rho**2) * normal()


def true_spearman(correlation, spread=0.0):
    rho = np.clip(correlation + spread * np.random.default_rng(0).normal(size=400_000), -0.95, 0.95)
    return (6 / np.pi * np.arcsin(rho / 2)).mean()


# ------------------------------------------------------------------------------------------------------------------ LDS


def test_lds_is_scipys_spearman_per_query():
    masks, beta, losses = world(noise=5)
    scores = beta + np.random.default_rng(1).normal(size=beta.shape)
    theirs = [spearmanr(masks @ scores[q], -losses[:, q]).statistic for q in range(M)]
    np.testing.assert_allclose(lds.lds(scores, masks, losses), theirs, rtol=0, atol=1e-12)
    np.testing.assert_allclose(lds.lds(scores, masks, -losses, "higher"), theirs, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 25), st.integers(0, 10_000), st.integers(2, 5))
def test_spearman_with_ties_is_scipys(rows, seed, levels):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, levels, (2, rows, 3)).astype(float)
    ours = lds.spearman(a, b)
    for q in range(3):
        if np.ptp(a[:, q]) == 0 or np.ptp(b[:, q]) == 0:
            assert np.isnan(ours[q])
        else:
            assert ours[q] == pytest.approx(spearmanr(a[:, q], b[:, q]).statistic, abs=1e-12)


def test_true_effects_reach_one_sign_flip_minus_one_and_wrong_queries_nothing():
    masks, beta, losses = world(noise=0, r=60, m=40)
    np.testing.assert_allclose(lds.lds(beta, masks, losses), 1)
    np.testing.assert_allclose(lds.lds(-beta, masks, losses), -1)
    assert abs(lds.lds(np.roll(beta, 1, axis=0), masks, losses).mean()) < 0.1


def test_a_constant_shift_matters_on_mixed_sizes_only():
    masks, beta, losses = world()
    np.testing.assert_array_equal(lds.lds(beta + 7, masks, losses), lds.lds(beta, masks, losses))
    mixed = np.random.default_rng(0).random(masks.shape) < 0.5
    assert np.abs(lds.lds(beta + 7, mixed, losses) - lds.lds(beta, mixed, losses)).max() > 0.05


def test_constant_rows_are_undefined_even_where_sums_round():
    masks, beta, losses = world()
    flat = np.broadcast_to(np.random.default_rng(0).random((M, 1)) / 3, (M, Nn))
    raw = masks @ (flat * 1.0).T + masks[:, ::-1] @ (flat * 1e-16).T
    assert np.isnan(lds.lds(flat, masks, losses)).all(), raw
    losses[:, 2] = 0.1 + 0.2
    assert np.isnan(lds.lds(beta, masks, losses)).tolist() == [False, False, True, False, False]


def test_equal_subsets_tie_whatever_the_rounding():
    masks = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], bool)
    scores = np.array([[0.1, 0.2, 0.3, 1e-17]])  # 0.1 + 0.2 differs from 0.3 + 0 in the last bit
    predictions = lds.predict(scores, masks)
    assert predictions[0, 0] == predictions[1, 0]
    assert predictions[2, 0] == pytest.approx(0.4)
    assert predictions[3, 0] == pytest.approx(0.2)


def test_bad_input_is_refused_with_its_place():
    masks, beta, losses = world()
    cases = [
        ((beta, masks, losses, "loss"), "higher"),
        ((beta[:, 1:], masks, losses), "column"),
        ((beta, masks, losses[1:]), "correlate"),
        ((beta, masks * 2, losses), "0 and 1"),
        ((np.where(beta == beta[3, 4], np.nan, beta), masks, losses), "(3, 4)"),
        ((beta, masks, np.where(losses == losses[7, 2], np.inf, losses)), "(7, 2)"),
    ]
    for arguments, what in cases:
        with refuses(what):
            lds.lds(*arguments)


# ------------------------------------------------------------------------------------------------------------ intervals


def test_resampled_lds_is_scipys_on_the_repeated_rows():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, (15, 3)).astype(float), rng.normal(size=(15, 3))
    result = lds.bootstrap({"a": x}, y, "higher", resamples=100, seed=3)
    replay = np.random.default_rng(3).multinomial(15, np.full(15, 1 / 15), size=100)
    for b in range(100):
        rows = np.repeat(np.arange(15), replay[b])
        for q in range(3):
            theirs = spearmanr(x[rows, q], y[rows, q]).statistic
            assert result.resampled["a"][b, q] == pytest.approx(theirs, abs=1e-5)
    assert (result.query_counts.sum(axis=1) == 3).all()


def test_the_estimate_is_the_statistic_on_all_rows():
    masks, beta, losses = world(noise=5)
    result = lds.bootstrap({"a": lds.predict(beta, masks)}, losses, resamples=200)
    assert result.interval("a").estimate == pytest.approx(lds.lds(beta, masks, losses).mean(), abs=1e-12)
    assert result.interval("a").estimate != pytest.approx(result.resampled["a"].mean(), abs=1e-4)


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    x, y = bank(rng, 48, 30, 0.5, shared=0.5)
    close = x + 0.1 * rng.normal(size=x.shape)
    result = lds.bootstrap({"a": x, "b": close, "c": rng.normal(size=x.shape)}, y, "higher", resamples=500)
    gap = result.difference("a", "b")
    assert gap.width < result.interval("a").width / 3
    assert gap.estimate == pytest.approx(result.interval("a").estimate - result.interval("b").estimate)
    back = result.difference("b", "a")
    np.testing.assert_allclose([back.low, back.high], [-gap.high, -gap.low], atol=1e-12)
    assert result.difference("a", "c").low > 0.2
    with refuses("there is"):
        result.interval("d")


def test_a_method_that_says_nothing_is_undefined_and_counted():
    rng = np.random.default_rng(0)
    x, y = bank(rng, 20, 4, 0.9)
    some = x.copy()
    some[:, 1] = 3.0
    result = lds.bootstrap({"all": x, "some": some, "none": np.zeros_like(x)}, y, "higher", resamples=200)
    assert result.interval("all").undefined == 0
    assert result.interval("some").undefined == result.difference("some", "all").undefined == 1
    assert result.interval("some").estimate == pytest.approx(np.delete(result.lds["all"], 1).mean())
    assert result.interval("none").undefined == 4
    assert np.isnan(result.interval("none").estimate)


def test_rows_do_not_depend_on_the_other_methods():
    rng = np.random.default_rng(0)
    x, y = bank(rng, 20, 4, 0.4)
    alone = lds.bootstrap({"a": x}, y, resamples=200).interval("a")
    assert lds.bootstrap({"z": -x, "a": x}, y, resamples=200).interval("a") == alone


@pytest.mark.parametrize(
    ("r", "m", "correlation", "spread", "shared"),
    [
        (48, 12, 0.3, 0.0, 0.0),  # all variance in single cells: an uncorrected two-way bootstrap covers 99.8 %
        (48, 12, 0.4, 0.0, 0.5),  # subsets matter to all queries alike
        (48, 20, 0.4, 0.2, 0.0),  # queries differ
    ],
)
def test_intervals_cover(r, m, correlation, spread, shared):
    rng = np.random.default_rng(1)
    truth, hits, repeats = true_spearman(correlation, spread), 0, 500
    for seed in range(repeats):
        x, y = bank(rng, r, m, correlation, spread, shared)
        interval = lds.bootstrap({"a": x}, y, "higher", resamples=200, seed=seed).interval("a")
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / repeats <= 0.98


def test_intervals_aim_at_infinitely_many_subsets():
    # few subsets, many queries: a Spearman is low by about ρ/(r+1), and the interval must not repeat that
    rng, truth = np.random.default_rng(3), true_spearman(0.8)
    intervals = []
    for seed in range(20):
        x, y = bank(rng, 16, 150, 0.8)
        intervals.append(lds.bootstrap({"a": x}, y, "higher", resamples=200, seed=seed).interval("a"))
    bias = np.mean([i.estimate for i in intervals]) - truth
    assert -0.06 < bias < -0.02
    assert abs(np.mean([(i.low + i.high) / 2 for i in intervals]) - truth) < 0.5 * abs(bias)
    assert abs(np.mean([i.centre for i in intervals]) - truth) < 0.5 * abs(bias)
    assert all(i.low < i.centre < i.high for i in intervals)


def test_an_lds_ends_at_1():
    rng = np.random.default_rng(0)
    x, y = bank(rng, 12, 6, 0.999)
    found = lds.bootstrap({"a": x}, y, "higher", resamples=200).interval("a")
    assert found.estimate < 1
    assert found.low < found.centre <= found.high <= 1


# -------------------------------------------------------------------------------------------------------------- ceiling


def seeds(rng, rho, subsets=64, per_subset=3, nan=0.0):
    """Outputs by seed whose one-seed reliability is rho [m], and the subset of each run."""
    index = np.repeat(np.arange(subsets), per_subset)
    signal = rng.normal(size=(subsets, len(rho))) * np.sqrt(rho)
    y = signal[index] + rng.normal(size=(len(index), len(rho))) * np.sqrt(1 - rho)
    return 5 + np.where(rng.random(y.shape) < nan, np.nan, y), index


def test_reliability_is_the_analysis_of_variance_by_hand():
    y = np.array([1.0, 3.0, 4.0, 8.0, 6.0, 9.0, 2.0, 3.0, 1.0, 7.0])
    index = np.array(["a", "a", "b", "b", "b", "c", "d", "d", "d", "d"])
    groups = [y[index == name] for name in "abcd"]
    k = np.array([len(g) for g in groups])
    msb = sum(len(g) * (g.mean() - y.mean()) ** 2 for g in groups) / 3
    msw = sum(((g - g.mean()) ** 2).sum() for g in groups) / (10 - 4)
    k0 = (10 - (k**2).sum() / 10) / 3
    share = msw / msb * (4 - 3) / (4 - 1)
    result = ceiling.reliability(y[:, None], index)
    assert result.seeds[0] == pytest.approx(k0)
    assert result.mean_of_seeds[0] == pytest.approx(1 - share)
    assert result.one_seed[0] == pytest.approx((1 - share) / (1 + (k0 - 1) * share))
    assert ceiling.spearman_brown(result.one_seed, k0)[0] == pytest.approx(1 - share)


@pytest.mark.parametrize(("per_subset", "nan"), [(2, 0.0), (4, 0.0), (4, 0.2), ("mixed", 0.0)])
def test_reliability_and_ceiling_recover_the_simulated_truth(per_subset, nan):
    rng = np.random.default_rng(0)
    rho = rng.uniform(0.3, 0.8, 300)
    counts = rng.integers(1, 5, 64) if per_subset == "mixed" else per_subset
    y, index = seeds(rng, rho, per_subset=counts, nan=nan)
    result = ceiling.reliability(y, index)
    assert result.one_seed.mean() == pytest.approx(rho.mean(), abs=0.015)
    assert np.corrcoef(result.one_seed, rho)[0, 1] > 0.6
    truth = np.sqrt(ceiling.spearman_brown(rho, result.seeds))
    bound = ceiling.ceiling(y, index, resamples=300)
    assert bound.pearson.estimate == pytest.approx(truth.mean(), abs=0.008)
    assert bound.spearman.estimate == pytest.approx((6 / np.pi * np.arcsin(truth / 2)).mean(), abs=0.008)
    assert bound.pearson.low < bound.pearson.estimate < bound.pearson.high <= 1
    assert bound.spearman.estimate < bound.pearson.estimate


def test_an_oracle_reaches_the_spearman_ceiling():
    rng = np.random.default_rng(0)
    rho = np.full(400, 0.4)
    index = np.repeat(np.arange(64), 3)
    signal = rng.normal(size=(64, 400)) * np.sqrt(rho)
    y = signal[index] + rng.normal(size=(192, 400)) * np.sqrt(1 - rho)
    oracle = lds.spearman(signal, y.reshape(64, 3, 400).mean(axis=1)).mean()
    assert ceiling.ceiling(y, index, resamples=200).spearman.estimate == pytest.approx(oracle, abs=0.015)
    assert oracle == pytest.approx(0.79, abs=0.015)  # the handbook's simulated oracle, ρ=.4, K=3, M=64


def test_ceiling_interval_covers():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        rho = rng.uniform(0.3, 0.7, 10)
        y, index = seeds(rng, rho)
        interval = ceiling.ceiling(y, index, resamples=200, seed=seed).pearson
        hits += interval.low <= np.sqrt(ceiling.spearman_brown(rho, 3)).mean() <= interval.high
    assert 0.92 <= hits / 200 <= 0.99


def test_replicate_correlation_is_the_reliability_of_one_seed():
    rng = np.random.default_rng(0)
    rho = rng.uniform(0.2, 0.9, 300)
    y, index = seeds(rng, rho, per_subset=2)
    result = ceiling.replicate_correlation(y, index)
    pairs = y.reshape(64, 2, 300)
    for q in (0, 7):
        assert result[q] == pytest.approx(np.corrcoef(pairs[:, 0, q], pairs[:, 1, q])[0, 1], abs=1e-12)
    assert result.mean() == pytest.approx(rho.mean(), abs=0.02)
    shuffled = rng.permutation(len(index))
    assert ceiling.replicate_correlation(y[shuffled], index[shuffled]).mean() == pytest.approx(rho.mean(), abs=0.02)


def crossed(rng, rho, subsets=24, count=4, seed_share=3.0, gaps=0.0):
    """[runs, m] of subsets trained with the same seeds: a_j + b_k + e_jk, ρ = var a / (var a + var e)."""
    m = len(rho)
    signal = rng.normal(size=(subsets, 1, m)) * np.sqrt(rho)
    shift = rng.normal(size=(1, count, m)) * seed_share
    y = signal + shift + rng.normal(size=(subsets, count, m)) * np.sqrt(1 - rho)
    j, k = (part.ravel() for part in np.mgrid[:subsets, :count])
    here = rng.random(subsets * count) >= gaps
    return y.reshape(-1, m)[here], j[here], k[here], signal[:, 0]


@pytest.mark.parametrize("gaps", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 4])
def test_common_seeds_are_told_from_noise(count, gaps):
    rng = np.random.default_rng(0)
    rho = rng.uniform(0.3, 0.8, 300)
    y, j, k, _ = crossed(rng, rho, 96, count, gaps=gaps)
    result = ceiling.reliability(y, j, k)
    assert result.one_seed.mean() == pytest.approx(rho.mean(), rel=0.03)
    truth = np.sqrt(ceiling.spearman_brown(rho, result.seeds))
    assert ceiling.ceiling(y, j, k, resamples=100).pearson.estimate == pytest.approx(truth.mean(), rel=0.015)
    assert ceiling.replicate_correlation(y, j, k).mean() == pytest.approx(rho.mean(), rel=0.05)
    assert ceiling.reliability(y, j).one_seed.mean() < 0.15, "one-way takes the seeds' own effects for noise"


def test_what_a_seed_does_to_all_subsets_is_no_noise():
    rng = np.random.default_rng(1)
    y, j, k, _ = crossed(rng, np.full(5, 0.5), gaps=0.2)
    moved = y + rng.normal(size=(4, 5))[k] * 10
    close(ceiling.reliability(moved, j, k).one_seed, ceiling.reliability(y, j, k).one_seed)
    close(ceiling.replicate_correlation(moved, j, k), ceiling.replicate_correlation(y, j, k))


def test_two_way_analysis_is_that_of_textbooks():
    """Complete: mean squares of the two-way layout. With gaps: regression on the indicators of subsets and seeds."""
    rng = np.random.default_rng(2)
    for gaps in (0.0, 0.25):
        y, j, k, _ = crossed(rng, np.array([0.6]), 12, 3, gaps=gaps)
        subsets, seeds = np.eye(12)[j], np.eye(3)[k]
        rss, ranks = [], []
        for design in (seeds, np.hstack([subsets, seeds])):
            rss.append(float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum()))
            ranks.append(np.linalg.matrix_rank(design))
        df = ranks[1] - ranks[0]
        noise, between = rss[1] / (len(y) - ranks[1]), (rss[0] - rss[1]) / df
        projected = subsets - seeds @ np.linalg.lstsq(seeds, subsets, rcond=None)[0]
        effective = np.trace(projected.T @ projected) / df
        share = noise / between * (df - 2) / df
        result = ceiling.reliability(y, j, k)
        close(result.seeds[0], effective)
        close(result.mean_of_seeds[0], 1 - share)
        close(result.one_seed[0], (1 - share) / (1 + (effective - 1) * share))


def test_seed_effects_are_least_squares():
    rng = np.random.default_rng(3)
    y, j, k, _ = crossed(rng, np.full(4, 0.5), 12, 3, gaps=0.25)
    design = np.hstack([np.eye(12)[j], np.eye(3)[k]])
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    found = ceiling.seed_effects(y, j, k)
    left = fitted - found
    for subset in range(12):
        close(left[j == subset], np.broadcast_to(left[j == subset][:1], left[j == subset].shape))
    alone = np.append(k[:-1], 99)
    assert np.isnan(ceiling.seed_effects(y, j, alone)[-1]).all()
    own = np.arange(len(k))
    assert (ceiling.seed_effects(y, j, own) == 0).all()
    close(ceiling.reliability(y, j, own).one_seed, ceiling.reliability(y, j).one_seed)


def test_an_oracle_reaches_the_ceiling_of_common_seeds():
    rng = np.random.default_rng(4)
    y, j, k, signal = crossed(rng, np.full(400, 0.4), 64, 3)
    oracle = lds.spearman(signal, y.reshape(64, 3, 400).mean(axis=1)).mean()
    assert ceiling.ceiling(y, j, k, resamples=100).spearman.estimate == pytest.approx(oracle, rel=0.02)


def test_the_ceiling_interval_of_common_seeds_covers():
    rng, hits = np.random.default_rng(5), 0
    for seed in range(100):
        rho = rng.uniform(0.3, 0.7, 10)
        y, j, k, _ = crossed(rng, rho, 64, 3)
        interval = ceiling.ceiling(y, j, k, resamples=200, seed=seed).pearson
        hits += interval.low <= np.sqrt(ceiling.spearman_brown(rho, 3)).mean() <= interval.high
    assert 0.9 <= hits / 100 <= 1


def test_one_seed_and_constant_queries():
    rng = np.random.default_rng(0)
    y, index = seeds(rng, np.full(3, 0.5))
    for judge in (ceiling.reliability, ceiling.ceiling, ceiling.replicate_correlation):
        with refuses("seeds each"):
            judge(y[::3], index[::3])
        with refuses("subset"):
            judge(y, index[:-1])
    y[:, 1] = 2.0
    assert np.isnan(ceiling.reliability(y, index).one_seed).tolist() == [False, True, False]
    assert np.isnan(ceiling.replicate_correlation(y, index)).tolist() == [False, True, False]
    bound = ceiling.ceiling(y, index, resamples=200)
    assert bound.pearson.undefined == 1
    assert bound.pearson.estimate > 0.5


def test_planner_foretells_simulated_banks():
    plan = ceiling.planner(64, 3, 100, 0.4)
    assert plan.pearson == pytest.approx(np.sqrt(1.2 / 1.8))
    assert plan.spearman == pytest.approx(0.80, abs=0.01)
    rng = np.random.default_rng(0)
    for m, correlation, spread in ((40, 0.4, 0.0), (40, 0.4, 0.2)):
        means = []
        for _ in range(400):
            x, y = bank(rng, 64, m, correlation, spread)
            means.append(lds.spearman(x, y).mean())
        spread_of_lds = 6 / np.pi / np.sqrt(1 - (correlation / 2) ** 2) / 2 * spread
        plan = ceiling.planner(64, 3, m, 0.4, lds=true_spearman(correlation), spread=spread_of_lds)
        assert plan.width == pytest.approx(2 * 1.96 * np.std(means), rel=0.12)
    assert ceiling.planner(64, 3, 100, 0.4, shared=0.3).width > 2 * ceiling.planner(64, 3, 100, 0.4).width
    with refuses("subsets"):
        ceiling.planner(3, 3, 100, 0.4)


# -------------------------------------------------------------------------------------------------------- nested choice


def candidates(beta):
    rng = np.random.default_rng(5)
    return {noise: beta + noise * rng.normal(size=beta.shape) for noise in (3.0, 0.3, 1.0)}


def test_choice_uses_tune_rows_and_reports_test_rows():
    masks, beta, losses = world(r=120, noise=2)
    settings_ = candidates(beta)
    assert choice.choose(settings_, masks[:60], losses[:60]) == 0.3
    result = choice.nested(settings_, masks[:60], losses[:60], masks[60:], losses[60:])
    assert result.setting == 0.3
    assert result.lds == pytest.approx(lds.lds(settings_[0.3], masks[60:], losses[60:]).mean())
    assert result.tune[1.0] == pytest.approx(lds.lds(settings_[1.0], masks[:60], losses[:60]).mean())
    assert result.optimism == 0


def test_optimism_of_choosing_among_noise_is_positive():
    gaps = []
    for seed in range(10):
        masks, beta, losses = world(seed, r=60)
        noise = {k: np.random.default_rng([seed, k]).normal(size=beta.shape) for k in range(20)}
        result = choice.nested(noise, masks[:30], losses[:30], masks[30:], losses[30:])
        assert result.optimism == pytest.approx(max(result.test.values()) - result.test[result.setting])
        gaps.append(result.optimism)
    assert min(gaps) >= 0
    assert np.mean(gaps) > 0.05


def test_tune_and_test_must_not_share_subsets():
    masks, beta, losses = world(r=60)
    with refuses("1 subsets"):
        choice.nested(candidates(beta), masks[:30], losses[:30], masks[29:], losses[29:])
    with refuses("0 candidates"):
        choice.choose({}, masks, losses)


def test_saying_nothing_does_not_win():
    masks, beta, losses = world(noise=8)
    shy = np.zeros_like(beta)
    best = int(np.nanargmax(lds.lds(beta, masks, losses)))
    shy[best] = beta[best]  # right about its one query, silent about the others
    assert np.nanmean(lds.lds(shy, masks, losses)) > lds.lds(beta, masks, losses).mean()
    assert choice.choose({"shy": shy, "full": beta}, masks, losses) == "full"


# ------------------------------------------------------------------------------------------------------------ retrieval


def test_recall_of_planted_duplicates():
    scores = np.array([[9.0, 1.0, 8.0, 0.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    copies = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(retrieval.recall_at_k(scores, copies, 1), [0.5, 0.5, np.nan])
    np.testing.assert_allclose(retrieval.recall_at_k(scores, copies, 2), [1, 0.5, np.nan])
    np.testing.assert_allclose(retrieval.recall_at_k(scores, copies, 4), [1, 1, np.nan])
    with refuses("top 5"):
        retrieval.recall_at_k(scores, copies, 5)


def test_precision_counts_classes_and_ties_by_expectation():
    labels, queries = np.array(["cat", "cat", "dog", "dog", "dog"]), np.array(["cat", "dog"])
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    np.testing.assert_allclose(retrieval.precision_at_k(scores, labels, queries, 3), [2 / 3, 1 / 3])
    # a constant score is as good as chance, in any order of the images
    np.testing.assert_allclose(retrieval.precision_at_k(np.ones((2, 5)), labels, queries, 2), [2 / 5, 3 / 5])
    half = np.array([[2.0, 1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(retrieval.precision_at_k(half, labels, queries[:1], 2), [0.75])


def test_expected_hits_are_the_mean_over_tie_breaks():
    rng = np.random.default_rng(0)
    scores, relevant = rng.integers(0, 3, (1, 8)).astype(float), rng.random((1, 8)) < 0.4
    broken = [retrieval.recall_at_k(scores + 1e-6 * rng.random((1, 8)), relevant, 3) for _ in range(3000)]
    np.testing.assert_allclose(retrieval.recall_at_k(scores, relevant, 3), np.mean(broken), atol=0.02)


def test_mislabel_auroc_is_scikit_learns():
    rng = np.random.default_rng(0)
    bad = rng.random(200) < 0.1
    values = rng.integers(0, 10, 200) * 1e-9 + 2e-9 * bad  # tiny and tied: an index tie-break would destroy the order
    assert retrieval.mislabel_auroc(values, bad) == pytest.approx(roc_auc_score(bad, values), abs=1e-12)
    assert retrieval.mislabel_auroc(values, bad) > 0.55
    with refuses("both kinds"):
        retrieval.mislabel_auroc(values, np.zeros(200, bool))


def test_sharpening_keeps_the_order_and_changes_the_sums():
    tau = np.random.default_rng(0).standard_normal((4, 50))
    masks = np.random.default_rng(1).random((30, 50)) < 0.5
    for power in (0.5, 2.0, 3.0):
        sharp = choice.sharpen(tau, power)
        np.testing.assert_array_equal(np.argsort(sharp, 1), np.argsort(tau, 1))
        np.testing.assert_array_equal(np.sign(sharp), np.sign(tau))
        assert (np.argsort(lds.predict(sharp, masks), 0) != np.argsort(lds.predict(tau, masks), 0)).any()
    np.testing.assert_allclose(choice.sharpen([[-3.0, 0.0, 2.0]], 2), [[-9.0, 0.0, 4.0]])
    np.testing.assert_array_equal(choice.sharpen(tau, 1), tau)
    for power in (0.0, -1.0, np.inf, np.nan):
        with refuses("above 0 and finite"):
            choice.sharpen(tau, power)
