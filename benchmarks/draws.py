"""How much is lost by measuring queries on 20 stratified draws instead of all timesteps?

    python benchmarks/draws.py LEDGER_FOLDER        the ledger of `whence bank digits --output_dir DIR` is DIR/ledger

For 24 half-data models of the digits bank and its first 30 held-out queries: the loss on the bank's own draws against the
mean over every timestep, one noise each (another seed). What matters for LDS is how alike the models are ranked.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from _record import RUNS, SMOKE, digits, digits_bank, record
from whence.data.images import subset
from whence.diffusion.draws import uniform
from whence.diffusion.outputs import loss
from whence.evaluation.lds import spearman
from whence.evaluation.ledger import Ledger, pairs
from whence.features.gradients import measure
from whence.types import Engine

MODELS, QUERIES, TIMESTEPS = 24, 30, 1000
if SMOKE:
    MODELS, QUERIES, TIMESTEPS = 4, 2, 8


def losses(ledger, units, queries, draws):
    """[units, queries]: mean over draws."""
    forward = ledger.study.forward()
    every = list(pairs(queries, draws, forward, Engine()))
    rows = []
    for unit in units:
        module = ledger.load(unit).eval()
        with torch.no_grad():
            values = torch.cat([measure(module, {}, forward, loss, batch, draw) for batch, draw in every])
        rows.append(values.reshape(len(queries), draws.count).mean(1).double().numpy())
    return np.stack(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe = digits()
    if SMOKE:
        digits_bank(recipe)
    ledger = Ledger(RUNS / "bank" / "ledger" if SMOKE else Path(sys.argv[1]), recipe.train)
    one_seed = {unit.subset: unit for unit in reversed(ledger.units) if unit.role == "test"}
    units = [one_seed[key] for key in sorted(one_seed)][:MODELS]
    queries = subset(recipe.heldout, range(QUERIES))
    every = losses(ledger, units, queries, uniform(TIMESTEPS, seed=4242))
    few = losses(ledger, units, queries, recipe.draws)
    pearson = [np.corrcoef(few[:, q], every[:, q])[0, 1] for q in range(QUERIES)]
    record(
        "draws",
        {
            "question": __doc__.split("\n")[0],
            "models": MODELS,
            "queries": QUERIES,
            "draws": recipe.draws.count,
            "mean_loss_few_and_every": [float(few.mean()), float(every.mean())],
            "pearson_over_models_mean": float(np.mean(pearson)),
            "pearson_over_models_min": float(np.min(pearson)),
            "spearman_over_models_mean": float(np.mean(spearman(few, every))),
        },
    )
