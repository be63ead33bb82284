"""Do the same commands give the same scores, to the last bit, as before the move?

python benchmarks/same_scores.py before --whence OLD/.venv/bin/whence     about four minutes of one core
python benchmarks/same_scores.py after --whence NEW/.venv/bin/whence      likewise; exit 1 if a score differs

Everything goes through the command line: each side trains the same small model on 24 digits, draws three pictures from
it and scores them with every method. Settings are the default ones save in `APART`; draws are so everywhere. Both sides
must run on the same processor with the same torch: others round differently. The scores of `before` lie in an .npz beside
the JSON, to measure by how much `after` differs.
"""

import argparse
import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sklearn.datasets import load_digits

from _record import RESULTS, SMOKE, WHENCE, machine, whence

IMAGES, CLASSES = 24, (3, 8)
NETWORK = ("--channels=1", "--block_out_channels=8,8", "--class_conditional")
STEPS = ("--max_train_steps=60", "--checkpointing_steps=20", "--train_batch_size=12", "--lr_warmup_steps=10")
METHODS = ()  # all there are
if SMOKE:
    STEPS = ("--max_train_steps=2", "--lr_warmup_steps=1", "--train_batch_size=2")
    IMAGES, METHODS = 4, ("pixel_cosine", "clip_cosine", "exact_influence")
TRAINING = (*NETWORK, *STEPS, "--ema_decay=0.9")
DRAWING = ("--generate=3", "--num_inference_steps=5")
# What one command cannot hold together with the rest: settings that mean something else elsewhere, or take long.
APART = {
    ("clip_cosine",): ["--set=encoder={encoders}/clip"],
    ("dino_cosine",): ["--set=encoder={encoders}/dino"],
    ("exact_influence",): ["--parameters=last-layer"],  # d x d: of few parameters
    ("ek_fac_refined",): ["--set=steps=2"],
    ("influence_cg",): ["--parameters=attention", "--damping=10", "--set=tolerance=0.5"],
    ("influence_lissa",): ["--parameters=attention", "--set=depth=2"],
    ("metagradient", "averaged_metagradient"): ["--set=masks=2"],
}
PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 12}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 8, "width": 8}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25],
}  # fmt: skip
ABOUT = """
import json, whence
from importlib.metadata import version
print(json.dumps([whence.__file__, {name: version(name) for name in ("torch", "diffusers", "numpy", "scipy")}]))
"""


class Whence:
    """An executable of whence, and what it is."""

    def __init__(self, path):
        self.path = Path(path).absolute()

    def __call__(self, *arguments):
        """The exit code, what it printed, and what it complained of."""
        done = whence(*arguments, command=[self.path])
        return done.code, done.out, done.err

    def methods(self):
        found = re.findall(r"^\| `(\w+)` \|", self("methods", "--markdown")[1], re.MULTILINE)
        return [name for name in found if not METHODS or name in METHODS]

    def about(self):
        """Commit and versions, as the python beside the executable finds them."""
        python = [self.path.with_name("python"), "-c", ABOUT]
        if SMOKE:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(ABOUT, {})
            file, versions = json.loads(printed.getvalue())
        else:
            file, versions = json.loads(subprocess.run(python, capture_output=True, text=True, check=True).stdout)
        package = Path(file).parent
        head, changes = (
            subprocess.run(["git", *what], cwd=package, capture_output=True, text=True, check=False).stdout.strip()
            for what in (["rev-parse", "--verify", "HEAD"], ["status", "--porcelain", "--", "."])
        )
        return {
            "commit": head + ("+changes" if changes else "") or None,
            "versions": versions,
            "machine": {**machine(), "threads": "1"},
        }


