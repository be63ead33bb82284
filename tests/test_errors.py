"""Standard errors: what they are of, that they are as large as the scatter between runs, and that asking for them changes no
score and takes no further pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import whence
from agreement import close
from errors import refuses
from test_contract import ALONE, CASES, WORLDS, assert_same, engine_of, method_of, runs_in
from whence.curvature.gram import Gram
from whence.curvature.solve import NoPreconditioner
from whence.data.images import subset
from whence.diffusion.draws import Draws, Fixed, Grid, Linspace, OneDraw, Repeated, stratified, uniform
from whence.diffusion.forward import Classifier
from whence.diffusion.halves import Half, can_be_halved
from whence.diffusion.outputs import loss, squared_norm
from whence.features.parts import Gradient, part
from whence.features.projections import SJLT, Gaussian, Identity, Rademacher
from whence.features.rows import rows
from whence.methods import METHODS, build
from whence.methods.errors import (
    DRAWS,
    FEWEST,
    MASKS,
    NARROW,
    NOTHING,
    OF_QUERIES,
    PROJECTED,
    PROJECTION,
    REDRAWN,
    SHARED,
    SHARED_NARROW,
    SHARED_PROJECTED,
    column_factors,
    crossed,
    moved_at_once,
    of_draws,
    of_square,
    pooled,
)
from whence.methods.inner_product import InnerProduct
from whence.methods.metagradient import AveragedMetagradient
from whence.report.words import ERRORS
from whence.scores import surely
from whence.storage.arrays import Store
from whence.types import Batch, Draw, Scores, Task
from worlds import linear_world, tensors

# ------------------------------------------------------------------------------------------------------------- the halves


@pytest.mark.parametrize(
    ("draws", "first"),
    [
        (uniform(10), [0, 3, 4, 7, 8]),
        (uniform(3), [0]),
        (stratified(8), [0, 1, 6, 7]),  # antithetic pairs
        (Draws(Repeated(Linspace(3), 2), unit=True, group=2), [0, 1]),  # one norm for two draws
        (Draws(Repeated(Linspace(3), 2), group=2), [0, 3, 4]),  # no norm
        (
            Draws(Repeated(Grid(4), 3), unit=True, antithetic=True, group=3),
            [0, 1, 2, 3, 4, 5],
        ),  # six that belong together
    ],
)
def test_halves_hold_each_draw_once_and_leave_together_what_belongs_together(draws, first):
    keys = torch.tensor([5, 9])
    whole, halves = draws(keys, (3,), 100), (Half(draws, 0), Half(draws, 1))
    assert halves[0].numbers == first
    assert sorted([*halves[0].numbers, *halves[1].numbers]) == list(range(draws.count))
    for half in halves:
        found = half(keys, (3,), 100)
        assert torch.equal(found.t, whole.t[:, half.numbers])
        assert torch.equal(found.noise, whole.noise[:, half.numbers])
        assert (half.count, half.unit, half.group) == (len(half.numbers), draws.unit, draws.group)


@pytest.mark.parametrize(
    "draws",
    [
        uniform(1),
        stratified(2),
        OneDraw(uniform(8), 0),
        Draws(Repeated(Grid(1), 4), unit=True, group=4),
    ],
)
def test_what_has_no_two_halves(draws):
    assert not can_be_halved(draws)
    if isinstance(draws, Draws):
        with refuses("half 0 of"):
            Half(draws, 0)


def test_two_arrays_are_read_as_one_whatever_their_shards(tmp_path):
    values = [torch.arange(14.0).reshape(7, 2) * factor for factor in (1, 10)]
    arrays = [Store(tmp_path).array({"n": n}, (7, 2), torch.float32, size) for n, size in enumerate((3, 2))]
    for array, each in zip(arrays, values, strict=True):
        for cut in array.missing():
            array.write(cut, each[cut])
    mixed, expected = arrays[0].plus(2.0, arrays[1], -0.5), 2.0 * values[0].double() - 0.5 * values[1].double()
    assert torch.equal(mixed.all(), expected)
    assert torch.equal(mixed.take([6, 0, 3]), expected[[6, 0, 3]])
    assert torch.equal(mixed.only(slice(1, 2)).all(), expected[:, 1:])
    factors = torch.tensor([3.0, 0.5]).double()
    assert torch.equal(mixed.times(factors).all(), expected * factors)
    assert torch.equal(mixed.times(factors).only(slice(1, 2)).take([6, 2]), (expected * factors)[[6, 2], 1:])
    assert torch.equal(arrays[0].plus(1.0, arrays[0], 1.0).read(slice(3, 6)), 2 * values[0][3:6].double())


# ------------------------------------------------------------------------------------------------------------ the squares


def scattered(f: Callable[[Tensor, Tensor], Tensor], runs: int = 60_000, noise: float = 1.5) -> tuple[float, Tensor]:
    """The variance of f(psi, phi) over runs, and R^2, C^2, I^2 of each [3, runs, 1]: four draws of two numbers each side."""
    g = torch.Generator().manual_seed(0)
    psi, phi = (
        mean + noise * torch.randn(runs, 4, 2, generator=g, dtype=torch.float64)
        for mean in (torch.tensor([1.0, 0.3]), torch.tensor([-0.5, 1.2]))
    )
    q, i = ((each[:, [0, 3]].mean(1), each[:, [1, 2]].mean(1)) for each in (psi, phi))

    def at(halves: tuple[Tensor, Tensor], step: float) -> Tensor:
        return (halves[0] + halves[1]) / 2 + step * (halves[0] - halves[1]) / 2

    signs = ((0.2, 0.2), (-0.2, 0.2), (0.2, -0.2), (-0.2, -0.2))
    moved = torch.stack([f(at(q, a), at(i, b)) for a, b in signs])[..., None]
    return float(f(at(q, 0), at(i, 0)).var()), crossed(moved, 0.2)


def test_the_error_of_a_product_is_counted_once():
    """R^2 + C^2 is a third too large here, and the difference of the halves' own scores as much."""
    variance, (by_query, by_image, by_both) = scattered(lambda q, i: (q * i).sum(1))
    assert float((by_query + by_image - by_both).mean()) == pytest.approx(variance, rel=0.02)
    assert float((by_query + by_image).mean()) > 1.25 * variance


