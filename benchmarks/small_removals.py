"""Do averaged metagradients foresee the removal of few images at other seeds, too?

python benchmarks/small_removals.py [FOLDER]      about two hours of one core; goes on where it was cut off

On the digits bank, generated queries: random 1 % and 5 % of the images left out, 32 subsets each, the mean over four seeds
that are the same for all subsets. LDS with intervals beside the ceiling. Rows that digits.py left in FOLDER are taken.
"""

import sys
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, digits_bank, numbers, record
from metagradient import ENGINE, dropped, intervals
from whence.diffusion.draws import uniform
from whence.evaluation import banks, bench
from whence.methods.metagradient import AveragedMetagradient
from whence.models import open_model
from whence.storage.scores import load_scores
from whence.types import Task

FRACTIONS, SEEDS = (0.01, 0.05), (5000, 5001, 5002, 5003)
METHODS = ("further_training", "ek_fac", "trak", "d_trak", "pixel_cosine")
SETTINGS, MASKS = bench.Settings(), 4
if SMOKE:
    FRACTIONS, SEEDS, METHODS = (0.05,), (5000, 5001), ("trak", "pixel_cosine")
    SETTINGS, MASKS = bench.Settings(uniform(2), 8), 2


def main(folder):
    recipe = digits()
    bank, found = digits_bank(recipe), {}
    queries, model = bank.queries["generated"], open_model(banks.train_reference(recipe, folder))
    bench.run(bank, recipe, folder, METHODS, SETTINGS, ENGINE)
    scores = {name: load_scores(folder / "rows" / name / "generated").values.numpy() for name in METHODS}
    task = Task(model.forward, (model.final,), recipe.train, queries, folder / "trainings", ENGINE, study=recipe.study)
    averaged = AveragedMetagradient(masks=MASKS, draws=recipe.draws, redraw=False)
    scores["averaged_metagradient"] = averaged(task).values.numpy()
    for f, table in dropped(folder / "other-seeds", recipe, queries, FRACTIONS, SEEDS).items():
        ceiling = numbers(table.ceiling().spearman)
        found[f"{f:g}"] = {"lds": intervals(scores, *table.averaged()), "ceiling": ceiling}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    record("small_removals", {"question": __doc__.split("\n")[0], "dropped fraction": main(folder)})
