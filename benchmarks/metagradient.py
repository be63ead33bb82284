"""How well do gradients through training foresee retraining?

python benchmarks/metagradient.py [FOLDER]      about half an hour of one core for (a) and (b)

On the digits bank, generated queries. (a) Same seed: the reference model is retrained without random 1, 5, 20 and 50 % of
its images, everything else being equal; LDS of the metagradient at w = 1 and of other methods. (b) The standard question,
other seeds and 50 % subsets: LDS of averaged metagradients against the number of masks, as many as there are in
FOLDER/trainings (`python benchmarks/digits.py` computes them). (c) Predicted against true rises of the loss.
"""

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from _record import ROOT, record
from whence import banks, designs
from whence.adapters import open_model
from whence.evaluate import bootstrap, ceiling, predict
from whence.ledger import Ledger
from whence.methods.unrolled import AveragedMetagradient, Metagradient
from whence.outputs import loss
from whence.results import load_scores
from whence.types import Engine, Task

FRACTIONS, SUBSETS = (0.01, 0.05, 0.2, 0.5), 64
OTHERS = ("tracin", "influence", "d_trak", "ek_fac", "pixel_cosine")
ENGINE = Engine(budget=2**31)


def same_seed(folder, recipe, model, queries):
    """Fraction -> (masks [r, n], losses [r, m]) of retrainings with the reference model's own seed."""
    n, own = len(recipe.train), recipe.study.training.seed
    subsets = [
        replace(subset, seeds=(own,), design=f"dropped({f:g})", fraction=f)
        for number, f in enumerate(FRACTIONS)
        for subset in designs.fixed(n, SUBSETS, 1 - f, (own,), "test", seed=100 + number)
    ]
    ledger = Ledger.plan(folder / "same-seed", recipe.study, recipe.train, subsets, recipe.stack)
    ledger.run(engine=ENGINE)
    ledger.measure("loss", queries, loss, recipe.draws, ENGINE)
    table, found = ledger.table("loss"), {}
    for f in FRACTIONS:
        here = [k for k, unit in enumerate(table.units) if unit.design == f"dropped({f:g})"]
        found[f] = table.masks[here], table.outputs[here]
    return found


def intervals(scores, masks, outputs):
    judged = bootstrap({name: predict(values, masks) for name, values in scores.items()}, outputs)
    return {name: [getattr(judged.interval(name), part) for part in ("estimate", "low", "high")] for name in scores}


def by_masks(task, table, draws):
    """Number of masks -> LDS of the average over those that are there, and its scores."""
    masks, outputs = table.role("test").averaged()
    counts = [c for c in range(2, 33, 2) if AveragedMetagradient(masks=c, draws=draws).finished(task) == c]
    scores = {count: AveragedMetagradient(masks=count, draws=draws)(task).values.numpy() for count in counts}
    return intervals(scores, masks, outputs), scores


def main(folder):
    recipe = banks.digits()
    bank, model = banks.load("digits", recipe), open_model(banks.train_reference(recipe, folder))
    queries = bank.queries["generated"]
    task = Task(model.forward, (model.final,), recipe.train, queries, folder / "trainings", ENGINE, recipe.study)
    at_one = Metagradient(draws=recipe.draws)(task).values.numpy()
    others = {
        name: load_scores(folder / "rows" / name / "generated").values.numpy()
        for name in OTHERS
        if (folder / "rows" / name / "generated").exists()
    }
    truth = same_seed(folder, recipe, model, queries)
    curve, averages = by_masks(task, bank.tables["generated"], recipe.draws)
    scores = {
        "metagradient": at_one,
        **({"averaged_metagradient": averages[max(averages)]} if averages else {}),
        **others,
    }
    limit = ceiling(
        bank.tables["generated"].role("test").outputs, bank.tables["generated"].role("test").subsets
    ).spearman
    dropped = {f"{f:g}": intervals(scores, masks, losses) for f, (masks, losses) in truth.items()}
    result = {
        "same seed, dropped fraction": dropped,
        "masks": curve,
        "ceiling": [limit.estimate, limit.low, limit.high],
    }
    return result, truth, at_one


def figure(result, truth, at_one, path):
    drawing, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    dropped = result["same seed, dropped fraction"]
    for name in next(iter(dropped.values())):
        values = np.array([row[name] for row in dropped.values()])
        x = [100 * float(f) for f in dropped]
        line = left.plot(x, values[:, 0], "o-", ms=4, label=name)[0]
        left.fill_between(x, values[:, 1], values[:, 2], alpha=0.15, color=line.get_color(), lw=0)
    left.set_xscale("log")
    left.set_xlabel("images dropped, %; same seed")
    left.set_title("LDS", loc="left", fontsize=10)
    left.legend(fontsize=7, frameon=False)
    if result["masks"]:
        values, x = np.array(list(result["masks"].values())), list(result["masks"])
        middle.plot(x, values[:, 0], "o-", ms=4, color="#0b66c3")
        middle.fill_between(x, values[:, 1], values[:, 2], alpha=0.15, color="#0b66c3", lw=0)
    middle.axhline(result["ceiling"][0], ls="--", color="0.3", lw=1)
    middle.set_xlabel("masks averaged; 50 % subsets, other seeds")
    middle.set_title("LDS of averaged metagradients, and the ceiling", loc="left", fontsize=10)
    masks, losses = truth[0.05]
    predicted = -predict(at_one, masks)
    for query in range(3):
        right.plot(_centred(predicted[:, query]), _centred(losses[:, query]), "o", ms=3, label=f"drawn-{query:04d}")
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], color="0.6", lw=0.8)
    right.set_xlabel("predicted change of the loss, 5 % dropped, same seed")
    right.set_title("true change", loc="left", fontsize=10)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


def _centred(values):
    return values - values.mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "bench-digits"
    result, truth, at_one = main(folder)
    record("metagradient", {"question": __doc__.split("\n")[0], **result})
    figure(result, truth, at_one, ROOT / "benchmarks" / "results" / "metagradient.png")
