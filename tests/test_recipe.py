"""A recipe file says what was trained: it is read back as it was written, trains the same again, and is read strictly."""

from __future__ import annotations

import re
import warnings
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import whence
from errors import refuses
from recipes import changed, pixel_study, recipe_of
from slow_training import MLP, images
from test_cli import noise, refused, succeeds
from whence.cli import train as verbs
from whence.cli.options import declarations
from whence.data.saving import save_png
from whence.diffusion.draws import LogitNormal, Mode
from whence.diffusion.forward import CosMap, MinSNR, SigmaSqrt
from whence.diffusion.outputs import OUTPUTS, Output, loss
from whence.training.optimizer import SGD, AdamW
from whence.training.recipe import (
    Augmentation,
    Full,
    New,
    NewCustomDiffusion,
    NewLora,
    NoiseSchedule,
    Objective,
    Recipe,
    Schedule,
    Text,
)
from whence.training.recipe_file import read_recipe, recipe_text
from whence.training.runs import Pictures, train, train_study

BASE, WEIGHTS = Path("/a/base"), "diffusion_pytorch_model.safetensors"
NETWORK = {
    "_class_name": "UNet2DConditionModel",
    "mid_block_type": None,
    "widths": [4, 8],
    "dropout": 0.0,
    "deep": {"x": None},
}
RECIPES = {
    "defaults": Recipe(),
    "new": Recipe(
        New(NETWORK, NoiseSchedule(50, "squaredcos_cap_v2", "sample")), SGD(0.1, 0.9), Schedule(3, 0, "constant")
    ),
    "text": Recipe(Text(BASE, 4), objective=Objective(None, MinSNR(3.0), Mode(1.0)), data=Augmentation(True, 0.1)),
    "full": Recipe(Full(BASE), AdamW(1e-4, eps_root=0.0), objective=Objective(None, CosMap(), LogitNormal(0.5, 2.0))),
    "lora": Recipe(NewLora(BASE, 2, 3.0, r"to_q|to_k"), objective=Objective(OUTPUTS["elbo"], SigmaSqrt())),
    "custom": Recipe(
        NewCustomDiffusion(BASE, "<a'\"b>", "c", 0.5), data=Augmentation(prior=3), max_grad_norm=0.0, ema=0.0
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_back_as_it_was_written(name, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(RECIPES[name]))
    assert read_recipe(path) == RECIPES[name]
    assert whence.read_recipe(tmp_path) == RECIPES[name], "a folder stands for the file in it"


def test_a_base_is_found_beside_the_file(tmp_path):
    (tmp_path / "recipe.toml").write_text('[model]\nis = "Full"\nbase = "sd"\n')
    assert read_recipe(tmp_path).base == tmp_path / "sd"


def test_what_no_file_can_hold_is_refused():
    with refuses("the output 'mine' cannot be written"):
        recipe_text(replace(RECIPES["text"], objective=Objective(Output("mine", loss.value, "lower"))))


def test_the_page_on_recipes_shows_one_that_is_read_and_the_keys_that_there_are(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (block,) = re.findall(r"(?s)```toml\n(.*?)```", page)
    (tmp_path / "recipe.toml").write_text(block)
    expected = Recipe(NewLora(tmp_path / "sd15", 8), objective=Objective(None, MinSNR()), data=Augmentation(True, 0.1))
    assert read_recipe(tmp_path) == expected, "all else that it shows is the default"
    classes = [
        New,
        Text,
        Full,
        NewLora,
        NewCustomDiffusion,
        AdamW,
        SGD,
        NoiseSchedule,
        Objective,
        Schedule,
        Augmentation,
    ]
    known = {field.name for kind in classes for field in fields(kind)} | {kind.__name__ for kind in classes}
    rows = [line for line in page.splitlines() if line.startswith("| `[")]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] + row.split("|")[2] for row in rows)))
    assert named - known <= {"MinSNR", "SigmaSqrt", "CosMap", "Even", "LogitNormal", "Mode"}


# ------------------------------------------------------------------------------------------------------------ bad input

