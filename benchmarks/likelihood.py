"""Does the metagradient foresee how the log-likelihood of an image changes, as Cohen & Engstrom (2025) found on MNIST?

python benchmarks/likelihood.py [FOLDER]      about ten minutes of one core; goes on where it was cut off

The digits bank's model, held-out queries. The measurement is (1/D) log p(x) by the probability-flow ODE, exact divergence
(output `log_likelihood`). The model is trained again with its own seed without random 1 % and 5 % of its images. For each
query the correlation (Pearson, Spearman) over subsets of what scores foresee and what happened: of the metagradient of the
log-likelihood, of the metagradient of the loss, and of TRAK.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from _record import RUNS, SMOKE, digits, record
from metagradient import dropped
from whence.data.images import subset
from whence.diffusion.draws import uniform
from whence.diffusion.outputs import log_likelihood
from whence.evaluation import banks
from whence.evaluation.lds import lds, predict
from whence.evaluation.tables import pearson_columns
from whence.methods import build
from whence.methods.metagradient import Metagradient
from whence.models import open_model
from whence.types import Engine, Task

ENGINE = Engine(budget=2**31)
FRACTIONS, QUERIES, DRAWS, DIM = (0.01, 0.05), 16, 100, 4096
if SMOKE:
    FRACTIONS, QUERIES, DRAWS, DIM = (0.05,), 2, 2, 8


def main(folder):
    recipe = digits()
    queries, own = subset(recipe.heldout, range(QUERIES)), (recipe.study.recipe.seed,)
    model = open_model(banks.train_reference(recipe, folder))
    task = Task(model.forward, (model.final,), recipe.train, queries, folder / "likelihood", ENGINE, study=recipe.study)
    scores = {
        "metagradient of the log-likelihood": Metagradient(output=log_likelihood, draws=uniform(1))(task),
        "metagradient of the loss": Metagradient(draws=recipe.draws)(task),
        "trak": build("trak", model.forward, {"draws": uniform(DRAWS), "dim": DIM})(task),
    }
    asked, found = (log_likelihood, uniform(1)), {}
    for f, table in dropped(folder / "likelihood-truth", recipe, queries, FRACTIONS, own, asked).items():
        masks, outputs = table.averaged()
        found[f"{f:g}"] = {
            name: {
                "pearson": float(np.nanmean(pearson_columns(predict(each.values.numpy(), masks), outputs))),
                "spearman": float(np.nanmean(lds(each.values.numpy(), masks, outputs, log_likelihood.better))),
            }
            for name, each in scores.items()
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    record("likelihood", {"question": __doc__.split("\n")[0], "dropped fraction": main(folder)})
