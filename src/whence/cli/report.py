"""whence report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, say_report
from whence.cli.options import Option, Verb


@dataclass(frozen=True)
class Report:
    """Write the report of a finished run again, with all methods that have scores in it."""

    run: Annotated[Path, Option("A run folder.", "Arguments", argument=True)]
    train_data_dir: Annotated[Path | None, Option("Where the training images are now, if they moved.", DATA)] = None
    query_data_dir: Annotated[Path | None, Option("Where the pictures are now, if they moved.", DATA)] = None


def report(options: Report) -> None:
    from whence.task import report_again

    say_report(report_again(options.run, options.train_data_dir, options.query_data_dir))


VERB = Verb(report, Report)
