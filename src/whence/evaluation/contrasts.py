"""Contrasts of a finished run: RUN/contrast/THIS--NOT_THAT/scores/METHOD and a report beside them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whence.data.images import TensorImages, tensor_images
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.evaluation.contrast import check_contrastable, contrast_name, contrasted, drawn_apart
from whence.evaluation.replay import method_of
from whence.methods.question import linear_in_query
from whence.storage.notes import scored
from whence.storage.scores import load_scores, save_scores
from whence.task.reports import noted_images, refuse_others, write_report
from whence.types import Forward, Images, Scores, WhenceError, digest

FOLDER = "contrast"


@dataclass(frozen=True)
class Asked:
    """Why this picture rather than that one.

    Args:
        run: a run folder of `whence attribute`.
        this: the name of a picture that was explained.
        not_that: the name of another.
        methods: of the run; empty for all whose scores can be subtracted.
        train: where the training images are now; None for where they were.
        queries: where the pictures are now, likewise.
    """

    run: Path
    this: str
    not_that: str
    methods: Sequence[str] = ()
    train: Path | None = None
    queries: Path | None = None

    @property
    def folder(self) -> Path:
        """Where it is written; names that are no names of folders are told apart by a digest."""
        name = f"{self.this}--{self.not_that}"
        safe = re.sub(r"[^\w.-]+", "_", name)[:100].lstrip(".")
        return self.run / FOLDER / (safe if safe == name else f"{safe}-{digest([self.this, self.not_that], 8)}")


@dataclass(frozen=True)
class Told:
    """What came out.

    Args:
        report: the page.
        results: method -> scores [1, n].
        left_out: the methods whose scores cannot be subtracted, and why.
    """

    report: Path
    results: dict[str, Scores]
    left_out: list[str]


def write_contrast(asked: Asked) -> Told:
    """Subtract the scores of two pictures, and write them with their report."""
    found, left_out = _subtractable(asked)
    train = noted_images(asked.run, "train", asked.train)
    queries = noted_images(asked.run, "queries", asked.queries)
    for name, scores in found.items():
        for images, side in ((train, "train"), (queries, "queries")):
            if scores.recipe[side] not in images.known:
                option = "--train_data_dir" if side == "train" else "--query_data_dir"
                raise WhenceError(f"{name} was computed for other images", option, "the images of the run")
    results = {}
    for name, scores in found.items():
        same = len({_digest(queries.images, one) for one in (asked.this, asked.not_that)}) == 1
        results[name] = contrasted(scores, asked.this, asked.not_that, drawn_apart(scores, same))
        save_scores(asked.folder / "scores" / name, results[name])
    for name, folder in scored(asked.folder).items():
        if name not in results:
            shutil.rmtree(folder)  # of methods that were asked for before: the page does not show them
    both = side_by_side(queries.images, asked.this, asked.not_that)
    title = "Why this picture rather than that one?"
    return Told(
        write_report(asked.folder, results, train.images, both, title, {"Run": str(asked.run)}), results, left_out
    )


def _subtractable(asked: Asked) -> tuple[dict[str, Scores], list[str]]:
    """The scores of a run that can be subtracted, and why others cannot; one that was asked for by name must."""
    there = scored(asked.run)
    found, problems = {}, []
    for name in asked.methods or there:
        if name not in there:
            raise WhenceError(f"there are no scores of {name}", str(asked.run), f"--method {' or '.join(there)}")
        scores = load_scores(there[name])
        refuse_others(asked.run, there[name], scores.recipe)
        contrasted(scores, asked.this, asked.not_that)  # refuses names that are not there
        try:
            check_contrastable(name, scores, _linear(there[name], scores))
        except WhenceError as problem:
            if asked.methods:
                raise
            problems.append(problem)
        else:
            found[name] = scores
    if not found:
        raise problems[0]
    return found, [str(problem) for problem in problems]


def _linear(folder: Path, scores: Scores) -> bool:
    """Whether the method of finished scores says that these are linear in the query."""
    if "call" not in scores.recipe:
        raise WhenceError("the recipe does not say which method this is", str(folder), "scores of `whence attribute`")
    classifier = scores.recipe["forward"].get("is") == "Classifier"
    forward: Forward = Classifier() if classifier else Denoiser(linear_schedule(1))  # says which kind of model it is
    return linear_in_query(method_of(scores, forward))


def _digest(images: Images, name: str) -> str:
    return images.digests[list(images.ids).index(name)]


def side_by_side(images: Images, this: str, not_that: str) -> TensorImages:
    """One picture of two, for the page: this, a white gap, and that; with both captions where there are some.

    Args:
        images: the pictures that were explained.
        this: the name of one.
        not_that: the name of another.
    """
    rows = [list(images.ids).index(name) for name in (this, not_that)]
    x0: list[Tensor] = list(images.batch(rows).x0)
    gap = torch.ones(*x0[0].shape[:-1], max(1, x0[0].shape[-1] // 16))
    texts = [images.meta["text"][row] for row in rows] if "text" in images.meta else []
    meta = {"text": [f"{texts[0]} | {texts[1]}"]} if texts else None
    picture = torch.cat([x0[0], gap.to(x0[0]), x0[1]], dim=-1)
    return tensor_images(picture[None], [contrast_name(this, not_that)], meta)
