"""An index: what is asked of it later is what `whence attribute` says, and no training image is measured again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import whence
from errors import refuses
from test_cli import SMALL, World, refused, succeeds, world  # noqa: F401
from whence.data.images import image_folder
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores
from whence.types import Engine, WhenceError


def build(world: World, into: Path, *more: object) -> tuple[object, ...]:  # noqa: F811
    data = (world.model, "--train_data_dir", world.images)
    return ("index", "build", *data, "--output_dir", into, *SMALL, *more)


@pytest.fixture(scope="module")
def index(world: World, tmp_path_factory) -> Path:  # noqa: F811
    into = tmp_path_factory.mktemp("index") / "index"
    out = succeeds(*build(world, into, "--method", "trak", "--method", "relatif_loss")).out
    assert f"next: whence query {into}" in out
    return into


def files(folder: Path) -> dict[str, bytes]:
    kinds = ("features", "systems")
    return {str(path): path.read_bytes() for kind in kinds for path in (folder / kind).rglob("*") if path.is_file()}


def test_an_answer_is_what_attribute_says_to_the_bit_and_nothing_is_measured_again(world, index, tmp_path, monkeypatch):  # noqa: F811
    whole, asked = tmp_path / "whole", tmp_path / "asked"
    succeeds(*world.attribute(whole, "--method", "trak", "--method", "relatif_loss"))
    before = files(index)
    assert any("systems" in name for name in before)
    succeeds("query", index, "--query_data_dir", world.queries, "--output_dir", asked)
    assert files(index) == before
    for method in ("trak", "relatif_loss"):
        a, b = load_scores(whole / "scores" / method), load_scores(asked / "scores" / method)
        assert torch.equal(a.values, b.values)
        assert torch.equal(a.stderr, b.stderr)
        assert a.recipe["call"] == b.recipe["call"]
        assert list(a.train_ids) == list(b.train_ids)
    assert (asked / "report.html").is_file()
    succeeds("replay", asked / "scores" / "trak")


def test_a_run_folder_is_an_index_of_its_methods(world, tmp_path):  # noqa: F811
    run, other = tmp_path / "run", tmp_path / "other"
    succeeds(*world.attribute(run, "--method", "trak"))
    shutil.copytree(world.queries, tmp_path / "copies")
    succeeds("query", run, "--query_data_dir", tmp_path / "copies", "--output_dir", other)
    a, b = load_scores(run / "scores" / "trak"), load_scores(other / "scores" / "trak")
    assert torch.equal(a.values, b.values)


def test_an_open_index_answers_again_and_again(world, index, tmp_path, monkeypatch):  # noqa: F811
    opened = whence.Index.open(index)
    assert list(opened.methods) == ["trak", "relatif_loss"]
    first = opened.query(world.queries)
    size, channels = opened.request.size, opened.request.opened.channels
    pictures = image_folder(world.queries, size, channels)
    model = opened.request.opened
    second = opened.query(pictures, top=2)
    assert opened.asking(pictures).opened is model, "opened again"
    assert [name for name, _ in second.top(0, 2)] == [name for name, _ in first.top(0, 2)]
    assert opened.query(world.queries, "RelatIF loss").recipe["call"]["method"] == "relatif_loss"
    kept = sorted((index / "queries").iterdir())
    assert len(kept) == 1, "the same pictures have one run folder"
    with refuses("the index was not built for 'd_trak'", str(index), "trak, relatif_loss"):
        opened.query(world.queries, "d_trak")
    with refuses("is the index itself", str(index), "a run folder of its own"):
        opened.query(world.queries, root=index)


def test_other_images_or_another_model_are_refused(world, index, tmp_path):  # noqa: F811
    other = tmp_path / "images"
    shutil.copytree(world.images, other)
    Image.new("L", (8, 8), 7).save(other / "00.png")
    call = ("query", index, "--query_data_dir", world.queries, "--output_dir", tmp_path / "out")
    refused(*call, "--train_data_dir", other, says="belongs to another model or data set")
    model = tmp_path / "model"
    shutil.copytree(world.model, model)
    weights = next(path for path in model.rglob("*.safetensors") if "checkpoint" not in str(path))
    found = load_file(weights)
    name = next(iter(found))
    save_file({**found, name: found[name] + 1}, weights)
    refused(*call, "--model", model, says="belongs to another model or data set")
    assert not (tmp_path / "out" / "scores").exists()


def test_images_that_moved_are_found_where_they_are_now(world, index, tmp_path):  # noqa: F811
    moved = tmp_path / "moved"
    shutil.copytree(world.images, moved)
    broken = tmp_path / "further" / "down" / "index"
    shutil.copytree(index, broken)  # paths seen from there lead nowhere
    call = ("query", broken, "--query_data_dir", world.queries, "--output_dir", tmp_path / "out")
    refused(*call, says="")
    succeeds(*call, "--model", world.model, "--train_data_dir", moved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float99"}, "number format 'float99'"),
        ({"methods": {"trakk": {}}, "order": ["trakk"]}, "trakk"),
        ({"methods": {"trak": {"dimm": 3}}, "order": ["trak"]}, "dimm"),
        ({"order": ["trak"]}, "relatif_loss"),
        ({"methods": [1]}, "methods"),
    ],
)
def test_an_index_that_was_changed_by_hand_is_refused_in_a_line(world, index, tmp_path, change, says):  # noqa: F811
    copy = tmp_path / "index"
    shutil.copytree(index, copy)
    write_json(copy / "built.json", {**read_json(copy / "built.json", dict, ""), **change})
    with pytest.raises(WhenceError) as caught:
        whence.Index.open(copy, Engine(), world.model, world.images).query(world.queries)
    assert says in str(caught.value)


def test_what_is_no_index_is_refused(world, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none", world.images):
        refused("query", folder, "--query_data_dir", world.queries, says="is no index")
    refused("query", world.model, says="either as --query_data_dir FOLDER or as --generate N")


def test_an_index_of_an_interrupted_build_goes_on(world, index, tmp_path, monkeypatch):  # noqa: F811
    into = tmp_path / "half"
    shutil.copytree(index, into)
    (into / "built.json").unlink()
    (into / "images.json").unlink()
    refused("query", into, "--query_data_dir", world.queries, says="is no index")
    before = files(into)
    succeeds(*build(world, into, "--method", "trak", "--method", "relatif_loss"))
    assert files(into) == before
    assert read_json(into / "built.json", dict, "")["methods"] == read_json(index / "built.json", dict, "")["methods"]


def test_features_in_half_the_room_are_those_of_the_index(world, tmp_path):  # noqa: F811
    into = tmp_path / "narrow"
    succeeds(*build(world, into, "--method", "gradient_dot", "--feature_dtype", "bfloat16"))
    opened = whence.Index.open(into)
    assert opened.request.engine.feature_dtype == torch.bfloat16
    assert opened.query(world.queries).recipe["feature_dtype"] == "torch.bfloat16"
