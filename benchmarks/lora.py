"""What do features of a LoRA cost, against features of all parameters of the same network?

A small UNet2DConditionModel in the manner of Stable Diffusion (latents of 4x16x16, 8 tokens of text), with a LoRA of rank 4
on its attention. `features.rows`, the files on disk included: D-TRAK's output, 10 draws per image, the sparse
projection to 4096 columns, the default memory budget, float32; once with parameters="lora" and once with "all". Each arm
runs in a process of its own, three times in turn; memory is the peak of the resident set while features are computed, less
what was resident before (libraries, network, images). Mark: at most a third, in time and in memory.

    OMP_NUM_THREADS=1 python benchmarks/lora.py
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

os.environ["WHENCE_QUIET"] = "1"

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model

from _record import SMOKE, apart, record
from whence import SJLT, Checkpoint, Engine, Gradient, tensor_images, uniform
from whence.data.images import TensorImages
from whence.diffusion.outputs import squared_norm
from whence.features.gradients import select
from whence.features.rows import rows
from whence.models import forward_of
from whence.types import Batch, Task

COUNT, DRAWS, K, RANK, ROUNDS, SEED, WIDTHS = 24, 10, 4096, 4, 3, 0, (64, 128)
if SMOKE:
    COUNT, DRAWS, K, ROUNDS, WIDTHS = 2, 2, 16, 1, (32, 32)
ARMS = ("lora", "all")
MARK = 1 / 3


class Captioned(TensorImages):
    """Latents with a text embedding each."""

    def batch(self, numbers):
        found = super().batch(numbers)
        text = torch.stack([torch.randn(8, 64, generator=torch.Generator().manual_seed(int(i))) for i in numbers])
        return Batch(found.x0, found.keys, {"encoder_hidden_states": text})


def network():
    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
    )
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    return inject_adapter_in_model(LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False), unet)


def resident(field):
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(arm):
    """Features of one arm: seconds and bytes."""
    torch.set_num_threads(1)
    net = network()
    forward = forward_of(net, DDPMScheduler())
    images = Captioned(**vars(tensor_images(torch.randn(COUNT, 4, 16, 16))))
    part = Gradient(squared_norm, uniform(DRAWS), SJLT(K), arm)
    warm = Captioned(**vars(tensor_images(torch.randn(1, 4, 16, 16))))
    with tempfile.TemporaryDirectory() as folder:

        def features(images, name):
            point = Checkpoint(lambda: net, "benchmark")
            task = Task(forward, (point,), images, images, Path(folder) / name, Engine())
            return rows(part, task, point, images, arm)

        features(warm, "warm")
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        wall, cpu = perf_counter(), process_time()
        features(images, "run")
        found = {"seconds": perf_counter() - wall, "cpu_seconds": process_time() - cpu}
    every = dict(net.named_parameters())
    size = sum(every[name].numel() for name in select(net, arm))
    return {**found, "peak_bytes": resident("VmHWM") - before, "parameters": size}


def main():
    runs = {arm: [] for arm in ARMS}
    for _ in range(ROUNDS):
        for arm in ARMS:
            runs[arm].append(apart(__file__, measure, arm))
            print(arm, runs[arm][-1], flush=True)
    middle = {arm: {key: median(run[key] for run in runs[arm]) for key in runs[arm][0]} for arm in ARMS}
    ratios = {key: middle["lora"][key] / (middle["all"][key] or 1) for key in ("seconds", "cpu_seconds", "peak_bytes")}
    record(
        "lora",
        {
            "question": __doc__.splitlines()[0],
            "images": COUNT,
            "draws": DRAWS,
            "dim": K,
            "rank": RANK,
            "runs": runs,
            "median": middle,
            "ratio_lora_to_all": ratios,
            "mark": MARK,
            "met": {key: value <= MARK for key, value in ratios.items()},
        },
    )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
