"""The doctor: everything that would stop a run, or spoil it, is told beforehand; predicted bytes are the bytes written."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from whence import doctor, methods
from whence.data import sources
from whence.data.layout import Finding
from whence.diffusion.draws import uniform
from whence.doctor import Cost, Inputs, Step, examine, lines, plan, predict
from whence.doctor import cost as cost_of
from whence.doctor import inputs as opened_inputs
from whence.doctor.cost import Rate
from whence.doctor.findings import in_bytes, in_millions, in_time
from whence.methods import build
from whence.models import new_network, new_scheduler, open_model, save_pipeline
from whence.storage import files
from whence.storage.arrays import Store
from whence.storage.files import read_json
from whence.task import folder_images, run_folder
from whence.types import Task
from worlds import classifier_task, unet_task

UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2,
    "add_attention": False,
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def pipeline(folder: Path, **changes: Any) -> Path:
    network = new_network({**UNET, **changes}, seed=0)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    save_pipeline(folder, network, weights, new_scheduler(100, "linear", "epsilon"))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("doctor") / "model")


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def pictures(folder: Path, count: int, seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Path:
    """Random pictures 00.png, 01.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    for i in range(count):
        array = np.random.default_rng([seed, i]).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return pictures(tmp_path / "train", 20)


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    return pictures(tmp_path / "queries", 3, seed=1)


def levels(findings: list[Finding], *texts: str) -> list[str]:
    """Levels of the findings that contain all of the texts."""
    return [finding.level for finding in findings if all(text in str(finding) for text in texts)]


def serious(findings: list[Finding]) -> list[str]:
    """Errors and warnings, less those about the machine the tests run on."""
    return [str(f) for f in findings if f.level != "note" and not f.where.startswith(("memory", "device"))]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def checkpoint(model: Path, step: int, notes: dict[str, Any] | None = None) -> Path:
    folder = model / f"checkpoint-{step}"
    shutil.copytree(model / "unet", folder / "unet")
    if notes is not None:
        (folder / "whence.json").write_text(json.dumps(notes))
    return folder


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


# --------------------------------------------------------------------------------------------------------------- model


def test_nothing_is_wrong_with_what_is_right(model: Path, train: Path, queries: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    findings = examine(Inputs(model, train, queries, tmp_path / "run"))
    assert serious(findings) == []
    assert levels(findings, "checkpoint-N", "tracin, tracin_projected, gas") == ["note"]
    assert tree(tmp_path) == before
    assert all(finding.fix and finding.what and finding.where for finding in findings)


def test_nothing_given_is_nothing_wrong(tmp_path: Path) -> None:
    assert serious(examine(Inputs(None, None, None, tmp_path / "run"))) == []


def test_what_is_not_a_pipeline_folder(model: Path, tmp_path: Path) -> None:
    def told(folder: Path) -> list[Finding]:
        return [f for f in examine(Inputs(folder, None, None, tmp_path / "run")) if f.level == "error"]

    [finding] = told(tmp_path / "nowhere")
    assert "no such model folder" in finding.what
    assert "OWNER/NAME with --download" in finding.fix
    [finding] = told(model / WEIGHTS)
    assert "is a file" in finding.what
    [finding] = told(model / "unet")
    assert finding.what == "this is the unet folder itself"
    assert finding.fix == f"accepted: its parent, {model}"
    findings = told(tmp_path)
    assert [f.what.split(" (")[0] for f in findings] == ["unet/ is missing", "scheduler/ is missing"]
    assert all(f"such as {model}" in f.fix for f in findings)
    for name in ("config.json", WEIGHTS.removeprefix("unet/")):
        shutil.copy(model / "unet" / name, model / name)
    shutil.rmtree(model / "unet")
    [finding] = told(model)
    assert "all parts of the pipeline lie in one folder" in finding.what


def test_missing_parts_name_the_folders_found(model: Path, tmp_path: Path) -> None:
    (model / "model_index.json").unlink()
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, "model_index.json is missing") == ["warning"]
    shutil.rmtree(model / "scheduler")
    (model / "vae").mkdir()
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, "scheduler/ is missing", "holds unet, vae") == ["error"]


