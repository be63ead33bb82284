"""The training images that are to be removed first: the most influential set of each picture of a finished run.

What is computed is in `methods.sets` and `methods.surrogates`; here scores and features of a run folder are found again, and
the sets are written beside the scores, as RUN/sets/METHOD/HOW.json and HOW.csv.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from whence.evaluation.replay import Where, method_of, notes_of, request_of
from whence.features.rows import identity
from whence.methods.question import question_note
from whence.methods.sets import Influential, check_count, greedy
from whence.methods.surrogates import HOWS, Surrogate, chosen_set, known, missing, own_scores, surrogates
from whence.plain import row_of_picture
from whence.storage.columns import as_csv, plain_columns
from whence.storage.files import file_digest, write_bytes, write_json
from whence.storage.notes import scored
from whence.storage.scores import load_scores
from whence.task import Request
from whence.task.reports import refuse_others
from whence.types import VERSION, Scores, Task, WhenceError, check_signed, describe

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Asked:
    """What is asked of a run.

    Args:
        where: a run folder of `whence attribute`, as `output`, and where its model and its images are now.
        k: images at most.
        how: one of `HOWS`.
        method: whose scores; None for the only one there.
        queries: names of pictures; all of them where there is none.
    """

    where: Where
    k: int
    how: str = "greedy"
    method: str | None = None
    queries: tuple[str, ...] = ()

    @property
    def run(self) -> Path:
        return self.where.output

    @cached_property
    def folder(self) -> Path:
        """RUN/scores/METHOD."""
        there = scored(self.run)
        if self.method is None and len(there) > 1:
            raise WhenceError(f"there are scores of {', '.join(there)}", str(self.run), "--method with one of them")
        name = next(iter(there)) if self.method is None else self.method
        if name not in there:
            raise WhenceError(f"there are no scores of {name}", str(self.run), f"--method {' or '.join(there)}")
        return there[name]

    @cached_property
    def scores(self) -> Scores:
        found = load_scores(self.folder)
        refuse_others(self.run, self.folder, found.recipe)
        return found

    @property
    def rows(self) -> dict[str, int]:
        """Name -> row of the pictures that are asked about."""
        places = {name: row for row, name in enumerate(self.scores.query_ids)}
        return {name: row_of_picture(name, places) for name in self.queries or places}


@dataclass(frozen=True, eq=False)
class Found:
    """The sets of a run.

    Args:
        asked: the question.
        sets: name of a picture -> its set; rises in the units of the scores, those of scale "upweight" over n.
    """

    asked: Asked
    sets: Mapping[str, Influential]

    @property
    def scores(self) -> Scores:
        return self.asked.scores

    @property
    def folder(self) -> Path:
        """RUN/sets/METHOD."""
        return self.asked.run / "sets" / self.asked.folder.name

    @property
    def stopped(self) -> dict[str, int]:
        """The pictures whose sets ended early, no other image having a positive score, and how many images are in them."""
        return {name: len(found.images) for name, found in self.sets.items() if found.stopped}

    def names(self, query: str) -> list[str]:
        """The images of a set, in the order in which they are removed."""
        return [self.scores.train_ids[row] for row in self.sets[query].images]

    def columns(self) -> dict[str, list[object]]:
        """A long table: query, step (1 = removed first), image, rise after it, and the training images' own columns."""
        steps = [
            (query, step, row, rise)
            for query, found in self.sets.items()
            for step, (row, rise) in enumerate(zip(found.images, found.rises, strict=True), 1)
        ]
        table: dict[str, list[object]] = {
            "query": [query for query, _, _, _ in steps],
            "step": [step for _, step, _, _ in steps],
            "image": [self.scores.train_ids[row] for _, _, row, _ in steps],
            "rise": [rise for _, _, _, rise in steps],
        }
        for name, column in plain_columns(self.scores.train_meta).items():
            table[f"train_{name}" if name in table else name] = [column[row] for _, _, row, _ in steps]
        return table


