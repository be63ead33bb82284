"""A stranger's first day: what newcomers do with the defaults, and what they are told before anything is spent."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import whence
from errors import refuses
from families import save_whole
from test_cli import TRAINING, noise, refused, succeeds
from test_cli import whence as shell
from test_encode import CAPTIONS, pictures
from test_lora import peft_lora
from whence import doctor
from whence.cli.settings import settings_per_method
from whence.curvature.factors import Factors
from whence.data.images import TensorImages
from whence.data.saving import save_png
from whence.diffusion.draws import uniform
from whence.doctor import machine, trial
from whence.evaluation import ledger
from whence.features import rows
from whence.features.parts import Gradient
from whence.features.rows import FEW, in_time
from whence.methods import METHODS, build, settings_of
from whence.methods.columns import fitted
from whence.methods.registry import spelled
from whence.methods.removal import READERS
from whence.storage.arrays import Store
from whence.storage.scores import load_scores
from whence.training import runs, standing
from whence.training.optimizer import start
from whence.types import Engine, Task
from worlds import trained_task, unet_task


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Stable Diffusion, tiny, a LoRA on it, and pictures with captions."""
    root = tmp_path_factory.mktemp("sd")
    save_whole("sd", root / "sd")
    peft_lora("sd", root / "lora")
    pictures(root / "images", CAPTIONS)
    (root / "prompts.txt").write_text("a red cat\ntwo birds\n")
    return root


# ------------------------------------------------------------------------- columns, and what is refused before it is drawn


