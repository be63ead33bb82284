"""How much of a slow method does a student keep that answers in milliseconds?

    OMP_NUM_THREADS=1 python benchmarks/distill.py [FOLDER [ARM ...]]      half an hour of one core; by default runs/distill

Teachers are kept in the folder; arms that are named are put among those of the results.

Teachers: EK-FAC and TRAK at the dampings that the board of the digits bank chose, 100 draws, on that bank's model. Fitted to
digits that the bank never uses, each as it is and moved by a pixel, and to pictures that the model draws from other seeds;
judged on the bank's own 100 + 100 queries, which retraining has measured: LDS of teacher, student and plain likeness of
pixels; Spearman and mAP(10) with the teacher. `fewer` takes every fourth of these pictures.
Marks: a student's LDS is 0.9 of its teacher's; a picture takes less than 50 ms.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter

os.environ["WHENCE_QUIET"] = "1"

import numpy as np
import torch

from _record import RESULTS, RUNS, SMOKE, digits, digits_bank, record
from whence.data.images import tensor_images
from whence.diffusion.draws import uniform
from whence.evaluation import banks
from whence.evaluation.distill import Lesson, distill
from whence.evaluation.lds import lds
from whence.features.distilling import Distillation
from whence.features.rows import identity
from whence.features.students import features
from whence.methods import build
from whence.models import open_model, sample
from whence.storage.scores import load_scores, save_scores
from whence.types import Engine, Scores, Task

TEACHERS = {"ek_fac": {"damping": 0.01}, "trak": {"damping": 1.0, "dim": 4096}}
DRAWS, DRAWN, UNUSED = 100, 2500, ((512, 1000), (1100, 1797))
SMALL, LARGE = Distillation(hidden=2, width=512, dropout=0.0, steps=1500), Distillation(dropout=0.0, steps=3000)
ARMS = {
    "order": ("ek_fac", ("pixels",), SMALL, 1),
    "sizes": ("ek_fac", ("pixels",), replace(SMALL, fit="sizes"), 1),
    "sizes, fewer": ("ek_fac", ("pixels",), replace(SMALL, fit="sizes"), 4),
    "sizes, representation": ("ek_fac", ("representation",), replace(SMALL, fit="sizes"), 1),
    "sizes, large": ("ek_fac", ("pixels",), replace(LARGE, fit="sizes"), 1),
    "sizes, large, longer": ("ek_fac", ("pixels",), replace(LARGE, fit="sizes", steps=6000), 1),
    "sizes, trak": ("trak", ("pixels",), replace(SMALL, fit="sizes"), 1),
}
if SMOKE:
    TEACHERS, DRAWS, DRAWN, UNUSED = {"trak": {"damping": 1.0, "dim": 16}}, 2, 40, ((512, 520),)
    ARMS = {"sizes": ("trak", ("pixels",), Distillation("sizes", 1, 8, steps=3), 1)}


def moved(x0):
    """Pictures moved by a pixel, in turn up, down, left and right; what comes in is background."""
    found = torch.full_like(x0, -1)
    found[0::4, ..., :-1, :], found[1::4, ..., 1:, :] = x0[0::4, ..., 1:, :], x0[1::4, ..., :-1, :]
    found[2::4, ..., :, :-1], found[3::4, ..., :, 1:] = x0[2::4, ..., :, 1:], x0[3::4, ..., :, :-1]
    return found


def pictures(bank, model):
    """The bank's queries first, then what students are fitted to."""
    own = [bank.queries[kind].batch(range(len(bank.queries[kind]))).x0 for kind in banks.QUERIES]
    real = torch.cat([banks.digit_images(*some).batch(range(some[1] - some[0])).x0 for some in UNUSED])
    drawn = banks.to_bytes(sample(model, DRAWN, seed=1)).float() / 127.5 - 1
    whole = torch.cat([*own, real, moved(real), drawn])
    return tensor_images(whole, [f"{i:05d}" for i in range(len(whole))]), [len(some) for some in own]


