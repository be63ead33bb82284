"""How close does every method come to retraining on real pictures with a convolutional network?

python benchmarks/pictures.py icons|photos DATA [FOLDER] [--train]      an hour or two of one core; goes on where it stopped

DATA: the folder with train/ and val/ that the bank was made from. --train adds the rows that train again.
"""

import sys
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, digits_bank
from digits import board
from whence.evaluation import banks

if __name__ == "__main__":
    torch.set_num_threads(1)
    given, again = [argument for argument in sys.argv[1:] if argument != "--train"], "--train" in sys.argv
    if SMOKE:  # the pictures are no part of the project: the tiny bank of digits shows that it runs
        recipe, folder = digits(), RUNS / "bench-pictures"
        bank = digits_bank(recipe)
    else:
        recipe = banks.by_name(given[0], Path(given[1]))
        bank, folder = banks.load(given[0], recipe), Path(given[2]) if len(given) > 2 else RUNS / f"bench-{given[0]}"
    board(__doc__.split("\n")[0], bank, recipe, folder, again)
