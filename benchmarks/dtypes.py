"""What do features in half the room cost in LDS?

python benchmarks/dtypes.py digits [FOLDER]             minutes of one core
python benchmarks/dtypes.py icons|photos DATA [FOLDER]

Methods at their own settings, features stored as float32, bfloat16 and float16 (`--feature_dtype`), all queries of the bank.

lds        on test subsets, with two-way bootstrap intervals
loss       the LDS less that of float32, paired
seen       Spearman correlation of the scores of a query with those of float32, mean over queries
moved      largest difference of a score, in standard deviations of the scores of its query
refused    what was said in place of scores that the format cannot hold
"""

import shutil
from dataclasses import replace

import numpy as np
import torch

from _record import SMOKE, asked_bank, numbers, record
from whence.evaluation import banks
from whence.evaluation.lds import bootstrap, predict, spearman
from whence.methods import build, settings_of
from whence.models import open_model
from whence.types import Engine, Task, WhenceError

NAMES = ("d_trak", "trak", "das", "tracin", "ek_fac")
NARROW = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def scores_of(name, narrow, task):
    """Values [m, n], from an empty store; or what was said against it."""
    shutil.rmtree(task.root, ignore_errors=True)
    engine = replace(task.engine, feature_dtype=narrow)
    small = {"draws": settings_of(name)["draws"].with_count(2)} if SMOKE else {}
    try:
        return build(name, task.forward, small)(replace(task, engine=engine)).values.numpy()
    except WhenceError as error:
        return str(error)
    finally:
        shutil.rmtree(task.root, ignore_errors=True)


def row(name, task, table):
    """What the head of this script says of one method and one kind of queries."""
    every = {label: scores_of(name, narrow, task) for label, narrow in NARROW.items()}
    known = {label: values for label, values in every.items() if not isinstance(values, str)}
    masks, outputs = table.role("test").averaged()
    judge = bootstrap(
        {label: predict(values, masks) for label, values in known.items()}, outputs, table.better or "lower"
    )
    plain = known["float32"]
    found = {}
    for label, values in every.items():
        if label not in known:
            found[label] = {"refused": values}
            continue
        moved = np.abs(values - plain).max(1) / plain.std(1)
        found[label] = {
            "lds": numbers(judge.interval(label)),
            "loss": numbers(judge.difference(label, "float32")),
            "seen": float(np.mean(spearman(values.T, plain.T))),
            "moved": float(moved.max()),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, bank, recipe, folder = asked_bank()
    model = open_model(banks.train_reference(recipe, folder))
    trajectory, engine = (*model.checkpoints, model.final), Engine(budget=2**30)
    rows = {}
    for method in NAMES[:1] if SMOKE else NAMES:
        for kind in banks.QUERIES:
            task = Task(model.forward, trajectory, recipe.train, bank.queries[kind], folder / "dtypes", engine)
            rows.setdefault(method, {})[kind] = row(method, task, bank.tables[kind])
    for bank_name in ("digits", name) if SMOKE else (name,):
        record(f"dtypes-{bank_name}", {"question": __doc__.split("\n")[0], "bank": bank.name, "rows": rows})
