"""`whence unlearn`: the model without a picture is a pipeline that knows it less, and draws from the same noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from errors import refuses
from recipes import pixel_study, recipe_of
from test_cli import refused, succeeds, whence
from test_membership import NETWORK, digit_images
from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.diffusion.outputs import loss
from whence.evaluation.unlearned import unlearned
from whence.features.parts import Value
from whence.features.rows import rows
from whence.methods import build
from whence.methods.unlearning import DRAWS
from whence.models import open_model
from whence.storage.files import read_json
from whence.training.runs import train_study
from whence.types import Task


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A perceptron, its 40 digits and two of them to forget."""
    root = tmp_path_factory.mktemp("unlearn")
    images = digit_images(0, 40)
    train_study(pixel_study(NETWORK, recipe_of(40, 20, learning_rate=5e-3, seed=1)), images, root / "model", 40)
    save_png(root / "images", images.batch(range(40)).x0, [f"{i:02d}" for i in range(40)])
    save_png(root / "queries", images.batch([3, 8]).x0, ["three", "eight"])
    return root


def words(root: Path, out: Path, *more: object) -> tuple[object, ...]:
    data = ("--train_data_dir", root / "images", "--query_data_dir", root / "queries", "--output_dir", out)
    return ("unlearn", root / "model", *data, "--generate", 2, "--num_inference_steps", 3, *more)


def loss_of(model: Path, root: Path, place: Path) -> float:
    opened = open_model(model)
    query = image_folder(root / "queries", 8, 1)
    task = Task(opened.forward, (opened.final,), query, query, place)
    at = list(query.ids).index("three.png")
    return float(rows(Value(loss, DRAWS), task, opened.final, query, "x").all()[at, 0])


def test_the_model_that_is_written_knows_the_picture_less(root, tmp_path):
    out = tmp_path / "out"
    done = succeeds(*words(root, out, "--query", "three.png", "--set", "rise=0.5"), warns="byte-identical|other images")
    told = read_json(out / "unlearn.json")
    assert json.loads(done.out.splitlines()[-3]) == told
    assert told["rise"] == pytest.approx(0.5, rel=1e-3)
    assert told["moved"] > 0
    before, after = loss_of(root / "model", root, tmp_path / "a"), loss_of(out / "model", root, tmp_path / "b")
    assert after / before == pytest.approx(1.5, rel=1e-3)
    assert not {"checkpoint-40", "recipe.toml"} & {path.name for path in (out / "model").iterdir()}
    pictures = [sorted(path.read_bytes() for path in (out / kind).glob("*.png")) for kind in ("before", "after")]
    assert len(pictures[0]) == len(pictures[1]) == 2
    assert pictures[0] != pictures[1]
    assert (out / "unlearned.png").is_file()
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert succeeds(*words(root, out, "--query", "three.png", "--set", "rise=0.5"), warns=".").out == done.out
    assert {path: path.read_bytes() for path in kept} == kept


def test_mistakes_are_told(root, tmp_path):
    out = tmp_path / "out"
    warns = "byte-identical|other images"
    done = whence(*words(root, out, "--query", "tree.png"))
    assert (done.code, "there is no picture 'tree.png'; accepted: three.png" in done.err) == (2, True)
    assert not (out / "asked.json").exists(), "the mended command may use the folder"
    refused(*words(root, out, "--query", "three.png", "--method", "trak"), says="accepted: abu, abu_ek_fac, mucs, guda")
    refused(*words(root, out, "--query", "three.png", "--set", "speed=2"), says="no setting 'speed'")
    succeeds(*words(root, tmp_path / "other", "--query", "three.png"), warns=warns)
    done = whence(*words(root, tmp_path / "other", "--query", "eight.png"))
    assert (done.code, "holds other pictures" in done.err) == (2, True)


def test_a_group_is_forgotten(root, tmp_path):
    """The images of a class are known less, by far more than the others; asked for twice it is the same folder."""
    images, out = tmp_path / "images", tmp_path / "out"
    digits = digit_images(0, 40)
    kinds = [{"kind": f"kind {int(str(digit)) % 3}"} for digit in digits.meta["digit"]]
    save_png(images, digits.batch(range(40)).x0, [f"{i:02d}" for i in range(40)], kinds)
    asked = ("unlearn", root / "model", "--train_data_dir", images, "--output_dir", out, "--generate", 2)
    asked = (
        *asked,
        "--num_inference_steps",
        3,
        "--group",
        "kind=kind 1",
        "--set",
        "steps=20",
        "--set",
        "weight=1.0",
        "--set",
        "learning_rate=2e-3",
    )
    done = succeeds(*asked, warns="other images")
    told = json.loads((out / "unlearn.json").read_text())
    assert (told["method"], told["query"], told["images"]) == (
        "guda",
        "kind 1",
        sum(k["kind"] == "kind 1" for k in kinds),
    )
    assert told["forgotten"] > 1.1 * told["retained"]
    assert (out / "unlearned.png").is_file()
    assert open_model(out / "model").final.digest != open_model(root / "model").final.digest
    assert succeeds(*asked, warns="other images").out == done.out
    for wrong, says in (
        (("--group", "kind=kind 9"), "no training image has the kind 'kind 9'; accepted: kind 0, kind 1, kind 2"),
        (("--group", "maker=x"), "no column 'maker'"),
        (("--group", "kind"), "column=value, like creator=anna"),
        (("--group", "kind=kind 1", "--method", "abu"), "--method abu forgets pictures; accepted: guda"),
        (("--method", "guda"), "nothing to forget"),
        (
            ("--query", "three.png", "--query_data_dir", root / "queries", "--method", "guda"),
            "--method guda forgets groups",
        ),
        (("--query", "three.png"), "--query_data_dir"),
    ):
        refused(
            "unlearn", root / "model", "--train_data_dir", images, "--output_dir", tmp_path / "no", *wrong, says=says
        )


def test_what_forgets_nothing_is_refused(root, tmp_path):
    opened = open_model(root / "model")
    query = image_folder(root / "queries", 8, 1)
    task = Task(opened.forward, (opened.final,), query, query, tmp_path)
    with refuses("forgets nothing", "--method", "abu, abu_ek_fac, mucs, guda"):
        unlearned(task, build("trak", task.forward, {}), "three.png", opened, lambda _: torch.zeros(1), tmp_path / "m")
