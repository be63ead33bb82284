"""A student ranks training images as its teacher does: held against a known map, its laws, and what people get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from errors import refuses
from recipes import pixel_study, recipe_of
from test_cli import refused, succeeds, whence
from test_membership import NETWORK, digit_images
from whence.data.images import subset, tensor_images
from whence.data.saving import save_png
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.evaluation.distill import Lesson, Report, distill, teacher_of
from whence.evaluation.retrieval import average_precision
from whence.features.distilling import Distillation, Side, candidates_of, fit, labels, ranks
from whence.features.students import Student, embed, load_student
from whence.methods import METHODS, build
from whence.methods.distilled import distilled
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores
from whence.task import task_from_module
from whence.training.runs import train_study
from whence.types import Images, Scores, Task

LINEAR = Distillation(hidden=0, width=16, dropout=0.0, steps=600, learning_rate=3e-2, weight_decay=0.0)
QUICK = Distillation(hidden=1, width=8, steps=5)
N, M, SIDE = 64, 80, 4


class Net(nn.Module):
    """A network that nobody trained: pixels do not ask it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(SIDE, SIDE)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x)


def pictures(count: int, name: str, seed: int) -> Images:
    x0 = torch.rand(count, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return tensor_images(x0, [f"{name}-{i:03d}" for i in range(count)])


def task_of(root: Path, train: Images | None = None, queries: Images | None = None, seed: int = 0) -> Task:
    torch.manual_seed(seed)
    train = pictures(N, "train", 1) if train is None else train
    queries = pictures(M, "query", 2) if queries is None else queries
    return task_from_module(Net(), Denoiser(linear_schedule(10)), train, queries, root, errors=False)


def known(task: Task) -> Scores:
    """cos(W x_q, W x_i), W a known matrix that keeps 3 directions of 16, minus what makes half of the scores negative."""
    w = torch.randn(16, 3, generator=torch.Generator().manual_seed(5)).double()
    q, i = (side.batch(range(len(side))).x0.flatten(1).double() for side in (task.queries, task.train))
    mean = i.mean(0)
    values = nn.functional.normalize((q - mean) @ w, dim=1) @ nn.functional.normalize((i - mean) @ w, dim=1).T
    return Scores(values, task.queries.ids, task.train.ids, {})


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Callable[[str], tuple[Task, Report]]:
    task = task_of(tmp_path_factory.mktemp("known"), queries=pictures(400, "query", 2))
    found: dict[str, tuple[Task, Report]] = {}

    def of(kind: str) -> tuple[Task, Report]:
        if kind not in found:
            found[kind] = task, distill(known(task), task, Lesson(how=replace(LINEAR, fit=kind)))
        return found[kind]

    return of


# ------------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize("kind", ["order", "sizes"])
def test_a_linear_map_of_the_features_is_learned(learned, kind):
    _, found = learned(kind)
    assert (found.fitted, found.judged) == (320, 80)
    assert found.agreement["student"]["map"] >= 0.99
    assert found.agreement["student"]["spearman"] >= 0.99
    assert found.agreement["encoders"]["map"] < 0.8
    assert found.doubts == ()
    assert 0 < found.milliseconds < 50


def test_larger_is_what_did_more_whichever_sign_was_learned(learned):
    task, found = learned("order")
    student, phi = found.student, task.queries.batch([0, 1]).x0.flatten(1)
    weights, index = student.weights, student.index
    assert float(weights["a"]) < 0
    r = embed(weights, phi).double() @ index.double().T
    assert torch.allclose(student.scores(phi, task.train), r, atol=1e-6)
    turned = replace(student, weights={**weights, "a": -weights["a"]})
    assert torch.allclose(turned.scores(phi, task.train), -r, atol=1e-6)
    truth = known(task).values[:2]
    assert float(torch.corrcoef(torch.stack([r.flatten(), truth.flatten()]))[0, 1]) > 0.95


def test_labels_are_shares_of_the_teachers_order():
    scores = torch.tensor([[5.0, -1.0, 5.0, 0.0], [0.0, 3.0, 1.0, 2.0]])
    everything = torch.ones(2, 4, dtype=torch.bool)
    assert ranks(scores).tolist() == [[0.5, 3.0, 0.5, 2.0], [3.0, 0.0, 2.0, 1.0]]
    assert labels(scores, everything).tolist() == [[0.125, 0.75, 0.125, 0.5], [0.75, 0.0, 0.5, 0.25]]
    some = torch.tensor([[True, False, True, False], [True, True, True, False]])
    outside, third = 0.5, 2 / 3
    wanted = [[0.25, outside, 0.25, outside], [third, 0.0, 1 / 3, third]]
    assert torch.allclose(labels(scores, some), torch.tensor(wanted))


def test_candidates_are_the_teachers_first_and_the_nearest():
    scores, near = torch.tensor([[9.0, 8.0, 1.0, 2.0, 3.0]]), torch.tensor([[0.9, 0.1, 0.2, 0.8, 0.3]])
    assert candidates_of(scores, near, 5).all()
    assert candidates_of(scores, near, 4).tolist() == [[True, True, False, True, True]]
    assert candidates_of(scores, near, 3).tolist() == [[True, True, False, True, False]]


@pytest.mark.parametrize("kind", ["order", "sizes"])
def test_with_candidates_alone_the_first_are_still_found(tmp_path, kind):
    task = task_of(tmp_path, queries=pictures(200, "query", 2))
    how = replace(LINEAR, fit=kind, candidates=16, images=32, steps=500)
    assert distill(known(task), task, Lesson(how=how)).agreement["student"]["map"] > 0.9


def test_average_precision_is_that_of_scikit_learn():
    g = np.random.default_rng(0)
    scores, truth = g.integers(0, 5, (6, 30)).astype(float), g.standard_normal((6, 30))
    first = np.argsort(-truth, axis=1)[:, :4]
    wanted = [
        average_precision_score(np.isin(np.arange(30), some), row) for some, row in zip(first, scores, strict=True)
    ]
    assert np.array_equal(average_precision(scores, truth, 4), wanted)
    assert average_precision(truth, truth, 4).tolist() == [1.0] * 6
    assert average_precision([[4.0, 3, 2, 1]], [[0.0, 9, 0, 8]], 2).tolist() == [0.5]  # (1/2 + 2/4) / 2
    with refuses("first 30 of", accepted=""):
        average_precision(scores, truth, 30)


# -------------------------------------------------------------------------------------------------------------- its laws


def test_names_order_and_batches_do_not_enter(tmp_path):
    task = task_of(tmp_path / "a")
    whole = distill(known(task), task, Lesson(how=QUICK))
    g = torch.Generator().manual_seed(3)
    rows = [torch.randperm(count, generator=g).tolist() for count in (N, M)]
    turned = [subset(side, at) for side, at in zip((task.train, task.queries), rows, strict=True)]
    turned = [
        tensor_images(side.batch(range(len(side))).x0, [f"other-{i}" for i in range(len(side))]) for side in turned
    ]
    other = task_of(tmp_path / "b", *turned)
    other = replace(other, engine=replace(other.engine, batch_size=3))
    again = distill(known(other), other, Lesson(how=QUICK))
    for name, value in whole.student.weights.items():
        assert torch.equal(value, again.student.weights[name]), name
    for name, figures in whole.agreement.items():
        assert again.agreement[name] == pytest.approx(figures)
    assert torch.equal(again.student.index, whole.student.index[rows[0]])


def test_nothing_is_fitted_to_what_is_held_out(tmp_path):
    task = task_of(tmp_path)
    first = distill(known(task), task, Lesson(how=QUICK), held=range(20))
    other = known(task)
    other.values[:20] *= -1
    second = distill(other, task, Lesson(how=QUICK), held=range(20))
    assert torch.equal(first.student.weights["weight.0"], second.student.weights["weight.0"])
    assert first.agreement["student"]["spearman"] == pytest.approx(-second.agreement["student"]["spearman"])
    other.values[20:] *= -1
    third = distill(other, task, Lesson(how=QUICK), held=range(20))
    assert not torch.equal(first.student.weights["weight.0"], third.student.weights["weight.0"])


def test_a_picture_that_is_there_twice_is_on_one_side(tmp_path):
    x0 = pictures(M, "query", 2).batch(range(M)).x0
    twice = tensor_images(torch.cat([x0, x0]), [f"q{i}" for i in range(2 * M)])
    task = task_of(tmp_path, queries=twice)
    found = distill(known(task), task, Lesson(how=QUICK))
    assert (found.fitted, found.judged) == (128, 32)  # pairs: 64 and 16 contents


def test_another_seed_is_another_student(tmp_path):
    task = task_of(tmp_path)
    one, other = (distill(known(task), task, Lesson(how=replace(QUICK, seed=seed))).student for seed in (0, 1))
    assert not torch.equal(one.weights["weight.0"], other.weights["weight.0"])
    state = torch.get_rng_state()
    distill(known(task), task, Lesson(how=QUICK))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_column_that_does_not_vary_is_not_blown_up():
    phi = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    phi[:, 2] = 1 + 1e-9 * torch.randn(20)
    scores = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)).double()
    side = Side(torch.randn(50, 4), torch.arange(50))
    weights = fit(side, Side(phi, torch.arange(20)), scores, scores, QUICK)
    assert float(weights["std"][2]) == 1
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_network_whose_values_are_all_alike_has_a_slope():
    side, scores = Side(torch.zeros(8, 4), torch.arange(8)), torch.randn(8, 8).double()
    weights = fit(side, side, scores, scores, replace(QUICK, fit="sizes"))
    assert all(torch.isfinite(value).all() for value in weights.values())
    with refuses("diverged within 5 steps", "distill", "a smaller rate"):
        fit(side, side._replace(phi=torch.randn(8, 4)), scores, scores, replace(QUICK, learning_rate=1e30))