def digits() -> tuple[torch.nn.Module, TensorImages, TensorImages]:
    """The classifier of the README: 650 parameters."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    train = whence.tensor_images(torch.rand(20, 1, 8, 8), labels=torch.arange(20) % 10)
    return net, train, whence.tensor_images(torch.rand(3, 1, 8, 8), labels=[3, 1, 4])


@pytest.mark.parametrize("method", ["trak", "gradient_dot", "block_trak", "renormalized_influence", "output_dot"])
def test_the_default_width_takes_a_small_network_as_it_is(method: str, tmp_path: Path) -> None:
    """No more parameters than columns: the exact gradients, which the recipe says; more: the projection."""
    net, *sides = digits()
    model = net, whence.Classifier()
    scores = whence.attribute(model, *sides, method, tmp_path)
    exact = whence.attribute(model, *sides, method, tmp_path, dim=None)
    assert torch.equal(scores.values, exact.values)
    assert scores.recipe["method"] == exact.recipe["method"]
    assert torch.equal(whence.attribute(model, *sides, method, tmp_path, dim=650).values, exact.values)
    narrower = whence.attribute(model, *sides, method, tmp_path, dim=649)
    assert not torch.allclose(narrower.values, exact.values)
    assert "649" in json.dumps(narrower.recipe["method"])


@pytest.mark.parametrize("method", [name for name in METHODS if settings_of(name).get("dim")])
def test_no_method_fails_below_its_columns(method: str, tmp_path: Path) -> None:
    """Of every method that projects by default: no projection is left that has more columns than there are parameters."""
    task = trained_task(tmp_path)
    count = sum(p.numel() for p in task.trajectory[-1].load().parameters())
    made = build(method, task.forward, {"dim": count})
    exact = build(method, task.forward, {"dim": None})
    assert fitted(made, task) == exact
    assert fitted(build(method, task.forward, {"dim": count - 1}), task) != exact


def test_rows_of_a_projection_are_known_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = unet_task(tmp_path)
    first = whence.d_trak(dim=64, draws=2)(task)
    monkeypatch.setattr("whence.methods.columns.prepare", lambda *given: pytest.fail("the network was loaded"))
    assert torch.equal(whence.d_trak(dim=64, draws=2)(task).values, first.values)


def test_the_documented_recipe_of_a_lora(sd: Path, tmp_path: Path) -> None:
    """docs/stable-diffusion.md, with a LoRA of fewer parameters than columns: it is said, and errors are those of draws."""
    words = ("attribute", sd / "sd", "--lora", sd / "lora", "--train_data_dir", sd / "images", "--parameters", "lora")
    drawn = ("--generate", 2, "--prompts", sd / "prompts.txt", "--num_inference_steps", 2, "--draws", 4)
    done = succeeds(*words, *drawn, "--method", "d_trak", "--output_dir", tmp_path)
    (said,) = [line for line in done.out.splitlines() if "exact gradients of" in line]
    count = sum(tensor.numel() for tensor in load_file(sd / "lora" / "adapter_model.safetensors").values())
    assert said == f"d_trak: exact gradients of {count:,} parameters, which are no more than 4,096 columns"
    assert count in {array.width for array in Store(tmp_path).arrays()}
    scores = load_scores(tmp_path / "scores" / "d_trak")
    assert "projection" not in scores.stderr_of
    assert "Identity" in json.dumps(scores.recipe["method"])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "tracin"), "checkpoint-N folders"),
        (("--method", "metagradient"), "trains the model again"),
        (("--method", "ek_fac", "--parameters", "lora"), "match none of"),
        (("--method", "d_trak", "--output", "margin"), "for a classifier"),
        (("--method", "pixel_dot", "--method", "d_trak", "--damping", -1), "damping -1"),
    ],
)
def test_what_is_refused_is_refused_before_anything_is_drawn(more: tuple, says: str, sd: Path, tmp_path: Path) -> None:
    drawn = ("--generate", 2, "--prompts", sd / "prompts.txt", "--output_dir", tmp_path)
    refused("attribute", sd / "sd", "--train_data_dir", sd / "images", *drawn, *more, says=says)
    assert not (tmp_path / "generated").exists()
    assert not (tmp_path / "latents").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"digests.json"}  # what the images are, for the next try


def test_a_training_of_a_lora_is_about_the_lora(sd: Path, tmp_path: Path) -> None:
    """`--parameters lora` says what such methods do; of a model without a LoRA, or of other parameters, it is refused."""
    said = [(parameters, lora) for parameters in ("trained", "lora", "all") for lora in (True, False)]
    for parameters, lora in said:
        asked = (["averaged_metagradient"], {"parameters": parameters}, [], 0, lora)
        if parameters == "trained" or (parameters == "lora" and lora):
            assert "parameters" not in settings_per_method(*asked)["averaged_metagradient"]
        else:
            with refuses("no setting 'parameters'"):
                settings_per_method(*asked)
    words = ("--train_data_dir", sd / "images", "--query_data_dir", sd / "images", "--method", "averaged_metagradient")
    words = (*words, "--parameters", "lora", "--output_dir", tmp_path)
    refused("attribute", sd / "sd", "--lora", sd / "lora", *words, says="trains the model again")  # peft made this one
    refused("attribute", sd / "sd", *words, says="no setting 'parameters'")


def test_the_same_in_python(sd: Path, tmp_path: Path) -> None:
    drawn = whence.Sampling(2, 0, 2, ("a red cat", "two birds"))
    for settings, what in (({"draw": 3}, "no setting"), ({"output": "margin"}, "classifier")):
        with refuses(what):
            whence.attribute(sd / "sd", sd / "images", drawn, "d_trak", tmp_path, **settings)
    assert not (tmp_path / "generated").exists()


# ------------------------------------------------------------------------------------ one folder, from Python and the shell


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of `whence train`, its images and pictures; and a ledger of it, trained and measured."""
    root = tmp_path_factory.mktemp("mine")
    creators = [{"creator": "anna" if i % 3 else "ben"} for i in range(12)]
    save_png(root / "images", noise(12, 0), [f"{i:02d}" for i in range(12)], creators)
    save_png(root / "queries", noise(3, 1), [f"q{i}" for i in range(3)])
    data = ("--train_data_dir", root / "images")
    succeeds("train", "new", *data, "--output_dir", root / "model", *TRAINING)
    done = succeeds("ledger", "plan", root / "ledger", "--model", root / "model", *data, "--test", 4, "--stack", 8)
    assert "10 trainings of 6 steps" in done.out  # 4 subsets and all images, twice: nothing that no command would use
    succeeds("ledger", "run", root / "ledger", *data)
    succeeds("ledger", "measure", root / "ledger", *data, "--query_data_dir", root / "queries")
    return root


def test_scores_of_python_are_those_of_the_shell(mine: Path, tmp_path: Path) -> None:
    """`whence.attribute(root=...)` and then report, replay and lds on its folder."""
    sides = mine / "model", mine / "images", mine / "queries"
    scores = whence.attribute(*sides, method="D-TRAK", root=tmp_path, draws=4, dim=32)
    words = ("attribute", mine / "model", "--train_data_dir", mine / "images", "--query_data_dir", mine / "queries")
    succeeds(*words, "--method", "d_trak", "--draws", 4, "--dim", 32, "--output_dir", tmp_path / "shell")
    there = load_scores(tmp_path / "scores" / "d_trak")
    assert torch.equal(there.values, scores.values)
    assert torch.equal(load_scores(tmp_path / "shell" / "scores" / "d_trak").values, scores.values)
    assert "identical" in succeeds("replay", tmp_path / "scores" / "d_trak").out
    succeeds("report", tmp_path)
    assert f"{mine / 'images'}" in (tmp_path / "report.html").read_text()


