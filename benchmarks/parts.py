"""What does each part of averaged_metagradient give, and have its scores the right size?

python benchmarks/parts.py [FOLDER]         an hour of one core; goes on where it was cut off

On the digits bank, the first 20 queries of both kinds, measured at the bank's draws, with what digits.py left in the folder.
One mask, and it with its complement; the plain derivative of the training, the Gauss-Newton matrix on the way back, and
slopes at draws of their own along the path. More draws and more points than the defaults, too.

lds        on test subsets, with two-way bootstrap intervals
gain       of each row over the one before it, paired
slope      of the regression of the outcomes of the test subsets on the sums that are foreseen, both without their means over
           subsets, over all queries: 1 where scores have the right size
seconds    of the processor
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, digits_bank, numbers, record
from whence.data.images import subset
from whence.evaluation import banks
from whence.evaluation.lds import bootstrap, predict
from whence.methods.metagradient import AveragedMetagradient
from whence.models import open_model
from whence.types import Engine, Task

QUERIES = 2 if SMOKE else 20
DEFAULT = AveragedMetagradient(masks=1, pairs=False, redraw=False)
PLAIN = {"curvature": "hessian", "resample_draws": None}
ROWS = {
    "plain derivative": PLAIN,
    "Gauss-Newton": {"resample_draws": None},
    "Gauss-Newton, slopes at 16 draws every 16th step": {},
    "the same, a mask and its complement": {"masks": 2, "pairs": True},
    "the same, 32 draws": {"masks": 2, "pairs": True, "resample_draws": 32},
    "the same, 16 draws every 8th step": {"masks": 2, "pairs": True, "resample_every": 8},
    "plain derivative, a mask and its complement": {"masks": 2, "pairs": True, **PLAIN},
}


def slope(predicted, outcomes):
    """Of outcomes on what is foreseen [r, m], without their means over subsets."""
    x, y = (values - values.mean(0) for values in (predicted, outcomes))
    return float((x * y).sum() / (x * x).sum())


def main(bank, recipe, folder):
    model, found = open_model(banks.train_reference(recipe, folder)), {}
    for kind in banks.QUERIES:
        queries = subset(bank.queries[kind], range(QUERIES))
        task = Task(
            model.forward,
            (model.final,),
            recipe.train,
            queries,
            folder / "parts",
            Engine(budget=2**31),
            study=recipe.study,
        )
        table = bank.tables[kind]
        masks, outputs = table.role("test").averaged()
        outputs, values, seconds = outputs[:, :QUERIES], {}, {}
        for name, settings in ROWS.items():
            begun = time.process_time()
            values[name] = replace(DEFAULT, draws=recipe.draws, **settings).estimate(task).values
            seconds[name] = time.process_time() - begun
            print(kind, name, round(seconds[name]), flush=True)
        predictions = {name: predict(each, masks) for name, each in values.items()}
        judge, names = bootstrap(predictions, outputs, table.better or "lower"), list(ROWS)
        sign = -1 if (table.better or "lower") == "lower" else 1  # scores say by how much a query gets better
        for name, before in zip(names, [names[0], *names], strict=False):
            found.setdefault(name, {})[kind] = {
                "lds": numbers(judge.interval(name)),
                "gain": numbers(judge.difference(name, before)),
                "slope": slope(predictions[name], sign * outputs),
                "seconds": seconds[name],
            }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = digits()
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 and not SMOKE else RUNS / "bench-digits"
    record(
        "parts",
        {"question": __doc__.split("\n")[0], "queries": QUERIES, "rows": main(digits_bank(recipe), recipe, folder)},
    )