@pytest.mark.parametrize(("noise", "at_most"), [(0.2, 1.05), (1.5, 1.6)])
def test_the_error_of_draws_that_both_sides_share_is_that_of_both_at_once(noise, at_most):
    """Opposite signs of what both sides see add up to nothing where they are taken apart, and to everything here."""
    g = torch.Generator().manual_seed(0)
    seen = noise * torch.randn(60_000, 4, 2, generator=g, dtype=torch.float64)
    q, i = ((side + each) for side, each in ((torch.tensor([1.0, 0.3]), seen), (torch.tensor([-0.8, 1.2]), 0.7 * seen)))
    halves = [(each[:, [0, 3]].mean(1), each[:, [1, 2]].mean(1)) for each in (q, i)]

    def product(a: float, b: float) -> Tensor:
        first, second = ((x + y) / 2 + step * (x - y) / 2 for (x, y), step in zip(halves, (a, b), strict=True))
        return (first * second).sum(1)

    variance = float(product(0, 0).var())
    moved = torch.stack([product(a, b) for a, b in ((0.2, 0.2), (-0.2, 0.2), (0.2, -0.2), (-0.2, -0.2))])[..., None]
    assert 0.98 * variance < float(moved_at_once(moved).square().mean()) < at_most * variance
    by_query, by_image, by_both = crossed(moved)
    assert not 0.9 * variance < float((by_query + by_image - by_both).mean()) < 1.1 * variance


def test_what_is_divided_by_norms_is_divided_by_those_of_all_draws():
    variance, (by_query, by_image, by_both) = scattered(torch.cosine_similarity, noise=0.7)
    assert float((by_query + by_image - by_both).mean()) == pytest.approx(variance, rel=0.25)


