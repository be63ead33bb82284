"""A stranger's first day: what newcomers do with the defaults, and what they are told before anything is spent."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from whence.data.images import TensorImages
from whence.data.saving import save_png
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
    succeeds(*words, "--draws", 4, "--dim", 32, "--output_dir", tmp_path / "shell")
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
    assert f"d_trak {found['methods']['d_trak']['lds']:.2f} [" in page
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
