"""By how much does the loss of a picture rise when the 1 % of the images that a method names are taken away?

python benchmarks/top_removals.py digits [FOLDER] | icons|photos DATA [FOLDER]      half an hour of one core, after its rows

Eight generated pictures; the images that each method ranks first are left out and the model is trained again with the seeds
of two full models, as peers do ("QLD"): in units of the loss, beside random removals of as many images.
Rows of FOLDER (runs/bench-digits) are taken; those of further training from further_pictures.py.
"""

from dataclasses import replace

import torch

import further_pictures
from _record import SMOKE, asked_bank, record
from further_pictures import FURTHER, chosen, scored
from whence.data.images import subset
from whence.evaluation import banks, counterfactual
from whence.features.rows import identity
from whence.models import open_model
from whence.storage.scores import load_scores
from whence.types import Engine

METHODS = ("further_training", "ek_fac", "trak", "d_trak", "pixel_cosine")
PLAN, QUERIES, ENGINE = counterfactual.Plan(fractions=(0.01,), sizes=(0.01,)), 8, Engine(budget=2**31)
if SMOKE:
    PLAN, QUERIES = counterfactual.Plan(fractions=(0.1,), random=2, sizes=(0.1,)), 2


def rows_of(bank, recipe, folder):
    """Pictures that all methods have scores of, and these scores."""
    rows = list(chosen(bank, further_pictures.EVERY)["generated"])[:QUERIES]
    queries = subset(bank.queries["generated"], rows)
    found = {}
    for name in METHODS:
        path = folder / "rows" / name / "generated"
        if path.exists():
            scores = load_scores(path)
            told = {**scores.recipe, "queries": identity(queries)}
            some = {"values": scores.values[rows], "query_ids": list(queries.ids), "recipe": told}
            found[name] = replace(scores, **some, pictures=None)
    if FURTHER not in found and bank.name != "digits":
        of_kinds, _ = scored(bank, recipe, folder, FURTHER, further_pictures.further(recipe), further_pictures.EVERY)
        one = next(iter(found.values()))
        values = torch.from_numpy(of_kinds["generated"][: len(rows)])
        found[FURTHER] = replace(one, values=values, recipe={"method": FURTHER})
    return queries, found


def main(bank, recipe, folder):
    queries, scores = rows_of(bank, recipe, folder)
    model = open_model(banks.train_reference(recipe, folder))
    asked = counterfactual.Asked(queries, range(len(queries)), recipe.draws, None)
    plan = replace(PLAN, stack=recipe.stack)
    return counterfactual.run(plan, recipe.study, recipe.train, model, asked, scores, folder / "top", ENGINE)


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, bank, recipe, folder = asked_bank()
    result = {"question": __doc__.split("\n")[0], **main(bank, recipe, folder)}
    for each in ("digits", "icons") if SMOKE else (name,):
        record(f"top-{each}", result)
