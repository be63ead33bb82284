"""Candidates: the training images that a cheap method names have the scores that a dear one gives them among all images, or
the dear one is refused by name; and nothing takes an image without a score for one with a score of 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import whence
from agreement import close
from errors import refuses
from test_cli import IMAGES, World, refused, succeeds, world  # noqa: F401
from test_contract import CASES, WORLDS, anywhere, method_of
from whence.curvature.exact import GaussNewton, Hessian
from whence.curvature.kfac import EKFAC
from whence.curvature.solve import Preconditioner, decomposed, eigenbasis
from whence.data.images import subset
from whence.diffusion.draws import uniform
from whence.diffusion.outputs import loss
from whence.evaluation import counterfactual
from whence.evaluation.judging import judge
from whence.features.parts import part
from whence.methods import METHODS, normalize
from whence.methods.candidates import Candidates
from whence.methods.das import das_function
from whence.methods.inner_product import InnerProduct
from whence.storage.arrays import Store
from whence.storage.files import read_json
from whence.storage.scores import load_scores
from whence.types import Scores, Task, image_by_image
from worlds import linear_world

ROWS = [0, 2, 3]
TOGETHER = {
    *("nda", "last_layer_ridge", "influence", "relatif_theta", "relatif_loss", "renormalized_influence", "datainf"),
    *("trak", "d_trak", "block_trak", "weighted_d_trak", "journey_trak", "diffusion_tracin", "retrac", "das"),
    *("das_function", "metagradient", "averaged_metagradient", "further_training", "montrage_style"),
}


def some_of(task: Task, root: Path, rows: list[int]) -> Task:
    return replace(task, root=root, scored=subset(task.train, rows))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Task]:
    """Of each world, in a folder where all images are scored."""
    root = tmp_path_factory.mktemp("all")
    return {name: make(root / name) for name, make in WORLDS.items()}


@pytest.mark.parametrize(("world", "name"), anywhere(CASES))
def test_a_candidate_has_the_score_it_has_among_all_or_the_method_is_refused(tasks, world, name, tmp_path):  # noqa: F811
    task = tasks[world]
    method, some = method_of(world, name, task), some_of(task, tmp_path / "some", ROWS)
    assert image_by_image(method) == (name not in TOGETHER)
    if name in TOGETHER:
        with refuses(f"{name} takes all training images together", "candidates", "scores image by image"):
            method(some)
        assert not some.root.exists(), "something was computed before"
        return
    scores = method(some)
    close(scores.values, method(task).values[:, ROWS], 1e-4 if world == "unet" else 1e-9)
    assert list(scores.train_ids) == [task.train.ids[row] for row in ROWS]
    assert scores.pictures is not None
    assert list(scores.pictures[1].ids) == list(scores.train_ids)
    assert scores.some_only
    assert not method(task).some_only


def test_the_lists_are_of_methods_that_are_there():
    assert set(METHODS) > TOGETHER
    assert len(METHODS) - len(TOGETHER) > 15


@pytest.mark.parametrize("scale", [normalize.none, normalize.cosine, normalize.relatif_theta, normalize.renormalized])
@pytest.mark.parametrize("precondition", [GaussNewton(0.1), EKFAC(0.1), EKFAC(0.1, absolute=True), Hessian(0.1)])
def test_row_scales_and_curvature_are_those_among_all(tmp_path, precondition: Preconditioner, scale):
    task = linear_world(n=14, m=3, dim=4).task(tmp_path / "all")
    method = InnerProduct(
        part(loss, uniform(6), None, "trained"), precondition=precondition, normalize=scale, name="mine"
    )
    some = some_of(task, tmp_path / "some", [1, 5, 13])
    close(method(some).values, method(task).values[:, [1, 5, 13]], 1e-9)
    if scale is not normalize.renormalized:
        close(whence.self_influence(method, some), whence.self_influence(method, task)[[1, 5, 13]], 1e-9)


def test_das_of_functions_with_curvature_of_its_own(tmp_path):
    """Its leverages are those of the candidates, too."""
    task = linear_world(n=14, m=3, dim=4).task(tmp_path / "all")
    method = replace(das_function(draws=uniform(6), dim=None), precondition=GaussNewton(0.5))
    close(method(some_of(task, tmp_path / "some", ROWS)).values, method(task).values[:, ROWS], 1e-9)


def test_what_counts_as_rank_does_not_depend_on_how_many_are_scored(tmp_path):
    """An eigenvalue of 1e-13 beside 1 is rounding in a sum over 10,000 images, however few rows are given."""
    rows = Store(tmp_path).array({"key": 0}, (2, 2), torch.float64, 2)
    rows.write(slice(0, 2), torch.eye(2, dtype=torch.float64))
    matrix = torch.diag(torch.tensor([1.0, 1e-13], dtype=torch.float64))
    query = torch.ones(1, 2, dtype=torch.float64)
    assert eigenbasis(*decomposed(matrix), rows, query, 10_000).mean_eigenvalue() == pytest.approx(1.0, rel=1e-9)
    assert eigenbasis(*decomposed(matrix), rows, query, 2).mean_eigenvalue() == pytest.approx(0.5, rel=1e-9)


def test_who_declares_nothing_is_refused():
    """A user's own function, and a user's own preconditioner."""

    class Silent:
        damping = None

        def solve(self, *given: object) -> list[Any]:
            return []

    def mine(task: Task) -> Scores:
        raise AssertionError("it is not called")

    quiet = InnerProduct(part(loss, uniform(6), None, "trained"), precondition=Silent(), name="quiet")
    for name, method in (("mine", mine), ("quiet", quiet)):
        with refuses(f"{name} takes all", "candidates"):
            Candidates(3).check({name: method})


# ------------------------------------------------------------------------------------------------------------- who is named


def scores_of(values: list[list[float]]) -> Scores:
    table = torch.tensor(values, dtype=torch.float64)
    names = [f"i{i}" for i in range(table.shape[1])]
    return Scores(table, [f"q{q}" for q in range(len(table))], names, {"method": "made up"})


def test_the_first_of_any_query_in_the_order_of_the_images():
    scores = scores_of([[0, 9, 1, 5, 1], [1, 1, 1, 0, 7]])
    assert Candidates(1).rows(scores) == [1, 4]
    assert Candidates(2).rows(scores) == [0, 1, 3, 4], "of equal scores the first images"
    assert Candidates(5).rows(scores) == Candidates(50).rows(scores) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "5", None])
def test_a_count_is_a_whole_number_from_1(count):
    with refuses(f"candidates is {count!r}", accepted="a whole number"):
        Candidates(count)
    assert Candidates(np.int64(3)) == Candidates(3)  # type: ignore[arg-type]


def test_scores_of_other_images_name_nobody(tmp_path):
    task = linear_world(n=14, m=2, dim=4).task(tmp_path)
    with refuses("other training images", "candidates"):
        Candidates(1).named(task, scores_of([[1, 2], [3, 4]]))


def test_in_python(tmp_path):
    forward = whence.Denoiser(torch.linspace(0.99, 0.01, 100), predict=lambda call, x_t, t, cond: call(x_t))
    torch.manual_seed(0)
    net, images, asked = (
        torch.nn.Conv2d(1, 1, 3, padding=1),
        torch.rand(9, 1, 8, 8) * 2 - 1,
        torch.rand(2, 1, 8, 8) * 2 - 1,
    )
    given: Any = ((net, forward), images, asked, "ek_fac")
    whole = whence.attribute(*given, root=tmp_path / "a", draws=2)
    some = whence.attribute(*given, root=tmp_path / "b", draws=2, candidates=2)
    cheap = whence.attribute(*given[:3], "pixel_cosine", root=tmp_path / "c")
    rows = Candidates(2).rows(cheap)
    assert list(some.train_ids) == [whole.train_ids[row] for row in rows]
    close(some.values, whole.values[:, rows], 1e-5)
    note = {"is": "Candidates", "count": 2, "by": "pixel_cosine", "settings": {}}
    assert some.recipe["candidates"] == note
    others = whence.attribute(*given, root=tmp_path / "b", draws=2, candidates=2, candidates_by="pixel_dot")
    assert others.recipe["candidates"] == note | {"by": "pixel_dot"}
    all_of_them = whence.attribute(*given, root=tmp_path / "b", draws=2, candidates=100)
    close(all_of_them.values, whole.values, 1e-5)
    assert all_of_them.recipe == whole.recipe
    with refuses("names no candidates", "candidates_by", "candidates=50"):
        whence.attribute(*given, root=tmp_path / "d", candidates_by="pixel_dot")
    with refuses("no other method", "candidates"):
        whence.attribute(*given[:3], "pixel_dot", root=tmp_path / "d", candidates=2, candidates_by="pixel_dot")
    with refuses("trak takes all", "candidates"):
        whence.attribute(*given[:3], "trak", root=tmp_path / "d", candidates=2)


# ------------------------------------------------------------------------------------------------- who asks for every image


def test_an_image_without_a_score_is_no_image_of_score_0():
    some = replace(scores_of([[1, 2], [3, 4]]), recipe={"scored": "x"}, train_meta={"creator": ["a", "b"]})
    with refuses("only 2 of the training images have a score", "scores", "scores of all training images"):
        some.group_by("creator")
    none: Any = None
    with refuses("only 2 of the training images", "the scores of mine", "without --candidates"):
        counterfactual.run(none, none, none, none, none, {"mine": some}, none)


def test_lds_refuses(tmp_path):
    some = replace(scores_of([[1, 2], [3, 4]]), recipe={"scored": "x"})
    whence.save_scores(tmp_path / "scores" / "mine", some)
    ledger: Any = SimpleNamespace(table=lambda name: SimpleNamespace(role=lambda role: SimpleNamespace(units=[0])))
    with refuses("only 2 of the training images", "the scores of mine", "without --candidates"):
        judge(tmp_path, ledger, "loss")


# ---------------------------------------------------------------------------------------------------- on the command line

METHODS_ASKED = ("--method", "ek_fac", "--method", "gradient_dot", "--draws", 2)


@pytest.fixture(scope="module")
def run(world: World) -> Path:  # noqa: F811
    folder = world.root / "candidates"
    words = (*world.about(folder), "--query_data_dir", world.queries, *METHODS_ASKED, "--candidates", 2)
    done = succeeds(*words)
    scored = len(load_scores(folder / "scores" / "ek_fac").train_ids)
    assert 2 <= scored <= 6
    assert f"scored: {scored} of {IMAGES} images, named by pixel_cosine" in done.out.splitlines()
    return folder


def test_a_run_keeps_both(world, run):  # noqa: F811
    whole = world.root / "whole"
    succeeds(*world.about(whole), "--query_data_dir", world.queries, *METHODS_ASKED)
    cheap = load_scores(run / "scores" / "pixel_cosine")
    assert len(cheap.train_ids) == IMAGES
    rows = Candidates(2).rows(cheap)
    for name in ("ek_fac", "gradient_dot"):
        some, all_of_them = (load_scores(folder / "scores" / name) for folder in (run, whole))
        assert list(some.train_ids) == [all_of_them.train_ids[row] for row in rows]
        close(some.values, all_of_them.values[:, rows], 1e-5)
        assert some.train_meta["creator"] == [all_of_them.train_meta["creator"][row] for row in rows]
    assert read_json(run / "report.json")["methods"] == ["ek_fac", "gradient_dot", "pixel_cosine"]


@pytest.mark.parametrize("name", ["ek_fac", "gradient_dot", "pixel_cosine"])
def test_replay_gives_the_same_bits(run, name):
    found = whence.replay(run / "scores" / name)
    assert found.identical
    assert found.different == []


def test_replay_says_when_others_are_named(world):  # noqa: F811
    """Here because the scores on disk are of other images than their recipe names."""
    folder = world.root / "renamed"
    succeeds(*world.about(folder), "--query_data_dir", world.queries, *METHODS_ASKED, "--candidates", 2)
    path = folder / "scores" / "gradient_dot"
    scores = load_scores(path)
    whence.save_scores(path, replace(scores, train_ids=["00.png", *scores.train_ids[1:]][::-1]))
    refused("replay", path, says="pixel_cosine names other candidates here, . of . the same; accepted: the processor")


def test_the_report_again(run):
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    succeeds("report", run)
    assert (run / "report.html").read_bytes() == before
    count = len(load_scores(run / "scores" / "ek_fac").train_ids)
    assert f"scored: {count} of {IMAGES} images, named by pixel_cosine" in before.decode()


def test_a_cheap_method_that_is_asked_for_runs_once_and_as_it_is_asked_for(world):  # noqa: F811
    folder = world.root / "once"
    asked = ("--method", "gradient_dot", "--method", "trak", "--dim", 16, "--draws", 2, "--candidates_by", "trak")
    done = succeeds(*world.about(folder), "--query_data_dir", world.queries, *asked, "--candidates", 1)
    assert done.out.count("trak: {") == 1
    recipe = load_scores(folder / "scores" / "gradient_dot").recipe
    assert recipe["candidates"]["settings"]["dim"] == 16
    assert load_scores(folder / "scores" / "trak").recipe["call"]["settings"] == recipe["candidates"]["settings"]
    assert "identical to the last bit" in succeeds("replay", folder / "scores" / "gradient_dot").out


REFUSED = {
    "none": (("--candidates", 0), "--candidates"),
    "fewer than none": (("--candidates", -1), "--candidates"),
    "named without a number": (("--candidates_by", "trak"), "--candidates_by.*--candidates"),
    "named by nothing": (("--candidates", 2, "--candidates_by", "pixel_cosin"), "did you mean pixel_cosine"),
    "together": (("--candidates", 2, "--method", "trak"), "candidates: trak takes all training images together"),
    "nobody scores": (("--candidates", 2, "--method", "pixel_cosine"), "no other method is asked to score them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(world, tmp_path, case):  # noqa: F811
    options, says = REFUSED[case]
    words = options if "--method" in options else (*options, "--method", "ek_fac")
    refused(*world.about(tmp_path / "run"), "--query_data_dir", world.queries, *words, says=says)
    assert not (tmp_path / "run").exists(), "something was computed before"


def test_as_many_as_there_are_is_all_of_them(world):  # noqa: F811
    folder = world.root / "every"
    words = ("--query_data_dir", world.queries, "--method", "gradient_dot", "--draws", 2, "--candidates", IMAGES)
    assert f"scored: {IMAGES} of {IMAGES} images, named by pixel_cosine" in succeeds(*world.about(folder), *words).out
    scores = load_scores(folder / "scores" / "gradient_dot")
    assert len(scores.train_ids) == IMAGES
    assert not scores.some_only
