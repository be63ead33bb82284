"""The viewer without a browser: it says what the scores say, shows the pictures that were scored and no other file, answers
nobody but this machine's browser with the token, and writes nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata, spearmanr

import whence.scores as scores_room
from errors import refuses
from test_cli import refused
from viewed import (
    TOKEN,
    Client,
    M,
    N,
    client,
    note,
    of_some,
    opened,
    pictures,
    plain_run,
    scores_of,
    train_rows,
    written,
)
from whence.data.images import image_folder
from whence.features.rows import identity
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores, save_scores
from whence.types import Scores
from whence.view import agreement, reading, serving
from whence.view.app import is_local, viewer_app
from whence.view.bounded import Bounded
from whence.view.listing import Asked, cut, matching
from whence.view.matrix import open_scores
from whence.view.pictures import Hidden, drawn
from whence.view.run import Run, open_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("viewed")
    plain_run(place)
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder / "run")


@pytest.fixture(scope="module")
def ask(run: Run) -> Client:
    return client(run)


def saved(folder: Path, name: str) -> Scores:
    return load_scores(folder / "run" / "scores" / name)


# --------------------------------------------------------------------------------------------- it says what scores say


def test_the_constants_are_those_of_the_scores() -> None:
    assert reading.SURE == scores_room.SURE


@pytest.mark.parametrize("levels", [3, 10**6], ids=["ties", "no ties"])
@pytest.mark.parametrize("k", [1, 5, 30, 99])
def test_the_strongest_are_those_of_the_scores(levels: int, k: int) -> None:
    row = np.random.default_rng(k).integers(0, levels, 30) / levels
    assert reading.strongest(row, k).tolist() == scores_room.strongest(torch.from_numpy(row), k).tolist()


@pytest.mark.parametrize("unknown", [False, True])
def test_ranks_between_are_those_of_the_scores(unknown: bool) -> None:
    rng = np.random.default_rng(0)
    row, errors = rng.normal(size=50), rng.random(50) / 3
    errors[7] = np.nan if unknown else errors[7]
    expected = scores_room.ranks_between(torch.from_numpy(row), torch.from_numpy(errors), range(50))
    assert reading.between(row, errors, range(50)) == [(a + 1, b + 1) for a, b in expected]


def test_a_query_is_told_as_the_scores_have_it(folder: Path, run: Run) -> None:
    for name in ("alpha", "some"):
        scores = saved(folder, name)
        for j in range(M):
            told: Any = next(one for one in reading.query_told(run, j, 5) if one["name"] == name)
            assert [(run.train.side.ids[e["row"]], e["score"]) for e in told["top"]] == [
                pair for pair in scores.top(j, 5) if pair[1] > 0
            ]
            low = [(run.train.side.ids[e["row"]], e["score"]) for e in told["low"]]
            assert low == [pair for pair in scores.bottom(j, 5) if pair[1] < 0][: len(low)]
            assert told["reliability"] == pytest.approx(float(scores.reliability[j]), rel=1e-6)  # type: ignore[index]
            order = rankdata(-scores.values[j].double().numpy(), "min")
            for entry in (*told["top"], *told["low"]):
                column = list(scores.train_ids).index(run.train.side.ids[entry["row"]])
                assert entry["rank"] == order[column]
                assert entry["stderr"] == pytest.approx(float(scores.stderr[j, column]))  # type: ignore[index]
                first, last = scores.ranks_between(j, [column])[0]
                assert entry["between"] == (first + 1, last + 1)


def test_ranks_elsewhere_are_of_the_same_image(folder: Path, run: Run) -> None:
    told: Any = {one["name"]: one for one in reading.query_told(run, 2, 6)}
    shown = {e["row"] for one in told.values() for end in ("top", "low") for e in one[end]}
    beta, some = saved(folder, "beta"), saved(folder, "some")
    order = rankdata(-beta.values[2].numpy(), "min")
    assert told["beta"]["ranks"] == {row: order[row] for row in shown}
    assert set(told["some"]["ranks"]) == {row for row in shown if run.train.side.ids[row] in some.train_ids}


def test_agreement_is_spearman_over_the_images_that_both_scored(folder: Path, run: Run) -> None:
    alpha, beta, some = (saved(folder, name).values[1].double().numpy() for name in ("alpha", "beta", "some"))
    rows = [3, 9, 20]
    found = {tuple(one["pair"]): one for one in agreement.agreement_told(run, 1)}  # type: ignore[call-overload]
    assert found["alpha", "beta"]["spearman"] == pytest.approx(spearmanr(alpha, beta).statistic)
    assert found["alpha", "some"]["spearman"] == pytest.approx(spearmanr(alpha[rows], some).statistic)
    assert found["alpha", "some"]["images"] == 3
    shared = len({*np.argsort(-alpha)[:10].tolist()} & {*np.argsort(-beta)[:10].tolist()})
    assert found["alpha", "beta"]["shared"] == shared
    assert found["alpha", "beta"]["chance"] == pytest.approx(100 / N)


def test_ties_share_their_rank() -> None:
    row = np.array([2.0, 1.0, 2.0, 0.0])
    assert agreement.ranks(row).tolist() == rankdata(row).tolist()
    assert agreement.correlation(row, np.ones(4)) is None


def test_the_other_way_round_is_by_rank_within_each_query(folder: Path, run: Run) -> None:
    told: Any = {one["name"]: one for one in reading.image_told(run, 9)}
    values = saved(folder, "alpha").values.double().numpy()
    ranks = [int(rankdata(-row, "min")[9]) for row in values]
    assert told["alpha"]["queries"] == sorted(range(M), key=lambda j: (ranks[j], -values[j, 9], j))
    assert told["alpha"]["rank"] == sorted(ranks)
    assert told["alpha"]["score"] == [values[j, 9] for j in told["alpha"]["queries"]]
    assert told["some"]["scored"]
    assert told["some"]["of"] == 3
    assert not next(one for one in reading.image_told(run, 4) if one["name"] == "some")["scored"]


def test_a_creator_has_the_sums_of_his_images_where_scores_add_up(folder: Path, run: Run) -> None:
    scores = saved(folder, "alpha")
    grouped = replace(scores, values=scores.values.double()).group_by("creator")
    facet = run.train.facets[0]
    assert (facet.column, list(facet.names)) == ("creator", list(grouped.train_ids))
    told: Any = {one["name"]: one for one in reading.group_told(run, facet, 2)}
    sums = dict(zip(told["alpha"]["queries"], told["alpha"]["score"], strict=True))
    assert [sums[j] for j in range(M)] == pytest.approx(grouped.values[:, 2].tolist())
    assert "only 3 images have a score" in told["some"]["why"]
    assert "score" not in told["some"]


def test_scores_of_groups_are_not_added_up_by_another_column(tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", train_rows(8))
    queries = pictures(tmp_path / "queries", [{"file_name": "q.png"}])
    scores = scores_of(train, queries)
    scores = replace(scores, recipe={**scores.recipe, "unlearned": {"by": "creator"}})
    run = open_run(written(tmp_path / "run", {"guda": scores}, train, queries))
    by = {facet.column: facet for facet in run.train.facets}
    assert "score" in reading.group_told(run, by["creator"], 0)[0]
    assert "scores of the groups of creator" in str(reading.group_told(run, by["license"], 0)[0]["why"])
    sums: Any = reading.query_told(run, 0)[0]["sums"]
    assert [one["column"] for one in sums] == ["creator"]


def test_methods_without_a_sign_have_no_opponents(tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", train_rows(8))
    queries = pictures(tmp_path / "queries", [{"file_name": "q.png"}])
    scores = scores_of(train, queries, errors=False)
    results = {
        "magnitude": replace(scores, values=scores.values.abs(), signed=False),
        "below": replace(scores, values=-scores.values.abs() - 1),
        "above": replace(scores, values=scores.values.abs() + 1),
    }
    told: Any = {
        one["name"]: one for one in reading.query_told(open_run(written(tmp_path / "r", results, train, queries)), 0, 3)
    }
    assert told["magnitude"]["low"] == []
    assert "magnitude only" in told["magnitude"]["note"]
    assert "none is above zero, so none is a proponent" in told["below"]["note"]
    assert "none is below zero, so none is an opponent" in told["above"]["note"]
    assert all(one["reliability"] is None and one["sure"] == "" for one in told.values())


def test_what_is_first_often_is_counted_over_all_queries(folder: Path, run: Run) -> None:
    values = saved(folder, "alpha").values.numpy()
    expected = np.zeros(N, int)
    for row in values:
        expected[np.argsort(-row)[:10]] += 1
    assert reading.often_first(run.methods["alpha"], N).tolist() == expected.tolist()
    rows = matching(run, "train", Asked(sort="often:alpha"))
    assert expected[rows].tolist() == sorted(expected, reverse=True)


def test_a_row_for_the_scatter_has_a_place_for_every_image(folder: Path, run: Run, ask: Client) -> None:
    found = np.frombuffer(ask("api/0/row/3/2").body, "<f4")
    assert np.flatnonzero(~np.isnan(found)).tolist() == [3, 9, 20]
    assert found[[3, 9, 20]].tolist() == saved(folder, "some").values[3].tolist()
    alike = np.frombuffer(ask("api/0/similar/3").body, "<f4")
    assert alike.shape == (N,)
    assert np.abs(alike).max() <= 1 + 1e-5


# ------------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_columns_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(5, 7).to(dtype)
    save_scores(tmp_path, Scores(values, list("abcde"), list("1234567"), {}, stderr=values.abs(), stderr_of="draws"))
    opened = open_scores(tmp_path / "scores.safetensors", None, (5, 7))
    assert opened.compared
    assert opened.stderr is not None
    for j in range(5):
        assert opened.values.row(j).tolist() == values[j].double().tolist()
        assert opened.stderr.row(j).tolist() == values[j].abs().double().tolist()
    for i in range(7):
        assert opened.values.column(i).tolist() == values[:, i].double().tolist()


def test_a_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    path = root / "scores" / "alpha" / "scores.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with refuses("is not the file that was written with its scores.json", str(path)):
        open_run(root)
    with refuses("its numbers do not match their digest"):
        open_scores(path, None, (M, N))
    path.write_bytes(content[:-9])
    with refuses("is cut off, or damaged"):
        open_scores(path, None, (M, N))
    with refuses("and its scores.json is of [6, 41]"):
        open_scores(path, None, (M, N + 1))
    path.write_bytes(b"\xff" * 40)
    with refuses("is no safetensors file"):
        open_scores(path, None, (M, N))


# -------------------------------------------------------------------------------------------------------- the pictures


def shown(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def test_the_pictures_are_those_that_were_scored(folder: Path, run: Run, ask: Client) -> None:
    for row in (0, 17):
        answer = ask(f"picture/0/train/{row}")
        assert answer.headers["content-type"] == "image/png"
        pixels, file = shown(answer.body), folder / "train" / run.train.side.ids[row]
        factor = pixels.shape[0] // 8
        assert (pixels[:: factor or 1, :: factor or 1][:8, :8] == shown(file.read_bytes())).all()
        assert answer.body != file.read_bytes()
    assert shown(ask("thumb/0/queries/2").body).shape[0] <= 160


def test_no_file_is_opened_before_it_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity of the training images is computed from the digests that the run keeps."""
    read: list[str] = []
    plain = Path.open

    def spy(self: Path, *arguments: Any, **more: Any) -> Any:
        read.append(str(self))
        return plain(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", spy)
    run = open_run(folder / "run")
    assert run.train.side.pictures is not None
    assert not [path for path in read if "/train/" in path and path.endswith(".png")]


def test_a_picture_that_was_changed_is_not_shown(tmp_path: Path) -> None:
    run = opened(tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "train" / "part" / "004.png")
    (tmp_path / "train" / "part" / "005.png").unlink()
    answer = client(run)("picture/0/train/4")
    assert (answer.status, answer.body) == (404, b"the file is not the picture that was scored: it was changed since")
    assert client(run)("picture/0/train/5").body == b"the file is not there any more"
    assert client(run)("picture/0/train/6").status == 200


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    run = opened(tmp_path)
    place, secret = tmp_path / "train" / "part" / "007.png", tmp_path / "secret.png"
    shutil.move(place, secret)  # the very picture, so that only the link is wrong
    place.symlink_to(secret)
    answer = client(run)("picture/0/train/7")
    assert answer.status == 404
    assert b"link that leads out" in answer.body
    place.unlink()
    shutil.move(secret, tmp_path / "train" / "inside.png")
    place.symlink_to(tmp_path / "train" / "inside.png")
    assert client(open_run(tmp_path / "run"))("picture/0/train/7").status == 200


def test_other_images_than_were_scored_are_not_shown(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "queries" / "q3.png")
    run = open_run(root)
    assert run.queries.side.pictures is None
    assert "holds other images than were scored" in run.told[0]
    assert run.queries.side.ids[3] == "q3.png"
    assert client(run)("thumb/0/queries/3").status == 404


@pytest.mark.parametrize("where", ["new", "."])
def test_images_that_moved_are_found_where_they_are_said_to_be(tmp_path: Path, where: str) -> None:
    root = plain_run(tmp_path / "old")
    for name in ("train", "queries"):
        target = tmp_path / "new" / name
        target.parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / "old" / name, target)
    run = open_run(root)
    assert (run.train.side.pictures, run.queries.side.pictures) == (None, None)
    assert run.train.side.moved
    assert any("there is no folder" in line for line in run.told)
    found = open_run(root, [tmp_path / "elsewhere", tmp_path / "new"])
    assert found.told == []
    assert client(found)("thumb/0/train/9").status == 200
    assert client(found)("thumb/0/queries/0").status == 200


