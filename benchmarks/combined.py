"""Does further training gain from EK-FAC: is a mixture of their scores better than either?

python benchmarks/combined.py [FOLDER]      a minute, where digits.py has computed both rows; ten else

    (1 - s) z(further) + s z(ek_fac)      z: of each query, mean 0 and variance 1 over the training images

The share s is chosen on tune subsets, the mixture is judged on test subsets: LDS with intervals, paired difference to
further training alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from _record import RUNS, SMOKE, digits, digits_bank, numbers, record
from whence.diffusion.draws import uniform
from whence.evaluation import banks, bench
from whence.evaluation.lds import bootstrap, lds, predict
from whence.storage.scores import load_scores
from whence.types import Engine

NAMES, SHARES, SETTINGS = ("further_training", "ek_fac"), np.arange(0, 1.01, 0.1), bench.Settings()
if SMOKE:  # what trains again is tried by other scripts
    NAMES, SETTINGS = ("trak", "pixel_cosine"), bench.Settings(uniform(2), 8)


def even(values):
    """Each row with mean 0 and variance 1."""
    return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


def main(folder):
    recipe = digits()
    bank, found = digits_bank(recipe), {}
    bench.run(bank, recipe, folder, NAMES, SETTINGS, Engine(budget=2**31))
    for kind in banks.QUERIES:
        first, second = (even(load_scores(folder / "rows" / name / kind).values.numpy()) for name in NAMES)
        mixed = {float(share): (1 - share) * first + share * second for share in SHARES}
        tuned = bank.tables[kind].role("tune").averaged()
        on_tune = {share: float(np.nanmean(lds(values, *tuned))) for share, values in mixed.items()}
        chosen = max(on_tune, key=on_tune.__getitem__)
        masks, outputs = bank.tables[kind].role("test").averaged()
        scores = {"mixed": mixed[chosen], NAMES[0]: first, NAMES[1]: second}
        judged = bootstrap({name: predict(values, masks) for name, values in scores.items()}, outputs)
        found[kind] = {
            "share": chosen,
            "tune": on_tune,
            "lds": {name: numbers(judged.interval(name)) for name in scores},
            "over the first": numbers(judged.difference("mixed", NAMES[0])),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    record("combined", {"question": __doc__.split("\n")[0], **main(folder)})
