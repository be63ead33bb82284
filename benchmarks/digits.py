"""How close does every method come to retraining on the digits bank?

python benchmarks/digits.py [FOLDER] [METHOD ...] [--train]      half an hour of one core, or some rows; resumable
python benchmarks/digits.py --smoke                 some rows of a tiny bank, to see that it runs

--train adds the rows that train again: an hour of one slow core for 4 masks, kept in FOLDER/trainings.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from _record import RESULTS, RUNS, SMOKE, commit, digits, digits_bank, record
from whence.diffusion.draws import uniform
from whence.evaluation import banks, bench
from whence.types import Engine


def board(question, bank, recipe, folder, again, names=None):
    """The rows of a bank, all or some, in benchmarks/results/bench-BANK.json and .png; with those that train again or
    without. Rows that are not in the folder, but in these results of the same bank, are kept, each with its commit."""
    engine, settings = Engine(budget=2**31), bench.Settings()
    if SMOKE:
        names, settings = ("pixel_cosine", "trak", "d_trak", "ek_fac"), bench.Settings(uniform(2), 8)
    bench.run(bank, recipe, folder, names, settings, engine)
    if again:
        bench.run(bank, recipe, folder, bench.AGAIN, settings, engine)
    result = with_earlier(bench.judge(bank, folder), RESULTS / f"bench-{bank.name}.json")
    bench.plot(result, folder / "bench.png")
    record(
        f"bench-{bank.name}", {"question": question, "masks": settings.members, "members": settings.members, **result}
    )
    shutil.copy(folder / "bench.png", RESULTS / f"bench-{bank.name}.png")
    Console(width=170).print(bench.grid(result))


def with_earlier(result, path):
    """The result, with rows of the results at a path that it lacks."""
    for row in result["rows"].values():
        row["commit"] = commit()
    earlier = json.loads(path.read_text()) if path.exists() else {}
    limits = [[r["ceiling"][kind]["estimate"] for kind in banks.QUERIES] for r in (earlier, result) if "ceiling" in r]
    if len(limits) == 2 and np.allclose(limits[0], limits[1], rtol=1e-9):  # of the same bank
        old = {name: {"commit": earlier["commit"], **row} for name, row in earlier["rows"].items()}
        result = {**result, "rows": old | result["rows"], "skipped": earlier["skipped"] | result["skipped"]}
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [argument for argument in sys.argv[1:] if argument != "--train"]
    folder = Path(given[0]) if given else RUNS / "bench-digits"
    recipe = digits()
    again = "--train" in sys.argv or SMOKE
    board(__doc__.split("\n")[0], digits_bank(recipe), recipe, folder, again, given[1:] or None)
