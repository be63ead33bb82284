"""How many of the images that EK-FAC ranks first are among the first k of a cheap method, and what does it save?

python benchmarks/candidates.py [FOLDER]      four minutes of a slow core, after digits.py, whose rows are in FOLDER

Rows of the digits bank with their dampings as chosen there, both kinds of queries. What is timed is EK-FAC at fewer draws,
for four held-out queries, with all images and with those that pixel_cosine names: the processor's seconds of one run each,
curvature included, which is that of all images either way; a run before them warms up.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from _record import RUNS, SMOKE, digits, digits_bank, record
from whence.data.images import subset
from whence.diffusion.draws import stratified
from whence.evaluation import banks, bench
from whence.evaluation.retrieval import recall_at_k
from whence.methods import ek_fac, pixel_cosine
from whence.methods.candidates import Candidates
from whence.models import open_model
from whence.storage.scores import load_scores
from whence.types import Engine, Task

ENGINE = Engine(budget=2**31)
DEAR, CHEAP = "ek_fac", ("pixel_cosine", "trak", "d_trak")
FIRST, COUNTS, ASKED, DRAWS = 10, (16, 32, 64, 128), 4, stratified(16)
if SMOKE:
    FIRST, COUNTS, ASKED, DRAWS = 3, (4, 8), 2, stratified(2)


def recalls(folder, kind):
    """Cheap method -> count -> share of the first images of EK-FAC among its first so many, mean over queries; and how many
    images it names for the first few queries together."""
    scores = {name: load_scores(folder / "rows" / name / kind) for name in (DEAR, *CHEAP)}
    dear = scores[DEAR].values
    wanted = torch.zeros_like(dear, dtype=torch.bool).scatter_(1, dear.topk(FIRST, dim=1).indices, True).numpy()
    recall, union = {}, {}
    for name in CHEAP:
        cheap = scores[name]
        few = replace(cheap, values=cheap.values[:ASKED], query_ids=cheap.query_ids[:ASKED])
        recall[name] = {count: float(np.mean(recall_at_k(cheap.values.numpy(), wanted, count))) for count in COUNTS}
        union[name] = {count: len(Candidates(count).rows(few)) for count in COUNTS}
    return {"queries": len(dear), "recall": recall, "named for the first queries": union}


def seconds(recipe, bank, folder):
    """Of EK-FAC for a few queries, by how many images are named for each: all are scored, or those that are named."""
    model = open_model(banks.train_reference(recipe, folder, ENGINE))
    queries, found = subset(bank.queries["heldout"], range(ASKED)), {}
    for count in (1, 1, *COUNTS, None):
        with TemporaryDirectory() as root:
            task = Task(model.forward, (model.final,), recipe.train, queries, Path(root), ENGINE)
            begun = time.process_time()
            if count is not None:
                task = Candidates(count).named(task, pixel_cosine()(task))
            ek_fac(draws=DRAWS)(task)
            spent = time.process_time() - begun
        found["all" if count is None else count] = {"scored": len(task.to_score), "seconds": spent}
    return found


def main(folder):
    recipe = digits()
    bank = digits_bank(recipe)
    settings = bench.Settings(stratified(2), 8) if SMOKE else bench.Settings()
    bench.run(bank, recipe, folder, (*CHEAP, DEAR), settings, ENGINE)
    kinds = {kind: recalls(folder, kind) for kind in banks.QUERIES}
    timed = {"queries": ASKED, "draws": DRAWS.count, **seconds(recipe, bank, folder)}
    return {"images": len(recipe.train), "first": FIRST, **kinds, "timed": timed}


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits"
    record("candidates", {"question": __doc__.split("\n")[0], **main(given)})
