"""How close does every method come to retraining on the digits bank?

python benchmarks/digits.py [FOLDER] [--train]      about half an hour of one core; goes on where an earlier run stopped
python benchmarks/digits.py --smoke                 some rows of a tiny bank, to see that it runs

--train adds the rows that train again: an hour of one slow core for 4 masks, kept in FOLDER/trainings.
"""

import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from _record import RESULTS, RUNS, SMOKE, digits, digits_bank, record
from whence.diffusion.draws import uniform
from whence.evaluation import bench
from whence.types import Engine


def board(question, bank, recipe, folder, again, names=None):
    """The rows of a bank, all or some, in benchmarks/results/bench-BANK.json and .png; with those that train again or
    without. Rows that were finished before are shown, too."""
    engine, settings = Engine(budget=2**31), bench.Settings()
    if SMOKE:
        names, settings = ("pixel_cosine", "trak", "d_trak", "ek_fac"), bench.Settings(uniform(2), 8)
    bench.run(bank, recipe, folder, names, settings, engine)
    if again:
        bench.run(bank, recipe, folder, bench.AGAIN, settings, engine)
    result = bench.judge(bank, folder)
    bench.plot(result, folder / "bench.png")
    record(
        f"bench-{bank.name}", {"question": question, "masks": settings.members, "members": settings.members, **result}
    )
    shutil.copy(folder / "bench.png", RESULTS / f"bench-{bank.name}.png")
    Console(width=170).print(bench.grid(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [argument for argument in sys.argv[1:] if argument != "--train"]
    folder = Path(given[0]) if given else RUNS / "bench-digits"
    recipe = digits()
    board(__doc__.split("\n")[0], digits_bank(recipe), recipe, folder, "--train" in sys.argv or SMOKE)