def saved(tmp_path: Path, task: Task) -> Path:
    found = distill(known(task), task, Lesson(how=QUICK)).student
    found.save(tmp_path / "student")
    return tmp_path / "student"


def test_the_method_gives_the_scores_of_the_student(tmp_path):
    task = task_of(tmp_path / "a")
    folder = saved(tmp_path, task)
    found = build("distilled", task.forward, {"student": str(folder)})(task)
    student = load_student(folder)
    phi = task.queries.batch(range(M)).x0.flatten(1)
    assert torch.equal(found.values, student.scores(phi, task.train))
    assert (found.scale, found.signed, found.stderr) == ("rank", True, None)
    assert found.recipe["checkpoints"] == [task.trajectory[-1].digest]
    asked = subset(task.queries, [5, 2])
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    other = replace(task, root=tmp_path / "b", index=None, queries=asked, train=subset(task.train, order))
    assert torch.equal(distilled(folder)(other).values, found.values[[5, 2]][:, order])
    some = replace(task, scored=subset(task.train, [7, 3]))
    assert torch.equal(distilled(str(folder))(some).values, found.values[:, [7, 3]])


# --------------------------------------------------------------------------------------------------------------- mistakes


def test_another_data_set_or_model_is_refused(tmp_path):
    task = task_of(tmp_path / "a")
    method = distilled(saved(tmp_path, task))
    new = tensor_images(torch.cat([task.train.batch(range(1, N)).x0, torch.zeros(1, 1, SIDE, SIDE)]))
    with refuses(
        "1 of the 64 training images here are new to it, 1 of its 64 are missing", "student", "whence distill"
    ):
        method(task_of(tmp_path / "b", new))
    with refuses("63 training images here are new to it, 1 of its 64", "student"):
        method(task_of(tmp_path / "c", subset(task.train, range(1, N))))
    assert method(task_of(tmp_path / "d", seed=1)).values.shape == (M, N)  # pixels ask no model
    student = load_student(tmp_path / "student")
    replace(student, notes={**student.notes, "model": task.trajectory[-1].digest}).save(tmp_path / "looks")
    assert distilled(tmp_path / "looks")(task).values.shape == (M, N)
    with refuses("representations of another model", "looks", "the model it was fitted on"):
        distilled(tmp_path / "looks")(task_of(tmp_path / "e", seed=1))