def test_how_sure_stands_beside_what_it_judges(mine: Path, tmp_path: Path) -> None:
    """The LDS is kept in the run folder and is on its page, until the scores are others."""
    about = (mine / "model", mine / "images", mine / "queries")
    whence.attribute(*about, "d_trak", tmp_path, draws=4, dim=32)
    whence.attribute(*about, "pixel_dot", tmp_path)
    data = ("--train_data_dir", mine / "images")
    told = succeeds("lds", tmp_path, "--ledger", mine / "ledger", *data, warns="4 test subsets say little").out
    found = json.loads((tmp_path / "lds.json").read_text())
    assert found["methods"].keys() == {"d_trak", "pixel_dot"}
    assert f"{found['methods']['d_trak']['lds']:.3f}" in told
    succeeds("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "Judged by retraining" in page
    assert f"d_trak {found['methods']['d_trak']['centre']:.2f} [" in page
    assert "4 retrained subsets" in page
    whence.attribute(*about, "d_trak", tmp_path, draws=6, dim=32)
    succeeds("report", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "LDS pixel_dot" in page
    assert "LDS d_trak" not in page
    succeeds("verify", tmp_path)


def test_how_far_a_ledger_is_is_said_in_words(mine: Path) -> None:
    words = ("ledger", "status", mine / "ledger", "--train_data_dir", mine / "images")
    told = succeeds(*words).out
    assert "test: 8 done" in told
    assert "10 of 10 trainings are done\nnext: whence ledger measure" in told
    assert json.loads(succeeds(*words, "--json").out)["test"] == {"done": 8, "failed": 0, "missing": 0}


@pytest.mark.parametrize("name", ["D-TRAK", "d-trak", "D_Trak", "DTRAK", "d trak", "d_trak"])
def test_methods_are_understood_as_papers_write_them(name: str) -> None:
    assert spelled(name) == "d_trak"


def test_every_name_is_understood_and_no_other_is_made_of_it(mine: Path, tmp_path: Path) -> None:
    names = [*METHODS, *READERS]
    assert [spelled(name.replace("_", "-").upper()) for name in names] == names
    assert spelled("EK-FAC ensemble") == "ek_fac_ensemble"
    assert spelled("mine:D_Trak") == "mine:D_Trak"
    assert spelled("nonesuch") == "nonesuch"
    words = ("attribute", mine / "model", "--train_data_dir", mine / "images", "--query_data_dir", mine / "queries")
    succeeds(*words, "--method", "Pixel-Dot", "--method", "pixel_cosine", "--output_dir", tmp_path)
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"pixel_dot", "pixel_cosine"}
    refused(*words, "--method", "shapely", says="unknown method 'shapely'; `whence methods` lists all")
    refused("bench", "digits", "--methods", "wrong", "--output_dir", tmp_path / "b", says="unknown method 'wrong'")
    follow = ("counterfactual", "digits", "--bench_dir", tmp_path / "b", "--output_dir", tmp_path / "c")
    refused(*follow, "--methods", "wrong", says="wrong/generated holds no finished scores|wrong.generated: holds no")
    assert not (tmp_path / "b").exists()  # nothing was trained
    assert not (tmp_path / "c").exists()


# --------------------------------------------------------------------------------------------------------- nothing is lost


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty seconds have passed after every step."""
    monkeypatch.setattr(standing, "EVERY", 0.0)
    monkeypatch.setattr(standing, "SHARE", 0)


def stopped_after(monkeypatch: pytest.MonkeyPatch, where: object, name: str, steps: int) -> list[int]:
    """Ctrl-C after so many steps of a training; the list has the number of each step that was begun."""
    real, begun = getattr(where, name), []

    def run(*given: Any, **named: Any) -> Iterator[Any]:
        for state, loss in real(*given, **named):
            begun.append(state.step)
            yield state, loss
            if len(begun) == steps:
                raise KeyboardInterrupt

    monkeypatch.setattr(where, name, run)
    return begun


def test_ctrl_c_in_a_training(mine: Path, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two checkpoints: the same command goes on where it stood, to the same bits, and leaves nothing besides."""
    words = ("train", "new", "--train_data_dir", mine / "images", "--output_dir", tmp_path / "model", *TRAINING)
    words = (*words, "--checkpointing_steps", 6)
    with monkeypatch.context() as patch:
        stopped_after(patch, runs, "steps", 4)
        assert shell(*words).code == 130
    assert not list((tmp_path / "model").glob("checkpoint-*"))
    begun = stopped_after(monkeypatch, runs, "steps", 100)
    succeeds(*words)
    assert begun == [5, 6]
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "model" / weights).read_bytes() == (mine / "model" / weights).read_bytes()
    assert not list((tmp_path / "model").glob("standing*"))