def remove_first(asked: Asked) -> Found:
    """The most influential sets of a run, written into it."""
    if asked.how not in HOWS:
        raise WhenceError(f"there is no {asked.how!r}", "--how", ", ".join(HOWS))
    scores, rows = asked.scores, asked.rows
    check_signed(f"the scores of {asked.folder.name}", scores)
    check_count(asked.k, len(scores.train_ids))
    if asked.how == "greedy":
        found = [greedy(scores.values[row], asked.k) for row in rows.values()]
    else:
        models = _models(asked)
        found = [chosen_set(models[row], asked.k, asked.how) for row in rows.values()]
    if not any(one.images for one in found):
        shown = "the pictures asked about" if len(rows) > 1 else next(iter(rows))
        raise WhenceError(
            f"no training image has a positive score for {shown}: taking one away is not predicted to raise the loss",
            f"the scores of {asked.folder.name}",
            "other pictures (--query), or another method",
        )
    units = len(scores.train_ids) if scores.scale == "upweight" else 1
    sets = {
        name: Influential(one.images, tuple(rise / units for rise in one.rises), one.asked)
        for name, one in zip(rows, found, strict=True)
    }
    result = Found(asked, sets)
    _write(result)
    return result


def _models(asked: Asked) -> Sequence[Surrogate]:
    """The model behind the scores of every picture, from the features that are stored in the run."""
    if question_note(asked.scores) is not None:
        raise WhenceError(
            "these scores answer a narrower question", str(asked.folder), "--how greedy, or whole pictures"
        )
    request = request_of(asked.folder, asked.scores, asked.where)
    method = known(asked.folder.name, method_of(asked.scores, request.opened.forward), asked.how)
    task = _task(asked, request)
    gone = missing(method, task)
    if gone:
        again = "`whence attribute` once more in this folder, or --index_dir if the run had one"
        raise WhenceError(
            f"the features of {' and '.join(gone)} are not there", str(request.shared / "features"), again
        )
    models = surrogates(method, task)
    for name, model, stored in zip(task.queries.ids, models, asked.scores.values.numpy(), strict=True):
        apart = float(np.abs(own_scores(method, model) - stored).max())
        if not apart <= 1e-4 * float(np.abs(stored).max()):  # rounding of other machines, but no other features
            raise WhenceError(
                f"the features that are stored give other scores for {name} than these",
                str(asked.folder),
                "`whence attribute` once more in this folder",
            )
    return models


def _task(asked: Asked, request: Request) -> Task:
    """The question of the run again. Images that are not those of the run are refused before anything is written there."""
    sides = {"train": ("training images", request.train_images), "queries": ("pictures", request.query_images)}
    options = {"train": "--train_data_dir", "queries": "--query_data_dir"}
    for side, (what, images) in sides.items():
        if identity(images) != notes_of(asked.folder.parent.parent)[side]["pictures"]:
            raise WhenceError(f"these are not the {what} of the run", str(asked.run), f"{options[side]} with them")
    return request.task()


def _write(found: Found) -> None:
    asked, scores = found.asked, found.scores
    write_bytes(found.folder / f"{asked.how}.csv", as_csv(found.columns()))
    sets = [
        {"query": query, "images": found.names(query), "rises": list(one.rises), "stopped": one.stopped}
        for query, one in found.sets.items()
    ]
    facts = {
        "format_version": FORMAT_VERSION,
        "whence": VERSION,
        "how": asked.how,
        "k": asked.k,
        "scale": scores.scale,
        "scores": file_digest(asked.folder / "scores.safetensors"),
        "recipe": describe(scores.recipe),
        "sets": sets,
    }
    write_json(found.folder / f"{asked.how}.json", facts)


def check_command(found: Found, query: str) -> str:
    """The command that draws without the set of a query, and trains without it beside that."""
    where, notes = found.asked.where, notes_of(found.asked.folder.parent.parent)
    words = ["whence", "preview", "MODEL", "--train_data_dir", "IMAGES"]
    if "train" in notes:
        words[2] = str(where.model or os.path.normpath(where.output / notes["model"]["folder"]))
        words[4] = str(where.train or os.path.normpath(where.output / notes["train"]["folder"]))
        adapter = notes["model"]["adapter"]
        if adapter is not None:
            option = "--lora" if adapter["is"] == "Lora" else "--custom_diffusion"
            words += [option, os.path.normpath(where.output / adapter["folder"])]
    for name in found.names(query):
        words += ["--without", f"id={name}"]
    return shlex.join([*words, "--retrain"])