def damage(folder: Path, kind: str) -> None:
    weights, notes = folder / "student.safetensors", folder / "student.json"
    if kind == "flipped":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif kind == "gone":
        weights.unlink()
    elif kind == "unfinished":
        notes.unlink()
    elif kind == "no JSON":
        notes.write_text("{")
    elif kind == "newer":
        write_json(notes, {**read_json(notes), "format_version": 99})
    else:
        found = read_json(notes)
        del found["train"]
        write_json(notes, found)


DAMAGES = {
    "flipped": "student.safetensors is not what was written, or not there",
    "gone": "student.safetensors is not what was written, or not there",
    "unfinished": "holds no student.json",
    "no JSON": "cannot be read as JSON",
    "newer": "written by a newer whence",
    "cut": "says nothing of train",
}


@pytest.mark.parametrize(("kind", "what"), DAMAGES.items())
def test_a_damaged_student_is_refused(tmp_path, kind, what):
    folder = saved(tmp_path, task_of(tmp_path / "a"))
    distilled(folder)
    damage(folder, kind)
    with refuses(what):
        distilled(folder)


def test_no_student_and_no_folder(tmp_path):
    task = task_of(tmp_path)
    with refuses("none is given", "distilled", "--set student=FOLDER"):
        METHODS["distilled"].make()(task)
    with refuses("holds no student.json", "/nowhere", "whence distill"):
        distilled("/nowhere")


