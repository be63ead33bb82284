"""`whence ledger plan --for` and `whence values`, as people use them, with the mistakes they make."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import whence
from test_cli import World, refused, succeeds
from whence.evaluation.source import opened_ledger
from whence.storage.files import read_json
from whence.storage.scores import load_scores


def plan(small: World, root: Path, *more: object) -> tuple[object, ...]:
    data = ("--model", small.model, "--train_data_dir", small.images, "--stack", 2)
    return ("ledger", "plan", root, *data, *more)


@pytest.fixture(scope="module")
def played(small: World, tmp_path_factory) -> Path:
    """A ledger of all coalitions of two creators, measured."""
    root = tmp_path_factory.mktemp("values") / "ledger"
    said = succeeds(*plan(small, root, "--for", "shapley", "--for", "leave_one_out", "--by", "creator")).out
    data = ("--train_data_dir", small.images)
    assert "8 trainings of 6 steps, 2 together: " in said, "four coalitions of two creators at two seeds, nothing twice"
    assert "of one process here" in said
    succeeds("ledger", "run", root, *data)
    succeeds("ledger", "measure", root, *data, "--query_data_dir", small.queries, "--draws", 2)
    return root


def call(small: World, root: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--train_data_dir", small.images, "--query_data_dir", small.queries, "--output_dir", out)
    return ("values", root, *data, *more)


def test_values_of_creators_sum_to_what_training_is_worth(small, played, tmp_path):
    said = succeeds(
        *call(small, played, tmp_path, "--by", "creator", "--method", "shapley", "--method", "leave_one_out")
    ).out
    assert "shapley: 3 x 2 values; standard errors: of seeds" in said
    scores = load_scores(tmp_path / "scores/shapley")
    assert (scores.train_ids, scores.scale) == (["anna", "ben"], "value")
    ledger = opened_ledger(played, small.images)
    table = ledger.table("loss")
    size = table.masks.sum(axis=1)
    everything, nobody = (torch.tensor(table.outputs[size == some]).mean(0) for some in (12, 0))
    assert torch.allclose(scores.values.sum(1), nobody - everything, atol=1e-6)
    assert scores.stderr.shape == (3, 2)
    assert bool((scores.stderr > 0).all())
    rows = pq.read_table(tmp_path / "scores/shapley/top.parquet").to_pylist()
    assert {"stderr", "first_rank", "last_rank"} <= rows[0].keys()
    page = (tmp_path / "report.html").read_text()
    assert "What was each creator worth to these pictures?" in page
    assert "anna" in page
    again = whence.values(ledger, "shapley", by="creator")
    assert torch.equal(again.values, scores.values)


def test_the_page_of_values_is_written_again(small, played, tmp_path):
    succeeds(*call(small, played, tmp_path, "--by", "creator"))
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    succeeds("report", tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_what_the_ledger_lacks_is_told_with_the_plan_to_make(small, played, tmp_path):
    refused(
        *call(small, played, tmp_path, "--method", "empirical_influence"),
        says="empirical_influence: no random subset.*whence ledger plan --for empirical_influence",
    )
    refused(
        *call(small, played, tmp_path, "--method", "leave_one_out"),
        says="no training leaves out '00.png' alone",
    )
    refused(*call(small, played, tmp_path, "--by", "artist"), says="by: no column 'artist'.*accepted: image, creator")
    refused(
        *call(small, played, tmp_path, "--method", "shaply"), says="--method shaply; accepted: leave_one_out, shapley"
    )
    refused(*call(small, played, tmp_path, "--set", "alpha=1"), says="--set alpha: shapley takes none")
    refused(*call(small, played, tmp_path, "--name", "elbo"), says="nothing was measured as 'elbo'; accepted: loss")
    assert not (tmp_path / "scores").exists()


def test_other_pictures_than_were_measured_are_refused(small, played, tmp_path):
    data = ("--train_data_dir", small.images, "--query_data_dir", small.images, "--output_dir", tmp_path)
    refused("values", played, *data, "--by", "creator", says="holds other pictures than were measured as 'loss'")


def test_settings_reach_their_method_and_are_of_its_kind(small, played, tmp_path):
    words = ("--by", "creator", "--method", "beta_shapley", "--set")
    succeeds(*call(small, played, tmp_path / "a", *words, "alpha=1"))
    succeeds(*call(small, played, tmp_path / "b", *words, "alpha=9"))
    one, nine = (load_scores(tmp_path / name / "scores/beta_shapley") for name in "ab")
    assert one.recipe["method"]["alpha"] == 1
    assert not torch.equal(one.values, nine.values)
    refused(*call(small, played, tmp_path / "c", *words, "alpha=much"), says="alpha is 'much'; accepted: a number")


def test_one_seed_says_that_noise_cannot_be_told(small, tmp_path):
    data = ("--train_data_dir", small.images)
    succeeds(*plan(small, tmp_path / "ledger", "--for", "leave_one_out", "--by", "creator", "--seeds", 1))
    succeeds("ledger", "run", tmp_path / "ledger", *data)
    succeeds("ledger", "measure", tmp_path / "ledger", *data, "--query_data_dir", small.queries, "--draws", 2)
    succeeds(
        *call(small, tmp_path / "ledger", tmp_path / "out", "--by", "creator", "--method", "leave_one_out"),
        warns="one seed, so that how much of the values is noise cannot be told; plan with --seeds 2 or more",
    )
    assert bool(load_scores(tmp_path / "out/scores/leave_one_out").stderr.isnan().all())


def test_knn_shapley_votes_for_a_column_of_both_sides(small, played, tmp_path):
    refused(
        *call(small, played, tmp_path, "--method", "knn_shapley"),
        says="training images have no column 'label' to vote for",
    )
    words = (
        "values",
        played,
        "--train_data_dir",
        small.images,
        "--query_data_dir",
        small.images,
        "--output_dir",
        tmp_path,
    )
    succeeds(*words, "--method", "knn_shapley", "--set", "column=creator", "--set", "k=3")
    scores = load_scores(tmp_path / "scores/knn_shapley")
    assert scores.values.shape == (12, 12)
    assert float(scores.stderr.abs().max()) == 0


def test_plans_that_are_not_possible(small, tmp_path):
    refused(*plan(small, tmp_path / "l", "--by", "creator"), says="--by applies only with --for")
    refused(
        *plan(small, tmp_path / "l", "--for", "shaply"),
        says="no method 'shaply' reads a ledger; accepted: leave_one_out",
    )
    refused(*plan(small, tmp_path / "l", "--for", "shapley", "--by", "artist"), says="no column 'artist'")
    refused(
        *plan(small, tmp_path / "l", "--for", "shapley", "--by", "creator", "--runs", 5),
        says="all coalitions of 2 players",
    )
    assert not (tmp_path / "l/plan.json").exists()


def test_a_plan_without_it_is_what_it_was(small, tmp_path):
    succeeds(*plan(small, tmp_path / "l", "--test", 4, "--tune", 3))
    units = read_json(tmp_path / "l/plan.json")["units"]
    assert [unit["role"] for unit in units] == ["other"] * 2 + ["test"] * 8 + ["tune"] * 6
