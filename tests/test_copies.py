"""Near-copies: the nearest image is the nearest, a rate is kept, copies that are planted are found, and the page says so."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from errors import refuses
from test_cli import IMAGES, World, noise, refused, succeeds, world  # noqa: F401
from whence import Engine, Function
from whence.cli.attribute import Attribute
from whence.data.images import TensorImages, image_folder, subset, tensor_images
from whence.data.pixels import to_pixels, to_x0
from whence.data.saving import save_png
from whence.evaluation import neighbours as room
from whence.evaluation.conformal import Calibration, least_rate
from whence.evaluation.copies import judged, near_copies, sentences
from whence.evaluation.neighbours import neighbours
from whence.features.encoders import Thumbnail
from whence.features.pretrained import Pretrained
from whence.storage.files import read_json, write_json
from worlds import encoder, tensors

DIGITS = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1


def saved(x0: Tensor) -> Tensor:
    """As it is read back from 8 bits."""
    return to_x0(to_pixels(x0).numpy())


def random(count: int, seed: int = 0, shape: tuple[int, ...] = (1, 6, 6)) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------- the rate


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05, 0.1, 0.29, 0.5, 0.999])
@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "no ties"])
def test_flagged_is_p_at_most_the_rate(rate, levels):
    """And p is its definition, also where similarities are equal."""
    values = np.random.default_rng(0).integers(0, levels, 130) / levels
    known = Calibration(values, rate)
    for s in [*np.unique(values), -1.0, 2.0]:
        p = (1 + sum(c >= s for c in values)) / 131
        assert known.p(s) == p
        assert known.flags(s) == (p <= rate), (s, p, known.threshold)


@pytest.mark.parametrize("rate", [0.01, 0.03, 0.2, 0.5])
def test_of_ordinary_things_no_more_than_the_rate_is_flagged(rate):
    """Exactly, and not only on average: each of n + 1 different values in the place of the new one."""
    values = np.random.default_rng(1).standard_normal(120)
    flagged = sum(Calibration(np.delete(values, j), rate).flags(values[j]) for j in range(120))
    assert flagged == math.floor(rate * 120)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_rate_is_a_share(rate):
    with refuses("a rate of", "rate", "above 0 and below 1"):
        near_copies(tensor_images(random(3)), tensor_images(random(1)), rate)


@pytest.mark.parametrize(("n", "least"), [(99, 0.01), (50, 0.02), (49, 0.02), (9, 0.1), (1, 0.5), (496, 0.0021)])
def test_the_smallest_rate_is_told(n, least):
    assert least_rate(n) == least
    Calibration(np.zeros(n), least)
    with refuses(f"{n} similarities to compare with are too few", accepted=f"{least:g} or more"):
        Calibration(np.zeros(n), 0.99 / (n + 1))


# ------------------------------------------------------------------------------------------------------- the neighbours


def by_hand(train: Tensor, queries: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Cosines of centred images, pair by pair: pictures by training images, and training images by themselves."""

    def cosine(a: Tensor, b: Tensor) -> float:
        a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
        return float(a @ b / (a.norm() * b.norm()))

    return [[cosine(q, x) for x in train] for q in queries], [[cosine(a, b) for b in train] for a in train]


def test_the_nearest_is_that_of_a_plain_loop():
    x, q = random(23), random(7, seed=1)
    found = neighbours(tensor_images(x), tensor_images(q))
    across, inside = by_hand(x, q)
    for j, row in enumerate(across):
        assert found.nearest[j] == f"{int(np.argmax(row)):02d}"
        assert found.similarity[j] == pytest.approx(max(row), abs=1e-8)
    others = [max(c for l, c in enumerate(row) if l != i) for i, row in enumerate(inside)]  # noqa: E741
    np.testing.assert_allclose(np.sort(found.between), np.sort(others), rtol=0, atol=2e-9)


