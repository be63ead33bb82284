"""Arrays on disk: whole or absent, resumed to the same bytes, and refused where they are not what they say."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import slow_features
import whence
from errors import refuses
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.diffusion.outputs import loss
from whence.features.parts import Encoded, Gradient, Part
from whence.features.projections import Rademacher
from whence.features.rows import rows
from whence.storage.arrays import Rows, Store, tensor_digest, values_digest
from whence.storage.files import (
    FORMAT_VERSION,
    building,
    bytes_digest,
    differences,
    file_digest,
    files_digest,
    read_json,
    write_json,
    writing,
)
from whence.storage.owned import claim
from whence.types import Batch, Checkpoint, Engine, Forward, Task
from worlds import checkpoint, tensors, unet_task

KEY = {"part": "test", "checkpoint": "abc", "images": "def"}
VALUES = torch.arange(40.0).reshape(10, 4)


def array(root: Path, dtype: torch.dtype = torch.float32, per_shard: int = 3) -> Rows:
    return Store(root).array(KEY, (10, 4), dtype, per_shard)


def filled(root: Path, dtype: torch.dtype = torch.float32) -> Rows:
    a = array(root, dtype)
    for shard in a.missing():
        a.write(shard, VALUES[shard])
    return a


def contents(root: Path) -> dict[str, bytes]:
    """Every finished file by its bytes (a killed process may leave one `.tmp`)."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


# ------------------------------------------------------------------------------------------------------------- arrays


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_come_back_as_they_were_written(tmp_path, dtype):
    a = filled(tmp_path, dtype)
    assert torch.equal(a.all(), VALUES.to(dtype))
    assert [shard.stop - shard.start for shard in a.shards] == [3, 3, 3, 1]
    assert len(a) == 10
    assert a.width == 4
    assert a.missing() == []
    a.verify()
    (again,) = Store(tmp_path).arrays()
    assert again == a


def test_rows_are_taken_by_number(tmp_path):
    """In the order asked, across shards, repeated or not; a shard that is missing is told."""
    a = filled(tmp_path)
    for numbers in ([7], [9, 0, 4], [2, 2, 3], []):
        assert torch.equal(a.take(numbers), VALUES[numbers])
    (a.folder / "part-00001.safetensors").unlink()
    assert torch.equal(a.take([0, 9]), VALUES[[0, 9]])
    with refuses("part-00001.safetensors is missing; run the same command again"):
        a.take([0, 4])


def test_an_array_begun_earlier_keeps_its_shards(tmp_path):
    a = filled(tmp_path)
    b = array(tmp_path, per_shard=100)
    assert b.per_shard == 3
    assert b.missing() == []
    assert torch.equal(b.all(), a.all())


def test_other_descriptions_are_other_arrays(tmp_path):
    store = Store(tmp_path)
    every = [
        store.array(KEY, (10, 4), torch.float32, 3),
        store.array({**KEY, "part": "other"}, (10, 4), torch.float32, 3),
        store.array(KEY, (11, 4), torch.float32, 3),
        store.array(KEY, (10, 4), torch.float64, 3),
    ]
    assert len({a.folder for a in every}) == len(every) == len(store.arrays())


def test_shards_of_the_wrong_shape_are_refused(tmp_path):
    a = array(tmp_path)
    with refuses("(3, 5)"):
        a.write(a.shards[0], torch.zeros(3, 5))
    with refuses("(2, 4)"):
        a.write(a.shards[0], torch.zeros(2, 4))
    assert len(a.missing()) == 4


def test_files_are_readable_by_those_who_can_read_the_folder(tmp_path):
    a = filled(tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in a.folder.iterdir()}
    assert len(modes) == 1, "shards and manifest alike"
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}


# ------------------------------------------------------------------------------------------------------------- damage


def test_a_missing_shard_says_how_to_finish(tmp_path):
    a = filled(tmp_path)
    (a.folder / "part-00001.safetensors").unlink()
    assert a.missing() == [slice(3, 6)]
    with refuses("part-00001.safetensors is missing; run the same command again"):
        a.all()


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_shard_is_damaged(tmp_path, keep):
    a = filled(tmp_path)
    path = a.folder / "part-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refuses("part-00002.safetensors is damaged ...delete it and run again"):
        a.all()
    with refuses("damaged"):
        a.verify()


def test_a_tampered_shard_is_found_by_verify(tmp_path):
    a = filled(tmp_path)
    path = a.folder / "part-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with refuses("part-00002.safetensors: its content does not match its digest"):
        a.verify()


@pytest.mark.parametrize("other", [torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.float64)])
def test_a_shard_from_elsewhere_is_refused(tmp_path, other):
    a = filled(tmp_path)
    save_file({"rows": other}, a.folder / "part-00000.safetensors")
    with refuses("part-00000.safetensors holds ... not torch.float32 [3, 4]"):
        a.all()


