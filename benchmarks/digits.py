"""How close does every method come to retraining on the digits bank?

python benchmarks/digits.py [FOLDER]      about ten minutes of one core; goes on where an earlier run stopped
"""

import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from _record import ROOT, record
from whence import banks, bench

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs" / "bench-digits"
    recipe = banks.digits()
    result = bench.run(banks.load("digits", recipe), recipe, folder)
    record("bench-digits", {"question": __doc__.split("\n")[0], **result})
    shutil.copy(folder / "bench.png", ROOT / "benchmarks" / "results" / "bench-digits.png")
    Console(width=170).print(bench.grid(result))
