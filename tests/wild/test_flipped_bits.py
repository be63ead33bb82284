"""A bit that flips in whatever a run keeps is told when it is read: never another score in silence."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from errors import refuses
from test_cli import TRAINING, refused, succeeds, whence
from whence.evaluation import banks
from whence.storage import arrays
from whence.storage.arrays import Store
from whence.training.optimizer import State
from whence.training.unroll.states import Kept

pytestmark = pytest.mark.slow

DIGITS = banks.digits()
EK_FAC = ("--method", "ek_fac", "--draws", 2)


def flip(path, where):
    """One bit: of the last value, of the middle of all of them, or of the header."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[{"end": -1, "middle": (start + len(content)) // 2, "header": start // 2}[where]] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("where", ["end", "middle"])
@pytest.mark.parametrize("kept", ["features", "curvature", "scores", "state"])
def test_a_flipped_bit_is_told(small, tmp_path, kept, where):
    run = tmp_path / "run"
    call = small.attribute(run, "--budget_mb", 1)
    pattern = "features/*/part-*.safetensors"
    if kept == "state":
        call = ("train", "new", "--train_data_dir", small.images, "--output_dir", run, *TRAINING)
        pattern = "checkpoint-6/state.safetensors"
    elif kept == "curvature":
        call, pattern = (*small.about(run, "--query_data_dir", small.queries), *EK_FAC), "curvature/*/*.safetensors"
    succeeds(*call)
    if kept == "scores":
        call, pattern = ("report", run), "scores/*/scores.safetensors"
    found = sorted(run.glob(pattern))
    assert found
    told = 0
    for path in found if kept == "curvature" else found[:: max(1, len(found) // 3)]:
        before = path.read_bytes()
        flip(path, where)
        if kept != "curvature" or whence(*call).code:  # of the curvature, what later steps hold is not read again
            refused(*call, says=rf"{path.name}: its content does not match its digest; delete it and ")
            told += 1
        path.write_bytes(before)
    assert told
    succeeds(*call)


def test_each_shard_is_hashed_once_and_again_when_it_changed(tmp_path, monkeypatch):
    values = torch.randn(40, 8)
    array = Store(tmp_path).array({"part": "x"}, (40, 8), torch.float32, 10)
    for rows in array.shards:
        array.write(rows, values[rows])
    hashed = []
    real = arrays.seal_of_tensors
    monkeypatch.setattr(arrays, "seal_of_tensors", lambda *given: (hashed.append(1), real(*given))[1])
    for _ in range(3):
        assert torch.equal(array.take([3, 17, 4]), values[[3, 17, 4]])
        assert torch.equal(array.all(), values)
    assert len(hashed) == 4
    flip(array.folder / "part-00001.safetensors", "end")
    with pytest.raises(Exception, match=r"part-00001\.safetensors: its content does not match its digest"):
        array.take([12])


@pytest.mark.parametrize("where", ["end", "middle", "header"])
@pytest.mark.parametrize("name", ["masks", "heldout", "generated", "queries"])
def test_a_flipped_bit_of_a_bank_is_told(name, where, tmp_path):
    folder = Path(shutil.copytree(banks.SHIPPED / "digits", tmp_path / "bank"))
    flip(folder / f"{name}.safetensors", where)
    with refuses("is not what was written", where=f"{name}.safetensors"):
        banks.load("digits", DIGITS, folder)


def test_a_file_of_a_bank_that_nobody_vouches_for_is_refused(tmp_path):
    folder = Path(shutil.copytree(banks.SHIPPED / "digits", tmp_path / "bank"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]["queries"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with refuses("is not what was written", where="queries.safetensors"):
        banks.load("digits", DIGITS, folder)
    (folder / "masks.safetensors").unlink()
    with refuses("or not there", where="masks.safetensors"):
        banks.tables(folder, manifest)


@pytest.mark.parametrize("where", ["end", "middle", "header"])
def test_a_flipped_bit_of_a_spilled_state_is_told(where, tmp_path):
    g = torch.Generator().manual_seed(0)
    weights, m, v = ({"layer": torch.randn(5, 3, generator=g)} for _ in range(3))
    state, kept = State(weights, m, v, weights, 7), Kept(0, tmp_path)
    kept.put(state)
    again = kept.get(7, state)
    assert all(
        torch.equal(getattr(again, part)["layer"], getattr(state, part)["layer"]) for part in ("weights", "m", "v")
    )
    flip(next(tmp_path.glob("*.safetensors")), where)
    with refuses("a state of the training is not what was written there", where="state-000007.safetensors"):
        kept.get(7, state)


def test_hashing_costs_no_copy(tmp_path):
    """As fast as the processor hashes; printed, for the docs."""
    values = torch.randn(2**24)
    begun = time.perf_counter()
    arrays.values_digest(values)
    print(f"{values.nbytes / 2**20 / (time.perf_counter() - begun):.0f} MiB/s")
