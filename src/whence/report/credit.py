"""The page of credit: one self-contained HTML table of contributors, with intervals and what is attributed to nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whence.report.html import filled
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
    said: Mapping[str, Mapping[str, str]],
    level: float = 0.95,
) -> bytes:
    """The page, as bytes. The same input gives the same bytes.

    Args:
        by: what contributors are called.
        tables: method -> the columns of its credit.
        compared: method -> name of values by retraining -> rank and linear correlation.
        listed: images that were not to be trained on and have influence.
        said: of each method, "" for nothing: `errors`, what the errors are of that its noise holds; `exact`, that there
            are none; `cautions`, what a reader of its shares must know; `questions`, what was asked of the pictures.
        level: of the intervals.
    """
    page = {
        "by": plain(by),
        "level": f"{100 * level:g}\N{NO-BREAK SPACE}%",
        "methods": {method: _rows(table) for method, table in tables.items()},
        "compared": {
            method: [(name, number(rank, 2), number(linear, 2)) for name, (rank, linear) in each.items()]
            for method, each in compared.items()
        },
        "listed": [(each.method, plain(each.query), plain(each.image), each.rank) for each in listed[:MOST]],
        "more": max(0, len(listed) - MOST),
        **said,
    }
    return filled("credit.html", page)


def _rows(table: Table) -> list[dict[str, object]]:
    """The rows of the page. The longest bar, or the highest end of an interval, fills its track."""
    ends = [value for name in ("share", "high") for value in table[name] if isinstance(value, float)]
    return [_row(table, place, max(ends, default=0.0) or 1.0) for place in range(len(table["share"]))]


def _row(table: Table, place: int, widest: float) -> dict[str, object]:
    """A row in words; widths are in percent of the widest."""
    found = {name: column[place] for name, column in table.items()}
    share, low, high = (_percent(found[name]) for name in ("share", "low", "high"))
    rest = found["images"] is None
    if rest:
        share = _percent(found["attributable"])
    return {
        "name": f"of which {found['contributor']}" if rest else plain(found["contributor"]),
        "images": "" if rest else f"{found['images']:,}",
        "share": share,
        "interval": f"{low.rstrip(PERCENT)} to {high}" if low and high else "" if rest else "not known",
        "bar": _width(found["attributable" if rest else "share"], widest),
        "from": _width(found["low"], widest) if low else None,
        "to": _width(found["high"], widest) if high else None,
        "ratio": _ratio(found["signal_to_noise"]),
        "per_image": _percent(found["share_per_image"], 2),
        "split": _percent(found["could_rise_by_splitting"]),
        "advice": found["advice"] or "",
        "rest": rest,
    }


PERCENT = "\N{NO-BREAK SPACE}%"


def _percent(value: object, digits: int = 1) -> str:
    return "" if not isinstance(value, float) else f"{100 * value:.{digits}f}{PERCENT}"


def _width(value: object, widest: float) -> float:
    return round(100 * min(1.0, value / widest), 2) if isinstance(value, float) else 0.0


def _ratio(value: object) -> str:
    if not isinstance(value, float):
        return ""
    return "no noise" if value == float("inf") else number(value, 2)
