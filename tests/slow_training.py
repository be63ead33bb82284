"""A tiny study, trained and retrained slowly: run in processes of their own to be killed in the middle.

See test_training.py and test_ledger.py.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from recipes import changed, pixel_study, recipe_of
from whence.data.images import TensorImages
from whence.evaluation import designs, ledger
from whence.evaluation.designs import Subset
from whence.evaluation.ledger import Ledger
from whence.training import runs
from whence.training.runs import train_study
from whence.training.study import unet_config
from worlds import tensors

torch.set_num_threads(1)

MLP = {"_class_name": "MLPDenoiser", "sample_size": 4, "in_channels": 1, "width": 16, "layers": 1}
RECIPE = recipe_of(steps=6, batch_size=5, learning_rate=1e-2, warmup_steps=2, eps_root=1e-8, ema=0.9)
STUDY = pixel_study(MLP, RECIPE, steps=50)
UNET = pixel_study(unet_config(4, 1, (8, 8), dropout=0.1), changed(RECIPE, steps=12, flip=True), steps=50)


def images(n: int = 24, seed: int = 0) -> TensorImages:
    g = torch.Generator().manual_seed(seed)
    return tensors(torch.rand(n, 1, 4, 4, generator=g) * 2 - 1, "image")


def subsets() -> list[Subset]:
    """Six subsets, two seeds each."""
    return [
        *designs.fixed(24, 3, seeds=(100, 101), role="test", seed=1, common=False),
        *designs.fixed(24, 2, seeds=(200, 201), role="tune", seed=2, common=False),
        *designs.full(24, seeds=(300, 301)),
    ]


def plan(root: Path, stack: int = 3) -> Ledger:
    return Ledger.plan(root, STUDY, images(), subsets(), stack)


# ---------------------------------------------------------------------------------------------------- in other processes


def train_slowly(folder: Path, pause: float) -> None:
    runs.steps = slow(runs.steps, pause)
    train_study(UNET, images(), folder, every=2)


def retrain_slowly(root: Path, shard: tuple[int, int], pause: float) -> None:
    ledger.stacked_steps = slow(ledger.stacked_steps, pause)
    # A unit's DONE.json, too, is written a while after its weights.
    write_json = ledger.write_json
    ledger.write_json = lambda *args: (time.sleep(pause), write_json(*args))
    plan(root).run(shard)


def slow(run: Callable[..., Iterator[Any]], pause: float) -> Callable[..., Iterator[Any]]:
    def slower(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for item in run(*args, **kwargs):
            time.sleep(pause)
            yield item

    return slower


def start(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Call a function of this module in a new process."""
    # A fork need not import everything again; where there is a GPU, autograd has threads that no fork survives.
    if torch.cuda.is_available():
        # A fork server imports with the environment of this process, not with its sys.path.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        context: Any = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["slow_training", "pytest"])
    else:
        context = multiprocessing.get_context("fork")
    process = context.Process(target=function, args=args)
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """SIGKILL, nothing less."""
    process.kill()
    process.join()
