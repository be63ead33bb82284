"""Where two results meet, both are of the same model, training images and pictures: by content, whatever their names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from test_cli import TRAINING, refused, succeeds
from test_first_day import mine  # noqa: F401
from whence import Scores, save_scores
from whence.storage.scores import load_scores
from whence.view.run import open_run

FEW = "4 test subsets say little"
SMALL = ("--draws", 2, "--dim", 8)
METHODS = ("--method", "gradient_dot", "--method", "pixel_dot", *SMALL)


def scored(mine: Path, run: Path, model: Path, *more: object) -> Path:  # noqa: F811
    """A run folder of scores of a model, for the images and queries of the ledger."""
    sides = ("--train_data_dir", mine / "images", "--query_data_dir", mine / "queries")
    succeeds("attribute", model, *sides, *(more or METHODS), "--output_dir", run)
    return run


def judged(mine: Path, run: Path, *more: object) -> tuple[object, ...]:  # noqa: F811
    return ("lds", run, "--ledger", mine / "ledger", "--train_data_dir", mine / "images", *more)


def trained(mine: Path, root: Path, *more: object) -> Path:  # noqa: F811
    """A folder with a model on the images of the ledger, and its scores."""
    succeeds("train", "new", "--train_data_dir", mine / "images", "--output_dir", root / "model", *TRAINING, *more)
    scored(mine, root / "run", root / "model", *METHODS, "--method", "tracin")
    return root


@pytest.fixture(scope="module")
def again(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A model by the recipe of the ledger's, with another seed, and its scores."""
    return trained(mine, tmp_path_factory.mktemp("again"), "--seed", 7)


@pytest.fixture(scope="module")
def other(mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A model by another recipe, and its scores."""
    return trained(mine, tmp_path_factory.mktemp("other"), "--learning_rate", 0.01)


def test_scores_of_another_model_are_judged_only_on_purpose(mine: Path, other: Path, tmp_path: Path) -> None:  # noqa: F811
    """Pixels are of no model; what is judged on purpose is said to be so, on the terminal and on the page."""
    run = other / "run"
    refused(*judged(mine, run), says=r"the scores of gradient_dot, tracin are of another .*mine\d.model.*--transfer")
    assert not (run / "lds.json").exists()
    done = succeeds(*judged(mine, run, "--transfer"), warns=FEW)
    assert "of another model than was retrained: gradient_dot, tracin\n" in done.out
    found = json.loads((run / "lds.json").read_text())["methods"]
    assert [name for name, one in found.items() if one["transfer"]] == ["gradient_dot", "tracin"]
    succeeds("report", run)
    assert (run / "report.html").read_text().count("of another model than was retrained") == 2


def test_another_seed_of_the_recipe_is_what_the_ledger_retrains(mine: Path, again: Path, tmp_path: Path) -> None:  # noqa: F811
    """Whichever seed the attributed model had, the ledger's trainings have others; no option is needed, but its recipe."""
    shutil.copytree(again / "run", tmp_path / "root" / "run")
    run = tmp_path / "root" / "run"
    shutil.copytree(again / "model", tmp_path / "root" / "model")
    succeeds(*judged(mine, run), warns=FEW)
    succeeds(*judged(mine, run, "--transfer"), warns=FEW)
    found = json.loads((run / "lds.json").read_text())["methods"]
    assert not any(one["transfer"] for one in found.values())
    shutil.rmtree(tmp_path / "root" / "model")
    refused(*judged(mine, run), says="gradient_dot, tracin are of another model")  # nobody can tell any more


def test_a_method_that_trains_is_of_the_recipe(mine: Path, tmp_path: Path) -> None:  # noqa: F811
    """Its scores are of no single model, and of no other one either."""
    few = ("--method", "averaged_metagradient", "--method", "tracin", "--set", "masks=2", *SMALL)
    succeeds(*judged(mine, scored(mine, tmp_path / "run", mine / "model", *few)), warns=FEW)


@pytest.fixture
def mixed(mine: Path, again: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A run folder into which scores of another model were copied, beside its own."""
    run = scored(mine, tmp_path / "run", mine / "model")
    for method in ("gradient_dot", "pixel_dot"):
        shutil.copytree(again / "run" / "scores" / method, run / "scores" / f"other_{method}")
    return run


def test_scores_of_another_model_are_in_no_table_of_a_run(mixed: Path) -> None:
    """Methods agree or do not about one model; what looks at pictures alone is of none."""
    gone = "the scores of other_gradient_dot are of another model than the run, and are not on the page"
    succeeds("report", mixed, warns=gone)
    page = (mixed / "report.html").read_text()
    assert "other_pixel_dot" in page
    assert "other_gradient_dot" not in page
    run = open_run(mixed)
    assert {*run.methods} == {"gradient_dot", "pixel_dot", "other_pixel_dot"}
    assert "left out, because their scores are of another model: other_gradient_dot" in run.told
    asked, says = ("--method", "other_gradient_dot"), "scores of another model than .*index.json tells"
    refused("credit", mixed, "--by", "creator", *asked, says=says)
    refused("contrast", mixed, "--this", "q0", "--not_that", "q1", *asked, says=says)


def test_values_by_retraining_are_of_what_was_scored(mine: Path, again: Path, other: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of another seed of its recipe too, as all retraining is; not of another recipe, and by content, not by name."""
    study = json.loads((mine / "ledger" / "plan.json").read_text())["study"]
    own = load_scores(again / "run" / "scores" / "gradient_dot")
    of = {name: own.recipe[name] for name in ("train", "queries")}
    recipe = {"values": {"by": "creator"}, "ledger": {"study": study}, **of}
    for name, differs in {"same": {}, "images": {"train": "x"}, "queries": {"queries": "x"}}.items():
        counts = {"images": [8, 4]}
        truth = Scores(torch.rand(3, 2), own.query_ids, ["anna", "ben"], recipe | differs, "value", train_meta=counts)
        save_scores(tmp_path / name / "scores" / "leave_one_out", truth)
    asked = ("--by", "creator", "--method", "gradient_dot", "--values")
    refused("credit", again / "run", *asked, tmp_path / "same", says="2 contributors have scores and values")  # so far
    refused(
        "credit", other / "run", *asked, tmp_path / "same", says="of other trainings than that of the model that was"
    )
    refused("credit", again / "run", *asked, tmp_path / "images", says="of other training images than the scores")
    refused("credit", again / "run", *asked, tmp_path / "queries", says="of other pictures than the scores")
