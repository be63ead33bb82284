"""Images searched, filtered, sorted, and told one by one. Texts are printable, and cut to what a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from whence.plain import WhenceError
from whence.report.words import plain
from whence.view.reading import FIRST, Told, missing_told, often_first, rank
from whence.view.run import Facet, Run, Shelf

SHORT, LONG = 160, 4000  # letters of a text in a list, and of one that is looked at
MOST_VALUES = 300  # of a column that is offered as a filter
SIDES = ("train", "queries")


@dataclass(frozen=True)
class Asked:
    """What is looked for.

    Args:
        words: all of which must occur in a name, a caption or a column.
        where: column -> the code of its value.
        sort: "" for the order of the run, "name", "caption", "often:METHOD" or "leaning:METHOD".
    """

    words: str = ""
    where: Mapping[str, int] | None = None
    sort: str = ""


def shelf_of(run: Run, side: str) -> Shelf:
    """train or queries of a run."""
    return run.train if side == "train" else run.queries


def cut(text: object, longest: int = SHORT) -> str:
    """One line of printable text, and how much of it is left out."""
    if not isinstance(text, str):
        return plain(text)
    # Before it is made plain: of a hundred thousand letters nobody needs more.
    shown = plain(text[: longest + 1])
    return shown if len(text) <= longest else f"{shown[:longest]}… ({len(text) - longest:,} letters more)"


def matching(run: Run, side: str, asked: Asked) -> np.ndarray:
    """The rows of one side that are looked for, in their order.

    Args:
        run: the run.
        side: "train" or "queries".
        asked: what is looked for.
    """
    shelf = shelf_of(run, side)
    rows = np.arange(len(shelf))
    for column, code in (asked.where or {}).items():
        rows = rows[facet_of(shelf, column).codes[rows] == code]
    for word in asked.words.casefold().split()[:20]:
        rows = rows[[word in shelf.words[row] for row in rows.tolist()]]
    return _sorted(run, side, rows, asked.sort)


def _sorted(run: Run, side: str, rows: np.ndarray, sort: str) -> np.ndarray:
    kind, _, method = sort.partition(":")
    shelf = shelf_of(run, side)
    if kind in ("", "order"):
        return rows
    if kind in ("name", "caption"):
        column: Sequence[object] = (
            shelf.side.ids if kind == "name" or not shelf.caption else shelf.side.meta[shelf.caption]
        )
        return np.array(sorted(rows.tolist(), key=lambda row: str(column[row])[:SHORT].casefold()), np.int64)
    if method in run.methods and kind == "often" and side == "train":
        if (run.methods[method].kept or FIRST) < FIRST:
            raise WhenceError(missing_told(run.methods[method]), "sort", "another order")
        counts = often_first(run.methods[method], len(shelf))
        return rows[np.argsort(-counts[rows], kind="stable")]
    judged = run.methods[method].leaning if method in run.methods else None
    if kind == "leaning" and side == "queries" and judged is not None:
        return rows[np.argsort(np.array(judged["p"])[rows], kind="stable")]
    raise WhenceError(f"no order {sort[:40]!r}", "sort", "name, caption, often:METHOD, leaning:METHOD")


def facet_of(shelf: Shelf, column: str) -> Facet:
    """A column by its name."""
    found = next((facet for facet in shelf.facets if facet.column == column), None)
    if found is None:
        raise WhenceError(f"no column {column[:40]!r}", "where", ", ".join(facet.column for facet in shelf.facets))
    return found


def item(shelf: Shelf, row: int) -> Told:
    """An image in a list."""
    side = shelf.side
    return {
        "row": row,
        "name": cut(side.ids[row]),
        "caption": cut(side.meta[shelf.caption][row]) if shelf.caption and side.meta[shelf.caption][row] else "",
        "label": cut(_group(shelf.facets[0], row)) if shelf.facets else "",
    }


def _group(facet: Facet, row: int) -> str:
    return facet.names[facet.codes[row]]


def listed(run: Run, side: str, rows: Sequence[int]) -> list[Told]:
    """Images in a list, by their rows."""
    shelf = shelf_of(run, side)
    found = [item(shelf, row) for row in rows]
    if side == "queries":
        for told in found:
            told["warned"] = shelf.side.ids[int(str(told["row"]))] in run.warnings
    return found


def detail(run: Run, side: str, row: int) -> Told:
    """Everything that is known of an image, but for its scores."""
    shelf = shelf_of(run, side)
    columns = [
        {"column": cut(name), "value": cut(column[row], LONG), "code": _value_code(shelf, name, row)}
        for name, column in shelf.side.meta.items()
        if column[row] is not None
    ]
    found = {**item(shelf, row), "name": cut(shelf.side.ids[row], LONG), "columns": columns}
    if side == "queries":
        found["warning"] = cut(run.warnings.get(shelf.side.ids[row], ""), LONG)
    return found


def _value_code(shelf: Shelf, column: str, row: int) -> int | None:
    found = next((facet for facet in shelf.facets if facet.column == column), None)
    return None if found is None else int(found.codes[row])


def facets_told(shelf: Shelf) -> list[Told]:
    """The columns that a side is filtered by, with their most frequent values."""
    return [
        {
            "column": cut(facet.column),
            "values": [
                {"code": int(code), "name": cut(facet.names[code]), "images": int(facet.counts[code])}
                for code in _frequent(facet)
            ],
            "of": len(facet.names),
        }
        for facet in shelf.facets
    ]


def _frequent(facet: Facet) -> list[int]:
    """Codes of the values of most images, in the order of their names."""
    order = np.argsort(-facet.counts, kind="stable")[:MOST_VALUES]
    return sorted(order.tolist())


def exact(run: Run, rows: Sequence[int], query: int | None) -> list[Told]:
    """Training images for a file: their names and columns as they are, and what the methods say of them for a query.

    Args:
        run: the run.
        rows: of the images.
        query: a row; None for no scores.
    """
    side = run.train.side
    found: list[Told] = [
        {"row": row, "name": side.ids[row], "columns": {name: column[row] for name, column in side.meta.items()}}
        for row in rows
    ]
    if query is None:
        return found
    for scored in run.methods.values():
        values = scored.opened.values.row(query)
        place = {row: row for row in rows} if scored.rows is None else {int(i): c for c, i in enumerate(scored.rows)}
        for told, row in zip(found, rows, strict=True):
            if row in place:
                score = float(values[place[row]])
                scores = told.setdefault("scores", {})
                assert isinstance(scores, dict)
                scores[scored.name] = {"score": score, "rank": rank(scored, values, score)}
    return found
