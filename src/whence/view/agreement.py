"""How alike each two methods see a query: a pure function of a run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from whence.report.words import plain
from whence.view.reading import FIRST, Array, Told, strongest
from whence.view.run import Run, Scored


def ranks(row: Array) -> Array:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def agreement_told(run: Run, query: int) -> list[Told]:
    """How alike each two methods rank the images that both scored; by magnitude where either of them has no sign.

    Of methods of which few scores were kept, how many of the first they share is known, and no correlation.

    Args:
        run: the run.
        query: its row.
    """
    rows = {name: scored.opened.values.row(query) for name, scored in run.methods.items()}
    known: dict[tuple[str, bool], Array] = {}
    found: list[Told] = []
    for a, b in itertools.combinations(run.methods.values(), 2):
        magnitude = not (a.signed and b.signed)
        pair = [np.abs(rows[one.name]) if magnitude else rows[one.name] for one in (a, b)]
        if a.kept is not None or b.kept is not None:
            found.append(_first_shared((a, b), pair, magnitude))
            continue
        if a.rows is None and b.rows is None:
            for one, row in zip((a, b), pair, strict=True):
                known.setdefault((one.name, magnitude), ranks(row))
            ranked = [known[one.name, magnitude] for one in (a, b)]
        else:
            own = [np.arange(one.columns, dtype=np.int64) if one.rows is None else one.rows for one in (a, b)]
            _, *places = np.intersect1d(own[0], own[1], return_indices=True)
            pair = [row[place] for row, place in zip(pair, places, strict=True)]
            ranked = [ranks(row) for row in pair]
        both, k = len(pair[0]), min(FIRST, len(pair[0]))
        shared = len({*strongest(pair[0], k).tolist()} & {*strongest(pair[1], k).tolist()})
        found.append(_pair_told((a, b), magnitude, both, k, shared) | {"spearman": correlation(*ranked)})
    return found


def _pair_told(pair: tuple[Scored, Scored], magnitude: bool, both: int, k: int, shared: int | None) -> Told:
    told = {"magnitude": magnitude, "images": both, "first": k, "shared": shared, "chance": k * k / max(both, 1)}
    return {"pair": [plain(one.name) for one in pair], **told, "spearman": None, "why": ""}


def _first_shared(pair: tuple[Scored, Scored], rows: Sequence[Array], magnitude: bool) -> Told:
    """What is known of two methods, one of which kept few scores: how many of the first they share, if both scored all."""
    why = {"why": "a rank correlation needs all scores, of which the first and last were kept"}
    both = min(one.whole for one in pair)
    k = min(FIRST, both, *(one.kept or both for one in pair))
    if pair[0].whole != pair[1].whole:
        return _pair_told(pair, magnitude, both, k, None) | why
    first = []
    for one, row in zip(pair, rows, strict=True):
        columns = strongest(row, k)
        first.append({*(columns if one.rows is None else one.rows[columns]).tolist()})
    return _pair_told(pair, magnitude, both, k, len(first[0] & first[1])) | why


def correlation(a: Array, b: Array) -> float | None:
    """Pearson's; None where either does not vary."""
    if len(a) < 2 or not a.std() > 0 or not b.std() > 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])
