"""How much faster are two workers than one, and what is lost when they are killed?

python benchmarks/workers.py      some minutes of two idle cores

speed    Features of 512 digits for D-TRAK (40 draws), 16 retrainings of a ledger, and 4 derivatives of trainings, each
         by one process and by two, in turn, five times: the median of the ratios. On cores that others use, it says
         nothing.
killed   The features with three workers, of which one is killed, or their parent, after a time that grows from kill to
         kill; then the same command again. Bytes that differ from those of an undisturbed run, parts that were there and
         were computed again, and parts that were computed twice.
"""

import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from _record import SMOKE, digits, record
from whence.data.images import subset, tensor_images
from whence.diffusion.draws import uniform
from whence.diffusion.outputs import squared_norm
from whence.evaluation import designs
from whence.evaluation.ledger import Ledger
from whence.features.parts import Gradient
from whence.features.projections import SJLT
from whence.features.rows import Prepared, rows
from whence.methods import AveragedMetagradient
from whence.storage.leftovers import sweep
from whence.training.recipe import Schedule
from whence.types import Checkpoint, Engine, Task

IMAGES, STEPS, TIMES, KILLS = (24, 2, 1, 1) if SMOKE else (512, 120, 5, 20)


def task(root, workers):
    """A question about a network that was not trained: it costs the same."""
    recipe = digits()
    study = replace(recipe.study, recipe=replace(recipe.study.recipe, schedule=Schedule(STEPS, 1)))
    network = study.network_at(0)
    point = Checkpoint(lambda: network, "0" * 64, "model", None, None)
    images = subset(recipe.train, range(min(IMAGES, len(recipe.train))))
    queries = tensor_images(recipe.heldout.batch(range(4)).x0, [f"q{i}" for i in range(4)])
    return Task(study.forward(), (point,), images, queries, root, Engine(workers=workers, budget=2**24), study=study)


def features(root, workers):
    asked = task(root, workers)
    measured = Gradient(squared_norm, uniform(2 if SMOKE else 40), SJLT(8 if SMOKE else 4096))
    return rows(measured, asked, asked.trajectory[0], asked.train, "")


def ledger(root, workers):
    asked = task(root, workers)
    chosen = designs.fixed(len(asked.train), 4 if SMOKE else 16, seeds=(0,), role="test")
    Ledger.plan(root, asked.study, asked.train, chosen, 1).run(engine=asked.engine)


def derivatives(root, workers):
    asked = task(root, workers)
    roomy = replace(asked.engine, budget=2**28)  # the states of a training
    AveragedMetagradient(masks=2 if SMOKE else 4)(replace(asked, engine=roomy))


def speed():
    """Seconds by one and by two processes, and the median of their ratios."""
    found = {}
    for work in (features, ledger, derivatives):
        seconds = {1: [], 2: []}
        for _, workers in itertools.product(range(TIMES), (1, 2)):
            with tempfile.TemporaryDirectory() as folder:
                begun = time.perf_counter()
                work(Path(folder), workers)
                seconds[workers].append(time.perf_counter() - begun)
        ratios = [one / two for one, two in zip(seconds[1], seconds[2], strict=True)]
        found[work.__name__] = {"seconds": seconds, "ratio": statistics.median(ratios), "ratios": ratios}
    return found


# ------------------------------------------------------------------------------------------------------------- killed


def slowly(log):
    """Each part takes a while longer and is noted."""
    compute = Gradient.compute

    def noted(self, module, forward, batches, count, engine):
        time.sleep(0.03)
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return compute(self, module, forward, batches, count, engine)

    Gradient.compute = noted


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("part-*")) if path.suffix == ".safetensors"}


def begun(folder, log):
    """A process with three workers in a session of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    sweep(folder)  # as every command does
    slowly(log)
    Prepared.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        features(folder, 3)
    os._exit(0)


def children(pid):
    found = []
    for task_of in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(word) for word in task_of.read_text().split()]
    return found


def kill(kind, after, whole):
    """What one kill leaves."""
    with tempfile.TemporaryDirectory() as root:
        folder, log = Path(root) / "run", Path(root) / "log"
        log.touch()
        pid = begun(folder, log)
        time.sleep(after)
        workers = children(pid)
        if kind == "a worker":
            victims = workers[:1]
        else:
            victims = [pid]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        os.waitpid(pid, 0)
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            time.sleep(0.1)  # they see within half a second that their parent is gone
        before, noted = content(folder), len(log.read_text().splitlines())
        again = begun(folder, log)
        os.waitpid(again, 0)
        made = len(log.read_text().splitlines())
        after_all = content(folder)
        return {
            "killed": len(victims),
            "there": len(before),
            "differ": sum(after_all.get(name) != value for name, value in whole.items()),
            "again": made - noted - (len(whole) - len(before)),
            "twice": made - len(whole),
            "left": len([path for path in folder.rglob("*") if path.suffix in (".claim", ".tmp")]),
        }


def killed():
    """Kills of each kind, summed up."""
    with tempfile.TemporaryDirectory() as root:
        folder, log = Path(root) / "run", Path(root) / "log"
        started = time.perf_counter()
        os.waitpid(begun(folder, log), 0)
        whole, seconds = content(folder), time.perf_counter() - started
        shutil.rmtree(folder)
    found = {}
    for kind in ("a worker", "the parent"):
        each = [kill(kind, seconds * (number + 0.5) / KILLS, whole) for number in range(KILLS)]
        found[kind] = {
            "kills": sum(one["killed"] for one in each),
            "parts": len(whole),
            "parts that differ": sum(one["differ"] for one in each),
            "parts that were there and computed again": sum(max(0, one["again"]) for one in each),
            "parts computed twice, in all": sum(one["twice"] for one in each),
            "files left over": sum(one["left"] for one in each),
            "there when killed": [one["there"] for one in each],
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["WHENCE_QUIET"] = "1"
    result = {"question": __doc__.split("\n")[0], "killed": killed()}
    if "--killed" not in sys.argv:
        result["speed"] = speed()
    record("workers", result)
