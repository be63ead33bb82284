"""What a score matrix says of one query, of one training image, and of a group of them: pure functions of a run.

    rank[j, i]  = 1 + #{l : score[j, l] > score[j, i]}                     the place of an image within one query
    reliability = 1 - mean_i stderr[j, i]^2 / var_i score[j, i]            see `scores.Scores.reliability`
    surely      : |score_i - score_l| > 2.58 sqrt(stderr_i^2 + stderr_l^2)   see `scores.surely`

Scores of different queries are not compared with each other: what an image did for several is told by its rank in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from whence.plain import WhenceError
from whence.report.words import ERRORS, LOW, MAGNITUDE, POSITIVE, SCALES, plain, question
from whence.view.run import Facet, Run, Scored

Array = NDArray[np.float64]
Places = NDArray[np.int64]
SURE = 2.58  # scores.SURE, of a room that needs torch; tests compare the two
FIRST = 10  # images of a query of which methods are compared
Told = dict[str, object]


def strongest(row: Array, k: int) -> Places:
    """Columns of the k largest of [n], largest first; equal scores keep the order of the images. See `scores.strongest`."""
    k = min(k, len(row))
    if k < 1:
        return np.zeros(0, np.int64)
    some = np.flatnonzero(row >= np.partition(row, len(row) - k)[len(row) - k])
    return np.asarray(some[np.argsort(-row[some], kind="stable")[:k]], np.int64)


def between(row: Array, stderr: Array, images: Sequence[int]) -> list[tuple[int, int]]:
    """The ranks, from 1, that each of some images may have; see `scores.ranks_between`.

    Args:
        row: scores [n].
        stderr: theirs [n]; NaN where nothing is known.
        images: columns.
    """
    variance, found = np.nan_to_num(stderr**2, nan=np.inf), []
    for image in images:
        apart, sure = row - row[image], SURE * np.sqrt(variance + variance[image])
        found.append((int((apart > sure).sum()) + 1, len(row) - int((apart < -sure).sum())))
    return found


def reliability(row: Array, stderr: Array | None) -> float | None:
    """How well another run would agree about this query; None where that is not known."""
    if stderr is None or not row.var() > 0 or not np.isfinite(stderr).all():
        return None
    return max(0.0, 1 - float((stderr**2).mean() / row.var()))


def ends(scored: Scored, row: Array, k: int) -> tuple[list[int], list[int], str]:
    """The strongest columns, the weakest, and what is to be known of these lists.

    Args:
        scored: the method.
        row: its scores of the query [n].
        k: columns of each, at most; of how many the scores were kept, at most.
    """
    k = min(k, scored.kept or k)
    top = strongest(row, k).tolist()
    if not scored.signed:
        return top, [], MAGNITUDE
    if row[top[0]] > 0:
        top = [i for i in top if row[i] > 0]
    said = "" if row[top[0]] > 0 else "none is above zero, so none is a proponent"
    low = [i for i in strongest(-row, k).tolist() if i not in top]
    if row.min() >= 0:
        return top, low, said or "none is below zero, so none is an opponent: these have the lowest scores"
    return top, [i for i in low if row[i] < 0], said


def rank(scored: Scored, row: NDArray[np.floating], score: float) -> int | None:
    """The rank of a score of a query, from 1, among all that were scored; None where too few were kept to tell.

    Args:
        scored: the method.
        row: its scores of the query [n'].
        score: one of them.
    """
    above, upto = int((row > score).sum()), int((row <= score).sum())
    if scored.kept is None or above < scored.kept:
        return above + 1
    return scored.whole - upto + 1 if scored.signed and upto <= scored.kept else None


def method_told(scored: Scored, n: int) -> Told:
    """What holds for all scores of a method.

    Args:
        scored: the method.
        n: all training images.
    """
    some = scored.recipe.get("candidates")
    by = f", named by {plain(some['by'])}" if isinstance(some, Mapping) and "by" in some else ""
    return {
        "name": plain(scored.name),
        "signed": scored.signed,
        "sign": POSITIVE if scored.signed else MAGNITUDE,
        "scale": SCALES.get(scored.scale, plain(scored.scale)),
        "errors": errors_told(scored),
        "scored": "" if scored.whole == n else f"{scored.whole:,} of {n:,} images{by}",
        "kept": scored.kept,
        "missing": missing_told(scored),
        "question": question_told(scored),
        "leaning": scored.leaning is not None,
    }


def missing_told(scored: Scored) -> str:
    """What is not told of scores of which few were kept, and why; "" where all are there."""
    if scored.kept is None:
        return ""
    ends = f"the first and the last {scored.kept:,}" if scored.signed else f"the first {scored.kept:,}"
    told = f"of each picture {ends} of {scored.whole:,} scores were kept (--top)"
    return f"{told}: other ranks, those that another run may give, sums, correlations and scatters need all of them"


def question_told(scored: Scored) -> str:
    """What was asked of the pictures, where that is not what the method asks itself."""
    call, contrast = scored.recipe.get("call"), scored.recipe.get("contrast")
    asked = call.get("question") if isinstance(call, Mapping) else None
    try:
        return question(
            asked if isinstance(asked, Mapping) else None, contrast if isinstance(contrast, Mapping) else None
        )
    except (KeyError, TypeError, IndexError):  # of another version
        return "asked in a way that this version cannot tell: see the recipe in its scores.json"


def errors_told(scored: Scored) -> str:
    """What its standard errors are of, and what they do not hold; or why there are none."""
    if scored.opened.stderr is None:
        return plain(scored.stderr_of) or "not measured: none were asked for"
    if scored.stderr_of not in ERRORS:
        return f"of {plain(scored.stderr_of)}"
    drawn, besides = ERRORS[scored.stderr_of]
    return f"what {drawn} would change; {besides}"


def query_told(run: Run, query: int, k: int = 12) -> list[Told]:
    """What every method says of a query.

    Args:
        run: the run.
        query: its row.
        k: images on each end.
    """
    rows = {name: scored.opened.values.row(query) for name, scored in run.methods.items()}
    found: dict[str, Told] = {}
    shown: set[int] = set()
    for name, scored in run.methods.items():
        row, errors = rows[name], _errors(scored, query)
        top, low, said = ends(scored, row, k)
        listed = entries(scored, row, errors, [*top, *low])
        found[name] = {
            "name": plain(name),
            "top": listed[: len(top)],
            "low": listed[len(top) :],
            "note": said,
            "sure": "" if scored.kept is not None else sure_told(errors, listed[: len(top)]),
            "reliability": None if scored.kept is not None else reliability(row, errors),
            "low_reliability": LOW,
            "leaning": leaning_told(scored, query),
            "sums": [sums for facet in run.train.facets if (sums := sums_told(scored, facet, row)) is not None],
        }
        shown |= {int(scored.rows[i]) if scored.rows is not None else i for i in (*top, *low)}
    places = ranks_of(run, rows, sorted(shown))
    return [{**told, "ranks": places[name]} for name, told in found.items()]


def _errors(scored: Scored, query: int) -> Array | None:
    return None if scored.opened.stderr is None else scored.opened.stderr.row(query)


class Entry(TypedDict):
    """A training image in a list: its row among all, its score and error, its rank, and the ranks that it may have."""

    row: int
    score: float
    stderr: float | None
    rank: int | None
    between: tuple[int, int] | None


def entries(scored: Scored, row: Array, errors: Array | None, columns: Sequence[int]) -> list[Entry]:
    """Training images with what a method says of them: their rows among all images, scores, errors and ranks."""
    spans: Sequence[tuple[int, int] | None] = [None] * len(columns)
    if errors is not None and scored.kept is None and np.isfinite(errors).all():
        spans = between(row, errors, columns)
    return [
        {
            "row": int(scored.rows[i]) if scored.rows is not None else int(i),
            "score": float(row[i]),
            "stderr": None if errors is None or not math.isfinite(errors[i]) else float(errors[i]),
            "rank": rank(scored, row, row[i]),
            "between": span,
        }
        for i, span in zip(columns, spans, strict=True)
    ]


def ranks_of(run: Run, rows: Mapping[str, Array], images: Sequence[int]) -> dict[str, dict[int, int]]:
    """method -> rank of some training images in a query, from 1, of those of which it is known.

    Args:
        run: the run.
        rows: method -> scores of the query.
        images: rows among the training images.
    """
    found: dict[str, dict[int, int]] = {}
    for name, row in rows.items():
        scored = run.methods[name]
        own = scored.rows
        place = {i: i for i in images} if own is None else {int(i): column for column, i in enumerate(own)}
        known = {i: rank(scored, row, row[place[i]]) for i in images if i in place}
        found[name] = {i: at for i, at in known.items() if at is not None}
    return found


def sure_told(errors: Array | None, top: Sequence[Entry]) -> str:
    """How many of the first surely belong there, in words; "" without errors. As the report has it.

    Args:
        errors: of all images [n].
        top: the first.
    """
    if errors is None:
        return ""
    if not np.isfinite(errors).all():
        return "how sure these are is not known: their standard errors need two seeds or more of each training"
    if not errors.any():
        return "nothing is drawn by chance: another run gives the same scores"
    k = len(top)
    sure = sum(entry["between"] is not None and entry["between"][1] <= k for entry in top)
    if k < 2:
        return "the first image surely is the first" if sure else "no image surely is the first"
    if sure == k:
        return f"the first {k} surely belong there"
    who = "none surely belongs" if not sure else "1 surely belongs" if sure == 1 else f"{sure} surely belong"
    return f"of the first {k}, {who} there"


def leaning_told(scored: Scored, query: int) -> Told | None:
    """Whether a query leans on single images more than held-out pictures do."""
    judged = scored.leaning
    if judged is None:
        return None
    return {"out": judged["stands_out"][query], "p": judged["p"][query], "rate": judged["rate"]}


def sums_told(scored: Scored, facet: Facet, row: Array, most: int = 8) -> Told | None:
    """Sums of the scores of one query by a column, the largest first; None where sums say nothing."""
    if not scored.adds_up(facet.column) or len(facet.names) < 2:
        return None
    sums = np.asarray(np.bincount(facet.codes, weights=row, minlength=len(facet.names)), np.float64)
    order = strongest(sums, most).tolist()
    rest = [i for i in strongest(-sums, most // 2)[::-1].tolist() if i not in order and sums[i] < 0]
    groups = [{"code": code, "sum": float(sums[code])} for code in (*order, *rest)]
    return {"column": facet.column, "groups": groups, "of": len(facet.names)}


# --------------------------------------------------------------------------------------------------- the other way round


def image_told(run: Run, image: int, most: int = 2000) -> list[Told]:
    """What a training image did for every query, by every method: its scores, and its rank within each query.

    Args:
        run: the run.
        image: its row.
        most: queries that are told of, those in which it ranks first.
    """
    return [_pushed(scored, image, most) for scored in run.methods.values()]


def _pushed(scored: Scored, image: int, most: int) -> Told:
    column = _column(scored, image)
    if column is None:
        return {"name": plain(scored.name), "scored": False, "why": unscored(scored)}
    values = scored.opened.values
    own = values.column(column)
    # Of equal scores none is above another.
    known = [rank(scored, row, row[column]) for row in values.rows()]
    places = np.array([at or 0 for at in known])
    errors = None if scored.opened.stderr is None else scored.opened.stderr.column(column)
    order = np.lexsort((np.arange(len(places)), -own, places))
    order = order[places[order] > 0][:most]
    return {
        "name": plain(scored.name),
        "scored": True,
        "queries": order.tolist(),
        "score": own[order].tolist(),
        "stderr": None if errors is None or not np.isfinite(errors).all() else errors[order].tolist(),
        "rank": places[order].tolist(),
        "of": scored.whole,
        "all": len(known),
        "first": min(FIRST, scored.kept or FIRST),
    }


def unscored(scored: Scored) -> str:
    """Why an image has no score by a method."""
    if scored.kept is None:
        return "this image has no score by this method"
    ends = f"the first or the last {scored.kept:,}" if scored.signed else f"the first {scored.kept:,}"
    return f"this image is among {ends} of no picture, and other scores were not kept (--top)"


def _column(scored: Scored, image: int) -> int | None:
    """The column of a training image; None where it was not scored."""
    if scored.rows is None:
        return image
    found = np.flatnonzero(scored.rows == image)
    return int(found[0]) if len(found) else None


def group_told(run: Run, facet: Facet, code: int, most: int = 2000) -> list[Told]:
    """What the images of a group did together for every query, by every method whose scores add up.

    Args:
        run: the run.
        facet: the column.
        code: of the group.
        most: queries that are told of.
    """
    found: list[Told] = []
    for scored in run.methods.values():
        if not scored.adds_up(facet.column):
            found.append({"name": plain(scored.name), "why": why_not(scored)})
            continue
        sums = np.array(
            [np.bincount(facet.codes, weights=row, minlength=len(facet.names)) for row in scored.opened.values.rows()]
        )
        places = (sums > sums[:, [code]]).sum(axis=1) + 1
        order = np.lexsort((np.arange(len(places)), -sums[:, code], places))[:most]
        told = {"queries": order.tolist(), "score": sums[order, code].tolist(), "rank": places[order].tolist()}
        found.append({"name": plain(scored.name), "why": "", **told, "of": len(facet.names), "all": len(places)})
    return found


def why_not(scored: Scored) -> str:
    """Why the scores of a method are not added up."""
    if scored.kept is not None:
        return f"a sum needs all scores, of which the first and last {scored.kept:,} of each picture were kept (--top)"
    if scored.rows is not None:
        return f"only {scored.columns:,} images have a score, and an image without one has none, not 0"
    return f"these are scores of the groups of {plain(scored.grouped)}, whose images share them equally"


def often_first(scored: Scored, n: int, k: int = FIRST) -> np.ndarray:
    """How many queries have each training image among their first k: [n].

    Args:
        scored: the method.
        n: training images.
        k: images of a query that count.
    """
    found = np.zeros(n, np.int64)
    for row in scored.opened.values.rows():
        some = np.argpartition(row, max(0, len(row) - k))[max(0, len(row) - k) :]
        found[some if scored.rows is None else scored.rows[some]] += 1
    return found


def spread(scored: Scored, query: int, n: int) -> np.ndarray:
    """The scores of a query for all training images [n] float32, NaN where there is none."""
    if scored.kept is not None:
        raise WhenceError(missing_told(scored), scored.name, "a method of which all scores were kept")
    row = scored.opened.values.row(query).astype("<f4")
    if scored.rows is None:
        return row
    found = np.full(n, np.nan, "<f4")
    found[scored.rows] = row
    return found
