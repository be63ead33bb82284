"""What do common seeds buy: the noise ceiling of a bank with 2, 4 ... of its seeds, from two-way and one-way analysis?

python benchmarks/common_seeds.py ICONS      a minute; reads the shipped icons bank

ICONS: the folder with train/ and val/ that the bank was made from. One-way takes for noise what a seed does to all subsets
alike, as banks whose subsets have seeds of their own must.
"""

import sys
from pathlib import Path

import numpy as np

from _record import record
from whence.evaluation import banks
from whence.evaluation.ceiling import ceiling, reliability
from whence.evaluation.lds import bootstrap, predict


def main(folder):
    recipe = banks.icons(folder)
    bank = banks.load("icons", recipe)
    found = {"units": len(bank.tables["heldout"].units), "training_seconds": bank.manifest["training_seconds"]}
    for kind in banks.QUERIES:
        table = bank.tables[kind].role("test")
        rows, first = {}, min(table.seeds)
        for count in range(2, len(set(table.seeds.tolist())) + 1, 2):
            here = table.seeds < first + count
            outputs, subsets, seeds = table.outputs[here], table.subsets[here], table.seeds[here]
            two, one = ceiling(outputs, subsets, seeds).spearman, ceiling(outputs, subsets).spearman
            rows[count] = {
                "one_seed": float(np.nanmean(reliability(outputs, subsets, seeds).one_seed)),
                "ceiling": [two.estimate, two.low, two.high],
                "ceiling_one_way": [one.estimate, one.low, one.high],
            }
        masks, outputs = table.averaged()
        near = bootstrap({"pixel_cosine": predict(_cosine(bank.queries[kind], recipe.train), masks)}, outputs)
        pixels = near.interval("pixel_cosine")
        found[kind] = {"seeds": rows, "pixel_cosine": [pixels.estimate, pixels.low, pixels.high]}
    return found


def _cosine(queries, train):
    q, x = (some.batch(range(len(some))).x0.flatten(1).double().numpy() for some in (queries, train))
    return (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T


if __name__ == "__main__":
    record("common_seeds", {"question": __doc__.split("\n")[0], **main(Path(sys.argv[1]))})
