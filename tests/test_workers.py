"""Several processes for one work: the same bits, each part once, nothing lost when one is killed, claims that tell who
lives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import refuses
from slow_training import STUDY, images
from whence.evaluation.designs import fixed
from whence.evaluation.ledger import Ledger
from whence.methods import AveragedMetagradient, build
from whence.storage import claims, workers
from whence.storage.claims import claimed_part, holder, path_of
from whence.storage.workers import Work, default_workers, share
from whence.types import Engine, WhenceError
from worlds import linear_world, trained_task

PARTS = list(range(12))


@pytest.fixture
def shared(tmp_path):
    """A work of twelve parts that notes who did what; returns the call and the notes."""

    def place(part: int) -> Path:
        return tmp_path / "parts" / f"{part:02d}"

    def call(count: int, hinder=lambda part: None) -> list[tuple[int, int]]:
        def compute(parts: Iterable[int]) -> int:
            (part,) = parts
            with (tmp_path / "log").open("a") as log:
                log.write(f"{part} {os.getpid()}\n")
            time.sleep(0.02)
            hinder(part)
            return part

        work = Work(lambda part: place(part).exists(), place, compute, lambda part, found: place(found).write_text("x"))
        share(PARTS, work, "", Engine(workers=count))
        lines = (tmp_path / "log").read_text().split("\n")[:-1]
        return [(int(part), int(pid)) for part, pid in (line.split() for line in lines)]

    call.place = place
    return call


@pytest.mark.parametrize("count", [1, 3])
def test_each_part_is_done_once(shared, count):
    done = shared(count)
    assert sorted(part for part, _ in done) == PARTS
    assert len({pid for _, pid in done}) == count
    assert not list(shared.place(0).parent.glob("*.claim"))
    assert shared(count) == done, "what is there is not done again"


def test_the_parts_of_a_worker_that_is_killed_are_done_by_others(shared):
    parent = os.getpid()

    def hinder(part: int) -> None:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.warns(UserWarning, match=r"a worker was killed, perhaps for lack of memory"):
        done = shared(3, hinder)
    assert {part for part, _ in done} == {*PARTS}
    assert len(done) == len(PARTS) + 2, "nothing is done twice but what the two had in hand"
    assert not list(shared.place(0).parent.glob("*.claim"))


def test_what_is_wrong_with_a_part_is_told_and_the_others_stay(shared):
    def hinder(part: int) -> None:
        if part == 5:
            raise WhenceError("part 5 holds NaN")

    with refuses("part 5 holds NaN"):
        shared(3, hinder)
    there = {path.name for path in shared.place(0).parent.iterdir()}
    assert {"00", "01"} <= there
    assert "05" not in there
    before = len(shared.place(0).parent.parent.joinpath("log").read_text().split("\n")) - 1
    done = shared(3)
    assert {f"{part:02d}" for part, _ in done[before:]} == {f"{part:02d}" for part in PARTS} - there


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    script = f"""
import os, time
from pathlib import Path
from whence.storage.workers import Work, share
from whence.types import Engine
def compute(part):
    Path({str(tmp_path)!r}, f"pid-{{os.getpid()}}").touch()
    time.sleep(60)
work = Work(lambda part: False, lambda part: Path({str(tmp_path)!r}, str(part)), compute, lambda part, found: None)
share([0, 1, 2], work, "", Engine(workers=3))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    for _ in range(600):
        if len(list(tmp_path.glob("pid-*"))) == 3:
            break
        time.sleep(0.1)
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    assert len(pids) == 3
    process.kill()
    process.wait()
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError("workers go on without their parent")


# ---------------------------------------------------------------------------------------------------------------- claims


def claim_of(part: Path, **note: object) -> None:
    path_of(part).write_text(json.dumps({"place": claims.here(), "node": "n", "pid": os.getpid(), **note}))


def test_a_claim_holds_while_its_process_lives(tmp_path):
    part = tmp_path / "part"
    with claimed_part(part) as ours:
        assert ours
        assert holder(part) == f"process {os.getpid()} on this machine"
        with claimed_part(part) as twice:
            assert not twice
        assert path_of(part).exists()
    assert not path_of(part).exists()
    assert holder(part) == ""
    other = subprocess.Popen(["sleep", "60"])
    claim_of(part, pid=other.pid)
    with claimed_part(part) as ours:
        assert not ours
    other.kill()
    while Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":  # ended, and not waited for
        time.sleep(0.01)
    with claimed_part(part) as ours:
        assert ours
    other.wait()


def test_a_claim_of_our_own_number_is_that_of_an_earlier_process(tmp_path):
    claim_of(tmp_path / "part")
    with claimed_part(tmp_path / "part") as ours:
        assert ours


def test_a_claim_of_another_machine_holds_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "SILENT", 0.2)
    part = tmp_path / "part"
    claim_of(part, place="elsewhere", node="far")
    for _ in range(4):
        with claimed_part(part) as ours:
            assert not ours
        assert holder(part) == f"process {os.getpid()} on machine far"
        time.sleep(0.1)
        os.utime(path_of(part))
    with claimed_part(part) as ours:
        assert not ours
    time.sleep(0.3)
    with claimed_part(part) as ours:
        assert ours


def test_claims_are_touched_while_they_are_held(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    with claimed_part(tmp_path / "part"):
        before = path_of(tmp_path / "part").stat().st_mtime_ns
        time.sleep(0.3)
        assert path_of(tmp_path / "part").stat().st_mtime_ns > before


def test_it_is_said_for_whom_we_wait(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    monkeypatch.delenv("WHENCE_QUIET", raising=False)
    other = subprocess.Popen(["sleep", "0.5"])
    claim_of(tmp_path / "0", pid=other.pid)
    work = Work(lambda part: False, lambda part: tmp_path / "0", lambda part: other.wait(), lambda part, found: None)
    share([0], work, "features", Engine())
    assert f"features: 1 parts are left, which process {other.pid} on this machine computes" in capsys.readouterr().err


def test_the_default_is_the_cores_by_the_threads_of_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(workers, "quota", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert default_workers() == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert default_workers() == 1


# ---------------------------------------------------------------------------------------------------------- the same bits


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.safetensors"))}


@pytest.mark.parametrize("name", ["d_trak", "ek_fac", "averaged_metagradient"])
def test_workers_change_no_bit(tmp_path, name):
    world, found = linear_world(n=24, m=3, dim=4, seed=1), []
    for count in (1, 3):
        root, how = tmp_path / str(count), {"workers": count, "batch_size": 4, "budget": 4 * 8 * 200}
        if name == "averaged_metagradient":
            task, method = trained_task(root, workers=count), AveragedMetagradient(masks=4)
        else:
            task = world.task(root, **how)
            method = build(name, task.forward, {"dim": 16} if name == "d_trak" else {})
        found.append((method(replace(task, errors=True)), files(root)))
    (one, of_one), (several, of_several) = found
    assert torch.equal(one.values, several.values)
    assert torch.equal(one.stderr, several.stderr)
    assert of_one == of_several
    assert len(of_one) > 3


def test_a_ledger_of_several_workers_is_that_of_one(tmp_path):
    plans, train = [], images()
    for count in (1, 2):
        ledger = Ledger.plan(tmp_path / str(count), STUDY, train, fixed(len(train), 4, seeds=(0, 1), role="test"), 2)
        ledger.run(engine=Engine(workers=count))
        plans.append(files(tmp_path / str(count)))
        assert ledger.status() == {"test": {"done": 8, "failed": 0, "missing": 0}}
    assert plans[0] == plans[1]
    assert len(plans[0]) > 8
