"""Names of the hub where a folder is expected: what the cache holds is read, and more is fetched only with --download."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import whence as library
from errors import refuses
from test_cli import SMALL, World, refused, succeeds, whence, world  # noqa: F401
from whence.storage.files import file_digest, read_json
from whence.storage.hub import UNSAFE, cache_folder, located

OLD, NEW = "a" * 40, "b" * 40


def snapshot(cache: Path, name: str, content: Path, commit: str = OLD, kind: str = "model") -> Path:
    """As huggingface_hub keeps it: files as links into blobs/, a branch as a file with the commit."""
    root = cache / f"{kind}s--{name.replace('/', '--')}"
    folder = root / "snapshots" / commit
    for path in filter(Path.is_file, content.rglob("*")):
        blob, link = root / "blobs" / file_digest(path), folder / path.relative_to(content)
        for made in (blob.parent, link.parent, root / "refs"):
            made.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs" / "main").write_text(commit)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, an empty folder to work in, and nobody who answers."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


@pytest.fixture
def asked(monkeypatch) -> list[object]:
    """Every address that anybody tries to reach."""
    found: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        found.append(address)
        raise OSError("no network here")

    def look_up(*words: object, **more: object) -> None:
        found.append(words)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return found


def test_a_run_with_names_is_the_run_with_folders(world, cache, asked, tmp_path):  # noqa: F811
    """Model and images from the cache; the options that are kept name the very commit, so that the run can be replayed."""
    model = snapshot(cache, "google/tiny-ddpm", world.model)
    data = snapshot(cache, "anna/pictures", world.images, NEW, "dataset")
    run = ("--query_data_dir", world.queries, "--method", "d_trak", *SMALL)
    done = whence(
        "attribute", "google/tiny-ddpm", "--train_data_dir", "anna/pictures", *run, "--output_dir", tmp_path / "a"
    )
    assert done.code == 0, done.err
    assert f"whence: MODEL: google/tiny-ddpm of the hub, commit {OLD[:12]}, in {model}" in done.err
    assert f"whence: --train_data_dir: anna/pictures of the hub, commit {NEW[:12]}, in {data}" in done.err
    succeeds("attribute", world.model, "--train_data_dir", world.images, *run, "--output_dir", tmp_path / "b")
    one, two = (library.load_scores(tmp_path / name / "scores" / "d_trak") for name in "ab")
    assert one.values.equal(two.values)
    assert str(model) in (tmp_path / "a" / "config.toml").read_text()
    shutil.rmtree(tmp_path / "a" / "scores")
    done = whence("attribute", "--config", tmp_path / "a" / "config.toml", model, "--train_data_dir", data)
    assert done.code == 0, done.err
    assert asked == []


def test_the_library_takes_names_too(world, cache, asked, tmp_path):  # noqa: F811
    snapshot(cache, "google/tiny", world.model)
    snapshot(cache, "anna/pictures", world.images, NEW, "dataset")
    one = library.attribute("google/tiny", "anna/pictures", world.queries, "pixel_cosine", root=tmp_path / "a")
    two = library.attribute(world.model, world.images, world.queries, "pixel_cosine", root=tmp_path / "b")
    assert one.values.equal(two.values)
    assert asked == []


def test_revisions(world, cache, asked):  # noqa: F811
    old, new = (snapshot(cache, "a/b", world.queries, commit) for commit in (OLD, NEW))
    refs = cache / "models--a--b" / "refs"
    (refs / "v1.0").write_text(f"{OLD}\n")
    (refs / "refs" / "pr").mkdir(parents=True)
    (refs / "refs" / "pr" / "7").write_text(OLD)
    for name, there in {
        "": new,
        "@main": new,
        "@v1.0": old,
        "@refs/pr/7": old,
        f"@{OLD}": old,
        f"@{NEW[:7]}": new,
    }.items():
        assert library.hub_folder(f"a/b{name}") == there, name
    for name in ("@v2", "@aaaaaa", f"@{'c' * 40}", "@refs", "@v1.0/../main"):
        with refuses("does not hold it"):
            library.hub_folder(f"a/b{name}")
    for name in ("a/b@../../x", "a", "a/b/c"):
        with refuses("neither there nor a name of the hub", "hub_folder", "OWNER/NAME@REVISION"):
            library.hub_folder(name)
    assert asked == []


def test_what_is_not_there_is_refused_and_nothing_is_asked(cache, asked):
    """One line that says how; as a model, as a data set, as a LoRA."""
    more = ("--train_data_dir", "anna/pictures", "--generate", 2)
    refused(
        "attribute",
        "google/ddpm-cifar10-32",
        *more,
        says="MODEL: google/ddpm.* does not hold it; accepted: .*--download",
    )
    refused(
        "copies",
        "--train_data_dir",
        "anna/pictures",
        "--query_data_dir",
        "/q",
        says="--train_data_dir: .*data ?set of that",
    )
    with refuses("no such folder", accepted="--download"):
        library.attribute("google/ddpm-cifar10-32", "anna/pictures", "queries", "pixel_cosine")
    assert asked == []
    assert not cache.exists()


def test_no_request_by_a_process_of_its_own(world, cache, tmp_path):  # noqa: F811
    """What is imported on the way asks nobody either: an address looked up ends the process."""
    snapshot(cache, "google/tiny", world.model)
    code = (
        "import socket, sys\n"
        "def no(*a, **k): print('ASKED', a, file=sys.stderr); sys.exit(9)\n"
        "socket.getaddrinfo = socket.socket.connect = no\n"
        "from whence.cli.main import main\n"
        f"sys.argv = ['whence', 'doctor', sys.argv[1], '--output_dir', {str(tmp_path / 'run')!r}]\n"
        "main()\n"
    )
    for name, code_expected in (("google/tiny", 0), ("google/other", 2)):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=False)
        assert done.returncode == code_expected, done.stderr
        assert "ASKED" not in done.stderr


def test_a_folder_of_the_same_name_wins_and_this_is_said(world, cache):  # noqa: F811
    snapshot(cache, "google/tiny", world.queries)
    shutil.copytree(world.model, Path("google/tiny"))
    found = located("google/tiny", where="MODEL")
    assert found.path == Path("google/tiny")
    assert "the folder google/tiny is taken, not google/tiny of the hub" in found.said
    done = whence("doctor", "google/tiny", "--output_dir", "run")
    assert done.code == 0
    assert "the folder google/tiny is taken" in done.err
    with pytest.warns(UserWarning, match="is taken, not google/tiny of the hub"):
        library.task_from_pretrained("google/tiny", world.images, world.queries, "run2")
    shutil.rmtree(cache)
    assert located("google/tiny").said == ""  # most folders are no names of anything


@pytest.mark.parametrize(
    "name", ["/a/b", "a", "a/b/c", "../a/b", "a/..", "a/b*", "https://x/y", "a b/c", "a/b@../x", ""]
)
def test_what_is_no_name_is_a_path(cache, name):
    assert located(name).path == Path(name)


def test_a_cache_that_lies_is_refused(world, cache):  # noqa: F811
    snapshot(cache, "a/b", world.queries)
    (cache / "models--a--b" / "refs" / "main").write_text("../../../../etc")
    with refuses("it holds no commit", "refs/main", "40 hexadecimal digits"):
        located("a/b")


def test_a_lora_of_the_hub(cache, asked, tmp_path):
    """Its folder is found in the cache; what it is, is looked at later."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    there = snapshot(cache, "ben/style-lora", tmp_path / "lora")
    words = ("attribute", "/nowhere", "--train_data_dir", "/t", "--generate", 1, "--lora", "ben/style-lora")
    done = whence(*words)
    assert done.code == 2
    assert f"--lora: ben/style-lora of the hub, commit {OLD[:12]}, in {there}" in done.err
    assert asked == []


