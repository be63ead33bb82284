"""A Ray cluster of two or three nodes on this machine: the same bits, and nothing lost when a worker or a node goes.

It runs where Ray is installed (pip install 'whence-attribution[ray]'), which the other tests do not ask for.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import refuses
from slow_training import STUDY, images
from test_workers import files
from whence.evaluation.designs import fixed
from whence.evaluation.ledger import Ledger
from whence.methods import AveragedMetagradient, build
from whence.storage import cluster
from whence.storage.workers import Work, share
from whence.types import Engine, WhenceError
from worlds import linear_world, trained_task

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
ON_RAY = Engine(ray="auto")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of a head without processors and two nodes with one each; connected."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    memory = {"object_store_memory": 80 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    two = [made.add_node(num_cpus=1, **memory) for _ in range(2)]
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(":")])}
    ray.init(address=made.address, log_to_driver=False, configure_logging=False, runtime_env={"env_vars": paths})
    yield made, two
    ray.shutdown()
    made.shutdown()


@pytest.mark.parametrize("name", ["d_trak", "averaged_metagradient"])
def test_a_cluster_changes_no_bit(nodes, tmp_path, name):
    world, found = linear_world(n=24, m=3, dim=4, seed=1), []
    for engine in (Engine(), ON_RAY):
        root, how = tmp_path / f"on-{engine.ray}", {"ray": engine.ray, "batch_size": 4, "budget": 4 * 8 * 200}
        if name == "averaged_metagradient":
            task, method = trained_task(root, ray=engine.ray), AveragedMetagradient(masks=4)
        else:
            task = world.task(root, **how)
            method = build(name, task.forward, {"dim": 16})
        found.append((method(replace(task, errors=True)), files(root)))
    (one, of_one), (several, of_several) = found
    assert torch.equal(one.values, several.values)
    assert of_one == of_several
    assert len(of_one) > 3


def test_a_ledger_on_a_cluster_is_that_of_one_process(nodes, tmp_path):
    plans, train = [], images()
    for engine in (Engine(), ON_RAY):
        root = tmp_path / f"on-{engine.ray}"
        ledger = Ledger.plan(root, STUDY, train, fixed(len(train), 4, seeds=(0, 1), role="test"), 2)
        ledger.run(engine=engine)
        plans.append(files(root))
    assert plans[0] == plans[1]
    assert len(plans[0]) > 8


def work_in(folder: Path, slow: float = 0.0, wrong: int | None = None) -> Work[int, int]:
    """Parts that note which process computed them."""

    def compute(parts):
        (part,) = parts
        if part == wrong:
            raise WhenceError(f"part {part} holds NaN")
        time.sleep(slow)
        return os.getpid()

    def place(part: int) -> Path:
        return folder / f"{part:02d}"

    return Work(
        lambda part: place(part).exists(), place, compute, lambda part, found: place(part).write_text(str(found))
    )


def test_what_is_wrong_with_a_part_is_told_and_nothing_is_claimed_any_longer(nodes, tmp_path):
    with refuses("part 3 holds NaN"):
        share(range(8), work_in(tmp_path, wrong=3), "", ON_RAY)
    assert not list(tmp_path.glob("*.claim"))
    share(range(8), work_in(tmp_path), "", ON_RAY)
    assert len(list(tmp_path.iterdir())) == 8


def test_a_worker_that_is_killed_and_a_node_that_goes(nodes, tmp_path):
    made, _ = nodes
    first = work_in(tmp_path / "first", slow=0.2)
    share(range(4), first, "", ON_RAY)
    victim = int((tmp_path / "first" / "03").read_text())
    extra = made.add_node(num_cpus=1, object_store_memory=80 * 2**20)

    def disturb() -> None:
        time.sleep(1.0)
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        time.sleep(1.0)
        made.remove_node(extra)

    thread = threading.Thread(target=disturb)
    thread.start()
    share(range(16), work_in(tmp_path / "second", slow=0.5), "", ON_RAY)
    thread.join()
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == [f"{part:02d}" for part in range(16)]


def test_a_node_of_another_version_is_named(nodes, monkeypatch):
    there = cluster.versions()
    monkeypatch.setattr(cluster, "versions", lambda there=there: there)
    monkeypatch.setattr(cluster, "VERSION", "0.0.1")
    with refuses("has whence", "--ray", "the same versions on all nodes"):
        cluster.check_nodes(ray, {**there, "whence": "0.0.1"})


def test_no_cluster(nodes, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def nowhere(**given):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nowhere)
    with refuses("no Ray cluster answers at 'somewhere:1'", "--ray", "auto, or HOST:PORT"):
        cluster.connected("somewhere:1")
