"""How much memory does `whence attribute` take as the training images grow from 500 to 2500?

D-TRAK (2 draws, 1024 columns, the default memory budget) on PNG and JPEG pictures of 32x32 and a UNet2DModel so large that
one shard is smaller than the smaller folder, each run in a process of its own; the peak of its resident memory is what the
kernel counted. It may grow by the system of min(n, k)^2 (Gram matrix, eigenvectors and the workspace of LAPACK: four of
them, float64), by one shard of rows, by the scores m n and by the names; not by the pictures, not by the gradients.

    OMP_NUM_THREADS=1 python benchmarks/memory.py
"""

import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image

from _record import SMOKE, record, whence
from whence.data.saving import save_png
from whence.models import new_network, new_scheduler, save_pipeline
from whence.training.study import unet_config

SIDE, WIDTHS, DRAWS, K, QUERIES, SEED = 32, (8, 16, 32), 2, 1024, 4, 0
SIZES = (500, 2500)
if SMOKE:
    SIDE, WIDTHS, K, QUERIES, SIZES = 8, (8, 8), 8, 2, (4, 6)


def prepare(root):
    """A model with initial weights, pictures half PNG half JPEG, and pictures to explain."""
    network = new_network(unet_config(SIDE, 3, WIDTHS), SEED)
    save_pipeline(root / "model", network, network.state_dict(), new_scheduler(1000, "linear", "epsilon"))
    rng = np.random.default_rng(SEED)
    for n in SIZES:
        (root / f"images-{n}").mkdir()
        for i in range(n):
            picture = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
            picture.save(root / f"images-{n}" / f"{i:05d}.{'png' if i % 2 else 'jpg'}")
    save_png(root / "queries", torch.rand(QUERIES, 3, SIDE, SIDE) * 2 - 1, [f"q{i}" for i in range(QUERIES)])
    return sum(p.numel() for p in network.parameters())


def attribute(root, n):
    """One run: bytes at its peak, and seconds."""
    words = [
        "attribute",
        root / "model",
        "--train_data_dir",
        root / f"images-{n}",
        "--query_data_dir",
        root / "queries",
    ]
    started = perf_counter()
    done = whence(*words, "--output_dir", root / f"run-{n}", "--draws", DRAWS, "--dim", K)
    if done.code:
        raise SystemExit(done.err)
    return done.peak_bytes, perf_counter() - started


def main():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = prepare(root)
        peaks, seconds = {}, {}
        for n in SIZES:
            peaks[n], seconds[n] = attribute(root, n)
            print(n, f"{peaks[n] / 1e6:.0f} MB, {seconds[n]:.0f} s", flush=True)
    small, large = SIZES
    gram = 4 * 8 * (min(large, K) ** 2 - min(small, K) ** 2)
    scores = 4 * 8 * QUERIES * (large - small)
    record(
        "memory",
        {
            "question": __doc__.splitlines()[0],
            "network": f"UNet2DModel, block_out_channels {WIDTHS}, {SIDE}x{SIDE}",
            "parameters": size,
            "draws": DRAWS,
            "dim": K,
            "queries": QUERIES,
            "peak_bytes": peaks,
            "seconds": seconds,
            "growth_bytes": peaks[large] - peaks[small],
            "growth_of_the_system_bytes": gram,
            "growth_of_the_scores_bytes": scores,
            "growth_not_accounted_for_bytes": peaks[large] - peaks[small] - gram - scores,
        },
    )


if __name__ == "__main__":
    main()
