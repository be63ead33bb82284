"""whence remove-first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import DATA, METHOD, MODEL, RUNNING
from whence.cli.options import Option, Verb
from whence.cli.terminal import console, say

if TYPE_CHECKING:
    from whence.evaluation.remove_first import Found


@dataclass(frozen=True)
class RemoveFirst:
    """The training images that, taken away together, would hurt each picture of a finished run most."""

    run: Annotated[Path, Option("A run folder of `whence attribute`.", "Arguments", argument=True)]
    k: Annotated[int, Option("Images of a set, at most.", METHOD)]
    query: Annotated[tuple[str, ...], Option("A picture, by its name; may be repeated. All by default.", DATA)] = ()
    model: Annotated[Path | None, Option("Where the model is now, if it moved.", MODEL)] = None
    train_data_dir: Annotated[Path | None, Option("Where the training images are now, if they moved.", DATA)] = None
    query_data_dir: Annotated[Path | None, Option("Where the pictures are now, if they moved.", DATA)] = None
    method: Annotated[str | None, Option("Whose scores; needed where the run has several.", METHOD)] = None
    how: Annotated[
        str,
        Option(
            "greedy (the largest scores), leverage (each corrected for what its image holds in place alone) or adaptive "
            "(each image after the model was fitted without those before it).",
            METHOD,
            accepted=("greedy", "leverage", "adaptive"),
        ),
    ] = "greedy"
    index_dir: Annotated[Path | None, Option("The folder of `--index_dir`, if the run had one.", RUNNING)] = None


def remove_first(options: RemoveFirst) -> None:
    from whence.evaluation import remove_first as room
    from whence.evaluation.replay import Where
    from whence.report.words import question_told

    sides = (options.model, options.train_data_dir, options.query_data_dir, options.index_dir)
    where = Where(options.run, *sides)
    asked = room.Asked(where, options.k, options.how, options.method, options.query)
    found = room.remove_first(asked)
    _print(found)
    if told := question_told(found.scores):
        say(f"asked of the pictures: {told}; the sets are for that alone, and `whence preview` shows whole pictures")
    if found.scores.scale == "rank":
        say(f"rise: without units, like the scores of {asked.folder.name}; compare it within a picture only")
    for name, count in [*found.stopped.items()][:SHOWN]:
        say(f"{name}: stopped after {count} of {asked.k}; no other image has a positive score")
    if len(found.stopped) > SHOWN:
        say(f"... and {len(found.stopped) - SHOWN} more pictures stopped early")
    say(f"sets: {found.folder / asked.how}.csv and .json")
    query = next(name for name, one in found.sets.items() if one.images)
    say(f"to check, for a model of `whence train`: {room.check_command(found, query)}")
    say("a prediction is no proof; `whence counterfactual` retrains without what methods name, on a bank")


SHOWN, STEPS = 5, 10


def _print(found: Found) -> None:
    """The first steps of the first pictures."""
    from rich.table import Table

    last = "rise" if found.scores.scale == "rank" else "rise of the loss"
    table = Table("picture", "removed", "image", last, box=None, pad_edge=False)
    for query, one in [*found.sets.items()][:SHOWN]:
        steps = [*zip(found.names(query), one.rises, strict=True)]
        for step, (image, rise) in enumerate(steps[:STEPS], 1):
            table.add_row(query if step == 1 else "", str(step), image, f"{rise:+.4g}")
        if len(steps) > STEPS:
            table.add_row("", str(len(steps)), f"... and {len(steps) - STEPS} more", f"{one.rises[-1]:+.4g}")
    console(width=120).print(table)
    if len(found.sets) > SHOWN:
        say(f"... and {len(found.sets) - SHOWN} more pictures")


VERB = Verb(remove_first, RemoveFirst)
