"""Several processes in one folder at once: equal ones end alike, of different ones one goes on, the others are refused."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forks import Fork, at_the_point, contents, empty, fork, stamps
from test_cli import TRAINING, World, refused, succeeds

pytestmark = pytest.mark.slow

FEW = ("--draws", 2, "--dim", 8)
SUBSETS = ("--test", 2, "--tune", 0, "--stack", 2)
COMMANDS = ("train", "attribute", "generate", "preview", "plan")


def words(small: World, what: str, folder: Path) -> tuple[object, ...]:
    data = ("--train_data_dir", small.images)
    return {
        "train": ("train", "new", *data, "--output_dir", folder, *TRAINING),
        "attribute": small.about(folder, "--query_data_dir", small.queries, *FEW, "--budget_mb", 3, "--workers", 1),
        "generate": small.about(folder, "--generate", 2, "--num_inference_steps", 2, "--method", "pixel_dot"),
        "preview": (
            *("preview", small.model, *data, "--output_dir", folder, "--without", "creator=ben"),
            *("--generate", 2, "--num_inference_steps", 2),
        ),
        "plan": ("ledger", "plan", folder, "--model", small.model, *data, *SUBSETS),
    }[what]


@dataclass(frozen=True)
class Place:
    """One folder for all runs, as what they write may tell where it lies, and what each command leaves when left alone."""

    small: World
    folder: Path
    found: dict[tuple[object, ...], dict[str, bytes]] = field(default_factory=dict)

    def words(self, what: str) -> tuple[object, ...]:
        return words(self.small, what, self.folder)

    def whole(self, call: tuple[object, ...]) -> dict[str, bytes]:
        if call not in self.found:
            succeeds(*call)
            self.found[call] = contents(self.folder)
            empty(self.folder)
        return self.found[call]


@pytest.fixture(scope="module")
def begun(small, tmp_path_factory) -> Place:
    return Place(small, tmp_path_factory.mktemp("place") / "run")


@pytest.fixture
def place(begun) -> Place:
    empty(begun.folder)
    return begun


OTHERS: dict[str, tuple[str, tuple[object, ...]]] = {
    "another seed": ("train", ("--seed", 1)),
    "other steps": ("train", ("--max_train_steps", 15)),
    "other pictures drawn": ("generate", ("--seed", 5)),
    "more pictures drawn": ("generate", ("--generate", 3)),
    "a preview without others": ("preview", ("--without", "id=03.png")),
    "a preview of other noise": ("preview", ("--seed", 1)),
    "another plan": ("plan", ("--test", 3)),
    "a plan of other subsets": ("plan", ("--fraction", 0.25)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_of_two_different_runs_one_is_refused(place, tmp_path, name):
    """Whoever comes first (of the two changes of a command, one is begun before it, one after it), nothing of the other is
    in the folder."""
    what, change = OTHERS[name]
    calls = [place.words(what), (*place.words(what), *change)]
    wholes = [place.whole(call) for call in calls]
    first = [*OTHERS].index(name) % 2
    forks = [fork(calls[i], tmp_path / "log" / str(i)) for i in (first, 1 - first)]
    codes = [one.code for one in forks]
    assert sorted(codes) == [0, 2], [one.told for one in forks]
    winner = (first, 1 - first)[codes.index(0)]
    told = forks[codes.index(2)].told.strip().splitlines()
    assert told[-1].startswith("whence: "), told
    assert "Traceback" not in "".join(told)
    assert contents(place.folder) == wholes[winner], "mixed"


@pytest.mark.parametrize("what", COMMANDS)
def test_equal_runs_end_alike(place, tmp_path, what):
    whole = place.whole(place.words(what))
    forks = [fork(place.words(what), tmp_path / "log" / str(i)) for i in range(3)]
    assert [one.code for one in forks] == [0] * 3, [one.told for one in forks]
    assert contents(place.folder) == whole


def test_a_folder_begun_with_other_images_is_refused_before_its_first_checkpoint(small, tmp_path):
    """The same recipe: only the images tell the two trainings apart."""
    folder, other = tmp_path / "model", small.copy("images", tmp_path)
    (other / "00.png").write_bytes((other / "01.png").read_bytes())
    succeeds(*words(small, "train", folder))
    for path in folder.iterdir():
        if path.name != "recipe.toml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    call = ("train", "new", "--train_data_dir", other, "--output_dir", folder, *TRAINING)
    refused(*call, says=r"recipe.toml was begun with other training images; use the same ones or another --output_dir")


# ---------------------------------------------------------------------------------------------------------- full disks


def limited(most: int) -> None:
    """No file may become larger than this: what the disk then says is what it says when it is full, but for the number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


