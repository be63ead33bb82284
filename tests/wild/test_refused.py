"""What is refused leaves a folder as it was: free for another model; and a refusal that is sure comes before all work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import refuses
from forks import contents
from test_cli import SMALL, TRAINING, World, refused, succeeds, whence
from whence import Classifier, Denoiser, Recipe, Sampling, Scores, attribute, tensor_images, uniform
from whence.diffusion.forward import linear_schedule
from whence.evaluation import calibrate
from whence.methods import METHODS
from whence.storage.owned import MANIFEST
from whence.task import reports
from whence.training.recipe import New

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
    count = 3 if name == "montrage_style" else 4  # its rule names three steps
    given = ("--draws", count) if "draws" in METHODS[name].make.__annotations__ else ()
    call = (*plain.about(tmp_path), "--query_data_dir", plain.queries, *given)
    refused(*call, "--method", "pixel_dot", "--method", name, says="checkpoint|trained|sampled")
    assert computed(tmp_path) == []
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if {"encoder", "student"} & {*entry.needs}])
def test_a_folder_that_a_method_needs_is_asked_before_another_computes(name, plain, tmp_path):
    call = (*plain.about(tmp_path), "--query_data_dir", plain.queries)
    refused(*call, "--method", "pixel_dot", "--method", name, says=f"{name} needs a folder, and none is given")
    assert computed(tmp_path) == []
    assert not (tmp_path / "copies.json").exists()


LATE = {  # refused only once the run folder is there
    "an output that this model lacks": ("--method", "trak", "--output", "margin", "--draws", 2, "--dim", 32),
    "parameters that match nothing": ("--method", "trak", "--parameters", "nosuchlayer", "--draws", 2, "--dim", 32),
}


@pytest.mark.parametrize("case", LATE)
@pytest.mark.parametrize("index", [False, True])
def test_a_refused_run_leaves_the_folder_to_another_model(case, index, small, tmp_path):
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
    monkeypatch.setattr(calibrate, "calibrate", lambda study, images, *how: {1: 1.0, 8: 0.5})
    succeeds(*call, "--test", 4, "--tune", 0)
    monkeypatch.setattr(calibrate, "calibrate", lambda study, images, *how: {1: 0.5, 8: 1.0})
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


AMONG = {  # where the results of a command would lie, beside or among its images
    "attribute": lambda w, to: w.compare(to),
    "index": lambda w, to: w.compare(w.root / "nowhere", "--index_dir", to),
    "train": lambda w, to: ("train", "new", "--train_data_dir", w.images, "--output_dir", to, *TRAINING),
    "ledger": lambda w, to: ("ledger", "plan", to, "--model", w.model, "--train_data_dir", w.images, "--stack", 1),
}


READ_BY = {"images": AMONG, "queries": ("attribute", "index")}


@pytest.mark.parametrize("inside", ["", "/run"])
@pytest.mark.parametrize(("verb", "read"), [(verb, read) for read, verbs in READ_BY.items() for verb in verbs])
def test_results_never_lie_among_the_images(verb, read, inside, small):
    """They would be read as images the next time."""
    place = read + inside
    before = sorted(small.root.rglob("*"))
    call = AMONG[verb](small, small.root / place)
    refused(*call, says=f"^whence: .*{place}: (is|lies in) the folder of the images .*; accepted: another folder for")
    assert sorted(small.root.rglob("*")) == before
    beside = small.root / f"{read}2"
    assert "of the images" not in whence(*AMONG[verb](small, beside)).err, "a folder whose name begins alike"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(small.root / "nowhere", ignore_errors=True)


NUMBERS = {  # that no parser refuses, and what is said of them
    "no resolution": (("--resolution", 0), "resolution=0; a positive number"),
    "a resolution below zero": (("--resolution", -8), "resolution=-8; a positive number"),
    "a seed of 65 bits": (("--seed", 2**63), f"{2**63} is no whole number of 64 bits; accepted: -"),
    "a LoRA that is not there": (("--parameters", "lora"), "match none .*; a LoRA is given with --lora"),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_numbers_out_of_range(case, small, tmp_path):
    options, says = NUMBERS[case]
    about = (*small.about(tmp_path / "run"), "--query_data_dir", small.queries, "--method", "trak", "--draws", 2)
    refused(*about, *options, says=says)
    assert not (tmp_path / "run" / MANIFEST).exists()


def test_more_steps_of_the_sampler_than_there_are(small, tmp_path):
    drawn = (*small.about(tmp_path / "run"), "--generate", 2, "--method", "pixel_dot", "--num_inference_steps")
    refused(
        *drawn, 1001, says=r"1001 steps of the sampler .* 1000 timesteps; accepted: 1 to 1000; or draw with diffusers"
    )
    assert not (tmp_path / "run").exists()
    with refuses(where="sampling"):
        Sampling(2, steps=0)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_seeds_of_more_than_64_bits(seed):
    for made in (lambda: uniform(2, seed), lambda: Sampling(1, seed), lambda: Recipe(New({}), seed=seed)):
        with refuses("no whole number of 64 bits", "seed", "-9223372036854775808 to 9223372036854775807"):
            made()


def test_scores_of_other_pictures_are_left_out_of_the_page_and_told(small, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(small.queries / "q0.png", one)
    run, said = tmp_path / "run", "the scores of gradient_dot, pixel_dot are of other images than .* not on the page"
    succeeds(*small.compare(run, "--method", "gradient_dot", "--draws", 2, "--dim", 16))
    kept = contents(run)
    about = small.about(run, "--method", "pixel_dot", "--query_data_dir")
    refused(*about, one, says="pixel_dot: holds the scores of other pictures")
    with refuses("holds the scores of other pictures (", accepted="another run folder"):
        attribute(small.model, small.images, one, "pixel_dot", run)
    assert contents(run) == kept
    succeeds(*small.about(run, "--method", "pixel_cosine", "--query_data_dir"), one, warns=said)
    for _ in range(2):  # from the run, and from the page again
        assert "gradient_dot" not in (run / "report.html").read_text()
        succeeds("report", run, warns=said)
    refused("credit", run, says="pixel_cosine are of other pictures than those of gradient_dot, pixel_dot")
    succeeds("report", run, "--query_data_dir", small.queries, warns="the scores of pixel_cosine are of other images")
    assert "gradient_dot" in (run / "report.html").read_text()
    refused("report", run, "--query_data_dir", small.images, says="holds other images than .* was computed for")


SCHEDULES = {
    "betas": (torch.linspace(1e-4, 0.02, 10), "does not fall (from 0.0001 to 0.02)"),
    "the other way round": (torch.linspace(0.01, 0.99, 10), "does not fall"),
    "the same everywhere": (torch.full((5,), 0.5), "does not fall"),
    "above 1": (torch.linspace(5, 1.5, 10), "numbers from 1.5 to 5"),
    "not numbers": (torch.full((5,), torch.nan), "numbers from nan"),
    "a list": ([0.9, 0.5], "a list"),
    "empty": (torch.tensor([]), "a Tensor of shape [0]"),
    "a table": (torch.linspace(0.9, 0.1, 4).reshape(2, 2), "a Tensor of shape [2, 2]"),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_what_is_no_schedule(case):
    given, told = SCHEDULES[case]
    with refuses(told, "alphas_cumprod", "torch.cumprod(1 - betas, 0)"):
        Denoiser(given)


def test_what_is_a_schedule():
    for given in (
        torch.tensor([0.5]),
        torch.tensor([0.9, 0.0]),
        linear_schedule(10).float(),
        linear_schedule(1000).half(),
    ):
        assert Denoiser(given).timesteps == len(given)


def test_quantised_weights_in_a_file(small, tmp_path):
    """Read as they are, they would be the weights of another network."""
    shutil.copytree(small.model, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    first = next(name for name, value in weights.items() if value.ndim > 1)
    save_file(weights | {first: weights[first].mul(100).to(torch.int8)}, path)
    about = (tmp_path / "model", "--train_data_dir", small.images, "--query_data_dir", small.queries)
    told = f"1 weights are whole numbers of 8 bits, quantised: {re.escape(first)}; accepted: the weights as floating"
    refused("attribute", *about, "--output_dir", tmp_path / "run", *SMALL, says=told)
    assert re.search(f"error: .*{told[:40]}", whence("doctor", *about).out)


class Packed(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


class Stateful(torch.nn.Linear):
    """As the layers of torch.ao.nn.quantized, whose state holds what is no tensor."""

    def get_extra_state(self) -> object:
        return (1.0, torch.qint8)

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize("module", [Packed(torch.ones(3, dtype=torch.int8)), Stateful(2, 2)])
def test_quantised_networks_in_memory(module, tmp_path):
    with refuses("holds no floating point numbers: it is quantised", "module"):
        attribute((module, Classifier()), torch.rand(3, 2), torch.rand(1, 2), root=tmp_path)


def test_where_a_folder_is_needed_there_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    images = tensor_images(torch.rand(4, 6), labels=[0, 1, 0, 1])
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with refuses("file"):
            attribute((torch.nn.Linear(6, 2), Classifier()), images, images, "trak", root, dim=None)


@pytest.mark.parametrize(
    ("given", "told"),
    [((Classifier(), torch.nn.Linear(2, 2)), "(Classifier, Linear)"),
     ((torch.nn.Linear(2, 2), Classifier), "(Linear, Classifier, the class itself)")],
)  # fmt: skip
def test_a_network_and_how_it_is_measured_in_this_order(given, told, tmp_path):
    with refuses(told, "model", "the network first"):
        attribute(given, torch.rand(3, 2), torch.rand(1, 2), root=tmp_path)


def test_a_number_of_images_below_one(tmp_path):
    scores = Scores(torch.eye(3), ["a", "b", "c"], ["x", "y", "z"], {})
    for asked in (lambda k: scores.top(0, k), lambda k: scores.bottom(0, k), lambda k: scores.to_csv(tmp_path / "s.csv", k),
                  lambda k: scores.to_parquet(tmp_path / "s.parquet", k)):  # fmt: skip
        for k in (0, -1):
            with refuses(f"k is {k}", accepted="1 or more"):
                asked(k)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", ["train", "queries"])
def test_bytes_on_one_side_and_fractions_on_the_other(first, tmp_path):
    """A network takes the numbers that it was trained on, so that one of the two is not what it is asked about."""
    x, labels = torch.rand(4, 1, 4, 4), [0, 1, 0, 1]
    sides = [tensor_images(x, labels=labels), tensor_images((x * 255).byte(), labels=labels)]
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 2))
    with refuses("torch.uint8 from", "queries", "numbers of one kind on both sides"):
        attribute((net, Classifier()), *(sides if first == "train" else sides[::-1]), "trak", tmp_path, dim=None)