def broken_config(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / name, **changes)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes(content) and None


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def broken(model: Path) -> None:
        weights = load_file(model / WEIGHTS)
        change(weights)
        save_file(weights, model / WEIGHTS)

    return broken


def cut(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


def to_pickle(model: Path) -> None:
    (model / WEIGHTS).rename(model / "unet" / "diffusion_pytorch_model.bin")


def to_variant(model: Path) -> None:
    (model / WEIGHTS).rename(model / "unet" / "diffusion_pytorch_model.fp16.safetensors")


def bad_checkpoint(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).mkdir()


SCHEDULER = "scheduler/scheduler_config.json"
BROKEN = {
    "network class": (broken_config("unet/config.json", _class_name="VAE"), ("'VAE'", "accepted: UNet2DModel")),
    "scheduler class": (broken_config(SCHEDULER, _class_name="Euler"), ("'Euler'", "accepted: DDPMScheduler")),
    "prediction type": (
        broken_config(SCHEDULER, prediction_type="flow"),
        ("'flow'", "accepted: epsilon, v_prediction"),
    ),
    "schedule": (broken_config(SCHEDULER, beta_schedule="odd"), ("diffusers cannot build it", "odd")),
    "sample size": (broken_config("unet/config.json", sample_size=[8, 8]), ("sample_size is [8, 8]", "--resolution")),
    "latents": (broken_config("unet/config.json", in_channels=4), ("in_channels is 4", "latents")),
    "out channels": (broken_config("unet/config.json", out_channels=5), ("out_channels is 5", "accepted: 3, or 6")),
    "other network": (
        broken_config("unet/config.json", block_out_channels=[8, 8]),
        ("cannot be loaded", "size mismatch"),
    ),
    "no JSON": (write("unet/config.json", b"{"), ("config.json", "cannot be read as JSON")),
    "JSON list": (write("unet/config.json", b"[]"), ("config.json", "holds a list")),
    "pickle": (to_pickle, ("only pickles", "diffusion_pytorch_model.bin", "safe_serialization=True")),
    "no weights": (lambda model: (model / WEIGHTS).unlink(), ("no weights", "safe_serialization=True")),
    "variant": (
        to_variant,
        ("no weights that are opened", "diffusion_pytorch_model.fp16.safetensors", "without `variant`"),
    ),
    "truncated": (cut, (WEIGHTS, "truncated or damaged", "again")),
    "lfs pointer": (
        write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n"),
        ("Git LFS pointer", "git lfs pull"),
    ),
    "infinite": (change_weights(lambda w: w["conv_in.bias"].fill_(math.inf)), ("NaN or Inf: conv_in.bias", "diverged")),
    "missing": (change_weights(lambda w: w.pop("conv_in.bias")), ("missing and would be random: conv_in.bias",)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models(case: str, model: Path, tmp_path: Path) -> None:
    damage, texts = BROKEN[case]
    damage(model)
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, *texts) == ["error"]
    assert not levels(findings, "bug in whence")
    assert findings[0].level == "error"


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-5", "checkpoint-5.bak"])
def test_a_checkpoint_that_cannot_be_read_stops_only_what_reads_it(name: str, model: Path, tmp_path: Path) -> None:
    bad_checkpoint(name)(model)
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, f"checkpoint {name}, which tracin, ", "will refuse", "checkpoint-<step>") == ["warning"]


def test_a_given_resolution_replaces_the_sample_size(model: Path, tmp_path: Path) -> None:
    edit(model / "unet/config.json", sample_size=None)
    assert serious(examine(Inputs(model, None, None, tmp_path / "run", resolution=8))) == []


def test_weights_that_are_not_read(model: Path, tmp_path: Path) -> None:
    change_weights(lambda w: w.update(stray=torch.zeros(2)))(model)
    (model / "unet" / "old.ckpt").write_bytes(b"pickle")
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, "1 weights are no part of UNet2DModel: stray") == ["error"]
    assert levels(findings, "never opened: old.ckpt") == ["note"]