def test_the_error_of_a_square():
    g = torch.Generator().manual_seed(0)
    for mean in (0.0, 0.5, 3.0):
        b = mean + 0.7 * torch.randn(1, 200_000, generator=g, dtype=torch.float64)
        found = of_square(b, torch.full_like(b, 0.49))
        assert float(found.mean()) == pytest.approx(float(b.square().var()), rel=0.02)
        assert (found > 0).all()


def chi(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).square()


def test_pooling_finds_errors_that_grow_with_the_score():
    s = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = torch.tensor([[1.0], [9.0]]) + torch.tensor([[0.0], [4.0]]) * s.square()
    found = pooled(truth * chi(2, 4000), s)
    torch.testing.assert_close(found, truth, rtol=0.2, atol=0.1)
    close(found.mean(1), (truth * chi(2, 4000)).mean(1), 1e-9)


def test_pooling_of_few_images_is_the_mean_and_nothing_is_below_zero():
    s = torch.linspace(-1, 1, FEWEST - 1, dtype=torch.float64)[None]
    squares = chi(1, FEWEST - 1)
    assert torch.equal(pooled(squares, s), squares.mean().expand(1, FEWEST - 1))
    below = -torch.ones(1, 50, dtype=torch.float64)
    assert torch.equal(pooled(below, torch.ones(1, 50)), torch.zeros(1, 50, dtype=torch.float64))
    assert torch.equal(pooled(below, torch.ones(1, 50), torch.tensor([2.0])), torch.full((1, 50), 2.0).double())
    wild = chi(1, 200) - 0.9  # differences of squares: most are below zero
    assert (pooled(wild, torch.randn(1, 200, generator=torch.Generator().manual_seed(0))) > 0).all()


def test_no_query_looks_at_another():
    s, squares = chi(3, 80, 1), chi(3, 80) * torch.tensor([[1.0], [100.0], [0.01]])
    together = of_draws(torch.stack([squares, 2 * squares, 0.5 * squares]), s)
    alone = of_draws(torch.stack([squares, 2 * squares, 0.5 * squares])[:, 1:2], s[1:2])
    assert torch.equal(together[1:2], alone)


# -------------------------------------------------------------------------------------------- the contract of every method