def test_scores_that_teach_nothing_are_refused(tmp_path):
    task = task_of(tmp_path)
    good, lesson = known(task), Lesson(how=QUICK)
    with refuses("how much, and not which way", "distill", "with a sign"):
        distill(replace(good, values=good.values.square(), signed=False), task, lesson)
    flat = good.values.clone()
    flat[3] = 2.0
    with refuses("for 1 of 80 pictures, such as 'query-003', every training image has the same score", "distill"):
        distill(replace(good, values=flat), task, lesson)
    flat[3, 5] = torch.nan
    with refuses("not finite; the first is image 'train-005' for query 'query-003'"):
        replace(good, values=flat)
    with refuses("only 64 of the training images have a score"):
        distill(replace(good, recipe={"scored": "x"}), task, lesson)
    with refuses("of other pictures"):
        distill(replace(good, query_ids=[f"x{i}" for i in range(M)]), task, lesson)
    for side in ("queries", "train"):
        with refuses(f"of other {side} of the same names", "distill", "those of the run"):
            distill(replace(good, recipe={side: "x"}), task, lesson)
    with refuses("not of the training images one by one"):
        distill(replace(good, recipe={"groups": {"by": "creator", "images": N}}), task, lesson)


def test_too_few_pictures_are_told_how_many_are_needed(tmp_path):
    task = task_of(tmp_path, queries=pictures(30, "query", 2))
    with refuses("scored 30 pictures: 24 to fit by, 6 to judge by", "distill", "50 or more at held_out 0.2"):
        distill(known(task), task, Lesson(how=QUICK))
    with refuses("3 to judge by", accepted="95 or more at held_out 0.1"):
        Lesson(how=QUICK, held_out=0.1).check(30, N)


LESSONS = [
    ({"held_out": 1.0}, "held_out is 1", "above 0 and below 1"),
    ({"top": 64}, "top is 64 of 64", "1 to 63"),
    ({"encoders": ()}, "encoders none", "each once"),
    ({"encoders": ("pixels", "pixels")}, "pixels, pixels", "each once"),
    ({"encoders": ("/nowhere",)}, "'/nowhere' is no folder", "pixels, representation, or"),
]


@pytest.mark.parametrize(("changed", "what", "accepted"), LESSONS)
def test_lessons_that_cannot_be_given(changed, what, accepted):
    with refuses(what, accepted=accepted):
        Lesson(**changed).check(M, N)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [("fit", "x", "order or sizes"), ("hidden", -1, "0 or more"), ("width", 0, "1 or more"), ("dropout", 1.0, "below 1"),
     ("steps", 0, "1 or more"), ("learning_rate", 0.0, "a rate above 0"), ("outsiders", 1.0, "below 1")],
)  # fmt: skip
def test_settings_that_do_not_work_are_refused(name, value, accepted):
    with refuses(name, "distill", accepted):
        Distillation(**{name: value})


