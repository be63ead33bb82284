"""Does it help that all images are measured at the same draws?

python benchmarks/noise.py digits [FOLDER] [ROW ...]                two hours of one core, or some rows: d_trak, d_trak:100
python benchmarks/noise.py icons|photos DATA [FOLDER] [ROW ...]     goes on where an earlier run stopped; rows are added

Every method that measures gradients or hidden representations, at its own settings but for the noise: `own`, each image its
own (timestep, noise) pairs, and `shared`, the same pairs for all, queries included. Each with two seeds of the draws.
A row d_trak:100 is the method with 100 draws.

lds      of both seeds, on test subsets, with two-way bootstrap intervals; all queries of the bank
seeds    Spearman correlation of the scores of a query between the two seeds, mean over queries
damping  [value, LDS on tune subsets, LDS on test subsets] of the first seed
paired   the difference of the LDS, shared less own, first seed
pixels   the difference of the LDS to that of pixel_cosine, first seed
"""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import torch

from _record import RESULTS, SMOKE, asked_bank, numbers, record
from whence.diffusion.draws import Draws
from whence.evaluation import banks, bench
from whence.evaluation.lds import bootstrap, lds, predict, spearman
from whence.methods import METHODS, build, settings_of
from whence.methods.inner_product import FeatureMethod
from whence.models import open_model
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores, save_scores
from whence.types import Engine, Task

SEEDS = (0, 1)
NOISE = {"own": False, "shared": True}
LEFT_OUT = (
    *("journey_trak", "montrage_style", "retrac", "diffusion_tracin"),  # see noise of a sampler, or of the training
    *("metagradient", "averaged_metagradient", "further_training"),  # only queries have draws
    *("abu", "abu_ek_fac", "mucs", "guda"),  # each image is compared with itself, at the same draws
)
NAMES = [
    name
    for name, entry in METHODS.items()
    if isinstance(settings_of(name).get("draws"), Draws) and not entry.trial.on_request and name not in LEFT_OUT
]
if SMOKE:
    NAMES = ["gradient_dot", "d_trak"]


def settings(row, shared, seed):
    """The method's own, with noise that is shared or not."""
    name, _, count = row.partition(":")
    draws = replace(settings_of(name)["draws"], shared=shared, seed=seed)
    draws = draws.with_count(int(count)) if count else draws
    return {"draws": draws.with_count(2), "dim": 8} if SMOKE else {"draws": draws}


def cell(name, noise, seed, tasks, bank, folder):
    """Scores of one method with one noise and one seed, kept, and its curve of dampings."""
    where = folder / "noise" / name.replace(":", "-") / f"{noise}-{seed}"
    if (where / "curve.json").exists():
        return where
    curves = {}
    for kind, task in tasks.items():
        method = build(name.partition(":")[0], task.forward, settings(name, NOISE[noise], seed))
        tried = {None: method(task)}
        if isinstance(method, FeatureMethod) and method.damping is not None and seed == 0:
            tried |= dict(zip(bench.DAMPINGS, method.grid(task, bench.DAMPINGS), strict=True))
        save_scores(where / kind, tried.pop(None))
        curves[kind] = [[value, *judged(bank.tables[kind], scores)] for value, scores in tried.items()]
    write_json(where / "curve.json", curves)
    print(name, noise, seed, flush=True)
    return where


def judged(table, scores):
    """LDS on tune and on test subsets."""
    found = []
    for role in ("tune", "test"):
        masks, outputs = table.role(role).averaged()
        found.append(float(np.nanmean(lds(scores.values.numpy(), masks, outputs, table.better or "lower"))))
    return found


def row(name, tasks, bank, folder, pixels):
    """What the head of this script says of one method; pixels: the scores of `pixel_cosine` for both kinds of queries."""
    places = {(noise, seed): cell(name, noise, seed, tasks, bank, folder) for noise in NOISE for seed in SEEDS}
    shutil.rmtree(folder / "noise-store", ignore_errors=True)
    found = {}
    for kind in tasks:
        table = bank.tables[kind]
        masks, outputs = table.role("test").averaged()
        values = {f"{noise} {seed}": load_scores(at / kind).values.numpy() for (noise, seed), at in places.items()}
        values["pixels"] = pixels[kind]
        predictions = {key: predict(each, masks) for key, each in values.items()}
        judge = bootstrap(predictions, outputs, table.better or "lower")
        found[kind] = {
            noise: {
                "lds": [numbers(judge.interval(f"{noise} {seed}")) for seed in SEEDS],
                "seeds": float(np.mean(spearman(values[f"{noise} 0"].T, values[f"{noise} 1"].T))),
                "pixels": numbers(judge.difference(f"{noise} 0", "pixels")),
                "damping": read_json(places[noise, 0] / "curve.json")[kind],
            }
            for noise in NOISE
        }
        found[kind]["paired"] = numbers(judge.difference("shared 0", "own 0"))
    return found


def main(bank, recipe, folder, names):
    model = open_model(banks.train_reference(recipe, folder))
    trajectory, engine = (*model.checkpoints, model.final), Engine(budget=2**30)

    def task(kind):
        store, queries = folder / "noise-store", bank.queries[kind]
        return Task(model.forward, trajectory, recipe.train, queries, store, engine, study=recipe.study)

    tasks = {kind: task(kind) for kind in banks.QUERIES}
    pixels = {kind: build("pixel_cosine", task.forward, {})(task).values.numpy() for kind, task in tasks.items()}
    return {name: row(name, tasks, bank, folder, pixels) for name in names}


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = [word for word in sys.argv[1:] if word.partition(":")[0] in METHODS]
    sys.argv = [word for word in sys.argv if word not in chosen]
    name, bank, recipe, folder = asked_bank()
    path = RESULTS / f"noise-{name}.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows = earlier | main(bank, recipe, folder, chosen or NAMES)
    for bank_name in ("digits", name) if SMOKE else (name,):
        record(f"noise-{bank_name}", {"question": __doc__.split("\n")[0], "bank": bank.name, "rows": rows})
