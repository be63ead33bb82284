"""Do the standard errors of scores hold what a run with another seed gives?

python benchmarks/errors.py [FOLDER] [ROW ...]      an hour of one core, or some rows; runs are kept in FOLDER

Where all images share their draws, scores are compared beside the mean of their query's, of which the errors are then.

On the digits bank's model, 12 held-out and 12 drawn queries, 512 training images. Every method is run with 3 seeds, each of
which draws anew what its errors are of: timesteps and noise of all images and queries and the random projection, or masks,
seeds and the draws of the queries.

covered   A run k says that another one is within 1.96 sqrt(2) stderr_k of it: the share of scores of which that is true,
          over all pairs of runs; the lowest and the highest of a query; of the 10 images that are first in the mean of the
          runs that are neither; and of those that are first in run k (which are there because they were lucky, too, so that
          other runs have them lower).
variance  The mean of stderr^2 over that of the variance between runs.
reliability   What `Scores.reliability` says, and the correlation of two runs, means over queries.
noise     The standard deviation between runs over that of the mean scores of a query.
ranks     Of the 8 first images of a run: how many have a rank in the mean of the others that is outside the ranks that the
          run allows (outside_1.96: if it took 1.96 for 2.58); how many are said to belong there surely, and how many of
          these are not there in that mean.
"""

import itertools
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _record import RESULTS, RUNS, SMOKE, digits, digits_bank, record
from whence.data.images import subset, tensor_images
from whence.evaluation import banks
from whence.features.projections import SJLT
from whence.methods import build, settings_for
from whence.methods.errors import SHARED
from whence.methods.inner_product import InnerProduct
from whence.models import open_model
from whence.scores import SURE
from whence.storage.scores import load_scores, save_scores
from whence.types import Engine, Task

SEEDS, QUERIES, FIRST, SHOWN = (2, 3, 3, 2) if SMOKE else (3, 12, 10, 8)
NAMES = (
    "gradient_dot",
    "gradient_cosine",
    "trak",
    "d_trak",
    "influence",
    "relatif_loss",
    "das",
    "last_layer_ridge",
    "ek_fac",
)
DRAWN: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in NAMES}
DRAWN |= {
    "d_trak, damping 10": ("d_trak", {"damping": 10.0}),
    "influence, squared": ("das", {"output": "loss", "residual": 0, "unit": False, "square": True}),
    "trak, 100 draws": ("trak", {"draws": 100}),
    "d_trak, 100 draws": ("d_trak", {"draws": 100}),
    "gradient_dot, 512 columns": ("gradient_dot", {"dim": 512}),
    "trak, 1024 columns": ("trak", {"dim": 1024}),
    "tracin, 10 checkpoints": ("tracin", {}),
    "retrac, 10 checkpoints": ("retrac", {}),
}
MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "further_training, 4 masks": ("further_training", {"masks": 4, "learning_rate": 3e-3}),
    "further_training, 8 masks": ("further_training", {"masks": 8, "learning_rate": 3e-3}),
    "averaged_metagradient, 4 masks": ("averaged_metagradient", {"masks": 4}),
}
FEW = 4  # queries of each kind, of methods that train
if SMOKE:
    DRAWN = {"gradient_dot": ("gradient_dot", {"draws": 4, "dim": 8}), "trak": ("trak", {"draws": 4, "dim": 8})}
    MASKED = {"further_training": ("further_training", {"masks": 4, "steps": 2, "learning_rate": 1e-3})}
    FEW = 2


