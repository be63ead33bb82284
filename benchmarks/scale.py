"""Do scores that call themselves a predicted rise of the loss have the size of one?

    python benchmarks/scale.py [METHOD ...]      a quarter of an hour of one core for all; benchmarks/results/scale.json

A perceptron denoiser of 2,700 parameters on 24 pictures; 24 true leave-one-outs with the same seed, order and noise; 6
held-out queries. For every method at its own settings (projections left out, draws as it says): the norm of its scores over
that of the true rises, and their correlation. A scale other than "rank" is stated only where the size is within a factor of
2, which the tests hold it to.
"""

import os

os.environ["WHENCE_QUIET"] = "1"

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from _record import RESULTS, SMOKE, record
from whence.data.images import tensor_images
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.methods import METHODS, build, settings_of
from whence.training.loop import stacked_steps, steps
from whence.training.optimizer import AdamW, start
from whence.training.recipe import New, Recipe, Schedule
from whence.training.study import Study
from whence.training.unroll import Queries, Run
from whence.training.unroll.measured import values
from whence.training.unroll.run import Trainer
from whence.types import Checkpoint, Engine, Task, WhenceError

N, M, STEPS, WARMUP = 24, 6, 400, 20
if SMOKE:
    N, M, STEPS, WARMUP = 6, 2, 4, 1
NETWORK = {"_class_name": "MLPDenoiser", "sample_size": 4, "in_channels": 1, "width": 16, "layers": 1}
STUDY = Study(
    Recipe(
        New(NETWORK), AdamW(5e-3, beta1=0.9), Schedule(STEPS, WARMUP), batch_size=8, max_grad_norm=0.0, ema=0.95, seed=3
    )
)


def pictures():
    g = torch.Generator().manual_seed(1)
    kinds = torch.where(torch.rand(4, 1, 4, 4, generator=g) < 0.5, -0.8, 0.8)
    x0 = kinds[torch.arange(N + M) % 4] + 0.3 * torch.randn(N + M, 1, 4, 4, generator=g)
    return tensor_images(x0[:N], [f"train-{i}" for i in range(N)]), tensor_images(
        x0[N:], [f"query-{i}" for i in range(M)]
    )


def rises(train, queries):
    """The true rise of every query's loss without each image: [m, n]."""
    weights = torch.cat([torch.ones(1, N), 1 - torch.eye(N)])
    starts = [start(STUDY.network_at(3)).weights] * (N + 1)
    recipes = [STUDY.recipe] * (N + 1)
    for state, _ in stacked_steps(STUDY.network_at(3), STUDY.forward(), train, recipes, weights, starts):  # noqa: B007
        pass
    asked, trainer = Queries(queries, loss, stratified(50)), Trainer(Run.of(STUDY, train))
    f = torch.stack([values(trainer, asked, {name: w[i] for name, w in state.ema.items()}) for i in range(N + 1)])
    return (f[1:] - f[0]).T


def point(weights, name, step=None) -> Checkpoint:
    def load() -> nn.Module:
        module = STUDY.network_at(3)
        module.load_state_dict(weights, strict=False)
        return module

    return Checkpoint(load, name, name, step, None if step is None else STUDY.recipe.rate_at(step - 1))


def main():
    torch.set_num_threads(1)
    train, queries = pictures()
    truth, points = rises(train, queries), []
    for state, _ in steps(STUDY.network_at(3), STUDY.forward(), train, STUDY.recipe):
        if state.step % (STEPS // 4) == 0:
            points.append(point(state.weights, f"checkpoint-{state.step}", state.step))
    points.append(point(state.ema, "model"))
    path = RESULTS / "scale.json"
    rows = (
        json.loads(path.read_text())["methods"] if sys.argv[1:] else {}
    )  # those that are named are put among the others
    tried = ("influence", "d_trak", "metagradient") if SMOKE else METHODS
    for name in sys.argv[1:] or tried:
        given = {"dim": None} if "dim" in settings_of(name) else {}
        task = Task(STUDY.forward(), tuple(points), train, queries, Path(tempfile.mkdtemp()), Engine(), study=STUDY)
        try:
            scores = build(name, task.forward, given)(task)
        except WhenceError as error:
            rows[name] = {"left_out": str(error)[:120]}
            continue
        row = {"scale": scores.scale}
        if scores.scale != "rank":
            found = scores.values if scores.scale == "removal" else scores.values / N
            row["size"] = float(found.norm() / truth.norm())
            row["correlation"] = float(torch.corrcoef(torch.stack([found.flatten(), truth.flatten()]))[0, 1])
        rows[name] = row
        print(name, row, flush=True)
    record("scale", {"question": __doc__.splitlines()[0], "images": N, "queries": M, "methods": rows})


if __name__ == "__main__":
    main()
