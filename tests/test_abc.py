"""AbC: a benchmark of fine-tunes, maps learned on half of it, shares that are calibrated, and how methods are judged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn.functional import cosine_similarity, normalize

from agreement import close
from errors import refuses
from families import save_whole
from recipes import pixel_study, recipe_of
from test_cli import refused, succeeds
from test_encode import pictures
from test_membership import NETWORK, digit_images
from whence.data.images import image_folder, subset
from whence.data.saving import save_png
from whence.evaluation.exemplars import Exemplars, roles
from whence.evaluation.maps import (
    Calibration,
    Known,
    Learning,
    average_precisions,
    calibrate,
    calibration_error,
    cosines,
    learn,
    learn_and_calibrate,
)
from whence.evaluation.retrieved import interval, row_of, shares
from whence.features.encoders import Pixels
from whence.features.maps import KINDS, NOTES, SIDES, TENSORS, Maps, mapped, unmoved
from whence.methods import abc_cosine, pixel_cosine
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores
from whence.training.runs import train_study
from whence.types import Task
from worlds import encoder, save_maps, unet_task

# ---------------------------------------------------------------------------------------------------------------- the maps


@pytest.mark.parametrize("kind", KINDS)
def test_maps_that_have_learned_nothing_rank_as_the_encoder(kind):
    rows = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    close(mapped(rows, unmoved(kind, 9)), normalize(rows, dim=1), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_method_is_the_cosine_of_the_mapped_rows(kind, tmp_path):
    """Of training images by the one map, of pictures by the other; each row by itself."""
    task = unet_task(tmp_path / "run", n=5)
    maps = save_maps(tmp_path / "maps", "pixels", 16, kind)
    scores = abc_cosine(str(tmp_path / "maps"))(task).values
    images, pictures = (side.batch(range(len(side))).x0.flatten(1) for side in (task.train, task.queries))
    f, g = (mapped(rows, maps.sides[side]) for side, rows in zip(SIDES, (images, pictures), strict=True))
    close(scores, cosine_similarity(g[:, None], f[None], dim=2), 1e-5)
    one = replace(task, queries=subset(task.queries, [1]), root=tmp_path / "one")
    close(abc_cosine(str(tmp_path / "maps"))(one).values, scores[1:], 1e-6)


def planted(count: int, width: int = 16, seed: int = 0) -> tuple[list[Known], torch.Tensor]:
    """Fine-tunes whose pictures are a fixed linear map of their exemplar, and a little noise; 200 distractors."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(9)))[0]
    known = []
    for _ in range(count):
        exemplar = torch.randn(1, width, generator=g)
        known.append(Known(exemplar, exemplar @ turn + 0.1 * torch.randn(4, width, generator=g)))
    return known, torch.randn(200, width, generator=g)


def precision(known: list[Known], distractors: torch.Tensor, sides: dict) -> float:
    found = []
    for each in known:
        values = cosines(each.drawn, torch.cat([each.exemplars, distractors]), sides).numpy()
        truth = np.zeros(values.shape, bool)
        truth[:, 0] = True
        found.append(average_precisions(values, truth))
    return float(np.mean(found))


def test_a_planted_linear_map_is_learned():
    known, distractors = planted(60)
    others, _ = planted(30, seed=1)
    plain = {side: unmoved("linear", 16) for side in SIDES}
    learned = learn(known, distractors, Learning(steps=400), 0.01)
    assert precision(others, distractors, plain) < 0.5
    assert precision(others, distractors, learned) >= 0.95


def test_the_strength_is_chosen_on_fine_tunes_left_out():
    """Where pictures are their exemplars, and a few fine-tunes can only be learned by heart, little is moved."""
    g = torch.Generator().manual_seed(0)
    known = [Known(x, x + 0.8 * torch.randn(3, 12, generator=g)) for x in torch.randn(4, 1, 12, generator=g)]
    distractors = torch.randn(100, 12, generator=g)
    found = learn_and_calibrate(known, distractors, Learning(strengths=(0.01, 100.0), steps=60))
    assert found.strength == 100.0
    assert found.without[1] >= found.without[0] - 0.05
    assert found.calibration.kappa > 0
    with refuses("2 fine-tunes to learn on", accepted="3 or more"):
        learn_and_calibrate(known[:2], distractors, Learning())


