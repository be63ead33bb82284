"""whence replay."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from whence.cli.common import DATA, MODEL
from whence.cli.options import Option, Verb, error
from whence.cli.terminal import say


@dataclass(frozen=True)
class Again:
    """Compute a result again from its recipe, and say whether it is the same to the last bit; or check a credit receipt."""

    scores: Annotated[
        Path,
        Option("RUN/scores/METHOD of a finished run, or RUN/credit/BY with a receipt.", "Arguments", argument=True),
    ]
    model: Annotated[Path | None, Option("Where the model is now, if it moved.", MODEL)] = None
    train_data_dir: Annotated[Path | None, Option("Where the training images are now, if they moved.", DATA)] = None
    query_data_dir: Annotated[Path | None, Option("Where the pictures are now, if they moved.", DATA)] = None


def replay(options: Again) -> None:
    if options.scores.is_file():  # the receipt, or one of the files of the scores, names its folder
        options = replace(options, scores=options.scores.parent)
    if (options.scores / "receipt.json").is_file():
        _check_receipt(options)
        return
    from whence.evaluation.replay import replay as again

    found = again(options.scores, options.model, options.train_data_dir, options.query_data_dir)
    if found.identical:
        say(f"identical to the last bit: {found.stored.values.numel():,} scores of {options.scores}")
        return
    say(f"not identical: scores are apart by up to {found.apart:.1e} of the largest")
    for line in found.different or [
        "the recipe is the same: another processor, or an operation that is not deterministic"
    ]:
        say(line)
    raise typer.Exit(2)


def _check_receipt(options: Again) -> None:
    """The scores of a receipt are what they were, and give its shares again."""
    from whence.evaluation.receipts import check_receipt

    if options.model or options.train_data_dir or options.query_data_dir:
        raise error("a receipt is checked against the scores beside it", accepted="RUN/credit/BY alone")
    different = check_receipt(options.scores)
    if not different:
        say(f"the receipt holds: the scores are those it was made from, and give its shares again ({options.scores})")
        return
    for line in different:
        say(line)
    raise typer.Exit(2)


VERB = Verb(replay, Again)
