"""What is refused leaves a folder as it was: free for another model; and a refusal that is sure comes before all work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from test_cli import TRAINING, World, refused, succeeds, whence
from whence.evaluation import calibrate
from whence.methods import METHODS
from whence.storage.files import MANIFEST
from whence.task import reports

UNMET = [name for name, entry in METHODS.items() if {"checkpoints", "training", "journey"} & {*entry.needs}]


def computed(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/**/*") if path.suffix in (".safetensors", ".png")]


@pytest.fixture(scope="module")
def plain(small: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same model as somebody else hands it on: without checkpoints, without a log."""
    world = World(tmp_path_factory.mktemp("plain"))
    shutil.copytree(small.root, world.root, dirs_exist_ok=True)
    for path in [*world.model.glob("checkpoint-*")]:
        shutil.rmtree(path)
    (world.model / "recipe.toml").unlink()
    (world.model / "whence.json").unlink(missing_ok=True)
    return world


@pytest.mark.parametrize("name", UNMET)
def test_what_a_method_needs_is_asked_before_another_computes(name, plain, tmp_path):
    given = ("--draws", 4) if "draws" in METHODS[name].make.__annotations__ else ()
    call = (*plain.about(tmp_path), "--query_data_dir", plain.queries, *given)
    refused(*call, "--method", "pixel_dot", "--method", name, says="checkpoint|trained|sampled")
    assert computed(tmp_path) == []
    assert not (tmp_path / MANIFEST).exists()


LATE = {  # refused only once the run folder is there
    "a projection wider than the network": ("--method", "trak", "--dim", 10**9, "--draws", 2),
    "an output that this model lacks": ("--method", "trak", "--output", "margin", "--draws", 2, "--dim", 32),
    "parameters that match nothing": ("--method", "trak", "--parameters", "nosuchlayer", "--draws", 2, "--dim", 32),
}


@pytest.mark.parametrize("case", LATE)
@pytest.mark.parametrize("index", [False, True])
def test_a_refused_run_leaves_the_folder_to_another_model(case, index, small, plain, tmp_path):
    """The refused one was about other images: as a run of these the folder is taken all the same."""
    shared = ("--index_dir", tmp_path / "index") if index else ()
    fewer = tmp_path / "fewer"
    shutil.copytree(small.images, fewer)
    sorted(fewer.glob("*.png"))[0].unlink()
    rows = (fewer / "metadata.jsonl").read_text().splitlines()[1:]
    (fewer / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    run = tmp_path / "run"
    other = (
        "attribute",
        small.model,
        "--train_data_dir",
        fewer,
        "--query_data_dir",
        small.queries,
        "--output_dir",
        run,
    )
    done = whence(*other, *LATE[case], *shared)
    assert done.code == 2, done
    succeeds(*small.compare(run, *shared))


def test_what_was_computed_stays_with_its_model(small, tmp_path):
    succeeds(*small.attribute(tmp_path, "--method", "trak"))
    refused(*small.attribute(tmp_path, "--method", "trak", "--method", "journey_trak"), says="sampled")
    assert (tmp_path / MANIFEST).exists()


def nowhere(small: World) -> dict[str, tuple[object, ...]]:
    """Every command that makes a folder, with everything else in order."""
    train = ("--train_data_dir", small.images)
    return {
        "attribute": small.compare(Path("/proc/x")),
        "train": ("train", "new", *train, "--output_dir", "/proc/x", *TRAINING),
        "ledger": ("ledger", "plan", "/proc/x", "--model", small.model, *train, "--stack", 1),
        "preview": ("preview", small.model, "--output_dir", "/proc/x", "--without", "creator=anna", *train),
        "demo": ("demo", "--output_dir", "/proc/x"),
        "index": small.compare(small.root / "nowhere", "--index_dir", "/proc/x"),
    }


@pytest.mark.parametrize("verb", ["attribute", "train", "ledger", "preview", "demo", "index"])
def test_a_folder_that_cannot_be_made(verb, small):
    refused(*nowhere(small)[verb], says="^whence: /proc/x: no folder can be made there; accepted: another folder")


def test_the_same_plan_again_whatever_this_machine_is_fastest_at(small, tmp_path, monkeypatch):
    call = ("ledger", "plan", tmp_path / "ledger", "--model", small.model, "--train_data_dir", small.images)
    monkeypatch.setattr(calibrate, "calibrate", lambda study, images: {1: 1.0, 8: 0.5})
    succeeds(*call, "--test", 4, "--tune", 0)
    monkeypatch.setattr(calibrate, "calibrate", lambda study, images: {1: 0.5, 8: 1.0})
    assert "8 together" in succeeds(*call, "--test", 4, "--tune", 0).out
    refused(*call, "--test", 8, "--tune", 0, says=r"is another plan \(.*8 test.*; asked for are .*16 test")
    refused(*call, "--test", 4, "--tune", 0, "--stack", 1, says=r"is another plan \(stack: found 8, expected 1")


@pytest.mark.parametrize("name", UNMET)
def test_the_doctor_finds_what_a_method_lacks(name, plain, tmp_path):
    about = ("doctor", plain.model, "--train_data_dir", plain.images, "--query_data_dir", plain.queries)
    done = whence(*about, "--output_dir", tmp_path, "--method", name)
    assert done.code == 2, done
    assert re.search("error: .*(checkpoint|trained|sampled)", done.out), done.out


def numpy_asks() -> None:
    np.empty((10**7, 10**7))


def torch_asks() -> None:
    torch.empty(10**15)


def python_asks() -> None:
    raise MemoryError


def a_card_asks() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB")


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (numpy_asks, r"\d+\. TiB"),
        (torch_asks, r"\d{15,} bytes"),
        (python_asks, "nothing is free"),
        (a_card_asks, "2.50 GiB"),
    ],
)
def test_too_little_memory_is_no_bug(ask, told, small, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "check_needs", lambda name, task: ask())
    refused(*small.compare(tmp_path), says=rf"^whence: out of memory \({told} .*; give a smaller --resolution")


def test_an_error_that_speaks_of_nothing_is_a_bug(small, tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "check_needs", lambda name, task: (_ for _ in ()).throw(RuntimeError("sizes differ")))
    assert whence(*small.compare(tmp_path)).code == 1