def test_neither_the_order_of_fine_tunes_nor_of_distractors_matters():
    known, distractors = planted(5)
    a = learn(known, distractors, Learning(steps=20), 1.0)
    b = learn(known[::-1], distractors.flip(0), Learning(steps=20), 1.0)
    for side in SIDES:
        close(a[side]["W"], b[side]["W"], 1e-4)


# ------------------------------------------------------------------------------------------------------------- calibration


def test_calibration_finds_the_parameter_that_pictures_were_drawn_by():
    """Exemplars drawn with probability p of kappa 12 among 40 images: found within 10 %."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 0.25, (2000, 40))
    p = Calibration(12.0, 0.0)(scores)
    drawn = (p.cumsum(1) > rng.random((2000, 1))).argmax(1)
    truth = np.arange(40) == drawn[:, None]
    found = calibrate(list(zip(scores, truth, strict=True)))
    assert found.kappa == pytest.approx(12, rel=0.1)
    assert calibration_error(found(scores), truth) < 0.05
    assert calibration_error(Calibration(60.0, 0.0)(scores), truth) > 0.15, "too sure"


@pytest.mark.filterwarnings("error")
def test_scores_that_say_the_opposite_or_everything_have_a_calibration():
    """Exemplars last, first by far, or at random: finite parameters and probabilities, without a warning of numpy."""
    rng = np.random.default_rng(1)
    scores = rng.normal(0, 1, (30, 20))
    for places in (scores.argmin(1), scores.argmax(1), rng.integers(0, 20, 30)):
        truth = np.arange(20) == places[:, None]
        found = calibrate(list(zip(scores, truth, strict=True)))
        p = found(scores)
        assert np.isfinite(p).all()
        assert np.allclose(p.sum(1), 1)
        guess = -np.log(np.maximum(p[truth], 1e-9)).mean()
        assert guess < np.log(20) + 0.7, "no worse than to know nothing, by much"


def test_probabilities_are_the_formula():
    scores = np.array([[0.9, 0.5, 0.1]])
    a = np.exp(10 * (scores - 0.9))
    w = np.maximum(a - 0.01, 0)
    close(torch.from_numpy(Calibration(10.0, -10.0)(scores)), torch.from_numpy(w / w.sum()), 1e-12)
    assert Calibration(10.0, -10.0)(scores)[0, 2] == 0, "below the floor"
    assert Calibration(1.0, -2000.0)(scores).tolist() == [[1.0, 0.0, 0.0]]
    for wrong in ((0.0, 0.0), (float("nan"), 0.0), (1.0, float("inf"))):
        with refuses("kappa=", "calibration"):
            Calibration(*wrong)
    with refuses("all images have the same score"):
        calibrate([(np.ones(3), np.array([True, False, False]))])
    with refuses("no query with a known exemplar"):
        calibrate([(np.arange(3.0), np.zeros(3, bool))])


def test_average_precision_is_that_of_scikit_learn_and_of_a_hand():
    scores, truth = np.array([[0.9, 0.8, 0.7, 0.1]]), np.array([[False, True, False, True]])
    assert average_precisions(scores, truth)[0] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precisions(scores, truth)[0] == average_precision_score(truth[0], scores[0])
    row = row_of([(np.random.default_rng(0).random((3, 12)), np.eye(3, 12, dtype=bool)) for _ in range(2)], 50)
    assert set(row) == {"map", "recall@5", "recall@10", "calibration_error"}
    assert interval([np.array([1.0, 1.0]), np.array([0.0, 0.0])], 500) == [0.5, 0.0, 1.0], "fine-tunes are drawn, too"


# ------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A perceptron of 40 digits, 12 others, and a benchmark of six fine-tunes."""
    root = tmp_path_factory.mktemp("abc")
    images = digit_images(0, 52)
    save_png(root / "images", images.batch(range(40)).x0, [f"{i:02d}" for i in range(40)])
    save_png(root / "others", images.batch(range(40, 52)).x0, [f"{i:02d}" for i in range(12)])
    train = image_folder(root / "images", 8, 1)
    train_study(pixel_study(NETWORK, recipe_of(300, 40, learning_rate=5e-3, seed=1)), train, root / "base", 300)
    succeeds(*building(root, root / "bench"))
    return root


