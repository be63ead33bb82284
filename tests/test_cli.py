"""The command line from end to end: what people do with it, every bad input it is given, and kill -9 in the middle."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from errors import refuses
from forks import fork
from whence import METHODS, Classifier, attribute, tensor_images, trak
from whence.cli import main as cli
from whence.data.saving import save_png
from whence.evaluation.readers import VALUES
from whence.storage.arrays import Store
from whence.storage.files import file_digest
from whence.storage.scores import load_scores
from whence.task import request

IMAGES, QUERIES = 14, 3
TRAINING = ("--channels", 1, "--block_out_channels", "16,16", "--max_train_steps", 6, "--train_batch_size", 8)
TRAINING = (*TRAINING, "--checkpointing_steps", 3, "--lr_warmup_steps", 2)
SMALL = ("--draws", 4, "--dim", 32)


@dataclass(frozen=True)
class Done:
    """A finished call: exit code, and what it wrote."""

    code: int
    out: str
    err: str


def whence(*arguments: object) -> Done:
    """`whence arguments` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["whence", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        cli.main()
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())


OTHER_IMAGES = "was trained by `whence train` on other images than these"
FEW_DRAWS = "depend mostly on what was drawn for them"


def succeeds(*arguments: object, warns: str = "") -> Done:
    """Exit code 0, and nothing on stderr but warnings where there are to be some."""
    done = whence(*arguments)
    assert done.code == 0, done.err
    said = [line for line in done.err.splitlines() if FEW_DRAWS not in line]  # true of much in this little world
    assert all(warns and line.startswith("whence: warning: ") for line in said), done.err
    assert re.search(warns, done.err), done.err
    return done


def refused(*arguments: object, says: str, warns: str = "") -> None:
    """Exit code 2 and one line on stderr that tells the matter; before it a warning where there is to be one."""
    done = whence(*arguments)
    assert done.code == 2, done
    *before, last = done.err.splitlines()
    before = [
        line for line in before if OTHER_IMAGES not in line and FEW_DRAWS not in line
    ]  # true of every damaged folder of images
    assert last.startswith("whence: ")
    assert len(before) == bool(warns), done.err
    assert all(re.search(f"^whence: warning: .*{warns}", line) for line in before), done.err
    assert re.search(says, f"{last}\n"), done.err


@dataclass(frozen=True)
class World:
    """A trained model, the folder of its images, and a folder of pictures to explain."""

    root: Path

    @property
    def images(self) -> Path:
        return self.root / "images"

    @property
    def queries(self) -> Path:
        return self.root / "queries"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def attribute(self, output: Path, *more: object) -> tuple[object, ...]:
        """Arguments of a plain attribution into a run folder."""
        return (*self.about(output), "--query_data_dir", self.queries, *SMALL, *more)

    def compare(self, output: Path, *more: object) -> tuple[object, ...]:
        """Arguments of an attribution that only looks at the images."""
        return (*self.about(output), "--query_data_dir", self.queries, "--method", "pixel_dot", *more)

    def about(self, output: Path, *more: object) -> tuple[object, ...]:
        return ("attribute", self.model, "--train_data_dir", self.images, "--output_dir", output, *more)

    def copy(self, name: str, to: Path) -> Path:
        return Path(shutil.copytree(getattr(self, name), to / name))


def noise(count: int, seed: int, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("cli"))
    creators = [{"creator": "anna" if i % 3 else "ben"} for i in range(IMAGES)]
    save_png(world.images, noise(IMAGES, 0), [f"{i:02d}" for i in range(IMAGES)], creators)
    save_png(world.queries, noise(QUERIES, 1), [f"q{i}" for i in range(QUERIES)])
    succeeds("train", "new", "--train_data_dir", world.images, "--output_dir", world.model, *TRAINING)
    return world


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """A run that was never interrupted, in shards of a few images."""
    run = world.root / "finished"
    succeeds(*world.attribute(run, "--budget_mb", 1, "--method", "d_trak", "--method", "trak"))
    assert len(shards(run)) > 8
    return run


def shards(run: Path) -> list[Path]:
    return sorted(path.relative_to(run) for path in run.glob("features/*/part-*.safetensors"))


# --------------------------------------------------------------------------------------------------------- what works