@pytest.mark.parametrize("stack", [1, 8])
def test_ctrl_c_in_a_ledger(
    stack: int, mine: Path, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, root = ("--train_data_dir", mine / "images"), tmp_path / "ledger"
    succeeds("ledger", "plan", root, "--model", mine / "model", *data, "--test", 2, "--seeds", 1, "--stack", stack)
    shutil.copytree(root, tmp_path / "whole")
    succeeds("ledger", "run", tmp_path / "whole", *data, "--workers", 1)
    name = "steps" if stack == 1 else "stacked_steps"
    with monkeypatch.context() as patch:
        stopped_after(patch, ledger, name, 4)
        assert shell("ledger", "run", root, *data, "--workers", 1).code == 130
    assert not list(root.glob("units/*/DONE.json"))
    assert list(root.glob("standing/*"))
    succeeds("ledger", "verify", root, *data)
    begun = stopped_after(monkeypatch, ledger, name, 100)
    succeeds("ledger", "run", root, *data, "--workers", 1)
    assert begun[:2] == [5, 6]
    assert not list(root.glob("standing/*"))
    models = sorted(path.relative_to(root) for path in root.glob("units/*/model.safetensors"))
    assert len(models) == 3
    assert all((root / path).read_bytes() == (tmp_path / "whole" / path).read_bytes() for path in models)


def test_a_training_of_other_images_does_not_go_on_from_there(mine: Path, tmp_path: Path, often: None) -> None:
    state, other = start(torch.nn.Linear(2, 2)), standing.Standing(tmp_path, "standing", {"images": "b"})
    kept = standing.Standing(tmp_path, "standing", {"images": "a"})
    assert [one.step for one, _ in kept.kept(iter([(replace(state, step=3), 0.0)]), 5)] == [3]
    assert kept.state().step == 3
    assert other.state() is None
    damaged = bytearray(kept.path.read_bytes())
    damaged[-1] ^= 1
    kept.path.write_bytes(damaged)
    with refuses(str(kept.path)):
        standing.Standing(tmp_path, "standing", {"images": "a"}).state()


def test_a_training_shows_its_loss(mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHENCE_QUIET", "0")
    words = ("train", "new", "--train_data_dir", mine / "images", "--output_dir", tmp_path / "model", *TRAINING)
    assert re.search(r"training: 100%.*6/6.*loss \d", shell(*words).err)


@pytest.mark.parametrize(
    ("n", "held", "seconds", "shard"),
    [(300, 0, 0.001, 64), (300, 0, 0.13, 64), (300, 0, 0.6, 33), (300, 0, 50, 1), (4, 0, 9, 64), (4, 2**22, 9, 1)],
)
def test_a_shard_takes_twenty_seconds_at_most(n: int, held: int, seconds: float, shard: int) -> None:
    """300 images of 0.13 s, as in the issue, are five shards; slower ones more."""
    found = in_time(64, n, held, lambda: seconds)
    assert found == shard
    assert n < FEW or found * seconds <= 20 or found == 1


def test_the_first_measurement_alone_divides_nothing() -> None:
    """A warm-up may take long."""
    times = iter([3.0, 0.01])
    assert in_time(64, 300, 0, lambda: next(times)) == 64


def test_slow_images_are_kept_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for whoever stops a run of slow images, and starts it again: to the same bits."""
    whole = whence.gradient_dot(dim=8, draws=4)(unet_task(tmp_path / "whole", n=9))
    monkeypatch.setattr(rows, "SECONDS", 0.0)
    task = unet_task(tmp_path / "slow", n=9)
    computed, real = [], Gradient.compute

    def compute(self: Gradient, *given: Any) -> torch.Tensor:
        computed.append(given[3])
        if len(computed) == 6:
            raise KeyboardInterrupt
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Gradient, "compute", compute)
        with pytest.raises(KeyboardInterrupt):
            whence.gradient_dot(dim=8, draws=4)(task)
    kept = list((tmp_path / "slow").glob("features/*/part-*.safetensors"))
    assert len(kept) == 3  # of six images computed, two were to see how long they take, and one was not finished
    assert torch.equal(whence.gradient_dot(dim=8, draws=4)(task).values, whole.values)


# ------------------------------------------------------------------------------------------------- what a run will cost


def test_costs_are_carried_on_in_a_line() -> None:
    """f = 2 + 3 n + 5 m + 7 n m, in each of what is measured; memory up to where images are read in shards."""

    def cost(n: int, m: int) -> trial.Point:
        f = 2 + 3 * n + 5 * m + 7 * n * m
        return trial.Point(f, 10 * f, 100 * f)

    for n, m in ((300, 16), (5, 1), (1, 1), (40, 2)):
        at, few = trial.two(trial.IMAGES, n), trial.two(trial.QUERIES, m)
        found = trial.carried_on(cost, at, few, (n, m), min(n, 64))
        whole, held = cost(n, m), cost(min(n, 64), m)
        assert (found.seconds, found.disk, found.memory) == pytest.approx((whole.seconds, whole.disk, held.memory))


@pytest.mark.parametrize("method", ["ek_fac", "datainf", "pixel_cosine"])
def test_the_doctor_invents_no_system(method: str, mine: Path, tmp_path: Path) -> None:
    """EK-FAC takes no p x p matrix: memory is that of the program and a little, disk what is written."""
    inputs = doctor.Inputs(mine / "model", mine / "images", mine / "queries", tmp_path / "run")
    cost = doctor.predict(doctor.plan(inputs), {method: SETTINGS.get(method, {})})
    assert not cost.findings
    assert cost.seconds > 0
    machine.forget_peak(Engine())
    task = doctor.plan(inputs)
    build(method, task.forward, SETTINGS.get(method, {}))(task)
    taken = machine.peak(Engine())[0]
    assert taken / 1.5 < cost.memory < 1.5 * taken
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    assert written / 1.5 < cost.features < 1.5 * written
    assert not list(tmp_path.glob(".whence-doctor*"))


SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"draws": uniform(2)} for name in ("datainf",)},
    **{name: {"draws": uniform(2), "factors": Factors(draws=uniform(2), skip_others=True)} for name in ("ek_fac",)},
}


@pytest.mark.parametrize("method", ["metagradient", "averaged_metagradient", "further_training"])
def test_trainings_are_predicted(method: str, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many times as there are masks, and for all steps: counted by what is run."""
    ran: list[tuple[int, int]] = []

    def run(chosen: Any, task: Task, queries: int) -> trial.Point:
        steps = task.study.recipe.steps if task.study is not None and method != "further_training" else chosen.steps
        ran.append((steps, queries))
        return trial.Point(steps * queries, 0, 0)

    monkeypatch.setattr(trial, "once", run)
    monkeypatch.setattr(trial, "STEPS", (1, 3))
    task = doctor.plan(doctor.Inputs(mine / "model", mine / "images", mine / "queries", tmp_path / "run"))
    cost = doctor.predict(task, {method: {}})
    assert not cost.findings
    assert set(ran) == {(1, 1), (1, 2), (3, 1), (3, 2)}
    expected = {"metagradient": 6 * 3, "averaged_metagradient": 6 * 3 * 6, "further_training": 200 * 3 * 2}
    assert cost.seconds == expected[method]


# ------------------------------------------------------------------------------------------------------ handed over as it is


NET, CLASSIFIER = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)), whence.Classifier()
X = whence.tensor_images(torch.rand(6, 1, 2, 2), labels=[0, 1, 2] * 2)


