"""From the finished scores of a slow method to a student that ranks like it in milliseconds, and how well it does.

RUN/students/METHOD/student.safetensors    weights, and the embedded training images
RUN/students/METHOD/student.json           digests of images, encoders and teacher, settings, figures on held-out queries

The student is fitted to some of the teacher's queries and judged on the others, beside the plain likeness by its encoders:
mAP(L) and Spearman with the teacher, and LDS where a ledger has measured the queries.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whence.data.images import subset
from whence.diffusion.noise import check_seed, key_of, seed_for, stream, uniforms
from whence.evaluation.judging import judging
from whence.evaluation.lds import Interval, bootstrap, predict, spearman
from whence.evaluation.ledger import Ledger
from whence.evaluation.outcomes import Table
from whence.evaluation.replay import Where, check_same_world, request_of
from whence.evaluation.retrieval import average_precision
from whence.features.distilling import Distillation, Side, fit
from whence.features.parts import Encoded
from whence.features.rows import identity, prepare
from whence.features.students import NOTES, Student, encoder_named, features, set_of
from whence.storage.files import differences, file_digest, read_json
from whence.storage.notes import scored
from whence.storage.scores import load_scores
from whence.types import Images, Scores, Task, WhenceError, check_signed, describe

LEAST_FIT, LEAST_JUDGED = 40, 10
"""Queries. With fewer a student learns the teacher's queries by heart, and figures say nothing; several hundred are good."""
TIMED = 20  # pictures, one by one


DEFAULT = Distillation()


@dataclass(frozen=True)
class Lesson:
    """What a student is made of.

    Args:
        encoders: names, as `students.encoder_named` takes them.
        how: the fit.
        held_out: share of the teacher's queries that it is judged on.
        top: L of mAP(L).
    """

    encoders: Sequence[str] = ("pixels",)
    how: Distillation = DEFAULT
    held_out: float = 0.2
    top: int = 10

    def check(self, queries: int, images: int) -> None:
        """Refuse what cannot be fitted or judged, with how many queries are needed.

        Args:
            queries: different pictures among those of the teacher.
            images: training images.
        """
        check_seed(self.how.seed)
        if not 0 < self.held_out < 1:
            raise WhenceError(f"held_out is {self.held_out:g}", "distill", "above 0 and below 1")
        if not 1 <= self.top < images:
            raise WhenceError(f"top is {self.top} of {images:,} training images", "distill", f"1 to {images - 1:,}")
        if not self.encoders or len(set(self.encoders)) < len(self.encoders):
            raise WhenceError(f"encoders {', '.join(self.encoders) or 'none'}", "distill", "one or more, each once")
        for name in self.encoders:
            encoder_named(name)
        judged = self.judged(queries)
        if judged < LEAST_JUDGED or queries - judged < LEAST_FIT:
            needed = next(m for m in range(queries, 10**9) if self._enough(m))
            raise WhenceError(
                f"the teacher scored {queries:,} pictures: {queries - judged:,} to fit by, {judged:,} to judge by",
                "distill",
                f"{needed:,} or more at held_out {self.held_out:g}, {LEAST_JUDGED} to judge by and {LEAST_FIT} to fit by; "
                "several hundred are good, and pictures that the model draws cost nothing but the teacher's time",
            )

    def judged(self, queries: int) -> int:
        """How many of so many queries are held out."""
        return round(self.held_out * queries)

    def _enough(self, queries: int) -> bool:
        judged = self.judged(queries)
        return judged >= LEAST_JUDGED and queries - judged >= LEAST_FIT


@dataclass(frozen=True)
class Report:
    """A student and what came out.

    Args:
        student: it itself.
        fitted: queries that it was fitted to.
        judged: queries that it was judged on.
        agreement: "student" and "encoders" -> mAP and Spearman with the teacher on these.
        lds: "teacher", "student", "encoders" -> LDS on these; {} without a ledger.
        milliseconds: a picture takes, from its pixels to scores for every training image.
        doubts: what is to be known before it is used.
    """

    student: Student
    fitted: int
    judged: int
    agreement: Mapping[str, Mapping[str, float]]
    lds: Mapping[str, Interval]
    milliseconds: float
    doubts: Sequence[str] = field(default_factory=tuple)