def test_train_writes_a_pipeline_that_diffusers_reads(world):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(world.model)
    assert pipeline.unet.config.sample_size == 8
    assert {path.name for path in world.model.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_train_again_changes_nothing(world):
    before = file_digest(world.model / "unet" / "diffusion_pytorch_model.safetensors")
    succeeds("train", "new", "--train_data_dir", world.images, "--output_dir", world.model, *TRAINING)
    assert file_digest(world.model / "unet" / "diffusion_pytorch_model.safetensors") == before


def test_training_goes_on_where_it_stopped(world, tmp_path):
    """A run cut off after the first checkpoint ends with the same bytes."""
    shutil.copytree(world.model / "checkpoint-3", tmp_path / "checkpoint-3")
    succeeds("train", "new", "--train_data_dir", world.images, "--output_dir", tmp_path, *TRAINING)
    for name in ("unet", "checkpoint-6/unet"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert file_digest(tmp_path / file) == file_digest(world.model / file)


def test_attribute_pictures_that_the_model_draws(world, tmp_path):
    methods = ("d_trak", "tracin", "output_cosine", "pixel_cosine")
    options = [word for method in methods for word in ("--method", method)]
    options += ["--generate", "3", "--num_inference_steps", "4", "--set", "count=2", *map(str, SMALL)]
    done = succeeds(*world.about(tmp_path, *options))
    assert "positive = proponent" in done.out
    assert f"report: {tmp_path / 'report.html'}" in done.out
    assert re.search(
        r'd_trak: {"features": "Gradient\(squared_norm, Draws\(Grid\(4\), shared\), \w+\(32\)\)"', done.out
    )
    assert "output_cosine: " in done.out
    assert "2 x probe" in done.out
    page = (tmp_path / "report.html").read_text()
    assert all(method in page for method in methods)
    assert Image.open(tmp_path / "gallery.png").size[0] > 800
    assert len(list((tmp_path / "generated").glob("*.png"))) == 3
    for method in methods:
        scores = load_scores(tmp_path / "scores" / method)
        assert scores.values.shape == (3, IMAGES)
        table = pq.read_table(tmp_path / "scores" / method / "top.parquet").to_pydict()
        assert list(table) == ["query", "rank", "image", "score", "stderr", "first_rank", "last_rank", "creator"]
        assert scores.stderr_of == (
            "nothing: no part of it is drawn by chance"
            if method == "pixel_cosine"
            else "draws that all images share, and the random projection"
        )
        assert table["image"][0], table["score"][0] == scores.top(0, 1)[0]
        assert set(table["creator"]) == {"anna", "ben"}


def test_attribute_through_training(world, tmp_path):
    """The folder says how it was trained; other images than those it was trained on are not what made it."""
    options = ("--method", "metagradient", "--method", "averaged_metagradient", "--set", "masks=2", "--draws", 4)
    succeeds(*world.about(tmp_path / "run", "--query_data_dir", world.queries, *options))
    for method in ("metagradient", "averaged_metagradient"):
        scores = load_scores(tmp_path / "run" / "scores" / method)
        assert scores.scale == "removal"
        assert float(scores.values.abs().max()) > 0
    others = ("attribute", world.model, "--train_data_dir", world.queries, "--query_data_dir", world.queries, *options)
    others = (*others, "--output_dir", tmp_path / "others")
    refused(*others, says="not known how this one was trained; accepted: a folder")


def test_a_training_by_sgd_is_differentiated_too(world, tmp_path):
    """The folder says that it was trained with momentum, and the replay ends with its weights: a second one is refused."""
    train = ("train", "new", "--train_data_dir", world.images, "--output_dir", tmp_path / "model", *TRAINING)
    succeeds(*train, "--sgd_momentum", 0.9)
    assert '"momentum": 0.9' in next((tmp_path / "model").glob("checkpoint-*/whence.json")).read_text()
    refused(*train, says=r"study.recipe.optimizer: found SGD, expected AdamW")
    about = ("attribute", tmp_path / "model", "--train_data_dir", world.images, "--query_data_dir", world.queries)
    succeeds(*about, "--method", "metagradient", "--draws", 4, "--output_dir", tmp_path / "run")
    assert float(load_scores(tmp_path / "run" / "scores" / "metagradient").values.abs().max()) > 0
    refused(
        *train[:5], tmp_path / "other", *TRAINING, "--sgd_momentum", 1.0, says="momentum is 1; accepted: 0 to below 1"
    )


def test_attribute_own_pictures_then_report_again(world, finished, tmp_path):
    run = Path(shutil.copytree(finished, world.root / "reported"))
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert f"report: {run / 'report.html'}" in succeeds("report", run).out
    assert (run / "report.html").read_bytes() == before
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    refused("report", moved, says="no such folder; give a folder of images")
    succeeds("report", moved, "--train_data_dir", world.images, "--query_data_dir", world.queries)
    refused("report", run, "--train_data_dir", world.queries, says="other images than d_trak was computed for; give")


def test_a_finished_run_is_read_not_computed_again(world, finished):
    before = {path: (finished / path).stat().st_mtime_ns for path in shards(finished)}
    succeeds(*world.attribute(finished, "--budget_mb", 7, "--method", "d_trak", "--method", "trak"))
    assert {path: (finished / path).stat().st_mtime_ns for path in shards(finished)} == before


def test_seed_is_that_of_the_draws(world, tmp_path):
    """With and without --draws."""
    for number, options in enumerate(([], ["--seed", 1])):
        words = ["attribute", world.model, "--train_data_dir", world.images, "--query_data_dir", world.queries]
        succeeds(*words, "--output_dir", tmp_path / str(number), "--dim", 8, "--method", "gradient_dot", *options)
    a, b = (load_scores(tmp_path / name / "scores" / "gradient_dot") for name in "01")
    assert [s.recipe["method"]["train"]["draws"]["seed"] for s in (a, b)] == [0, 1]
    assert not torch.equal(a.values, b.values)


@pytest.mark.parametrize("count", [1, 3])
def test_workers_change_no_bit(world, finished, tmp_path, count):
    options = ("--budget_mb", 1, "--method", "d_trak", "--method", "trak", "--workers", count)
    done = succeeds(*world.attribute(tmp_path, *options))
    assert shards(tmp_path) == shards(finished)
    for path in [*shards(finished), "scores/d_trak/scores.safetensors", "scores/trak/scores.safetensors"]:
        assert (tmp_path / path).read_bytes() == (finished / path).read_bytes()
    assert not list(tmp_path.rglob("*.claim"))
    assert "report: " in done.out
    refused(*world.attribute(tmp_path, "--workers", 0), says="Invalid value for '--workers'")


def test_a_cluster_that_is_not_there(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(
        *world.attribute(tmp_path / "run", "--ray", "auto"), says="--ray: Ray is not installed; accepted: pip install"
    )
    refused(
        *world.attribute(tmp_path / "run", "--ray", "auto", "--workers", 2),
        says="--workers and --ray exclude each other",
    )
    assert not (tmp_path / "run").exists()


def test_noise_that_images_share_or_not(world, tmp_path):
    words = ["attribute", world.model, "--train_data_dir", world.images, "--query_data_dir", world.queries, "--dim", 8]
    given = {"default": [], "shared": ["--noise", "shared"], "own": ["--noise", "own"]}
    for name, options in given.items():
        succeeds(*words, "--output_dir", tmp_path / name, "--method", "gradient_dot", *options)
    by_default, shared, own = (load_scores(tmp_path / name / "scores" / "gradient_dot") for name in given)
    assert torch.equal(by_default.values, shared.values)
    assert not torch.equal(own.values, shared.values)
    refused(*words, "--method", "pixel_cosine", "--noise", "own", says="no setting 'noise': pixel_cosine takes center")
    refused(*words, "--noise", "none", says="--noise 'none'; accepted: shared, own")
    refused(*words, "--set", "noise=own", says="noise has an option of its own; accepted: --noise")


def test_a_class_conditional_model(world, tmp_path):
    """Class folders; each class is drawn in turn."""
    for name in ("cats", "dogs"):
        for i in range(4):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(world.images / f"{i + 4 * (name == 'dogs'):02d}.png", tmp_path / "images" / name)
    train = ("--train_data_dir", tmp_path / "images")
    succeeds("train", "new", *train, "--output_dir", tmp_path / "model", "--class_conditional", *TRAINING)
    options = ("--output_dir", tmp_path / "run", "--generate", 3, "--num_inference_steps", 2, *SMALL)
    succeeds("attribute", tmp_path / "model", *train, *options)
    lines = [json.loads(line) for line in (tmp_path / "run/generated/metadata.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 1, 0]
    assert set(load_scores(tmp_path / "run/scores/das").group_by("label").train_ids) == {"cats", "dogs"}
    succeeds("report", tmp_path / "run")
    unlabelled = ("--train_data_dir", world.images, "--query_data_dir", world.queries, "--output_dir", tmp_path / "no")
    refused(
        "attribute",
        tmp_path / "model",
        *unlabelled,
        *SMALL,
        says="class-conditional.*class folders, or a column `label`",
    )


def test_an_ensemble_is_averaged_over(world, tmp_path):
    options = ("--train_data_dir", world.images, "--output_dir", tmp_path / "other", *TRAINING, "--seed", 1)
    succeeds("train", "new", *options)
    succeeds(*world.attribute(tmp_path / "run", "--ensemble", tmp_path / "other"))
    recipe = load_scores(tmp_path / "run/scores/das").recipe
    assert len(recipe["checkpoints"]) > 1
    assert sum(recipe["eta"]) == pytest.approx(1)
    says = "no setting 'ensemble': pixel_dot takes center"
    refused(*world.compare(tmp_path / "no", "--ensemble", tmp_path / "other"), says=says)


def test_progress_in_a_log_is_plain_lines(world, tmp_path, monkeypatch):
    monkeypatch.delenv("WHENCE_QUIET")
    done = whence(*world.compare(tmp_path))
    assert done.code == 0
    assert "\r" not in done.err
    assert all(line.startswith(("pixel_dot: ", "looking for copies: ")) for line in done.err.splitlines())
    assert "pixel_dot: training images: 100%" in done.err


def test_a_module_needs_images_not_folders(tmp_path):
    with refuses("train='images': a module needs Images; use whence.image_folder('images')"):
        attribute((torch.nn.Flatten(), Classifier()), "images", torch.zeros(2, 3, 4, 4), root=tmp_path)


def test_what_is_handed_over_as_it_is_says_what_else_it_takes(tmp_path):
    """A module without its measurement, a method in place of its name, probabilities in place of logits."""
    net, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), torch.rand(6, 1, 2, 2)
    sides = tensor_images(x, labels=[0, 1, 2] * 2), tensor_images(x[:1], labels=[1])
    for model in (net, (net,), None):
        with refuses("alone does not say how it is measured", where="model", accepted="(module, forward)"):
            attribute(model, *sides, "trak", tmp_path)
    for method in (trak, trak(dim=None)):
        with refuses("trak is no name" if method is trak else "InnerProduct is no name", accepted="called on a task"):
            attribute((net, Classifier()), *sides, method, tmp_path)
    for ending in (torch.nn.Softmax(-1), torch.nn.Sequential(torch.nn.Linear(3, 200), torch.nn.Softmax(-1))):
        with refuses("the network returns probabilities", accepted="before the softmax"):
            attribute((torch.nn.Sequential(net, ending), Classifier()), *sides, "trak", tmp_path / "p", dim=None)
        shutil.rmtree(tmp_path / "p")
    for fine in (torch.nn.LogSoftmax(-1), torch.nn.Sigmoid()):
        attribute((torch.nn.Sequential(net, fine), Classifier()), *sides, "trak", tmp_path / "p", dim=None)
        shutil.rmtree(tmp_path / "p")


def test_methods_and_version_and_help():
    listed = succeeds("methods").out
    assert all(name in listed for name in METHODS)
    assert succeeds("methods", "--markdown").out.count("\n") == len(METHODS) + len(VALUES) + 2
    assert succeeds("--version").out.startswith("whence ")
    assert "--train_data_dir" in succeeds("attribute", "--help").out
    nothing = whence()
    assert nothing.code == 2
    assert "attribute" in nothing.out


def test_doctor(world, tmp_path):
    run = tmp_path / "run"
    folders = ("--train_data_dir", world.images, "--query_data_dir", world.queries, "--output_dir", run)
    done = succeeds("doctor", world.model, *folders, "--dim", 32, "--draws", 4)
    assert "nothing is wrong" in done.out
    assert "das: training images at half 2 of the draws (14 x 32)" in done.out
    assert "das: training images (14 x 32)" in succeeds("doctor", world.model, *folders, "--dim", 32, "--no_errors").out
    assert not run.exists()
    done = whence("doctor", tmp_path / "nothing", *folders)
    assert done.code == 2
    assert "no such model folder" in done.out
    assert done.err == ""
    assert whence("doctor", world.model, *folders, "--method", "journey_trak").code == 2


# ---------------------------------------------------------------------------------------------------------- bad input

Case = Callable[[World, Path], tuple[tuple[object, ...], str]]
CASES: dict[str, Case] = {}


def case(make: Case) -> Case:
    CASES[make.__name__.strip("_")] = make
    return make


def attribute_with(world: World, tmp: Path, **folders: Path) -> tuple[object, ...]:
    """A plain attribution with the model, the images or the queries from elsewhere."""
    model, images, queries = (folders.get(name, getattr(world, name)) for name in ("model", "images", "queries"))
    return (
        "attribute", model, "--train_data_dir", images, "--query_data_dir", queries, "--output_dir", tmp / "run", *SMALL
    )  # fmt: skip


@case
def missing_image(world, tmp):
    images = world.copy("images", tmp)
    (images / "07.png").unlink()
    return attribute_with(world, tmp, images=images), r"images: .*07\.png.*; "


@case
def corrupt_image(world, tmp):
    images = world.copy("images", tmp)
    (images / "07.png").write_text("this is no picture")
    return attribute_with(world, tmp, images=images), r"07\.png: not a readable image \(no known format\); replace or"


@case
def truncated_image(world, tmp):
    images = world.copy("images", tmp)
    picture = images / "07.png"
    picture.write_bytes(picture.read_bytes()[:-40])
    says = r"07\.png: not a readable image \(.*\); replace or remove the file"
    return attribute_with(world, tmp, images=images), says


@case
def empty_image(world, tmp):
    images = world.copy("images", tmp)
    (images / "07.png").write_bytes(b"")
    return attribute_with(world, tmp, images=images), r"07\.png: the file is empty \(0 bytes\); replace or remove it"


@case
def mixed_sizes(world, tmp):
    images = world.copy("images", tmp)
    Image.open(images / "07.png").resize((9, 9)).save(images / "07.png")
    words = ("train", "new", "--train_data_dir", images, "--output_dir", tmp / "model", *TRAINING)
    return words, "images: images of different sizes .*8x8 and 07.png is 9x9.*; give --resolution"


@case
def oblong_images(world, tmp):
    save_png(tmp / "oblong", torch.zeros(2, 1, 8, 16), ["a", "b"])
    words = ("train", "new", "--train_data_dir", tmp / "oblong", "--output_dir", tmp / "model", *TRAINING)
    return words, "oblong: the images are 16x8; give --resolution"


@case
def empty_folder(world, tmp):
    (tmp / "empty").mkdir()
    return attribute_with(world, tmp, images=tmp / "empty"), r"empty: the folder is empty; accepted are .*\.png"


@case
def no_folder(world, tmp):
    return attribute_with(world, tmp, queries=tmp / "nowhere"), "nowhere: no such folder; give a folder of images"


@case
def wrong_metadata_key(world, tmp):
    images = world.copy("images", tmp)
    table = images / "metadata.jsonl"
    table.write_text(table.read_text().replace("file_name", "filename"))
    says = r"metadata\.jsonl: line 1 has no `file_name`.*rename the key 'filename'"
    return attribute_with(world, tmp, images=images), says


@case
def unknown_method(world, tmp):
    return world.attribute(tmp, "--method", "drtak"), "unknown method 'drtak'; did you mean d_trak"


@case
def unknown_command(world, tmp):
    return ("atribute",), "No such command 'atribute'. Did you mean 'attribute'"


@case
def unknown_option(world, tmp):
    return world.attribute(tmp, "--batchsize", 3), "No such option: --batchsize.*--batch_size"


@case
def missing_option(world, tmp):
    return ("attribute", world.model), "Missing option '--train_data_dir'"


@case
def number_that_is_none(world, tmp):
    return world.attribute(tmp, "--batch_size", "many"), "Invalid value for '--batch_size'.*integer"


@case
def unknown_setting(world, tmp):
    says = "no setting 'dampening': das takes output, draws, dim, damping"
    return world.attribute(tmp, "--set", "dampening=1"), says


@case
def setting_without_value(world, tmp):
    return world.attribute(tmp, "--set", "count"), "--set 'count'; accepted: name=value"


@case
def setting_of_another_kind(world, tmp):
    words = world.attribute(tmp, "--method", "output_dot", "--set", "count=few")
    return words, "--set count=few; accepted: a whole number, like count=4"


@case
def setting_with_an_option(world, tmp):
    return world.attribute(tmp, "--set", "damping=1"), "damping has an option of its own; accepted: --damping"


@case
def no_probes(world, tmp):
    return world.attribute(tmp, "--method", "output_dot", "--set", "count=0"), "count is 0; at least 1"


@case
def no_damping(world, tmp):
    return world.attribute(tmp, "--damping", 0), "damping 0.0: it must be above 0"


@case
def unknown_output(world, tmp):
    return world.attribute(tmp, "--output", "los"), "unknown output 'los'; accepted: loss, elbo"


@case
def output_of_classifiers(world, tmp):
    return world.attribute(tmp, "--output", "margin"), "output 'margin' is for a classifier; this model is a denoiser"


@case
def unknown_parameters(world, tmp):
    return world.attribute(tmp, "--parameters", "atention"), "'atention' match none of .*presets: trained, all"


@case
def unknown_device(world, tmp):
    return world.attribute(tmp, "--device", "gpu"), "--device gpu: .*accepted: here cpu"


@case
def captions_of_a_model_without_text(world, tmp):
    return world.attribute(tmp, "--caption_column", "text"), "reads no text; accepted: a model that does"


@case
def a_seed_of_nothing(world, tmp):
    return world.compare(tmp, "--seed", 5), "nothing is drawn by pixel_dot"


@case
def nothing_to_explain(world, tmp):
    return world.about(tmp), "either as --query_data_dir FOLDER or as --generate N"


@case
def explained_twice(world, tmp):
    return world.attribute(tmp, "--generate", 3), "--query_data_dir and --generate exclude each other"


@case
def no_model(world, tmp):
    says = "nothing: no such model folder; accepted: a pipeline folder as save_pretrained writes it"
    return attribute_with(world, tmp, model=tmp / "nothing"), says


@case
def no_scheduler(world, tmp):
    model = world.copy("model", tmp)
    shutil.rmtree(model / "scheduler")
    says = r"model: scheduler/ is missing \(it holds .*unet\); accepted: a pipeline folder"
    return attribute_with(world, tmp, model=model), says


@case
def another_scheduler(world, tmp):
    model = world.copy("model", tmp)
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("DDPMScheduler", "EDMEulerScheduler"))
    says = "scheduler class 'EDMEulerScheduler' is not supported; accepted: DDPMScheduler"
    return attribute_with(world, tmp, model=model), says


@case
def pickles_only(world, tmp):
    model = world.copy("model", tmp)
    (model / "unet/diffusion_pytorch_model.safetensors").rename(model / "unet/diffusion_pytorch_model.bin")
    says = r"unet: only pickles, which whence never opens: diffusion_pytorch_model\.bin; accepted: \*\.safetensors"
    return attribute_with(world, tmp, model=model), says


def with_weights(world: World, tmp: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    model = world.copy("model", tmp)
    path = model / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    return model


@case
def weights_that_are_not_finite(world, tmp):
    model = with_weights(world, tmp, lambda w: w["conv_in.bias"].fill_(float("nan")))
    return attribute_with(
        world, tmp, model=model
    ), "1 weights hold NaN or Inf: conv_in.bias; accepted: .*training diverged"


@case
def drawing_from_weights_that_are_not_finite(world, tmp):
    model = with_weights(world, tmp, lambda w: w["conv_in.bias"].fill_(float("inf")))
    words = ("attribute", model, "--train_data_dir", world.images, "--generate", 2, "--output_dir", tmp / "run")
    return words, "1 weights hold NaN or Inf: conv_in.bias; accepted: .*training diverged"


@case
def weights_of_another_network(world, tmp):
    model = with_weights(world, tmp, lambda w: w.update({"conv_in.bias": torch.zeros(5)}))
    return attribute_with(world, tmp, model=model), "unet: the weights cannot be loaded as UNet2DModel"


@case
def truncated_weights(world, tmp):
    model = world.copy("model", tmp)
    path = model / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return attribute_with(world, tmp, model=model), "unet/.*: truncated or damaged"


@case
def run_folder_of_another_model(world, tmp):
    (tmp / "run").mkdir()
    (tmp / "run/index.json").write_text('{"format_version": 1, "images": 14, "model": "x", "train": "y"}')
    says = r"run belongs to another model or data set \(model: found 'x', expected '\w{8}\.\.\.' in .*\); .*no scores"
    return world.attribute(tmp / "run"), says


@case
def run_folder_of_other_images(world, tmp):
    images = world.copy("images", tmp)
    succeeds(*attribute_with(world, tmp, images=images))
    Image.open(images / "07.png").rotate(90).save(images / "07.png")
    says = r"run belongs to another model or data set \(train: found .*\); choose another output folder"
    return attribute_with(world, tmp, images=images), says


@case
def run_folder_of_a_newer_whence(world, tmp):
    (tmp / "run").mkdir()
    (tmp / "run/index.json").write_text('{"format_version": 99}')
    return world.attribute(tmp / "run"), r"index\.json: written by a newer whence \(format 99\); upgrade to read it"


@case
def attributed_with_captions_that_nobody_reads(world, tmp):
    return world.attribute(
        tmp / "run", "--caption_column", "text"
    ), "--caption_column: .*model reads no text; accepted: "


@case
def previewed_with_captions_that_nobody_reads(world, tmp):
    command = ("preview", world.model, "--train_data_dir", world.images, "--output_dir", tmp / "out")
    return (*command, "--without", "id=00.png", "--caption_column", "text"), "model reads no text; accepted: "


@case
def planned_with_captions_that_nobody_reads(world, tmp):
    command = ("ledger", "plan", tmp / "ledger", "--model", world.model, "--train_data_dir", world.images)
    return (*command, "--caption_column", "text"), "model reads no text; accepted: "


@case
def other_pictures_drawn_before(world, tmp):
    succeeds(*world.about(tmp, "--generate", 2, "--num_inference_steps", 2, "--method", "pixel_dot"))
    words = world.about(tmp, "--generate", 3, "--num_inference_steps", 2)
    return words, r"generated holds other pictures \(count: found 2, expected 3\); choose another output folder"


@case
def damaged_features(world, tmp):
    succeeds(*world.compare(tmp))
    part = tmp / shards(tmp)[0]
    part.write_bytes(part.read_bytes()[:-10])
    says = r"part-00000\.safetensors is damaged .*; delete it and run again"
    return world.compare(tmp), says


@case
def output_folder_that_is_a_file(world, tmp):
    (tmp / "run").write_text("")
    return world.attribute(tmp / "run"), "run.*: Not a directory; a folder is needed there|run.*: File exists; a folder"


@case
def no_checkpoints(world, tmp):
    model = world.copy("model", tmp)
    for path in model.glob("checkpoint-*"):
        shutil.rmtree(path)
    words = (*attribute_with(world, tmp, model=model), "--method", "tracin")
    return words, r"sums over training checkpoints \(checkpoint-N folders\)"


@case
def ensemble_of_another_kind(world, tmp):
    other = world.copy("model", tmp)
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"epsilon"', '"sample"'))
    words = (*attribute_with(world, tmp), "--ensemble", other)
    return words, r"model is not measured like .* \(prediction_type: found 'sample', expected 'epsilon'\)"


@case
def another_recipe_in_a_model_folder(world, tmp):
    model = world.copy("model", tmp)
    words = ("train", "new", "--train_data_dir", world.images, "--output_dir", model, *TRAINING, "--learning_rate", 0.5)
    return (
        words,
        r"checkpoint-6 is from another run \(study.recipe.optimizer.learning_rate: found 0.001, expected 0.5\); use the",
    )


@case
def a_size_that_cannot_be_halved(world, tmp):
    words = ("train", "new", "--train_data_dir", world.images, "--output_dir", tmp / "model", "--resolution", 7)
    return words, "3 levels need a side that can be halved as often; 7 pixels cannot"


@case
def channels_that_are_no_numbers(world, tmp):
    words = (
        "train",
        "new",
        "--train_data_dir",
        world.images,
        "--output_dir",
        tmp / "model",
        "--block_out_channels",
        "a,b",
    )
    return words, "--block_out_channels 'a,b'; accepted: whole numbers separated by commas"


@case
def classes_without_labels(world, tmp):
    words = ("train", "new", "--train_data_dir", world.images, "--output_dir", tmp / "model", "--class_conditional")
    return words, "--class_conditional needs labels: class folders or a `label` column"


@case
def network_of_another_size(world, tmp):
    config = json.loads((world.model / "unet/config.json").read_text())
    (tmp / "config.json").write_text(json.dumps({**config, "sample_size": 16}))
    words = ("train", "new", "--train_data_dir", world.images, "--output_dir", tmp / "model", "--channels", 1)
    words = (*words, "--model_config_name_or_path", tmp / "config.json")
    return words, r"config\.json: sample_size is 16, but the images are 8x8; give --resolution 16"


@case
def unknown_schedule(world, tmp):
    words = (
        "train",
        "new",
        "--train_data_dir",
        world.images,
        "--output_dir",
        tmp / "model",
        "--lr_scheduler",
        "linear",
    )
    return words, "--lr_scheduler 'linear'; accepted: cosine, constant"


@case
def replay_of_a_run(world, tmp):
    succeeds(*world.attribute(tmp / "run", "--method", "trak"))
    return ("replay", tmp / "run"), "run: holds no finished scores; accepted: .*run/scores/trak\n"


@case
def report_of_the_scores_of_a_method(world, tmp):
    succeeds(*world.attribute(tmp / "run", "--method", "trak"))
    return ("report", tmp / "run/scores/trak"), "trak: holds no finished scores; accepted: .*run\n"


@case
def output_in_a_circle_of_links(world, tmp):
    (tmp / "a").symlink_to("b")
    (tmp / "b").symlink_to("a")
    return world.attribute(tmp / "a" / "run"), "a/run.*Too many levels of symbolic links; give another folder"


@case
def report_of_nothing(world, tmp):
    return ("report", tmp), "holds no finished scores; accepted: what `whence attribute"


@pytest.mark.parametrize("name", CASES)
def test_bad_input(world, tmp_path, name):
    """Exit code 2 and one line: what, where, and what would be accepted."""
    arguments, says = CASES[name](world, tmp_path)
    refused(*arguments, says=says)


def test_a_bug_says_so(world, tmp_path, monkeypatch):
    """Exit code 1, the traceback, and a last line that asks for a report."""

    def broken(*given):
        raise RuntimeError("boom")

    monkeypatch.setattr(request, "open_model", broken)
    done = whence(*world.attribute(tmp_path))
    assert done.code == 1
    assert "RuntimeError: boom" in done.err
    assert re.fullmatch(r"whence: this is a bug in whence [\d.]+; please report it .*", done.err.splitlines()[-1])


def test_ctrl_c(world, tmp_path, monkeypatch):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(request, "open_model", stopped)
    done = whence(*world.attribute(tmp_path))
    assert done.code == 130
    assert "stopped; what is finished is kept" in done.err


# ------------------------------------------------------------------------------------------------- nothing is lost


@pytest.mark.parametrize("number", [10, 16])
def test_a_full_disk_keeps_what_is_finished(world, finished, tmp_path, monkeypatch, number):
    """The n-th file cannot be written: an error in one line, and the next run goes on from there to the same bytes."""
    run, real, calls = tmp_path / "run", os.fsync, []

    def full(file: int) -> None:
        calls.append(file)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    words = world.attribute(run, "--budget_mb", 1, "--method", "d_trak", "--method", "trak")
    monkeypatch.setattr(os, "fsync", full)
    refused(*words, says=r"the disk is full: could not write .*; free some space and run again to go on")
    kept = {path: (run / path).stat().st_mtime_ns for path in shards(run)}
    assert kept
    assert not list(run.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", real)
    succeeds(*words)
    assert {path: (run / path).stat().st_mtime_ns for path in kept} == kept
    same_run(run, finished)


@pytest.mark.parametrize("call", ["train", "generate", "report"])
def test_a_full_disk_elsewhere(world, finished, tmp_path, monkeypatch, call):
    words = {
        "train": ("train", "new", "--train_data_dir", world.images, "--output_dir", tmp_path / "model", *TRAINING),
        "generate": world.about(tmp_path / "run", "--generate", 2, "--num_inference_steps", 2),
        "report": ("report", shutil.copytree(finished, world.root / f"full-{call}")),
    }[call]

    def full(*paths: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(paths[-1]))

    monkeypatch.setattr(os, "replace", full)
    refused(*words, says="the disk is full|No space left on device; free some space")


def test_kill_in_the_middle(world, finished, tmp_path):
    """kill -9 once the first shard is there; the next run ends with the bits of one that was never interrupted."""
    run = tmp_path / "run"
    words = world.attribute(run, "--budget_mb", 1, "--batch_size", 2, "--method", "d_trak", "--method", "trak")
    process = fork(words, tmp_path / "log")
    give_up = time.monotonic() + 60
    while not shards(run):
        assert os.waitpid(process.pid, os.WNOHANG) == (0, 0), "ended before its first shard"
        assert time.monotonic() < give_up
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.code == -signal.SIGKILL
    kept = {path: (run / path).stat().st_mtime_ns for path in shards(run)}
    assert 0 < len(kept) < len(shards(finished)), "not in the middle"
    succeeds(*words)
    assert {path: (run / path).stat().st_mtime_ns for path in kept} == kept
    same_run(run, finished)


def same_run(run: Path, other: Path) -> None:
    """Features and scores are equal to the last bit."""
    assert shards(run) == shards(other)
    for path in [*shards(run), *(Path("scores") / name / "scores.safetensors" for name in ("d_trak", "trak"))]:
        assert (run / path).read_bytes() == (other / path).read_bytes(), path


# ---------------------------------------------------------------------------------------------- rows have no company


def features(run: Path) -> Tensor:
    """The rows that d_trak has of the training images, as they lie in the store: those of either half of the draws."""
    halves = {}
    for array in Store(run).arrays():
        part = json.loads((array.folder / "manifest.json").read_text())["key"]["part"]
        if len(array) == IMAGES and part["output"] == "squared_norm":
            halves[part["draws"]["number"]] = array.all()
    return torch.cat([halves[0], halves[1]], dim=1)


def test_images_that_did_not_train_the_model_are_no_silent_answer(world, tmp_path):
    """Some of its own are as wrong as others; new names and another order are not."""
    some = tmp_path / "some"
    shutil.copytree(world.images, some)
    (some / "05.png").unlink()
    noted = some / "metadata.jsonl"
    noted.write_text("".join(line for line in noted.open() if "05.png" not in line))
    how = ("--method", "trak")
    succeeds(
        *attribute_with(world, tmp_path / "a", images=some), *how, warns=f"{world.model} {OTHER_IMAGES} {IMAGES - 1},"
    )
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(world.images.glob("*.png"))):
        shutil.copy(path, renamed / f"{(5 * number) % IMAGES:02d}.png")
    succeeds(*attribute_with(world, tmp_path / "b", images=renamed), *how)


@pytest.mark.parametrize("changed", ["batch size 1", "batch size 7", "batch size 64", "renamed and shuffled"])
def test_scores_do_not_depend_on_company(world, finished, tmp_path, changed):
    """Beside the change in question, all images are in one shard instead of many. Features are equal to the last bit;
    scores pass through float64 sums over shards."""
    images, order = world.images, list(range(IMAGES))
    options: list[object] = ["--budget_mb", 64, "--method", "d_trak"]
    if changed == "renamed and shuffled":
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).tolist()
        images = tmp_path / "images"
        images.mkdir()
        for i, place in enumerate(order):
            shutil.copy(world.images / f"{i:02d}.png", images / f"other-{place:02d}.png")
    else:
        options += ["--batch_size", changed.split()[-1]]
    run = tmp_path / "run"
    succeeds(*attribute_with(world, tmp_path, images=images), *options)
    assert torch.equal(features(run)[order], features(finished))
    expected, found = (load_scores(folder / "scores/d_trak").values for folder in (finished, run))
    difference = float((expected - found[:, order]).abs().max() / expected.abs().max())
    print(f"{changed}: scores {'bit-identical' if difference == 0 else f'differ by {difference:.1e} of the largest'}")
    assert difference <= 1e-9