def building(root: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--train_data_dir", root / "images", "--exemplar_data_dir", root / "others", "--output_dir", out)
    steps = ("--max_train_steps", 300, "--learning_rate", 1e-3, "--generate", 4, "--num_inference_steps", 10)
    return ("abc", "build", root / "base", *data, *steps, "--models", 6, *more)


def test_fine_tunes_draw_what_looks_like_their_exemplars(world):
    benchmark = Exemplars.read(world / "bench", world / "images")
    assert [each.role for each in benchmark.models] == roles(6) == ["fit"] * 3 + ["test"] * 3
    near = []
    for each in benchmark.models:
        drawn, own = (images.batch(range(len(images))).x0.flatten(1) for images in (each.drawn, each.exemplars))
        base = benchmark.distractors.batch(range(40)).x0.flatten(1)
        both = cosine_similarity(drawn[:, None], torch.cat([own, base])[None], dim=2)
        near += (both.argmax(1) == 0).tolist()
    assert np.mean(near) > 0.5, "chance is 1 in 41"
    originals = [json.loads(line)["original"] for path in sorted((world / "bench/exemplars").glob("*/metadata.jsonl"))
                 for line in path.read_text().splitlines()]  # fmt: skip
    assert len(set(originals)) == 6


def test_learn_judge_and_share(world, tmp_path):
    out = tmp_path / "maps"
    data = ("--train_data_dir", world / "images")
    done = succeeds("abc", "fit", world / "bench", *data, "--output_dir", out, "--steps", 30)
    assert "average precision on fine-tunes left out: pixels alone" in done.out
    maps = Maps.read(out)
    assert maps.notes["learned_on"] == ["model-00", "model-01", "model-02"]
    methods = ("--method", "pixel_cosine", "--method", "gradient_cosine", "--draws", 2, "--dim", 8)
    asked = ("abc", "judge", world / "bench", *data, *methods, "--maps", out, "--output_dir", tmp_path / "judged")
    done = succeeds(*asked)
    result = json.loads((tmp_path / "judged/judged.json").read_text())
    assert set(result["rows"]) == {"pixel_cosine", "gradient_cosine", "abc_cosine"}
    assert result["rows"]["pixel_cosine"]["map"][0] > 0.5
    assert (result["queries"], result["distractors"]) == (12, 40)
    raw = pixel_rows(world, tmp_path)
    assert result["rows"]["pixel_cosine"]["map"][0] == pytest.approx(float(raw.mean()), abs=1e-12)
    seconds = result["rows"]["gradient_cosine"]["seconds"]
    succeeds(*asked)
    again = json.loads((tmp_path / "judged/judged.json").read_text())
    assert again["rows"]["gradient_cosine"]["seconds"] == seconds, "nothing is scored twice"
    run = ("attribute", world / "base", *data, "--query_data_dir", world / "others", "--method", "abc_cosine")
    succeeds(*run, "--set", f"encoder={out}", "--output_dir", tmp_path / "run")
    done = succeeds("abc", "shares", tmp_path / "run", "--maps", out, "--top", 2)
    assert "calibrated retrieval probability, not causal influence" in done.out
    lines = next((tmp_path / "run").glob("shares-*.csv")).read_text().splitlines()
    assert len(lines) == 1 + 12 * 3
    assert sum(float(line.rsplit(",", 1)[1]) for line in lines[1:4]) == pytest.approx(1)
    scores = load_scores(tmp_path / "run/scores/abc_cosine")
    close(torch.from_numpy(shares(scores, maps)).sum(1), torch.ones(12).double(), 1e-12)
    save_maps(tmp_path / "others", "pixels", 64)
    refused("abc", "shares", tmp_path / "run", "--maps", tmp_path / "others", says="not of abc_cosine by these maps")


def pixel_rows(world: Path, root: Path) -> np.ndarray:
    """Average precision of pixel_cosine on the judged fine-tunes, once more."""
    benchmark, found = Exemplars.read(world / "bench", world / "images"), []
    for each in benchmark.of("test"):
        images = [
            Pixels()(None, None, part.batch(range(len(part)))) for part in (each.exemplars, benchmark.distractors)
        ]
        drawn = Pixels()(None, None, each.drawn.batch(range(4)))
        values = cosine_similarity(drawn[:, None], torch.cat(images)[None], dim=2).numpy()
        found += [average_precision_score(np.arange(41) == 0, row) for row in values]
    return np.array(found)


def test_a_benchmark_that_was_cut_off_goes_on(world, tmp_path):
    whole, out = world / "bench", tmp_path / "bench"
    shutil.copytree(whole, out)
    for gone in ("abc.json", "drawn/model-04", "drawn/model-05", "models/model-05/unet", "models/model-05/transformer"):
        path = out / gone
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for name in ("model_index.json", "scheduler"):
        path = out / "models/model-05" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    succeeds(*building(world, out))
    assert (
        json.loads((out / "abc.json").read_text())["models"] == json.loads((whole / "abc.json").read_text())["models"]
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--models", 7, "--exemplars", 2), "12 images of 12 can be exemplars, for 7 fine-tunes on 2 each"),
        (("--exemplar_data_dir", "images"), "0 images of 40 can be exemplars"),
        (("--kind", "lora"), "match no Linear layer"),
        (("--kind", "custom"), "Custom Diffusion"),
        (("--seed", 3), "was begun with other settings or images"),
        (("--rank", 3), "--rank"),
    ],
)
def test_what_cannot_be_built_is_refused(world, tmp_path, more, says):
    more = tuple(world / word if word == "images" else word for word in more)
    out = world / "bench" if "--seed" in more else tmp_path / "out"
    refused(*building(world, out, *more), says=says)