def test_with_download_the_client_is_asked_for_files_that_cannot_run(world, cache, monkeypatch):  # noqa: F811
    calls: list[tuple[object, dict[str, object]]] = []

    def fetch(name: str, **more: object) -> str:
        calls.append((name, more))
        return str(snapshot(cache, name, world.model))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    done = whence("doctor", "google/tiny@v2", "--download", "--output_dir", "run")
    assert done.code == 0, done.err
    (call,) = calls
    assert call[0] == "google/tiny"
    assert call[1] == {
        "repo_type": "model",
        "revision": "v2",
        "cache_dir": cache_folder(),
        "ignore_patterns": list(UNSAFE),
    }
    assert {"*.bin", "*.pt", "*.ckpt", "*.pkl", "*.py"} <= set(UNSAFE)
    whence("doctor", "google/tiny", "--download", "--output_dir", "run")
    assert len(calls) == 1  # what the cache holds is not fetched again


def test_a_download_that_fails_is_one_line(cache, asked):
    done = whence("doctor", "google/tiny", "--download", "--output_dir", "run")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert re.search("MODEL: google/tiny@main cannot be fetched", done.err)
    assert asked


def test_the_cache_is_where_the_hubs_own_variables_say(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "y"))
    assert cache_folder() == tmp_path / "y" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "z"))
    assert cache_folder() == tmp_path / "z"


def test_run_folder_notes_the_images_of_the_cache(world, cache, tmp_path):  # noqa: F811
    """So that the page can be made again."""
    snapshot(cache, "anna/pictures", world.images, NEW, "dataset")
    out = tmp_path / "run"
    done = whence("attribute", world.model, "--train_data_dir", "anna/pictures", "--query_data_dir", world.queries,
                  "--method", "pixel_dot", "--output_dir", out)  # fmt: skip
    assert done.code == 0, done.err
    assert NEW in read_json(out / "images.json", dict)["train"]["folder"]
    succeeds("report", out)