def test_checkpoints_without_a_rate(model: Path, tmp_path: Path) -> None:
    checkpoint(model, 10, {"rate": 0.1})
    assert serious(examine(Inputs(model, None, None, tmp_path / "run"))) == []
    checkpoint(model, 20)
    checkpoint(model, 30, {"step": 30})
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, "2 checkpoints", "tracin, tracin_projected, gas", "need: checkpoint-20, checkpoint-30") == [
        "warning"
    ]
    (model / "checkpoint-20/whence.json").write_text('{"rate": "fast"}')
    cut(model / "checkpoint-30")
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, "checkpoint-20", "rate is 'fast'") == ["warning"]
    assert levels(findings, "checkpoint-30", "truncated") == ["warning"]


def test_averages_are_noted(model: Path, tmp_path: Path) -> None:
    folder = checkpoint(model, 10, {"rate": 0.1, "study": {"recipe": {"ema": 0.99}}})
    (folder / "unet_ema").mkdir()
    findings = examine(Inputs(model, None, None, tmp_path / "run"))
    assert levels(findings, "EMA 0.99", "the checkpoint-N folders raw ones") == ["note"]
    assert levels(findings, "checkpoint-10/unet_ema are not read") == ["note"]


# ---------------------------------------------------------------------------------------------------------------- data


def test_both_folders_are_inspected_and_told_apart(model: Path, tmp_path: Path) -> None:
    train, queries = pictures(tmp_path / "train", 3), pictures(tmp_path / "queries", 2, seed=1)
    (train / "01.png").write_bytes(b"no picture")
    (queries / "01.png").write_bytes(b"")
    findings = examine(Inputs(model, train, queries, tmp_path / "run"))
    assert levels(findings, f"training images {train / '01.png'}: not a readable image") == ["error"]
    assert levels(findings, f"query images {queries / '01.png'}: 0 bytes") == ["error"]
    findings = examine(Inputs(model, tmp_path / "none", tmp_path / "nothing", tmp_path / "run"))
    assert levels(findings, f"training images {tmp_path / 'none'}: no such folder") == ["error"]
    assert levels(findings, f"query images {tmp_path / 'nothing'}: no such folder") == ["error"]
    assert levels(findings, "bug in whence") == []


@pytest.mark.parametrize(("size", "level"), [((16, 16), "warning"), ((16, 12), "note")])
def test_images_of_another_size(model: Path, tmp_path: Path, size: tuple[int, int], level: str) -> None:
    train = pictures(tmp_path / "train", 3, size=size)
    findings = examine(Inputs(model, train, None, tmp_path / "run"))
    assert levels(findings, f"{size[0]}x{size[1]}", "the model's 8x8 and get shrunk") == [level]
    findings = examine(Inputs(model, train, None, tmp_path / "run", resolution=12))
    assert levels(findings, "brought to 12x12, but the model is for 8x8") == ["warning"]


def test_small_images(model: Path, tmp_path: Path) -> None:
    findings = examine(Inputs(model, pictures(tmp_path / "train", 2, size=(4, 4)), None, tmp_path / "run"))
    assert levels(findings, "smaller than 8 and get enlarged") == ["warning"]


def test_colours_that_are_not_the_models(model: Path, tmp_path: Path) -> None:
    grey = pictures(tmp_path / "grey", 2, mode="L")
    findings = examine(Inputs(model, grey, None, tmp_path / "run"))
    assert levels(findings, "2 of 2 images are grey, but the model has 3 channels") == ["warning"]
    of_grey = pipeline(tmp_path / "of grey", in_channels=1, out_channels=1)
    assert serious(examine(Inputs(of_grey, grey, None, tmp_path / "run"))) == []
    findings = examine(Inputs(of_grey, pictures(tmp_path / "colour", 2), None, tmp_path / "run"))
    assert levels(findings, "2 of 2 images are in colour, but the model has 1 channel") == ["warning"]


