"""`whence clean`: what is planted is found, what is said of its sureness holds, and a list is what other verbs leave out."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import ttest_1samp

import whence as library
from agreement import close
from errors import refuses
from test_cli import IMAGES, TRAINING, World, refused, succeeds, world  # noqa: F401
from test_copies import DIGITS, random
from whence import Scores
from whence.data.dropping import read_names, rows_without, without, write_names
from whence.data.images import image_folder, subset, tensor_images
from whence.data.saving import save_png
from whence.evaluation.curated import Model, curated, write
from whence.evaluation.curation import Curation, doubts, duplicates, harm, lookalikes, neighbourhood, outliers, ranks
from whence.evaluation.exported import to_fiftyone
from whence.storage.files import file_digest, read_json
from worlds import tensors

HOW = Curation(neighbours=4)


def scores_of(values: torch.Tensor, signed: bool = True) -> Scores:
    m, n = values.shape
    return Scores(values.double(), [f"q{j}" for j in range(m)], [f"{i}" for i in range(n)], {}, signed=signed)


# ---------------------------------------------------------------------------------------------------------- neighbours


def test_neighbours_are_those_of_a_plain_loop():
    x = random(12)
    found = neighbourhood(tensor_images(x), HOW)
    flat = [row.double().flatten() - row.double().mean() for row in x]
    for i, a in enumerate(flat):
        cosines = {row: float(a @ b / (a.norm() * b.norm())) for row, b in enumerate(flat) if row != i}
        best = sorted(cosines, key=lambda row: -cosines[row])[:4]
        assert found.nearest[i].tolist() == best
        close(found.similarity[i], [cosines[row] for row in best])
        assert found.apart[i] == pytest.approx(1 - np.mean([cosines[row] for row in best]), abs=2e-6)


def test_lists_do_not_depend_on_the_order_of_the_images():
    """By name they are the same, ties and copies among them."""
    x = torch.cat([random(20), random(20)[:4], random(20)[4:6] * 0.5, torch.zeros(2, 1, 6, 6)])
    images = tensor_images(x, [f"{i:02d}" for i in range(28)], labels=[i % 3 for i in range(28)])
    order = np.random.default_rng(0).permutation(28)
    one, other = (curated(some, HOW).table for some in (images, subset(images, order)))
    for name, column in one.items():
        assert column == [dict(zip(other["image"], other[name], strict=True))[image] for image in one["image"]], name


def test_what_lies_there_twice_is_no_neighbour_of_itself():
    """Else a wrong label would be confirmed by its own copy."""
    x = torch.cat([random(10), random(10)[:1]])
    found = neighbourhood(tensor_images(x), HOW)
    assert found.same.tolist() == [*range(10), 0]
    assert not ({0, 10} & set(found.nearest[0].tolist()))
    assert found.nearest[10].tolist() == found.nearest[0].tolist()


def test_too_few_images_and_nonsense_are_refused():
    with refuses("1 images differ", "clean", "two or more"):
        neighbourhood(tensor_images(torch.cat([random(1), random(1), torch.zeros(1, 1, 6, 6)])))
    for name, value in (("near", 1.0), ("near", float("nan")), ("far", 0.0), ("rate", 1.0), ("neighbours", 0)):
        with refuses(name, "clean"):
            Curation(**{name: value})


# ---------------------------------------------------------------------------------------------------------- duplicates


def test_copies_and_lookalikes_are_found_and_the_first_by_name_is_kept():
    """The same pixels are one thing; paler, and a chain of two, another; of other pictures there is neither."""
    x = random(12)
    copies = torch.cat([x[:1], x[1:2] * 0.5, x[2:3] + 0.02 * random(1, 7), x[2:3]])
    names = ["m", *(f"n{i:02d}" for i in range(11)), "a", "z1", "z2", "z3"]
    found = neighbourhood(tensor_images(torch.cat([x, copies]), names), HOW)
    of_copies, of_all = ({names[row]: names[to] for row, to in enumerate(each) if row != to}
                         for each in (duplicates(found, names), lookalikes(found, names)))  # fmt: skip
    assert of_copies == {"m": "a", "z3": "n01"}
    assert of_all == of_copies | {"z1": "n00", "z2": "n01"}


@pytest.mark.parametrize("paler", [1.0, 0.5])
@pytest.mark.parametrize("right", [(0, 1), (1, 0), (1, 1), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0), (0, 0, 0)])
def test_the_lists_together_leave_one_of_each_group_with_the_label_that_most_agree_with(right, paler):
    """Byte copies, or paler ones, of which some have a wrong label; all lists are left out at once."""
    count, labels = len(right), digits_labels()[:100]
    x = torch.cat([*(DIGITS[:1] * paler**i for i in range(count)), DIGITS[1:100]])
    told = [*(labels[0] if each else labels[0] + 1 for each in right), *labels[1:]]
    names = [*(f"a{i}" for i in range(count)), *(f"b{i:03d}" for i in range(99))]
    found = curated(tensor_images(x, names, labels=told))
    dropped = {row for name in ("duplicates", "lookalikes", "mislabelled") for row in found.lists[name].drop}
    assert [i for i in range(count) if i not in dropped] == [right.index(1) if any(right) else 0]
    in_copies, note = "duplicates" if paler == 1 else "lookalikes", found.lists["mislabelled"].note
    assert len(found.lists[in_copies].drop) == count - 1
    assert ("a0" in note) == (not any(right))
    assert (0 in found.lists["mislabelled"].shown) == (right[0] == 0)


def test_what_is_kept_of_the_likely_mislabelled_is_said_in_a_line_and_on_the_page(tmp_path):
    x, labels = torch.cat([DIGITS[:60], DIGITS[:1]]), [5, *digits_labels()[1:60], 5]
    data = save_png(tmp_path / "data", x, [f"{i:02d}" for i in range(61)], [{"label": label} for label in labels])
    images, out = image_folder(data), tmp_path / "out"
    (line,) = [line for line in write(curated(images), images, out, "x", {}) if "likely mislabelled, but kept" in line]
    assert line.endswith(": 00.png")
    assert "00.png" not in read_names(out / "drop" / "mislabelled.txt")
    assert "60.png" in read_names(out / "drop" / "mislabelled.txt")
    assert line.split(": ", 1)[1][1:] in (out / "clean.html").read_text()


def test_each_number_is_of_the_pair_that_is_named():
    """A byte copy is 1 from its copy; what only looks alike is never printed as equal, and is shown beside its nearest."""
    x = torch.cat([random(12), random(12)[3:4], random(12)[5:6] * 0.5, random(12)[7:8] + 0.01 * random(1, 7)])
    names = [f"{i:02d}" for i in range(15)]
    found = curated(tensor_images(x, names), HOW)
    unit = torch.nn.functional.normalize((x - x.mean((1, 2, 3), keepdim=True)).flatten(1).double(), dim=1)
    cosine = unit @ unit.T - 2 * torch.eye(15)
    for row, (nearest, similarity) in enumerate(zip(found.table["nearest"], found.table["similarity"], strict=True)):
        assert similarity == pytest.approx(float(cosine[row].max()), abs=1e-6)
        assert similarity == pytest.approx(float(cosine[row, names.index(nearest)]), abs=1e-6)
    assert [found.table[name][12] for name in ("copy_of", "nearest", "similarity")] == ["03", "03", 1.0]
    alike = found.lists["lookalikes"]
    assert {names[row]: found.table["looks_like"][row] for row in alike.drop} == {"13": "05", "14": "07"}
    for row in alike.drop:
        assert f"with {names[alike.beside[row]]}" in alike.evidence[row]
        assert "1.000" not in alike.evidence[row]


def test_a_copy_with_another_label_is_told():
    x = torch.cat([random(8), random(8)[:1]])
    found = curated(tensor_images(x, labels=[0, 1] * 4 + [1]), HOW).lists["duplicates"]
    (row,) = found.drop
    assert f"labels differ: {row // 8}, {1 - row // 8}" in found.evidence[row]
    assert "Another label than the one that is kept: 1." in found.sure


# -------------------------------------------------------------------------------------------------------------- labels


def test_votes_and_what_they_would_find_are_those_of_a_plain_loop():
    """Every single mistake that could be made is made: the share that is flagged is `finds`."""
    labels = np.array(digits_labels()[:60])
    found = neighbourhood(tensor_images(DIGITS[:60]), HOW)
    all_of = doubts(found, labels)
    weights = np.bincount(labels) / 60
    caught = 0.0
    for i, own in enumerate(labels):
        votes = np.bincount(labels[found.nearest[i]], minlength=10)
        others = np.delete(votes, own)
        assert all_of.doubt[i] == pytest.approx((others.max() - votes[own]) / 4)
        assert all_of.flagged[i] == (others.max() > 2)
        for wrong in set(labels) - {own}:
            planted = labels.copy()
            planted[i] = wrong
            caught += doubts(found, planted).flagged[i] * weights[wrong] / (1 - weights[own]) / 60
    assert all_of.finds == pytest.approx(caught, abs=1e-12)
    assert 0.5 < all_of.finds < 1


def digits_labels() -> list[int]:
    from sklearn.datasets import load_digits

    return [int(label) for label in load_digits().target]


def test_planted_wrong_labels_are_first_and_listed():
    labels = digits_labels()[:300]
    wrong = list(range(0, 300, 20))
    planted = [(label + 3) % 10 if i in wrong else label for i, label in enumerate(labels)]
    found = curated(tensor_images(DIGITS[:300], labels=planted)).lists["mislabelled"]
    assert len({*found.order[:15]} & {*wrong}) >= 13
    assert len({*found.drop} & {*wrong}) >= 13
    assert len({*found.drop} - {*wrong}) <= 6
    assert f"{labels[wrong[0]]}" in found.evidence[wrong[0]]


def test_self_influence_orders_and_never_cuts_without_labels():
    own = np.arange(12.0)
    images = tensor_images(random(12))
    told = Model("influence", "captions", own)
    found = curated(images, HOW, told).lists["mislabelled"]
    assert (found.order, found.drop) == ([*range(11, -1, -1)], [])
    assert "no cut" in found.sure
    assert "captions" in found.sure
    assert "rank 1" in found.evidence[11]
    for model in (None, replace(told, reads="")):  # a model that is told nothing knows of no label
        assert "no labels" in curated(images, HOW, model).absent["mislabelled"]
    one = curated(tensor_images(random(12), labels=[1] * 12), HOW)
    assert "all have the same" in one.absent["mislabelled"]


# ------------------------------------------------------------------------------------------------------------ outliers


def test_outliers_are_far_from_all_and_one_colour_is_infinitely_far():
    x = torch.cat([DIGITS[:200], -DIGITS[3:4], torch.full((1, 1, 8, 8), 0.25)])
    found = neighbourhood(tensor_images(x))
    z, far = outliers(found)
    assert set(np.nonzero(far)[0]) >= {200, 201}
    assert far.sum() <= 4
    assert z[201] == np.inf
    apart = np.log(found.apart[:201])
    spread = np.median(np.abs(apart - np.median(apart)))
    np.testing.assert_allclose(z[:201], 0.6745 * (apart - np.median(apart)) / spread, rtol=1e-12)


def test_images_that_are_all_equally_far_have_no_outliers():
    x = torch.eye(6)[:, None, :, None].repeat(1, 1, 1, 6)
    z, far = outliers(neighbourhood(tensor_images(x), HOW))
    assert (z.tolist(), far.any()) == ([0.0] * 6, False)


# ---------------------------------------------------------------------------------------------------------------- harm


def test_harm_is_a_t_test_of_opponents_over_pictures_that_count_alike():
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).double()
    values[:, 3] -= 2
    scaled = values * torch.logspace(-3, 3, 20)[:, None]  # the scale of a picture says nothing
    found = harm(scores_of(torch.cat([scaled, torch.zeros(1, 30)])))  # nor does a picture without scores
    share = -(values / values.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(found.harm, share.mean(0), rtol=1e-10)
    p = ttest_1samp(share, 0, alternative="greater").pvalue
    order = np.argsort(p)
    q = np.minimum.accumulate((p[order] * 30 / np.arange(1, 31))[::-1])[::-1]
    np.testing.assert_allclose(found.q[order], np.minimum(q, 1), rtol=1e-8)
    assert np.nonzero(found.flagged)[0].tolist() == [3]
    assert found.pictures == 20


def test_where_nothing_hurts_hardly_anything_is_said_to():
    """No effect: in at most about one of twenty data sets is there any image on the list."""
    rng = torch.Generator().manual_seed(1)
    any_of = [harm(scores_of(torch.randn(15, 40, generator=rng))).flagged.any() for _ in range(200)]
    assert np.mean(any_of) < 0.1


def test_few_pictures_say_nothing_and_magnitudes_are_refused():
    found = harm(scores_of(-torch.ones(7, 5)))
    assert not found.flagged.any()
    model = Model("influence", "", np.zeros(12), harm(scores_of(-torch.ones(7, 12))))
    assert "7 are too few" in curated(tensor_images(random(12)), HOW, model).lists["hurt"].sure
    with refuses("not which way"):
        harm(scores_of(torch.ones(9, 5), signed=False))


def test_ranks_share_places():
    np.testing.assert_allclose(ranks(np.array([3.0, 1.0, np.nan, 1.0])), [2.5 / 3, 1 / 3, np.nan, 1 / 3])


# --------------------------------------------------------------------------------------------------------- lists of names


@pytest.mark.parametrize("names", [["a.png", "b/c d.png"], ["#1.png", '"q".png', " x", "x\n", "\u202e", "é"], []])
def test_lists_are_read_as_they_were_written(names, tmp_path):
    write_names(tmp_path / "drop.txt", names)
    assert read_names(tmp_path / "drop.txt") == names


def test_lists_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "drop.txt"
    for text, what in (("a\nx\ny\n", "2 of 3 names are no image here: x, y"), ("a\nb\n", "names every image")):
        path.write_text(text)
        with refuses(what, "drop.txt"):
            rows_without(["a", "b"], path)
    path.write_text('a\n"b\n')
    with refuses('"b is no name', "line 2"):
        read_names(path)
    with refuses(where="nowhere.txt"):
        read_names(tmp_path / "nowhere.txt")


def folder(root: Path, left_out: tuple[int, ...] = ()) -> Path:
    """16 little pictures of two classes, some of them not there."""
    x, rows = random(16, 3, (1, 8, 8)), [row for row in range(16) if row not in left_out]
    facts = [{"label": row % 2, "creator": "ab"[row % 3 == 0]} for row in rows]
    return save_png(root, x[rows], [f"{row:02d}" for row in rows], facts)


def test_a_model_is_trained_as_if_the_listed_images_were_not_there(tmp_path):
    """The same weights to the bit as from a folder that never had them; what was trained is the rest."""
    whole, rest = folder(tmp_path / "whole"), folder(tmp_path / "rest", (2, 3, 9))
    for number, names in enumerate((["02.png", "09.png"], ["03.png"])):
        write_names(tmp_path / f"{number}.txt", names)
    lists = ("--without", tmp_path / "0.txt", "--without", tmp_path / "1.txt")
    options = (*TRAINING, "--class_conditional")
    succeeds("train", "new", "--train_data_dir", whole, "--output_dir", tmp_path / "a", *options, *lists)
    succeeds("train", "new", "--train_data_dir", rest, "--output_dir", tmp_path / "b", *options)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert file_digest(tmp_path / "a" / weights) == file_digest(tmp_path / "b" / weights)
    again = ("train", tmp_path / "a", "--train_data_dir", whole, "--output_dir", tmp_path / "c")
    succeeds(*again, "--checkpointing_steps", 3, *lists)
    assert file_digest(tmp_path / "c" / weights) == file_digest(tmp_path / "b" / weights)
    write_names(tmp_path / "2.txt", ["02", "none.png"])
    refused(
        *again[:-1], tmp_path / "d", "--without", tmp_path / "2.txt", says="2 of 2 names are no image here: 02, none"
    )
    assert not (tmp_path / "d").exists() or not list((tmp_path / "d").glob("checkpoint-*"))
    preview = ("preview", tmp_path / "a", "--train_data_dir", rest, "--generate", 1, "--num_inference_steps", 2)
    write_names(tmp_path / "3.txt", ["00.png"])
    seen = [succeeds(*preview, "--without", how, "--output_dir", tmp_path / f"p{i}")
            for i, how in enumerate((tmp_path / "3.txt", "id=00.png"))]  # fmt: skip
    one, two = (json.loads(done.out.splitlines()[0]) for done in seen)
    assert {**one, "without": 0} == {**two, "without": 0}


def test_two_lists_that_together_name_everything_are_refused(tmp_path):
    images = image_folder(folder(tmp_path / "images"))
    for name, rows in (("a", range(8)), ("b", range(8, 16))):
        write_names(tmp_path / f"{name}.txt", [f"{row:02d}.png" for row in rows])
    with refuses("together they name every image", "a.txt"):
        without(images, [tmp_path / "a.txt", tmp_path / "b.txt"])


# ------------------------------------------------------------------------------------------------------------ the command


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_command_without_a_model(tmp_path):
    x = torch.cat([DIGITS[:60], DIGITS[:2]])
    labels = [*digits_labels()[:60], *digits_labels()[:2]]
    names = [*(f"{i:03d}" for i in range(60)), "copy-<script>", "copy-1"]
    data = save_png(tmp_path / "data", x, names, [{"label": label} for label in labels])
    out = tmp_path / "out"
    done = succeeds("clean", data, "--output_dir", out)
    assert f"duplicates: 2 of 62 ({out / 'drop/duplicates.txt'})" in done.out
    assert "hurt: not looked for, it takes --model and --query_data_dir" in done.out
    assert read_names(out / "drop" / "duplicates.txt") == ["copy-1.png", "copy-<script>.png"]
    assert {path.name for path in out.iterdir()} == {
        *("clean.html", "clean.json", "images.csv", "images.parquet", "fiftyone.json", "config.toml", "drop"),
        *("duplicates.csv", "lookalikes.csv", "mislabelled.csv", "outliers.csv", "digests.json"),
    }
    rows = table_of(out / "images.csv")
    assert {row["image"]: row["copy_of"] for row in rows if row["copy_of"]} == {
        "copy-1.png": "001.png",
        "copy-<script>.png": "000.png",
    }
    page = (out / "clean.html").read_text()
    assert "<script" not in page
    assert page.count("How sure?") == 4
    told = read_json(out / "clean.json", dict)
    listed = {name: each["drop"] for name, each in told["lists"].items()}
    assert page.count("<tr><td") == page.count(">listed</span>") == sum(listed.values())
    assert f"{62 - listed['mislabelled']} more follow in <code>mislabelled.csv" in page
    assert told["lists"]["duplicates"]["drop"] == 2
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    succeeds("clean", data, "--output_dir", out)
    assert {path: path.read_bytes() for path in before} == before


def test_the_command_with_a_model(world, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    asked = ("clean", world.images, "--model", world.model, "--set", "dim=32", "--set", "draws=2")
    refused(*asked, says="--set|option of its own")
    asked = (*asked[:4], "--query_data_dir", world.queries, "--output_dir", out)
    done = succeeds(*asked)
    assert f"hurt: 0 of {IMAGES}" in done.out
    assert "mislabelled: not looked for, the images have no labels" in done.out
    assert "3 are too few" in read_json(out / "clean.json", dict)["lists"]["hurt"]["sure"]
    rows = table_of(out / "images.csv")
    assert all(float(row["self_influence"]) > 0 and row["harm"] for row in rows)
    refused(*asked, "--method", "further_training", says="has no self-influence")
    refused("clean", world.images, "--query_data_dir", world.queries, says="applies only with --model")
    refused("clean", world.images, "--output_dir", world.images / "x", says="would be changed")
    refused("clean", world.images, "--near", 2, "--output_dir", out, says="near is 2; accepted: above 0 and below 1")


# -------------------------------------------------------------------------------------------------------------- exports


def made(tmp_path: Path) -> Path:
    images = image_folder(folder(tmp_path / "images"))
    out = tmp_path / "out"
    write(curated(images, HOW), images, out, "x", {})
    return out


def test_datasets_are_told_what_the_columns_are(tmp_path):
    """As `datasets` writes it itself: features in the schema, a picture as bytes or path."""
    table = pq.read_table(made(tmp_path) / "images.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names
    assert features["image"] == {"_type": "Image"}
    assert features["doubt"] == {"dtype": "float64", "_type": "Value"}
    picture = table["image"][0].as_py()
    assert picture["bytes"] is None
    assert Path(picture["path"]).is_absolute()
    assert Path(picture["path"]).name == table["file_name"][0].as_py() == "00.png"


def test_datasets_load_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    found = datasets.load_dataset("parquet", data_files=str(made(tmp_path) / "images.parquet"), split="train",
                                  cache_dir=str(tmp_path / "cache"))  # fmt: skip
    assert len(found) == 16
    assert found[3]["image"].size == (8, 8)
    assert found[3]["file_name"] == "03.png"


def test_fiftyone_gets_samples(tmp_path, monkeypatch):
    out = made(tmp_path)
    samples = read_json(out / "fiftyone.json", list)
    assert samples[1]["ground_truth"] == {"_cls": "Classification", "label": "1"}
    assert samples[1]["filepath"] == str(tmp_path / "images" / "01.png")
    assert all(Path(sample["filepath"]).is_file() for sample in samples)
    assert samples[1]["whence_image"] == "01.png"
    added: list[object] = []
    named = SimpleNamespace(add_samples=added.extend)
    fake = SimpleNamespace(Dataset=lambda name: named, Sample=SimpleNamespace(from_dict=dict))
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    assert library.to_fiftyone(out) is named
    assert added == samples
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with refuses("not installed", "fiftyone", "pip install fiftyone"):
        to_fiftyone(out)
    with refuses("not there", "fiftyone.json", "whence clean"):
        to_fiftyone(tmp_path)


def test_pictures_in_memory_are_exported_by_name_and_this_is_said(tmp_path):
    images = tensors(random(12), "x")
    lines = write(curated(images, HOW), images, tmp_path, "x", {})
    assert any("without showing them" in line for line in lines)
    assert any("no fiftyone.json" in line for line in lines)
    assert "image" not in pq.read_table(tmp_path / "images.parquet").column_names
    assert not (tmp_path / "fiftyone.json").exists()
