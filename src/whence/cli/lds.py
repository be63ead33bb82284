"""whence lds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import DATA, METHOD, Resolution, TrainData
from whence.cli.options import Option, Verb
from whence.cli.terminal import console, say

if TYPE_CHECKING:
    from whence.evaluation.lds import Interval


@dataclass(frozen=True)
class Lds:
    """The linear datamodeling score of every method in a run folder, with its interval and the noise ceiling."""

    run: Annotated[Path, Option("A run folder of `whence attribute`.", "Arguments", argument=True)]
    ledger: Annotated[Path, Option("The ledger that retrained the same images.", DATA)]
    train_data_dir: TrainData
    name: Annotated[str, Option("Name of the measurement of the same queries.", DATA)] = "loss"
    resolution: Resolution = None
    transfer: Annotated[
        bool, Option("Judge scores of another model, too: how well they foresee the one that was retrained.", METHOD)
    ] = False


FILE = "lds.json"


def lds(options: Lds) -> None:
    from rich.table import Table

    from whence.evaluation.judging import judge
    from whence.evaluation.source import opened_ledger
    from whence.task import keep_judged

    ledger = opened_ledger(options.ledger, options.train_data_dir, options.resolution)
    verdict = judge(options.run, ledger, options.name, options.transfer)
    found, limit = verdict.methods, verdict.ceiling
    test = ledger.table(options.name).role("test")
    subsets = len(set(test.subsets.tolist()))
    table = Table("method", f"LDS on {subsets} subsets", "corrected", "95 %", box=None, pad_edge=False)
    for method, interval in found.items():
        ends = f"{interval.low:.3f} to {interval.high:.3f}"
        table.add_row(method, f"{interval.estimate:.3f}", f"{interval.centre:.3f}", ends)
    if limit is not None:
        table.add_row("ceiling", "", f"{limit.estimate:.3f}", f"{limit.low:.3f} to {limit.high:.3f}", style="bold")
    console().print(table)
    say("corrected: of infinitely many subsets, which the interval and the ceiling are about, too")
    each = {method: {**_plain(interval), "transfer": method in verdict.other} for method, interval in found.items()}
    ceiling = None if limit is None else _plain(limit)
    keep_judged(options.run, options.ledger, each, ceiling, subsets, len(test.query_ids))
    say(f"kept in {options.run / FILE}; `whence report {options.run}` writes the page with it")
    if verdict.other:
        say(f"of another model than was retrained: {', '.join(verdict.other)}")
    if limit is None:
        say("no ceiling: it takes 4 subsets and 2 seeds of one (`whence ledger plan --seeds 2`)")


def _plain(interval: Interval) -> dict[str, float]:
    known = {"lds": interval.estimate, "low": interval.low, "high": interval.high, "centre": interval.centre}
    return {key: value for key, value in known.items() if value == value}  # a ceiling has no other centre


VERB = Verb(lds, Lds)