def taught(name, task, folder):
    """The scores of a teacher, kept in the folder, and the seconds they took."""
    if not (folder / name / "scores.json").is_file():
        begun = perf_counter()
        scores = build(name, task.forward, {**TEACHERS[name], "draws": uniform(DRAWS)})(task)
        took = {"seconds": perf_counter() - begun}
        save_scores(folder / name, replace(scores, recipe={**scores.recipe, **took}), 1)
    scores = load_scores(folder / name)
    return scores, scores.recipe["seconds"]


def fewer(scores, task, held, step):
    """Every `step`-th of the queries behind the first `held`."""
    from whence.data.images import subset

    rows = [*range(held), *range(held, len(task.queries), step)]
    asked = subset(task.queries, rows)
    recipe = {**scores.recipe, "queries": identity(asked)}
    some = Scores(scores.values[rows], [scores.query_ids[row] for row in rows], scores.train_ids, recipe)
    return some, replace(task, queries=asked)


def judged(values, bank, counts):
    """LDS of scores of the bank's queries, per query set."""
    found, start = {}, 0
    for kind, count in zip(banks.QUERIES, counts, strict=True):
        test = bank.tables[kind].role("test")
        masks, outputs = test.averaged()
        each = lds(values[start : start + count].numpy(), masks, outputs, test.better or "lower")
        found[kind], start = float(np.nanmean(each)), start + count
    return found


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if sys.argv[1:] else RUNS / "distill"
    recipe = digits()
    bank = digits_bank(recipe)
    model = open_model(banks.train_reference(recipe, folder))
    queries, counts = pictures(bank, model)
    held = sum(counts)
    task = Task(model.forward, (model.final,), recipe.train, queries, folder, Engine(budget=2**31))
    teachers = {name: taught(name, task, folder / "scores") for name in TEACHERS}
    result = {
        name: {"seconds": took, "lds": judged(scores.values[:held].double(), bank, counts)}
        for name, (scores, took) in teachers.items()
    }
    named = sys.argv[2:] or [*ARMS]
    rows = json.loads((RESULTS / "distill.json").read_text())["students"] if sys.argv[2:] else {}
    for arm in named:
        teacher, encoders, how, step = ARMS[arm]
        scores, asked = fewer(teachers[teacher][0], task, held, step)
        begun = perf_counter()
        found = distill(scores, asked, Lesson(encoders, how, top=min(10, len(recipe.train) - 1)), held=range(held))
        took = perf_counter() - begun
        phi = features(encoders, asked, asked.queries, model.final)[:held]
        own = judged(found.student.scores(phi, task.train), bank, counts)
        share = {kind: own[kind] / result[teacher]["lds"][kind] for kind in own}
        rows[arm] = {"teacher": teacher, "encoders": encoders, "how": repr(how), "fitted": found.fitted, "lds": own}
        rows[arm] |= {"share": share, "agreement": found.agreement, "milliseconds": found.milliseconds, "seconds": took}
        print(arm, rows[arm], flush=True)
    x, q = (features(("pixels",), task, images, model.final).double() for images in (recipe.train, queries))
    plain = torch.nn.functional.normalize(q[:held], dim=1) @ torch.nn.functional.normalize(x, dim=1).T
    best = max(rows, key=lambda arm: sum(rows[arm]["share"].values()))
    marks = {"share": 0.9, "milliseconds": 50}
    met = {
        "share": {kind: rows[best]["share"][kind] >= 0.9 for kind in rows[best]["share"]},
        "milliseconds": all(row["milliseconds"] < 50 for row in rows.values()),
    }
    payload = {"question": __doc__.splitlines()[0], "images": len(recipe.train), "judged": held, "draws": DRAWS}
    payload |= {"teachers": result, "plain_pixels": judged(plain, bank, counts), "students": rows}
    record("distill", {**payload, "best": best, "marks": marks, "met": met})


if __name__ == "__main__":
    main()
