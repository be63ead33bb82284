"""whence contrast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, METHOD, say_report
from whence.cli.options import Option, Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Contrast:
    """Which training images made this picture rather than that one: the difference of their scores in a finished run.

    It reads the scores of `whence attribute`, computes nothing anew, and writes RUN/contrast/THIS--NOT_THAT.
    """

    run: Annotated[Path, Option("A run folder with finished scores.", "Arguments", argument=True)]
    this: Annotated[str, Option("The name of a picture that was explained.", DATA)]
    not_that: Annotated[str, Option("The name of another one, which it is set against.", DATA)]
    method: Annotated[
        tuple[str, ...],
        Option("Methods of the run; by default all whose scores are linear in the picture. May be repeated.", METHOD),
    ] = ()
    train_data_dir: Annotated[Path | None, Option("Where the training images are now, if they moved.", DATA)] = None
    query_data_dir: Annotated[Path | None, Option("Where the pictures are now, if they moved.", DATA)] = None


def contrast(options: Contrast) -> None:
    from whence.evaluation.contrasts import Asked, write_contrast

    asked = Asked(options.run, options.this, options.not_that, options.method, options.train_data_dir,
                  options.query_data_dir)  # fmt: skip
    told = write_contrast(asked)
    for line in told.left_out:
        say(f"left out: {line}")
    for name, scores in told.results.items():
        (image, value), *_ = scores.top(0, 1)
        say(f"{name}: {scores.query_ids[0]}: first {image} ({value:+.3g})")
    say_report(told.report)


VERB = Verb(contrast, Contrast)