def test_class_conditional_models_need_labels(train: Path, tmp_path: Path) -> None:
    model = pipeline(tmp_path / "conditional", num_class_embeds=2)
    findings = examine(Inputs(model, train, train, tmp_path / "run"))
    assert levels(findings, "training images", "class-conditional, but the images have no labels") == ["error"]
    assert levels(findings, "query images", "class-conditional, but the images have no labels") == ["error"]
    for number, name in enumerate(["cat", "dog"]):
        pictures(tmp_path / "classes" / name, 2, seed=number)
        pictures(tmp_path / "asked" / name, 2, seed=5 + number)
    assert serious(examine(Inputs(model, tmp_path / "classes", tmp_path / "asked", tmp_path / "run"))) == []
    pictures(tmp_path / "classes" / "eel", 2, seed=9)
    pictures(tmp_path / "asked" / "yak", 2, seed=8)
    findings = examine(Inputs(model, tmp_path / "classes", tmp_path / "asked", tmp_path / "run"))
    assert levels(findings, "training images", "up to 2, but the model has 2 classes (0 to 1)") == ["error"]
    shutil.rmtree(tmp_path / "classes" / "eel")  # whose numbers are those of the queries
    findings = examine(Inputs(model, tmp_path / "classes", tmp_path / "asked", tmp_path / "run"))
    assert levels(findings, "query images", "'yak' is not a class") == ["error"]


def test_queries_that_are_training_images(model: Path, train: Path, queries: Path, tmp_path: Path) -> None:
    shutil.copy(train / "07.png", queries / "copy.png")
    findings = examine(Inputs(model, train, queries, tmp_path / "run"))
    texts = ("1 of 4 images are byte-identical to training images: copy.png = 07.png", "each finds itself first")
    assert levels(findings, *texts) == ["warning"]


