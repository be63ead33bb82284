"""Why this picture rather than that one: the difference of two rows of scores.

    score[this rather than that, i] = score[this, i] - score[that, i]

Where scores are linear in what is measured of the query (see `methods.question.LinearInQuery`) this is the score of one new
query, measured by f(this) - f(that): positive for images that did more for this than for that.

Standard errors: sqrt(a^2 + b^2) where the two rows were drawn independently of each other; else a + b, which is the most
that the standard deviation of a difference can be, however the two hang together.
"""

from __future__ import annotations

from dataclasses import replace

from whence.methods.errors import DRAWS, NARROW, PROJECTED
from whence.types import Scores, WhenceError, only_some

INDEPENDENT, BOUND = "sqrt(a^2 + b^2)", "at most a + b"


def contrast_name(this: str, not_that: str) -> str:
    """The name of the query that stands for the difference."""
    return f"{this} rather than {not_that}"


def contrasted(scores: Scores, this: str, not_that: str, independent: bool = False) -> Scores:
    """The scores of one new query, the first rather than the second: [1, n].

    Args:
        scores: linear in the query: [m, n].
        this: the name of a query.
        not_that: the name of another.
        independent: whether chance drew the two rows independently of each other.
    """
    if scores.kept is not None:  # what is first in a difference may be first or last in neither
        raise only_some("contrast", scores)
    rows = {name: row for row, name in enumerate(scores.query_ids)}
    for option, name in (("--this", this), ("--not_that", not_that)):
        if name not in rows:
            raise WhenceError(f"no picture {name!r} was explained", option, ", ".join(rows))
    if this == not_that:
        raise WhenceError(f"both are {this!r}", "--not_that", "another picture")
    a, b = rows[this], rows[not_that]
    note: dict[str, object] = {"this": this, "not_that": not_that}
    errors = None
    if scores.stderr is not None:
        one, other = scores.stderr[a], scores.stderr[b]
        errors = ((one.square() + other.square()).sqrt() if independent else one + other)[None]
        note["stderr"] = INDEPENDENT if independent else BOUND
    return replace(
        scores,
        values=(scores.values[a] - scores.values[b])[None],
        query_ids=[contrast_name(this, not_that)],
        recipe={**scores.recipe, "contrast": note},
        pictures=None,
        stderr=errors,
    )


def check_contrastable(name: str, scores: Scores, linear: bool) -> None:
    """Refuse scores whose differences are no scores of a difference.

    Args:
        name: of the method.
        scores: its.
        linear: whether the method says that its scores are linear in the query.
    """
    accepted = "a method without cosines, unit draws, squares or distances, such as d_trak, ek_fac or tracin"
    if "contrast" in scores.recipe:
        raise WhenceError("these are a contrast already", name, "scores of pictures")
    if not linear or not scores.signed:
        raise WhenceError(
            f"{name} scales each picture by itself: its scores are not linear in the query", name, accepted
        )


def drawn_apart(scores: Scores, same_picture: bool) -> bool:
    """Whether the errors of two queries come from draws of their own: noise is keyed by the picture, so two pictures have
    independent draws, but not two prompts for the same picture, nor draws that all pictures share, nor retrained models.

    Args:
        scores: with their recipe.
        same_picture: whether the two queries show the same.
    """
    of_draws = scores.stderr_of in (DRAWS, PROJECTED, NARROW)
    return of_draws and not same_picture and not _shares(scores.recipe.get("method"))


def _shares(described: object) -> bool:
    """Whether any draws in a recipe have the same noise for all images."""
    if isinstance(described, dict):
        return described.get("shared") is True or any(_shares(part) for part in described.values())
    return isinstance(described, list) and any(_shares(part) for part in described)