def test_a_manifest_that_does_not_fit_is_refused_with_the_field(tmp_path):
    a = filled(tmp_path)
    manifest = a.folder / "manifest.json"
    write_json(manifest, {**read_json(manifest), "shape": [10, 7]})
    with refuses("shape: found [10, 7], expected [10, 4]"):
        array(tmp_path)
    write_json(manifest, {**read_json(manifest), "shape": [10, 4], "key": {**KEY, "checkpoint": "xyz"}})
    with refuses("key.checkpoint: found 'xyz', expected 'abc'"):
        array(tmp_path)
    manifest.write_text("{")
    with refuses("cannot be read as JSON"):
        array(tmp_path)


def test_a_newer_format_is_refused_and_an_older_one_read(tmp_path):
    a = filled(tmp_path)
    manifest = a.folder / "manifest.json"
    write_json(manifest, {**read_json(manifest), "format_version": FORMAT_VERSION + 1})
    for open_it in (lambda: array(tmp_path), lambda: Store(tmp_path).arrays()):
        with refuses(f"newer whence (format {FORMAT_VERSION + 1}); upgrade"):
            open_it()
    write_json(manifest, {**read_json(manifest), "format_version": FORMAT_VERSION - 1})
    assert torch.equal(array(tmp_path).all(), VALUES)


# -------------------------------------------------------------------------------------------------------- run folders


def test_a_run_folder_belongs_to_one_model_and_data_set(tmp_path):
    claim(tmp_path, {"model": {"digest": "m1", "name": "net"}, "train": "d1"})
    claim(tmp_path, {"model": {"digest": "m1", "name": "net"}, "train": "d1"})
    with refuses("model.digest: found 'm1', expected 'm2'...choose another output folder"):
        claim(tmp_path, {"model": {"digest": "m2", "name": "net"}, "train": "d1"})
    with refuses("train: found 'd1', expected 'd2'"):
        claim(tmp_path, {"model": {"digest": "m1", "name": "net"}, "train": "d2"})
    with refuses("train: found 'd1', expected 'ffffffff...'...the pictures, or how they are read...no scores"):
        claim(tmp_path, {"model": {"digest": "m1", "name": "net"}, "train": "f" * 64})
    with refuses("queries: found None, expected 'q'"):
        claim(tmp_path, {"model": {"digest": "m1", "name": "net"}, "train": "d1", "queries": "q"})


def test_a_run_folder_of_a_newer_or_another_program_is_refused(tmp_path):
    write_json(tmp_path / "index.json", {"format_version": FORMAT_VERSION + 1, "model": "m"})
    with refuses("newer whence"):
        claim(tmp_path, {"model": "m"})
    write_json(tmp_path / "index.json", {"format_version": FORMAT_VERSION - 1, "model": "m"})
    claim(tmp_path, {"model": "m"})
    write_json(tmp_path / "index.json", [1, 2])
    with refuses("not written by whence"):
        claim(tmp_path, {"model": "m"})


def test_differences_name_the_path():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: found 3, expected 2",
        "d: found 4, expected None",
    ]
    assert differences({"a": [1, 2]}, {"a": [1, 2]}) == []