def distill(
    scores: Scores, task: Task, lesson: Lesson, truth: Table | None = None, held: Sequence[int] | None = None
) -> Report:
    """Fit a student to scores, and judge it.

    Args:
        scores: of the teacher [m, n].
        task: with the same queries and training images.
        lesson: what the student is made of.
        truth: measured test rows of the same queries; None for no LDS.
        held: rows that are judged on, and that nothing is fitted to; None for a share of them that is drawn.
    """
    _check(scores, task)
    different = len(set(task.queries.digests))
    lesson.check(different, len(task.train))
    held = _held_out(task.queries, lesson) if held is None else list(held)
    point, apart = task.trajectory[-1], {task.queries.digests[row] for row in held}
    phi = {side: features(lesson.encoders, task, images, point) for side, images in _sides(task).items()}
    near = _near(lesson, task)
    fitted = [row for row in _by_content(task.queries) if task.queries.digests[row] not in apart]
    columns = _by_content(task.train)
    sides = _side(phi["queries"], task.queries, fitted), _side(phi["train"], task.train, columns)
    values = scores.values.double()
    weights = fit(*sides, values[fitted][:, columns], near[fitted][:, columns], lesson.how)
    student = _student(weights, phi["train"], task, lesson, scores)
    found = {"student": student.scores(phi["queries"][held], task.train), "encoders": near[held]}
    agreement = {name: _agreement(each, values[held], lesson.top) for name, each in found.items()}
    judged = {} if truth is None else _lds({"teacher": values[held], **found}, truth, held)
    milliseconds = _timed(student, task, held)
    doubts = tuple(_doubts(agreement, judged, lesson))
    return Report(student, len(fitted), len(held), agreement, judged, milliseconds, doubts)


def _check(scores: Scores, task: Task) -> None:
    """Refuse scores that teach nothing, or something else than which image did more FOR the query."""
    check_signed("distill", scores)
    if "groups" in scores.recipe or list(scores.train_ids) != list(task.train.ids):
        raise WhenceError("these scores are not of the training images one by one", "distill", "scores of every image")
    if list(scores.query_ids) != list(task.queries.ids):
        raise WhenceError("these scores are of other pictures", "distill", "the pictures of the run")
    for side, images in _sides(task).items():
        if scores.recipe.get(side, own := identity(images)) != own:
            raise WhenceError(f"these scores are of other {side} of the same names", "distill", "those of the run")
    constant = (scores.values == scores.values[:, :1]).all(1).nonzero().flatten().tolist()
    if constant:
        raise WhenceError(
            f"for {len(constant):,} of {len(scores.query_ids):,} pictures, such as {scores.query_ids[constant[0]]!r}, every "
            "training image has the same score, which ranks nothing",
            "distill",
            "scores of a method that tells the images apart",
        )


def _sides(task: Task) -> dict[str, Images]:
    return {"queries": task.queries, "train": task.train}


def _by_content(images: Images) -> list[int]:
    """Rows in the order of the contents: neither names nor the order of files enter a fit."""
    return sorted(range(len(images)), key=lambda row: (images.digests[row], images.ids[row]))


def _side(phi: Tensor, images: Images, at: Sequence[int]) -> Side:
    return Side(phi[list(at)], torch.tensor([key_of(images.digests[row]) for row in at]))


def _held_out(queries: Images, lesson: Lesson) -> list[int]:
    """Rows that nothing is fitted to, drawn by content: a picture that is there twice is on one side."""
    contents = sorted(set(queries.digests))
    keys = torch.tensor([key_of(one) for one in contents])
    drawn = uniforms(stream(seed_for(lesson.how.seed, "held out"), 0, keys), 1)[:, 0]
    chosen = {contents[place] for place in drawn.argsort()[: lesson.judged(len(contents))].tolist()}
    return [row for row, one in enumerate(queries.digests) if one in chosen]


def _near(lesson: Lesson, task: Task) -> Tensor:
    """Plain likeness, the mean over the encoders of the cosine of their rows: [m, n]."""
    point = task.trajectory[-1]
    total = torch.zeros(len(task.queries), len(task.train), dtype=torch.float64)
    for name in lesson.encoders:
        q, i = (features([name], task, images, point).double() for images in (task.queries, task.train))
        total += torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(i, dim=1).T
    return total / len(lesson.encoders)


def _student(weights: Mapping[str, Tensor], phi: Tensor, task: Task, lesson: Lesson, scores: Scores) -> Student:
    encoders = [encoder_named(name) for name in lesson.encoders]
    of_pictures = all(getattr(encoder, "of_pictures", False) for encoder in encoders)
    notes = {
        "name": "not saved",
        "train": set_of(task.train),
        "model": None if of_pictures else task.trajectory[-1].digest,
        "encoders_described": describe(encoders),
        "lesson": describe(lesson),
        "teacher": {"recipe": describe(scores.recipe), "scale": scores.scale},
    }
    return Student.of(weights, phi, task.train.digests, lesson.encoders, notes)


def _agreement(found: Tensor, teacher: Tensor, top: int) -> dict[str, float]:
    ranks = spearman(found.T.numpy(), teacher.T.numpy())
    return {"map": float(average_precision(found, teacher, top).mean()), "spearman": float(np.nanmean(ranks))}


def _lds(found: Mapping[str, Tensor], truth: Table, held: Sequence[int]) -> dict[str, Interval]:
    masks, outputs = truth.averaged()
    predicted = {name: predict(values.numpy(), masks) for name, values in found.items()}
    judged = bootstrap(predicted, outputs[:, list(held)], truth.better or "lower")
    return {name: judged.interval(name) for name in found}


