"""whence distill."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import DATA, METHOD, MODEL, RUNNING, write_config
from whence.cli.options import Option, Verb
from whence.cli.terminal import console, say

if TYPE_CHECKING:
    from whence.evaluation.distill import Report

FIT, JUDGED = "Fit", "How well it ranks"


@dataclass(frozen=True)
class Distill:
    """Fit a small network to the scores of a slow method, so that the next picture costs milliseconds.

    It reads a finished run of `whence attribute` and writes a student, for --method distilled --set student=FOLDER. What it
    says of pictures that it was not fitted to is compared with the method, and with plain likeness.
    """

    run: Annotated[Path, Option("A run folder with finished scores.", "Arguments", argument=True)]
    method: Annotated[
        str | None, Option("The method of the run that teaches; needed where there are several.", METHOD)
    ] = None
    encoder: Annotated[
        tuple[str, ...],
        Option(
            "What the network reads: pixels, representation (of the model), or the folder of a CLIP, ViT or DINO model; "
            "may be repeated.",
            METHOD,
        ),
    ] = ("pixels",)
    fit: Annotated[
        str,
        Option(
            "The teacher's order, or the sizes of its scores too, for what adds them up.",
            FIT,
            accepted=("order", "sizes"),
        ),
    ] = "order"
    hidden: Annotated[int, Option("Hidden layers; 0 for a linear map.", FIT, min=0)] = 3
    width: Annotated[int, Option("Of the layers and of the embedding.", FIT, min=1)] = 768
    dropout: Annotated[float, Option("Share of the hidden values left out in a step.", FIT, min=0.0)] = 0.1
    steps: Annotated[int, Option("Steps of the fit.", FIT, min=1)] = 1000
    candidates: Annotated[
        int, Option("Training images that each picture is fitted on: the first and the nearest.", FIT, min=2)
    ] = 10_000
    seed: Annotated[int, Option("Of weights, steps and held-out pictures.", FIT)] = 0
    held_out: Annotated[float, Option("Share of the pictures that it is judged on, not fitted to.", JUDGED)] = 0.2
    top: Annotated[int, Option("L of mAP(L): the images that the teacher ranks first.", JUDGED, min=1)] = 10
    ledger: Annotated[Path | None, Option("A ledger that has measured the pictures, for the LDS.", JUDGED)] = None
    name: Annotated[str, Option("Name of that measurement.", JUDGED, needs=("ledger",))] = "loss"
    model: Annotated[Path | None, Option("Where the model is now, if it moved.", MODEL)] = None
    train_data_dir: Annotated[Path | None, Option("Where the training images are now, if they moved.", DATA)] = None
    query_data_dir: Annotated[Path | None, Option("Where the pictures are now, if they moved.", DATA)] = None
    output_dir: Annotated[Path | None, Option("Folder of the student; RUN/students/METHOD by default.", RUNNING)] = None


def distill(options: Distill) -> None:
    from whence.evaluation.distill import Lesson, Wanted, teacher_of, write_student
    from whence.evaluation.replay import Where, request_of
    from whence.evaluation.source import opened_ledger
    from whence.features.distilling import Distillation
    from whence.storage.scores import load_scores

    settings = ("fit", "hidden", "width", "dropout", "steps", "candidates", "seed")
    how = Distillation(**{name: vars(options)[name] for name in settings})
    lesson = Lesson(options.encoder, how, options.held_out, options.top)
    method = teacher_of(options.run, options.method)
    folder = options.output_dir or options.run / "students" / method
    where = Where(folder, options.model, options.train_data_dir, options.query_data_dir)
    ledger = None
    if options.ledger is not None:
        at = options.run / "scores" / method
        request = request_of(at, load_scores(at), where)
        ledger = (opened_ledger(options.ledger, Path(str(request.train)), request.resolution), options.name)
    found = write_student(Wanted(options.run, method, where, ledger), lesson)
    write_config(options, folder)
    _say(found, method, options.top)
    say(f"student: {folder}")
    say(f"use it: whence attribute ... --method distilled --set student={folder}")
    for doubt in found.doubts:
        warnings.warn(doubt, stacklevel=2)


def _say(found: Report, method: str, top: int) -> None:
    from rich.table import Table

    from whence.evaluation.distill import table

    n = len(found.student.digests)
    say(f"{method}: fitted to {found.fitted:,} pictures, judged on {found.judged:,} others, {n:,} training images")
    shown = Table("", f"mAP({top})", "Spearman", *(("LDS", "95 %") if found.lds else ()), box=None, pad_edge=False)
    for name, row in table(found).items():
        figures = [f"{row[key]:.3f}" if key in row else "" for key in ("map", "spearman")]
        if found.lds:
            figures += [f"{row['lds'].estimate:.3f}", f"{row['lds'].low:.3f} to {row['lds'].high:.3f}"]
        shown.add_row("plain likeness" if name == "encoders" else name, *figures)
    console().print(shown)
    say(f"a picture takes {found.milliseconds:.1f} ms, beside reading it and opening the model")


VERB = Verb(distill, Distill, config=True)
