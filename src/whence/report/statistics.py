"""What a report computes of a score matrix: who stands out, groups, agreement of methods."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch

from whence.report.histogram import Histogram, histogram_of
from whence.report.words import ERRORS, GROUP_COLUMNS, LOW, all_equal, known, named_value, number, plain, tone_of
from whence.scores import strongest, surely
from whence.types import Scores, WhenceError

MAX_GROUPS = 100  # rows of a group table; the others are one row


@dataclass(frozen=True)
class Group:
    """A column of the training images.

    Args:
        column: its name.
        names: of its groups.
        codes: the group of each image [n].
    """

    column: str
    names: list[str]
    codes: np.ndarray

    def sums(self, row: np.ndarray) -> np.ndarray:
        """Sum of the scores [n] of each group. A sum is not a Shapley value: it ignores how images work together."""
        return np.bincount(self.codes, weights=row, minlength=len(self.names))

    def summed(self, scores: Scores) -> bool:
        """Whether the sums are known: of all images, and, where few scores were kept, by these very groups."""
        if scores.whole is None:
            return scores.complete
        names, images, _ = scores.whole.groups.get(self.column, ((), torch.empty(0), torch.empty(0)))
        sizes = np.bincount(self.codes, minlength=len(self.names))
        return scores.complete and list(names) == self.names and images.tolist() == sizes.tolist()

    def of(self, scores: Scores, query: int | None = None) -> np.ndarray:
        """The sums of a query, or of all queries together; of images whose scores were not kept, too."""
        if scores.whole is not None:
            kept = scores.whole.groups[self.column][2]
            return (kept.sum(0) if query is None else kept[query]).numpy()
        values = scores.values.detach().sum(0, dtype=torch.float64) if query is None else scores.values[query].double()
        return self.sums(values.cpu().numpy())


@dataclass(frozen=True)
class Spread:
    """What is known of all scores of a query: how many, mean, standard deviation, and sum and number of those above 0."""

    count: int
    mean: float
    deviation: float
    positive: float
    above: int


def spread_of(scores: Scores, query: int) -> Spread:
    """Of all training images, of which some may have been kept alone."""
    whole = scores.whole
    if whole is None:
        return spread(_row(scores, query))
    deviation = math.sqrt(float(whole.variance[query]))
    return Spread(
        whole.count, float(whole.mean[query]), deviation, float(whole.positive[query]), int(whole.above[query])
    )


def spread(row: np.ndarray) -> Spread:
    """Of scores [n]."""
    return Spread(len(row), float(row.mean()), float(row.std()), float(row.clip(min=0).sum()), int((row > 0).sum()))


@dataclass(frozen=True)
class Reading:
    """What one method says about one query.

    Args:
        top: (row among the training images, score) of the strongest images.
        bottom: (row, score) of the strongest opponents.
        signed: whether negative scores mean opponents.
        verdict: what that amounts to, see `verdict`.
        histogram: of all scores.
        sums: (column, note, (group, sum) of each); none where some images have no score.
        between: the ranks that each of the strongest images may have, from 1; none without standard errors.
        certainty: what standard errors say of the strongest images, see `certainty`; "" without.
        folded: whether the ranking says no more than those of pictures that were never trained on.
    """

    top: list[tuple[int, float]]
    bottom: list[tuple[int, float]]
    signed: bool
    verdict: tuple[str, str]
    histogram: Histogram
    sums: list[tuple[str, str, list[tuple[str, float]]]]
    between: list[tuple[int, int]]
    certainty: tuple[str, str]
    folded: bool = False


def _row(scores: Scores, query: int) -> np.ndarray:
    """Scores of one query over all images that were scored: [n] in double precision."""
    return scores.values[query].detach().double().cpu().numpy()


def _strongest(row: np.ndarray, k: int) -> list[int]:
    """Positions of the k largest of [n], see `scores.strongest`. All where there are fewer."""
    found: list[int] = strongest(torch.from_numpy(row), k).tolist()
    return found


def read_query(scores: Scores, query: int, k: int, groups: Sequence[Group], rows: Sequence[int]) -> Reading:
    """What one method says about one query.

    Args:
        scores: of the method.
        query: its row.
        k: images on the strong end.
        groups: columns to group by; the first is summed.
        rows: of the scored images among the training images [n].
    """
    row, whole = _row(scores, query), scores.whole
    k = min(k, scores.kept or k)
    top = _strongest(row, k)
    if scores.signed and row[top[0]] > 0:
        top = [i for i in top if row[i] > 0]  # what is below zero is no proponent, however few are above
    # Only images below zero are opponents; with few images the two ends may meet.
    bottom = [i for i in _strongest(-row, (k + 1) // 2) if row[i] < 0 and i not in top] if scores.signed else []
    return Reading(
        top=[(rows[i], float(row[i])) for i in top],
        bottom=[(rows[i], float(row[i])) for i in bottom],
        signed=scores.signed,
        verdict=verdict(row, min(k, len(row)), scores.signed, spread_of(scores, query)),
        histogram=histogram_of(row, top, bottom, None if whole is None else (whole.bars[query], whole.edges[query])),
        sums=[_largest_sums(group, group.of(scores, query)) for group in groups[:1] if adds_up(group, scores)],
        between=[] if not known(scores) else [(a + 1, b + 1) for a, b in scores.ranks_between(query, top)],
        certainty=certainty(scores, query, top),
    )


def certainty(scores: Scores, query: int, top: Sequence[int]) -> tuple[str, str]:
    """What the standard errors of a query say of its first images: the finding, and what it holds for; empty without errors.

    An image surely belongs to the first k where the last rank that it may have is among them (see `ranks`).

    Args:
        scores: of the method.
        query: its row.
        top: columns of the first k images.
    """
    if scores.stderr is None or scores.whole is not None:  # ranks are those among all
        return "", ""
    if not known(scores):
        return "How sure these are is not known", "their standard errors need two seeds or more of each training"
    if not scores.stderr[query].any():
        return "Nothing is drawn by chance", "another run gives the same scores"
    k, some = len(top), torch.tensor(top)
    sure = sum(last < k for _, last in scores.ranks_between(query, top))
    ordered = bool(surely(scores.values[query], scores.stderr[query], some)[0][:, some].any())
    if k < 2:
        finding = "The first image surely is the first" if sure else "No image surely is the first"
    elif sure == k:
        finding = f"The first {k} surely belong there{'' if ordered else ', in whatever order'}"
    else:
        belong = f"{sure} surely belong{'s' if sure == 1 else ''} there" if sure else "none surely belongs there"
        finding = f"Of the first {k}, {belong}{'' if ordered else ', and no order among them can be told'}"
    drawn, besides = ERRORS.get(
        scores.stderr_of, (f"other {plain(scores.stderr_of)}", "what else is drawn is not held")
    )
    reliability = scores.reliability
    if reliability is not None and float(reliability[query]) < LOW:
        told = number(float(reliability[query]), 2)
        finding += f"; these scores depend mostly on what was drawn for them (reliability {told})"
    return finding, f"the ranks in brackets are those that {drawn} could give; {besides}"


def _largest_sums(group: Group, sums: np.ndarray, limit: int = 4) -> tuple[str, str, list[tuple[str, float]]]:
    named = [(group.names[g], float(sums[g])) for g in _strongest(sums, min(limit, len(sums)))]
    return group.column, "" if len(sums) <= limit else f"{limit} largest of {len(sums):,} groups", named


def heights(row: np.ndarray, all_scores: Spread) -> tuple[np.ndarray, float]:
    """How many standard deviations each score is above the mean of all, and how many the largest of as many bell-shaped ones
    is expected to be (see `verdict`).

    Args:
        row: scores.
        all_scores: what is known of all, of which these may be some.
    """
    n = all_scores.count
    chance = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    return (row - all_scores.mean) / (all_scores.deviation or 1.0), chance


def verdict(row: np.ndarray, k: int, signed: bool, all_scores: Spread | None = None) -> tuple[str, str]:
    """What the scores of a query amount to: the finding, and the numbers it rests on.

    z = (max − mean) / std is compared with the expected maximum of n bell-shaped scores, Φ⁻¹((n − 3/8) / (n + 1/4))
    (Blom 1958); the largest of such scores exceeds that by 1 in about one case of twenty or fewer, by 3 hardly ever.

    Args:
        row: scores [n].
        k: the strongest, whose share of the sum is given.
        signed: whether negative scores mean opponents.
        all_scores: what is known of all, where the row has the first and last of them alone.
    """
    every = spread(row) if all_scores is None else all_scores
    n = every.count
    if all_equal(row):
        return "Nothing to tell", f"all {n:,} scores are equal"
    above, chance = heights(row, every)
    z = float(above.max())
    finding = "The strongest image does not stand out"
    if z > chance + 1:
        finding = (
            "The strongest image stands out clearly" if z > chance + 3 else "The strongest image stands out a little"
        )
    return finding, (
        f"it scores {number(z, 2)} standard deviations above the mean of all {n:,} (the largest of as many "
        f"scores from a bell curve would reach about {number(chance, 2)}, and it takes one more to stand out); "
        f"{_share(row, k, signed, every)}"
    )


def _share(row: np.ndarray, k: int, signed: bool, every: Spread) -> str:
    positive = row.clip(min=0)
    if not positive.any():
        return "none scores above zero"
    if k >= len(row):
        return f"{every.above:,} of {every.count:,} score above zero"
    share = float(np.sort(np.partition(positive, len(row) - k)[len(row) - k :]).sum() / every.positive)
    who = "the first image carries" if k == 1 else f"the top {k} carry"
    return f"{who} {number(100 * share, 2)}\N{NO-BREAK SPACE}% of the total {'positive ' if signed else ''}score"


def _ranks(row: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two score rows [n]; NaN where one of them is constant."""
    a, b = _ranks(a) - (len(a) + 1) / 2, _ranks(b) - (len(b) + 1) / 2
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


