"""Every method on every family of models: tiny random pipelines, opened and trained as people do it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES, save_whole
from test_encode import pictures
from whence import Task
from whence.adapters import encode_images, open_model
from whence.data import image_folder, subset
from whence.draws import uniform
from whence.fitting import LoraStudy, Study, train_lora, train_model
from whence.methods import METHODS, build, settings_of
from whence.store import write_json
from whence.tasks import generated
from whence.training import Training
from whence.types import Engine, Method, Scores, WhenceError, digest
from worlds import encoder

NAMES = ("ddpm", "sd", "sdxl", "dit", "pixart", "sd3", "flux", "sd with a LoRA")
CAPTIONS = ["a red cat", "a dog", "two birds", "", "a red cat"]
PROMPTS = ["a cat", "birds"]
TWINS = (1, 5)
SIDE, STEPS = 8, 2
RECIPE = Training(steps=2, batch_size=2, rate=1e-2, eps_root=1e-8, clip=None, seed=5)
ENCODERS = {"clip_cosine": "clip", "dino_cosine": "dinov2"}
SMALL: dict[str, Any] = {
    "draws": uniform(1), "dim": 8, "damping": 0.1, "count": 1, "segments": 1, "residual": 2, "top": 2, "masks": 2,
    "noises": 1, "depth": 3, "steps": 2,
}  # fmt: skip
SMALL_OF_METHOD: dict[str, dict[str, Any]] = {
    "exact_influence": {"parameters": r"^(conv_out|proj_out(_2)?)\.bias"},
    "influence_lissa": {"parameters": r"^(conv_out|proj_out(_2)?)\.bias"},
    "influence_cg": {"parameters": r"^(conv_out|proj_out(_2)?)\.bias", "steps": 50},
    "block_trak": {"depth": 1},
    "weighted_d_trak": {"depth": 1},
}


def family(name: str) -> str:
    return "sd" if name == "sd with a LoRA" else name


@dataclass(frozen=True)
class World:
    """Folders and tasks of one family. task: the base as whence opens it; tuned: trained here."""

    task: Task
    tuned: Task
    first: dict[str, Scores] = field(default_factory=dict)

    def of(self, name: str) -> Task:
        return self.tuned if "training" in METHODS[name].needs else self.task


def make(name: str, root: Path) -> World:
    kind, side = family(name), 4 if name == "ddpm" else SIDE
    train = pictures(root / "train", CAPTIONS)
    # A twin of picture 1
    (train / "5.png").write_bytes((train / "1.png").read_bytes())
    with (train / "metadata.jsonl").open("a") as file:
        file.write((train / "metadata.jsonl").read_text().splitlines()[1].replace("1.png", "5.png") + "\n")
    model, lora = root / "model", None
    if name == "ddpm":
        images = image_folder(train, side)
        train_model(Study({"_class_name": "UNet2DModel", **FAMILIES["ddpm"].config}, RECIPE), images, model, 1)
    else:
        save_whole(kind, model)
        part = FAMILIES[kind].part
        for step in (1, 2):
            FAMILIES[kind].network(step).save_pretrained(model / f"checkpoint-{step}" / part)
            write_json(model / f"checkpoint-{step}" / "whence.json", {"rate": 0.1 / step})
        lora = root / "lora"
        study = LoraStudy(model, RECIPE, rank=2)
        train_lora(study, encode_images(open_model(model), image_folder(train, side), root / "seen"), lora, 1)

    def opened(lora, run):
        if name == "dit":
            queries = root / "queries"
            if not queries.exists():
                pictures(queries, PROMPTS, seed=1)
        else:
            found = open_model(model, lora)
            queries = generated(found, run, 2, 0, STEPS, Engine(), None if name == "ddpm" else PROMPTS, 2.0, side)
        return Task.from_pretrained(model, train, queries, run, resolution=side, lora=lora)

    if name == "ddpm":
        task = opened(None, root / "run")
        return World(task, task)
    tuned = opened(lora, root / "tuned")
    return World(tuned if "LoRA" in name else opened(None, root / "run"), tuned)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name.replace(" ", "-")))
        return made[name]

    return get


def method_of(name: str, task: Task) -> Method:
    wanted = {**SMALL, **SMALL_OF_METHOD.get(name, {})}
    if name in ENCODERS:
        wanted["encoder"] = encoder(ENCODERS[name])
    accepted = settings_of(name)
    return build(name, task.forward, {key: value for key, value in wanted.items() if key in accepted})


CASES = [pytest.param(f, m, id=f"{f}-{m}") for f in NAMES for m in METHODS]


@pytest.mark.parametrize(("family_name", "name"), CASES)
def test_runs(worlds, family_name, name):
    world = worlds(family_name)
    task = world.of(name)
    scores = method_of(name, task)(task)
    assert scores.values.shape == (2, 6)
    assert float((scores.values - scores.values[:, :1]).abs().max()) > 0
    if "training" not in METHODS[name].needs:
        a, b = scores.values[:, 1], scores.values[:, 5]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(scores.values.abs().max()))
