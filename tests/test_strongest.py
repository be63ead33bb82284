"""`top`: what is kept of each query is what all scores say, in blocks of any size, and nothing takes an image that was not
kept for one with another score; features in half the room."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import whence
from agreement import close
from errors import refuses
from test_cli import World, refused, succeeds, world  # noqa: F401
from test_contract import CASES, SMALL, WORLDS, anywhere, method_of
from whence.evaluation.contrast import contrasted
from whence.features.rows import rows
from whence.methods import METHODS
from whence.methods.inner_product import FeatureMethod
from whence.methods.strongest import BARS, Bars, Collected, End, Strongest, first_of
from whence.report import answer, statistics
from whence.scores import strongest
from whence.storage.arrays import Held, Store
from whence.storage.scores import load_scores, save_scores
from whence.types import Engine, Scores, Task
from worlds import linear_world

K = 2
WHOLE = {  # whose scores are computed for all images, and then reduced: an image is scored beside the rows of the others
    *("last_layer_ridge", "nda", "block_trak", "weighted_d_trak", "das_function", "retrac", "datainf"),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Task]:
    root = tmp_path_factory.mktemp("all")
    return {name: make(root / name) for name, make in WORLDS.items()}


def kept_of(scores: Scores, k: int) -> list[int]:
    """The columns that are among the first or last k of any query, by sorting all of them."""
    signs = (1, -1) if scores.signed else (1,)
    found = {int(i) for row in scores.values for sign in signs for i in strongest(sign * row, k)}
    return sorted(found)


def same_errors(found: Scores, whole: Scores, columns: list[int], tolerance: float) -> None:
    """Where all images stand for all."""
    assert found.stderr_of == whole.stderr_of
    if whole.stderr is None:
        assert found.stderr is None
        return
    assert found.stderr is not None
    close(found.stderr, whole.stderr[:, columns], 100 * tolerance)
    if not whole.stderr_of.startswith("nothing"):
        close(found.reliability, whole.reliability, 100 * tolerance)


def agrees(found: Scores, whole: Scores, k: int, tolerance: float) -> None:
    columns = kept_of(whole, k)
    assert list(found.train_ids) == [whole.train_ids[i] for i in columns]
    close(found.values, whole.values[:, columns], tolerance)
    assert found.whole is not None
    values, rest = whole.values.double(), found.whole
    assert rest.count == values.shape[1]
    close(rest.mean, values.mean(1), tolerance)
    close(rest.variance, values.var(1, correction=0), 4 * tolerance)
    same_errors(found, whole, columns, tolerance)
    close(rest.positive, values.clamp(min=0).sum(1), tolerance)
    assert rest.bars.sum(1).tolist() == [rest.count] * len(values)
    assert bool((rest.edges[:, 0] <= values.amin(1)).all())
    assert bool((values.amax(1) <= rest.edges[:, -1]).all())


@pytest.mark.parametrize(("world", "name"), anywhere(CASES))
def test_the_first_and_last_of_each_query_are_those_of_all_scores(tasks, world, name, monkeypatch):  # noqa: F811
    monkeypatch.setitem(SMALL["linear"], "dim", 8)  # fewer columns than images, as where there are many
    task = replace(tasks[world], errors=True)
    method = method_of(world, name, task)
    if isinstance(method, FeatureMethod):
        task = replace(task, engine=replace(task.engine, budget=1))  # an image a shard
    whole, found = method(task), Strongest(K).score(task, method)
    agrees(found, whole, K, 1e-4 if world == "unet" else 1e-9)
    assert found.some_only
    assert found.kept == (K if len(task.train) > K else None)
    assert found.recipe["top"] == K


def test_methods_that_are_computed_as_a_whole_are_those_that_say_so(tasks, monkeypatch):
    monkeypatch.setitem(SMALL["linear"], "dim", 8)
    asked = []
    whole = FeatureMethod.__call__
    monkeypatch.setattr(FeatureMethod, "__call__", lambda self, task: asked.append(self.name) or whole(self, task))
    names = set()
    for case in anywhere(CASES):
        world, name = case.values  # noqa: F811
        method = method_of(world, name, tasks[world])
        if isinstance(method, FeatureMethod):
            names.add(name)
            Strongest(K).score(tasks[world], method)
    assert {name for name in names if name in asked} <= WHOLE
    assert len(names - set(asked)) > 15


@pytest.fixture
def task(tmp_path) -> Task:
    made = linear_world(n=40, m=3, dim=4).task(tmp_path)
    return replace(made, engine=replace(made.engine, budget=1), train=with_owners(made.train))


class with_owners:
    """The images, of three owners."""

    def __init__(self, images):
        self.images = images

    def __getattr__(self, name):
        return getattr(self.images, name)

    def __len__(self):
        return len(self.images)

    @property
    def meta(self):
        return {"creator": [("anna", "ben", "zoe")[i % 3] for i in range(len(self.images))]}


@pytest.mark.parametrize("square", [False, True], ids=["signed", "squared"])
@pytest.mark.parametrize("shared", [False, True], ids=["own draws", "shared draws"])
def test_errors_are_those_of_all_images_or_of_some_that_stand_for_all(tmp_path, monkeypatch, square, shared):
    task = replace(linear_world(n=200, m=3, dim=4).task(tmp_path), errors=True)
    method = whence.das(draws=whence.uniform(6, shared=shared), dim=16, residual=4, square=square)
    whole, found = method(task), Strongest(5).score(task, method)
    columns = kept_of(whole, 5)
    same_errors(found, whole, columns, 1e-9)
    monkeypatch.setattr("whence.methods.strongest.SAMPLED", 100)
    ratio = Strongest(5).score(task, method).stderr / whole.stderr[:, columns]
    assert bool((ratio != 1).any())
    assert 0.7 < float(ratio.min()) <= float(ratio.max()) < 1.4


def test_sums_by_group_are_those_of_all_images(task):
    method = method_of("linear", "d_trak", task)
    whole, found = method(task), Strongest(3).score(task, method)
    names, images, sums = found.whole.groups["creator"]
    by = whole.group_by("creator")
    assert list(names) == list(by.train_ids)
    close(sums, by.values, 1e-9)
    assert images.tolist() == [14, 13, 13]


def test_they_are_the_same_in_blocks_of_any_size_and_after_a_file(task, tmp_path):
    method = method_of("linear", "relatif_loss", task)
    found = Strongest(3).score(task, method)
    other = Strongest(3).score(replace(task, engine=Engine(), root=tmp_path / "other"), method)
    assert list(found.train_ids) == list(other.train_ids)
    close(found.values, other.values, 1e-6)
    save_scores(tmp_path / "kept", found)
    again = load_scores(tmp_path / "kept")
    assert again.kept == 3
    for name in ("mean", "variance", "positive", "above", "edges", "bars"):
        assert torch.equal(getattr(again.whole, name), getattr(found.whole, name))
    assert torch.equal(again.whole.groups["creator"][2], found.whole.groups["creator"][2])


def test_nothing_is_asked_of_what_was_not_kept(task):
    found = Strongest(3).score(task, method_of("linear", "d_trak", task))
    assert len(found.top(0, 3)) == len(found.bottom(0, 3)) == 3
    assert len(found.columns()["image"]) == 3 * 3
    for ask in (lambda: found.top(0, 4), lambda: found.bottom(0), lambda: found.columns(4)):
        with refuses("of each picture the first and the last 3 images were kept", "scores", "up to 3"):
            ask()
    with refuses("ranks need the scores of all images", "scores", "without top"):
        found.ranks_between(0, [0])
    one, other = found.query_ids[:2]
    asked = (
        lambda: found.group_by("creator"),
        lambda: found.predict([1.0] * len(found.train_ids)),
        lambda: found.plot(0),
        lambda: contrasted(found, one, other),
    )
    for ask in asked:
        with refuses(
            "of the training images have a score, and the others have none", "", "without --candidates and --top"
        ):
            ask()


def test_a_score_that_is_no_number_is_refused_by_name():
    collected = Collected(1, 2, True, [], ["a", "b", "c"])
    with refuses("1 scores are not finite; the first is image 'b' for query 1"):
        collected.add(slice(0, 3), torch.tensor([[0.0, 1, 2], [3, torch.inf, 5]], dtype=torch.float64))


def test_equal_scores_keep_the_order_of_the_images_across_blocks():
    values = torch.tensor([[1.0, 3, 3, 0, 3, 2, 3, 0]], dtype=torch.float64)
    for size in (1, 2, 3, 8):
        first, last = End(3, 1), End(3, -1)
        for start in range(0, 8, size):
            span = slice(start, min(start + size, 8))
            first.add(span, values[:, span])
            last.add(span, values[:, span])
        assert first.images.tolist() == [[1, 2, 4]]
        assert last.images.tolist() == [[3, 7, 0]]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_histogram_counts_what_numpy_counts_however_its_range_grew(scale):
    values = scale * torch.randn(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 3
    values, bars = values[:, values.abs().sum(0).argsort()], Bars()  # each block further out than the one before
    for some in values.split(100, 1):
        bars.add(some)
    assert bars.counts.sum(1).tolist() == [4000, 4000]
    for row, edges, counts in zip(values.numpy(), bars.edges().numpy(), bars.counts.numpy(), strict=True):
        expected = np.histogram(row, bins=edges)[0]
        assert np.abs(expected - counts).sum() <= 4  # a number on an edge, by rounding
        assert (row.max() - row.min()) / (edges[-1] - edges[0]) > 0.2
    constant = Bars()
    constant.add(torch.zeros(1, 5))  # no range at all, in float32
    assert constant.counts.sum() == 5
    assert constant.counts.shape == (1, BARS)


@pytest.mark.parametrize("count", [0, -1, True, 2.5, "3"])
def test_a_count_is_a_number_from_one(count):
    with refuses(f"top is {count!r}", "", "a whole number of images per query, from 1"):
        Strongest(count)


def test_more_than_memory_is_refused_before_anything_is_computed():
    Strongest(100).check(1000, 5000)  # of few images all may be kept
    with refuses("takes up to 149.0 GiB", "top", "up to 1, or fewer pictures at once"):
        Strongest(100).check(10_000, 10**7)


def test_rows_in_memory_are_read_as_those_on_disk(tmp_path):
    values = torch.randn(10, 6)
    array = Store(tmp_path).array({"part": "x"}, (10, 6), torch.float32, 4)
    for shard in array.shards:
        array.write(shard, values[shard])
    factors = torch.rand(6, dtype=torch.float64)
    for change in (
        lambda a: a,
        lambda a: a.only(slice(1, 4)),
        lambda a: a.times(factors),
        lambda a: a.plus(0.5, a, 2.0),
    ):
        on_disk = change(array)
        for span in (slice(0, 4), slice(3, 9), slice(8, 10), slice(0, 10)):
            assert torch.equal(on_disk.block(span).all(), on_disk.all()[span])
        held = change(Held.of(values))
        assert torch.equal(held.all(), on_disk.all())
        assert torch.equal(held.take([7, 0]), on_disk.take([7, 0]))


# ------------------------------------------------------------------------------------------------------ number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_the_room_score_nearly_alike_and_say_so(tmp_path, dtype):
    made = linear_world(n=40, m=3, dim=4).task(tmp_path)
    method = method_of("linear", "gradient_dot", made)
    narrow = replace(made, root=tmp_path / "narrow", engine=replace(made.engine, feature_dtype=dtype))
    found, exact = method(narrow), method(made)
    close(found.values, exact.values, 0.01)
    assert not torch.equal(found.values, exact.values)
    assert found.recipe["feature_dtype"] == str(dtype)
    assert "feature_dtype" not in exact.recipe
    kept = {array.dtype for array in Store(narrow.root).arrays() if array.shape[0] == 40 and array.shape[1] > 1}
    assert kept == {dtype}


def test_rows_that_a_number_format_cannot_hold_are_refused_by_name(tmp_path):
    made = linear_world(n=6, m=1, dim=4).task(tmp_path)
    small = replace(made, train=scaled(made.train, 1e6), engine=replace(made.engine, feature_dtype=torch.float16))
    method = method_of("linear", "gradient_dot", small)
    with refuses(f"such as {made.train.ids[0]!r}, do not fit in torch.float16", "feature_dtype", "bfloat16 or float32"):
        rows(method.train, small, small.trajectory[-1], small.train, "x")
    bfloat = replace(small, engine=replace(small.engine, feature_dtype=torch.bfloat16))
    assert rows(method.train, bfloat, bfloat.trajectory[-1], bfloat.train, "x").dtype == torch.bfloat16


class scaled(with_owners):
    """The images, each number times a factor."""

    def __init__(self, images, factor):
        super().__init__(images)
        self.factor = factor

    def batch(self, numbers):
        found = self.images.batch(numbers)
        return replace(found, x0=found.x0 * self.factor)


# ------------------------------------------------------------------------------------------------------- by the command


def test_the_command_keeps_the_strongest_and_its_report_says_of_how_many(world: World, tmp_path):  # noqa: F811
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    succeeds(*world.attribute(whole, "--method", "trak"))
    out = succeeds(*world.attribute(kept, "--method", "trak", "--top", 2, "--index_dir", whole))
    all_scores, found = load_scores(whole / "scores" / "trak"), load_scores(kept / "scores" / "trak")
    for row in range(len(all_scores.query_ids)):
        assert [name for name, _ in found.top(row, 2)] == [name for name, _ in all_scores.top(row, 2)]
    assert "report" in str(out)
    assert str(found.whole.count) in (kept / "report.html").read_text()
    refused(*world.attribute(tmp_path / "both", "--top", 2, "--candidates", 3), says="exclude each other")


def test_python_takes_top_too(tmp_path):
    made = linear_world(n=14, m=3, dim=4)
    task = made.task(tmp_path)
    module = task.trajectory[-1].load()
    call = ((module, task.forward), task.train, task.queries, "trak", tmp_path / "run")
    found = whence.attribute(*call, top=2, dim=24)
    assert found.kept == 2
    with refuses("top and candidates exclude each other", "attribute", "one of them"):
        whence.attribute(*call, top=2, candidates=3)


def test_the_list_of_those_computed_as_a_whole_is_of_methods_that_are_there():
    assert set(METHODS) > WHOLE


def test_the_page_says_of_the_kept_what_it_says_of_all(task, tmp_path):
    method = method_of("linear", "d_trak", task)
    whole, found = method(task), Strongest(8).score(task, method)
    groups = statistics.groups_of(task.train.meta, len(task.train))
    for query in range(len(task.queries)):
        rows = [list(task.train.ids).index(name) for name in found.train_ids]
        a = statistics.read_query(whole, query, 5, groups, range(len(task.train)))
        b = statistics.read_query(found, query, 5, groups, rows)
        assert [row for row, _ in a.top] == [row for row, _ in b.top]
        assert [row for row, _ in a.bottom] == [row for row, _ in b.bottom]
        assert a.verdict == b.verdict
        assert a.sums == b.sums
        assert answer.standing_out(whole.values[query].numpy(), True, statistics.spread_of(whole, query)) == [
            rows[i] for i in answer.standing_out(found.values[query].numpy(), True, statistics.spread_of(found, query))
        ]
    sums = [{"x": replace(scores, scale="removal")} for scores in (whole, found)]
    assert statistics.group_table(groups[0], sums[0], {}) == statistics.group_table(groups[0], sums[1], {})
    few = statistics.read_query(Strongest(2).score(task, method), 0, 5, groups, range(len(task.train)))
    assert len(few.top) <= 2, "images of other queries among the first"
    renamed = statistics.groups_of({"creator": ["x", "y"] * 20}, 40)[0]
    assert not renamed.summed(found), "sums of other groups"


@pytest.mark.parametrize("k", [1, 3, 20, 40])
def test_all_rows_at_once_are_each_row_by_itself(k):
    values = torch.randn(6, 30, generator=torch.Generator().manual_seed(0)).double().mul(2).round()  # many are equal
    expected = torch.stack([strongest(row, k) for row in values])
    assert torch.equal(first_of(values, k), expected)
