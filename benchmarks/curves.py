"""LDS against damping (TRAK, D-TRAK, EK-FAC), number of draws and projection width (TRAK, D-TRAK) on the digits bank.

python benchmarks/curves.py [FOLDER]      about twenty minutes of one core; goes on where an earlier run stopped

The dampings of the second and third figure are chosen on tune subsets, point by point; what is shown is from test subsets.
The first figure is read from the rows of `python benchmarks/digits.py` in FOLDER.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from _record import RESULTS, RUNS, SMOKE, digits, digits_bank, record
from whence.diffusion.draws import uniform
from whence.evaluation import banks, bench
from whence.storage.files import read_json
from whence.types import Engine

METHODS = {"trak": "#0b66c3", "d_trak": "#d1600c", "ek_fac": "#2a8a3e"}
PROJECTED = ("trak", "d_trak")  # EK-FAC has no projection, and takes a minute for each number of draws
DRAWS = (1, 2, 5, 10, 20, 50, 100)
DIM, DIMS = 4096, (64, 256, 1024, 4096, 16384, None)
if SMOKE:
    DRAWS, DIM, DIMS = (2,), 8, (8,)


def lds_of(folder, name, names, settings, bank, recipe):
    """LDS rows of some methods at one setting."""
    root = folder / "curves" / name
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "model").exists():
        (root / "model").symlink_to((folder / "model").resolve())
    rows = bench.run(bank, recipe, root, names, settings, Engine(budget=2**30))["rows"]
    return {
        method: {kind: [row[kind][part] for part in ("lds", "low", "high")] for kind in banks.QUERIES}
        for method, row in rows.items()
    }


def main(folder):
    recipe = digits()
    bank = digits_bank(recipe)
    banks.train_reference(recipe, folder)
    damping = {
        name: {kind: row[kind]["curve"] for kind in banks.QUERIES}
        for name in METHODS
        if (row := read_json(folder / "rows" / name / "row.json"))
    }
    draws = {
        count: lds_of(folder, f"draws-{count}", PROJECTED, bench.Settings(uniform(count), DIM), bank, recipe)
        for count in DRAWS
    }
    dims = {
        str(dim or "all"): lds_of(
            folder, f"dim-{dim}", PROJECTED, bench.Settings(uniform(max(DRAWS)), dim), bank, recipe
        )
        for dim in DIMS
    }
    return {"damping [value, tune, test]": damping, "draws": draws, "dim": dims}


def figures(result, folder):
    """Three PNG files: solid for held-out queries, dashed for generated ones."""
    styles = {"heldout": "-", "generated": "--"}

    def finish(axes, drawing, name, label):
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("LDS on test subsets")
        axes.spines[["top", "right"]].set_visible(False)
        drawing.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3 if name == "damping" else 4)
        drawing.savefig(folder / f"curve-{name}.png", dpi=150)
        plt.close(drawing)

    drawing, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in METHODS.items():
        for kind, style in styles.items():
            curve = np.array(result["damping [value, tune, test]"][name][kind])
            axes.plot(curve[:, 0], curve[:, 2], style, marker="o", ms=3, color=colour, label=f"{name}, {kind}")
    finish(axes, drawing, "damping", "damping, in units of the mean eigenvalue")

    for what, label in (("draws", "draws per image"), ("dim", "columns of the projection (right end: none)")):
        drawing, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        points = result[what]
        x = [int(key) if str(key) != "all" else 4 * DIMS[-2] for key in points]
        for name in next(iter(points.values())):
            for kind, style in styles.items():
                values = np.array([row[name][kind] for row in points.values()])
                axes.plot(x, values[:, 0], style, marker="o", ms=3, color=METHODS[name], label=f"{name}, {kind}")
                axes.fill_between(x, values[:, 1], values[:, 2], alpha=0.1, color=METHODS[name], lw=0)
        finish(axes, drawing, what, label)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    result = main(folder)
    record("curves", {"question": __doc__.split("\n")[0], **result})
    figures(result, RESULTS)
