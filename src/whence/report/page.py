"""The report: one self-contained HTML page and one gallery picture of who made what.

`render` reads only the pictures it shows, computes every sentence from the scores, and never asks the network for
anything. All texts say the same law: positive = proponent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from whence.report import answer
from whence.report.answer import About, Answer
from whence.report.attributable import Leaning
from whence.report.cite import cited
from whence.report.gallery import draw_gallery
from whence.report.glossary import glossary
from whence.report.html import filled
from whence.report.pictures import Album, Query, Tile, pictures_of
from whence.report.removed import Removed
from whence.report.statistics import FIRST, Group, Reading, agreement_of, group_table, groups_of, leaders_of, read_query
from whence.report.words import (
    ESTIMATE,
    MAGNITUDE,
    POSITIVE,
    label_of,
    plain,
    prompt_of,
    recipe,
    scales_of,
    scored_of,
    who_of,
)
from whence.scores import groups_scored
from whence.types import Images, Scores, WhenceError

NO_WARNINGS: Mapping[str, str] = {}
TILES = 6  # pictures beside an answer
THUMB, LARGE = 160, 320  # px: longest side of a training picture and of a query as stored in the page


@dataclass(frozen=True)
class Known:
    """What is known of a run besides its scores.

    Args:
        warnings: name of a query -> what is to be known of it before any score, such as that it looks like a copy: the rest
            of a sentence that begins with the query.
        leaning: method -> whether each query leans on single images, compared with held-out pictures; a ranking that says no
            more than those of such pictures is folded away.
        about: method -> what it is.
        removed: what happened without the images that were named; None where that was not tried.
    """

    warnings: Mapping[str, str] = field(default_factory=dict)
    leaning: Mapping[str, Sequence[Leaning]] = field(default_factory=dict)
    about: Mapping[str, About] = field(default_factory=dict)
    removed: Removed | None = None


NOTHING_MORE = Known()


def render(
    results: Mapping[str, Scores],
    train: Images,
    queries: Images,
    title: str,
    facts: Mapping[str, str],
    known: Known = NOTHING_MORE,
    top: int = 8,
    max_queries: int = 24,
) -> dict[str, bytes]:
    """The files of a report by name, `gallery.png` and `report.html`. The same input gives the same bytes.

    Args:
        results: method name -> scores [m, n] of the same queries and training images, in the order of the images; of methods
            that scored some training images only, of those.
        train: the training images.
        queries: the images that are explained.
        title: the headline of page and gallery.
        facts: plain lines about model and data, name -> text.
        known: what is known besides.
        top: training images shown for each query.
        max_queries: queries shown; the overview counts all of them.

    Raises:
        WhenceError: no results, other images than were scored, a number below 1, or a warning of no query.
    """
    _check(results, train, queries, top, max_queries)
    _check_warned(known.warnings, queries)
    # No more images of a picture than were kept of it by every method: the next ones would be those of other pictures.
    k = min(top, len(train), *(scores.kept or top for scores in results.values()))
    shown = range(min(len(queries), max_queries))
    places = {name: rows_of(name, scores, train) for name, scores in results.items()}
    whole = {name: scores for name, scores in results.items() if scores.complete}
    metas = (s.train_meta for s in whole.values() if s.train_meta and not s.some_only)
    groups = groups_of(next(metas, train.meta), len(train))
    scored = {own for scores in whole.values() if (own := groups_scored(scores)) is not None}
    groups = [group for group in groups if not scored - {group.column}]  # by other columns there would be equal parts
    readings = [
        {
            name: _judged(read_query(s, j, k, groups, places[name]), known.leaning.get(name), j)
            for name, s in results.items()
        }
        for j in shown
    ]
    leaders = {name: leaders_of(scores, k, places[name]) for name, scores in results.items()}

    rows = [row for query in readings for reading in query.values() for row, _ in reading.top + reading.bottom]
    pictures = pictures_of(train, rows + [row for counts in leaders.values() for row, _ in counts], THUMB)
    portraits = pictures_of(queries, shown, LARGE)
    album = Album(train, pictures, groups)
    blocks = [
        Query(
            plain(queries.ids[j]),
            prompt_of(queries.meta, j) or label_of(queries.meta, j),
            portraits[j],
            {name: album.strips(reading, queries.digests[j]) for name, reading in found.items()},
            plain(known.warnings.get(queries.ids[j], "")),
        )
        for j, found in zip(shown, readings, strict=True)
    ]
    answers = _answers(results, places, (train, queries), groups, known)
    lead = answer.leading(results, known.about)
    page: dict[str, object] = {
        "title": title,
        "who": who_of(results),
        "lead": lead,
        "in_short": answer.in_short(answers, who_of(results).removesuffix("s")),
        "answers": [((block, each), _tiles(block, lead, each)) for block, each in zip(blocks, answers, strict=False)],
        "about": {name: known.about.get(name, About()) for name in results},
        "facts": facts,
        "counts": {"train": len(train), "queries": len(queries), "shown": len(shown), "top": k, "first": FIRST},
        "law": {"positive": POSITIVE, "magnitude": MAGNITUDE, "estimate": ESTIMATE},
        **_kinds(results, len(train)),
        "agreement": [agreement_of(a, b, results, k, places) for a, b in itertools.combinations(results, 2)],
        "leaders": {name: album.counted(counts, len(queries)) for name, counts in leaders.items()},
        "removed": known.removed,
        "groups": [group_table(group, of, places) for group in groups if (of := _summed(group, whole))],
        "queries": blocks,
        "warned": {
            "count": len(known.warnings),
            "shown": [(number, block.name) for number, block in enumerate(blocks, 1) if block.warning],
        },
    }
    page["glossary"] = glossary(results, page)
    page["cite"] = cited(results, title, facts)
    files = {"report.html": filled("report.html", page, "report.js")}
    return {"gallery.png": draw_gallery(title, blocks, len(queries)), **files}


def _summed(group: Group, results: Mapping[str, Scores]) -> dict[str, Scores]:
    """The methods whose sums by these groups are known."""
    return {name: scores for name, scores in results.items() if group.summed(scores)}


def _answers(
    results: Mapping[str, Scores],
    places: Mapping[str, Sequence[int]],
    sides: tuple[Images, Images],
    groups: Sequence[Group],
    known: Known,
) -> list[Answer]:
    """What the leading method says of every query, in a sentence."""
    (train, queries), lead = sides, answer.leading(results, known.about)
    scores, noun = results[lead], who_of(results).removesuffix("s")
    about, leaning = known.about.get(lead, About()), known.leaning.get(lead)
    asked = answer.Asked(lead, scores, places[lead], train, groups, about, leaning, noun)
    return [answer.answer(asked, j, plain(known.warnings.get(name, ""))) for j, name in enumerate(queries.ids)]


def _tiles(block: Query, lead: str, found: Answer) -> list[Tile]:
    """The tiles of the images that a query leans on, as far as they are shown below."""
    strips = block.methods[lead]
    shown = {row: tile for (row, _), tile in zip(strips.reading.top, strips.top, strict=True)}
    return [shown[row] for row in found.rows if row in shown][:TILES]


def _judged(reading: Reading, leaning: Sequence[Leaning] | None, query: int) -> Reading:
    """A reading whose verdict is that of held-out pictures, where the picture was compared with some."""
    if leaning is None:
        return reading
    return replace(reading, verdict=leaning[query].verdict, folded=not leaning[query].stands_out)


def _kinds(results: Mapping[str, Scores], n: int) -> dict[str, object]:
    """What the page says of methods by the kind of their scores: sign, scale, and how many of n training images have one."""
    whole = {name: scores for name, scores in results.items() if scores.complete}
    return {
        "signed": [name for name, scores in results.items() if scores.signed],
        "unsigned": [name for name, scores in results.items() if not scores.signed],
        "scales": scales_of(results),
        "unitless": [name for name, scores in whole.items() if scores.scale == "rank"],
        "whole": list(whole),
        "scored": {name: scored_of(scores, n) for name, scores in results.items() if not scores.complete},
        "kept": {name: scored_of(scores, n) for name, scores in results.items() if scores.complete and scores.kept},
        "recipes": {name: recipe(scores) for name, scores in results.items()},
    }


def _check(results: Mapping[str, Scores], train: Images, queries: Images, top: int, max_queries: int) -> None:
    """Refuse what cannot be reported, and say which method and which image is wrong."""
    if not results:
        raise WhenceError("no results to report; pass the scores of at least one method")
    if top < 1 or max_queries < 1:
        raise WhenceError(f"top={top} and max_queries={max_queries} must both be at least 1")
    if not len(train) or not len(queries):
        raise WhenceError(
            f"{len(train)} training images and {len(queries)} queries; a report needs at least one of each"
        )
    for name, scores in results.items():
        _check_ids(name, "query", scores.query_ids, queries.ids)


def _check_warned(warnings: Mapping[str, str], queries: Images) -> None:
    unknown = sorted(warnings.keys() - set(queries.ids))
    if unknown:
        raise WhenceError(f"{unknown[0]!r} is warned of and is not among the {len(queries):,} queries", "warnings")


def _check_ids(method: str, kind: str, scored: Sequence[str], given: Sequence[str]) -> None:
    for place, (a, b) in enumerate(itertools.zip_longest(scored, given)):
        if a != b:
            raise WhenceError(
                f"{method}: {kind} {place} is {a!r} in the scores ({len(scored):,}) and {b!r} in the images "
                f"({len(given):,}); report the same images, in the same order, as were scored"
            )


def rows_of(method: str, scores: Scores, train: Images) -> Sequence[int]:
    """The row among the training images of each one that was scored: [n]. By name, never by place, where some were left out.

    Args:
        method: whose scores they are.
        scores: [m, n].
        train: all training images.
    """
    if not scores.some_only:
        _check_ids(method, "training image", scores.train_ids, train.ids)
        return range(len(train))
    row = {name: number for number, name in enumerate(train.ids)}
    unknown = [name for name in scores.train_ids if name not in row]
    if unknown:
        raise WhenceError(
            f"{method}: training image {unknown[0]!r} has scores and is not among the {len(train):,} images; report the "
            "images that were scored"
        )
    return [row[name] for name in scores.train_ids]
