"""What do common seeds buy: the noise ceiling of a bank with 2, 4 ... of its seeds, from two-way and one-way analysis?

python benchmarks/common_seeds.py [ICONS]      a minute; reads the shipped icons bank

ICONS: the folder with train/ and val/ that the bank was made from, for the LDS of raw pixels beside the ceiling. One-way
takes for noise what a seed does to all subsets alike, as banks whose subsets have seeds of their own must.
"""

import sys
from pathlib import Path

import numpy as np

from _record import near_in_pixels, numbers, record
from whence.evaluation import banks
from whence.evaluation.ceiling import ceiling, reliability
from whence.evaluation.lds import bootstrap, predict
from whence.storage.files import read_json

BANK = banks.SHIPPED / "icons"


def main(folder):
    manifest = read_json(BANK / "manifest.json")
    found = {"units": len(manifest["units"]), "training_seconds": manifest["training_seconds"]}
    for kind, every in banks.tables(BANK, manifest).items():
        table = every.role("test")
        rows, first = {}, min(table.seeds)
        for count in range(2, len(set(table.seeds.tolist())) + 1, 2):
            here = table.seeds < first + count
            outputs, subsets, seeds = table.outputs[here], table.subsets[here], table.seeds[here]
            two, one = ceiling(outputs, subsets, seeds).spearman, ceiling(outputs, subsets).spearman
            rows[count] = {
                "one_seed": float(np.nanmean(reliability(outputs, subsets, seeds).one_seed)),
                "ceiling": numbers(two),
                "ceiling_one_way": numbers(one),
            }
        found[kind] = {"seeds": rows}
        if folder is not None:
            found[kind]["pixel_cosine"] = pixels(kind, banks.icons(folder), table)
    return found


def pixels(kind, recipe, table):
    """The LDS of the cosine of raw pixels: estimate, low, high."""
    masks, outputs = table.averaged()
    near = near_in_pixels(banks.load("icons", recipe).queries[kind], recipe.train)
    return numbers(bootstrap({"pixel_cosine": predict(near, masks)}, outputs).interval("pixel_cosine"))


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    record("common_seeds", {"question": __doc__.split("\n")[0], **main(given)})
