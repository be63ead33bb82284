"""An index of the training images: made once, shared by runs on other pictures, whose scores live beside each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from forks import fork, stamps
from test_cli import World, noise, refused, succeeds, whence
from whence import attribute, task_from_pretrained, uniform
from whence.data.saving import save_png
from whence.methods.tracin import gradient_dot

pytestmark = pytest.mark.slow

METHODS = {
    "features": ("--method", "d_trak", "--draws", 2, "--dim", 8),
    "curvature": ("--method", "ek_fac", "--draws", 2),
    "pictures": ("--method", "pixel_dot"),
}


def pictures(small: World, tmp: Path, number: int) -> Path:
    return (
        small.queries
        if number == 0
        else save_png(tmp / f"q{number}", noise(4, 20 + number), [f"x{i}" for i in range(4)])
    )


def sizes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*.safetensors") if "scores" not in path.parts)


@pytest.mark.parametrize("name", METHODS)
def test_new_pictures_leave_the_index_alone(small, tmp_path, name):
    index, alone = tmp_path / "index", tmp_path / "alone"
    before = None
    for number in range(2):
        run, queries = tmp_path / f"run{number}", pictures(small, tmp_path, number)
        succeeds(*small.about(run, "--query_data_dir", queries, "--index_dir", index, *METHODS[name]))
        assert before in (None, stamps(index)), "the training images were computed again"
        before = stamps(index)
        shutil.rmtree(alone, ignore_errors=True)
        succeeds(*small.about(alone, "--query_data_dir", queries, *METHODS[name]))
        score = next(alone.glob("scores/*/scores.safetensors")).relative_to(alone)
        assert (run / score).read_bytes() == (alone / score).read_bytes()
        assert sizes(run) < sizes(index)
    assert not (index / "scores").exists()
    succeeds("report", tmp_path / "run0")
    succeeds("replay", next((tmp_path / "run1").glob("scores/*")))


def test_two_query_sets_at_once(small, tmp_path):
    index = tmp_path / "index"
    calls = [
        small.about(tmp_path / f"run{i}", "--query_data_dir", pictures(small, tmp_path, i), "--index_dir", index, *more)
        for i, more in enumerate([(*METHODS["features"], "--budget_mb", 1), METHODS["features"]])
    ]
    forks = [fork(call, tmp_path / "log" / str(i)) for i, call in enumerate(calls)]
    assert [one.code for one in forks] == [0, 0], [one.told for one in forks]
    before = stamps(index)
    for call in calls:
        succeeds(*call)
    assert stamps(index) == before


def test_the_doctor_counts_what_is_not_there_yet(small, tmp_path):
    """And Python takes the same folder."""
    index, count = tmp_path / "index", len([*small.images.glob("*.png")])
    whole = ("doctor", small.model, "--train_data_dir", small.images, "--query_data_dir", small.queries)
    whole = (*whole, "--output_dir", tmp_path / "run", "--method", "gradient_dot", "--draws", 2, "--dim", 8)
    count = len(list(small.images.glob("*.png")))
    before = succeeds(*whole, "--index_dir", index).out
    half = "training images at half 2 of the draws"
    assert f"gradient_dot: {half} ({count} x 8)" in before
    assert "there already" not in before
    assert not index.exists()
    settings = {"draws": uniform(2), "dim": 8}
    first = attribute(small.model, small.images, small.queries, "gradient_dot", tmp_path / "a", index=index, **settings)
    kept = stamps(index)
    assert any("features" in str(path) for path in kept)
    after = succeeds(*whole, "--index_dir", index).out
    assert f"gradient_dot: {index}: {count} of {count} rows of the {half} are there already" in after
    assert f"gradient_dot: {half} ({count} x 8)" not in after
    assert "there already" not in succeeds(*whole).out
    task = task_from_pretrained(small.model, small.images, small.queries, tmp_path / "b", index=index)
    assert torch.equal(gradient_dot(**settings)(task).values, first.values)
    assert stamps(index) == kept
    module = task.trajectory[-1].load(), task.forward
    task = (module, task.train, task.queries, "gradient_dot")
    again = attribute(*task, tmp_path / "c", index=tmp_path / "of a module", **settings)
    assert torch.allclose(again.values, first.values)
    assert any((tmp_path / "of a module").glob("features/*/part-*.safetensors"))


def test_the_doctor_knows_an_index_of_other_images(small, tmp_path):
    succeeds(*small.compare(tmp_path / "run", "--index_dir", tmp_path / "index"))
    call = ("doctor", small.model, "--train_data_dir", small.queries, "--output_dir", tmp_path / "other")
    done = whence(*call, "--index_dir", tmp_path / "index")
    assert done.code == 2
    assert "index belongs to another model or data set" in done.out


def test_an_index_of_other_images_is_refused(small, tmp_path):
    succeeds(*small.compare(tmp_path / "run", "--index_dir", tmp_path / "index"))
    other = small.copy("images", tmp_path)
    (other / "00.png").unlink()
    lines = (other / "metadata.jsonl").read_text().splitlines(keepends=True)
    (other / "metadata.jsonl").write_text("".join(line for line in lines if "00.png" not in line))
    call = ("attribute", small.model, "--train_data_dir", other, "--output_dir", tmp_path / "other")
    call = (*call, "--query_data_dir", small.queries, "--index_dir", tmp_path / "index", "--method", "pixel_dot")
    refused(*call, says="index belongs to another model or data set")