@pytest.mark.parametrize(
    ("what", "most"),
    [
        *((what, 20_000) for what in COMMANDS),
        *((what, 300) for what in ("attribute", "generate", "plan")),
        *((what, 0) for what in ("train", "preview")),
    ],
)
def test_a_disk_that_takes_no_more_is_told_in_one_line(place, what, most):
    """In whatever library it is noticed; with room again the same command ends with the same bytes."""
    call, folder = place.words(what), place.folder
    whole = place.whole(call)
    # The log is a pipe: it must not be limited.
    done = piped(call, most)
    assert done[0] in (0, 2), done
    if done[0] == 2:
        assert [line for line in done[1].splitlines() if "whence: " in line][-1:] == done[1].splitlines()[-1:], done
        assert "Traceback" not in done[1], done[1]
        assert "may not become that large" in done[1] or "File too large" in done[1]
        assert not list(folder.rglob("*.tmp"))
    succeeds(*call)
    assert contents(folder) == whole


def piped(call: tuple[object, ...], most: int) -> tuple[int, str]:
    read, write = os.pipe()

    def before() -> None:
        os.dup2(write, 1)
        os.dup2(write, 2)
        limited(most)

    one = fork(call, Path(os.devnull), before)
    os.close(write)
    with os.fdopen(read) as file:
        told = file.read()
    return one.code, told


@pytest.mark.parametrize(
    ("what", "number"), [*((what, errno.ENOSPC) for what in COMMANDS), ("train", errno.EDQUOT), ("plan", errno.EDQUOT)]
)
def test_a_full_disk_at_any_point_is_told_in_one_line(small, tmp_path, what, number):
    folder = tmp_path / "run"

    def full(name: str) -> None:
        raise OSError(number, os.strerror(number))

    points = tmp_path / "points"
    assert fork(words(small, what, folder), tmp_path / "log", at_the_point(-1, full, points)).code == 0
    count = len(points.read_text().splitlines())
    for point in range(0, count, max(1, count // 3)):
        empty(folder)
        done = fork(words(small, what, folder), tmp_path / "log", at_the_point(point, full))
        assert done.code in (0, 2), done.told  # a copy of what is there already may fail unseen
        assert "Traceback" not in done.told
        if done.code == 2:
            last = done.told.strip().splitlines()[-1]
            assert last.startswith("whence: "), done.told
            assert "disk" in last or os.strerror(number) in last


# ---------------------------------------------------------------------------------------------------- read-only folders


@pytest.mark.parametrize("what", ["attribute", "generate", "preview", "plan", "status"])
def test_what_is_finished_is_left_alone(small, tmp_path, what):
    """Not a file, not a folder is touched: it may lie on a disk that is read-only."""
    folder = tmp_path / "run"
    call = words(small, "plan" if what == "status" else what, folder)
    succeeds(*call)
    before = stamps(folder)
    if what == "status":
        call = ("ledger", "status", folder, "--train_data_dir", small.images)

    def read_only(name: str) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def install() -> None:
        mkdir = os.mkdir
        at_the_point(0, read_only)()
        os.mkdir = lambda path, *mode: mkdir(path, *mode) if os.path.isdir(path) else read_only("mkdir")

    done = fork(call, tmp_path / "log", install)
    assert done.code == 0, done.told
    assert stamps(folder) == before


def test_a_ledger_on_a_read_only_disk_whose_images_moved(small, tmp_path, monkeypatch):
    """The digests that are kept are of other files: they are made again and not kept."""
    folder = tmp_path / "run"
    succeeds(*words(small, "plan", folder))
    images = small.copy("images", tmp_path)
    before = stamps(folder)

    def denied(*paths: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(paths[-1]))

    monkeypatch.setattr(Path, "write_bytes", denied)
    succeeds("ledger", "status", folder, "--train_data_dir", images)
    assert stamps(folder) == before


def test_fork_is_what_it_says(tmp_path):
    done: Fork = fork(("--version",), tmp_path / "log")
    assert done.code == 0
    assert done.told.startswith("whence ")
