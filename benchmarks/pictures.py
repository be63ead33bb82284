"""How close does every method come to retraining on real pictures with a convolutional network?

python benchmarks/pictures.py icons|photos DATA [METHOD ...]      about four hours of one core, or some rows

DATA: the folder with train/ and val/ that the bank was made from. What is finished lies in runs/bench-icons, and is not
computed again. Rows that train again are computed where they are named.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, digits_bank
from digits import board
from whence.evaluation import banks

if __name__ == "__main__":
    torch.set_num_threads(1)
    if SMOKE:  # the pictures are no part of the project: the tiny bank of digits shows that it runs
        recipe, folder, names = digits(), RUNS / "bench-pictures", None
        bank = replace(digits_bank(recipe), name="icons")
    else:
        name, data, *names = sys.argv[1:]
        recipe, folder = banks.by_name(name, Path(data)), RUNS / f"bench-{name}"
        bank = banks.load(name, recipe)
    board(__doc__.split("\n")[0], bank, recipe, folder, False, names or None)
