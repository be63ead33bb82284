"""A bit that flips in whatever a run keeps is told when it is read: never another score in silence."""

from __future__ import annotations

import time

import pytest
import torch

from test_cli import TRAINING, refused, succeeds, whence
from whence.storage import arrays
from whence.storage.arrays import Store

pytestmark = pytest.mark.slow

EK_FAC = ("--method", "ek_fac", "--draws", 2)


def flip(path, where):
    """One bit: of the last value, or of the middle of all of them."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[-1 if where == "end" else (start + len(content)) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("where", ["end", "middle"])
@pytest.mark.parametrize("kept", ["features", "curvature", "scores", "state"])
def test_a_flipped_bit_is_told(small, tmp_path, kept, where):
    run = tmp_path / "run"
    call = small.attribute(run, "--budget_mb", 1)
    pattern = "features/*/part-*.safetensors"
    if kept == "state":
        call = ("train", "new", "--train_data_dir", small.images, "--output_dir", run, *TRAINING)
        pattern = "checkpoint-10/state.safetensors"
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
            refused(*call, says=rf"{path.name}: its content does not match its digest; delete it and run again")
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
    real = arrays.values_digest
    monkeypatch.setattr(arrays, "values_digest", lambda *given: (hashed.append(1), real(*given))[1])
    for _ in range(3):
        assert torch.equal(array.take([3, 17, 4]), values[[3, 17, 4]])
        assert torch.equal(array.all(), values)
    assert len(hashed) == 4
    flip(array.folder / "part-00001.safetensors", "end")
    with pytest.raises(Exception, match=r"part-00001\.safetensors: its content does not match its digest"):
        array.take([12])


def test_hashing_costs_no_copy(tmp_path):
    """As fast as the processor hashes; printed, for the docs."""
    values = torch.randn(2**24)
    begun = time.perf_counter()
    arrays.values_digest(values)
    print(f"{values.nbytes / 2**20 / (time.perf_counter() - begun):.0f} MiB/s")
