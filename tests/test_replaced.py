"""What users are told to do with a damaged file, done: the same command goes on with the images that are the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from agreement import close
from test_cli import World, noise, refused, succeeds, world  # noqa: F401
from test_cli import whence as shell
from whence.data.saving import save_png
from whence.features.parts import Gradient
from whence.storage.scores import load_scores

METHOD = ("--method", "gradient_dot", "--draws", 2, "--dim", 8)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images were measured, each time."""
    counts, real = [], Gradient.compute

    def compute(self: Gradient, *given: Any) -> torch.Tensor:
        counts.append(given[3])
        return real(self, *given)

    monkeypatch.setattr(Gradient, "compute", compute)
    return counts


def damaged(images: Path) -> bytes:
    """One picture is cut short; returns what it was."""
    path = images / "05.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    return whole


@pytest.mark.parametrize("looks", [(), ("--copy_rate", 0)], ids=["found by the look for copies", "found by the method"])
def test_a_file_replaced_as_told(looks: tuple, world: World, tmp_path: Path) -> None:  # noqa: F811
    images = world.copy("images", tmp_path)
    whole = damaged(images)
    words = ("attribute", world.model, "--train_data_dir", images, "--query_data_dir", world.queries, *METHOD, *looks)
    words = (*words, "--output_dir", tmp_path / "run")
    refused(*words, says="05.png: not a readable image .*; replace or remove the file")
    (images / "05.png").write_bytes(whole)
    succeeds(*words)
    succeeds("verify", tmp_path / "run")


def test_an_index_measures_what_is_new_alone(world: World, tmp_path: Path, measured: list[int]) -> None:  # noqa: F811
    """A picture is replaced, another is removed; scores are those of an index built from the start."""
    images, index = world.copy("images", tmp_path), tmp_path / "index"
    build = ("index", "build", world.model, "--train_data_dir", images, *METHOD, "--output_dir")
    succeeds(*build, index)
    query = ("query", index, "--query_data_dir", world.queries, "--output_dir")
    succeeds(*query, tmp_path / "before")
    shutil.copy(save_png(tmp_path / "new", noise(1, 99), ["05"]) / "05.png", images)
    lines = (images / "metadata.jsonl").read_text().splitlines()
    (images / "metadata.jsonl").write_text("\n".join(line for line in lines if "03.png" not in line))
    (images / "03.png").unlink()
    refused(*query, tmp_path / "after", says="index belongs to another model or data set")
    measured.clear()
    succeeds(*build, index, warns="on other images")
    assert measured == [1] * 4  # in either half of the draws: the picture that is new, and one to ask about
    succeeds(*query, tmp_path / "after", warns="on other images")
    succeeds(*build, tmp_path / "anew", warns="on other images")
    succeeds(
        "query", tmp_path / "anew", "--query_data_dir", world.queries, "--output_dir", tmp_path / "other", warns="on"
    )
    kept, fresh = (load_scores(tmp_path / name / "scores" / "gradient_dot") for name in ("after", "other"))
    assert kept.train_ids == fresh.train_ids
    close(kept.values, fresh.values, 1e-5)
    succeeds("verify", index)


def test_a_run_that_was_stopped_goes_on_with_the_images_that_are_the_same(
    world: World,  # noqa: F811
    tmp_path: Path,
    measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C once the training images are measured; one of them is replaced, and the same command is given again. What
    holds scores of the images as they were is left as it is, and it is said what to do."""
    images, run = world.copy("images", tmp_path), tmp_path / "run"
    words = ("attribute", world.model, "--train_data_dir", images, "--query_data_dir", world.queries, *METHOD)
    words = (*words, "--copy_rate", 0, "--output_dir", run)
    with monkeypatch.context() as patch:
        patch.setattr("whence.task.reports.save_scores", interrupted)
        assert shell(*words).code == 130
    (images / "05.png").write_bytes((images / "06.png").read_bytes())
    measured.clear()
    succeeds(*words, warns="on other images|byte-identical")
    assert sum(measured) == 0  # both are known: the content counts, not the name
    (images / "05.png").write_bytes((images / "07.png").read_bytes())
    refused(*words, says="run belongs to another model or data set .train: .*; choose another output folder")


def interrupted(*given: object) -> None:
    raise KeyboardInterrupt


def test_a_ledger_whose_image_was_damaged(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Its trainings are of the images of its plan: restored, they go on; otherwise it is said what to do."""
    images, ledger = world.copy("images", tmp_path), tmp_path / "ledger"
    data = ("--train_data_dir", images)
    plan = ("ledger", "plan", ledger, "--model", world.model, *data, "--test", 1, "--seeds", 1, "--stack", 2)
    whole = damaged(images)
    refused(*plan, says="05.png: not a readable image .*; replace or remove the file")
    (images / "05.png").write_bytes(whole)
    succeeds(*plan)
    damaged(images)
    run = ("ledger", "run", ledger, *data, "--workers", 1)
    refused(*run, says="it was planned for other images; accepted: those of the plan")
    (images / "05.png").write_bytes(whole)
    succeeds(*run)
    (images / "05.png").unlink()
    refused(*run, says="metadata.jsonl lists 1 files that are not there: 05.png; restore the files")