def test_images_without_a_digest_file_are_read(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    (root / "digests.json").unlink()
    assert open_run(root).told == []


@pytest.mark.parametrize("row", [[1, 2], [1, "x", "y"], "text", [1, 2, "d", 4], [True, 2, "d"]])
def test_digests_that_are_none_are_named(tmp_path: Path, row: object) -> None:
    root = plain_run(tmp_path)
    found = read_json(root / "digests.json")
    name = list(found["files"])[4]
    write_json(root / "digests.json", {**found, "files": {**found["files"], name: row}}, ordered=True)
    run = open_run(root)
    assert run.train.side.pictures is None
    assert f"`files.{name}" in run.told[0]


def test_candidates_alone_are_shown_among_all_images(tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", train_rows(8))
    queries = pictures(tmp_path / "queries", [{"file_name": "q.png"}])
    results = {"some": of_some(scores_of(train, queries), [1, 4, 6])}
    run = open_run(written(tmp_path / "run", results, train, queries))
    assert len(run.train) == 8
    assert run.methods["some"].rows is not None
    assert run.methods["some"].rows.tolist() == [1, 4, 6]
    assert run.train.facets[0].column == "creator"
    shutil.rmtree(tmp_path / "train")
    alone = open_run(tmp_path / "run")
    assert len(alone.train) == 3
    assert not alone.methods["some"].adds_up("creator")


def test_contributors_are_shown_by_one_picture_of_theirs(tmp_path: Path) -> None:
    """Values by creator: who is scored are four people, each of whom an image stands for."""
    train = pictures(tmp_path / "train", train_rows(8))
    queries = pictures(tmp_path / "queries", [{"file_name": "q.png"}])
    players = ["ben", "anna", "d'Arcy", "chloé"]
    recipe = {"values": {"by": "creator"}, "train": identity(train), "queries": identity(queries)}
    values = torch.tensor([[1.0, 2.0, 3.0, -1.0]])
    root = written(tmp_path / "run", {"shapley": Scores(values, queries.ids, players, recipe, "value")}, train, queries)
    known = read_json(root / "images.json")
    write_json(root / "images.json", {**known, "train": {**known["train"], "by": "creator", "players": players}})
    run = open_run(root)
    assert (run.told, run.who) == ([], "Contributors")
    assert list(run.train.side.ids) == players
    assert run.train.side.pictures is not None
    assert [train.meta["creator"][train.ids.index(name)] for name in run.train.side.pictures.names] == players


def test_a_narrower_question_is_told(tmp_path: Path) -> None:
    train = pictures(tmp_path / "train", train_rows(4))
    queries = pictures(tmp_path / "queries", [{"file_name": "q.png"}])
    scores = scores_of(train, queries)
    asked = {"mask": {"share": 0.25, "digest": "d"}, "timesteps": [0, 500]}
    some = replace(scores, recipe={**scores.recipe, "call": {"question": asked}})
    [method] = client(open_run(written(tmp_path / "run", {"m": some}, train, queries)))("api/runs").json[0]["methods"]
    assert method["question"] == (
        "a region of the pictures, 25 % of them (masks/d.png); timesteps 0 to 499, 0 being the least noisy"
    )
    odd = replace(scores, recipe={**scores.recipe, "call": {"question": {"mask": 3}}})
    assert "cannot tell" in reading.question_told(
        open_run(written(tmp_path / "r", {"m": odd}, train, queries)).methods["m"]
    )


def test_large_photographs_are_made_smaller_and_drawings_keep_their_edges() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 500, 3), np.uint8))
    assert Image.open(io.BytesIO(drawn(noise, 160))).size == (160, 96)
    art = Image.fromarray((np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    large = shown(drawn(art, 160))
    assert large.shape[:2] == (160, 160)
    assert set(np.unique(large)) == {0, 255}


def test_what_cannot_be_decoded_says_why(run: Run, tmp_path: Path) -> None:
    pictures_ = run.train.side.pictures
    assert pictures_ is not None
    with pytest.raises(Hidden, match="million pixels"):
        _huge(pictures_, tmp_path)


def _huge(known: Any, folder: Path) -> None:
    from whence.data.layout import Files
    from whence.storage.files import file_digest
    from whence.view.pictures import Pictures

    Image.new("L", (11_000, 11_000)).save(folder / "huge.png", compress_level=1)
    Pictures(Files(folder), folder, ["huge.png"], [file_digest(folder / "huge.png")]).decoded(0)


def test_what_is_kept_is_bounded() -> None:
    kept, made = Bounded(100), []

    def make(key: int) -> bytes:
        return kept.get(key, lambda: made.append(key) or bytes(40))  # type: ignore[func-returns-value]

    for key in (1, 2, 1, 3, 1, 2):
        make(key)
    assert made == [1, 2, 3, 2]  # 2 was asked for longest ago when 3 came
    assert kept.held <= 100
    assert len(Bounded(10).get("large", lambda: bytes(1000))) == 1000


# ------------------------------------------------------------------------------------------------------- who is let in

HOSTS = [
    "evil.example",
    "evil.example:8700",
    "127.0.0.1.evil.example",
    "127.0.0.1@evil.example",
    "localhost.evil.example:8700",
    "0.0.0.0:8700",
    "192.168.0.2:8700",
    "[::2]:8700",
    "",
    "127.0.0.1:8700:80",
    "127.0.0.1:80a",
    "localhost:٣",
]
METHODS = ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"]
TOKENS = ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "..", "static", "api", "%61-token_for.tests"]
PATHS = [
    "../../../etc/passwd",
    "..%2f..%2f..%2fetc/passwd",
    "%2e%2e/%2e%2e/etc/passwd",
    "static/../app.py",
    "static/..%5c..%5capp.py",
    "static/%00",
    "static/index.html%00.png",
    "static//etc/passwd",
    "static/app.py",
    "static/",
    "/etc/passwd",
    "picture/0/train/../../run/scores",
    "picture/0/train/part/000.png",
    "picture/0/train/-1",
    f"picture/0/train/{N}",
    f"picture/0/train/{'9' * 30}",
    f"picture/0/train/{'9' * 5000}",
    "picture/1/train/0",
    "picture/0/secret/0",
    "original/0/train/0",
    "picture/0/train/0.png",
    "api/0/query/9999",
    "api/0/query/1e3",
    "api/0/image/٣",
    "api/0/row/0/99",
    "api/0/group/9/0",
    "api/0/group/0/99",
    "api/0/list/secret",
    "api/0/list/train?start=-1",
    "api/0/list/train?limit=x",
    "api/0/list/train?sort=__class__",
    "api/0/list/train?sort=often:../../x",
    "api/0/some/train?rows=0,1,-2",
    f"api/0/some/train?rows={N}",
    "api/0/some/train?rows=" + ",".join(["1"] * 500),
    "api/0/exact?rows=0&query=999",
    "api/9/exact?rows=0",
    "run/scores/alpha/scores.json",
    "scores/alpha/scores.json",
    "docs",
    "openapi.json",
]


@pytest.mark.parametrize("host", [*HOSTS, None])
def test_another_host_is_refused(ask: Client, host: str | None) -> None:
    if host is not None and not host.isascii():
        assert not is_local(host)
        return
    for path in ("", "api/runs", "thumb/0/train/0"):
        answer = ask(path, host=host)
        assert answer.status == 403
        assert b"alpha" not in answer.body


def test_two_hosts_are_refused(run: Run) -> None:
    import asyncio

    headers = [(b"host", b"127.0.0.1:8700"), (b"host", b"evil.example")]
    assert asyncio.run(client(run).ask(f"/{TOKEN}/", "GET", headers)).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:65535", "LOCALHOST", "[::1]:8700", "[::1]", "127.0.0.1"])
def test_the_names_of_this_machine_are_let_in(ask: Client, host: str) -> None:
    assert ask("api/runs", host=host).status == 200


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_written(ask: Client, method: str) -> None:
    for path in ("", "api/runs", "thumb/0/train/0", "nothing"):
        answer = ask(path, method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("token", TOKENS)
def test_without_the_token_nothing_is_there(ask: Client, token: str) -> None:
    for path in ("", "api/runs", "static/style.css", "thumb/0/train/0"):
        answer = ask(path, token=token)
        assert answer.status == 404
        assert answer.body == b"nothing is here"


@pytest.mark.parametrize("path", PATHS)
def test_nothing_else_is_served(ask: Client, path: str) -> None:
    answer = ask(path)
    assert answer.status == 404, (path, answer.body[:100])
    assert b"root:" not in answer.body
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_there_are_more_than_fifty_of_them() -> None:
    assert len(HOSTS) + len(METHODS) + len(TOKENS) + len(PATHS) > 50


def test_raw_paths_without_a_token(ask: Client) -> None:
    for raw in ("//", "///", f"///{TOKEN}/", "//favicon.ico", f"//x/{TOKEN}/", f"//%2f{TOKEN}/"):
        assert ask(raw).status == 404, raw
    answer = ask(f"//{TOKEN}")
    assert (answer.status, answer.headers["location"]) == (307, f"/{TOKEN}/")


def test_every_answer_keeps_the_browser_here(ask: Client) -> None:
    for path in ("", "static/main.js", "api/runs", "thumb/0/train/0", "nothing"):
        headers = ask(path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


def test_head_is_answered(ask: Client) -> None:
    """Without its body, which is the matter of the server."""
    answer = ask("api/runs", "HEAD")
    assert answer.status == 200
    assert answer.headers["content-length"] == str(len(ask("api/runs").body))


def test_the_page_has_no_script_of_its_own_and_asks_nobody(ask: Client) -> None:
    page = ask("").body.decode()
    assert page.count("<script") == 1
    assert '<script type="module" src="static/main.js">' in page
    folder = ROOT / "src" / "whence" / "view" / "static"
    for file in folder.iterdir():
        text = file.read_text()
        assert ask(f"static/{file.name}").body == file.read_bytes()
        links = [word for word in text.split() if "://" in word and "www.w3.org" not in word]
        assert not links, (file.name, links)
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "@import",
        ):
            assert word not in text, (file.name, word)


def test_a_run_folder_stays_as_it_was(tmp_path: Path) -> None:
    root = plain_run(tmp_path)

    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}

    before = state()
    ask = client(open_run(root))
    for path in (
        "",
        "api/runs",
        "api/0/query/0",
        "api/0/image/0",
        "api/0/group/0/0",
        "thumb/0/train/0",
        "api/0/similar/0",
    ):
        assert ask(path).status == 200
    assert state() == before


# ------------------------------------------------------------------------------------------------------- hostile texts

STRINGS = {
    "script": "<script>steal()</script>",
    "attribute": 'x" onload="steal()" y=\'',
    "direction": "invoice\u202egnp.exe\u2066\u200f",
    "terminal": "a\x1b[2J\x07\r\nb",
    "formula": "=HYPERLINK(1)",
    "long": "x" * 100_000,
}


@pytest.mark.parametrize("text", STRINGS.values(), ids=STRINGS)
def test_hostile_texts_are_told_as_text(tmp_path: Path, text: str) -> None:
    rows = [{"file_name": f"{i}.png", "creator": text, "text": text, text[:50] or "x": text} for i in range(4)]
    train, queries = pictures(tmp_path / "t", rows), pictures(tmp_path / "q", [{"file_name": "q.png", "text": text}])
    scores = replace(scores_of(train, queries), scale=text, recipe={**scores_of(train, queries).recipe, "x": text})
    root = written(tmp_path / "run", {"method": scores}, train, queries)
    page = read_json(root / "report.json")
    write_json(root / "report.json", {**page, "title": text, "facts": [[text, text]]})
    write_json(
        root / "copies.json",
        {
            "format_version": 1,
            "asked": {"queries": read_json(root / "images.json")["queries"]["pictures"]},
            "warnings": {"q.png": text},
        },
    )
    ask = client(open_run(root))
    for path in (
        "api/runs",
        "api/0/list/train",
        "api/0/detail/train/0",
        "api/0/query/0",
        "api/0/image/0",
        "api/0/group/0/0",
    ):
        answer = ask(path)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        told = answer.body.decode()
        assert len(told) < 40_000, path
        odd = {
            letter
            for one in texts_of(answer.json)
            for letter in one
            if unicodedata.category(letter) in ("Cc", "Cf", "Cs")
        }
        assert not odd, path
    assert ask("api/0/exact?rows=0").json[0]["columns"]["creator"] == train.meta["creator"][0]


def texts_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for pair in value.items() for one in pair for text in texts_of(one)]
    return (
        [text for one in value for text in texts_of(one)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )


def test_a_long_text_says_how_much_is_left_out() -> None:
    assert cut("x" * 1000) == "x" * 160 + "… (840 letters more)"
    assert cut(3) == "3"


# ----------------------------------------------------------------------------------------------------- looking for them


def test_search_filter_and_sort(run: Run, ask: Client) -> None:
    found = ask("api/0/list/train?words=ANNA%20thing").json
    assert found["count"] == N // 4
    assert all(item["label"] == "anna" for item in found["items"])
    assert ask("api/0/list/train?words=chlo%C3%A9").json["count"] == N // 4
    assert ask("api/0/list/train?c0=1&c1=0").json["count"] == N // 4
    assert ask("api/0/list/train?c0=0&c1=0").json["count"] == 0
    assert ask("api/0/list/train?words=nothing-like-it").json == {"count": 0, "items": []}
    names = [item["name"] for item in ask("api/0/list/train?sort=name&start=10&limit=7").json["items"]]
    assert names == sorted(run.train.side.ids)[10:17]
    assert ask("api/0/rows/train?c0=3").json == [3 + 4 * i for i in range(N // 4)]
    assert ask("api/0/list/queries?words=query%203").json["items"][0]["name"] == "q3.png"


def test_columns_are_offered_by_their_telling_names(ask: Client) -> None:
    [about] = ask("api/runs").json
    assert [facet["column"] for facet in about["train"]["facets"]] == ["creator", "license"]
    assert about["train"]["caption"] == "text"
    assert [value["images"] for value in about["train"]["facets"][0]["values"]] == [N // 4] * 4
    assert [method["name"] for method in about["methods"]] == ["alpha", "beta", "some"]
    assert about["methods"][2]["scored"] == f"3 of {N} images, named by alpha"
    assert "what other timesteps and noise would change" in about["methods"][0]["errors"]


def test_exact_has_scores_and_ranks_for_a_query(folder: Path, ask: Client) -> None:
    found = ask("api/0/exact?rows=9,4&query=1").json
    values = saved(folder, "alpha").values[1].double().numpy()
    assert [one["row"] for one in found] == [9, 4]
    assert found[0]["scores"]["alpha"] == {"score": values[9], "rank": int((values > values[9]).sum()) + 1}
    assert "some" in found[0]["scores"]
    assert "some" not in found[1]["scores"]


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with refuses("there is no such folder", accepted="the output folder of `whence attribute`"):
        open_run(tmp_path / "nothing")
    with refuses("holds no finished scores"):
        open_run(tmp_path)
    root = plain_run(tmp_path)
    with refuses("holds no finished scores", accepted=str(root)):
        open_run(root / "scores" / "alpha")


@pytest.mark.parametrize("name", ["index.json", "scores/alpha/scores.json"])
def test_a_run_of_a_later_version_is_refused(tmp_path: Path, name: str) -> None:
    root = plain_run(tmp_path)
    known = read_json(root / name) if (root / name).is_file() else {}
    write_json(root / name, {**known, "format_version": 99})
    with refuses("written by a newer whence (format 99); upgrade to read it"):
        open_run(root)


@pytest.mark.filterwarnings("ignore:.*holds no scores.json")
def test_a_half_finished_run_says_which_methods_are_missing(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    (root / "scores" / "beta" / "scores.json").unlink()
    (root / "config.toml").write_text('method = ["alpha", "beta", "gamma"]\n')
    run = open_run(root)
    assert list(run.methods) == ["alpha", "some"]
    assert run.told == ["not finished, or lost: beta, gamma; the command that began them goes on where it stopped"]
    (root / "report.json").unlink()
    assert any("there is no report.json" in line for line in open_run(root).told)
    told: Any = client(run)("api/runs").json[0]["told"]
    assert told == run.told


def test_scores_of_other_images_are_left_out_by_name(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    scores = load_scores(root / "scores" / "beta")
    save_scores(root / "scores" / "beta", replace(scores, recipe={**scores.recipe, "train": "of others"}))
    run = open_run(root)
    assert list(run.methods) == ["alpha", "some"]
    assert "left out, because their scores are of other images: beta" in run.told


def test_scores_without_a_note_of_images_are_still_read(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    (root / "images.json").unlink()
    run = open_run(root)
    assert "does not say where its images are" in run.told[0]
    assert client(run)("api/0/query/0").json["images"]


def test_copies_are_warned_of_where_they_are_of_these_pictures(tmp_path: Path) -> None:
    root = plain_run(tmp_path)
    of = read_json(root / "images.json")["queries"]["pictures"]
    told = {"format_version": 1, "asked": {"train": "t", "queries": of}, "warnings": {"q1.png": "looks like a copy"}}
    write_json(root / "copies.json", told)
    assert open_run(root).warnings == {"q1.png": "looks like a copy"}
    write_json(root / "copies.json", {**told, "asked": {"train": "t", "queries": "others"}})
    assert open_run(root).warnings == {}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.com", "::", ""])
def test_only_this_machine_is_listened_on(host: str) -> None:
    with refuses("can be reached from other machines", "--host", "127.0.0.1"):
        serving.bound(host, 0, print)


def test_a_port_in_use_takes_the_next_and_says_so() -> None:
    said: list[str] = []
    with serving.bound("127.0.0.1", 0, said.append) as first:
        port = first.getsockname()[1]
        with serving.bound("127.0.0.1", port, said.append) as second:
            assert said == [f"port {port} is in use; {second.getsockname()[1]} is taken instead"]
            assert serving.address(second, "127.0.0.1", "t") == f"http://127.0.0.1:{second.getsockname()[1]}/t/"


def test_ports_that_are_all_in_use_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TRIES", 1)
    with serving.bound("127.0.0.1", 0, print) as first:
        port = first.getsockname()[1]
        with refuses(f"ports {port} to {port}", "--port", "0 for any"):
            serving.bound("127.0.0.1", port, print)


def test_without_a_display_the_address_is_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(serving, "has_display", lambda: False)
    monkeypatch.setattr(serving.webbrowser, "open", lambda where: pytest.fail("opened a browser"))
    monkeypatch.setattr(serving.uvicorn.Server, "run", lambda self, sockets: None)
    serving.serve([folder / "run"], serving.Serving(port=0), said.append)
    assert any(line.startswith("http://127.0.0.1:") for line in said)
    assert "there is no display here, so no browser was opened" in said
    assert said[0] == f"{folder / 'run'}: {M} pictures, {N} training images, alpha, beta, some"


def test_a_browser_is_opened_where_there_is_a_display(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(serving.webbrowser, "open", opened_.append)
    monkeypatch.setattr(serving.uvicorn.Server, "run", lambda self, sockets: None)
    serving.serve([folder / "run"], serving.Serving(port=0), lambda line: None)
    serving.serve([folder / "run"], serving.Serving(port=0, browser=False), lambda line: None)
    assert len(opened_) == 1
    assert len({opened_[0].split("/")[3], TOKEN}) == 2
    assert len(opened_[0].split("/")[3]) >= 32


def test_the_verb_refuses_in_one_line(folder: Path, tmp_path: Path) -> None:
    refused("view", tmp_path / "none", "--port", 0, says="there is no such folder")
    refused("view", folder / "run", "--host", "0.0.0.0", says="--host: 0.0.0.0 can be reached from other machines")
    refused("view", folder / "run", "--port", 70000, says="--port.*65535")


def test_without_its_libraries_the_verb_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "whence.view.serving", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused("view", folder / "run", says="which is not installed; accepted: pip install 'whence-attribution.view.'")


def test_the_viewer_needs_no_torch() -> None:
    """It is there in a second, and in a tenth of the memory."""
    heavy = "{'torch', 'diffusers', 'transformers', 'matplotlib'}"
    code = f"import sys, whence.view.serving; print(sorted({heavy} & {{*sys.modules}}))"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "[]"


def test_it_answers_over_a_socket(folder: Path) -> None:
    """The whole of it, as a person starts it: the address, a page, and its end by Ctrl-C with exit code 0."""
    import signal
    import urllib.error
    import urllib.request

    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "whence.cli.main", "view", str(folder / "run"), "--no_browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        where = next(line for line in process.stdout if line.startswith("http")).strip()
        with urllib.request.urlopen(f"{where}api/runs", timeout=20) as answer:
            assert json.load(answer)[0]["queries"]["count"] == M
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(where.rsplit("/", 2)[0] + "/", timeout=20)
        assert refusal.value.code == 404
        port = int(where.split(":")[2].split("/")[0])
        with socket.create_connection(("127.0.0.1", port)) as raw:  # as no client of Python would ask
            raw.sendall(b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert b" 404 " in raw.recv(2000).partition(b"\r\n")[0]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_several_runs_stand_beside_each_other(folder: Path, tmp_path: Path) -> None:
    other = plain_run(tmp_path, 12, 2)
    ask = Client(viewer_app([open_run(folder / "run"), open_run(other)], TOKEN))
    assert [run["queries"]["count"] for run in ask("api/runs").json] == [M, 2]
    assert ask("api/1/list/train").json["count"] == 12
    assert ask("thumb/1/train/11").status == 200


def test_pictures_of_other_layouts_are_found(tmp_path: Path) -> None:
    """Sub-folders that are classes, and a run whose labels number them."""
    for kind in ("cat", "dog"):
        pictures(
            tmp_path / "train" / kind, [{"file_name": f"{i}.png"} for i in range(3)], seed=len(kind) + ord(kind[0])
        )
        (tmp_path / "train" / kind / "metadata.jsonl").unlink()
    queries = pictures(tmp_path / "queries", [{"file_name": "q.png"}])
    train = image_folder(tmp_path / "train", cache=tmp_path / "run" / "digests.json")
    assert train.labels is not None
    run = open_run(written(tmp_path / "run", {"one": scores_of(train, queries)}, train, queries))
    assert run.told == []
    assert [facet.column for facet in run.train.facets] == ["label"]
    note(tmp_path / "run", train, queries)
    assert client(run)("thumb/0/train/5").status == 200