@pytest.mark.parametrize("changed", ["order", "pieces", "blocks", "alone", "most"])
def test_a_picture_does_not_depend_on_its_company(changed, monkeypatch):
    """Nor does what it is compared with on how many are read at once; ties are among these, too."""
    x = torch.cat([random(40), random(40)[:4] * 0.5])  # the last four have the direction of the first
    train, queries = tensors(x, "x"), tensors(torch.cat([random(6, seed=1), random(40)[:2] * 0.25]), "q")
    expected, engine, most, rows = neighbours(train, queries), Engine(), room.MOST, range(8)
    if changed == "order":
        train = subset(train, np.random.default_rng(0).permutation(44))
    if changed == "pieces":
        monkeypatch.setattr(room, "READ_MOST", 3)
    if changed == "blocks":
        engine = Engine(budget=8 * 36 * 5)
    if changed == "alone":
        rows = [6]
    if changed == "most":
        most = 5
    found = neighbours(train, subset(queries, rows), most=most, engine=engine)
    assert list(found.nearest) == [expected.nearest[row] for row in rows]
    assert found.similarity.tolist() == [expected.similarity[row] for row in rows]
    if changed == "most":
        assert len(found.between) == 5
        assert {*found.between.tolist()} <= {*expected.between.tolist()}
    else:
        assert sorted(found.between.tolist()) == sorted(expected.between.tolist())


def test_brightness_and_contrast_do_not_matter():
    x = random(30)
    copy = near_copies(tensor_images(x), tensor_images(x[4:5] * 0.3 + 0.4), rate=0.05)[0]
    assert (copy.nearest, copy.similarity, copy.exact, copy.flagged) == ("04", 1.0, False, True)


def test_large_pictures_are_made_small_by_means_of_areas():
    x = random(2, shape=(3, 128, 64)).double()
    rows = Thumbnail(64)(torch.nn.Identity(), None, tensor_images(x).batch([0, 1]))
    means = x.reshape(2, 3, 64, 2, 32, 2).mean((3, 5)).flatten(1)
    torch.testing.assert_close(rows, means - means.mean(1, keepdim=True), rtol=1e-6, atol=1e-9)
    small = random(2, shape=(3, 64, 40))
    kept = Thumbnail(64)(torch.nn.Identity(), None, tensor_images(small).batch([0, 1]))
    assert torch.equal(kept, small.flatten(1) - small.flatten(1).mean(1, keepdim=True))


def test_what_cannot_be_compared_is_counted_and_never_flagged():
    """Pictures of one colour have no direction, whatever the rounding of their mean."""
    x = torch.cat([random(30), torch.full((3, 1, 6, 6), 0.1), torch.full((1, 1, 6, 6), -0.7)])
    train, queries = tensors(x, "x"), tensors(torch.stack([x[30], torch.full((1, 6, 6), 0.3), x[0] * 0.9]), "q")
    found = neighbours(train, queries)
    assert (found.one_colour, found.duplicates, len(found.between)) == (4, 2, 30)
    exact, plain, near = judged(found, 0.05)
    assert (exact.exact, exact.flagged, exact.similarity) == (True, True, None)
    assert exact.nearest.startswith("x-003")
    assert (plain.similarity, plain.p, plain.flagged, plain.nearest) == (None, 1.0, False, "")
    assert near.nearest == "x-0000"
    same = neighbours(tensors(x[30:], "flat"), queries)
    assert (len(same.between), same.one_colour) == (0, 4)
    with refuses("no two training images that differ", "4 training images"):
        judged(same, 0.05)


def test_numbers_that_are_none_name_the_image():
    broken = Function(lambda x0: torch.full((len(x0), 2), torch.nan), "1", "broken")
    with refuses("NaN or Inf", "image '0'", "finite"):
        near_copies(tensor_images(random(3)), tensor_images(random(1)), encoder=broken)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "function"])