def agreement_of(
    a: str, b: str, results: Mapping[str, Scores], k: int, rows: Mapping[str, Sequence[int]]
) -> dict[str, object]:
    """How alike two methods rank the images that both of them scored, over all queries; by magnitude where either of them
    has no sign.

    Args:
        a: one method.
        b: the other.
        results: method -> scores.
        k: the strongest images of a query, of which the shared ones are counted.
        rows: method -> rows of its scored images among the training images.
    """
    two = results[a], results[b]
    magnitude, partly = not (two[0].signed and two[1].signed), any(scores.kept for scores in two)
    places = np.asarray(rows[a]), np.asarray(rows[b])
    both, *columns = np.intersect1d(places[0], places[1], return_indices=True)
    if partly:  # the strongest of each are here, whichever the other method kept
        columns = [np.arange(len(found)) for found in places]
    n = max(scores.whole.count if scores.whole is not None else len(both) for scores in two) if partly else len(both)
    k = min(k, n)
    correlations, shared = [], []
    for query in range(len(two[0].query_ids)):
        pair = [_row(scores, query)[some] for scores, some in zip(two, columns, strict=True)]
        pair = [np.abs(row) if magnitude else row for row in pair]
        # Of what is first or last alone, a correlation would say that methods agree where they hardly do.
        correlations.append(math.nan if partly else spearman(*pair))
        first = [{*found[some][_strongest(row, k)]} for row, some, found in zip(pair, columns, places, strict=True)]
        shared.append(len(first[0] & first[1]))
    known = [value for value in correlations if not math.isnan(value)]
    return {
        "pair": (a, b),
        "magnitude": magnitude,
        "spearman": number(float(np.mean(known)), 2) if known else "not known" if partly else "undefined",
        "value": f"{np.mean(known):.6g}" if known else "",
        "range": (number(min(known), 2), number(max(known), 2)) if len(known) > 1 else None,
        "images": n,
        "top": k,
        "shared": number(float(np.mean(shared)), 2),
        "chance": number(k * k / max(n, 1), 2),
    }