@pytest.mark.parametrize(
    ("call", "where", "accepted"),
    [
        (lambda at: whence.attribute((NET, None), X, X, "trak", at), "model", "then how it is measured"),
        (lambda at: whence.attribute((NET, lambda net, batch: net), X, X, "trak", at), "model", "(module, forward)"),
        (lambda at: whence.task_from_module(CLASSIFIER, NET, X, X, at), "model", "(module, forward)"),
        (lambda at: whence.task_from_pretrained(NET, "a", "b", at), "model", "whence.task_from_module"),
        (lambda at: whence.attribute((NET, CLASSIFIER), X, X, "trak", at, engine="cuda"), "engine", "whence.Engine"),
        (lambda at: whence.attribute((NET, CLASSIFIER), X, X, "trak", None), "root", "a run folder"),
        (lambda at: whence.attribute((NET, CLASSIFIER), X, X, "trak", at, errors="no"), "errors", "True or False"),
        (lambda at: whence.attribute((NET, CLASSIFIER), X, X, "trak", at, draws="80"), "setting", "how many, or draws"),
        (lambda at: whence.attribute((NET, CLASSIFIER), X, X, "trak", at, output=abs), "setting", "the name of one"),
        (lambda at: whence.attribute((NET, CLASSIFIER), X, X, ["trak", "d_trak"], at), "method", "its name"),
        (lambda at: whence.tensor_images(torch.rand(2, 1, 2, 2), meta=["anna", "ben"]), "meta", "columns by name"),
        (lambda at: whence.tensor_images(torch.rand(2, 1, 2, 2), labels=["cat", "dog"]), "labels", "class indices"),
        (lambda at: whence.trak()(NET), "task", "whence.task_from_module"),
        (lambda at: whence.trak().grid(whence.task_from_module(NET, CLASSIFIER, X, X, at), 0.1), "dampings", "a list"),
        (lambda at: whence.self_influence("trak", None), "method", "and not its name"),
        (lambda at: whence.save_scores(SCORES, at), "scores", "save_scores(folder, scores)"),
        (lambda at: whence.image_folder(3), "folder", "a folder of pictures"),
        (lambda at: whence.near_copies("a", "b"), "train", "whence.image_folder"),
        (lambda at: whence.uniform("10"), "count", "like 10"),
        (lambda at: SCORES.top(0.5), "query", "a name of query_ids"),
        (lambda at: SCORES.top(None), "query", "a name of query_ids"),
        (lambda at: SCORES.top(0, "3"), "k", "1 or more"),
        (lambda at: SCORES.top(0, 2.5), "k", "1 or more"),
        (lambda at: SCORES.plot(9), "scores", "0 to 0"),
        (lambda at: SCORES.ranks_between("a", [9]), "images", "0 to 1"),
    ],
)
def test_what_stands_in_the_wrong_place_is_told_in_a_line(call: Any, where: str, accepted: str, tmp_path: Path) -> None:
    with refuses(where=where, accepted=accepted):
        call(tmp_path / "run")


