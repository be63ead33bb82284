"""Previews: forward mode through training, drawn from, and the truth beside it."""

import json
from dataclasses import replace

import pytest
import torch

from agreement import close
from errors import refuses
from recipes import changed
from test_cli import TRAINING, noise, refused, succeeds
from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.evaluation import preview
from whence.models import denoise, open_model, start_noise
from whence.storage.files import read_json
from whence.task import Sampling, drawing
from whence.training.checkpoints import study_of
from whence.training.unroll import Run, final_weights, tangent
from whence.types import Engine

N = 24
TEN_STEPS = (*TRAINING, "--max_train_steps", 10, "--lr_warmup_steps", 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("preview")
    columns = [{"creator": "anna" if i % 6 else "ben"} for i in range(N)]
    save_png(root / "images", noise(N, 0), [f"{i:02d}" for i in range(N)], columns)
    succeeds("train", "new", "--train_data_dir", root / "images", "--output_dir", root / "model", *TEN_STEPS)
    return root


@pytest.fixture(scope="module")
def parts(folders):
    model = open_model(folders / "model")
    return model, study_of(folders / "model"), image_folder(folders / "images", 8, 1)


def test_conditions(parts):
    images = parts[2]
    ben = preview.chosen(images, ["creator=ben"])
    assert ben.tolist() == [i % 6 == 0 for i in range(N)]
    assert preview.chosen(images, ["creator=ben", "id=01.png"]).sum() == ben.sum() + 1
    for wrong, what, accepted in (
        (["creator"], "'creator'", "column=value with a column of id, creator"),
        (["artist=ben"], "'artist=ben'", "with a column of id, creator"),
        (["creator=carl"], "names no image; creator has values like anna, ben", ""),
        (["creator=anna", "creator=ben"], "every training image", ""),
    ):
        with refuses(what, accepted=accepted):
            preview.chosen(images, wrong)


def test_the_predicted_pictures_come_from_the_tangent_and_are_near_the_truth(parts):
    model, study, images = parts
    removed = preview.chosen(images, ["id=03.png"])
    found = preview.preview(
        model.final.load(), study, images, removed, drawing(model, Sampling(3, 0, 5), Engine()), retrain=True
    )
    run = Run.of(study, images)
    theta, (_, change) = final_weights(run), tangent(run.at(1 - removed / 2), -removed.float())
    moved = {name: theta[name] + change[name] for name in theta}
    network = preview.with_weights(model.final.load(), moved)
    expected = denoise(network, model, start_noise(model, 3, 0), 5, {}, Engine(), quiet=True)
    close(found.predicted, expected)
    assert not torch.equal(found.predicted, found.before)
    facts = found.facts()
    assert facts["correlation"] > 0.9, "one image of 24, in 10 steps: the first order is nearly all"
    assert facts["explained"] > 0.7
    nothing = preview.Preview(found.before, found.before, found.retrained, 0.0).facts()
    assert nothing["explained"] == 0


def test_more_points_on_the_way_foresee_more(parts):
    """The midpoint rule against the truth and against the first order."""
    model, study, images = parts
    removed, draw = preview.chosen(images, ["creator=ben"]), drawing(model, Sampling(4, 0, 5), Engine())
    network = model.final.load()
    one = preview.preview(network, study, images, removed, draw, retrain=True)
    three = preview.preview(network, study, images, removed, draw, points=3)  # it was left as it was
    theta, change = tangent(Run.of(study, images), -removed.float())
    network = preview.with_weights(model.final.load(), {name: theta[name] + change[name] for name in theta})
    errors = [(found - one.retrained).norm() for found in (draw(network), one.predicted, three.predicted)]
    assert errors[0] > 1.8 * errors[1] > 3 * errors[2]
    with refuses("points=0; at least 1"):
        preview.preview(model.final.load(), study, images, removed, draw, points=0)


def test_another_training_is_refused(parts):
    model, study, images = parts
    other = replace(study, recipe=changed(study.recipe, seed=5))
    draw = drawing(model, Sampling(1, 0, 2), Engine())
    with refuses("replayed to step 10"):
        preview.preview(model.final.load(), other, images, preview.chosen(images, ["id=03.png"]), draw)


def test_from_the_command_line(folders, tmp_path):
    base = ("preview", folders / "model", "--train_data_dir", folders / "images", "--output_dir", tmp_path / "out")
    done = succeeds(*base, "--without", "creator=ben", "--generate", 2, "--num_inference_steps", 4, "--retrain")
    facts = read_json(tmp_path / "out" / "preview.json")
    assert facts["images"] == 4
    assert facts["of"] == N
    assert json.loads(done.out.splitlines()[0]) == facts
    assert (tmp_path / "out" / "preview.png").is_file()
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_dir()} == {"before", "predicted", "retrained"}
    refused(*base, "--without", "creator=carl", says="names no image")
