"""Do averaged metagradients foresee retraining on a convolutional network, too?

python benchmarks/conv.py [FOLDER]      about twenty minutes of one core; goes on where it was cut off

A tiny UNet2DModel with attention (8 channels) on 64 digits; 48 random halves with two seeds each; 16 held-out queries.
LDS with interval and ceiling: averaged metagradients of four masks; TRAK, D-TRAK and EK-FAC at the damping that does best
on these very subsets, which flatters them.
"""

import sys
from pathlib import Path

import torch

from _record import RUNS, SMOKE, record
from whence.data.images import subset
from whence.diffusion.draws import stratified, uniform
from whence.diffusion.outputs import loss
from whence.evaluation import banks, designs
from whence.evaluation.lds import bootstrap, lds, predict
from whence.evaluation.ledger import Ledger
from whence.methods import build
from whence.methods.metagradient import AveragedMetagradient
from whence.models import open_model
from whence.training.optimizer import AdamW
from whence.training.recipe import New, Recipe, Schedule
from whence.training.runs import train_study
from whence.training.study import Study, unet_config
from whence.types import Engine, Task

N, QUERIES, SUBSETS, SEEDS, MASKS, STEPS, WARMUP = 64, 16, 48, 2, 4, 300, 20
DAMPINGS = tuple(10.0**e for e in range(-5, 4))
DRAWS, MEASURED = 50, 20
if SMOKE:
    N, QUERIES, SUBSETS, MASKS, STEPS, WARMUP, DRAWS, MEASURED = 8, 2, 4, 2, 2, 1, 2, 2
RECIPE = Recipe(
    New(unet_config(8, 1, (8,))),
    AdamW(5e-3, beta1=0.9),
    Schedule(STEPS, WARMUP),
    batch_size=16,
    max_grad_norm=0.0,
    ema=0.97,
    seed=99_999,
)


def main(folder):
    engine, draws = Engine(budget=2**31), stratified(MEASURED, seed=777)
    train, queries = banks.digit_images(0, N), subset(banks.digit_images(1000, 1100), range(0, 100, 100 // QUERIES))
    queries = subset(queries, range(QUERIES))
    study = Study(RECIPE)
    train_study(study, train, folder / "model", RECIPE.steps, engine)
    model = open_model(folder / "model")
    halves = designs.fixed(N, SUBSETS, seeds=range(1000, 1000 + SEEDS), role="test", seed=1)
    ledger = Ledger.plan(folder / "ledger", study, train, halves, 16)
    ledger.run(engine=engine)
    ledger.measure("loss", queries, loss, draws, engine)
    table = ledger.table("loss")
    masks, outputs = table.averaged()
    task = Task(model.forward, (model.final,), train, queries, folder / "run", engine, study=study)
    scores = {}
    for name in ("trak", "d_trak", "ek_fac"):
        tried = build(name, model.forward, {"draws": uniform(DRAWS)}).grid(task, DAMPINGS)  # type: ignore[attr-defined]
        scores[name] = max((s.values.numpy() for s in tried), key=lambda v: lds(v, masks, outputs).mean())
    for count in range(2, MASKS + 1, 2):
        method = AveragedMetagradient(masks=count, draws=draws, redraw=False)
        scores[f"averaged_metagradient, {count} masks"] = method(task).values.numpy()
    judged = bootstrap({name: predict(values, masks) for name, values in scores.items()}, outputs)
    limit = table.ceiling().spearman
    rows = {name: _numbers(judged.interval(name)) for name in scores}
    size = sum(p.numel() for p in model.final.load().parameters())
    return {"parameters": size, "lds": rows, "ceiling": _numbers(limit)}


def _numbers(interval):
    return [round(getattr(interval, part), 4) for part in ("estimate", "low", "high")]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "conv"
    record("conv", {"question": __doc__.split("\n")[0], **main(folder)})
