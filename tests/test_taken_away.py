"""Which method was right: exact on numbers made up, true of models that are trained again, and shown as found."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t as students

from agreement import close
from errors import refuses
from pages import unscripted
from test_cli import whence
from whence.data.images import tensor_images
from whence.diffusion.draws import uniform
from whence.diffusion.outputs import loss
from whence.evaluation import demo, taken_away
from whence.evaluation.taken_away import DRAWS, Taking, take_away, verdict
from whence.report import removed
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores
from whence.task import report_again
from whence.training.optimizer import AdamW
from whence.training.recipe import New, NoiseSchedule, Recipe, Schedule
from whence.training.study import Study
from whence.training.unroll import Queries, Run, Trainer, final_weights
from whence.training.unroll.measured import values as measured
from whence.types import Scores

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 0.001, 12)
RECIPE = Recipe(
    New({"_class_name": "MLPDenoiser", "sample_size": 4, "in_channels": 1, "width": 8, "layers": 1}, NoiseSchedule(20)),
    AdamW(3e-3),
    Schedule(12, 2),
    batch_size=4,
    ema=0.9,
    seed=3,
)


def rises(**arms: float) -> dict[str, np.ndarray]:
    """Rises of 12 pictures: each arm's own mean, and noise that no two arms share."""
    return {name: mean + np.roll(NOISE, 3 * place) for place, (name, mean) in enumerate(arms.items())}


def test_intervals_are_those_of_student() -> None:
    values = np.array([0.1, 0.2, 0.4])
    mean, low, high = taken_away.between(values, 0.95)
    half = students.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
    assert (mean, low, high) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half))
    found = taken_away.differences({"a": values, "b": values * 0.5, "random": values * 0}, 0.95)
    assert [(each["more"], each["less"]) for each in found] == [("a", "b"), ("a", "random"), ("b", "random")]
    gap = students.ppf(1 - 0.05 / 6, 2) * (values * 0.5).std(ddof=1) / 3**0.5
    assert found[0]["high"] - found[0]["mean"] == pytest.approx(gap), "all three hold together"


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        (
            {"a": 0.3, "b": 0.2, "random": 0.0},
            "a was right: without the 20 images it names, the loss of a picture rises by 30",
        ),
        ({"a": 0.3, "b": 0.2, "random": 0.0}, "b (20\N{NO-BREAK SPACE}%) is behind (+10"),
        ({"a": 0.2, "b": 0.3, "random": 0.0}, "b was right"),
        ({"a": 0.3, "b": 0.3001, "random": 0.0}, "b and a were right: without the 20 images they name"),
        (
            {"a": 0.3, "b": 0.3001, "random": 0.0},
            "no difference between b and the other is seen (0.0\N{NO-BREAK SPACE}%",
        ),
        ({"a": 0.3, "b": 0.0, "random": 0.0}, "No difference to random images is seen for b."),
        (
            {"a": 0.0, "b": 0.0001, "random": 0.0},
            "No difference seen: the 20 images that a method names matter no more than",
        ),
        ({"a": -0.2, "b": -0.1, "random": 0.0}, "No difference seen"),
    ],
)
def test_the_sentence_says_what_the_numbers_show(arms: dict[str, float], told: str) -> None:
    said, basis = verdict(rises(**arms), Taking())
    assert told in said
    assert "12 pictures of one model" in basis


def test_the_sentence_is_rarely_wrong_where_nothing_differs() -> None:
    """Of 400 worlds without any difference at most 5 % (and what chance adds) are said to have one."""
    rng = np.random.default_rng(1)
    wrong = sum(
        "No difference seen"
        not in verdict({name: rng.normal(0, 1, 10) for name in ("a", "b", "c", "random")}, Taking())[0]
        for _ in range(400)
    )
    assert wrong <= 32


@pytest.fixture(scope="module")
def world():
    study = Study(RECIPE)
    made = [
        torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        for seed, count in ((0, 10), (1, 3))
    ]
    train, queries = tensor_images(made[0], [f"t{i}" for i in range(10)]), tensor_images(made[1], ["q0", "q1", "q2"])
    values = torch.rand(3, 10, generator=torch.Generator().manual_seed(2))
    scores = {name: Scores(v, queries.ids, train.ids, {}) for name, v in {"up": values, "down": -values}.items()}
    return study, train, queries, scores


