"""Does `whence doctor` predict what methods take? Every method on small models: predicted against measured.

Seconds are those of a processor, in the prediction, too: whatever else the machine does is not counted. Memory is the peak
that the kernel counted of the process, disk what was written below the run folder. A method whose seconds or bytes are more
than 1.5 times off is named in the end.

    OMP_NUM_THREADS=1 python benchmarks/doctor.py [METHOD ...]      # of all that can be asked, without names

Families: a UNet2DModel of pixels that `whence train` made, which every method can be asked about; and a tiny whole Stable
Diffusion (text, latents) of the tests, for the methods that neither train nor read checkpoints.
"""

import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch

import torch

from _record import ROOT, SMOKE, record, whence
from whence import doctor, task_from_pretrained
from whence.data.saving import save_png
from whence.doctor import machine
from whence.methods import METHODS, build, settings_for, settings_of
from whence.types import Engine, WhenceError

IMAGES, QUERIES, STEPS, SIDE, DRAWS, FACTOR = 48, 3, 40, 8, 4, 1.5
if SMOKE:
    IMAGES, QUERIES, STEPS, SIDE, DRAWS = 13, 2, 20, 8, 2
ELSEWHERE = {"encoder", "student", "journey"}
"""What methods need that is no part of a small world: another network, a student, queries that were drawn by whence."""
SMALL = {"draws": DRAWS, "dim": 512}


def unet(root):
    """A model of pixels, trained for a moment, its images and pictures."""
    noise = torch.Generator().manual_seed(0)
    for name, count in (("images", IMAGES), ("queries", QUERIES)):
        save_png(
            root / name, torch.rand(count, 1, SIDE, SIDE, generator=noise) * 2 - 1, [f"{i:04d}" for i in range(count)]
        )
    words = ("--block_out_channels", "16,32", "--channels", 1, "--max_train_steps", STEPS, "--train_batch_size", 16)
    words = (*words, "--checkpointing_steps", STEPS // 2, "--lr_warmup_steps", STEPS // 10)
    done = whence("train", "new", "--train_data_dir", root / "images", "--output_dir", root / "model", *words)
    if done.code:
        raise SystemExit(done.err)


def stable_diffusion(root):
    """A whole pipeline with initial weights, and pictures with captions."""
    sys.path.append(str(ROOT / "tests"))
    from families import save_whole

    save_whole("sd", root / "model")
    for name, count in (("images", IMAGES), ("queries", QUERIES)):
        told = [{"text": f"a picture {i}"} for i in range(count)]
        save_png(root / name, torch.rand(count, 3, 16, 16) * 2 - 1, [f"{i:04d}" for i in range(count)], told)


FAMILIES = {"unet": unet, "stable diffusion": stable_diffusion}


def methods_of(family):
    """The methods that can be asked of a family."""
    for name, one in METHODS.items():
        needs = set(one.needs)
        if not needs & ELSEWHERE and (family == "unet" or not needs & {"training", "checkpoints"}):
            yield name


def settings(name):
    """Small ones, where the method takes them: some draw at steps of their own."""
    small = {key: value for key, value in SMALL.items() if key in settings_of(name)}
    try:
        return settings_for(name, small, 0)
    except WhenceError:
        return settings_for(name, {key: value for key, value in small.items() if key != "draws"}, 0)


def measured(root, name):
    """Predicted and measured seconds, bytes in memory and on the disk of a method."""
    asked = settings(name)
    with tempfile.TemporaryDirectory() as place:
        inputs = doctor.Inputs(root / "model", root / "images", root / "queries", Path(place) / "run")
        begun = time.process_time()
        cost = doctor.predict(doctor.plan(inputs), {name: asked})
        took = time.process_time() - begun
        if cost.findings:
            return {"refused": str(cost.findings[0])}
        task = task_from_pretrained(root / "model", root / "images", root / "queries", Path(place) / "run")
        machine.forget_peak(Engine())
        begun = time.process_time()
        try:
            build(name, task.forward, asked)(task)
        except WhenceError as error:
            return {"refused": str(error)}
        seconds, memory = time.process_time() - begun, machine.peak(Engine())[0]
        written = [
            path for part in ("features", "curvature") for path in (Path(place) / "run" / part).rglob("*.safetensors")
        ]
        disk = sum(path.stat().st_size for path in written)
    real = {"seconds": seconds, "memory": memory, "disk": disk}
    predicted = {"seconds": cost.seconds, "memory": cost.memory, "disk": cost.features}
    return {"predicted": predicted, "measured": real, "prediction_took": took}


def ratios(row):
    """Predicted over measured; of what is next to nothing there is none."""
    both = row["predicted"], row["measured"]
    least = {"seconds": 0.2, "memory": 1, "disk": 2**15}
    found = {what: both[0][what] / both[1][what] for what in least if max(one[what] for one in both) > least[what]}
    return {what: round(value, 2) for what, value in found.items() if value}


def main(chosen):
    warnings.simplefilter("ignore")
    os.environ["WHENCE_QUIET"] = "1"
    torch.set_num_threads(1)
    found = {}
    for family, make in FAMILIES.items():
        # The doctor's trials tell the time by perf_counter.
        with tempfile.TemporaryDirectory() as place, patch.object(time, "perf_counter", time.process_time):
            make(Path(place))
            for name in methods_of(family):
                if not chosen or name in chosen:
                    row = found.setdefault(family, {})[name] = measured(Path(place), name)
                    row |= {"ratio": ratios(row)} if "measured" in row else {}
                    print(family, name, row.get("ratio", row), file=sys.stderr, flush=True)
    rows = {(family, name): row for family, each in found.items() for name, row in each.items() if "ratio" in row}
    far = {
        f"{family}: {name}": off
        for (family, name), row in rows.items()
        if (off := {what: r for what, r in row["ratio"].items() if not 1 / FACTOR <= r <= FACTOR})
    }
    sizes = {"images": IMAGES, "queries": QUERIES, "steps": STEPS, "side": SIDE, **SMALL}
    within = {what: sum(1 / FACTOR <= row["ratio"].get(what, 1) <= FACTOR for row in rows.values()) for what in WHAT}
    record(
        "doctor",
        {
            "question": __doc__.split("\n")[0],
            "sizes": sizes,
            "of": len(rows),
            "within": within,
            "far": far,
            "rows": found,
        },
    )


WHAT = ("seconds", "memory", "disk")

if __name__ == "__main__":
    main(sys.argv[1:] or (["pixel_dot", "gradient_dot"] if SMOKE else []))