def leaders_of(scores: Scores, k: int, rows: Sequence[int], limit: int = 8) -> list[tuple[int, int]]:
    """(row, count) of the images that are among the strongest of more than one query, most frequent first.

    Args:
        scores: of a method.
        k: images of each query that count.
        rows: of the scored images among the training images [n].
        limit: images, at most.
    """
    counts: Counter[int] = Counter()
    k = min(k, scores.kept or k)
    for query in range(len(scores.query_ids)):
        counts.update(rows[i] for i in _strongest(_row(scores, query), k))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(row, count) for row, count in ordered[:limit] if count > 1]


def groups_of(meta: Mapping[str, Sequence[object]], n: int) -> list[Group]:
    """Columns to group by: those with a telling name, else the first one whose values repeat."""
    wrong = next((column for column in meta if len(meta[column]) != n), None)
    if wrong is not None:
        raise WhenceError(f"column {wrong!r} has {len(meta[wrong]):,} values for {n:,} training images")
    named = (_group(column, meta[column]) for column in GROUP_COLUMNS if column in meta)
    known = [group for group in named if len(group.names) > 1]  # of one group there is nothing to compare
    others = (_group(column, meta[column]) for column in meta)
    return known or list(itertools.islice((group for group in others if 1 < len(group.names) < n), 1))


