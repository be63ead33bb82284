"""The page of credit: one self-contained HTML table of contributors, with intervals and what is attributed to nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from whence.report.words import number, plain


@dataclass(frozen=True)
class Listed:
    """An image that was not to be trained on and is among the strongest of a picture.

    Args:
        method: that says so.
        query: the picture.
        image: its name.
        rank: from 1.
        score: of the image for the picture.
    """

    method: str
    query: str
    image: str
    rank: int
    score: float


MOST = 40  # rows of a page's list; the files have all

Table = Mapping[str, Sequence[object]]


def credit_page(
    by: str,
    tables: Mapping[str, Table],
    compared: Mapping[str, Mapping[str, tuple[float, float]]],
    listed: Sequence[Listed],
    errors: Mapping[str, str],
    level: float = 0.95,
) -> bytes:
    """The page, as bytes. The same input gives the same bytes.

    Args:
        by: what contributors are called.
        tables: method -> the columns of its credit.
        compared: method -> name of values by retraining -> rank and linear correlation.
        listed: images that were not to be trained on and have influence.
        errors: method -> what its standard errors are of, "" where it states none.
        level: of the intervals.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = {
        "by": plain(by),
        "level": f"{100 * level:g}\N{NO-BREAK SPACE}%",
        "methods": {
            method: [_row(table, place) for place in range(len(table["share"]))] for method, table in tables.items()
        },
        "compared": {
            method: [(name, number(rank, 2), number(linear, 2)) for name, (rank, linear) in each.items()]
            for method, each in compared.items()
        },
        "listed": [(each.method, plain(each.query), plain(each.image), each.rank) for each in listed[:MOST]],
        "more": max(0, len(listed) - MOST),
        "errors": errors,
    }
    return environment.get_template("credit.html").render(page).encode("utf-8", "replace")


def _row(table: Table, place: int) -> dict[str, object]:
    """A row of the page, in words; widths are in percent."""
    found = {name: column[place] for name, column in table.items()}
    share, low, high = (_percent(found[name]) for name in ("share", "low", "high"))
    return {
        "name": plain(found["contributor"]),
        "images": "" if found["images"] is None else f"{found['images']:,}",
        "share": share,
        "interval": f"{low} to {high}" if low and high else "not known" if found["images"] is not None else "",
        "bar": _width(found["share"]),
        "from": _width(found["low"]) if low else None,
        "to": _width(found["high"]) if high else None,
        "ratio": _ratio(found["signal_to_noise"]),
        "per_image": _percent(found["share_per_image"]),
        "split": _percent(found["could_rise_by_splitting"]),
        "advice": found["advice"] or "",
        "rest": found["images"] is None,
    }


def _percent(value: object) -> str:
    return "" if not isinstance(value, float) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def _width(value: object) -> float:
    return round(100 * min(1.0, value), 2) if isinstance(value, float) else 0.0


def _ratio(value: object) -> str:
    if not isinstance(value, float):
        return ""
    return "no noise" if value == float("inf") else number(value, 2)