def save_digits(folder):
    """Half of the images of either class, in a folder per class."""
    digits = load_digits()
    for label in CLASSES:
        (folder / str(label)).mkdir(parents=True)
        for i, pixels in enumerate(digits.images[digits.target == label][: IMAGES // 2]):
            grey = np.round(pixels / 16 * 255).astype(np.uint8)
            Image.fromarray(grey).save(folder / str(label) / f"{i:02d}.png")


def save_encoders(folder):
    """Small random encoders as save_pretrained leaves them."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    tower = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    tower |= {"intermediate_size": 16}
    torch.manual_seed(0)
    clip = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**tower, projection_dim=6))
    dino = transformers.ViTModel(transformers.ViTConfig(**tower))
    for name, encoder in {"clip": clip, "dino": dino}.items():
        encoder.save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))


def train(whence, images, model):
    """`train new`, or what it was called before the move."""
    given = (f"--train_data_dir={images}", f"--output_dir={model}", *TRAINING)
    failed = []
    for command in (("train", "new"), ("train",)):
        code, _, complaint = whence(*command, *given)
        if code == 0:
            return
        failed.append(complaint)
    raise SystemExit("no model was trained:\n" + "\n".join(failed))


def commands(methods, encoders):
    """(the methods of a command, their settings), every method once."""
    apart = {name for names in APART for name in names}
    yield [name for name in methods if name not in apart], []
    for names, settings in APART.items():
        if there := [name for name in names if name in methods]:
            yield there, [text.format(encoders=encoders) for text in settings]


def run(whence, root):
    """What a side is and what it made, and its scores [queries, images] by method."""
    start = perf_counter()
    images, model, output, encoders = (root / name for name in ("images", "model", "run", "encoders"))
    save_digits(images)
    save_encoders(encoders)
    train(whence, images, model)
    methods = whence.methods()
    for names, settings in commands(methods, encoders):
        world = (model, f"--train_data_dir={images}", f"--output_dir={output}", *DRAWING)
        begun = perf_counter()
        code, _, complaint = whence("attribute", *world, *settings, *(f"--method={name}" for name in names))
        print(f"{perf_counter() - begun:6.1f} s  {' '.join(names)}", flush=True)
        if code:
            print(f"exit code {code}: {complaint}", file=sys.stderr)
    files = {name: output / "scores" / name / "scores.safetensors" for name in methods}
    scores = {name: load_file(file)["values"] for name, file in files.items() if file.is_file()}
    side = {
        **whence.about(),
        "seconds": round(perf_counter() - start),
        "weights": hashes(model, "**/*.safetensors"),
        "pictures": hashes(output / "generated", "*.png"),
        "scores": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in scores.items()},
        "failed": [name for name in methods if name not in scores],
    }
    return side, scores


def hashes(folder, pattern):
    """sha256 of the bytes of each file."""
    files = sorted(folder.glob(pattern))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def compare(old, new):
    """Whether the scores of a method are the same bytes, and how far they are apart if not."""
    if old is None or new is None or old.shape != new.shape:
        return {"identical": False, "shapes": [None if values is None else values.shape for values in (old, new)]}
    if old.dtype == new.dtype and old.tobytes() == new.tobytes():
        return {"identical": True}
    apart = float(np.abs(old - new).max() / np.abs(old).max())
    alike = min(float(spearmanr(a, b).statistic) for a, b in zip(old, new, strict=True))
    return {"identical": False, "relative_difference": apart, "lowest_spearman_of_a_query": alike}


def verdict(before, after, old, new):
    """What of the two sides is the same, and how every method that either has compares."""
    methods = {name: compare(old.get(name), new.get(name)) for name in dict.fromkeys([*before["scores"], *new])}
    return {
        "same_platform": all(before[what] == after[what] for what in ("machine", "versions")),
        "training_identical": before["weights"] == after["weights"],
        "pictures_identical": before["pictures"] == after["pictures"],
        "identical": sum(row["identical"] for row in methods.values()),
        "different": [name for name, row in methods.items() if not row["identical"]],
        "methods": methods,
    }


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("side", choices=("before", "after"))
    parser.add_argument("--whence", type=Whence, required=True, help="the executable")
    parser.add_argument("--output", type=Path, default=RESULTS / "same-scores.json")
    given = parser.parse_args(words)
    kept = given.output.with_suffix(".npz")
    with tempfile.TemporaryDirectory() as folder:
        side, scores = run(given.whence, Path(folder))
    kept.parent.mkdir(parents=True, exist_ok=True)
    if given.side == "before":
        if side["failed"]:
            raise SystemExit(f"nothing is recorded: no scores of {', '.join(side['failed'])}")
        np.savez(kept, **scores)
        write(given.output, {"question": __doc__.split("\n")[0], "before": side})
        print(f"{len(scores)} methods: {given.output}")
        return 0
    result = json.loads(given.output.read_text())
    found = verdict(result["before"], side, dict(np.load(kept)), scores)
    write(given.output, {"question": result["question"], **found, "before": result["before"], "after": side})
    print(json.dumps(found, indent=2))
    return 1 if found["different"] else 0


if __name__ == "__main__":
    if SMOKE:
        main(["before", "--whence", WHENCE[0]])
    sys.exit(main(["after", "--whence", WHENCE[0]] if SMOKE else None))
