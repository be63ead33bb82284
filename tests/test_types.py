"""Scores, descriptions and fingerprints."""

import math
import pickle
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from errors import refuses
from whence.scores import strongest
from whence.storage.scores import load_scores, save_scores
from whence.types import Batch, Scores, WhenceError, describe, digest

VALUES = torch.tensor([[0.5, 2.0, -1.0, 2.0, 0.0], [1.0, 0.0, 0.0, -3.0, 4.0]])
META = {"creator": ["ann", "bob", "ann", "cid", "bob"], "year": [1, 2, 1, 2, 2]}


def scores(values: torch.Tensor = VALUES) -> Scores:
    return Scores(values, ["p", "q"], list("abcde"), {"method": "test"}, train_meta=META)


def test_top_and_bottom():
    """Equal scores keep the order of the images."""
    assert scores().top(0, 3) == [("b", 2.0), ("d", 2.0), ("a", 0.5)]
    assert scores().bottom(0, 2) == [("c", -1.0), ("e", 0.0)]
    assert scores().top(1, 1) == [("e", 4.0)]
    assert [name for name, _ in scores().bottom(1, 3)] == ["d", "b", "c"]
    assert len(scores().top(0, 100)) == 5


@pytest.mark.parametrize("k", [1, 2, 7, 99, 100, 101, None])
def test_the_strongest_are_the_first_of_a_stable_sort(k):
    """Many equal scores, at the end of the first k, too; -0 is 0. The table and both ends take them from there."""
    values = torch.randint(-4, 5, (30, 100), generator=torch.Generator().manual_seed(0)).double() * 0.5
    values[0], values[1, ::3], values[2, 40:60] = 0.0, -0.0, 7.0
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(torch.stack([strongest(row, k) for row in values]), order)
    found = Scores(values, [f"q{j}" for j in range(30)], [f"i{i}" for i in range(100)], {})
    assert found.columns(k)["image"] == [f"i{i}" for i in order.flatten().tolist()]
    rising = values.sort(dim=1, stable=True).indices[:, :k]
    for query in range(4):
        assert [name for name, _ in found.top(query, k or 100)] == [f"i{i}" for i in order[query].tolist()]
        assert [name for name, _ in found.bottom(query, k or 100)] == [f"i{i}" for i in rising[query].tolist()]


def test_the_table_of_the_first_sorts_few(monkeypatch):
    """Not all of a row, of which a table keeps 100."""
    values = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    sizes, true = [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda row, **how: sizes.append(row.numel()) or true(row, **how))
    Scores(values, ["p", "q"], [f"i{i}" for i in range(5000)], {}).columns(100)
    assert sizes == [100, 100]


def test_sums_of_many_groups_take_one_pass():
    """20,000 creators of 40,000 images: under a second of the processor, where a search of the list for each took six."""
    n, creators = 40_000, 20_000
    owners = [f"c{i * 7919 % creators:05d}" for i in range(n)]
    values = torch.randn(2, n, generator=torch.Generator().manual_seed(0)).double()
    begun = time.process_time()
    grouped = Scores(values, ["p", "q"], [f"i{i}" for i in range(n)], {}, train_meta={"creator": owners}).group_by(
        "creator"
    )
    assert time.process_time() - begun < 1
    assert grouped.train_ids == [f"c{i:05d}" for i in range(creators)]
    assert float(grouped.values[1, 3]) == sum(float(values[1, i]) for i in range(n) if owners[i] == "c00003")


def test_a_query_is_its_row_or_its_name():
    assert scores().top("q", 2) == scores().top(1, 2) == scores().top(-1, 2) == [("e", 4.0), ("a", 1.0)]
    assert scores().bottom("p", 1) == [("c", -1.0)]
    for wrong in (2, -3, "r"):
        with refuses(f"there is no query {wrong!r}", accepted="0 to 1, or a name"):
            scores().top(wrong)


def test_groups_are_sums():
    groups = scores().group_by("creator")
    assert groups.train_ids == ["ann", "bob", "cid"]
    assert torch.equal(groups.values, torch.tensor([[-0.5, 2.0, 2.0], [1.0, 4.0, -3.0]]))
    assert groups.query_ids == ["p", "q"]
    assert torch.equal(groups.values.sum(1), VALUES.sum(1))
    assert scores().group_by("year").train_ids == ["1", "2"]
    with refuses("no column 'artist' in the training images; there is ['creator', 'year']"):
        scores().group_by("artist")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_image_and_query(bad):
    values = VALUES.clone()
    values[1, 2] = bad
    with refuses("1 scores are not finite; the first is image 'c' for query 'q'"):
        scores(values)


def test_scores_must_fit_their_names():
    with refuses("(5, 2), but there are (2, 5)"):
        scores(VALUES.T)


def test_batches_move_but_keys_stay():
    batch = Batch(
        torch.zeros(2, 3), torch.tensor([2**62, 1]), {"class_labels": torch.tensor([1, 2]), "e": torch.ones(2)}
    )
    moved = batch.to("cpu", torch.float64)
    assert moved.x0.dtype == moved.cond["e"].dtype == torch.float64
    assert moved.cond["class_labels"].dtype == moved.keys.dtype == torch.int64
    assert moved.keys.tolist() == [2**62, 1]
    assert len(moved) == 2


@dataclass(frozen=True)
class Setting:
    size: int
    name: str = "x"


def test_descriptions_are_plain_json():
    described = describe(
        {"a": Setting(3), 1: (1, 2.5, None, True), "f": describe, "p": Path("a/b"), "t": torch.ones(2)}
    )
    assert len(described["a"].pop("code")) == 12, "what a class of the user's does is known, too"
    assert described == {
        "a": {"is": "Setting", "size": 3, "name": "x"},
        "1": [1, 2.5, None, True],
        "f": "describe",
        "p": "a/b",
        "t": [1.0, 1.0],
    }
    with refuses("cannot record a object"):
        describe(object())


