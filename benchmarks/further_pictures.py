"""Are gradients through further training better than methods that do not train again on real pictures, too?

python benchmarks/further_pictures.py icons|photos DATA [FOLDER]      ten minutes of one core, after pictures.py

Every second query of both kinds, test subsets: 50 steps at 3e-3, falling, two masks; beside all rows that pictures.py left
in FOLDER (runs/bench-icons), whose dampings were chosen on tune subsets. LDS with intervals, paired differences.
"""

import json
import time

import torch

from _record import SMOKE, asked_bank, numbers, record
from whence.data.images import tensor_images
from whence.evaluation import banks, bench
from whence.evaluation.lds import bootstrap, predict
from whence.methods.further import FurtherTraining
from whence.models import open_model
from whence.storage.scores import load_scores
from whence.types import Engine, Task

ENGINE = Engine(budget=2**31)
FURTHER, STEPS, EVERY = "further_training", 50, 2
if SMOKE:
    STEPS = 2


def further(recipe):
    return FurtherTraining(steps=STEPS, learning_rate=3e-3, masks=2, draws=recipe.draws, redraw=False)


def chosen(bank, every):
    """Kind -> rows of the queries that are asked about."""
    return {kind: range(0, len(bank.queries[kind]), every) for kind in banks.QUERIES}


def scored(bank, recipe, folder, name, method, every):
    """Kind -> scores of every so many queries, and the processor's seconds of the run that computed them."""
    model, rows = open_model(banks.train_reference(recipe, folder, ENGINE)), chosen(bank, every)
    x0 = torch.cat([bank.queries[kind].batch(each).x0 for kind, each in rows.items()])
    queries = tensor_images(x0, [f"q{i:04d}" for i in range(len(x0))])
    store = folder / name.split("_")[0]
    task = Task(
        model.forward, (*model.checkpoints, model.final), recipe.train, queries, store, ENGINE, study=recipe.study
    )
    begun, kept = time.process_time(), folder / f"{store.name}-seconds.json"
    values = method(task).values
    if not kept.exists():  # else an earlier run has trained
        kept.write_text(json.dumps(time.process_time() - begun))
    parts = values.split([len(each) for each in rows.values()])
    return {kind: part.numpy() for kind, part in zip(rows, parts, strict=True)}, json.loads(kept.read_text())


def judged(bank, kind, rows, scores, mine):
    """LDS of scores of these rows of the queries, by how much one of them is above each other one, and the ceiling."""
    table = bank.tables[kind].role("test")
    masks, outputs = table.averaged()
    predictions = {name: predict(each, masks) for name, each in scores.items()}
    resampled = bootstrap(predictions, outputs[:, rows], bank.tables[kind].better or "lower")
    found = {
        name: {"lds": numbers(resampled.interval(name)), "below": numbers(resampled.difference(mine, name))}
        for name in predictions
    }
    return found | {"ceiling": numbers(table.ceiling().spearman)}


def main(bank, recipe, folder):
    values, seconds = scored(bank, recipe, folder, FURTHER, further(recipe), EVERY)
    found = {"seconds": seconds, "steps": STEPS, "masks": 2}
    for kind, rows in chosen(bank, EVERY).items():
        paths = {path.parent.name: path for path in sorted(folder.glob(f"rows/*/{kind}"))}
        peers = {name: load_scores(path).values.numpy()[list(rows)] for name, path in paths.items()}
        found[kind] = judged(bank, kind, list(rows), peers | {FURTHER: values[kind]}, FURTHER)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, bank, recipe, folder = asked_bank()
    if SMOKE:
        bench.run(bank, recipe, folder, ("pixel_cosine",), engine=ENGINE)
    record(f"further-{name}", {"question": __doc__.split("\n")[0], **main(bank, recipe, folder)})