@dataclass(frozen=True)
class Repeated:
    """Scores of one method with several seeds: values and stderr [runs, m, n]."""

    values: np.ndarray
    stderr: np.ndarray

    def covered(self):
        """What the head of this script says of intervals."""
        runs = range(len(self.values))
        kinds: dict[str, list[Any]] = {"all": [], "query": [], "first": [], "own": []}
        for k, other in itertools.permutations(runs, 2):
            inside = np.abs(self.values[k] - self.values[other]) <= 1.96 * 2**0.5 * self.stderr[k]
            rest = [run for run in runs if run not in (k, other)] or [other]
            places = {"first": self.values[rest].mean(0), "own": self.values[k]}
            for name, scores in places.items():
                kinds[name].append(np.take_along_axis(inside, np.argsort(-scores, 1)[:, :FIRST], 1).mean())
            kinds["all"].append(inside.mean())
            kinds["query"].append(inside.mean(1))
        of_query = np.mean(kinds["query"], 0)
        return {
            "all": float(np.mean(kinds["all"])),
            "lowest and highest query": [float(of_query.min()), float(of_query.max())],
            f"first {FIRST} of other runs": float(np.mean(kinds["first"])),
            f"own first {FIRST}": float(np.mean(kinds["own"])),
        }

    def spread(self):
        variance = self.values.var(0, ddof=1).mean()
        of_queries = self.values.mean(0).std(1)
        return {
            "variance": float((self.stderr**2).mean() / variance),
            "noise": float(np.sqrt(variance) / np.sqrt((of_queries**2).mean())),
        }

    def alike(self):
        """The correlation of the scores of a query between two runs, mean over queries and pairs of runs."""
        pairs = itertools.combinations(self.values, 2)
        return float(np.mean([np.corrcoef(a, b)[0, 1] for one, two in pairs for a, b in zip(one, two, strict=True)]))

    def ranks(self, scores):
        """What the head says of ranks; scores: of each run."""
        count = outside = outside_95 = sure = wrong = width = 0
        for k, run in enumerate(scores):
            others = np.delete(self.values, k, 0).mean(0)
            for query, row in enumerate(self.values[k]):
                first = np.argsort(-row, kind="stable")[:SHOWN]
                place = np.argsort(np.argsort(-others[query], kind="stable"))[first]
                between = np.array(run.ranks_between(query, first.tolist()))
                narrow = replace(run, stderr=run.stderr * 1.96 / SURE)
                narrow = np.array(narrow.ranks_between(query, first.tolist()))
                belongs = between[:, 1] < SHOWN
                count += SHOWN
                width += (between[:, 1] - between[:, 0]).sum()
                outside += ((place < between[:, 0]) | (place > between[:, 1])).sum()
                outside_95 += ((place < narrow[:, 0]) | (place > narrow[:, 1])).sum()
                sure, wrong = sure + belongs.sum(), wrong + (belongs & (place >= SHOWN)).sum()
        return {
            "images": count,
            "outside": int(outside),
            "outside_1.96": int(outside_95),
            "sure": int(sure),
            "wrong": int(wrong),
            "mean width": float(width / count),
        }


def kept(folder, row, seed):
    """Where the scores of a row are."""
    return folder / "errors" / row.replace(",", "").replace(" ", "-") / str(seed)


def repeat(rows, tasks, folder):
    """Scores of all rows with each seed, in one store per seed: what one method computed is there for the next."""
    for seed in range(SEEDS):
        store = folder / "errors" / f"store-{seed}"
        for row, (name, settings) in rows.items():
            where, task = kept(folder, row, seed), tasks[row in MASKED]
            if (where / "scores.json").exists():
                continue
            given = settings_for(name, settings, seed)
            if row in MASKED:
                given |= {"mask_seed": seed, "first_seed": 10_000 + 1000 * seed}
            save_scores(where, projected(build(name, task.forward, given), seed)(replace(task, root=store)))
            print(f"{row}, seed {seed}", flush=True)
        shutil.rmtree(store, ignore_errors=True)


def projected(method, seed):
    """The method with a projection of its own, where it has one."""
    if not isinstance(method, InnerProduct):
        return method

    def other(part):
        own = getattr(part, "projection", None)
        return replace(part, projection=replace(own, seed=seed)) if isinstance(own, SJLT) else part

    return replace(method, train=other(method.train), query=method.query and other(method.query))


def main(folder, names):
    """What was found, row by row."""
    recipe = digits()
    bank, model = digits_bank(recipe), open_model(banks.train_reference(recipe, folder))
    rows = {row: how for row, how in (DRAWN | MASKED).items() if not names or row in names}

    def task(count):
        some = [
            subset(each, range(0, len(each) // count * count, len(each) // count)) for each in bank.queries.values()
        ]
        trajectory, queries = (*model.checkpoints, model.final), joined(some)
        engine = Engine(budget=2**30)
        return Task(model.forward, trajectory, recipe.train, queries, folder, engine, study=recipe.study, errors=True)

    repeat(rows, {False: task(QUERIES), True: task(FEW)}, folder)
    found = {}
    for row in rows:
        scores = [load_scores(kept(folder, row, seed)) for seed in range(SEEDS)]
        values, stderr = (np.stack([vars(each)[what].numpy() for each in scores]) for what in ("values", "stderr"))
        if scores[0].stderr_of.startswith(SHARED):
            values = values - values.mean(2, keepdims=True)
        runs = Repeated(values, stderr)
        found[row] = {
            "of": scores[0].stderr_of,
            **runs.spread(),
            "reliability": [float(torch.stack([reliable(each) for each in scores]).mean()), runs.alike()],
            "covered": runs.covered(),
            "ranks": runs.ranks(scores),
        }
    return found


def reliable(scores):
    """What scores with errors say of another run: [m]."""
    found = scores.reliability
    assert found is not None
    return found


def joined(sets):
    """Several sets of pictures as one."""
    pictures = [some.batch(range(len(some))).x0 for some in sets]
    return tensor_images(torch.cat(pictures), [name for some in sets for name in some.ids])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "errors"
    path, found = RESULTS / "errors.json", main(folder, sys.argv[2:])
    earlier = json.loads(path.read_text())["rows"] if path.exists() else {}
    record("errors", {"question": __doc__.split("\n")[0], "seeds": SEEDS, "rows": earlier | found})