CASES = {
    "no file": (None, (), "", "there is no such file", "recipe.toml in a model folder"),
    "no TOML": ("[model", (), "", "cannot be read as TOML", "recipe.toml in a model folder"),
    "unknown key": ("sed = 1", (), "", "Recipe has no key 'sed'", "seed"),
    "unknown in a table": ("[schedule]\nwarm_up = 1", (), "schedule", "Schedule has no key 'warm_up'", "warmup_steps"),
    "of another kind": ('[model]\nis = "Full"\nrank = 4', (), "model", "Full has no key 'rank' (NewLora has it)", "base"),
    "of other kinds": ("[optimizer]\nmomentum = 0.9", (), "optimizer", "AdamW has no key 'momentum' (SGD has it)", "beta1"),
    "unknown kind": ('[optimizer]\nis = "Lion"', (), "optimizer", "is = 'Lion'", "AdamW, SGD"),
    "no kind": ("[model]\nrank = 4", (), "model", "does not say what it is", "New, Text, Full, NewLora, NewCustomDiffusion"),
    "missing": ('[model]\nis = "New"', (), "model", "network is missing", "network, noise"),
    "no table": ("schedule = 3", (), "schedule", "is 3", "a table"),
    "a table": ("[seed]\na = 1", (), "seed", "is {'a': 1}", "a whole number"),
    "a bool": ("seed = true", (), "seed", "is True", "a whole number"),
    "unknown output": ('[objective]\noutput = "mine"', (), "objective.output", "is 'mine'", "loss, elbo"),
    "a value": ('[schedule]\nkind = "linear"', (), "schedule", "kind is 'linear'", "cosine, constant"),
    "set without a value": ("seed = 1", ("seed",), "--set", "'seed'", "key=value"),
    "set in no table": ("seed = 1", ("seed.a=1",), "--set", "seed in 'seed.a=1' is no table", "key=value"),
    "set unknown": ("seed = 1", ("optimizer.rate=1",), "optimizer", "AdamW has no key 'rate'", "learning_rate"),
    "set of a wrong type": ("", ("optimizer.learning_rate=fast",), "optimizer.learning_rate", "is 'fast'", "a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_file_is_one_line(name, tmp_path):
    text, changes, where, what, accepted = CASES[name]
    path = tmp_path / "recipe.toml"
    if text is not None:
        path.write_text(text)
    with refuses(what, where, accepted) as error:
        read_recipe(path, changes)
    assert error.value.where.endswith(where)


def tables(value: object, place: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    """Every table of a recipe, under its keys."""
    found = [(place, value)]
    for field in fields(value):
        inner = getattr(value, field.name)
        if is_dataclass(inner) and not isinstance(inner, Output):
            found += tables(inner, (*place, field.name))
    return found


WRONG = [
    (name, ".".join((*place, field.name)))
    for name, recipe in RECIPES.items()
    for place, table in tables(recipe)
    for field in fields(table)
    if getattr(table, field.name) is not None
]


@pytest.mark.parametrize(("name", "key"), WRONG, ids=[" ".join(one) for one in WRONG])
def test_no_key_takes_a_value_of_another_type(name, key, tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe_text(RECIPES[name]))
    with refuses(where=key):
        read_recipe(tmp_path, [f"{key}=[[1979-05-27]]"])


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("recipes")
    save_png(root / "images", noise(12, 0), [f"{i:02d}" for i in range(12)])
    options = ("--channels", 1, "--max_train_steps", 4, "--train_batch_size", 4, "--block_out_channels", "8,8")
    options = (*options, "--lr_warmup_steps", 0)
    new = ("train", "new", "--train_data_dir", root / "images", "--output_dir", root / "model")
    succeeds(*new, *options, "--checkpointing_steps", 2, "--sgd_momentum", 0.5)
    return SimpleNamespace(root=root, images=root / "images", model=root / "model")


def test_the_recipe_of_a_model_trains_it_again(world, tmp_path):
    again = ("--train_data_dir", world.images, "--checkpointing_steps", 2)
    succeeds("train", world.model / "recipe.toml", *again, "--output_dir", tmp_path / "a")
    succeeds("train", "recipe", world.model, *again, "--output_dir", tmp_path / "b", "--set", "seed=5")
    folders = (world.model, tmp_path / "a", tmp_path / "b")
    first, same, other = ((folder / "unet" / WEIGHTS).read_bytes() for folder in folders)
    assert first == same != other
    assert read_recipe(tmp_path / "b") == replace(read_recipe(world.model), seed=5)


def test_a_wrong_recipe_on_the_command_line_is_one_line(world, tmp_path):
    command = ("train", world.model / "recipe.toml", "--train_data_dir", world.images, "--output_dir", tmp_path / "x")
    refused(
        *command, "--set", "optimizer.beta1=0.9", says=r"optimizer: SGD has no key 'beta1' \(AdamW has it\); accepted: "
    )
    refused(*command, "--resolution", 16, says="sample_size is 8, but the images are 16x16; give --resolution 8")
    refused(*command, "--prior_data_dir", world.images, says="prior images are for Custom Diffusion")
    refused(*command, "--caption_column", "text", says="reads no text")
    refused(*command, "--pretrained_model_name_or_path", world.model, says="trains a new network")
    refused("train", tmp_path / "no.toml", *command[2:], says=r"no.toml: there is no such file; accepted: a recipe")
    (tmp_path / "text.toml").write_text('[model]\nis = "Text"\n')
    refused("train", tmp_path / "text.toml", *command[2:], says="does not say what it goes on from; accepted: base")


@pytest.mark.parametrize(("steps", "warmup"), [(20, 200), (20, 20), (20, 19), (20, 0)])
def test_a_rate_that_only_rises_is_told(steps, warmup, tmp_path):
    """Short trainings with the default warm-up end where they began, and look finished."""
    recipe = Recipe(schedule=Schedule(steps, warmup), optimizer=AdamW(0.5), model=New({}))
    with warnings.catch_warnings(record=True) as told, refuses("prior images are for Custom Diffusion"):
        train(recipe, Pictures(tmp_path, prior=tmp_path), tmp_path)
    expected = [
        f"of {warmup} steps of warm-up",
        f"there are 20, and it gets to {0.5 * 20 / max(warmup, 1):.3g}, not 0.5",
    ]
    assert [part in str(one.message) for one in told for part in expected] == [True, True] * (steps <= warmup)


def test_the_defaults_of_the_command_line_are_those_of_the_recipe():
    """Every option that stands for a field of the recipe: so that there is one place where a default is."""
    defaults = {
        name: one.default
        for kind in (verbs.NewOptions, verbs.LoraOptions, verbs.CustomOptions)
        for name, one in declarations(kind).items()
    }
    recipe, lora, custom = Recipe(), NewLora(), NewCustomDiffusion()
    expected = {
        "max_train_steps": recipe.steps,
        "lr_warmup_steps": recipe.schedule.warmup_steps,
        "lr_scheduler": recipe.schedule.kind,
        "learning_rate": recipe.optimizer.learning_rate,
        "adam_weight_decay": recipe.optimizer.weight_decay,
        "adam_eps_root": recipe.optimizer.eps_root,
        "train_batch_size": recipe.batch_size,
        "max_grad_norm": recipe.max_grad_norm,
        "ema_decay": recipe.ema,
        "seed": recipe.seed,
        "random_flip": recipe.data.flip,
        "proportion_empty_prompts": recipe.data.empty_caption,
        "rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_targets": lora.targets,
        "modifier_token": custom.modifier_token,
        "initializer_token": custom.initializer_token,
        "prior_loss_weight": custom.prior_loss_weight,
    }
    assert {name: defaults[name] for name in expected} == expected
    learning_rates = {kind().learning_rate for kind in (AdamW, SGD)}
    assert learning_rates == {recipe.optimizer.learning_rate}


# ------------------------------------------------------------------------------------------------------------ in folders


def test_a_recipe_that_was_edited_after_training_is_refused(tmp_path):
    study = pixel_study(MLP, recipe_of(4, 4, seed=2), steps=50)
    train_study(study, images(), tmp_path, 2)
    path = tmp_path / "recipe.toml"
    path.write_text(path.read_text().replace("seed = 2", "seed = 3"))
    from whence.training.checkpoints import study_of

    with refuses("recipe.toml is not what checkpoint-4 was trained with (recipe.seed: found 3"):
        study_of(tmp_path)
    with refuses("recipe.toml is another recipe (seed: found 3, expected 2)"):
        train_study(study, images(), tmp_path, 2)
    path.unlink()
    train_study(study, images(), tmp_path, 2)
    assert study_of(tmp_path).recipe == study.recipe
    assert study_of(tmp_path).recipe != changed(study.recipe, seed=3)
