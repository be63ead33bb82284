"""How much longer do all per-image features take than plain training steps over the same (image, draw) pairs?

A UNet2DModel of about 0.5 M parameters at 16x16, 10 draws per image, as many images as one shard holds at the default
memory budget, float32. Training: ordinary steps of torch (noise, forward, mean squared error, backward, AdamW) whose
batches are the draws of one image, which is how the features are computed too. Features: `features.rows`, the files on disk
included, without projection, with the sparse one of 4096 columns (the default) and with the dense one of random
signs. Marks: below 4 times training without, below 10 with a projection.

Three rounds, the arms of a round one after the other, so that what else runs on the machine meets all of them; the ratio
is the median over rounds, by the clock and by processor time.

    OMP_NUM_THREADS=1 python benchmarks/features.py
"""

import os
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

os.environ["WHENCE_QUIET"] = "1"

import torch
import torch.nn.functional as F

from _record import SMOKE, record
from whence import SJLT, Checkpoint, Engine, Gradient, Rademacher, tensor_images, uniform
from whence.diffusion.outputs import squared_norm
from whence.features.projections import Identity
from whence.features.rows import rows
from whence.models import forward_of, new_network, new_scheduler
from whence.training.study import unet_config
from whence.types import Task

SIDE, WIDTHS, DRAWS, K, ROUNDS, SEED = 16, (24, 56), 10, 4096, 3, 0
if SMOKE:
    WIDTHS, DRAWS, K, ROUNDS = (8, 8), 2, 16, 1
ARMS = {"no projection": Identity(), "sparse": SJLT(K), "dense": Rademacher(K)}
MARKS = {"no projection": 4, "sparse": 10, "dense": 10}


def train(network, forward, images):
    """A step of AdamW per image, on its draws."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    alphas = forward.alphas_cumprod.float()
    network.train()
    for row in range(len(images)):
        x0 = images.batch([row]).x0.expand(DRAWS, -1, -1, -1)
        t, noise = torch.randint(forward.timesteps, (DRAWS,)), torch.randn(x0.shape)
        signal = alphas[t].reshape(-1, 1, 1, 1)
        predicted = network(signal.sqrt() * x0 + (1 - signal).sqrt() * noise, t, return_dict=False)[0]
        F.mse_loss(predicted, noise).backward()
        optimizer.step()
        optimizer.zero_grad()


def features(projection, task):
    part = Gradient(squared_norm, uniform(DRAWS), projection)
    array = rows(part, task, task.trajectory[0], task.train, "features")
    return len(array.shards)


def timed(work):
    wall, cpu = perf_counter(), process_time()
    work()
    return {"seconds": perf_counter() - wall, "cpu_seconds": process_time() - cpu}


def main():
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = unet_config(SIDE, 3, WIDTHS)
    network = new_network(config, SEED)
    forward = forward_of(network, new_scheduler(1000, "linear", "epsilon"))
    size = sum(p.numel() for p in network.parameters())
    count = 3 if SMOKE else Engine().budget // (4 * size)
    images = tensor_images(torch.rand(count, 3, SIDE, SIDE) * 2 - 1)
    # Features are of a network of their own: training changes the other.
    point = Checkpoint(lambda: new_network(config, SEED), "benchmark")
    train(network, forward, tensor_images(images.x0[:2]))  # the first call loads libraries
    rounds, shards = [], {}
    for _ in range(ROUNDS):
        times = {"training": timed(lambda: train(network, forward, images))}
        for arm, projection in ARMS.items():
            with tempfile.TemporaryDirectory() as folder:
                task = Task(forward, (point,), images, images, Path(folder))
                times[arm] = timed(lambda p=projection, t=task, a=arm: shards.update({a: features(p, t)}))
        print({arm: round(took["seconds"], 2) for arm, took in times.items()}, flush=True)
        rounds.append(times)

    def ratio(arm, clock):
        return median(times[arm][clock] / times["training"][clock] for times in rounds)

    found = {arm: {clock: ratio(arm, clock) for clock in ("seconds", "cpu_seconds")} for arm in MARKS}
    record(
        "features",
        {
            "question": __doc__.splitlines()[0],
            "network": f"UNet2DModel, block_out_channels {WIDTHS}, {SIDE}x{SIDE}",
            "parameters": size,
            "images": count,
            "draws": DRAWS,
            "dim": K,
            "shards": shards,
            "seed": SEED,
            "load": os.getloadavg()[0],
            "rounds": rounds,
            "times_training": found,
            "marks": MARKS,
            "met": {arm: found[arm]["seconds"] < mark for arm, mark in MARKS.items()},
        },
    )


if __name__ == "__main__":
    main()