# --------------------------------------------------------------------------------------------- interruption, full disk


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"

    def half() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        half()
    assert list(path.parent.iterdir()) == []
    with writing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError):
        half()
    assert path.read_text() == "old"
    with writing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    """kill -9 in the middle of a slow part, then the same command again."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    # The package under test and the tests, from wherever this process has them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, slow_features.__file__, str(killed)], env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("features/*/part-*.safetensors"))) < 3:
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (begun,) = Store(killed).arrays()
    assert 0 < len(begun.missing()) < len(begun.shards) == 10
    before = {name: content for name, content in contents(killed).items() if not name.endswith(".claim")}
    found = slow_features.build(killed)
    slow_features.build(whole)
    assert contents(killed) == contents(whole)
    assert all(contents(killed)[name] == content for name, content in before.items()), "finished shards stay"
    assert found.missing() == []
    found.verify()


def test_finished_shards_are_not_computed_again(tmp_path):
    slow_features.build(tmp_path)
    (a,) = Store(tmp_path).arrays()
    times = {path: path.stat().st_mtime_ns for path in a.folder.iterdir()}
    slow_features.build(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in a.folder.iterdir()} == times


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FULL: dict[str, tuple[str, Callable[..., None]]] = {
    "write": ("pathlib.Path.write_bytes", no_space),
    "sync": ("os.fsync", no_space),
    "rename": ("os.replace", no_space),
}


@pytest.mark.parametrize("step", FULL)
def test_a_full_disk_is_told_and_earlier_shards_stay(tmp_path, monkeypatch, step):
    a = array(tmp_path)
    first, second, *_ = a.missing()
    a.write(first, VALUES[first])
    with monkeypatch.context() as patch:
        patch.setattr(*FULL[step])
        with refuses("disk is full: could not write ...part-00001.safetensors"):
            a.write(second, VALUES[second])
    assert a.missing()[0] == second
    assert sorted(path.name for path in a.folder.iterdir()) == ["manifest.json", "part-00000.safetensors"]
    for shard in a.missing():
        a.write(shard, VALUES[shard])
    a.verify()
    assert torch.equal(a.all(), VALUES)


def test_other_errors_of_the_disk_are_not_called_full(tmp_path, monkeypatch):
    def denied(*args: object) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(PermissionError):
        write_json(tmp_path / "x.json", {})


# ----------------------------------------------------------------------------------------------- features in the store


@dataclass(frozen=True)
class Reciprocal:
    """1/x, or the square root where `root`: not finite for some images."""

    root: bool = False

    def __call__(self, model: torch.nn.Module, forward: Forward, batch: Batch) -> Tensor:
        return batch.x0.sqrt() if self.root else 1 / batch.x0


def small_task(root: Path, x0: Tensor, **engine: int) -> Task:
    images, point = tensors(x0, "image"), checkpoint(slow_features.Net, "net")
    return Task(Denoiser(linear_schedule()), (point,), images, images, root, Engine(**engine))


def fetch(part: Part, task: Task) -> Rows:
    return rows(part, task, task.trajectory[0], task.train, "features")


@pytest.mark.parametrize(("bad", "root"), [(0.0, False), (-0.0, False), (-1.0, True)], ids=["inf", "-inf", "nan"])
def test_a_row_that_is_not_finite_names_the_image(tmp_path, bad, root):
    x0 = torch.ones(7, 2) + torch.arange(7)[:, None]
    x0[5, 1] = bad
    task = small_task(tmp_path, x0, budget=2)
    with refuses("feature row of image 'image-0005' holds NaN or Inf"):
        fetch(Encoded(Reciprocal(root)), task)
    (a,) = Store(tmp_path).arrays()
    assert a.missing() == [slice(4, 6), slice(6, 7)], "the shards before it are kept"


def test_features_are_keyed_by_all_that_decides_them(tmp_path):
    task = unet_task(tmp_path, n=2, m=1)
    part = Gradient(loss, uniform(4), Rademacher(8), "conv_out")
    variants = [
        (part, task),
        (replace(part, projection=Rademacher(8, seed=1)), task),
        (replace(part, draws=uniform(4, seed=1)), task),
        (replace(part, parameters="conv_in"), task),
        (part, replace(task, trajectory=task.trajectory[1:])),
        (part, replace(task, train=tensors(task.train.x0.flip(0), "train"))),
        (part, replace(task, forward=replace(task.forward, prediction_type="sample"))),
        (part, replace(task, engine=replace(task.engine, dtype=torch.float64))),
    ]
    folders = {fetch(p, t).folder for p, t in variants}
    assert len(folders) == len(variants)
    renamed = replace(task, train=tensors(task.train.x0, "renamed"), engine=replace(task.engine, batch_size=1))
    assert fetch(part, renamed).folder in folders, "names do not matter"


def test_weights_that_are_not_finite_are_named(tmp_path):
    def broken() -> torch.nn.Module:
        net = slow_features.Net()
        net.layers[2].bias.data[1] = float("nan")
        return net

    task = small_task(tmp_path, torch.ones(7, 2))
    bad = Checkpoint(broken, "digest", "checkpoint-7")
    with refuses("checkpoint-7: weight layers.2.bias holds NaN or Inf"):
        rows(Encoded(Reciprocal()), task, bad, task.train, "x")


def test_files_are_json_and_safetensors_only(tmp_path):
    slow_features.build(tmp_path)
    names = {Path(name).suffix for name in contents(tmp_path)}
    assert names == {".json", ".safetensors"}
    manifest = next(tmp_path.rglob("manifest.json"))
    assert json.loads(manifest.read_text())["shape"] == [30, 16]


def test_one_room_hashes_files_and_values():
    """Two hashers would one day disagree about the same file."""
    source = Path(whence.__file__).parent
    users = {str(path.relative_to(source)) for path in source.rglob("*.py") if "hashlib." in path.read_text()}
    assert users == {"storage/files.py", "diffusion/noise.py", "plain.py"}  # seeds and settings are no files


def test_digests_are_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    a, b = tmp_path / "a", tmp_path / "b"
    assert file_digest(a) == file_digest(io.BytesIO(b"one")) == bytes_digest(b"one")
    several = [files_digest([a, b]), files_digest([b, a]), files_digest([a]), files_digest([a, b], names=True)]
    assert len({file_digest(a), *several}) == 5
    values = torch.arange(6, dtype=torch.bfloat16)
    assert values_digest(values) == values_digest(values.view(2, 3).T.contiguous().T)
    assert tensor_digest(values) != tensor_digest(values.view(2, 3))
    with refuses("cannot be read"):
        file_digest(tmp_path / "absent")


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_built_appears_whole_or_not_at_all(tmp_path, fails):
    target = tmp_path / "made"
    with contextlib.suppress(ZeroDivisionError), building(target) as folder:
        (folder / "file").write_text("x")
        assert str(os.getpid()) in folder.name  # two processes may build the same folder
        if fails:
            raise ZeroDivisionError
        folder.rename(target)
    assert [path.name for path in tmp_path.iterdir()] == ([] if fails else ["made"])
