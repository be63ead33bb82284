"""The report: what it shows is what was scored, it reads only that, and it never leaves the machine."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from errors import refuses
from pages import unscripted
from whence.methods import METHODS
from whence.report import gallery as drawn
from whence.report import page, statistics, words
from whence.report.page import THUMB
from whence.report.pictures import pictures_of
from whence.storage.files import write_bytes
from whence.task import write_report
from whence.task.about import abouts
from whence.types import Batch, Images, Scores

N, M, TOP = 60, 5, 8


class Album:
    """Images in memory that remember which rows were read."""

    def __init__(self, x0: Tensor, ids: list[str], meta: dict[str, list[Any]] | None = None) -> None:
        self.x0, self.ids, self.meta = x0, ids, meta or {}
        self.digests = [str(hash(x.numpy().tobytes())) for x in x0]
        self.labels = self.empty_caption = None
        self.preprocess, self.pictures = {}, self
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self) -> None:
        return None

    def batch(self, rows: Any) -> Batch:
        self.read += list(rows)
        return Batch(self.x0[list(rows)], torch.zeros(len(rows), dtype=torch.int64))


@pytest.fixture
def train() -> Album:
    meta = {"creator": [f"artist {i % 4}" for i in range(N)], "note": list(range(N))}
    return Album(_noise(N, 1, 8, 8), [f"folder/{i:03}.png" for i in range(N)], meta)


@pytest.fixture
def queries() -> Album:
    return Album(_noise(M, 1, 8, 8, seed=1), [f"sample-{j}.png" for j in range(M)])


@pytest.fixture
def scores(train: Album, queries: Album) -> Scores:
    return _scores(train, queries)


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _scores(train: Album, queries: Album, seed: int = 2, **changes: Any) -> Scores:
    values = torch.randn(len(queries), len(train), generator=torch.Generator().manual_seed(seed))
    made = Scores(values, queries.ids, train.ids, {"method": "made up", "seed": seed}, train_meta=train.meta)
    return dataclasses.replace(made, **changes)


def _write(folder: Path, results: dict[str, Scores], train: Album, queries: Album, **changes: Any) -> str:
    known = page.Known(
        **{name: changes.pop(name) for name in ("warnings", "leaning", "about", "removed") if name in changes}
    )
    arguments: dict[str, Any] = {"title": "A test", "facts": {"Model": "none"}, "top": TOP, "known": known, **changes}
    for name, content in page.render(results, train, queries, **arguments).items():
        write_bytes(folder / name, content)
    return (folder / "report.html").read_text()


def _text(page: str) -> str:
    page = re.sub(r"(?s)<style>.*?</style>", "", unscripted(page))
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"</?bdi[^>]*>|<wbr>", "", page))).split())


def _names(page: str, heading: str) -> list[str]:
    """File names in the first strip below a heading."""
    return re.findall(r'class="name" title="([^"]*)"', page.split(f">{heading}<")[1].split("</ol>")[0])


def test_fake_is_images(train: Album) -> None:
    assert isinstance(train, Images)


def test_one_file_that_asks_the_network_for_nothing(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    page = _write(tmp_path, {"made up": scores}, train, queries)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gallery.png", "report.html"]
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert targets
    assert all(target.startswith(("data:", "#")) for target in targets)
    assert "default-src 'none'" in page
    assert not re.search(r"<script|@import|url\(|https?://", unscripted(page))


def test_the_law_is_on_every_query(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    page = _write(tmp_path, {"made up": scores}, train, queries)
    assert page.count("Positive = proponent.") == M
    assert "Positive = proponent: the image pushed the model towards this picture." in _text(page)
    assert "not proof of copying" in _text(page)


def test_strips_are_the_strongest_in_order(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    page = _write(tmp_path, {"made up": scores}, train, queries)
    assert _names(page, "Strongest proponents") == [name for name, _ in scores.top(0, TOP)]
    assert _names(page, "Strongest opponents") == [name for name, _ in scores.bottom(0, TOP // 2)]


def test_ties_keep_the_order_of_the_images(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    tied = dataclasses.replace(scores, values=scores.values.sign())
    page = _write(tmp_path, {"made up": tied}, train, queries)
    assert _names(page, "Strongest proponents") == [name for name, _ in tied.top(0, TOP)]
    assert _names(page, "Strongest opponents") == [name for name, _ in tied.bottom(0, TOP // 2)]


def test_only_the_shown_rows_are_read_and_each_once(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    page = _write(tmp_path, {"made up": scores}, train, queries, max_queries=2, top=3)
    shown = {train.ids.index(name) for name in re.findall(r'class="name" title="([^"]*)"', page)}
    assert sorted(train.read) == sorted(shown)
    assert len(shown) < N / 2
    assert queries.read == [0, 1]
    assert "5, the first 2 shown" in page


@pytest.mark.parametrize("hostile", ['"><script>alert(1)</script>.png', "a&lt;b'.png", "<img src=x onerror=y>"])
def test_names_are_escaped_everywhere(tmp_path: Path, train: Album, queries: Album, hostile: str) -> None:
    train.ids, queries.ids = [f"{hostile}{i}" for i in range(N)], [f"{hostile}{j}" for j in range(M)]
    train.meta = {"creator": [hostile] * N}
    made = _scores(train, queries, recipe={"file": hostile})
    page = _write(tmp_path, {hostile: made}, train, queries, title=hostile, facts={hostile: hostile})
    assert "<script" not in unscripted(page)
    assert "<img src=x" not in page
    assert _text(page).count(hostile) >= 2 * M


def test_unprintable_names_become_one_line(tmp_path: Path, train: Album, queries: Album) -> None:
    names = ["a\nb\tc.png", "sur\udce9rogate.png", "turned\u202egnp.exe"]
    queries.ids = names + queries.ids[3:]
    text = _text(_write(tmp_path, {"made up": _scores(train, queries)}, train, queries))
    assert all(name in text for name in ("a b c.png", "sur\ufffdrogate.png", "turned\ufffdgnp.exe"))


def test_magnitudes_have_no_opponents(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    squared = dataclasses.replace(scores, values=scores.values**2, signed=False)
    page = _write(tmp_path, {"squared": squared}, train, queries)
    assert "Strongest opponents" not in page
    assert "proponent" not in _text(page)
    assert page.count("Strongest by magnitude") == M
    assert "squared: magnitude only" in _text(page)
    assert "+" not in "".join(re.findall(r'<b class="[^"]*">([^<]*)</b>', page))


def test_no_positive_score_is_called_by_its_name(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    negative = dataclasses.replace(scores, values=-scores.values.abs() - 1)
    text = _text(_write(tmp_path, {"distance": negative}, train, queries))
    assert text.count("none is above zero, so none is a proponent") == M
    assert "none scores above zero" in text


def test_what_is_below_zero_is_an_opponent_however_few_there_are(tmp_path: Path) -> None:
    """Of three training images one helped: the other two stand on the other side, and nothing is told of the first three."""
    train, queries = Album(_noise(3, 1, 8, 8), list("abc")), Album(_noise(2, 1, 8, 8, seed=1), list("pq"))
    scores = Scores(torch.tensor([[0.5, -0.1, -2.0]] * 2), queries.ids, train.ids, {})
    page = _write(tmp_path, {"some": scores}, train, queries)
    part = page.split('<section class="method">')[1]
    proponents, opponents = part.split("Strongest opponents")
    assert [told for _, told, _ in _tiles(proponents)] == ["+0.500"]
    assert [told for _, told, _ in _tiles(opponents)] == ["−2.00", "−0.100"]
    text = _text(page)
    assert "1 of 3 score above zero" in text
    assert "Generally influential" not in text


@pytest.mark.parametrize(("by", "who"), [("image", "training images"), ("creator", "contributors")])
def test_values_with_one_seed_are_not_called_sure(tmp_path: Path, by: str, who: str) -> None:
    train, queries = Album(_noise(3, 1, 8, 8), list("abc")), Album(_noise(2, 1, 8, 8, seed=1), list("pq"))
    recipe = {"values": {"by": by}}
    scores = Scores(torch.tensor([[0.5, 0.1, -2.0]] * 2), queries.ids, train.ids, recipe, "value")
    scores = dataclasses.replace(scores, stderr=torch.full((2, 3), torch.nan), stderr_of="seeds")
    page = _write(tmp_path, {"shapley": scores}, train, queries)
    text = _text(page)
    assert text.count("How sure these are is not known: their standard errors need two seeds or more") == 2
    assert "surely" not in text
    assert 'class="between"' not in page
    assert f"all 3 {who}" in text
    for other in {"training images", "contributors"} - {who}:
        assert f"all 3 {other}" not in text


def test_several_methods_side_by_side(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    results = {"first": scores, "reversed": dataclasses.replace(scores, values=-scores.values)}
    results["squared"] = dataclasses.replace(scores, values=scores.values**2, signed=False)
    text = _text(_write(tmp_path, results, train, queries))
    assert "first and reversed −1.0 −1.0 to −1.0 0 of 8" in text
    # A signed and an unsigned method are compared by magnitude: the square keeps the order of the absolute values.
    assert "first and squared (magnitudes) 1.0 1.0 to 1.0 8.0 of 8" in text
    assert text.count("Strongest by magnitude") == M


def _of_some(scores: Scores, rows: list[int], **changes: Any) -> Scores:
    """The scores of some training images, as a run with candidates leaves them."""
    meta = {name: [column[row] for row in rows] for name, column in scores.train_meta.items()}
    recipe = {**scores.recipe, "scored": "x", "candidates": {"count": 2, "by": "pixel_cosine"}}
    ids, values = [scores.train_ids[row] for row in rows], scores.values[:, rows]
    return dataclasses.replace(scores, values=values, train_ids=ids, train_meta=meta, recipe=recipe, **changes)


SOME = [3, 7, 8, 20, 21, 22, 40, 41, 55, 59]


def _tiles(part: str) -> list[tuple[str, str, str]]:
    """(name, number, picture) of every training image shown."""
    tile = r'(?s)<li class="tile">\s*<img src="([^"]*)".*?<b class="\w*">([^<]*)</b>.*?class="name" title="([^"]*)"'
    return [(name, told, uri) for uri, told, name in re.findall(tile, part)]


@pytest.mark.parametrize("order", [1, -1], ids=["first", "second"])
def test_a_score_stands_beside_its_own_picture_whichever_images_were_scored(
    tmp_path: Path, train: Album, queries: Album, scores: Scores, order: int
) -> None:
    some = _of_some(_scores(train, queries, seed=9), SOME)
    other = _of_some(_scores(train, queries, seed=10), [1, 3, 8, 30])
    results = dict(list({"all": scores, "some": some, "other": other}.items())[::order])
    page = _write(tmp_path, results, train, queries, top=3)
    own = {train.ids[row]: picture.uri for row, picture in pictures_of(train, range(N), THUMB).items()}
    assert all(own[name] == uri for name, _, uri in _tiles(page))
    before, *parts = page.split('<section class="method">')
    assert len(parts) == 3 * M
    for number, part in enumerate(parts):
        query, name = number // 3, list(results)[number % 3]
        top = results[name].top(query, 3)
        top = [pair for pair in top if pair[1] > 0] or top
        opponents = [pair for pair in results[name].bottom(query, 2) if pair[1] < 0 and pair not in top]
        shown = [(image, told) for image, told, _ in _tiles(part)]
        assert shown == [(image, words.number(value, plus=True)) for image, value in top + opponents]
    counted = re.split("<h4>", before.split("Generally influential")[1])[1:]
    for name, strip in zip(results, counted, strict=True):
        often = Counter(image for query in range(M) for image, _ in results[name].top(query, 3))
        assert {(image, told) for image, told, _ in _tiles(strip)} <= {(i, f"{c} of {M}") for i, c in often.items()}
        assert len(_tiles(strip)) == min(8, sum(count > 1 for count in often.values()))
    groups = re.findall(r'title="(folder/\d+\.png)">[^\n]*\n\s*<p class="label" title="(artist \d)"', page)
    assert len(groups) == len(_tiles(page))
    assert all(train.meta["creator"][train.ids.index(name)] == creator for name, creator in groups)


def test_the_page_says_how_many_were_scored_and_who_named_them(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    text = _text(_write(tmp_path, {"all": scores, "some": _of_some(scores, SOME)}, train, queries))
    told = "10 of 60 images, named by pixel_cosine"
    assert f"Scored by some {told}" in text
    assert text.count(f"some scored: {told}") == text.count(f"Scores of the {told};") == M
    assert text.count("Scores of all 60 training images;") == M
    unnamed = dataclasses.replace(_of_some(scores, SOME), recipe={"scored": "x"})
    assert "scored: 10 of 60 images The" in _text(_write(tmp_path, {"some": unnamed}, train, queries))


def test_methods_agree_on_the_images_that_both_scored(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    results = {"all": scores, "some": _of_some(scores, SOME), "few": _of_some(scores, [0, 3, 7, 55])}
    text = _text(_write(tmp_path, results, train, queries))
    assert "all and some, 10 images 1.0 1.0 to 1.0 8.0 of 8 6.4" in text
    assert "some and few, 3 images 1.0 1.0 to 1.0 3.0 of 3 3.0" in text
    assert "that both methods scored" in text
    apart = {"some": results["some"], "others": _of_some(scores, [0, 1, 2])}
    assert "some and others, 0 images undefined 0 of 0 0" in _text(_write(tmp_path, apart, train, queries))


def test_a_group_has_no_sum_where_some_of_its_images_have_no_score(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    scores = dataclasses.replace(scores, scale="removal")
    some = _of_some(scores, SOME)
    whole = _text(_write(tmp_path, {"all": scores}, train, queries))
    text = _text(_write(tmp_path, {"some": some, "all": scores}, train, queries))
    totals = text.split("Totals by creator")[1].split("Query by query")[0]
    assert "Not of some, where some images have no score. creator images all artist" in totals
    assert totals.split("creator images all")[1] == whole.split("creator images all")[1].split("Query by query")[0]
    assert text.count("Sum by creator") == M
    alone = _text(_write(tmp_path, {"some": some}, train, queries))
    assert "Totals by" not in alone
    assert "Sum by" not in alone


def test_scores_of_images_that_are_gone_are_refused(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    some = _of_some(scores, SOME)
    with refuses("'folder/003.png' has scores and is not among the 56 images"):
        _write(tmp_path, {"some": some}, Album(train.x0[4:], train.ids[4:]), queries)
    short = dataclasses.replace(some, recipe={})
    with refuses("training image 0 is 'folder/003.png' in the scores (10) and 'folder/000.png' in the images (60)"):
        _write(tmp_path, {"some": short}, train, queries)


def test_generally_influential_images_are_counted_over_all_queries(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    values = scores.values.clone()
    values[:, 17] = 100.0
    page = _write(tmp_path, {"made up": dataclasses.replace(scores, values=values)}, train, queries, max_queries=1)
    strip = page.split("Generally influential")[1].split("</ol>")[0]
    assert re.findall(r'title="(folder/\d+\.png)"', strip)[0] == "folder/017.png"
    assert f'<b class="">{M} of {M}</b>' in strip


def test_group_totals_are_sums(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    scores = dataclasses.replace(scores, values=scores.values.double(), scale="removal")
    text = _text(_write(tmp_path, {"made up": scores}, train, queries))
    totals = text.split("Totals by creator")[1].split("Query by query")[0]
    assert "A sum, not a Shapley value" in totals
    grouped = scores.group_by("creator")
    for name, total in zip(grouped.train_ids, grouped.values.sum(0).tolist(), strict=True):
        assert f"{name} {N // 4} {words.number(total, plus=True)}" in totals


def test_what_has_no_units_is_counted_and_not_added_up(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    """The page says that the order within one query alone means something: one query of large numbers weighs no more."""
    scores = dataclasses.replace(scores, scale="rank")
    large = dataclasses.replace(scores, values=scores.values * torch.linspace(1, 1e6, M)[:, None])
    pages = [
        _text(_write(tmp_path / str(i), {"made up": one}, train, queries)) for i, one in enumerate((scores, large))
    ]
    totals, same = (text.split("Totals by creator")[1].split("Query by query")[0] for text in pages)
    assert totals == same
    first = [name for q in range(M) for name, _ in scores.top(q, 10)]
    creators = dict(zip(scores.train_ids, train.meta["creator"], strict=True))
    for name in set(creators.values()):
        assert f"{name} {N // 4} {sum(creators[one] == name for one in first)} " in f"{totals} "
    assert "Sum by creator" not in pages[0]
    assert "sum" not in totals.lower()


def test_the_page_says_what_its_numbers_mean(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    """In sight, not only below the recipes: whoever reads sums of ranks as shares believes something that is not so."""
    results = {kind: dataclasses.replace(scores, scale=kind) for kind in words.SCALES}
    results["another"] = results["rank"]
    text = _text(_write(tmp_path, results, train, queries))
    law = text.split("Overview")[0]
    for kind, meaning in words.SCALES.items():
        names = "rank, another" if kind == "rank" else kind
        assert f"Numbers of {names}: {meaning.partition(': ')[2]}." in law
    totals = text.split("Totals by creator")[1].split("Query by query")[0]
    assert "rank, another: how many of a group's images are among the first 10" in totals
    assert "without units" not in _text(_write(tmp_path, {"one": results["removal"]}, train, queries))
    assert "Numbers: no units" in _text(_write(tmp_path, {"one": results["rank"]}, train, queries))


def test_methods_that_never_ask_the_model_are_named(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    alone = {"pixel_dot", "pixel_cosine", "clip_cosine", "dino_cosine", "abc_cosine", "nda"}
    assert {name for name, entry in METHODS.items() if entry.pictures_alone} == alone
    write_report(tmp_path, dict.fromkeys(("trak", "nda", "mine"), scores), train, queries, "A test", {})
    assert "Without the model nda: of the pictures alone" in _text((tmp_path / "report.html").read_text())
    write_report(tmp_path, {"trak": scores}, train, queries, "A test", {})
    assert "Without the model" not in (tmp_path / "report.html").read_text()


def test_the_question_is_asked_once(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    for title, times in (("Which training images made these pictures?", 2), ("A test", 1)):
        page = _write(tmp_path, {"made up": scores}, train, queries, title=title)
        page = page.split('id="cite"')[0]
        assert page.count("Which training images made these pictures") == times, "title and headline, or lede"


def test_a_copy_of_the_query_and_duplicates_say_so(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    x0, values = train.x0.clone(), scores.values.clone()
    x0[3], x0[5] = queries.x0[0], x0[4]
    values[0, [3, 4, 5]] = torch.tensor([9.0, 8.0, 7.0])
    copies = Album(x0, train.ids, train.meta)
    strip = _write(tmp_path, {"made up": dataclasses.replace(scores, values=values)}, copies, queries)
    tiles = strip.split(">Strongest proponents<")[1].split("</ol>")[0].split("</li>")
    assert "same picture as the query" in tiles[0]
    assert "same picture" not in tiles[1]
    assert "same picture as 2" in tiles[2]


def test_a_warning_stands_before_every_score_of_its_query(
    tmp_path: Path, train: Album, queries: Album, scores: Scores
) -> None:
    """And the overview counts all of them, also of queries that are not shown."""
    hostile = 'looks like "><script>a</script>\nb.png'
    warned = {queries.ids[1]: "looks like a near-copy of 003.png", queries.ids[4]: hostile}
    page = _write(tmp_path, {"made up": scores}, train, queries, warnings=warned)
    assert "<script" not in unscripted(page)
    cards = page.split("<article ")[1:]
    boxes = [card.partition('class="warning"')[2].partition("</p>")[0] for card in cards]
    assert [bool(box) for box in boxes] == [False, True, False, False, True]
    assert "this picture looks like a near-copy of 003.png" in boxes[1]
    assert all(card.index('class="warning"') < card.index("<figure") for card in (cards[1], cards[4]))
    overview = page.split("Overview")[1].split("Query by query")[0]
    told = "2 of 5 pictures look like copies of training images. Look first at sample-1.png"
    assert f"{told} , sample-4.png ." in _text(overview)
    assert re.findall(r'<a href="#query-(\d)"><bdi>sample', overview) == ["2", "5"]
    few = _text(_write(tmp_path, {"made up": scores}, train, queries, warnings=warned, max_queries=2))
    assert f"{told} ." in few
    one = _text(_write(tmp_path, {"made up": scores}, train, queries, warnings={queries.ids[0]: "x"}))
    assert "1 of 5 pictures looks like a copy of a training image." in one
    plain = _write(tmp_path, {"made up": scores}, train, queries)
    assert 'class="warning"' not in plain
    with refuses("'nobody.png' is warned of", "warnings"):
        _write(tmp_path, {"made up": scores}, train, queries, warnings={"nobody.png": "x"})


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    for name in ("a", "b"):
        _write(tmp_path / name, {"made up": scores}, train, queries)
    for file in ("report.html", "gallery.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("methods", [1, 2])
def test_gallery_has_its_rows(tmp_path: Path, train: Album, queries: Album, methods: int) -> None:
    results = {f"method {i}": _scores(train, queries, seed=i) for i in range(methods)}
    _write(tmp_path, results, train, queries)
    with Image.open(tmp_path / "gallery.png") as gallery:
        gallery.load()
        assert gallery.size == drawn.gallery_size(min(M, drawn.GALLERY_ROWS // methods), methods, TOP)


def test_gallery_scales_pixel_art_with_hard_edges(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    _write(tmp_path, {"made up": scores}, train, queries)
    pixels = ((queries.x0[0, 0] + 1) * 127.5).round().byte().numpy()
    left, upper = drawn.MARGIN, drawn.HEAD + drawn.GAP
    with Image.open(tmp_path / "gallery.png") as gallery:
        shown = np.asarray(gallery.convert("L"))[upper : upper + drawn.TILE, left : left + drawn.TILE]
    assert np.array_equal(shown, pixels.repeat(drawn.TILE // 8, 0).repeat(drawn.TILE // 8, 1))


def test_photos_stay_small_and_smooth(tmp_path: Path) -> None:
    train = Album(_noise(12, 3, 200, 300), [f"{i}.jpg" for i in range(12)])
    queries = Album(_noise(1, 3, 400, 600), ["q.jpg"])
    page = _write(tmp_path, {"made up": _scores(train, queries)}, train, queries)
    assert "pixels>" not in page
    assert len(page) < 400_000
    assert "Generally influential" not in page  # one query says nothing about the general


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_training_sets(tmp_path: Path, n: int) -> None:
    train, queries = Album(_noise(n, 3, 8, 8), [f"{i}.png" for i in range(n)]), Album(_noise(1, 3, 8, 8), ["q.png"])
    made = Scores(torch.arange(n, dtype=torch.float32)[None] - 0.5, queries.ids, train.ids, {})
    assert "q.png" in _write(tmp_path, {"made up": made}, train, queries)


@pytest.mark.parametrize("value", [0.0, -1e20, 0.1])
def test_equal_scores_tell_nothing(tmp_path: Path, train: Album, queries: Album, value: float) -> None:
    values = torch.full((M, N), value, dtype=torch.float64)
    values[:, 1:] += abs(value) * 1e-15  # equal up to rounding
    text = _text(_write(tmp_path, {"made up": _scores(train, queries, values=values)}, train, queries))
    assert text.count("Nothing to tell: all 60 scores are equal.") == M


def _wrong_pixels(train: Album, value: float) -> Album:
    train.x0 = torch.full_like(train.x0, value)
    return train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, t, q: ({}, t, q), "no results"),
        (lambda r, t, q: (r, Album(t.x0[1:], t.ids[1:]), q), "training image 0 is 'folder/000.png' in the scores"),
        (lambda r, t, q: (r, t, Album(q.x0[:3], q.ids[:3])), "query 3 is 'sample-3.png' in the scores"),
        (lambda r, t, q: (r, _wrong_pixels(t, math.nan), q), "expected [-1, 1]"),
        (lambda r, t, q: (r, _wrong_pixels(t, 255.0), q), "from 255 to 255; expected [-1, 1]"),
        (lambda r, t, q: (r, Album(_noise(N, 4, 8, 8), t.ids), q), "shape (4, 8, 8)"),
        (
            lambda r, t, q: ({k: dataclasses.replace(v, train_meta={"label": [1]}) for k, v in r.items()}, t, q),
            "'label'",
        ),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    tmp_path: Path, train: Album, queries: Album, scores: Scores, change: Any, message: str
) -> None:
    results, train, queries = change({"made up": scores}, train, queries)
    with refuses(message):
        _write(tmp_path / "out", results, train, queries)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"top": 0}, {"max_queries": 0}])
def test_counts_must_be_positive(
    tmp_path: Path, train: Album, queries: Album, scores: Scores, wrong: dict[str, int]
) -> None:
    with refuses("at least 1"):
        _write(tmp_path, {"made up": scores}, train, queries, **wrong)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.93449, "0.934"),
        (-1.0, "−1.00"),
        (9.996, "10.0"),
        (123456.0, "123,000"),
        (1234567.0, "1.23×10⁶"),
        (-2.5e-7, "−2.50×10⁻⁷"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert words.number(value) == text


def test_spearman_equals_its_definition() -> None:
    a, b = np.array([1.0, 2.0, 2.0, 5.0]), np.array([10.0, 30.0, 20.0, 40.0])
    ranks = np.array([1.0, 2.5, 2.5, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert statistics.spearman(a, b) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert math.isnan(statistics.spearman(a, np.ones(4)))


def test_verdict_knows_noise_from_a_finding() -> None:
    noise = np.random.default_rng(0).standard_normal(2000)
    assert statistics.verdict(noise, 8, True)[0] == "The strongest image does not stand out"
    noise[7] = 20.0
    finding, numbers = statistics.verdict(noise, 1, True)
    assert finding == "The strongest image stands out clearly"
    assert (
        f"{words.number((20 - noise.mean()) / noise.std(), 2)} standard deviations above the mean of all 2,000"
        in numbers
    )
    assert (
        f"the first image carries {100 * 20 / noise.clip(min=0).sum():.1f}\N{NO-BREAK SPACE}% of the total positive"
        in numbers
    )
    assert statistics.verdict(np.full(5, 0.3), 3, True) == ("Nothing to tell", "all 5 scores are equal")


def test_recipe_is_shown_whole(tmp_path: Path, train: Album, queries: Album) -> None:
    recipe = {"method": "made up", "draws": {"timesteps": list(range(40))}, "note": "λ = 1e-3"}
    page = _write(tmp_path, {"made up": _scores(train, queries, recipe=recipe, scale="removal")}, train, queries)
    shown = html.unescape(page.split('<pre tabindex="0">')[1].split("</pre>")[0])
    assert json.loads(shown) == recipe
    assert "the rise of the query's loss if this one were left out of the training" in html.unescape(page)


# ---------------------------------------------------------------------------------------------------- how sure that is

FEW = "these scores depend mostly on what was drawn for them (reliability 0)"
FALLING = torch.tensor([[10.0, 9, 8, 3, 2, 1, 0, 0]])


@pytest.mark.parametrize(
    ("stderr", "k", "finding"),
    [
        (torch.full((1, 8), 0.1), 3, "The first 3 surely belong there"),
        (torch.full((1, 8), 1.0), 3, "The first 3 surely belong there, in whatever order"),
        (torch.tensor([[0.1, 3, 3, 0.1, 0.1, 0.1, 0.1, 0.1]]), 3, "Of the first 3, 1 surely belongs there, "),
        (torch.tensor([[0.1, 0.1, 3, 2, 0.1, 0.1, 0.1, 0.1]]), 3, "Of the first 3, 2 surely belong there"),
        (
            torch.full((1, 8), 9.0),
            3,
            "Of the first 3, none surely belongs there, and no order among them can be told; " + FEW,
        ),
        (torch.full((1, 8), 0.1), 1, "The first image surely is the first"),
        (torch.full((1, 8), 9.0), 1, f"No image surely is the first; {FEW}"),
        (torch.zeros(1, 8), 3, "Nothing is drawn by chance"),
    ],
)
def test_what_errors_say_of_the_first_images(stderr: Tensor, k: int, finding: str) -> None:
    scores = Scores(FALLING, ["q"], list("abcdefgh"), {}, stderr=stderr, stderr_of="draws")
    found, basis = statistics.certainty(scores, 0, list(range(k)))
    assert found.startswith(finding.removesuffix(", ")), found
    assert found == finding or finding.endswith(", ")
    assert ("other timesteps and noise could give" in basis) == bool(stderr.any())
    assert statistics.certainty(dataclasses.replace(scores, stderr=None), 0, [0]) == ("", "")


def test_ranks_that_an_image_may_have_stand_below_it(tmp_path: Path, train: Album, queries: Album) -> None:
    sure = _scores(train, queries, stderr=torch.full((M, N), 0.05), stderr_of="draws")
    exact = dataclasses.replace(sure, stderr=torch.zeros(M, N), stderr_of="nothing: no part of it is drawn by chance")
    none = dataclasses.replace(sure, stderr=None, stderr_of="not measured: it has one draw")
    page = _write(tmp_path, {"sure": sure, "exact": exact, "none": none}, train, queries, max_queries=1)
    shown = re.findall(r'class="between">([^<]*)<', page)
    order = sure.values[0].argsort(descending=True)[:TOP].tolist()
    between = [(a + 1, b + 1) for a, b in sure.ranks_between(0, order)]
    assert len({a == b for a, b in between}) == 2, "one kind of text is not tried"
    expected = [f"rank {i} ({a}–{b})" if a < b else f"rank {i} ({a})" for i, (a, b) in enumerate(between, 1)]
    assert shown == [*expected, *(f"rank {i} ({i})" for i in range(1, TOP + 1))]
    text = _text(page)
    assert (
        "of the draws: what other timesteps and noise would change; another random projection, where there is one"
        in text
    )
    assert "Nothing is drawn by chance: another run gives the same scores." in text
    assert text.count("ranks in brackets") == 1
    assert "Standard errors not measured: it has one draw" in text
    assert "Standard errors not measured: none were asked for" in _text(
        _write(tmp_path, {"x": _scores(train, queries)}, train, queries)
    )


def test_the_gallery_says_how_many_pictures_it_shows(
    tmp_path: Path, train: Album, queries: Album, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gallery of one picture in eight that says nothing is taken for all of them."""
    written: list[str] = []
    text = drawn.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        drawn.ImageDraw.ImageDraw,
        "text",
        lambda self, at, told, **how: (written.append(told), text(self, at, told, **how))[1],
    )
    few = {f"method {i}": _scores(train, queries, seed=i) for i in range(3)}
    _write(tmp_path, few, train, queries)
    assert any("the first 3 of 5 pictures" in line for line in written)
    written.clear()
    _write(tmp_path, {"one": few["method 0"]}, train, queries)
    assert not any("the first" in line for line in written)


def test_no_fact_stands_twice(tmp_path: Path, train: Album, queries: Album, scores: Scores) -> None:
    facts = {"Training images": "60 of noise", "Model": "none"}
    page = _write(tmp_path, {"made up": scores}, train, queries, facts=facts)
    names = re.findall(r"<dt><bdi>([^<]*)</bdi></dt>", page.split('id="overview"')[1].split("</dl>")[0])
    assert len(names) == len(set(names))
    assert "Training images" in names


def test_every_method_of_whence_is_explained_in_plain_words() -> None:
    found = abouts([*METHODS, "mine:own"])
    assert found.keys() == METHODS.keys()
    for name, about in found.items():
        assert about.words.startswith("It "), name
        assert about.words.endswith("."), name
        assert METHODS[name].paper[1:] in about.words
        assert about.pictures_alone == METHODS[name].pictures_alone
