"""Do LoRAs tell which data made them? Nearest neighbours of 16: four sets of pictures, four seeds each.

python benchmarks/loras.py [ICONS] [FOLDER]      half an hour of one core; goes on where it was cut off

The sets are two digits each (0 and 1, 2 and 3 ...) of scikit-learn's, 64 pictures. first-rank-4 was tried first, missed
the mark, and first-rank-16 was tried on the same pictures and seeds: the rank was chosen on these. digits, which is judged,
has that rank, other pictures of the same digits and other seeds. splits: the sets are 64 pictures each, at random from the
ten digits; icons, where they are given: the 24 first icons of four creators (ICONS/train, 16 x 16, a column `creator` in
metadata.jsonl). The base is a UNet2DModel trained on other pictures of the same kind, the LoRAs are on its attention. Seeds
make A, the order and the noise; they are the same four for every set, so that A begins as that of another set's does. All by
whence's own commands. Mark: of 16 digits LoRAs 14 or more have a neighbour of the same set, where chance has 3.

Besides, to show what is compared: the same with the cosines of A and B as they are in the files.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import _record
from _record import RESULTS, RUNS, SMOKE, record
from whence.data.saving import save_png
from whence.evaluation.loras import KINDS, labelled, nearest, relations
from whence.models.lora_changes import changes, lora_collection
from whence.models.lora_files import read_lora

SEEDS, SETS, RANK, WIDTHS = 4, 4, 16, "32,64"
FRESH = 10
"""The first of the seeds of the LoRAs that are judged."""
STEPS = {"digits": 3000, "icons": 1000, "lora": 300}
BATCH, MARK = 16, 14
DONE = ("model_index.json", "pytorch_lora_weights.safetensors")
if SMOKE:
    SEEDS, SETS, WIDTHS, BATCH, STEPS = 2, 2, "32", 4, dict.fromkeys(STEPS, 2)


def whence(*words):
    """A command; a training that has ended is not asked for again."""
    if words[0] == "train" and any((Path(words[-1]) / part).exists() for part in DONE):
        return ""
    print("whence", *words, flush=True)
    done = _record.whence(*words)
    if done.code:
        raise SystemExit(done.err)
    return done.out


def digits(split, part=0):
    """Pictures of the base, and of each set, in [-1, 1].

    split: sets at random from all digits, not two digits each. part: which of their pictures.
    """
    pixels, classes = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    rows, own = np.random.default_rng(0).permutation(len(x)), 4 if SMOKE else 64
    base, rest = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    if split:
        sets = {f"split-{k}": rest[own * k : own * (k + 1)] for k in range(SETS)}
    else:
        here = slice(own * part, own * (part + 1))
        sets = {f"{2 * k}-and-{2 * k + 1}": rest[classes[rest] // 2 == k][here] for k in range(SETS)}
    return x[base[: 8 if SMOKE else None]], {name: x[some] for name, some in sets.items()}


def icons(folder):
    """The same of four creators' icons; the base saw the others'."""
    from whence.data.images import image_folder

    pictures = image_folder(folder / "train", 16, channels=1)
    makers = np.array(pictures.meta["creator"])
    names, counts = np.unique(makers, return_counts=True)
    chosen = sorted(names[np.argsort(-counts, kind="stable")[:SETS]])
    every = pictures.batch(range(len(pictures))).x0
    sets = {name: every[torch.tensor(np.flatnonzero(makers == name)[:24])] for name in chosen}
    return every[torch.tensor(~np.isin(makers, chosen))], sets


def trained(kind, base, sets, folder, rank, first):
    """FOLDER/loras/SET/SEED, trained on the base of a kind of pictures, which lies beside FOLDER."""
    side = str(base.shape[-1])
    if not (folder / "pictures").is_dir():
        part = folder / "pictures.tmp"
        shutil.rmtree(part, ignore_errors=True)
        for name, x in {"base": base, **sets}.items():
            save_png(part / name, x, [f"{i:04d}" for i in range(len(x))])
        part.rename(folder / "pictures")
    every = ("--resolution", side, "--train_batch_size", BATCH, "--checkpointing_steps", 100_000)
    whence("train", "new", "--train_data_dir", folder / "pictures" / "base", "--channels", 1, "--block_out_channels",
           WIDTHS, "--max_train_steps", STEPS[kind], "--learning_rate", 2e-3, "--ema_decay", 0.995, *every,
           "--output_dir", folder.parent / f"{kind}-base")  # fmt: skip
    for name in sets:
        for seed in range(first, first + SEEDS):
            whence("train", "lora", "--pretrained_model_name_or_path", folder.parent / f"{kind}-base", "--train_data_dir",
                   folder / "pictures" / name, "--rank", rank, "--max_train_steps", STEPS["lora"], "--learning_rate", 3e-3,
                   "--seed", seed, *every, "--output_dir", folder / "loras" / name / f"seed-{seed}")  # fmt: skip
    return folder / "loras"


def judged(folder):
    """Of each kind of cosine, how many have a neighbour of their own set; and how far apart sets and seeds are."""
    paths = lora_collection(folder).loras
    names, sets = list(paths), [name.split("/")[0] for name in paths]
    found = relations({name: changes(path) for name, path in paths.items()})
    every = {
        **{kind: found.of(kind) for kind in KINDS},
        "factors": factors([read_lora(path) for path in paths.values()]),
    }
    same = np.equal.outer(sets, sets) & ~np.eye(len(sets), dtype=bool)
    seeds = [name.split("/")[1] for name in names]
    twins = np.equal.outer(seeds, seeds) & ~np.equal.outer(sets, sets)
    rows = {}
    for kind, cosine in every.items():
        told = labelled(cosine, sets)
        rows[kind] = {
            "own set": told.correct,
            "of": told.count,
            "chance": told.chance,
            "p": told.p,
            "own seed": int(sum(seeds[i] == seeds[j] for i, j in enumerate(nearest(cosine)))),
            "cosine, same set": float(cosine[same].mean()),
            "cosine, other set": float(cosine[~same & ~np.eye(len(sets), dtype=bool)].mean()),
            "cosine, other set, same seed": float(cosine[twins].mean()),
        }
    return rows


def factors(loras):
    """Cosines of A and B as the files have them: not a thing to compare by."""
    rows = np.stack(
        [
            np.concatenate([x.double().numpy().ravel() for pair in lora.values() for x in (pair.A, pair.B)])
            for lora in loras
        ]
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def main(data, folder):
    other, same = ("digits", *digits(False, 1)), ("digits", *digits(False))
    studies = {
        "digits": (RANK, FRESH, *other),
        "first-rank-4": (4, 0, *same),
        "first-rank-16": (16, 0, *same),
        "splits": (RANK, 0, "digits", *digits(True)),
    }
    if data is not None:
        studies["icons"] = (RANK, 0, "icons", *icons(data))
    results = {}
    for name, (rank, first, kind, base, sets) in studies.items():
        loras = trained(kind, base, sets, folder / name, rank, first)
        results[name] = {"sets": {each: len(x) for each, x in sets.items()}, **judged(loras)}
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        print(whence("loras", loras, "--output_dir", folder / f"{name}-related"))
    shutil.copy(folder / "digits-related" / "loras.png", RESULTS / "loras.png")
    met = {kind: results["digits"][kind]["own set"] >= MARK for kind in KINDS}
    settings = {"seeds": SEEDS, "rank": RANK, "widths": WIDTHS, "steps": STEPS, "batch": BATCH}
    record("loras", {"question": __doc__.splitlines()[0], **results, **settings, "mark": MARK, "met": met})


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = [Path(word) for word in sys.argv[1:]]
    main(given[0] if given else None, given[1] if len(given) > 1 else RUNS / "loras")
