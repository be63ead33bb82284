"""`whence train` reads folders as `whence attribute` does: many skipped files need --skip, and classes keep their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_files import ORDER, conditional, put, sides

from errors import refuses
from families import save_index, save_whole
from test_cli import refused, whence
from test_encode import pictures
from whence.models import Lora
from whence.task import Request
from whence.training.recipe import Full, New, NewLora, Recipe, Schedule
from whence.training.runs import Pictures, train

SMALL = ("--block_out_channels", "8", "--resolution", 8, "--max_train_steps", 1, "--train_batch_size", 2)
SMALL = (*SMALL, "--lr_warmup_steps", 0)
NAMES = ",".join(ORDER)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that reads text, and pictures with captions beside five files that are none."""
    root = tmp_path_factory.mktemp("base")
    save_index("sd", save_whole("sd", root / "sd"))
    pictures(root / "data", ["a cat", "a dog"])
    for i in range(5):
        (root / "data" / f"{i}.npy").touch()
    return root


def on(base: Path, *more: object) -> tuple[object, ...]:
    return "--pretrained_model_name_or_path", base / "sd", "--max_train_steps", 1, "--lr_warmup_steps", 0, *more


VERBS = {
    "new": lambda base, out: SMALL,
    "text": lambda base, out: on(base),
    "full": lambda base, out: on(base),
    "lora": lambda base, out: on(base),
    "custom": lambda base, out: on(base, "--modifier_token", "<new>", "--initializer_token", "cat"),
    "recipe": lambda base, out: (recipe_file(base, out),),
}


def recipe_file(base: Path, out: Path) -> Path:
    path = out.with_suffix(".toml")
    path.write_text(f'[model]\nis = "Full"\nbase = "{base / "sd"}"\n[schedule]\nsteps = 1\nwarmup_steps = 0\n')
    return path


@pytest.mark.parametrize("verb", VERBS)
def test_many_skipped_files_need_skip(verb, base, tmp_path):
    out = tmp_path / "out"
    call = ("train", verb, *VERBS[verb](base, out), "--train_data_dir", base / "data", "--output_dir", out)
    refused(*call, says=r"data: 5 files are skipped \(5 \.npy\): 0.npy, 1.npy, 2.npy and 2 more; accepted: --skip")
    assert not (out / "recipe.toml").exists()


def test_the_prior_images_too(base, tmp_path):
    pictures(tmp_path / "data", ["a <new> cat"])
    call = ("train", "custom", *VERBS["custom"](base, tmp_path), "--prior_data_dir", base / "data")
    refused(*call, "--train_data_dir", tmp_path / "data", "--output_dir", tmp_path / "out", says="5 files are skipped")


def test_skip_is_told_and_trains(tmp_path):
    put(tmp_path / "data", "0.png", "1.png")
    for i in range(5):
        (tmp_path / "data" / f"{i}.npy").touch()
    call = ("train", "new", "--train_data_dir", tmp_path / "data", "--output_dir", tmp_path / "model", *SMALL)
    done = whence(*call, "--skip")
    assert done.code == 0, done.err
    assert done.err.count("5 files are skipped") == 1


def numbers(request: Request) -> list[list[int]]:
    train, queries = request.train_images.labels, request.query_images.labels
    assert train is not None
    assert queries is not None
    return [train.tolist(), queries.tolist()]


def test_a_new_model_keeps_the_names_it_was_given(tmp_path):
    """Two of four classes, in an order that is not sorted; later a folder with one of them."""
    data, asked = sides(tmp_path)
    call = ("train", "new", "--train_data_dir", data, "--output_dir", tmp_path / "model", *SMALL)
    refused(*call, "--classes", NAMES, says="--classes applies only with --class_conditional or --model_config")
    refused(*call, "--class_conditional", "--classes", "a,b", says="label 'ape' is not a class; the classes are a, b")
    done = whence(*call, "--class_conditional", "--classes", NAMES)
    assert done.code == 0, done.err
    assert (tmp_path / "model" / "classes.txt").read_text().split() == ORDER
    assert numbers(Request(tmp_path / "model", data, asked, tmp_path / "run")) == [[1, 1, 2, 2], [2]]
    call = ("train", "new", "--train_data_dir", asked, "--output_dir", tmp_path / "new", "--resolution", 8)
    call = (*call, "--max_train_steps", 1, "--lr_warmup_steps", 0)
    call = (*call, "--model_config_name_or_path", tmp_path / "model" / "unet" / "config.json")
    refused(*call, says="1 class names|class-conditional")
    done = whence(*call, "--classes", NAMES)
    assert done.code == 0, done.err
    assert numbers(Request(tmp_path / "new", asked, asked, tmp_path / "run2")) == [[2], [2]]


ON_BASE = {"all weights": lambda model: Full(model), "a LoRA": lambda model: NewLora(model, 1)}


@pytest.mark.parametrize("kind", ON_BASE)
def test_what_is_trained_on_a_model_keeps_the_names(kind, tmp_path):
    data, asked = sides(tmp_path)
    lora, out = kind == "a LoRA", tmp_path / "out"
    model = save_index("dit", save_whole("dit", tmp_path / "m")) if lora else conditional(tmp_path / "m", 4)
    recipe = Recipe(ON_BASE[kind](model), schedule=Schedule(1, 0), batch_size=2)
    with refuses("2 class names (ape, cat), but the model has"):
        train(recipe, Pictures(data, 8), out)
    train(recipe, Pictures(data, 8, classes=ORDER), out)
    assert (out / "classes.txt").read_text().split() == ORDER
    request = Request(model if lora else out, data, asked, tmp_path / "run", Lora(out) if lora else None, resolution=8)
    assert numbers(request) == [[1, 1, 2, 2], [2]]


def test_names_for_a_model_without_classes_are_refused(base, tmp_path):
    call = ("train", "full", *on(base), "--train_data_dir", base / "data", "--output_dir", tmp_path, "--skip")
    refused(*call, "--classes", NAMES, says="--classes: .*sd has no classes; accepted: no such option")


def test_a_new_network_of_a_recipe_with_too_few_names_is_refused(tmp_path):
    data, _ = sides(tmp_path)
    network = {"_class_name": "UNet2DModel", "num_class_embeds": 4, "sample_size": 8}
    with refuses("2 class names (ape, cat), but the model has 4 classes"):
        train(Recipe(New(network), schedule=Schedule(1, 0)), Pictures(data, 8), tmp_path / "out")