@dataclass(frozen=True)
class Runs:
    """Scores with errors of each method, one folder per world and variant."""

    root: Path
    tasks: dict[str, Task]
    kept: dict[tuple[str, str], Scores]

    def score(self, world: str, name: str, variant: str = "", **changes: Any) -> Scores:
        if not variant and (world, name) in self.kept:
            return self.kept[world, name]
        task = replace(self.tasks[world], root=self.root / f"{world}{variant}", errors=True, **changes)
        found = method_of(world, name, task)(task)
        return found if variant else self.kept.setdefault((world, name), found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    root = tmp_path_factory.mktemp("errors")
    return Runs(root, {world: WORLDS[world](root / world) for world in ("linear", "classifier", "trained", "unet")}, {})


UNET = ("clip_cosine", "trak", "ek_fac", "representation_dot")  # as a network of diffusers, the others as vectors alone
EVERY = [case for case in CASES if case.values[0] != "unet" or case.values[1] in UNET]
every_method = pytest.mark.parametrize(("world", "name"), EVERY)
some_methods = pytest.mark.parametrize(
    ("world", "name"), [c for c in EVERY if c.values[0] in ("linear", "trained") and c.values[1] != "further_training"]
)


@every_method
def test_every_method_states_its_errors_or_why_there_are_none(runs, world, name):
    scores, task = runs.score(world, name), runs.tasks[world]
    stated = method_of(world, name, task).stated(task)
    assert bool(stated.of) != bool(stated.because)
    if not stated.of:
        assert scores.stderr is None
        assert scores.stderr_of == f"not measured: {stated.because}"
        return
    if scores.stderr is None:
        assert stated.of == PROJECTION
        assert scores.stderr_of.startswith("not measured: its random projection has too few columns")
        return
    assert {stated.of, scores.stderr_of} <= {NOTHING, *ERRORS}, "a page would not know what to say of it"
    narrow = {PROJECTED: NARROW, SHARED_PROJECTED: SHARED_NARROW}
    assert scores.stderr_of in (stated.of, narrow.get(stated.of))
    assert scores.stderr.shape == scores.values.shape
    assert torch.isfinite(scores.stderr).all()
    assert bool((scores.stderr > 0).all()) == (stated.of != NOTHING)
    assert bool((scores.stderr == 0).all()) == (stated.of == NOTHING)


@every_method
def test_asking_for_errors_changes_no_score(runs, world, name):
    task = replace(runs.tasks[world], root=runs.root / f"{world}-without")
    without, found = method_of(world, name, task)(task), runs.score(world, name)
    assert (without.stderr, without.stderr_of) == (None, "")
    apart = float((found.values - without.values).abs().max() / without.values.abs().max())
    assert apart < (1e-5 if world == "unet" else 1e-9)
    assert found.recipe == {**without.recipe, "errors": True}


@some_methods
def test_errors_do_not_depend_on_order_batches_or_other_queries(runs, world, name):
    """And an image that is there twice has the same error twice."""
    task, whole = runs.tasks[world], runs.score(world, name)
    if whole.stderr is None:
        return
    n = len(task.train)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    changes = {"train": subset(task.train, order), "engine": engine_of(world, name, task, ALONE)}
    turned = runs.score(world, name, "-permuted", queries=subset(task.queries, [1]), **changes)
    if whole.stderr_of != NOTHING:
        assert_same(turned.stderr, whole.stderr[1:2, order], world)


def test_what_methods_state_is_what_is_said_of_them():
    """A method that changes from one kind to another has docs to be changed, too."""
    found: dict[str, set[str]] = {}
    task = Task(
        linear_world(n=4, m=1, dim=2).forward,
        (),
        tensors(torch.zeros(1, 2), "x"),
        tensors(torch.zeros(1, 2), "x"),
        Path(),
    )
    for name, entry in METHODS.items():
        if name != "journey_trak":  # which asks how its queries were sampled
            found.setdefault(entry.make().stated(task).of, set()).add(name)
    assert found[NOTHING] == {"pixel_dot", "pixel_cosine", "clip_cosine", "dino_cosine", "abc_cosine"}
    assert found[REDRAWN] == {"averaged_metagradient", "further_training"}
    assert found[OF_QUERIES] == {"diffusion_tracin", "retrac"}
    assert found[""] == {
        *("representation_dot", "representation_cosine", "representation_l2", "nda", "gas_layerwise", "das_function"),
        *("ek_fac_refined", "influence_cg", "influence_lissa", "metagradient"),
        *("abu", "abu_ek_fac", "mucs", "guda", "montrage_style", "distilled"),
    }
    assert found[DRAWS] == {"last_layer_ridge"}
    assert found[SHARED] >= {"ek_fac", "source", "exact_influence", "block_trak"}
    assert found[SHARED_PROJECTED] >= {"gradient_dot", "trak", "d_trak", "influence", "das", "journey_trak"} - {
        "journey_trak"
    }
    assert len(found[SHARED] | found[SHARED_PROJECTED]) == len(METHODS) - 27


def test_a_classifier_has_no_draws_and_what_else_is_drawn_is_no_zero(runs):
    task = runs.tasks["classifier"]
    kinds = {
        ("trak", 24): PROJECTION,
        ("trak", None): NOTHING,
        ("output_dot", None): "its random probes is not measured",
        ("ek_fac", None): "its curvature, which is sampled, is not measured",
        ("exact_influence", None): NOTHING,
    }
    for (name, dim), words in kinds.items():
        method = build(name, Classifier(), {"dim": dim} if name in ("trak", "output_dot") else {})
        stated = method.stated(task)
        assert (stated.of or stated.because).endswith(words), name


# ----------------------------------------------------------------------------------------------------- how large they are


METHODS_OF_DRAWS = {
    "gradient_dot": {"dim": None},
    "gradient_cosine": {"dim": None},
    "influence": {"dim": None, "damping": 0.1},
    "das squared": {"dim": None, "residual": 0, "unit": False, "output": loss, "square": True},
    "last_layer_ridge": {},
}


@pytest.fixture(scope="module")
def large():
    return linear_world(n=40, m=6, dim=6, seed=3)


@pytest.fixture(scope="module")
def seeds(large, tmp_path_factory) -> list[Task]:
    """A folder per seed, so that methods share their features."""
    root = tmp_path_factory.mktemp("seeds")
    return [replace(large.task(root / str(seed)), errors=True) for seed in range(10)]


@pytest.mark.parametrize("name", METHODS_OF_DRAWS)
def test_errors_are_as_large_as_the_scatter_between_seeds(seeds, name):
    """Of 4 noises at each of the 6 timesteps. Halves that hold the error of products twice, or norms of half the draws, are
    out by more than what is allowed here for the chance of ten runs."""
    found = []
    for seed, task in enumerate(seeds if name != "last_layer_ridge" else seeds[:5]):
        settings = {**METHODS_OF_DRAWS[name], "draws": Draws(Repeated(Grid(6), 4), seed=seed)}
        found.append(build(name.partition(" ")[0], task.forward, settings)(task))
    values, stderr = (torch.stack([vars(each)[what] for each in found]) for what in ("values", "stderr"))
    assert 0.75 < float(stderr.square().mean() / values.var(0).mean()) < 1.35
    inside = (values[:-1] - values[1:]).abs() <= 1.96 * 2**0.5 * stderr[1:]
    assert 0.9 < float(inside.double().mean()) < 0.985


@pytest.mark.parametrize("name", ["gradient_dot", "gradient_cosine", "influence", "last_layer_ridge"])
def test_errors_of_shared_draws_are_as_large_as_the_scatter_around_the_mean_of_a_query(seeds, name):
    """All images of a run err with the same noises, so that ten runs say little; and it is the order that is asked for."""
    found = []
    for seed, task in enumerate(seeds if name != "last_layer_ridge" else seeds[:5]):
        settings = {**METHODS_OF_DRAWS[name], "draws": Draws(Repeated(Grid(6), 8), seed=seed, shared=True)}
        found.append(build(name, task.forward, settings)(task))
        assert found[-1].stderr_of == SHARED
    values, stderr = (torch.stack([vars(each)[what] for each in found]) for what in ("values", "stderr"))
    beside = values - values.mean(2, keepdim=True)
    assert 0.4 < float(stderr.square().mean() / beside.var(0).mean()) < 2.5
    stated = float(torch.stack([each.reliability for each in found]).mean())
    met = np.mean(
        [np.corrcoef(a, b)[0, 1] for one, two in itertools.pairwise(values) for a, b in zip(one, two, strict=True)]
    )
    assert stated == pytest.approx(met, abs=0.08)


def test_reliability_is_the_share_of_the_variance_that_is_no_error():
    values = torch.tensor([[1.0, 2, 3, 6], [0, 0, 0, 0], [1, 2, 3, 6], [1, 2, 3, 6]], dtype=torch.float64)
    stderr = torch.ones(4, 4, dtype=torch.float64) * torch.tensor([[0.5], [0], [9], [torch.nan]])
    found = Scores(values, list("abcd"), list("abcd"), {}, stderr=stderr)
    assert found.reliability[0] == pytest.approx(1 - 0.25 / 3.5)
    assert torch.isnan(found.reliability[[1, 3]]).all()
    assert found.reliability[2] == 0
    assert replace(found, stderr=None).reliability is None


@pytest.fixture(scope="module")
def wide():
    """Rows of many parameters, so that there is something to compress."""
    return linear_world(n=60, m=6, dim=16, seed=5)


@pytest.mark.parametrize(("kind", "damping"), [(SJLT, None), (Rademacher, 0.1), (Gaussian, 0.1)])
def test_errors_hold_what_another_projection_would_change(wide, tmp_path, kind, damping):
    """Ten runs that draw timesteps, noise and projection anew scatter by what each of them states. Without its projection,
    or with the noise of the draws counted in both parts, it would be out by more than the chance of ten runs."""
    task, found = replace(wide.task(tmp_path), errors=True), []
    precondition = NoPreconditioner() if damping is None else Gram(damping)
    for seed in range(10):
        features = Gradient(loss, Draws(Repeated(Grid(6), 16), seed=seed), kind(200, seed))
        found.append(InnerProduct(features, precondition=precondition, name="x")(task))
        assert found[-1].stderr_of == PROJECTED
    values, stderr = (torch.stack([vars(each)[what] for each in found]) for what in ("values", "stderr"))
    assert 0.75 < float(stderr.square().mean() / values.var(0).mean()) < 1.4
    inside = (values[:-1] - values[1:]).abs() <= 1.96 * 2**0.5 * stderr[1:]
    assert 0.9 < float(inside.double().mean()) < 0.985


def test_with_hardly_more_columns_than_images_the_part_of_the_projection_is_not_stated(wide, tmp_path):
    task, draws = replace(wide.task(tmp_path), errors=True), Draws(Repeated(Grid(6), 2))
    few, exact = (
        InnerProduct(Gradient(loss, draws, projection), precondition=Gram(0.01), name="x")(task)
        for projection in (SJLT(50), Identity())
    )
    assert (few.stderr_of, exact.stderr_of) == (NARROW, DRAWS)


def test_a_classifier_has_errors_of_its_projection_or_none(runs):
    task = replace(runs.tasks["classifier"], root=runs.root / "columns", errors=True)
    found = build("gradient_dot", Classifier(), {"dim": 24})(task)
    assert found.stderr_of == PROJECTION
    assert (found.stderr > 0).all()
    narrow = build("trak", Classifier(), {"dim": 3, "damping": 1e-6})(task)
    assert (narrow.stderr, narrow.stderr_of.partition(":")[0]) == (None, "not measured")


def test_columns_of_several_outputs_are_weighed_alike():
    several = Gradient((loss, squared_norm), uniform(2), SJLT(3))
    factors = column_factors(several, 6)
    assert torch.equal(factors[:3], factors[3:])
    assert float(factors[:3].square().sum()) == pytest.approx(3.01)


def test_four_times_the_draws_halve_the_errors(large, tmp_path):
    task, found = replace(large.task(tmp_path), errors=True), []
    for noises in (4, 16):
        method = build("gradient_dot", task.forward, {"dim": None, "draws": Draws(Repeated(Grid(6), noises))})
        found.append(float(method(task).stderr.square().mean().sqrt()))
    assert found[0] / found[1] == pytest.approx(2, rel=0.2)


def test_a_query_that_is_a_training_image_errs_with_it(large, tmp_path):
    """It sees the same noise: twice the variance that two images have which err apart."""
    task = large.task(tmp_path)
    queries = tensors(torch.cat([task.queries.x0[:1], task.train.x0[7:8]]), "query")
    method = build("gradient_dot", task.forward, {"dim": None, "draws": uniform(6, shared=False)})
    assert isinstance(method, InnerProduct)
    found = method(replace(task, queries=queries, errors=True))
    # Only the score tells images of a query apart, otherwise.
    s, v = found.values[1].square(), found.stderr[1].square()
    line = torch.linalg.lstsq(
        torch.stack([torch.ones(39), torch.cat([s[:7], s[8:]])], 1).double(), torch.cat([v[:7], v[8:]])[:, None]
    )
    a, b = line.solution.flatten()
    assert float(v[7]) == pytest.approx(2 * float(a + b * s[7]), rel=1e-6)


def test_masks_and_seeds(runs):
    """The errors of groups of trainings, pooled; one pair of masks says nothing of others."""
    task = replace(runs.tasks["trained"], errors=True)
    method = AveragedMetagradient(masks=4, draws=uniform(4))
    estimate, found = method.estimate(task), method(task)
    expected = pooled(torch.from_numpy(estimate.stderr).square(), found.values).sqrt()
    assert torch.equal(found.stderr, expected)
    assert found.stderr_of == REDRAWN
    alike = replace(method, redraw=False)(
        task
    )  # in the same folder: what was measured at other draws is not taken for it
    assert alike.stderr_of == MASKS
    assert not torch.equal(alike.values, found.values)
    pair = AveragedMetagradient(masks=2, draws=uniform(4))(task)
    assert pair.stderr is None
    assert "give masks=4 or more" in pair.stderr_of
    assert AveragedMetagradient(masks=2, seeds=1, pairs=False, draws=uniform(4))(task).stderr is not None


# ---------------------------------------------------------------------------------------------------------------- the switch


@dataclass(frozen=True)
class Counting:
    """A forward that counts the (image, draw) pairs that it is asked about."""

    inner: whence.Denoiser
    seen: list[int]

    timesteps = property(lambda self: self.inner.timesteps)
    alphas_cumprod = property(lambda self: self.inner.alphas_cumprod)
    models, prediction_type = "denoiser", "epsilon"
    density = property(lambda self: self.inner.density)

    def weight(self, t: Tensor) -> Tensor:
        return self.inner.weight(t)

    def __call__(self, call: Any, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        self.seen.append(len(draw.t))
        return self.inner(call, batch, draw)

    def describe(self) -> str:
        return "counting"


def test_errors_take_no_further_pass_and_twice_the_room(large, tmp_path):
    method, found, room = build("trak", large.forward, {"dim": 8, "draws": uniform(8)}), [], []
    for errors in (False, True):
        seen: list[int] = []
        task = replace(large.task(tmp_path / str(errors)), forward=Counting(large.forward, seen), errors=errors)
        method(task)
        found.append(sum(seen) - 2 * len(Store(task.root).arrays()))  # two draws look at the network before each array
        room.append(sum(8 * array.shape[0] * array.shape[1] for array in Store(task.root).arrays()))
    assert found[1] == found[0] == (46 + 1) * 8  # one image before all others, to see how long they take
    assert room[1] == 2 * room[0]


def test_a_grid_of_dampings_has_no_errors_and_leaves_no_halves(large, tmp_path):
    task = replace(large.task(tmp_path), errors=True)
    method = build("influence", task.forward, {"dim": 8, "draws": uniform(4)})
    assert [each.stderr for each in method.grid(task, [0.1, 1.0])] == [None, None]
    whole = rows(part(loss, uniform(4), 8, "trained"), task, task.trajectory[-1], task.train, "x")
    assert not whole.missing()


def test_attribute_measures_errors_unless_told_otherwise(large, tmp_path):
    net, forward = large.task(tmp_path).trajectory[-1].load(), large.forward
    how = {"method": "gradient_dot", "dim": 8, "engine": whence.Engine(dtype=torch.float64)}
    asked = whence.attribute((net, forward), large.train, large.queries, root=tmp_path / "a", **how)
    without = whence.attribute((net, forward), large.train, large.queries, root=tmp_path / "b", errors=False, **how)
    assert asked.stderr_of == SHARED_PROJECTED
    assert (without.stderr, without.stderr_of) == (None, "")
    assert asked.recipe["errors"]
    assert "errors" not in without.recipe
    close(asked.values, without.values, 1e-9)


def test_one_draw_has_no_halves(large, tmp_path):
    task = replace(large.task(tmp_path), errors=True)
    found = build("trak", task.forward, {"dim": 8, "draws": Draws(Fixed(2, 1))})(task)
    assert found.stderr is None
    assert "there are no two halves" in found.stderr_of


def test_what_is_surely_above_is_so_in_99_cases_of_100():
    """Two images of one score and one error: neither is said to be above the other, but in one case of a hundred."""
    g = torch.Generator().manual_seed(0)
    row = torch.randn(1500, generator=g).double()
    above, below = surely(row, torch.ones(1500), torch.arange(1500))
    pairs = 1500 * 1499
    assert float(above.sum() + below.sum()) / pairs == pytest.approx(0.01, rel=0.5)
    assert torch.equal(above, below.T)
    assert not runs_in("linear", "clip_cosine")