def test_any_encoder_compares(kind):
    """Where it gives equal rows for two pictures, they are near, whatever their pixels."""
    x = random(25, shape=(3, 9, 9))
    by = Function(lambda x0: x0[:, :, 0].flatten(1), "1", "rows") if kind == "function" else Pretrained(encoder(kind))
    q = x[3:4].clone()
    if kind == "function":
        q[:, :, 1:] = random(1, 5, (3, 8, 9))
    copy = near_copies(tensor_images(x), tensor_images(q), rate=0.05, encoder=by)[0]
    assert (copy.nearest, copy.flagged, copy.exact) == ("03", True, kind != "function")
    assert copy.similarity == pytest.approx(1, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- planted copies


def heldout(rate: float) -> float:
    found = near_copies(tensor_images(DIGITS[:512]), tensor_images(DIGITS[512:]), rate)
    return float(np.mean([copy.flagged for copy in found]))


def test_planted_copies_are_flagged_and_few_of_the_others():
    """512 digits: with noise of .05 all copies of them; of 1,285 held-out ones no more than the rate and what chance adds
    (three standard deviations)."""
    planted = saved(DIGITS[:100] + 0.05 * torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    found = near_copies(tensor_images(DIGITS[:512]), tensor_images(planted))
    assert all(copy.flagged and not copy.exact for copy in found)
    assert all(copy.nearest == f"{j:03d}" for j, copy in enumerate(found))
    assert heldout(0.01) <= 0.01 + 1 / 513 + 3 * math.sqrt(0.01 / 1285) + 3 * math.sqrt(0.01 / 512)


def test_an_image_that_is_there_fifty_times_is_found_and_counts_once():
    """It says nothing of how near other images are to each other: the threshold is that without the fifty."""
    query = tensor_images(saved(DIGITS[7:8] + 0.02 * random(1, 3, (1, 8, 8))))
    many = torch.cat([DIGITS[:200], DIGITS[7:8].repeat(50, 1, 1, 1)])
    once, often = (neighbours(tensor_images(x), query) for x in (DIGITS[:200], many))
    assert often.duplicates == 50
    assert sorted(often.between.tolist()) == sorted(once.between.tolist())
    assert judged(often, 0.01)[0].flagged


def test_the_same_pixels_are_an_exact_copy_in_whatever_file(tmp_path):
    """Another name, another format, other bytes."""
    save_png(tmp_path / "train", DIGITS[:120].repeat_interleave(2, -1), [f"{i:03d}" for i in range(120)])
    (tmp_path / "q").mkdir()
    Image.open(tmp_path / "train/005.png").save(tmp_path / "q/other.bmp")
    copy = near_copies(image_folder(tmp_path / "train"), image_folder(tmp_path / "q"))[0]
    assert (copy.exact, copy.flagged, copy.nearest) == (True, True, "005.png")
    assert copy.sentence == "is an exact copy of 005.png: the same pixels"


def test_the_sentence_says_what_is_so():
    x = random(150)
    exact, near, none = near_copies(tensor_images(x), tensors(torch.stack([x[3], x[4] * 0.9, -x[5]]), "q"), rate=0.02)
    assert near.sentence == (
        "looks like a near-copy of 004: closer to it than 98 % of the training images are to any other"
    )
    assert none.sentence == ""
    assert sentences([near, none], [replace(exact, query=near.query)]) == {near.query: exact.sentence}
    assert sentences([near], [replace(near, sentence="later")]) == {near.query: near.sentence}


@pytest.mark.parametrize(
    ("train", "queries", "what", "accepted"),
    [
        (random(3), random(2, shape=(3, 6, 6)), "6x6 in colour, the training images 6x6 grey", "both grey or both in"),
        (random(3), random(2, shape=(1, 6, 7)), "7x6 grey, the training images 6x6 grey", "--resolution"),
        (random(2), random(1), "2 similarities to compare with are too few for a rate of 0.01", "0.34 or more, or 99"),
        (random(1), random(1), "there are no two training images that differ", "more of them"),
    ],
)
def test_pictures_that_cannot_be_compared_are_refused(train, queries, what, accepted):
    with refuses(what, accepted=accepted):
        near_copies(tensor_images(train), tensor_images(queries))


@pytest.mark.parametrize("side", ["training images", "pictures to look at"])
def test_there_must_be_some(side):
    some: TensorImages = tensor_images(random(3))
    none = subset(some, [])
    with refuses("there are none", side):
        near_copies(*((none, some) if side == "training images" else (some, none)))


# ------------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """120 digits, and four pictures: an exact copy, a near one, and two others."""
    root = tmp_path_factory.mktemp("copies")
    save_png(root / "train", DIGITS[:120], [f"{i:03d}" for i in range(120)])
    pictures = torch.cat([DIGITS[3:4], DIGITS[9:10] * 0.9, DIGITS[1000:1002]])
    save_png(root / "pictures", pictures, ["exact", "near", "one", "two"])
    return root


def words(folders: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "copies", "--train_data_dir", folders / "train", "--query_data_dir", folders / "pictures", "--output_dir", out, *more
    )  # fmt: skip


def test_copies_from_the_command_line(folders, tmp_path):
    done = succeeds(*words(folders, tmp_path / "out", "--encoder", encoder("vit")))
    lines = done.out.splitlines()
    assert lines[0] == "exact.png is an exact copy of 003.png: the same pixels"
    assert lines[1].startswith("near.png looks like a near-copy of 009.png: closer to it than 99 % of the")
    assert "2 of 4 pictures look like copies of training images (1 exact)" in lines
    with (tmp_path / "out/copies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["query"], row["measure"]) for row in rows] == [
        (f"{name}.png", measure) for measure in ("pixels", "vit") for name in ("exact", "near", "one", "two")
    ]
    found = json.loads((tmp_path / "out/copies.json").read_text())
    assert set(found["warnings"]) == {"exact.png", "near.png"}
    for row, copy in zip(rows, [copy for each in found["measures"] for copy in each["pictures"]], strict=True):
        assert float(row["similarity"]) == copy["similarity"]
        assert row["flagged"] == str(copy["flagged"])
    assert succeeds(*words(folders, tmp_path / "out", "--encoder", encoder("vit"))).out == done.out
    assert "2 of 4" in succeeds(*words(folders, tmp_path / "out", "--rate", 0.02)).out


def bad(name: str, folders: Path, tmp: Path) -> tuple[tuple[object, ...], str]:
    """A bad call, and what it is answered."""
    small, empty = tmp / "small", tmp / "empty"
    save_png(small, DIGITS[:30], [f"{i}" for i in range(30)])
    save_png(tmp / "large", random(2, shape=(1, 16, 16)), ["a", "b"])
    save_png(tmp / "single", DIGITS[:1], ["a"])
    empty.mkdir()
    of = {"small": small, "empty": empty, "large": tmp / "large", "single": tmp / "single"}
    train = ("copies", "--query_data_dir", folders / "pictures", "--output_dir", tmp / "out", "--train_data_dir")
    query = ("copies", "--train_data_dir", folders / "train", "--output_dir", tmp / "out", "--query_data_dir")
    return {
        "no training images": ((*train, empty), "empty: the folder is empty; accepted are"),
        "no pictures": ((*query, empty), "empty: the folder is empty; accepted are"),
        "one training image": ((*train, of["single"]), "1 training images: there are no two training images that"),
        "a rate of 1": ((*query, small, "--rate", 1), "--rate: a rate of 1; accepted: above 0 and below 1"),
        "a rate of 0": ((*query, small, "--rate", 0), "--rate: a rate of 0; accepted: above 0 and below 1"),
        "a rate above 1": ((*query, small, "--rate", 3), "Invalid value for '--rate'"),
        "too few": ((*train, small), "30 similarities .* too few for a rate of 0.01; accepted: 0.033 or more, or 99"),
        "no encoder": ((*query, small, "--encoder", empty), "encoder .*empty has no config.json"),
        "no such encoder": ((*query, small, "--encoder", tmp / "x"), "encoder .* is no folder"),
        "other sizes": ((*query, of["large"]), "they are 16x16 in colour, the training images 8x8 in colour; .*--resolut"),
        "results among images": ((*query[:4], small, "--query_data_dir", small), "which would be changed"),
    }[name]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "no training images", "no pictures", "one training image", "a rate of 1", "a rate of 0", "a rate above 1", "too few",
        "no encoder", "no such encoder", "other sizes", "results among images",
    ],
)  # fmt: skip
def test_bad_input(name, folders, tmp_path):
    arguments, says = bad(name, folders, tmp_path)
    refused(*arguments, says=says)
    assert not (tmp_path / "out").exists()


