"""Do averaged metagradients foresee the removal of few images at other seeds, too?

python benchmarks/small_removals.py [FOLDER]      about forty minutes of one core; goes on where it was cut off

On the digits bank, generated queries: random 1 % and 5 % of the images left out, 32 subsets each, the mean over four seeds
that are the same for all subsets. LDS with intervals beside the ceiling: of what digits.py left in FOLDER (--train too).
"""

import sys
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, digits_bank, numbers, record
from metagradient import dropped, intervals
from whence.storage.scores import load_scores

FRACTIONS, SEEDS = (0.01, 0.05), (5000, 5001, 5002, 5003)
METHODS = ("averaged_metagradient", "metagradient", "further_training", "ek_fac", "trak", "d_trak", "pixel_cosine")
if SMOKE:
    FRACTIONS, SEEDS = (0.05,), (5000, 5001)


def main(folder):
    recipe = digits()
    queries, found = digits_bank(recipe).queries["generated"], {}
    paths = {name: folder / "rows" / name / "generated" for name in METHODS}
    scores = {name: load_scores(path).values.numpy() for name, path in paths.items() if path.exists()}
    for f, table in dropped(folder / "other-seeds", recipe, queries, FRACTIONS, SEEDS).items():
        ceiling = numbers(table.ceiling().spearman)
        found[f"{f:g}"] = {"lds": intervals(scores, *table.averaged()), "ceiling": ceiling}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    record("small_removals", {"question": __doc__.split("\n")[0], "dropped fraction": main(folder)})
