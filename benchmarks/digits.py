"""How close does every method come to retraining on the digits bank?

python benchmarks/digits.py [FOLDER] [--train]      about half an hour of one core; goes on where an earlier run stopped
python benchmarks/digits.py --smoke                 two rows, to see that it runs

--train adds the rows that differentiate training: an hour of one slow core for 4 masks, kept in FOLDER/trainings.
"""

import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from _record import RESULTS, ROOT, SMOKE, record
from whence.evaluation import banks, bench
from whence.types import Engine

if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [argument for argument in sys.argv[1:] if argument != "--train"]
    folder = Path(given[0]) if given else ROOT / "runs" / ("smoke" if SMOKE else "") / "bench-digits"
    recipe, engine = banks.digits(), Engine(budget=2**31)
    bank = banks.load("digits", recipe)
    names = ("pixel_dot", "d_trak") if SMOKE else None
    bench.run(bank, recipe, folder, names, engine=engine)
    if "--train" in sys.argv:
        bench.run(bank, recipe, folder, bench.AGAIN, engine=engine)
    result = bench.judge(bank, folder, names)
    bench.plot(result, folder / "bench.png")
    record(
        "bench-digits",
        {
            "question": __doc__.split("\n")[0],
            "masks": bench.Settings().members,
            "members": bench.Settings().members,
            **result,
        },
    )
    shutil.copy(folder / "bench.png", RESULTS / "bench-digits.png")
    Console(width=170).print(bench.grid(result))
