"""How well do gradients through training foresee retraining?

python benchmarks/metagradient.py [FOLDER]      about half an hour of one core for (a) and (b)

On the digits bank, generated queries. (a) Same seed: the reference model is retrained without random 1, 5, 20 and 50 % of
its images, everything else being equal; LDS of the metagradient at w = 1 and of other methods. (b) The standard question,
other seeds and 50 % subsets: LDS of averaged metagradients against the number of masks, as many as there are in
FOLDER/trainings (`python benchmarks/digits.py --train` computes them), and of the plain derivatives, where there are any.
(c) Predicted against true rises of the loss. (d) Sharing replays: LDS of the metagradient at w = 1 from `rank` replays for
all queries (`unroll.sketched`), here by projecting the full matrix as it would.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from _record import RESULTS, RUNS, SMOKE, digits, digits_bank, numbers, record
from whence.diffusion.outputs import loss
from whence.evaluation import banks, designs
from whence.evaluation.lds import bootstrap, lds, predict
from whence.evaluation.ledger import Ledger
from whence.methods.metagradient import AveragedMetagradient, Metagradient
from whence.models import open_model
from whence.storage.scores import load_scores
from whence.training.unroll import Queries, Run
from whence.training.unroll.measured import slopes_at_the_end
from whence.training.unroll.run import Trainer
from whence.types import Engine, Task

FRACTIONS, SUBSETS = (0.01, 0.05, 0.2, 0.5), 32
RANKS = (5, 10, 20, 50, 100)
MASKS = tuple(range(2, 33, 2))
WAYS = {"gauss-newton, resampled": {}, "plain derivative": {"curvature": "hessian", "resample_draws": None}}
OTHERS = ("tracin", "influence", "d_trak", "ek_fac", "pixel_cosine")
ENGINE = Engine(budget=2**31)
if SMOKE:
    FRACTIONS, SUBSETS, RANKS, MASKS = (0.05, 0.5), 4, (2,), (4,)


def dropped(folder, recipe, queries, fractions, seeds, asked=None):
    """Fraction -> its Table of retrainings without random images, with some seeds, the same for all subsets.

    asked: the output and its draws; by default the loss, on the draws of the bank.
    """
    output, draws = asked or (loss, recipe.draws)
    n = len(recipe.train)
    subsets = [
        replace(subset, seeds=seeds, design=f"dropped({f:g})")
        for number, f in enumerate(fractions)
        for subset in designs.fixed(n, SUBSETS, 1 - f, seeds, "test", seed=100 + number)
    ]
    ledger = Ledger.plan(folder, recipe.study, recipe.train, subsets, recipe.stack)
    ledger.run(engine=ENGINE)
    ledger.measure(output.name, queries, output, draws, ENGINE)
    table, found = ledger.table(output.name), {}
    for f in fractions:
        here = [k for k, unit in enumerate(table.units) if unit.design == f"dropped({f:g})"]
        units = [table.units[k] for k in here]
        found[f] = replace(table, units=units, masks=table.masks[here], values=table.values[here])
    return found


def shared(values, recipe, model, queries, truth):
    """rank -> dropped fraction -> LDS: Y Q Q^T with Q a basis of the rows of Z Y, each query by its slope at the end."""
    run = Run.of(recipe.study, recipe.train, engine=ENGINE)
    final = {name: p.detach() for name, p in model.final.load().named_parameters()}
    asked = Queries(queries, loss, recipe.draws)
    slopes = slopes_at_the_end(Trainer(run), asked, final, range(len(queries)))
    y, found = torch.from_numpy(values), {}
    for rank in RANKS:
        g = torch.Generator().manual_seed(rank)
        mix = torch.randn(rank, len(y), generator=g, dtype=torch.float64) / slopes.norm(dim=1).double()
        basis = torch.linalg.qr((mix @ y).mT).Q
        near = (y @ basis @ basis.mT).numpy()
        found[str(rank)] = {f"{f:g}": float(lds(near, *truth[f]).mean()) for f in FRACTIONS}
    return found


def intervals(scores, masks, outputs):
    judged = bootstrap({name: predict(values, masks) for name, values in scores.items()}, outputs)
    return {name: numbers(judged.interval(name)) for name in scores}


def by_masks(task, table, draws, way):
    """Number of masks -> LDS of the average over those that are there, and its scores."""
    masks, outputs = table.role("test").averaged()
    methods = [AveragedMetagradient(masks=count, draws=draws, redraw=False, **way) for count in MASKS]
    scores = {method.masks: method(task).values.numpy() for method in methods if method.finished(task) == method.masks}
    return intervals(scores, masks, outputs), scores


def main(folder):
    recipe = digits()
    bank, model = digits_bank(recipe), open_model(banks.train_reference(recipe, folder))
    queries = bank.queries["generated"]
    task = Task(model.forward, (model.final,), recipe.train, queries, folder / "trainings", ENGINE, study=recipe.study)
    at_one = Metagradient(draws=recipe.draws)(task).values.numpy()
    others = {
        name: load_scores(folder / "rows" / name / "generated").values.numpy()
        for name in OTHERS
        if (folder / "rows" / name / "generated").exists()
    }
    own = dropped(folder / "same-seed", recipe, queries, FRACTIONS, (recipe.study.recipe.seed,))
    truth = {f: table.averaged() for f, table in own.items()}
    curves, averages = {}, {}
    for kind in banks.QUERIES:
        here = replace(task, queries=bank.queries[kind])
        for name, way in WAYS.items():
            curves[f"{kind}, {name}"], found = by_masks(here, bank.tables[kind], recipe.draws, way)
            if kind == "generated" and not way:
                averages = found
    scores = {
        "metagradient": at_one,
        **({"averaged_metagradient": averages[max(averages)]} if averages else {}),
        **others,
    }
    limits = {}
    for kind in banks.QUERIES:
        limits[kind] = numbers(bank.tables[kind].role("test").ceiling().spearman)
    result = {
        "same seed, dropped fraction": {f"{f:g}": intervals(scores, *rows) for f, rows in truth.items()},
        "masks": curves,
        "ceiling": limits,
        "rank, dropped fraction": shared(at_one, recipe, model, queries, truth),
    }
    return result, truth, at_one


def figure(result, truth, at_one, path):
    bound = json.loads((path.parent / "linear.json").read_text())
    drawing, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    dropped = result["same seed, dropped fraction"]
    for name in next(iter(dropped.values())):
        values = np.array([row[name] for row in dropped.values()])
        x = [100 * float(f) for f in dropped]
        line = left.plot(x, values[:, 0], "o-", ms=4, label=name)[0]
        left.fill_between(x, values[:, 1], values[:, 2], alpha=0.15, color=line.get_color(), lw=0)
    left.set_xscale("log")
    left.set_xlabel("images dropped, %; same seed")
    left.set_title("LDS", loc="left", fontsize=10)
    left.set_ylim(0, 1.02)
    left.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.86))
    for kind, color in zip(banks.QUERIES, ("#0b66c3", "#c34a0b"), strict=True):
        for name, style in zip(WAYS, ("o-", "o:"), strict=True):
            curve = result["masks"][f"{kind}, {name}"]
            if not curve:
                continue
            values, x = np.array(list(curve.values())), list(curve)
            middle.plot(x, values[:, 0], style, ms=4, color=color, label=f"{kind}, {name}")
            middle.fill_between(x, values[:, 1], values[:, 2], alpha=0.12, color=color, lw=0)
        middle.axhline(result["ceiling"][kind][0], ls="--", color=color, lw=1)
        middle.axhline(bound[kind]["linear ceiling"], ls=":", color=color, lw=1)
    middle.set_ylim(0.25, 0.97)
    middle.xaxis.get_major_locator().set_params(integer=True)
    middle.legend(fontsize=7, frameon=False, loc="lower right")
    middle.set_xlabel("masks averaged; 50 % subsets, other seeds")
    middle.set_title("LDS; ceilings dashed, linear bound dotted", loc="left", fontsize=10)
    masks, losses = truth[0.05]
    predicted = -predict(at_one, masks)
    for query in range(3):
        right.plot(
            1e3 * _centred(predicted[:, query]), 1e3 * _centred(losses[:, query]), "o", ms=3, label=f"drawn-{query:04d}"
        )
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], color="0.6", lw=0.8)
    right.set_xlabel("predicted change of the loss x 1000; 5 % dropped")
    right.set_title("true change x 1000", loc="left", fontsize=10)
    right.legend(fontsize=7, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=150)


def _centred(values):
    return values - values.mean()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    result, truth, at_one = main(folder)
    record("metagradient", {"question": __doc__.split("\n")[0], **result})
    figure(result, truth, at_one, RESULTS / "metagradient.png")
