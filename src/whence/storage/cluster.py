"""A Ray cluster for the parts of one work (see `workers`): each part is read here, computed somewhere, and kept here.

So that nothing but this process needs the run folder; what is computed goes once to each process of the cluster. A part
whose node dies is computed on another one. Claims are those of this process.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from whence.storage.claims import claimed_part
from whence.storage.workers import PAUSE, Part, Result, Work
from whence.types import VERSION, WhenceError

IN_FLIGHT = 2
"""Parts that are on their way, for each processor of the cluster: what they are read from waits in memory."""
RETRIES = 5
_computes: dict[str, Any] = {}


def share_on(address: str, todo: Sequence[Part], work: Work[Part, Result]) -> Iterator[Part]:
    """Yields each part when it is there.

    Args:
        address: of the cluster: "auto" for the one of this machine, or HOST:PORT.
        todo: parts that are not there.
        work: what is done to each.
    """
    ray = connected(address)
    compute = [ray.put(work.compute)]
    run = ray.remote(num_cpus=1, max_retries=RETRIES)(_run)
    most = max(1, IN_FLIGHT * int(ray.cluster_resources().get("CPU", 1)))
    left = list(todo)
    running: dict[Any, tuple[Part, ExitStack]] = {}
    try:
        while left or running:
            later = []
            for place, part in enumerate(left):
                if len(running) >= most:
                    later += left[place:]
                    break
                if work.done(part):
                    yield part
                    continue
                claim = ExitStack()
                if not claim.enter_context(claimed_part(work.place(part))):
                    claim.close()
                    later.append(part)
                    continue
                running[run.remote(compute, tuple(work.read(part)))] = part, claim
            left = later
            if not running:
                time.sleep(PAUSE[1])
                continue
            for ready in ray.wait(list(running), timeout=PAUSE[1])[0]:
                part, claim = running.pop(ready)
                with claim:
                    work.keep(part, _result(ray, ready))
                yield part
    finally:
        for reference, (_, claim) in running.items():
            ray.cancel(reference, force=True)
            claim.close()


def connected(address: str) -> Any:
    """Ray, connected to a cluster all of whose nodes have this version of whence and torch."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise WhenceError(
            "Ray is not installed", "--ray", "pip install 'whence-attribution[ray]', or no --ray"
        ) from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            told = f"no Ray cluster answers at {address!r} ({' '.join(str(error).split())[:120]})"
            raise WhenceError(told, "--ray", "auto, or HOST:PORT of `ray start --head`") from None
        check_nodes(ray, versions())
    return ray


def versions() -> dict[str, str]:
    """What has to be the same on all nodes, so that all of them compute the same."""
    return {"whence": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def check_nodes(ray: Any, ours: Mapping[str, str]) -> None:
    """Refuse nodes that have other versions than these."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for node in (node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked = ray.remote(num_cpus=0, scheduling_strategy=there)(versions)
        name = node.get("NodeManagerHostname") or node["NodeManagerAddress"]
        try:
            theirs = ray.get(asked.remote(), timeout=120)
        except Exception as error:
            told = f"node {name} cannot run whence ({' '.join(str(error).split())[-160:]})"
            raise WhenceError(told, "--ray", "a node with whence installed") from None
        different = [f"{what} {theirs[what]} (here {ours[what]})" for what in ours if theirs[what] != ours[what]]
        if different:
            raise WhenceError(f"node {name} has {', '.join(different)}", "--ray", "the same versions on all nodes")


def _run(compute: list[Any], inputs: Iterable[Any]) -> Any:
    """What a process of the cluster does. The computation comes as a reference in a list, which Ray does not open: it is
    fetched once."""
    import ray

    (reference,) = compute
    if reference.hex() not in _computes:
        _computes.clear()
        _computes[reference.hex()] = ray.get(reference)
    torch.set_num_threads(1)
    os.environ["WHENCE_QUIET"] = "1"
    return _computes[reference.hex()](inputs)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, WhenceError) else error from None
    except ray.exceptions.OutOfMemoryError:
        told = "a worker of the cluster was killed for lack of memory"
        raise WhenceError(told, "--ray", "a smaller --budget_mb, or nodes with more memory") from None
    except ray.exceptions.RayError as error:
        told = f"a part was lost {RETRIES} times ({type(error).__name__}); what is finished stays"
        raise WhenceError(told, "--ray", "the same command again") from None