def _timed(student: Student, task: Task, held: Sequence[int]) -> float:
    """The median over a few held-out pictures, each by itself: its encoders, its embedding, and all training images."""
    point, engine, seconds = task.trajectory[-1], task.engine, []
    module = prepare(point, engine)
    parts = [Encoded(encoder_named(name)) for name in student.encoders]
    for row in held[:TIMED]:
        one, begun = subset(task.queries, [row]), time.perf_counter()
        phi = []
        for part in parts:
            images = one.pictures if getattr(part.encoder, "of_pictures", False) else one
            batch = images.batch([0]).to(engine.device, engine.dtype)
            phi.append(part.compute(module, task.forward, iter([batch]), 1, engine).cpu())
        student.scores(torch.cat(phi, 1).float(), task.train)
        seconds.append(time.perf_counter() - begun)
    return 1000 * float(np.median(seconds))


def _doubts(agreement: Mapping[str, Mapping[str, float]], judged: Mapping[str, Interval], lesson: Lesson) -> list[str]:
    found = []
    own, plain = agreement["student"], agreement["encoders"]
    if own["map"] <= plain["map"]:
        found.append(
            f"the student finds the teacher's first images no better than plain likeness does (mAP {own['map']:.3f}, "
            f"{plain['map']:.3f}): it learned nothing of them; give more pictures, or another encoder"
        )
    if judged and judged["student"].estimate < 0.9 * judged["teacher"].estimate:
        instead = "; fitted to sizes in place of the order it may keep more" if lesson.how.fit == "order" else ""
        share = judged["student"].estimate / judged["teacher"].estimate
        found.append(f"its LDS is {100 * share:.0f} % of the teacher's: sums of its scores say that much less{instead}")
    return found


@dataclass(frozen=True)
class Wanted:
    """What `whence distill` is asked for.

    Args:
        run: a run folder with finished scores.
        method: the teacher; None where the run has scores of one method.
        where: model and images are now, and the folder of the work.
        ledger: that judges the student, and the name of its measurement; None for none.
    """

    run: Path
    method: str | None
    where: Where
    ledger: tuple[Ledger, str] | None = None


def teacher_of(run: Path, method: str | None) -> str:
    """The method whose scores are distilled.

    Args:
        run: a run folder with finished scores.
        method: as it was asked for; None where the run has scores of one.
    """
    there = scored(run)
    if method is None and len(there) > 1:
        raise WhenceError(f"{run} has scores of {len(there)} methods", "--method", ", ".join(there))
    if method is not None and method not in there:
        raise WhenceError(f"{run} has no scores of {method}", "--method", ", ".join(there))
    return method or next(iter(there))


def _keep_others(folder: Path, lesson: Lesson, method: str) -> None:
    """Refuse a folder that holds the student of another lesson, which would be lost."""
    if not (folder / NOTES).is_file():
        return
    notes = read_json(folder / NOTES)
    taught = notes.get("teacher", {}).get("method")
    expected = {"method": method, "lesson": describe(lesson)}
    different = differences(expected, {"method": taught, "lesson": notes.get("lesson", {})})
    if different:
        told = f"holds a student that was made otherwise ({different[0][:200]})"
        raise WhenceError(told, str(folder), "another --output_dir, or the folder taken away")


def write_student(wanted: Wanted, lesson: Lesson) -> Report:
    """Fit a student to a method of a run, judge it, and write it into the folder of the work. One that was made otherwise
    and lies there is not replaced: that is refused."""
    method, folder = teacher_of(wanted.run, wanted.method), Path(wanted.where.output)
    at = wanted.run / "scores" / method
    scores = load_scores(at)
    if scores.recipe.get("method", {}).get("is") == "Distilled":
        raise WhenceError("these are scores of a student", f"{at}", "scores of its teacher")
    check_signed("distill", scores)  # before anything is opened
    lesson.check(len(scores.query_ids), len(scores.train_ids))
    _keep_others(folder, lesson, method)
    task = request_of(at, scores, wanted.where).task()
    check_same_world(task, scores.recipe)
    truth = None if wanted.ledger is None else judging(wanted.run, {method: scores}, *wanted.ledger)
    found = distill(scores, task, lesson, truth)
    files = {name: file_digest(at / name) for name in ("scores.json", "scores.safetensors")}
    notes = {**found.student.notes, "teacher": {**found.student.notes["teacher"], "method": method, "files": files}}
    kept = {"fitted": found.fitted, "judged": found.judged, "agreement": found.agreement}
    notes |= {"figures": {**kept, "lds": describe(found.lds), "milliseconds": found.milliseconds}}
    student = replace(found.student, notes={**notes, "name": str(folder)})
    student.save(folder)
    return replace(found, student=student)


def table(found: Report) -> dict[str, dict[str, Any]]:
    """What is printed: a row each for teacher, student and encoders."""
    rows: dict[str, dict[str, Any]] = {name: {} for name in ("teacher", "student", "encoders")}
    for name, figures in found.agreement.items():
        rows[name] |= figures
    for name, interval in found.lds.items():
        rows[name]["lds"] = interval
    return rows if found.lds else {name: rows[name] for name in found.agreement}