def test_a_resolution_brings_both_to_one_size(folders, tmp_path):
    save_png(tmp_path / "large", DIGITS[:4].repeat_interleave(2, -1).repeat_interleave(2, -2), ["a", "b", "c", "d"])
    query = ("copies", "--train_data_dir", folders / "train", "--output_dir", tmp_path / "out")
    done = succeeds(*query, "--query_data_dir", tmp_path / "large", "--resolution", 8)
    assert "a.png looks like a near-copy of 000.png" in done.out
    with (tmp_path / "out/copies.csv").open() as file:
        assert [row["nearest"] for row in csv.DictReader(file)] == ["000.png", "001.png", "002.png", "003.png"]


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_run_tells_before_any_score(world: World, tmp_path):  # noqa: F811
    """14 training images allow rates from 1/15: with the default exact copies are told, and a rate that is asked for is kept
    or refused. The file is that of these pictures and no others."""
    queries = tmp_path / "queries"
    near = noise(IMAGES, 0)[4:5] * 0.8
    save_png(queries, torch.cat([noise(IMAGES, 0)[3:4], near, noise(2, 5)]), ["exact", "near", "q1", "q2"])
    run = tmp_path / "run"
    command = (*world.about(run), "--query_data_dir", queries, "--method", "pixel_dot")
    done = succeeds(*command, warns="byte-identical")
    assert "copies: exact.png is an exact copy of 03.png: the same pixels" in done.out
    assert "copies: 1 of 4 pictures looks like a copy of a training image (1 exact)" in done.out
    page = (run / "report.html").read_text()
    assert "exact copies only: 14 training images are too few to say more (they allow rates from 0.067 on)" in page
    assert page.count("Before any score:") == 1
    before = (run / "copies.json").stat().st_mtime_ns
    succeeds(*command, warns="byte-identical")
    assert (run / "copies.json").stat().st_mtime_ns == before
    refused(*command, "--copy_rate", 0.06, says="14 similarities .* too few .*accepted: 0.067 or more", warns="byte-id")
    done = succeeds(*command, "--copy_rate", 0.1, warns="byte-identical")
    assert "copies: near.png looks like a near-copy of 04.png: closer to it than 90 %" in done.out
    page = (run / "report.html").read_text()
    assert page.count("Before any score:") == 2
    (run / "report.html").unlink()
    succeeds("report", run)
    assert (run / "report.html").read_text() == page
    others = shutil.copytree(run, tmp_path / "others")
    asked = read_json(others / "copies.json")
    asked["asked"]["queries"] = "of other pictures"
    write_json(others / "copies.json", asked)
    sides = ("--train_data_dir", world.images, "--query_data_dir", queries)
    succeeds("report", others, *sides, warns="copies.json: it is of other pictures")
    assert "Before any score" not in (others / "report.html").read_text()
    succeeds(*command, "--copy_rate", 0, warns="byte-identical")
    assert not (run / "copies.json").exists()
    assert "Before any score" not in (run / "report.html").read_text()
    assert Attribute.copy_rate == 0.01