def test_digests_tell_settings_apart():
    every = [Setting(3), Setting(4), Setting(3, "y"), [3], (3, 4), {"a": 3}, {"b": 3}, 3, 3.5, "3", None, True]
    assert len({digest(thing) for thing in every}) == len(every)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(Setting(3)) == digest(Setting(3))
    assert len(digest(3, 40)) == 40


@pytest.mark.parametrize("where", ["", "model/unet"])
@pytest.mark.parametrize("accepted", ["", "float32", "a; b: c"])
def test_an_error_carries_what_it_says(where, accepted):
    error = WhenceError("dtype float8", where, accepted)
    assert (error.what, error.where, error.accepted) == ("dtype float8", where, accepted)
    assert str(error) == (f"{where}: " if where else "") + "dtype float8" + (
        f"; accepted: {accepted}" if accepted else ""
    )
    said = WhenceError(str(error))  # made from one text: the text stays, and what is accepted is read from it
    assert (str(said), said.accepted) == (str(error), accepted)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.where, copied.accepted) == (str(error), where, accepted)


def some_scores() -> Scores:
    values = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    meta = {"creator": ["<b>anna</b>", "ben", "ben"], "score": [1, 2, 3]}
    return Scores(values, ["q<0>", "q1"], ["a", "b", "c"], {"method": {"name": "trak"}}, train_meta=meta)


def test_scores_as_tables(tmp_path):
    scores = some_scores()
    table = scores.columns(2)
    assert table["query"] == ["q<0>", "q<0>", "q1", "q1"]
    assert table["image"] == ["a", "c", "b", "a"]
    assert table["score"] == [1.0, 0.5, 3.0, 0.0]
    assert table["train_score"] == [1, 3, 2, 1]
    scores.to_csv(tmp_path / "s.csv", 2)
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "query,rank,image,score,creator,train_score"
    assert lines[1] == "q<0>,0,a,1.0,<b>anna</b>,1"
    scores.to_parquet(tmp_path / "s.parquet")
    assert pq.read_table(tmp_path / "s.parquet").to_pydict() == scores.columns()


def test_scores_as_people_see_them():
    scores = some_scores()
    assert repr(scores) == "Scores(trak, 2 queries x 3 training images, scale='rank'; positive = proponent)"
    page = scores._repr_html_()
    assert "q&lt;0&gt;" in page
    assert "q<0>" not in page
    assert "<img" not in page
    assert scores.plot(1).axes[0].get_title() == "q1"


def test_a_frame_needs_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with refuses("pandas"):
        some_scores().to_frame()


def test_the_ranks_an_image_may_have_count_those_surely_before_and_after_it():
    """By hand for one query: 10 +- 1, 9 +- 1, 5 +- .1, 5.2 +- .1, 0 +- 10 (which may stand anywhere)."""
    values, stderr = torch.tensor([[10.0, 9, 5, 5.2, 0]]), torch.tensor([[1, 1, 0.1, 0.1, 10]])
    found = Scores(values, ["q"], list("abcde"), {}, stderr=stderr, stderr_of="draws")
    assert found.ranks_between(0, range(5)) == [(0, 2), (0, 2), (2, 4), (2, 4), (0, 4)]
    table = found.columns(3)
    assert table["image"] == ["a", "b", "d"]
    assert table["stderr"] == pytest.approx([1, 1, 0.1])
    assert (table["first_rank"], table["last_rank"]) == ([0, 0, 2], [2, 2, 4])


def test_without_errors_ranks_are_as_they_are_and_with_unknown_ones_anything_may_be():
    exact = Scores(VALUES, ["p", "q"], list("abcde"), {}, stderr=torch.zeros(2, 5))
    assert exact.ranks_between(0, [1, 0]) == [(0, 1), (2, 2)], "b and d have the same score: either comes first"
    unknown = Scores(VALUES, ["p", "q"], list("abcde"), {}, stderr=torch.full((2, 5), math.nan))
    assert set(unknown.ranks_between(0, range(5))) == {(0, 4)}
    assert "stderr" not in scores().columns()
    with refuses("state no standard errors"):
        scores().ranks_between(0, [0])
    assert (
        "stderr"
        not in Scores(VALUES, ["p", "q"], list("abcde"), {}, train_meta=META, stderr=torch.ones(2, 5))
        .group_by("creator")
        .columns()
    ), "errors of single images say nothing about that of a sum"


@pytest.mark.parametrize("stderr", [torch.ones(5, 2), -torch.ones(2, 5)])
def test_errors_that_are_none_are_refused(stderr):
    with refuses("standard errors"):
        Scores(VALUES, ["p", "q"], list("abcde"), {}, stderr=stderr)


def test_errors_are_kept_with_the_scores(tmp_path):
    stderr = torch.tensor([[1.0, math.nan, 0, 2, 3], [0, 1, 2, 3, 4]])
    save_scores(tmp_path, Scores(VALUES, ["p", "q"], list("abcde"), {}, stderr=stderr, stderr_of="subsets"))
    back = load_scores(tmp_path)
    assert torch.equal(back.stderr.nan_to_num(-1), stderr.nan_to_num(-1))
    assert back.stderr_of == "subsets"
    assert pq.read_table(tmp_path / "top.parquet")["last_rank"].to_pylist()[:2] == [4, 4]
    save_scores(tmp_path, scores())
    assert load_scores(tmp_path).stderr is None