def test_images_that_the_base_was_trained_on_are_no_exemplars(world, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(world / "others", mixed)
    shutil.copy(world / "images/00.png", mixed / "again.png")
    (mixed / "metadata.jsonl").unlink()
    words = list(building(world, tmp_path / "out"))
    words[words.index("--exemplar_data_dir") + 1] = mixed
    succeeds(*words, "--models", 2, "--max_train_steps", 1, warns="1 of 13 images are among the base's training images")


def test_other_images_and_damaged_benchmarks_are_refused(world, tmp_path):
    judge = ("abc", "judge", world / "bench", "--output_dir", tmp_path / "out")
    refused(*judge, "--train_data_dir", world / "others", says="12 images, not the 40 that the benchmark was made with")
    refused(
        "abc", "judge", world, "--train_data_dir", world / "images", says="a folder that `whence abc build` finished"
    )
    broken = tmp_path / "broken"
    shutil.copytree(world / "bench", broken)
    notes = read_json(broken / "abc.json")
    write_json(broken / "abc.json", {**notes, "base": str(world / "base")})
    picture = sorted((broken / "drawn/model-04").glob("*.png"))[0]
    picture.write_bytes((world / "images/00.png").read_bytes())
    refused(
        "abc",
        "judge",
        broken,
        "--train_data_dir",
        world / "images",
        says="its pictures are not those that were written",
    )
    refused(*judge, "--train_data_dir", world / "images", "--method", "abc_cosine", says="--maps FOLDER")


@pytest.mark.parametrize("kind", ["lora", "custom"])
def test_fine_tunes_of_a_base_that_reads_text(kind, tmp_path):
    """Distractors and exemplars meet as latents with their captions; encoders see the pictures of both."""
    save_whole("sd", tmp_path / "sd")
    pictures(tmp_path / "train", ["a cat", "red cat", "cat"], seed=2)
    pictures(tmp_path / "others", ["a <new1> cat", "<new1>", "red <new1>", "<new1> cat"], seed=3)
    data = ("--train_data_dir", tmp_path / "train")
    build = ("abc", "build", tmp_path / "sd", *data, "--exemplar_data_dir", tmp_path / "others", "--kind", kind)
    more = ("--initializer_token", "c") if kind == "custom" else ("--rank", 2)
    small = ("--models", 2, "--exemplars", 2, "--max_train_steps", 2, "--generate", 2, "--num_inference_steps", 2)
    succeeds(*build, *small, *more, "--output_dir", tmp_path / "bench")
    methods = ("--method", "pixel_cosine", "--method", "gradient_cosine", "--draws", 2, "--dim", 8)
    judge = ("abc", "judge", tmp_path / "bench", *data, *methods, "--output_dir", tmp_path / "judged")
    succeeds(*judge)
    result = json.loads((tmp_path / "judged/judged.json").read_text())
    assert (result["kind"], result["exemplars"], result["queries"]) == (kind, [2], 2)
    own = load_scores(tmp_path / "judged/model-01/rows/pixel_cosine/scores")
    images = Exemplars.read(tmp_path / "bench", tmp_path / "train")
    drawn, pool = images.models[1].drawn, (images.distractors, images.models[1].exemplars)
    x, y = drawn.batch([0, 1]).x0.flatten(1), torch.cat([each.batch(range(len(each))).x0.flatten(1) for each in pool])
    close(own.values, cosine_similarity(x[:, None], y[None], dim=2), 1e-5)
    texts = [
        json.loads(line)["text"] for line in (tmp_path / "bench/drawn/model-01/metadata.jsonl").read_text().splitlines()
    ]
    assert texts == list(images.models[1].exemplars.meta["text"]), "the captions of its exemplars are drawn"


# ---------------------------------------------------------------------------------------------------------- maps on a disk


def test_maps_that_are_missing_damaged_or_of_another_encoder_are_refused(tmp_path):
    task = unet_task(tmp_path / "run", n=4)
    with refuses("no maps are given", "abc_cosine", "--set encoder=FOLDER"):
        abc_cosine()(task)
    with refuses("no such folder", str(tmp_path / "nowhere"), "`whence abc fit` wrote"):
        abc_cosine(tmp_path / "nowhere")
    save_maps(tmp_path / "wide", "pixels", 99)
    with refuses("maps of rows of 99 numbers, and pixels gives 16"):
        abc_cosine(tmp_path / "wide")(task)
    with refuses("no maps.json", str(tmp_path)):
        abc_cosine(tmp_path)
    for name, content, says in (
        (NOTES, "[1]", "a list of 1 entries"),
        (NOTES, "{}", "none of this"),
        (TENSORS, "x", "is not the"),
    ):
        folder = tmp_path / f"damaged-{name}-{len(content)}"
        save_maps(folder, "pixels", 16)
        (folder / name).write_text(content)
        with refuses(says):
            abc_cosine(folder)
    moved = tmp_path / "encoder"
    shutil.copytree(encoder("vit"), moved)
    save_maps(tmp_path / "of-vit", str(moved), 16)
    shutil.rmtree(moved)
    shutil.copytree(encoder("dinov2"), moved)
    with refuses("is another one than the maps were learned on"):
        abc_cosine(tmp_path / "of-vit")


def test_maps_are_not_judged_on_what_they_learned(world, tmp_path):
    benchmark = Exemplars.read(world / "bench", world / "images")
    save_maps(tmp_path / "leak", "pixels", 64, benchmark=benchmark.digest, learned_on=["model-03"])
    asked = ("abc", "judge", world / "bench", "--train_data_dir", world / "images", "--method", "pixel_cosine")
    refused(
        *asked,
        "--maps",
        tmp_path / "leak",
        "--output_dir",
        tmp_path / "out",
        says="learned on model-03, which are judged",
    )


def test_maps_of_another_benchmark_on_the_same_exemplars_are_refused(world, tmp_path):
    benchmark = Exemplars.read(world / "bench", world / "images")
    exemplar = benchmark.of("test")[1].exemplars.digests[0]
    save_maps(tmp_path / "leak", "pixels", 64, benchmark="another", learned_on=["model-00"], exemplars=[exemplar])
    asked = ("abc", "judge", world / "bench", "--train_data_dir", world / "images", "--method", "pixel_cosine")
    says = "learned on the exemplars of model-04, which are judged"
    refused(*asked, "--maps", tmp_path / "leak", "--output_dir", tmp_path / "out", says=says)
    assert not (tmp_path / "out").exists(), "before anything is computed"


def test_distractors_that_did_not_train_the_base_are_told(world, tmp_path):
    words = list(building(world, tmp_path / "out", "--max_train_steps", 1, "--models", 2))
    words[words.index("--train_data_dir") + 1] = subset_folder(world, tmp_path)
    done = succeeds(*words, warns="was trained by `whence train` on other images than these 20")
    assert "needs 3 fine-tunes to learn on: --models 6 or more" in done.out


def subset_folder(world: Path, root: Path) -> Path:
    save_png(root / "some", digit_images(0, 20).batch(range(20)).x0, [f"{i:02d}" for i in range(20)])
    return root / "some"


def test_maps_that_move_nothing_are_the_encoder(tmp_path):
    task: Task = unet_task(tmp_path / "run", n=5)
    sides = {side: unmoved("linear", 16) for side in SIDES}
    Maps("pixels", "linear", sides, {}).write(tmp_path / "maps")
    close(abc_cosine(str(tmp_path / "maps"))(task).values, pixel_cosine()(task).values, 1e-6)
