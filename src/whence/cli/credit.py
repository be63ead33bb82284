"""whence credit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, METHOD
from whence.cli.options import Option, Verb
from whence.cli.terminal import console, say


@dataclass(frozen=True)
class Credit:
    """Which share each contributor has in what made the pictures of a run, with intervals and what is nobody's.

    It reads the scores of a finished run, of `whence attribute` or `whence values`, and writes RUN/credit/BY.
    """

    run: Annotated[Path, Option("A run folder with finished scores.", "Arguments", argument=True)]
    by: Annotated[str, Option("The column of the training images that names the contributors.", DATA)] = "creator"
    method: Annotated[tuple[str, ...], Option("Methods of the run; all by default. May be repeated.", METHOD)] = ()
    values: Annotated[
        Path | None,
        Option("A run folder of `whence values` by the same column: what retraining says, beside the sums.", DATA),
    ] = None
    not_allowed: Annotated[
        str | None,
        Option(
            "Images that were not to be trained on, as column=value, or c2pa for what their content credentials say: those "
            "with influence are listed.",
            DATA,
        ),
    ] = None
    level: Annotated[float, Option("Of the intervals, between 0 and 1.", METHOD)] = 0.95


def credit(options: Credit) -> None:
    from rich.table import Table

    from whence.evaluation.receipts import Asked, write_credit

    asked = Asked(options.by, options.method, options.values, options.not_allowed, options.level)
    told = write_credit(options.run, asked)
    screen = console(soft_wrap=True)
    for method, each in told.credits.items():
        table = Table(options.by, "images", "share", f"{100 * options.level:g} %", "signal to noise", "advice", title=method,
                      box=None, pad_edge=False, title_justify="left")  # fmt: skip
        columns = each.columns()
        for place, name in enumerate(columns["contributor"]):
            rest = columns["images"][place] is None
            share = _cell(columns, "attributable" if rest else "share", place)
            noise, advice = (_cell(columns, key, place) for key in ("signal_to_noise", "advice"))
            shown = f"of which {name}" if rest else str(name)
            table.add_row(shown, _cell(columns, "images", place), share, _interval(columns, place), noise, advice)
        screen.print(table)
        if told.questions[method]:
            say(f"asked of the pictures: {told.questions[method]}")
        if told.cautions[method]:
            say(f"caution: {method}: {told.cautions[method]}")
        for name, (rank, linear) in told.compared.get(method, {}).items():
            say(f"{method} beside {name} by retraining: rank correlation {rank:.2f}, linear {linear:.2f}")
    if options.not_allowed is not None and not told.listed:
        say("no image that was not to be trained on is among the ten strongest of any picture")
    for one in told.listed:
        say(f"not allowed, and rank {one.rank} of {one.query} by {one.method}: {one.image}")
    say(f"credit: {told.folder / 'credit.html'}")
    say("a share is an estimate of influence, not a legal claim")


def _cell(columns: dict[str, list[object]], key: str, place: int) -> str:
    value = columns[key][place]
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if key in ("share", "attributable") else f"{value:.1f}"
    return str(value)


def _interval(columns: dict[str, list[object]], place: int) -> str:
    low, high = columns["low"][place], columns["high"][place]
    if isinstance(low, float) and isinstance(high, float):
        return f"{100 * low:.1f} to {100 * high:.1f}"
    return "" if columns["images"][place] is None else "not known"


VERB = Verb(credit, Credit)
