"""Credit: shares by hand, what splitting gives, intervals that cover, and the receipt."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from errors import refuses
from test_cli import refused, succeeds, whence
from whence.evaluation.credit import SURE, UNKNOWN, UNSURE, Sums, agreement, credit, shares, sums_of
from whence.evaluation.receipts import check_receipt
from whence.methods.removal import semivalues
from whence.storage.files import read_json, write_json
from whence.storage.scores import save_scores
from whence.types import Scores

META = {"creator": ["ann", "ben", "ann", None, "ben"], "allowed": ["yes", "no", "yes", "yes", "no"]}
VALUES = torch.tensor([[3.0, 1.0, -1.0, 1.0, -3.0], [0.0, 4.0, 2.0, -1.0, 2.0]])


def scores(values: torch.Tensor = VALUES, stderr: torch.Tensor | None = None, **more: object) -> Scores:
    names = [f"q{j}" for j in range(len(values))]
    recipe = {"queries": "x", "train": "y", **more.pop("recipe", {})}
    return Scores(values, names, list("abcde"), recipe, train_meta=META, stderr=stderr, stderr_of="draws", **more)


def test_shares_by_hand():
    """ann, ben, unknown: sums (2, -2, 1) and (2, 6, -1): shares (2/3, 0, 1/3) and (1/4, 3/4, 0)."""
    sums = sums_of(scores(), "creator")
    assert (list(sums.names), list(sums.images)) == (["ann", "ben", "unknown"], [2, 2, 1])
    np.testing.assert_allclose(sums.values, [[2, -2, 1], [2, 6, -1]])
    found = credit(sums)
    np.testing.assert_allclose(found.of_picture, [[2 / 3, 0, 1 / 3], [1 / 4, 3 / 4, 0]])
    np.testing.assert_allclose(found.share, [11 / 24, 9 / 24, 4 / 24])
    np.testing.assert_allclose(found.per_image, [11 / 48, 9 / 48, 4 / 24])
    # With an account for each image ann would have 3 of 4 and 2 of 8, ben 1 of 4 and 6 of 8.
    np.testing.assert_allclose(found.split, [(3 / 4 - 2 / 3) / 2, (1 / 4) / 2, 0], atol=1e-12)


def test_scores_that_are_never_below_0_are_told_to_give_everybody_a_share():
    assert credit(sums_of(scores(), "creator")).caution == ""
    likeness = 5 + VALUES
    assert "whoever has images gets a share" in credit(sums_of(scores(likeness), "creator")).caution
    likeness[0, 4] = -0.1
    assert "whoever has images gets a share" in credit(sums_of(scores(likeness), "creator")).caution
    assert credit(Sums(["a", "b"], [1, 1], np.ones((2, 2)), None, None)).caution == ""  # values of contributors


def test_pictures_that_nobody_did_anything_for_are_nobodys():
    assert shares([[-1.0, -2.0], [1.0, 3.0]]).tolist() == [[0, 0], [0.25, 0.75]]
    found = credit(Sums(["a", "b"], [1, 1], np.array([[-1.0, -2.0]] * 4), np.full((4, 2), 0.01), None))
    assert found.share.tolist() == [0, 0]
    assert found.rest == 1
    assert found.advice == [UNSURE, UNSURE]


def test_a_share_below_its_noise_is_a_flat_fee_and_belongs_to_the_rest():
    phi, rng = np.tile([10.0, 0.5, 5.0], (6, 1)), np.random.default_rng(0)
    phi = phi + rng.normal(size=phi.shape) * [0.1, 0.0, 0.1]
    errors = np.tile([0.5, 5.0, 0.5], (6, 1))
    found = credit(Sums(["a", "b", "c"], [3, 3, 3], phi, errors, None))
    assert found.advice[0] == found.advice[2] == SURE
    exact = credit(Sums(["a", "b", "c"], [3, 3, 3], phi, np.zeros_like(phi), None))
    assert exact.advice == [SURE] * 3
    assert exact.rest == pytest.approx(0, abs=1e-12)
    worse = credit(Sums(["a", "b", "c"], [3, 3, 3], phi[:1], 10 * errors[:1], None))
    assert worse.advice[1] == UNSURE
    assert worse.rest >= worse.share[1] - 1e-12


def test_one_picture_without_errors_has_no_interval():
    found = credit(Sums(["a", "b"], [1, 1], np.array([[3.0, 1.0]]), None, None))
    assert found.share.tolist() == [0.75, 0.25]
    assert np.isnan([found.low, found.high, found.noise]).all()
    assert found.advice == [UNKNOWN, UNKNOWN]
    assert found.columns()["low"] == [None, None, None]


@pytest.mark.parametrize("stderr", [0.0, np.nan])
def test_no_interval_is_made_of_what_is_not_known(stderr):
    """One picture says nothing of others; errors of 0 or NaN say nothing more."""
    alone = Sums(["a", "b"], [1, 1], np.array([[3.0, 1.0]]), np.full((1, 2), stderr), None)
    found = credit(alone)
    assert np.isnan([found.low, found.high, found.noise, found.signal_to_noise]).all()
    assert found.advice == [UNKNOWN, UNKNOWN]
    assert ("are not known" in found.caution) == np.isnan(stderr)


def test_what_the_intervals_do_not_hold_is_said():
    several = np.array([[3.0, 1.0], [2.0, 2.0]])
    assert "one picture" in credit(Sums(["a", "b"], [1, 1], several[:1], np.ones((1, 2)), None)).caution
    assert credit(Sums(["a", "b"], [1, 1], several, np.ones((2, 2)), None)).caution == ""
    one_seed = credit(Sums(["a", "b"], [1, 1], several, np.full((2, 2), np.nan), None))
    assert "errors of these values are not known" in one_seed.caution
    assert not np.isnan(one_seed.noise).any(), "the choice of pictures is noise as well"


def test_pictures_that_agree_to_the_last_bit_leave_no_noise():
    found = credit(Sums(["a", "b"], [1, 1], np.array([[0.1, 0.2]] * 7), None, None))
    assert found.noise.tolist() == [0, 0]
    assert np.isinf(found.signal_to_noise).all()


@pytest.mark.parametrize("errors", [0.01, 1.0, 100.0])
def test_what_is_attributable_and_the_rest_sum_to_one(errors):
    phi = np.array([[3.0, 1.0, -1.0], [2.0, 0.1, 0.5], [-1.0, -2.0, -3.0]])
    columns = credit(Sums(list("abc"), [1] * 3, phi, np.full(phi.shape, errors), None)).columns()
    assert sum(columns["attributable"]) == pytest.approx(1)
    assert columns["share"][-1] is None, "nobody adds it to the shares"


def test_intervals_cover_the_share_of_all_pictures():
    """Pictures drawn from many and sums that are measured with noise: 95 % intervals hold the share of all in 90-98 %."""
    rng = np.random.default_rng(0)
    truth = rng.gamma(2.0, 1.0, size=(5000, 4)) * [4, 2, 1, 0.5]
    whole, inside, total = shares(truth).mean(axis=0), 0, 0
    for repeat in range(120):
        rows = rng.integers(0, len(truth), 30)
        moved = truth[rows] + 0.2 * rng.normal(size=4)  # a contributor's errors move together
        found = credit(Sums(list("abcd"), [1] * 4, moved, np.full((30, 4), 0.2), None), resamples=300, seed=repeat)
        inside += int(((found.low <= whole) & (whole <= found.high)).sum())
        total += 4
    assert 0.90 < inside / total < 0.98


def test_splitting_never_changes_what_is_shared_among_accounts_of_one_sign():
    positive = VALUES.abs()
    found = credit(sums_of(scores(positive), "creator"))
    np.testing.assert_allclose(found.split, 0, atol=1e-12)


def test_values_of_contributors_are_sums_already():
    recipe = {"values": {"by": "creator"}}
    own = Scores(
        torch.tensor([[2.0, 1.0]]),
        ["q"],
        ["ann", "ben"],
        recipe,
        "value",
        train_meta={"images": [3, 7]},
        stderr=torch.ones(1, 2),
    )
    sums = sums_of(own, "creator")
    assert (list(sums.images), sums.positive) == ([3, 7], None)
    assert credit(sums).columns()["could_rise_by_splitting"] == [None, None, None]


def test_the_royalty_share_of_closed_form_densities():
    """Four owners, each with the mean and the count of its images; the model of a coalition is the normal density around the
    mean of all its images, N(0, 1) for nobody, and is worth its log density at a picture. The share is the Shapley value's
    positive part over the sum of these (2404.13964), here from all 24 orders one by one."""
    means, counts, x = np.array([1.0, 2.0, -1.0, 1.5]), np.array([3, 1, 2, 4]), np.array([1.4, -0.5, 2.5])

    def worth(coalition: tuple[int, ...]) -> np.ndarray:
        own = list(coalition)
        centre = (means[own] * counts[own]).sum() / counts[own].sum() if own else 0.0
        return -0.5 * (x - centre) ** 2 - 0.5 * math.log(2 * math.pi)

    orders = list(itertools.permutations(range(4)))
    gains = np.zeros((3, 4))
    for order in orders:
        for place, owner in enumerate(order):
            gains[:, owner] += (worth(order[: place + 1]) - worth(order[:place])) / len(orders)
    masks = np.array(list(itertools.product([False, True], repeat=4)))
    outputs = np.stack([worth(tuple(np.flatnonzero(mask))) for mask in masks])
    values = semivalues.semivalue(masks, outputs, semivalues.beta_sizes(4), "higher").values
    np.testing.assert_allclose(values, gains, atol=1e-12)
    np.testing.assert_allclose(values.sum(axis=1), worth((0, 1, 2, 3)) - worth(()), atol=1e-12)
    found = credit(Sums(list("abcd"), counts.tolist(), values, np.zeros_like(values), None))
    royalty = gains.clip(min=0) / gains.clip(min=0).sum(axis=1, keepdims=True)
    assert (gains < 0).any()
    np.testing.assert_allclose(found.of_picture, royalty, atol=1e-12)
    np.testing.assert_allclose(found.share, royalty.mean(axis=0), atol=1e-12)


def test_agreement_is_over_contributors_picture_by_picture():
    one = Sums(list("abc"), [1] * 3, np.array([[1.0, 2, 3], [1, 2, 3]]), None, None)
    other = Sums(list("abc"), [1] * 3, np.array([[10.0, 20, 40], [3, 2, 1]]), None, None)
    rank, linear = agreement(one, other)
    assert rank == pytest.approx(0)
    assert linear == pytest.approx((np.corrcoef([1, 2, 3], [10, 20, 40])[0, 1] - 1) / 2)
    with refuses("3 contributors", "credit"):
        agreement(one, Sums(list("ab"), [1] * 2, one.values[:, :2], None, None))


def test_what_has_no_credit_is_refused():
    with refuses("say how much, and not which way", "credit"):
        sums_of(scores(signed=False), "creator")
    with refuses("no column 'artist'", "--by", "creator, allowed"):
        sums_of(scores(), "artist")
    with refuses("only 5 of the training images have a score", "credit"):
        sums_of(Scores(VALUES, ["q0", "q1"], list("abcde"), {"scored": "x"}, train_meta=META), "creator")
    with refuses("the column 'creator' holds one value, 'ann'", "--by"):
        sums_of(Scores(VALUES, ["q0", "q1"], list("abcde"), {}, train_meta={"creator": ["ann"] * 5}), "creator")
    with refuses("level 2", "credit"):
        credit(sums_of(scores(), "creator"), level=2)


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(tmp_path):
    save_scores(tmp_path / "run/scores/trak", scores(stderr=torch.full((2, 5), 0.1)))
    save_scores(tmp_path / "run/scores/pixels", scores(5 + VALUES.flip(0)))
    return tmp_path / "run"


def test_the_command_writes_tables_page_and_receipt(run):
    said = succeeds("credit", run).out
    folder = run / "credit/creator"
    assert "not attributable" in said
    assert "caution: pixels: hardly a score" in said
    assert "caution: trak" not in said
    assert {path.name for path in folder.iterdir()} == {
        "trak.csv", "trak.parquet", "trak-pictures.parquet", "pixels.csv", "pixels.parquet", "pixels-pictures.parquet",
        "credit.html", "receipt.json",
    }  # fmt: skip
    with (folder / "trak.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["contributor"] for row in rows] == ["ann", "ben", "unknown", "not attributable"]
    assert float(rows[0]["share"]) == pytest.approx(11 / 24)
    table = pq.read_table(folder / "trak.parquet").to_pylist()
    assert table[0]["share"] == pytest.approx(11 / 24)
    pictures = pq.read_table(folder / "trak-pictures.parquet").to_pylist()
    assert len(pictures) == 2 * 3
    page = (folder / "credit.html").read_text()
    assert page.count("<strong>Caution:</strong> hardly a score") == 1
    assert "of draws" in page
    assert "no standard errors of these scores are known" in page
    assert "http" not in page.replace("http-equiv", "")
    first = (folder / "receipt.json").read_bytes()
    succeeds("credit", run)
    assert (folder / "receipt.json").read_bytes() == first, "the same scores give the same receipt"


def test_what_is_known_of_the_errors_is_said(tmp_path):
    for name, errors in {"unknown": None, "exact": 0.0, "doubtful": 9.0}.items():
        save_scores(tmp_path / "scores" / name, scores(stderr=None if errors is None else torch.full((2, 5), errors)))
    said = succeeds("credit", tmp_path).out
    page = (tmp_path / "credit/creator/credit.html").read_text()
    assert "caution: doubtful: for 2 of 2 pictures another run would order single images otherwise" in said
    assert "caution: exact" not in said
    assert page.count("nothing of these scores is drawn by chance") == 1
    assert page.count("no standard errors of these scores are known") == 1


def test_a_receipt_is_checked_by_replay(run, monkeypatch):
    succeeds("credit", run)
    folder = run / "credit/creator"
    assert "the receipt holds" in succeeds("replay", folder).out
    assert "the receipt holds" in succeeds("replay", folder / "receipt.json").out
    with monkeypatch.context() as inside:
        inside.chdir(folder)
        for here in (".", "receipt.json"):
            assert "the receipt holds" in succeeds("replay", here).out
        assert check_receipt(Path()) == []
    receipt = read_json(folder / "receipt.json")
    receipt["tables"]["trak"]["share"][0] += 0.01
    write_json(folder / "receipt.json", receipt)
    done = whence("replay", folder)
    assert (done.code, "receipt.json: the same scores of trak give other shares" in done.out) == (2, True)
    save_scores(run / "scores/pixels", scores(VALUES * 2))
    told = f"scores.json, scores.safetensors is not what {folder / 'receipt.json'} was made from, or is gone"
    assert f"{run / 'scores/pixels'}: {told}" in check_receipt(folder)
    refused("replay", folder, "--model", run, says="a receipt is checked against the scores beside it")


@pytest.mark.parametrize("name", ["trak.csv", "trak.parquet", "pixels-pictures.parquet", "credit.html"])
def test_a_receipt_guards_every_file_beside_it(run, name):
    succeeds("credit", run)
    path = run / "credit/creator" / name
    path.write_bytes(path.read_bytes() + b" ")
    assert check_receipt(path.parent) == [f"{path} is not what it was, or is gone"]
    path.unlink()
    assert whence("replay", path.parent).code == 2


def test_tables_of_methods_that_were_not_asked_for_again_go(run):
    succeeds("credit", run)
    (run / "credit/creator/mine.csv").write_text("somebody's own\n")
    succeeds("credit", run, "--method", "trak", "--level", 0.5)
    found = {path.name for path in (run / "credit/creator").iterdir()}
    assert found == {"trak.csv", "trak.parquet", "trak-pictures.parquet", "credit.html", "receipt.json", "mine.csv"}


def test_the_question_stands_beside_the_shares(run):
    recipe = {"call": {"question": {"mask": {"share": 0.5, "digest": "abc"}, "timesteps": [0, 50]}}}
    save_scores(run / "scores/region", scores(recipe=recipe))
    told = "a region of the pictures, 50 % of them (masks/abc.png); timesteps 0 to 49"
    assert f"asked of the pictures: {told}" in succeeds("credit", run).out
    folder = run / "credit/creator"
    assert (folder / "credit.html").read_text().count(told) == 1
    assert json.loads((folder / "receipt.json").read_text())["questions"] == {
        "pixels": "", "region": f"{told}, 0 being the least noisy", "trak": "",
    }  # fmt: skip


def test_values_by_retraining_stand_beside_the_sums(run, tmp_path):
    truth = Scores(
        torch.tensor([[2.0, -2, 1], [2, 6, -1]]), ["q0", "q1"], ["ann", "ben", "unknown"],
        {"values": {"by": "creator"}, "ledger": {}, "queries": "x"},
        "value", train_meta={"images": [2, 2, 1]}, stderr=torch.ones(2, 3),
    )  # fmt: skip
    save_scores(tmp_path / "values/scores/shapley", truth)
    said = succeeds("credit", run, "--values", tmp_path / "values").out
    assert "trak beside shapley by retraining: rank correlation 1.00, linear 1.00" in said
    assert "rank correlation 1" in (run / "credit/creator/credit.html").read_text()
    other = Scores(truth.values, ["q0", "q2"], truth.train_ids, truth.recipe, "value", train_meta=truth.train_meta)
    save_scores(tmp_path / "other/scores/shapley", other)
    refused("credit", run, "--values", tmp_path / "other", says="shapley are of other pictures than the scores")
    refused(
        "credit",
        run,
        "--values",
        run,
        says=f"{run}: .* read no retrained model; accepted: a run folder of `whence values`",
    )
    by = "these are values by 'creator', and say nothing by 'allowed'"
    refused(
        "credit", run, "--by", "allowed", "--values", tmp_path / "values", says=f"--values {tmp_path / 'values'}: {by}"
    )
    refused("credit", tmp_path / "values", "--by", "allowed", says=f"--by: {by}; accepted: --by creator")


def test_images_that_were_not_to_be_trained_on_are_listed_where_they_have_influence(run):
    said = succeeds("credit", run, "--not_allowed", "allowed=no", "--method", "trak").out
    assert "not allowed, and rank 1 of q1 by trak: b" in said
    assert "not allowed, and rank 2 of q0 by trak: b" in said
    assert "by trak: e" in said, "it did something for the second picture"
    assert "of q0 by trak: e" not in said, "it worked against the first"
    refused(
        "credit",
        run,
        "--not_allowed",
        "allowed",
        says="names no images; accepted: column=value with a column of allowed, creator; or c2pa",
    )
    refused("credit", run, "--not_allowed", "allowed=never", says="no image has allowed 'never'")


def test_mistakes_are_told(run, tmp_path):
    refused("credit", tmp_path / "nowhere", says="holds no finished scores")
    refused("credit", run, "--by", "artist", says="no column 'artist'.*accepted: allowed, creator")
    refused("credit", run, "--method", "d_trak", says="holds no scores of d_trak; accepted: pixels, trak")
    refused("credit", run, "--level", 95, says="level 95")
    assert not (run / "credit").exists()
