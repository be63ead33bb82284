"""Values read from a ledger: every reader on a game whose values are known, with the trainings of its own plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from errors import refuses
from games import pairwise
from whence.evaluation import designs
from whence.evaluation.designs import Subset
from whence.evaluation.games import Game, game_of
from whence.evaluation.outcomes import Table, Unit
from whence.evaluation.plans import Asked, planned
from whence.evaluation.readers import VALUES, whole_game
from whence.methods import entry
from whence.methods.removal import READERS
from whence.methods.removal.semivalues import beta_sizes, semivalue

QUERIES = 3


def measured(
    subsets: Sequence[Subset], n: int, players: Sequence[Sequence[int]], noise: float = 0.0, better: str = "lower"
) -> Table:
    """What a ledger would have measured, were the loss a pairwise game of the players; seeds shift all trainings alike by
    much, and each training by `noise`. Its images are players' alone: a torn player plays by the share of its images."""
    game = pairwise(len(players), QUERIES)
    units = [
        Unit(0, row, seed, each.role, each.design, each.chance)
        for row, each in enumerate(subsets)
        for seed in each.seeds
    ]
    masks = np.stack([subsets[unit.subset].mask for unit in units])
    seen = np.stack([masks[:, list(rows)].mean(axis=1) for rows in players], axis=1)
    own = np.array([np.random.default_rng([unit.seed, unit.subset]).normal(size=QUERIES) for unit in units])
    shared = np.array([np.random.default_rng(unit.seed).normal(size=QUERIES) for unit in units])
    outputs = -game(seen) * (1 if better == "lower" else -1) + 5 * shared + noise * own
    return Table(units, masks, outputs[:, :, None], [f"q{j}" for j in range(QUERIES)], better)


def read(method: str, k: int, runs: int | None = None, noise: float = 0.0, better: str = "lower", **plan: object):
    """What a method reads from the trainings that it plans for k players of two images each."""
    players = {f"p{i}": [2 * i, 2 * i + 1] for i in range(k)}
    subsets = planned(method, Asked(players, 2 * k, (1, 2), (50, 51)), runs, **plan)
    table = measured(subsets, 2 * k, list(players.values()), noise, better)
    game = game_of(table, players)
    game = (whole_game(game) if VALUES[method].semivalue else None) or game
    return VALUES[method].read(game), pairwise(k, QUERIES)


EXACT = {
    "leave_one_out": lambda game: game.leave_one_out,
    "shapley": lambda game: game.shapley,
    "banzhaf": lambda game: game.shapley,
    "beta_shapley": lambda game: None,
}


@pytest.mark.parametrize("better", ["lower", "higher"])
@pytest.mark.parametrize("method", EXACT)
def test_few_players_have_exact_values_whatever_a_seed_does_to_all_trainings(method, better):
    found, game = read(method, 6, better=better)
    expected = EXACT[method](game)
    if expected is None:
        masks = np.unique(np.arange(2**6)[:, None] >> np.arange(6) & 1, axis=0)
        expected = semivalue(masks, -game(masks), beta_sizes(6, 4.0, 1.0)).values
    np.testing.assert_allclose(found.values, expected, atol=1e-10)
    assert found.stderr.max() < 1e-8, "what a seed does to all coalitions alike is no error of a value"


@pytest.mark.parametrize("method", EXACT)
def test_errors_are_those_of_other_trainings(method):
    """The spread of the values over forty ledgers whose trainings differ by independent noise is what one of them states."""
    k = 4
    players = {f"p{i}": [i] for i in range(k)}
    found = []
    for first in range(0, 4000, 100):
        subsets = planned(method, Asked(players, k, (first, first + 1, first + 2), (50,)))
        game = game_of(measured(subsets, k, list(players.values()), noise=0.3), players)
        found.append(VALUES[method].read(game))
    spread = np.std([each.values for each in found], axis=0, ddof=1)
    stated = np.sqrt(np.mean([each.stderr**2 for each in found], axis=0))
    assert 0.85 < (stated / spread).mean() < 1.15