def _group(column: str, values: Sequence[object]) -> Group:
    labels = [named_value(column, value) for value in values]
    index = {name: code for code, name in enumerate(sorted(set(labels)))}
    return Group(column, list(index), np.array([index[label] for label in labels]))


FIRST = 10
"""Images of each picture that are counted where scores do not add up."""


def adds_up(group: Group, scores: Scores) -> bool:
    """Whether sums over the images of a group are known, and mean something: of scores in some unit."""
    return scores.scale != "rank" and group.summed(scores)


def among_the_first(group: Group, scores: Scores, rows: Sequence[int]) -> np.ndarray:
    """How many of each group's images are among the first of each query, all queries together: what the order alone says.

    Args:
        group: the groups.
        scores: of a method.
        rows: of the scored images among the training images.
    """
    k = min(FIRST, scores.kept or FIRST, len(rows))
    first = [rows[column] for query in range(len(scores.query_ids)) for column in _strongest(_row(scores, query), k)]
    return np.bincount(group.codes[first], minlength=len(group.names))


def group_table(group: Group, results: Mapping[str, Scores], places: Mapping[str, Sequence[int]]) -> dict[str, object]:
    """Sums over all queries, or counts where scores do not add up; one row per group, the largest of the first method first.
    What does not fit is one row.

    Args:
        group: the groups.
        results: method -> scores.
        places: method -> rows of the scored images among the training images.
    """
    totals = {
        name: group.of(s) if adds_up(group, s) else among_the_first(group, s, places[name])
        for name, s in results.items()
    }
    order = _strongest(next(iter(totals.values())), min(MAX_GROUPS, len(group.names)))
    sizes = np.bincount(group.codes, minlength=len(group.names))
    widest = {name: float(np.abs(sums).max()) or 1.0 for name, sums in totals.items()}

    def row(name: str, groups: np.ndarray) -> dict[str, object]:
        signs = {method: s.signed and adds_up(group, s) for method, s in results.items()}
        found = [(float(totals[method][groups].sum()), signs[method], widest[method]) for method in results]
        sums = [
            (
                number(value, plus=signed) if adds_up(group, scores) else f"{value:,.0f}",
                tone_of(value, signed),
                round(min(100, 100 * abs(value) / most)),
                f"{value:.6g}",
            )
            for (value, signed, most), scores in zip(found, results.values(), strict=True)
        ]
        return {"name": name, "images": int(sizes[groups].sum()), "sums": sums}

    rest = np.setdiff1d(np.arange(len(group.names)), order)
    return {
        "column": group.column,
        "groups": len(group.names),
        "rows": [row(group.names[g], np.array([g])) for g in order],
        "rest": row(f"the other {len(rest):,} together", rest) if len(rest) else None,
    }