SCORES = whence.Scores(torch.rand(1, 2), ["a"], ["x", "y"], {}, stderr=torch.rand(1, 2))


def test_what_is_right_stays_right(tmp_path: Path) -> None:
    assert SCORES.top("a", 1) == SCORES.top(0, 1) == SCORES.top(np.int64(0), np.int64(1))
    assert SCORES.ranks_between("a", [1]) == SCORES.ranks_between(0, [1])
    SCORES.to_csv(tmp_path / "new" / "scores.csv")
    assert len((tmp_path / "new" / "scores.csv").read_text().splitlines()) == 3
    assert len(repr(SCORES)) < 200
    assert whence.attribute((NET, CLASSIFIER), X, X, "trak", tmp_path / "run", draws=80).values.shape == (6, 6)


# ------------------------------------------------------------------------------------------------------ what is handed out


def test_the_source_distribution_tests_itself(tmp_path: Path) -> None:
    """Everything in tests/ that git knows, and the pages and scripts that tests run."""
    root = Path(__file__).resolve().parent.parent
    copy = tmp_path / "whence"
    names = ("src", "tests", "docs", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "Makefile")
    for name in (*names, "constraints.txt"):
        place = copy / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (root / name).is_dir():
            shutil.copytree(root / name, place, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "shipped"))
        else:
            shutil.copy(root / name, place)
    make = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", make], cwd=copy, capture_output=True, text=True, check=True)
    with tarfile.open(copy / "dist" / done.stdout.split()[-1]) as archive:
        there = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    wanted = {
        path.relative_to(copy) for part in ("tests", "docs") for path in (copy / part).rglob("*") if path.is_file()
    }
    assert wanted <= there
    assert {Path("tests/conftest.py"), Path("tests/worlds.py"), Path("Makefile"), Path("constraints.txt")} <= there
