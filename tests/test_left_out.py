"""`whence counterfactual` of one's own model: the images that are named are left out, and the model is trained again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from test_cli import TRAINING, noise, refused, succeeds
from test_cli import whence as shell
from whence import Scores
from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.evaluation import ledger
from whence.evaluation.left_out import in_turn
from whence.storage.scores import load_scores

FEW = ("--count", 2, "--random", 2, "--seeds", 2, "--stack", 16, "--draws", 4, "--workers", 1)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its images, and a run folder with the scores of two methods."""
    root = tmp_path_factory.mktemp("own")
    save_png(root / "images", noise(8, 0), [f"{i:02d}" for i in range(8)])
    save_png(root / "queries", noise(2, 1), ["q0", "q1"])
    data = ("--train_data_dir", root / "images")
    succeeds("train", "new", *data, "--output_dir", root / "model", *TRAINING)
    asked = ("--query_data_dir", root / "queries", "--method", "gradient_dot", "--method", "pixel_dot", "--draws", 2)
    succeeds("attribute", root / "model", *data, *asked, "--dim", 8, "--output_dir", root / "run")
    return root


def interrupted(*given: object, **named: object) -> None:
    raise KeyboardInterrupt


def test_the_rise_is_that_of_the_trainings(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C on the way: the same command goes on. What is told is what the ledger in the folder holds."""
    words = ("counterfactual", own / "run", *FEW, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "measure", interrupted)
        assert shell(*words).code == 130
    monkeypatch.setattr(ledger, "stacked_steps", interrupted)  # nothing is trained again
    told = succeeds(*words).out
    found = json.loads((tmp_path / "counterfactual.json").read_text())
    arms = [f"{name}/{k}" for name in ("gradient_dot", "pixel_dot", "random") for k in range(2)]
    assert sorted(found["left_out"]) == arms
    there = ledger.Ledger(tmp_path / "ledger", image_folder(own / "images", 8, 1))
    table, names = there.table("loss"), list(there.images.ids)
    assert {unit.seed for unit in table.units} == {1, 2}  # that of the model itself is 0

    def loss(images: list[str]) -> np.ndarray:
        rows = (table.masks == np.array([name not in images for name in names])).all(1)
        assert rows.sum() == 2
        return table.outputs[rows].mean(0)

    rise = {arm: loss(images) / loss([]) - 1 for arm, images in found["left_out"].items()}
    for method in ("gradient_dot", "pixel_dot"):
        np.testing.assert_allclose(found["rise"][method], [rise[f"{method}/{q}"][q] for q in range(2)], atol=1e-12)
        scores = load_scores(own / "run" / "scores" / method)
        for q in range(2):
            assert sorted(name for name, _ in scores.top(q, 2)) == found["left_out"][f"{method}/{q}"]
    np.testing.assert_allclose(found["rise"]["random"], (rise["random/0"] + rise["random/1"]) / 2, atol=1e-12)
    assert found["said"].replace("\N{NO-BREAK SPACE}", " ") in told


def test_one_set_for_all_pictures(own: Path, tmp_path: Path) -> None:
    """The first of each picture, then the second of each, whatever the size of their scores."""
    scores = Scores(torch.tensor([[9.0, 8, 7, 6], [0.1, 0.2, 0.4, 0.3]]), ["a", "b"], list("wxyz"), {})
    assert [in_turn(scores, count) for count in (1, 2, 3, 4)] == [[0], [0, 2], [0, 1, 2], [0, 1, 2, 3]]
    asked = ("--methods", "pixel_dot", "--together", "--output_dir", tmp_path)
    succeeds("counterfactual", own / "run", *FEW, *asked)
    found = json.loads((tmp_path / "counterfactual.json").read_text())
    assert sorted(found["left_out"]) == ["pixel_dot/0", "random/0", "random/1"]
    assert len(found["rise"]["pixel_dot"]) == 2


def test_what_is_refused(own: Path, tmp_path: Path) -> None:
    words = ("counterfactual", own / "run", "--output_dir")
    refused(*words, tmp_path, "--count", 8, says="8 of 8 images; accepted: 1 to 7")
    refused(
        *words, tmp_path, "--methods", "trak", says="run holds no scores of trak; accepted: gradient_dot, pixel_dot"
    )
    refused(*words, own / "run", says="is the run folder itself")
    refused("counterfactual", "digit", "--output_dir", tmp_path, says="digit: is no folder; accepted: .*digits, icons")
    refused("counterfactual", "digits", "--output_dir", tmp_path, says="accepted: --bench_dir")
    bank = ("counterfactual", "digits", "--bench_dir", tmp_path, "--output_dir", tmp_path)
    refused(*bank, "--together", says="--together: digits is a bank; accepted: it with a run folder")
    refused(*words, tmp_path, "--bench_dir", tmp_path, says="--bench_dir applies only with NAME digits")
    save_png(tmp_path / "images", noise(8, 3), [f"{i:02d}" for i in range(8)])
    refused(
        *words, tmp_path / "a", "--train_data_dir", tmp_path / "images", says="not the training images of the result"
    )
    shutil.copytree(own, tmp_path / "own")
    for path in (tmp_path / "own" / "model").glob("checkpoint-*"):
        shutil.rmtree(path)
    run = tmp_path / "own" / "run"
    refused(
        "counterfactual", run, "--output_dir", tmp_path / "b", says="was not made by `whence train` from these images"
    )
