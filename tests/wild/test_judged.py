"""`whence lds`: scores are judged by trainings and measurements of the same pictures, told by their content."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from test_cli import World, noise, refused, succeeds
from whence.data.saving import save_png

pytestmark = pytest.mark.slow


def ledger(small: World, root: Path, tests: int = 4, seeds: int = 1, queries: Path | None = None) -> Path:
    data = ("--train_data_dir", small.images)
    counts = ("--test", tests, "--tune", 0, "--seeds", seeds, "--stack", 4)
    succeeds("ledger", "plan", root, "--model", small.model, *data, *counts)
    succeeds("ledger", "run", root, *data)
    succeeds("ledger", "measure", root, *data, "--query_data_dir", queries or small.queries, "--draws", 2)
    return root


@pytest.fixture(scope="module")
def one_seed(small, tmp_path_factory) -> Path:
    return ledger(small, tmp_path_factory.mktemp("one") / "ledger")


def lds(small: World, run: Path, root: Path) -> tuple[object, ...]:
    return ("lds", run, "--ledger", root, "--train_data_dir", small.images)


@pytest.mark.parametrize(("tests", "seeds"), [(4, 1), (3, 2), (4, 2)])
def test_an_lds_takes_no_second_seed(small, one_seed, tmp_path, tests, seeds):
    """Only the ceiling does."""
    run = tmp_path / "run"
    root = one_seed if (tests, seeds) == (4, 1) else ledger(small, tmp_path / "ledger", tests, seeds)
    succeeds(*small.compare(run))
    told = succeeds(*lds(small, run, root), warns=f"{tests} test subsets say little").out
    assert "pixel_dot" in told
    has_ceiling = tests >= 4 and seeds > 1
    assert ("no ceiling: it takes 4 subsets and 2 seeds" in told) is not has_ceiling
    assert any(line.startswith("ceiling") for line in told.splitlines()) is has_ceiling


def test_what_makes_an_lds_say_little_is_told(small, one_seed, tmp_path):
    """Few subsets, trainings that are not there, and scores of a model that is not the one that was retrained."""
    succeeds(*small.about(tmp_path / "own", "--query_data_dir", small.queries, "--method", "pixel_dot"))
    told = succeeds(*lds(small, tmp_path / "own", one_seed), warns="4 test subsets say little").err
    assert "another model" not in told
    assert "are measured" not in told

    other, root = World(tmp_path), tmp_path / "ledger"
    shutil.copytree(small.model, other.model)
    weights = other.model / "unet/diffusion_pytorch_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    words = ("attribute", other.model, "--train_data_dir", small.images, "--output_dir", tmp_path / "run")
    succeeds(*words, "--query_data_dir", small.queries, "--method", "gradient_dot", "--draws", 2)
    shutil.copytree(one_seed, root)
    next(root.glob("measurements/loss/*1.safetensors")).unlink()
    says = re.escape(f"the scores of gradient_dot are of another model than {root} retrains ({small.model})")
    refused(*lds(small, tmp_path / "run", root), says=says)  # of its recipe, but not what that left
    told = succeeds(*lds(small, tmp_path / "run", root), "--transfer", warns="3 of 4 test trainings are measured").out
    assert "of another model than was retrained: gradient_dot" in told


def test_nothing_is_measured_where_nothing_was_trained(small, tmp_path):
    data, root = ("--train_data_dir", small.images), tmp_path / "ledger"
    succeeds("ledger", "plan", root, "--model", small.model, *data, "--test", 2, "--tune", 0, "--stack", 2)
    measure = ("ledger", "measure", root, *data, "--query_data_dir", small.queries, "--draws", 2)
    refused(*measure, says="holds no measured unit yet; run the ledger, then measure")
    succeeds("ledger", "run", root, *data, "--shard", "0/2")
    assert re.search(r"measured 3 queries as 'loss' in [1-5] of 6 trainings", succeeds(*measure).out)


def test_queries_of_the_same_names_but_other_content(small, one_seed, tmp_path):
    others = save_png(tmp_path / "queries", noise(3, 9), [f"q{i}" for i in range(3)])
    succeeds(*small.about(tmp_path / "run", "--query_data_dir", others, "--method", "pixel_dot"))
    says = "the scores of pixel_dot are for pictures of the same names, but other queries than .*measurements/loss"
    refused(*lds(small, tmp_path / "run", one_seed), says=says)


def test_one_query_of_other_content(small, one_seed, tmp_path):
    others = small.copy("queries", tmp_path)
    (others / "q1.png").write_bytes((others / "q0.png").read_bytes())
    succeeds(*small.about(tmp_path / "run", "--query_data_dir", others, "--method", "pixel_dot"))
    refused(*lds(small, tmp_path / "run", one_seed), says="but other queries")


def test_training_images_of_the_same_names_but_other_content(small, one_seed, tmp_path):
    others = small.copy("images", tmp_path)
    (others / "05.png").write_bytes((others / "06.png").read_bytes())
    words = ("attribute", small.model, "--train_data_dir", others, "--output_dir", tmp_path / "run")
    succeeds(*words, "--query_data_dir", small.queries, "--method", "pixel_dot", warns="trained .* on other images")
    refused(*lds(small, tmp_path / "run", one_seed), says="same names, but other training images than the ledger")


def test_the_same_pictures_in_another_folder(small, one_seed, tmp_path):
    others = small.copy("queries", tmp_path)
    succeeds(*small.about(tmp_path / "run", "--query_data_dir", others, "--method", "pixel_dot"))
    succeeds(*lds(small, tmp_path / "run", one_seed), warns="subsets say little")