# ------------------------------------------------------------------------------------------------------------- machine


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert levels(examine(Inputs(None, None, None, tmp_path / "a" / "b")), "free on this disk") == ["note"]
    (tmp_path / "file").write_text("")
    assert levels(examine(Inputs(None, None, None, tmp_path / "file" / "run")), "is a file") == ["error"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**6))  # type: ignore[attr-defined]
        assert levels(examine(Inputs(None, None, None, tmp_path)), "only 1.0 MB are free") == ["warning"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert levels(examine(Inputs(None, None, None, tmp_path)), "cannot be written to") == ["error"]


def test_memory_and_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    findings = examine(Inputs(None, None, None, tmp_path))
    assert levels(findings, "memory: ", "available") == ["note"] or levels(findings, "memory: ") == ["warning"]
    assert len(levels(findings, "device: ", "cores")) == 1
    monkeypatch.setattr(doctor.machine, "machine_memory", lambda: (2**34, 2**28))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    findings = examine(Inputs(None, None, None, tmp_path))
    assert levels(findings, "memory: 268 MB of 17.2 GB are available") == ["warning"]
    assert levels(findings, "device: ", "4096 of them used", "more threads are slower") == ["warning"]
    monkeypatch.setattr(doctor.machine, "machine_memory", lambda: (0, 0))
    assert levels(examine(Inputs(None, None, None, tmp_path)), "memory is unknown") == ["note"]


def test_a_container_has_the_memory_it_was_given() -> None:
    total, free = doctor.machine.machine_memory()
    assert 0 <= free <= total


def test_run_folder_of_another_model_or_data(model: Path, train: Path, queries: Path, tmp_path: Path) -> None:
    opened, output = open_model(model), tmp_path / "run"
    run_folder(output, opened.final, folder_images(train, opened.resolution, opened.channels))
    before = tree(tmp_path)
    findings = examine(Inputs(model, train, queries, output))
    assert serious(findings) == []
    assert levels(findings, "it is gone on with") == ["note"]
    assert levels(examine(Inputs(model, queries, None, output)), "belongs to another") == [], "without results"
    assert tree(tmp_path) == before
    (output / "scores").mkdir()
    before = tree(tmp_path)
    findings = examine(Inputs(model, queries, None, output))
    assert levels(findings, "belongs to another model or data set", "choose another output folder") == ["error"]
    assert tree(tmp_path) == before
    change_weights(lambda w: w["conv_in.bias"].add_(1))(model)
    findings = examine(Inputs(model, train, queries, output))
    assert levels(findings, "belongs to another model or data set (model") == ["error"]
    (output / "index.json").write_text("{}")
    assert levels(examine(Inputs(model, train, queries, output)), "not written by whence") == ["error"]


def test_a_check_that_fails_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, model: Path, train: Path, tmp_path: Path
) -> None:
    def fails(*args: Any) -> Any:
        raise ZeroDivisionError("oh")

    read = [(doctor.models, name) for name in ("family", "weight_files", "machine_memory")]
    for room, name in [
        *read,
        (opened_inputs, "look_at"),
        *((doctor.machine, name) for name in ("device", "disk", "memory")),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(room, name, fails)
            findings = examine(Inputs(model, train, None, tmp_path / "run"))
            assert {*levels(findings, "check of the ", "failed: ZeroDivisionError: oh", "report this")} == {"error"}


def test_every_folder_is_walked_once_and_the_model_hashed_once(
    monkeypatch: pytest.MonkeyPatch, model: Path, train: Path, queries: Path, tmp_path: Path
) -> None:
    walked: Counter[Path] = Counter()
    hashed: Counter[str] = Counter()
    walk, digest = sources.walk, files.hashlib.file_digest

    def walking(folder: Path, *more: Any) -> Any:
        walked[folder] += 1
        return walk(folder, *more)

    def hashing(file: Any, kind: str) -> Any:
        hashed[file.name] += 1
        return digest(file, kind)

    monkeypatch.setattr(sources, "walk", walking)
    monkeypatch.setattr(files.hashlib, "file_digest", hashing)
    inputs = Inputs(model, train, queries, tmp_path / "run")
    assert serious(examine(inputs)) == []
    plan(inputs)
    assert walked == {train: 1, queries: 1}
    assert set(hashed.values()) <= {1}


# ------------------------------------------------------------------------------------------------------------- predict


def written(root: Path) -> list[int]:
    return [path.stat().st_size for path in root.glob("features/*/part-*.safetensors")]


def check_bytes(task: Task, chosen: dict[str, dict[str, Any]]) -> Cost:
    """Predict, run, and compare with what lies on the disk then."""
    cost = predict(task, chosen)
    assert [str(finding) for finding in cost.findings if finding.level != "note"] == []
    assert written(task.root) == []
    for name, settings in chosen.items():
        build(name, task.forward, settings)(task)
    sizes = written(task.root)
    assert 0 <= sum(sizes) - cost.features <= 512 * len(sizes)
    stored = sum(math.prod(array.shape) * array.dtype.itemsize for array in Store(task.root).arrays())
    assert cost.features == stored
    return cost


GRADIENT = {"draws": uniform(4), "dim": 16}


def test_bytes_are_those_written(model: Path, train: Path, queries: Path, tmp_path: Path) -> None:
    task = plan(Inputs(model, train, queries, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    cost = check_bytes(task, {"d_trak": GRADIENT})
    assert cost.features == 2 * (20 + 3) * 16 * 4, "at each half of the draws"
    without = check_bytes(plan(Inputs(model, train, queries, tmp_path / "without", errors=False)), {"d_trak": GRADIENT})
    assert (2 * without.features, 2 * without.scores) == (cost.features, cost.scores)
    assert cost.scores == 2 * 20 * 3 * 8, "and their errors"
    assert cost.seconds > 0
    assert cost.memory > 0


def test_shared_parts_are_counted_once(model: Path, train: Path, queries: Path, tmp_path: Path) -> None:
    task = plan(Inputs(model, train, queries, tmp_path / "run"))
    chosen = {"trak": GRADIENT, "influence": GRADIENT, "gradient_dot": GRADIENT, "pixel_dot": {}, "pixel_cosine": {}}
    cost = check_bytes(task, chosen)
    assert cost.features == (20 + 3) * (2 * 16 + 3 * 64) * 4
    assert [step.what.split(":")[0] for step in cost.steps if step.kind == "features"] == ["trak"] * 4 + [
        "pixel_dot"
    ] * 2
    assert cost.scores == 2 * 5 * 20 * 3 * 8


def test_every_checkpoint_and_every_probe_counts(tmp_path: Path) -> None:
    task = unet_task(tmp_path / "run")
    assert check_bytes(task, {"tracin": GRADIENT}).features == 2 * (6 + 2) * 16 * 4
    task = unet_task(tmp_path / "probes")
    assert check_bytes(task, {"output_dot": {**GRADIENT, "count": 3}}).features == (6 + 2) * 48 * 4
    task = unet_task(tmp_path / "exact", budget=1)
    width = sum(p.numel() for p in task.trajectory[0].load().parameters())
    assert check_bytes(task, {"gradient_dot": {**GRADIENT, "dim": None}}).features == (6 + 2) * width * 4


def test_an_ensemble_counts_each_model(model: Path, train: Path, queries: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    change_weights(lambda w: w["conv_in.bias"].add_(1))(other)
    task = plan(Inputs(model, train, queries, tmp_path / "run"), ensemble=[other])
    chosen = {"trak": {**GRADIENT, "ensemble": True}, "influence": GRADIENT}
    assert check_bytes(task, chosen).features == 2 * 2 * (20 + 3) * 16 * 4


def test_weights_of_images_count(tmp_path: Path) -> None:
    cost = check_bytes(classifier_task(tmp_path / "run"), {"trak": {"dim": 8}})
    assert cost.features == ((20 + 3) * 8 + 20) * 8


@pytest.mark.parametrize("budget", [1, 200_000, 2**28])
def test_shards_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch, budget: int, tmp_path: Path) -> None:
    task, measured = unet_task(tmp_path / "run", budget=budget), []

    def noted(*figures: Any) -> Rate:
        measured.append(Rate(*figures))
        return measured[-1]

    monkeypatch.setattr(cost_of, "Rate", noted)
    predict(task, {"gradient_dot": GRADIENT})
    build("gradient_dot", task.forward, GRADIENT)(task)
    shards = {read_json(path)["per_shard"] for path in task.root.glob("features/*/manifest.json")}
    assert [rate.per_shard for rate in measured] == [max(shards)]


def test_drawn_queries_are_stood_for(model: Path, train: Path, tmp_path: Path) -> None:
    task = plan(Inputs(model, train, None, tmp_path / "run"))
    assert len(task.queries) == 16
    assert predict(task, {"pixel_dot": {}}).features == (20 + 16) * 192 * 4
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".whence-doctor-*"))


def test_what_cannot_run_is_told(
    monkeypatch: pytest.MonkeyPatch, model: Path, train: Path, queries: Path, tmp_path: Path
) -> None:
    task = plan(Inputs(model, train, queries, tmp_path / "run"))
    entry = methods.Entry(lambda: lambda task: None, "none", None, "unknown")  # type: ignore[arg-type, return-value]
    monkeypatch.setitem(methods.METHODS, "odd", entry)
    cost = predict(task, {"tracin": {}, "trak": {"damping": -1}, "odd": {}, "nonesuch": {}, "pixel_dot": {}})
    findings = list(cost.findings)
    assert levels(findings, "tracin: ", "checkpoint-N") == ["error"]
    assert levels(findings, "trak: damping -1") == ["error"]
    assert levels(findings, "unknown method 'nonesuch'") == ["error"]
    assert cost.features == (20 + 3) * 192 * 4


def test_a_network_that_fails_is_told(train: Path, queries: Path, tmp_path: Path) -> None:
    model = pipeline(tmp_path / "model")
    task = plan(Inputs(model, train, queries, tmp_path / "run", resolution=7))
    findings = list(predict(task, {"d_trak": GRADIENT}).findings)
    assert levels(findings, "d_trak: fails on the first images (RuntimeError") == ["error"]


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cost = predict(unet_task(tmp_path / "run", device="cuda"), {"d_trak": GRADIENT})
    assert cost.steps == ()
    assert levels(list(cost.findings), "device 'cuda' is not there") == ["error"]


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = unet_task(tmp_path / "run")
    monkeypatch.setattr(doctor.machine, "machine_memory", lambda: (2**40, 1000))
    assert levels(list(predict(task, {"pixel_dot": {}}).findings), "of memory, 1.0 KB are available") == ["warning"]
    monkeypatch.setattr(doctor.machine, "machine_memory", lambda: (2000, 1000))
    assert levels(list(predict(task, {"pixel_dot": {}}).findings), "of memory, 1.0 KB are available") == ["error"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 100))  # type: ignore[attr-defined]
    assert levels(list(predict(task, {"pixel_dot": {}}).findings), "on disk, 100 bytes are free") == ["error"]