def test_what_is_told_is_the_rise_of_models_that_were_trained_again(world, tmp_path) -> None:
    study, train, queries, scores = world
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5))

    def draw(network: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return network(noise, torch.full((3,), 7))[0]

    found = take_away(Taking(3, 2, 4), study, (train, queries), scores, draw, tmp_path)
    assert (found["count"], [*found["pictures"]]) == (3, queries.ids)
    again = take_away(Taking(3, 2, 4), study, (train, queries), scores, draw, tmp_path)
    assert again == found, "what is there is used again"

    def losses(keep: torch.Tensor) -> np.ndarray:
        run = Run.of(study, train, 3, keep)
        return measured(Trainer(run), Queries(queries, loss, DRAWS), final_weights(run)).numpy()

    whole = losses(torch.ones(10))
    for name, q in itertools.product(scores, range(3)):
        keep = torch.ones(10)
        keep[scores[name].values[q].argsort(descending=True)[:3]] = 0
        expected = (losses(keep) - whole) / whole
        told = next(each["rise"] for each in found["pictures"][f"q{q}"] if each["arm"] == name)
        close(torch.tensor(told), torch.tensor(expected[q]), 1e-4)


@pytest.mark.parametrize("count", [0, 10])
def test_some_must_go_and_some_must_stay(world, tmp_path, count) -> None:
    study, train, queries, scores = world
    with refuses(f"{count} of 10 images", "taking away", "fewer"):
        take_away(Taking(count), study, (train, queries), scores, lambda network: torch.zeros(3, 1, 4, 4), tmp_path)


def test_random_sets_name_nobodys_images_and_are_the_same_again(world) -> None:
    _, _, _, scores = world
    sets = taken_away.named(Taking(4, 3), scores, 10)
    assert sets == taken_away.named(Taking(4, 3), scores, 10)
    assert sets["up", 1] == sorted(scores["up"].values[1].argsort(descending=True)[:4].tolist())
    assert sets["down", 1] == sorted(scores["up"].values[1].argsort()[:4].tolist())
    assert len({tuple(sets["random", k]) for k in range(3)}) == 3


def test_pictures_are_kept_exactly() -> None:
    picture = torch.linspace(-1, 1, 48).reshape(3, 4, 4)
    image = Image.open(io.BytesIO(base64.b64decode(taken_away.png(picture))))
    assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), ((picture + 1) * 127.5).round().byte())


digits = demo.digits


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[Path, demo.Demo]:
    """The demo, as small as it can be."""
    folder, patch = tmp_path_factory.mktemp("demo"), pytest.MonkeyPatch()
    short = Recipe(demo.RECIPE.model, demo.RECIPE.optimizer, Schedule(12, 2), batch_size=16, max_grad_norm=0.0, ema=0.9)
    patch.setattr(demo, "RECIPE", short)
    patch.setattr(demo, "digits", lambda folder: digits(folder, 40))
    quick = {"masks": 2, "pairs": False, "draws": uniform(4), "resample_draws": None}
    patch.setattr(demo, "METHODS", {"averaged_metagradient": quick, "d_trak": {"dim": 64}, "pixel_cosine": {}})
    found = demo.demo(folder, pictures=2, taking=Taking(4, 2, 8))
    patch.undo()
    return folder, found


def test_the_demo_shows_the_truth_beside_what_was_said(shown) -> None:
    folder, found = shown
    page = unscripted(found.report.read_text())
    note = read_json(folder / "removed.json")
    assert found.said == note["said"]
    assert f'<p class="happened">{html.escape(found.said, quote=False)}</p>' in page
    for name in demo.METHODS:
        assert page.count(f"without the 4 that {name.replace('_', '_<wbr>')} names") >= 2
    assert page.count('class="redrawn"') == 2 * (2 + len(demo.METHODS))
    assert page.index('id="happened"') < page.index('id="overview"')


def test_the_demo_says_what_the_model_itself_draws(shown) -> None:
    """Its own row is the picture that is explained: training again with all images is training."""
    folder, _ = shown
    note = read_json(folder / "removed.json")
    for name, found in note["pictures"].items():
        own = np.array(Image.open(io.BytesIO(base64.b64decode(found[0]["png"]))))
        drawn = np.array(Image.open(next((folder / "generated").rglob(name))))
        assert np.abs(own.astype(int) - drawn.astype(int)).max() <= 1


def test_a_page_without_its_truth_says_so_and_other_pictures_have_none(shown, tmp_path) -> None:
    folder, _ = shown
    note = json.loads((folder / "removed.json").read_text())
    before = (folder / "report.html").read_bytes()
    (folder / "removed.json").unlink()
    with pytest.warns(UserWarning, match="what happened without the images"):
        report_again(folder)
    assert b'id="happened"' not in (folder / "report.html").read_bytes()
    note.pop("checksum", None)
    write_json(folder / "removed.json", {**note, "queries": "others"})
    report_again(folder)
    assert b'id="happened"' not in (folder / "report.html").read_bytes()
    write_json(folder / "removed.json", {**note, "scores": {**note["scores"], "d_trak": "another"}})
    with pytest.warns(UserWarning, match="is of other scores of d_trak"):
        report_again(folder)
    assert b'id="happened"' not in (folder / "report.html").read_bytes()
    write_json(folder / "removed.json", note)
    report_again(folder)
    assert (folder / "report.html").read_bytes() == before


def test_hostile_truth_is_shown_as_text(shown) -> None:
    folder, _ = shown
    note = read_json(folder / "removed.json")
    note.pop("checksum", None)
    hostile = {**note, "said": "<script>alert(1)</script>"}
    hostile["pictures"] = {name: [{"arm": '"><img src=x>', "png": '"><script>'}] for name in note["pictures"]}
    found = removed.shown_of(hostile)
    assert all(each.uri == "data:image/png;base64,script" for of in found.pictures.values() for each in of)
    write_json(folder / "removed.json", hostile)
    report_again(folder)
    page = unscripted((folder / "report.html").read_text())
    assert "<img src=x" not in page
    write_json(folder / "removed.json", note)
    report_again(folder)


def test_the_command_ends_with_the_verdict_and_three_commands(shown, monkeypatch) -> None:
    folder, found = shown
    monkeypatch.setattr(demo, "demo", lambda *_: found)
    done = whence("demo", "--output_dir", folder)
    assert done.code == 0
    lines = done.out.splitlines()
    assert found.said in lines
    assert [line.split()[:2] for line in lines[-3:]] == [
        ["whence", "doctor"],
        ["whence", "attribute"],
        ["whence", "train"],
    ]
    assert len(load_scores(folder / "scores" / "d_trak").query_ids) == 2
