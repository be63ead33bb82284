"""whence methods."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from whence.cli.options import Option, Verb
from whence.cli.terminal import console, say

if TYPE_CHECKING:
    from whence.methods import Entry

RETRAINED = "reads retrained models"


@dataclass(frozen=True)
class Methods:
    """Print every method, its parts, its paper, what it computes and what it needs."""

    markdown: Annotated[bool, Option("As the table of the README.", "Output")] = False


def methods(options: Methods) -> None:
    from rich.table import Table

    from whence.evaluation.readers import VALUES
    from whence.methods import METHODS, describe_parts, settings_of

    if options.markdown:
        say("| method | paper | computes | needs | settings |")
        say("|---|---|---|---|---|")
        for name, entry in METHODS.items():
            cells = (f"`{name}`", _paper(entry), entry.cost, _needs(entry), ", ".join(settings_of(name)))
            say(f"| {' | '.join(cells)} |")
        for name, value in VALUES.items():
            paper = f"{value.paper} {value.year}"
            say(f"| `{name}` | {paper} | {RETRAINED} | a ledger: {value.needs} | {', '.join(value.settings)} |")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "parts", "paper", "year", "computes", "needs", "settings"):
        table.add_column(column)
    for name, entry in METHODS.items():
        parts = describe_parts(entry.make())
        shown = "; ".join(f"{slot}: {value}" for slot, value in parts.items())
        year = "" if entry.year is None else str(entry.year)
        table.add_row(name, shown, entry.paper, year, entry.cost, _needs(entry), ", ".join(settings_of(name)))
    for name, value in VALUES.items():
        needs, settings = f"a ledger: {value.needs}", ", ".join(value.settings)
        table.add_row(name, "`whence values`", value.paper, str(value.year), RETRAINED, needs, settings)
    console(width=None if sys.stdout.isatty() else 200).print(table)


def _paper(entry: Entry) -> str:
    return entry.paper if entry.year is None else f"{entry.paper} {entry.year}"


def _needs(entry: Entry) -> str:
    from whence.methods import NEEDS

    return "; ".join(NEEDS[need].words for need in entry.needs)


VERB = Verb(methods, Methods)
