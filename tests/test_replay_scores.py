"""A result is computed again from its recipe: the same bits, or what differs is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import whence
from errors import refuses
from test_cli import TRAINING, World, refused, succeeds, world  # noqa: F401
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores

METHODS = ("pixel_cosine", "tracin", "trak", "d_trak", "das", "ek_fac")


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A run with several methods, their draws and seed not the default ones."""
    run = tmp_path_factory.mktemp("replay") / "run"
    chosen = [word for name in METHODS for word in ("--method", name)]
    succeeds(*world.about(run), "--query_data_dir", world.queries, "--draws", 2, "--dim", 16, "--seed", 3, *chosen)
    return run


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits(method, finished):
    assert "identical to the last bit" in succeeds("replay", finished / "scores" / method).out


def test_labels_of_images_are_no_classes_of_a_model_without(world, tmp_path):  # noqa: F811
    """The images may have a column `label`: the run is replayed all the same."""
    images = tmp_path / "images"
    shutil.copytree(world.images, images)
    names = sorted(path.name for path in images.glob("*.png"))
    lines = [json.dumps({"file_name": name, "label": f"kind {i % 2}"}) for i, name in enumerate(names)]
    (images / "metadata.jsonl").write_text("\n".join(lines))
    words = [images if word == world.images else word for word in world.about(tmp_path / "run")]
    succeeds(*words, "--query_data_dir", world.queries, "--draws", 2, "--dim", 16, "--method", "trak")
    assert "identical to the last bit" in succeeds("replay", tmp_path / "run/scores/trak").out


def test_errors_are_replayed_as_scores_are(finished, tmp_path):
    """And a run without errors is replayed without: its rows are not means of halves, which round differently."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    _moved(run, finished)
    scores = load_scores(run / "scores" / "trak")
    whence.save_scores(run / "scores" / "trak", whence.Scores(**{**vars(scores), "stderr": 2 * scores.stderr}))
    found = whence.replay(run / "scores" / "trak")
    assert (found.identical, found.apart) == (False, 0.0)
    assert found.again.stderr.equal(scores.stderr)
    assert torch.equal(found.stored.values, found.again.values)


def test_a_run_without_errors(world, tmp_path):  # noqa: F811
    options = ("--query_data_dir", world.queries, "--draws", 4, "--dim", 16, "--method", "trak", "--no_errors")
    succeeds(*world.about(tmp_path / "run"), *options)
    found = whence.replay(tmp_path / "run" / "scores" / "trak")
    assert found.identical
    assert (found.stored.stderr, found.again.stderr) == (None, None)
    assert "brackets" not in (tmp_path / "run" / "report.html").read_text()


def test_pictures_that_were_drawn(world, tmp_path):  # noqa: F811
    drawn = ("--generate", 2, "--num_inference_steps", 3, "--method", "journey_trak", "--draws", 2, "--dim", 16)
    succeeds(*world.about(tmp_path / "run"), *drawn)
    assert whence.replay(tmp_path / "run" / "scores" / "journey_trak").identical


def test_nothing_stored_is_believed(finished, tmp_path):
    """Neither the scores nor the features of the run: a changed score is found, and by how much."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    _moved(run, finished)
    shutil.rmtree(run / "features")
    scores = load_scores(run / "scores" / "d_trak")
    values = scores.values.clone()
    values[0, 0] += 0.5 * values.abs().max()
    whence.save_scores(run / "scores" / "d_trak", whence.Scores(**{**vars(scores), "values": values}))
    found = whence.replay(run / "scores" / "d_trak")
    assert not found.identical
    assert found.apart == pytest.approx(0.5 * float(scores.values.abs().max() / values.abs().max()), rel=1e-6)


def test_what_differs_is_said(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    _moved(run, finished)
    path = run / "scores" / "trak" / "scores.json"
    write_json(path, json.loads(path.read_text()) | {"recipe": read_json(path)["recipe"] | {"torch": "1.0"}})
    found = whence.replay(run / "scores" / "trak")
    assert found.identical
    assert found.different == [f"torch: found '{torch.__version__}', expected '1.0'"]


def test_other_images_are_refused(finished, world):  # noqa: F811
    with refuses(accepted="--query_data_dir") as error:
        whence.replay(finished / "scores" / "trak", queries=world.images)
    assert error.value.accepted.startswith("--query_data_dir")
    others = ("replay", finished / "scores" / "trak", "--train_data_dir", world.queries)
    refused(*others, says="not the training images", warns="byte-identical")


def test_another_model_is_refused(finished, world, tmp_path):  # noqa: F811
    other = ("--train_data_dir", world.images, "--output_dir", tmp_path / "model", *TRAINING, "--seed", 9)
    succeeds("train", "new", *other)
    refused("replay", finished / "scores" / "trak", "--model", tmp_path / "model", says="not the model of the result")


def test_what_is_no_result(tmp_path):
    refused("replay", tmp_path, says="no finished scores")


def _moved(run: Path, before: Path) -> None:
    """Relative paths of a copied run folder point to where they pointed."""
    notes = read_json(run / "images.json")
    for side in ("model", "train", "queries"):
        notes[side]["folder"] = str((before / notes[side]["folder"]).resolve())
    write_json(run / "images.json", notes)