def test_sampled_plans_come_near_the_value_within_their_errors():
    for method, expected, runs in (
        ("shapley", "shapley", 150),
        ("beta_shapley", None, 2000),
        ("kernel_shap", "shapley", 600),
        ("banzhaf", "shapley", 3000),
        ("empirical_influence", None, 3000),
    ):
        found, game = read(method, 14, runs)
        if expected is not None:
            truth = getattr(game, expected)
        elif method == "empirical_influence":  # halves of a fixed size: up to a constant
            truth = game.shapley - game.shapley.mean(axis=1, keepdims=True)
            found = replace(found, values=found.values - found.values.mean(axis=1, keepdims=True))
        else:
            continue
        apart = (found.values - truth) / np.maximum(found.stderr, 1e-9)
        assert np.abs(apart).max() < 4.5, method
        assert np.sqrt((apart**2).mean()) < 1.5, method
        assert np.corrcoef(found.values.ravel(), truth.ravel())[0, 1] > 0.9, method


def test_marginals_of_orders_sum_to_what_all_are_worth_also_where_they_are_cut_off():
    players = {f"p{i}": [i] for i in range(14)}
    for truncation in (None, 5):
        subsets = planned("shapley", Asked(players, 14, (1,), (50,)), 3, truncation)
        longest = max(subset.mask.sum() for subset in subsets if subset.design.startswith("chain"))
        assert longest == (13 if truncation is None else 5)
        found, game = read("shapley", 14, 3, truncation=truncation)
        everybody = game(np.ones((1, 14)))[0] - game(np.zeros((1, 14)))[0]
        np.testing.assert_allclose(found.values.sum(axis=1), everybody, atol=1e-10)


def test_datamodels_read_their_subsets_and_choose_the_penalty_on_tune_subsets_alone():
    for method in ("datamodel_ridge", "datamodel_lasso"):
        found, game = read(method, 8, 150)
        centred = game.shapley - game.shapley.mean(axis=1, keepdims=True)
        got = found.values - found.values.mean(axis=1, keepdims=True)
        assert np.corrcoef(got.ravel(), centred.ravel())[0, 1] > 0.9, method


def test_memorization_is_the_diagonal():
    players = {f"p{i}": [i] for i in range(QUERIES)}
    subsets = designs.bernoulli(QUERIES, 400, 0.5, (1,), "fit", 3)
    table = measured([each for each in subsets if each.mask.any()], QUERIES, list(players.values()))
    whole = VALUES["empirical_influence"].read(game_of(table, players))
    own = VALUES["memorization"].read(game_of(table, players))
    np.testing.assert_allclose(own.values[0], np.diag(whole.values), atol=1e-9)
    assert own.values.shape == (1, QUERIES)


def table_of(masks: np.ndarray, design: str = "coalition(x)") -> Table:
    units = [Unit(0, row, 1, "fit", design, None) for row in range(len(masks))]
    return Table(units, masks, np.zeros((len(masks), 2, 1)), ["a", "b"], "lower")


def test_players_in_all_coalitions_are_ground_and_torn_ones_are_left_aside():
    players = {"ann": [0, 1], "ben": [2], "base": [3]}
    masks = np.array([[0, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]], bool)
    game = game_of(table_of(masks), players)
    assert (game.torn, len(game.units)) == (1, 4)
    whole = whole_game(game)
    assert list(whole.players) == ["ann", "ben"]
    assert whole_game(game_of(table_of(masks[:3]), players)) is None, "a coalition is missing"
    assert whole_game(game_of(table_of(masks, "fixed(0.5)"), players)) is None