def test_a_projection_made_again_and_again_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rate = Rate(64, 1, 1.0, 1.0, 0.1, 9.0, 0.1, 0.1, 0, 0, 0, 0)
    monkeypatch.setattr(cost_of, "Rate", lambda *measured: rate)
    many, one = (predict(unet_task(tmp_path / str(n), n=n), {"d_trak": GRADIENT}) for n in (100, 1))
    assert levels(list(many.findings), "gradients of 1 image at a time", "made anew 100 times") == ["warning"]
    assert one.findings == ()


def test_larger_tasks_cost_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model behind the figures, with made-up rates: no clock."""
    rate = Rate(1000, 10, 1.0, 0.5, 0.1, 2.0, 0.0, 0.0, 10**9, 0, 10**6, 10**8)
    monkeypatch.setattr(cost_of, "Rate", lambda *measured: rate)
    tasks = [unet_task(tmp_path / str(n), n=n, m=2) for n in (10, 100)]
    one, many = (predict(task, {"gradient_dot": GRADIENT}).steps[0] for task in tasks)
    assert one.seconds == pytest.approx(1 + 10 * 0.6 + 2)
    assert many.seconds == pytest.approx(1 + 100 * 0.6 + 10 * 2)
    assert many.disk == 10 * one.disk == 100 * 1000 * 4
    assert many.memory == one.memory == 10**9 + 10**6 + 3 * 10 * 1000 * 4
    points = tuple(replace(tasks[1].trajectory[0], digest=f"checkpoint {step}", step=step) for step in (1, 2, 3))
    thrice = predict(replace(tasks[1], trajectory=points), {"tracin": GRADIENT}).steps[0]
    assert thrice.seconds == pytest.approx(3 * many.seconds)
    (system,) = (
        s for s in predict(unet_task(tmp_path / "6", n=6, m=2), {"trak": GRADIENT}).steps if s.kind == "system"
    )
    assert "6 x 6" in system.what  # n < k: the dual
    assert system.memory == 10**8 + 8 * (4 * 36 + 2 * 2 * 1000 + 4 * 2 * 6 + 3 * 10 * 1000)


# ---------------------------------------------------------------------------------------------------------------- tell


def test_lines_are_plain(tmp_path: Path) -> None:
    findings = [Finding("error", "is\nbroken", "here", "mend it"), Finding("note", "is fine", "there", "nothing")]
    told = lines(findings, None)
    assert told == ["error:   here: is broken; mend it", "note:    there: is fine; nothing", "1 error"]
    steps = (
        Step("a: rows", "features", 3_200_000_000, 1_900_000_000, 840.0),
        Step("a: scores", "scores", 1000, 10, 0.0),
    )
    told = lines([], Cost(steps, findings=(Finding("warning", "w", "x", "y"),)))
    assert told[0] == "warning: x: w; y"
    assert told[1] == "1 warning"
    assert told[2] == "  a: rows: 3.2 GB on disk, 1.9 GB of memory, about 14 minutes"
    assert len(told) == 4
    assert told[3] == (
        "features: 3.2 GB on disk, scores: 1.0 KB; memory: 1.9 GB at most; time: about 14 minutes on this device (cpu)"
    )
    assert lines([], None) == ["nothing is wrong"]
    on_gpu = Cost((Step("a", "features", device_memory=5 * 10**9),), "cuda")
    assert "GPU memory: 5.0 GB" in lines([], on_gpu)[-1]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (123_456_789, "123 MB"),
        (2.5e12, "2.5 TB"),
        (4e16, "40000 TB"),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert in_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "a second or less"), (40, "about 40 seconds"), (150, "about 2.5 minutes"), (7200, "about 2.0 hours"),
     (40 * 3600, "about 40 hours"), (10**7, "about 116 days")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (45_259, "45,259"), (1_000_000, "1.0 M"), (859_520_964, "859.5 M")]
)
def test_no_network_is_said_to_have_no_parameters(count: int, text: str) -> None:
    assert in_millions(count) == text