# --------------------------------------------------------------------------------------------------------- from end to end


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A perceptron, its 30 digits, 60 to teach by, 2 new ones, and a ledger that measured the 60."""
    root = tmp_path_factory.mktemp("distill")
    train_study(pixel_study(NETWORK, recipe_of(20, 10, seed=1)), digit_images(0, 30), root / "model", 20)
    for name, start, stop in (("images", 0, 30), ("queries", 100, 160), ("new", 200, 202)):
        save_png(
            root / name, digit_images(start, stop).batch(range(stop - start)).x0, [f"{i}" for i in range(start, stop)]
        )
    data = ("--train_data_dir", root / "images")
    asked = ("attribute", root / "model", *data, "--query_data_dir", root / "queries", "--copy_rate", 0, "--no_errors")
    succeeds(
        *asked, "--method", "pixel_cosine", "--method", "pixel_dot", "--output_dir", root / "run", warns="other images"
    )
    plan = ("--test", 4, "--seeds", 1)
    succeeds("ledger", "plan", root / "ledger", "--model", root / "model", *data, *plan, warns=".")
    succeeds("ledger", "run", root / "ledger", *data, warns=".")
    succeeds("ledger", "measure", root / "ledger", *data, "--query_data_dir", root / "queries", warns=".")
    return root


SMALL = ("--hidden", 1, "--width", 16, "--steps", 30)


def test_from_a_run_to_a_new_picture(root, tmp_path):
    run = Path(shutil.copytree(root / "run", tmp_path / "run"))
    where = ("--model", root / "model", "--train_data_dir", root / "images", "--query_data_dir", root / "queries")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = (
        "distill",
        run,
        "--method",
        "pixel_cosine",
        *SMALL,
        *where,
        "--encoder",
        "pixels",
        "--encoder",
        "representation",
    )
    done = succeeds(*words, "--ledger", root / "ledger", warns=".")
    assert {path: path.read_bytes() for path in before} == before
    folder = run / "students" / "pixel_cosine"
    for text in (
        "fitted to 48 pictures, judged on 12 others, 30 training images",
        "mAP(10)",
        "LDS",
        "plain likeness",
        " ms",
    ):
        assert text in done.out
    notes = json.loads((folder / "student.json").read_text())
    assert notes["teacher"]["method"] == "pixel_cosine"
    assert set(notes["figures"]["lds"]) == {"teacher", "student", "encoders"}
    kept = (folder / "student.safetensors").read_bytes()
    for other in (("--fit", "sizes"), ("--held_out", 0.3), ("--seed", 5)):  # the student that is there stays
        refused(*words, *other, says="holds a student that was made otherwise")
    assert (folder / "student.safetensors").read_bytes() == kept
    again = tmp_path / "again"
    succeeds(*words, "--output_dir", again, warns=".")
    assert (again / "student.safetensors").read_bytes() == kept
    asked = ("attribute", root / "model", "--train_data_dir", root / "images", "--query_data_dir", root / "new")
    out = ("--output_dir", tmp_path / "out", "--copy_rate", 0)
    succeeds(*asked, "--method", "distilled", "--set", f"student={folder}", *out, warns="other images")
    scores = load_scores(tmp_path / "out" / "scores" / "distilled")
    assert scores.values.shape == (2, 30)
    assert scores.stderr_of.startswith("not measured")
    assert "identical" in succeeds("replay", tmp_path / "out" / "scores" / "distilled", warns=".").out
    refused("distill", tmp_path / "out", says="these are scores of a student")


def test_what_people_get_wrong(root, tmp_path):
    run = root / "run"
    refused("distill", run, says="has scores of 2 methods; accepted: pixel_cosine, pixel_dot")
    refused("distill", run, "--method", "trak", says="has no scores of trak; accepted: pixel_cosine, pixel_dot")
    refused("distill", tmp_path, says="holds no finished scores")
    one = ("distill", run, "--method", "pixel_dot", "--output_dir", tmp_path / "s")
    refused(*one, "--encoder", "nowhere", says="'nowhere' is no folder")
    refused(*one, "--held_out", 0.01, says="1 to judge by")
    refused(*one, "--fit", "rank", says="accepted: order, sizes")
    refused(*one, "--name", "loss", says="--ledger")
    moved = ("--query_data_dir", root / "new")
    done = whence(*one, *moved)
    assert (done.code, "not the pictures of the result" in done.err) == (2, True)
    assert not (tmp_path / "s" / "student.json").exists()
    assert teacher_of(run, "pixel_dot") == "pixel_dot"


def test_a_student_names_what_it_is_told_by(tmp_path):
    task = task_of(tmp_path / "a")
    student = load_student(saved(tmp_path, task))
    assert isinstance(student, Student)
    assert student.notes["positive"] == "proponent"
    assert student.notes["lesson"]["how"]["steps"] == 5
    assert student.notes["encoders_described"] == [{"is": "Pixels", "center": False}]
