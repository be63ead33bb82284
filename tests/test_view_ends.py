"""A run of which the first and last scores of each picture were kept (--top), in the viewer: what is there is told as all
scores have it, and what needs all of them says why it is not there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from errors import refuses
from viewed import M, N, client, of_ends, plain_run
from whence.storage.scores import load_scores, save_scores
from whence.view.agreement import agreement_told
from whence.view.reading import group_told, image_told, method_told, query_told, ranks_of, strongest
from whence.view.run import Run, open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(plain_run(tmp_path_factory.mktemp("all")))


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same run once more, of whose method beta the first and last three of each picture were kept."""
    place = tmp_path_factory.mktemp("ends")
    root = plain_run(place)
    save_scores(root / "scores" / "beta", of_ends(load_scores(root / "scores" / "beta"), 3))
    return open_run(root)


def test_of_the_first_and_last_that_were_kept_is_told_what_all_scores_say(run: Run, few: Run) -> None:
    """Each score and each rank that is told is that of all scores; what needs others is not told, and why."""
    assert few.told == run.told
    for j in range(M):
        whole, told = ({one["name"]: one for one in query_told(which, j, 12)} for which in (run, few))
        assert told["alpha"] == whole["alpha"] | {"ranks": told["alpha"]["ranks"]}
        beta, every = told["beta"], whole["beta"]
        for end in ("top", "low"):
            assert [(e["row"], e["score"], e["rank"]) for e in beta[end]] == [
                (e["row"], e["score"], e["rank"]) for e in every[end][:3]
            ]
            assert all(e["between"] is None for e in beta[end])
        assert (beta["reliability"], beta["sure"], beta["sums"]) == (None, "", [])
        everywhere = ranks_of(run, {"beta": run.methods["beta"].opened.values.row(j)}, range(N))["beta"]
        assert {row: everywhere[row] for row in beta["ranks"]} == beta["ranks"]
        assert {everywhere[row] for row in beta["ranks"]} <= {1, 2, 3, N - 2, N - 1, N}


def test_what_needs_all_scores_says_why_it_is_not_there(run: Run, few: Run) -> None:
    beta = few.methods["beta"]
    assert "first and the last 3 of 40" in str(method_told(beta, N)["missing"])
    assert [method_told(scored, N)["missing"] for scored in run.methods.values()] == [""] * 3
    pairs = {tuple(pair["pair"]): pair for pair in agreement_told(few, 0)}
    pair, same = pairs["alpha", "beta"], run.methods
    rows = [same[name].opened.values.row(0) for name in ("alpha", "beta")]
    assert (pair["spearman"], pair["first"], pair["images"]) == (None, 3, N)
    assert pair["shared"] == len({*strongest(rows[0], 3)} & {*strongest(rows[1], 3)})
    assert "all scores" in pair["why"]
    assert pairs["beta", "some"]["shared"] is None
    assert "kept" in group_told(few, few.train.facets[0], 0)[1]["why"]
    missing = next(i for i in range(N) if i not in beta.rows)
    assert "other scores were not kept" in image_told(few, missing)[1]["why"]
    for image in beta.rows.tolist():
        told, whole = image_told(few, image)[1], image_told(run, image)[1]
        known = dict(zip(whole["queries"], zip(whole["score"], whole["rank"], strict=True), strict=True))
        assert (
            dict(zip(told["queries"], zip(told["score"], told["rank"], strict=True), strict=True)).items()
            <= known.items()
        )
        assert (told["of"], told["all"], told["first"]) == (N, M, 3)
    asked = client(few)
    assert asked("api/0/row/0/0").status == 200
    for path in ("api/0/row/0/1", "api/0/list/train?sort=often:beta"):
        assert asked(path).status == 404
        assert b"--top" in asked(path).body
    exact = asked("api/0/exact?rows=0,1,2,3,4,5&query=0").json
    assert {row["scores"]["alpha"]["rank"] for row in exact} == {
        e for e in ranks_of(run, {"alpha": rows[0]}, range(6))["alpha"].values()
    }


def test_a_run_of_ends_alone_has_the_images_that_it_names(tmp_path: Path) -> None:
    """With their folder, all of them; without, those with a score by any method."""
    root = plain_run(tmp_path)
    (root / "scores" / "some" / "scores.json").unlink()
    for name in ("alpha", "beta"):
        save_scores(root / "scores" / name, of_ends(load_scores(root / "scores" / name), 2))
    assert len(open_run(root).train) == N
    (tmp_path / "train").rename(tmp_path / "gone")
    lost = open_run(root)
    named = {image for name in ("alpha", "beta") for image in load_scores(root / "scores" / name).train_ids}
    assert {*lost.train.side.ids} == named
    assert lost.train.side.meta["text"] == [f"a thing {int(name[5:8])}" for name in lost.train.side.ids]
    assert list(lost.methods) == ["alpha", "beta"]


@pytest.mark.parametrize("top", [None, 10**6, "3"])
def test_scores_that_do_not_say_how_many_were_kept_are_refused(tmp_path: Path, top: object) -> None:
    root = plain_run(tmp_path)
    folder = root / "scores" / "beta"
    found = of_ends(load_scores(folder), 3)
    save_scores(folder, replace(found, recipe={**found.recipe, "top": top}))
    with refuses("how many of the first and last", str(folder / "scores.json")):
        open_run(root)
