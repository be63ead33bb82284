"""Does the digits bank gain from common seeds: its ceiling with own seeds and with the same seeds for all subsets?

python benchmarks/digits_seeds.py [FOLDER]      a quarter of an hour of one core; goes on where it was cut off

The bank's test subsets are trained again with three seeds that all of them share; queries and draws are the same. Beside
it the bank as it ships, with all five of its own seeds and with the first three: the noise ceiling, and the LDS of raw
pixels, which a better truth raises for every method alike.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from _record import RUNS, digits, digits_bank, near_in_pixels, numbers, record
from whence.diffusion.outputs import loss
from whence.evaluation.lds import bootstrap, predict
from whence.evaluation.ledger import Ledger
from whence.types import Engine

ENGINE, SEEDS = Engine(budget=2**31), (7000, 7001, 7002)


def told(table, near):
    masks, outputs = table.averaged()
    judged = bootstrap({"pixels": predict(near, masks)}, outputs, table.better or "lower")
    return {"ceiling": numbers(table.ceiling().spearman), "pixel_cosine": numbers(judged.interval("pixels"))}


def first_seeds(table, count):
    """The first so many trainings of every subset."""
    seen, kept = {}, []
    for row, unit in enumerate(table.units):
        seen[unit.subset] = seen.get(unit.subset, 0) + 1
        if seen[unit.subset] <= count:
            kept.append(row)
    return replace(table, units=[table.units[k] for k in kept], masks=table.masks[kept], values=table.values[kept])


def main(folder):
    recipe = digits()
    bank = digits_bank(recipe)
    masks = {s.mask.tobytes(): replace(s, seeds=SEEDS) for s in recipe.subsets if s.role == "test"}
    ledger = Ledger.plan(folder, recipe.study, recipe.train, list(masks.values()), recipe.stack)
    ledger.run(engine=ENGINE)
    found = {}
    for kind, queries in bank.queries.items():
        ledger.measure(kind, queries, loss, recipe.draws, ENGINE)
        own, near = bank.tables[kind].role("test"), near_in_pixels(queries, recipe.train)
        found[kind] = {
            "own seeds, all": told(own, near),
            f"own seeds, {len(SEEDS)}": told(first_seeds(own, len(SEEDS)), near),
            f"common seeds, {len(SEEDS)}": told(ledger.table(kind).role("test"), near),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "digits-seeds"
    record("digits_seeds", {"question": __doc__.split("\n")[0], **main(folder)})