LACKS: Mapping[str, str] = {
    "leave_one_out": "no training saw all players",
    "shapley": "neither all coalitions were trained, nor subsets of many sizes",
    "beta_shapley": "neither all coalitions were trained, nor subsets of many sizes",
    "banzhaf": "neither all coalitions were trained, nor subsets with probability 1/2",
    "empirical_influence": "no random subset of the role fit was trained",
    "memorization": "no random subset of the role fit was trained",
    "datamodel_ridge": "no random subset of the role fit was trained",
    "datamodel_lasso": "no random subset of the role fit was trained",
    "kernel_shap": "no coalition of kernel SHAP was trained",
}


@pytest.mark.parametrize("method", VALUES)
def test_a_ledger_without_the_trainings_of_a_method_says_which_plan_to_make(method):
    """Subsets to judge on are never read: scores that read them could not be judged."""
    judged = designs.fixed(6, 8, 0.5, (1, 2), "test", 1)
    game = game_of(measured(judged, 6, [[i] for i in range(6)]), {f"p{i}": [i] for i in range(6)})
    with refuses(LACKS[method], method, f"whence ledger plan --for {method}"):
        VALUES[method].read(game)


def test_a_training_that_is_missing_is_named():
    players = {f"p{i}": [i] for i in range(3)}
    subsets = planned("leave_one_out", Asked(players, 3, (1,), (50,)))[:-1]
    with refuses("no training leaves out 'p2' alone", "leave_one_out"):
        VALUES["leave_one_out"].read(game_of(measured(subsets, 3, [[0], [1], [2]]), players))


def test_plans_that_make_no_sense_are_refused():
    asked = Asked({f"p{i}": [i] for i in range(6)}, 6, (1,), (50,))
    with refuses("no method 'shaply'", "--for", "leave_one_out"):
        planned("shaply", asked)
    with refuses("1 players", "--by"):
        planned("shapley", Asked({"p": [0, 1]}, 2, (1,), (50,)))
    with refuses("all coalitions of 6 players are trained", "--runs"):
        planned("shapley", asked, 10)
    with refuses("nothing is drawn", "--runs"):
        planned("leave_one_out", asked, 10)
    with refuses("at least 1", "--runs"):
        planned("empirical_influence", asked, 0)
    with refuses("orders are cut off", "--truncation"):
        planned("banzhaf", asked, None, 3)


def test_what_a_plan_draws_twice_is_trained_once_and_counted_twice():
    asked = Asked({f"p{i}": [i] for i in range(4)}, 4, (1,), (50,))
    subsets = planned("kernel_shap", asked, 300)
    kernels = [subset for subset in subsets if subset.design.startswith("kernel")]
    assert len({subset.mask.tobytes() for subset in kernels}) == len(kernels) <= 14
    assert sum(len(subset.design.split(";")) for subset in kernels) == 300


def test_an_output_without_a_better_side_has_no_values():
    with refuses("neither better high nor low", "values"):
        game_of(replace(table_of(np.ones((2, 2), bool)), better=None), {"a": [0], "b": [1]})


def test_a_game_keeps_its_order_whatever_that_of_the_trainings():
    subsets = planned("shapley", Asked({f"p{i}": [i] for i in range(4)}, 4, (1, 2), (50,)))
    table = measured(subsets, 4, [[0], [1], [2], [3]], noise=0.2)
    turned = np.random.default_rng(0).permutation(len(table.units))
    other = replace(
        table, units=[table.units[t] for t in turned], masks=table.masks[turned], values=table.values[turned]
    )
    players = {f"p{i}": [i] for i in range(4)}
    one, two = (VALUES["shapley"].read(game_of(each, players)) for each in (table, other))
    np.testing.assert_allclose(one.values, two.values, atol=1e-12)
    np.testing.assert_allclose(one.stderr, two.stderr, atol=1e-12)
    assert isinstance(game_of(table, players), Game)


def test_readers_asked_for_as_methods_say_where_they_are():
    assert set(READERS) == {*VALUES, "knn_shapley"}
    for name in READERS:
        with refuses("reads retrained models", "method", f"whence values LEDGER --method {name}"):
            entry(name)
