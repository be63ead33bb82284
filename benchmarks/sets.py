"""Does a set that is chosen image by image, each after the last was taken away, do more to a picture than the top scores?

python benchmarks/sets.py [FOLDER]      half an hour of one core

Eight generated pictures of the digits bank and ten images of each that TRAK names: its largest scores, those corrected for
leverage, and adaptive greedy. The model is trained again without them, with the seeds of two full models, beside random
removals of as many images: in units of the loss. What TRAK predicts has none.
"""

import sys
from pathlib import Path

import torch

from _record import RUNS, SMOKE, digits, digits_bank, record
from whence.data.images import subset
from whence.diffusion.draws import uniform
from whence.evaluation import banks, counterfactual
from whence.methods import trak
from whence.methods.surrogates import HOWS, most_influential
from whence.models import open_model
from whence.types import Engine, Scores, Task

QUERIES, K, DRAWS, DIM, ENGINE = 8, 10, 100, 4096, Engine(budget=2**28)
if SMOKE:
    QUERIES, K, DRAWS, DIM = 2, 3, 2, 64


def ranked(sets, task):
    """Scores that put the images of each set first, in their order, so that as many as there are of them are removed."""
    values = torch.zeros(len(sets), len(task.train), dtype=torch.float64)
    for row, one in enumerate(sets):
        values[row, list(one.images)] = torch.arange(K, K - len(one.images), -1, dtype=torch.float64)
    return Scores(values, task.queries.ids, task.train.ids, {})


def main(recipe, folder):
    model = open_model(banks.train_reference(recipe, folder))
    queries = subset(digits_bank(recipe).queries["generated"], range(QUERIES))
    task = Task(model.forward, (model.final,), recipe.train, queries, folder / "features", ENGINE, study=recipe.study)
    method = trak(draws=uniform(DRAWS), dim=DIM)
    sets = {how: most_influential(method, task, K, how) for how in HOWS}
    share = K / len(recipe.train)
    plan = counterfactual.Plan(fractions=(share,), sizes=(share,), stack=recipe.stack)
    asked = counterfactual.Asked(queries, range(QUERIES), recipe.draws, None)
    scores = {how: ranked(found, task) for how, found in sets.items()}
    result = counterfactual.run(plan, recipe.study, recipe.train, model, asked, scores, folder, ENGINE)
    chosen = {
        how: {
            "images": [len(one.images) for one in found],
            "predicted": [one.rises[-1] for one in found],
            "also_greedy": [len({*one.images} & {*top.images}) for one, top in zip(found, sets["greedy"], strict=True)],
        }
        for how, found in sets.items()
    }
    return {**result, "method": "trak", "draws": DRAWS, "damping": method.damping, "sets": chosen}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "sets-digits"
    record("sets-digits", {"question": __doc__.split("\n")[0], **main(digits(), folder)})
