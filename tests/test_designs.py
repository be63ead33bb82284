"""Every design keeps the law it is named after."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from errors import refuses
from whence.data.owners import groups
from whence.evaluation import designs
from whence.evaluation.designs import Subset


def masks(subsets: list[Subset]) -> np.ndarray:
    return np.stack([subset.mask for subset in subsets])


def left_out(subset: Subset) -> list[int]:
    return np.flatnonzero(~subset.mask).tolist()


def no_seed_twice(subsets: list[Subset]) -> bool:
    seeds = [seed for subset in subsets for seed in subset.seeds]
    return len(set(seeds)) == len(seeds)


# ------------------------------------------------------------------------------------------------------------- random


@pytest.mark.parametrize(
    ("n", "count", "fraction"), [(24, 6, 0.5), (101, 64, 0.5), (40, 7, 0.1), (10, 3, 0.85), (2, 1, 0.5)]
)
def test_fixed_subsets_have_one_size_and_are_balanced(n, count, fraction):
    found = designs.fixed(n, count, fraction, seeds=(7, 8), role="tune", seed=3)
    drawn = masks(found)
    assert drawn.dtype == bool
    assert drawn.shape == (count, n)
    assert set(drawn.sum(1).tolist()) == {round(fraction * n)}
    times = drawn.sum(0)
    assert times.max() - times.min() <= 1
    assert {(s.role, s.design, s.chance) for s in found} == {("tune", f"fixed({fraction:g})", fraction)}
    assert all(len(s.seeds) == 2 for s in found)


def test_random_subsets_are_a_function_of_their_seed():
    for design in (designs.fixed, designs.bernoulli):
        again = [masks(design(30, 8, seed=s)) for s in (0, 0, 1)]
        assert np.array_equal(again[0], again[1])
        assert not np.array_equal(again[0], again[2])
    assert len({mask.tobytes() for mask in masks(designs.fixed(30, 8))}) == 8, "no subset twice"


def test_fixed_subsets_are_spread_over_pairs_of_images():
    """Balance must not come from complements: two images are together as often as chance has it."""
    drawn = masks(designs.fixed(20, 2000)).astype(float)
    together = (drawn.T @ drawn / 2000)[np.triu_indices(20, 1)]
    assert abs(together.mean() - 10 * 9 / (20 * 19)) < 1e-3
    assert together.std() < 0.02


def test_bernoulli_subsets_take_every_image_by_itself():
    found = designs.bernoulli(50, 2000, chance=0.3)
    drawn = masks(found)
    assert np.abs(drawn.mean(0) - 0.3).max() < 0.05
    sizes = drawn.sum(1)
    assert abs(sizes.mean() - 15) < 0.3
    assert abs(sizes.var() - 50 * 0.3 * 0.7) < 1.5, "independent: the size is binomial"
    assert {(s.role, s.design, s.chance) for s in found} == {("fit", "bernoulli(0.3)", 0.3)}


@pytest.mark.parametrize("design", [designs.fixed, designs.bernoulli])
@pytest.mark.parametrize("seeds", [(0,), (1000, 1001, 1002), (0, 10), (9, 0, 4), range(5, 8)])
def test_random_subsets_share_all_seeds_or_none(design, seeds):
    found = design(12, 40, seeds=seeds, common=False)
    assert found[0].seeds == tuple(seeds)
    assert no_seed_twice(found)
    assert {s.seeds for s in design(12, 40, seeds=seeds, common=True)} == {tuple(seeds)}


def test_subsets_to_judge_on_share_their_seeds_and_those_to_fit_on_do_not():
    assert {s.seeds for s in designs.fixed(12, 5, seeds=(3, 4))} == {(3, 4)}
    assert no_seed_twice(designs.bernoulli(12, 5, seeds=(3, 4)))


def test_the_seeds_of_the_shipped_recipes_are_apart_and_stay():
    """Their models are trained; another numbering would orphan them."""
    found = designs.fixed(512, 64, seeds=(1000, 1001, 1002), common=False)
    assert [s.seeds for s in found[:2]] == [(1000, 1001, 1002), (1003, 1004, 1005)]
    assert found[-1].seeds == (1189, 1190, 1191)


# ------------------------------------------------------------------------------------------------------ systematic


def test_full():
    (only,) = designs.full(5, seeds=(3, 1), role="test")
    assert only.mask.all()
    assert len(only.mask) == 5
    assert (only.role, only.design, only.seeds, only.chance) == ("test", "full", (3, 1), None)


def test_leave_out_one_image_or_one_group():
    found = designs.leave_out(6, seeds=(4, 5))
    assert [left_out(s) for s in found] == [[i] for i in range(6)]
    assert {s.seeds for s in found} == {(4, 5)}, "only the images differ"
    assert [s.design for s in found] == [f"leave_out({i})" for i in range(6)]
    players = groups(["b", "a", "b", "c", "a", "b"])
    assert players == {"a": [1, 4], "b": [0, 2, 5], "c": [3]}
    found = designs.leave_out(6, list(players.values()))
    assert [left_out(s) for s in found] == [[1, 4], [0, 2, 5], [3]]


def test_groups_by_any_value_in_a_fixed_order():
    assert list(groups([2, 10, None, "x"])) == ["10", "2", "unknown", "x"]
    assert groups(["a", "", float("nan"), None, " "]) == {"a": [0], "unknown": [1, 2, 3, 4]}, "nobody is dropped"
    assert groups([]) == {}


def test_every_coalition_is_there_once():
    players, base = {"ann": [1, 2], "ben": [4], "cat": [0, 6]}, [3]
    found = designs.coalitions(8, players, base, seeds=(4, 5))
    assert len({subset.mask.tobytes() for subset in found}) == len(found) == 2**3
    for subset in found:
        inside = subset.design.removeprefix("coalition(").removesuffix(")").split(" + ")
        rows = [row for name in inside if name for row in players[name]]
        assert np.flatnonzero(subset.mask).tolist() == sorted([*base, *rows])
        assert (subset.role, subset.seeds, subset.chance) == ("fit", (4, 5), None)
        assert {5, 7} <= {*left_out(subset)}, "nobody's rows are in no coalition"


@pytest.mark.parametrize(
    ("players", "base"),
    [({}, [0]), ({"ann": [1], "ben": [1]}, [0]), ({"ann": [0]}, [0]),
     ({str(i): [i] for i in range(13)}, [13])],
)  # fmt: skip
def test_coalitions_that_are_no_game(players, base):
    with refuses(where="coalitions"):
        designs.coalitions(20, players, base)


def test_chains_grow_by_one_player_at_a_time():
    players = [[0, 1], [2], [3, 4, 5], [6]]
    found = designs.chains(8, 5, players, seeds=(1, 2), seed=7)
    assert len(found) == 5 * 4
    orders = set()
    for chain in range(5):
        before, order = np.zeros(8, dtype=bool), []
        for position, subset in enumerate(found[4 * chain : 4 * chain + 4]):
            number, at, player = map(int, subset.design.removeprefix("chain(").removesuffix(")").split(","))
            assert (number, at) == (chain, position)
            assert (before & ~subset.mask).sum() == 0, "nested"
            assert np.flatnonzero(subset.mask & ~before).tolist() == players[player]
            before = subset.mask
            order.append(player)
            assert subset.seeds == (1, 2)
        assert sorted(order) == [0, 1, 2, 3]
        assert before.tolist() == [True] * 7 + [False], "an image of no player stays out"
        orders.add(tuple(order))
    assert len(orders) > 1
    again = designs.chains(8, 5, players, seeds=(1, 2), seed=7)
    assert np.array_equal(masks(found), masks(again))


def test_removal_of_equal_sets_is_trained_once():
    found = designs.removal(6, {"d_trak/0": [1, 2], "pixels/0": [2, 1], "random/0": [5]}, seeds=(8, 9))
    assert [left_out(s) for s in found] == [[1, 2], [5]]
    assert [s.design for s in found] == ["removal(d_trak/0 = pixels/0)", "removal(random/0)"]
    assert {s.seeds for s in found} == {(8, 9)}
    assert {s.role for s in found} == {"test"}


def test_addition_to_a_base():
    found = designs.addition(6, [0, 1], {"a": [3], "b": [1, 5], "nothing": []})
    assert [np.flatnonzero(s.mask).tolist() for s in found] == [[0, 1, 3], [0, 1, 5], [0, 1]]
    assert [s.design for s in found] == ["addition(a)", "addition(b)", "addition(nothing)"]


def test_masks_are_not_shared():
    every = [
        *designs.fixed(8, 3),
        *designs.chains(8, 2, [[0], [1]]),
        *designs.leave_out(8),
        *designs.addition(8, [0], {"a": [1], "b": [1]}),
    ]
    assert not any(np.shares_memory(a.mask, b.mask) and a.mask is b.mask for a, b in combinations(every, 2))
    before = masks(every[3:])
    every[3].mask[:] = True
    assert np.array_equal(masks(every[4:]), before[1:])


# -------------------------------------------------------------------------------------------------------------- errors

DESIGNS = {
    "full": lambda **k: designs.full(6, **k),
    "fixed": lambda **k: designs.fixed(6, 2, **k),
    "bernoulli": lambda **k: designs.bernoulli(6, 2, **k),
    "leave_out": lambda **k: designs.leave_out(6, **k),
    "chains": lambda **k: designs.chains(6, 1, [[0], [1]], **k),
    "coalitions": lambda **k: designs.coalitions(6, {"a": [0]}, [1], **k),
    "removal": lambda **k: designs.removal(6, {"a": [0]}, **k),
    "addition": lambda **k: designs.addition(6, [0], {"a": [1]}, **k),
}


@pytest.mark.parametrize("name", DESIGNS)
def test_roles_and_seeds_are_checked_by_every_design(name):
    design = DESIGNS[name]
    with refuses("role 'train' is not one of fit, tune, test, other"):
        design(role="train")
    for seeds in ((), (3, 3)):
        with refuses("give at least one, none of them twice"):
            design(seeds=seeds)
    for role in designs.ROLES:
        assert {subset.role for subset in design(role=role)} == {role}


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99, 1.0, 2.0, -0.5])
def test_sizes_that_leave_nothing_in_or_out_are_refused(fraction):
    with refuses("fixed design: 3 subsets of ... out of 10 images; the size must be 1 to 9"):
        designs.fixed(10, 3, fraction)


def test_other_settings_that_make_no_design():
    with refuses("0 subsets"):
        designs.fixed(10, 0)
    for chance in (0, 1, -0.1):
        with refuses("it must lie between 0 and 1"):
            designs.bernoulli(10, 3, chance)
    for rows in ([], range(4)):
        with refuses(f"leaving out {len(rows)} of 4 images: some must go and some must stay"):
            designs.removal(4, {"x": rows})
    with refuses("leaving out 4 of 4"):
        designs.leave_out(4, [[0, 1, 2, 3]])


@pytest.mark.parametrize("row", [-1, 6, 100])
def test_rows_that_do_not_exist_are_refused(row):
    """numpy would take -1 for the last image."""
    for design in (
        lambda: designs.removal(6, {"a": [0, row]}),
        lambda: designs.leave_out(6, [[row]]),
        lambda: designs.addition(6, [0], {"a": [row]}),
        lambda: designs.addition(6, [row], {"a": [0]}),
        lambda: designs.chains(6, 1, [[0], [row]]),
    ):
        with refuses(f"row {row} of 6 images", accepted="0 to 5"):
            design()
