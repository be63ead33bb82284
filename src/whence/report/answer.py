"""The first answer: what can be said of a picture in a sentence, before any table.

An image stands out where its score is more than one above the largest that as many scores from a bell curve would reach, in
standard deviations (see `statistics.heights`). Said first: what looks like a copy; said instead: that the scores
depend mostly on what was drawn for them, or that the picture leans on single images no more than held-out pictures do.
An effect is foretold only where the scores predict one in units of a loss, and nothing that all images share is in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from whence.report.attributable import Leaning
from whence.report.statistics import Group, Spread, heights, spread_of
from whence.report.words import LOW, known, named_value, number
from whence.types import Images, Scores

OWNERS = ("creator", "artist", "author", "owner")
COPY, UNSURE, SPREAD, ALIKE, LEANS, NOTHING = "copy", "unsure", "spread", "alike", "leans", "nothing"
LOSSES = ("loss", "elbo", "weighted", "rmse", "cross_entropy", "doubt")
"""Outputs that are lower for a better picture."""
NAMED = 3  # images or owners that a sentence names


@dataclass(frozen=True)
class About:
    """What a page says of a method besides its scores.

    Args:
        words: what it computes, and whose it is.
        pictures_alone: whether it never asks the model.
    """

    words: str = ""
    pictures_alone: bool = False


@dataclass(frozen=True)
class Answer:
    """What can be said of one picture.

    Args:
        kind: COPY, UNSURE, SPREAD, ALIKE, LEANS or NOTHING.
        parts: the sentence; every second part, from the second, is a name from anybody.
        evidence: further sentences, likewise.
        rows: of the images it leans on among the training images, strongest first.
    """

    kind: str
    parts: Sequence[str]
    evidence: Sequence[Sequence[str]]
    rows: Sequence[int]


@dataclass(frozen=True)
class Asked:
    """What an answer is made of, all of one method.

    Args:
        method: its name.
        scores: its scores.
        rows: of the scored images among the training images [n].
        train: the training images.
        groups: columns of them.
        about: the method.
        leaning: of each query, where they were compared with held-out pictures.
        noun: what is scored, in the singular.
    """

    method: str
    scores: Scores
    rows: Sequence[int]
    train: Images
    groups: Sequence[Group]
    about: About
    leaning: Sequence[Leaning] | None = None
    noun: str = "training image"

    @cached_property
    def reliability(self) -> list[float] | None:
        """Of each query, worked out once."""
        found = self.scores.reliability
        return None if found is None else found.tolist()


def leading(results: Mapping[str, Scores], about: Mapping[str, About]) -> str:
    """The method whose answer is given first: the first that asks the model and has a sign, else that asks it."""
    asking = [name for name in results if not about.get(name, About()).pictures_alone]
    return next((name for name in asking if results[name].signed), next(iter(asking or results)))


def answer(asked: Asked, query: int, warning: str = "") -> Answer:
    """What can be said of a query.

    Args:
        asked: the method and the images.
        query: its row.
        warning: that it looks like a copy, "" for nothing.
    """
    scores, values = asked.scores, asked.scores.values[query].detach().double().cpu().numpy()
    columns = standing_out(values, scores.signed, spread_of(scores, query))
    found = _of_scores(asked, query, values, columns)
    if warning:
        before = [found.parts] if found.kind != NOTHING else []
        return Answer(COPY, ["This picture ", warning, "."], [*before, *found.evidence], found.rows)
    return found


def standing_out(values: np.ndarray, signed: bool, every: Spread) -> list[int]:
    """Columns of the images that stand out among all [n], strongest first; with a sign only such above 0."""
    z, chance = heights(values, every)
    some = np.flatnonzero((z > chance + 1) & ((values > 0) | (not signed)))
    return [int(i) for i in some[np.argsort(-z[some], kind="stable")]]


def _of_scores(asked: Asked, query: int, values: np.ndarray, columns: list[int]) -> Answer:
    scores, leaning = asked.scores, None if asked.leaning is None else asked.leaning[query]
    reliability = None if asked.reliability is None else asked.reliability[query]
    rows = [asked.rows[i] for i in columns]
    by = f" by {asked.method}"
    if float(np.ptp(values)) <= 1e-12 * float(np.abs(values).max()):
        return Answer(NOTHING, [f"All scores of this picture are equal{by}: there is nothing to tell."], [], [])
    if reliability is not None and reliability < LOW:
        told = f"It cannot be told which {asked.noun}s made this picture: another run{by} would name others"
        return Answer(UNSURE, [f"{told} (reliability {number(reliability, 2)})."], [], [])
    if leaning is not None and not leaning.stands_out:
        told = f"This picture leans on no single {asked.noun} more than pictures do that were never trained on"
        return Answer(ALIKE, [f"{told} (p = {number(leaning.p, 2)})."], [], [])
    if not columns:
        told = "This picture leans on few images, and none of them stands out alone" if leaning else ""
        return Answer(SPREAD, [f"{told or f'No single {asked.noun} stands out for this picture'}{by}."], [], [])
    evidence = [_sureness(scores, query, columns, reliability), *_effects(asked, query, columns)]
    return Answer(LEANS, _leans(asked, rows), evidence, rows)


def _leans(asked: Asked, rows: Sequence[int]) -> list[str]:
    """The sentence that names them."""
    images = f"{len(rows):,} {asked.noun}{'s' if len(rows) > 1 else ''}"
    if asked.about.pictures_alone:
        start = f"{images} look{'' if len(rows) > 1 else 's'} most like this picture (the model was not asked)"
    elif not asked.scores.signed:
        start = f"{images} mattered most for this picture, in which direction is not known"
    else:
        start = f"This picture leans on {images}"
    owner = next((group for group in asked.groups if group.column in OWNERS), None)
    if owner is None:
        return _listed(f"{start}: ", [asked.train.ids[row] for row in rows])
    nobody = {named_value(owner.column, None): f"an unknown {owner.column}"}
    counts = Counter(nobody.get(name := owner.names[owner.codes[row]], name) for row in rows)
    if len(counts) == 1:
        return [f"{start} by ", next(iter(counts)), "."]
    names = [name for name, _ in counts.most_common()]
    told = {name: f" ({count})" for name, count in counts.items()} if len(rows) > len(counts) else {}
    return _listed(f"{start}, by ", names, told)


def _listed(start: str, names: Sequence[str], after: Mapping[str, str] | None = None) -> list[str]:
    """Parts of a sentence that lists names, the first few of many."""
    parts, shown = [start], names[:NAMED]
    for place, name in enumerate(shown):
        last = place == len(shown) - 1
        more = f" and {len(names) - NAMED:,} more" if last and len(names) > NAMED else ""
        between = "." if last else " and " if place == len(shown) - 2 and len(names) <= NAMED else ", "
        parts += [name, f"{(after or {}).get(name, '')}{more}{between}"]
    return parts


def _sureness(scores: Scores, query: int, columns: Sequence[int], reliability: float | None) -> list[str]:
    """How sure the named images are."""
    if not known(scores):
        return ["How sure that is was not measured."]
    assert scores.stderr is not None
    if not bool(scores.stderr[query].any()):
        return ["Another run gives the same scores: nothing in them is drawn by chance."]
    k = len(columns)
    sure = sum(last < k for _, last in scores.ranks_between(query, columns))
    which = "it" if k == 1 else "all of them" if sure == k else f"{sure} of them" if sure else "none of them for sure"
    told = f"Another run would put {which} among the first {k}" if k > 1 else "Another run would put it first"
    if k == 1 and not sure:
        told = "Another run may put another image first"
    return [f"{told}{'' if reliability is None else f' (reliability {number(reliability, 2)})'}."]


def _effects(asked: Asked, query: int, columns: Sequence[int]) -> Iterator[list[str]]:
    """What leaving images out is predicted to do to the loss, where scores say so."""
    unit = loss_per_score(asked.scores)
    if unit is None:
        return
    values = asked.scores.values[query].double() * unit
    them = "it" if len(columns) == 1 else f"these {len(columns):,}"
    told = number(float(values[list(columns)].sum()), 2, plus=True)
    yield [f"Leaving {them} out of the training is predicted to change the loss of this picture by {told}."]
    owner = next((group for group in asked.groups if group.column in OWNERS), None)
    if owner is None or not owner.summed(asked.scores):
        return
    code = int(owner.codes[asked.rows[columns[0]]])
    everything = np.flatnonzero(owner.codes == code)
    if len(everything) > 1:
        told = number(float(owner.of(asked.scores, query)[code]) * unit, 2, plus=True)
        yield [f"Without all {len(everything):,} images by ", owner.names[code], f": by {told}, if effects add up."]


def loss_per_score(scores: Scores) -> float | None:
    """By how much the loss of a query is predicted to rise for a score of 1; None where scores do not say.

    A score in units of a loss that all images were measured for at the same draws holds what these draws add to all of them.
    """
    method = scores.recipe.get("method")
    if not scores.signed or scores.scale not in ("removal", "upweight") or not isinstance(method, Mapping):
        return None
    outputs = [str(found) for found in _values(method, "output")]
    if not outputs or any(name not in LOSSES for name in outputs):
        return None
    if "train" in method and any(found is True for found in _values(method["train"], "shared")):
        return None
    return (
        1.0
        if scores.scale == "removal"
        else 1 / (len(scores.train_ids) if scores.whole is None else scores.whole.count)
    )


def _values(thing: object, key: str) -> Iterator[object]:
    """Of a key, wherever it stands."""
    if isinstance(thing, Mapping):
        for name, value in thing.items():
            if name == key and value is not None:
                yield value
            yield from _values(value, key)


SAID = {
    COPY: ("{} looks like a copy of a training image", "{} look like copies of training images"),
    LEANS: ("{} leans on single {}s", "{} lean on single {}s"),
    SPREAD: ("for {} no single {} stands out", "for {} no single {} stands out"),
    ALIKE: (
        "{} leans on single {}s no more than pictures do that were never trained on",
        "{} lean on single {}s no more than pictures do that were never trained on",
    ),
    UNSURE: (
        "for {} it cannot be told: another run would name others",
        "for {} it cannot be told: another run would name others",
    ),
    NOTHING: ("for {} all scores are equal", "for {} all scores are equal"),
}


def in_short(answers: Sequence[Answer], noun: str) -> str:
    """All answers in a sentence, copies first.

    Args:
        answers: of all queries.
        noun: what was scored, in the singular.
    """
    counts = Counter(each.kind for each in answers)
    if len(counts) == 1 and len(answers) > 1:
        alike = SAID[answers[0].kind][1].format(f"all {len(answers):,}", noun)
        return f"{alike[0].upper()}{alike[1:]}."
    told = [SAID[kind][counts[kind] > 1].format(f"{counts[kind]:,}", noun) for kind in SAID if counts[kind]]
    return f"Of {len(answers):,} pictures, {'; '.join(told)}."
