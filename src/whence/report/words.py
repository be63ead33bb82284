"""What a report says in words: signs, scales, names and numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from whence.plain import describe

if TYPE_CHECKING:
    from whence.scores import Scores

GROUP_COLUMNS = ("creator", "artist", "author", "label", "class", "category", "license", "source")
POSITIVE = "positive = proponent: the image pushed the model towards this picture"
MAGNITUDE = "magnitude only: a large score says that the image mattered, not in which direction"
ESTIMATE = "scores are estimates of influence, not proof of copying"

ERRORS = {
    "draws": (
        "other timesteps and noise",
        "another random projection, where there is one, and another training of the model would add to that",
    ),
    "draws and the random projection": (
        "other timesteps and noise, and another random projection",
        "another training of the model would add to that",
    ),
    "draws; its random projection has too few columns to say what another one would change": (
        "other timesteps and noise",
        "another random projection (which has too few columns for that to be measured), and another training of the model, "
        "would add to that",
    ),
    "draws that all images share": (
        "other timesteps and noise",
        "what these do to all scores of a picture alike is left out, as it changes no order; another random projection, "
        "where there is one, and another training of the model would add to that",
    ),
    "draws that all images share, and the random projection": (
        "other timesteps and noise, and another random projection",
        "what the former do to all scores of a picture alike is left out, as it changes no order; another training of the "
        "model would add to that",
    ),
    "draws that all images share; its random projection has too few columns to say what another one would change": (
        "other timesteps and noise",
        "what these do to all scores of a picture alike is left out, as it changes no order; another random projection "
        "(which has too few columns for that to be measured), and another training of the model, would add to that",
    ),
    "the random projection": ("another random projection", "another training of the model would add to that"),
    "draws of the queries": (
        "other timesteps and noise of the query",
        "a random projection, and another training of the model, would add to that",
    ),
    "masks and seeds": (
        "other random subsets and seeds",
        "other timesteps and noise, at which the query is measured, would add to that",
    ),
    "masks, seeds and draws": (
        "other random subsets and seeds, and other timesteps and noise of the query",
        "another training of the model would add to that",
    ),
}
"""What errors are of -> what a run that differs by as much draws anew, and what they do not hold."""

ORDER = (
    "compare scores of one picture and one method only; images that worked against the picture are on the page alone"
)

SCALES = {
    "removal": "removal: the rise of the query's loss if this one were left out of the training; measured where the method "
    "reads retrained models, else predicted",
    "upweight": "upweight: the predicted fall of the query's loss per unit of extra weight on this training image "
    "(n times the effect of removing it)",
    "value": "value: in units of the measured output, how much better it is with this one than without, on average over the "
    "sets of others that the method names",
    "rank": "rank: no units; only the order of the images within one query means something",
}


def number(value: float, digits: int = 3, plus: bool = False) -> str:
    """A number for people: thousands separators, a true minus, powers of ten when far from 1.

    Args:
        value: the number.
        digits: significant ones.
        plus: whether positive numbers have a sign.
    """
    if value == 0:
        return "0"
    mantissa, power = f"{abs(value):.{digits - 1}e}".split("e")
    exponent = int(power)
    if -4 <= exponent < 6:
        text = f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - exponent)}f}"
    else:
        text = f"{mantissa}×10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return ("−" if value < 0 else "+" if plus else "") + text


def tone_of(value: float, signed: bool) -> str:
    """The colour of a number, as a word the style sheet knows: "pro", "con", or none where there is no sign."""
    return "" if not signed or value == 0 else "pro" if value > 0 else "con"


def plain(text: object) -> str:
    """One line of printable text: no line breaks, control characters or direction overrides from file names."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split()))


def label_of(meta: Mapping[str, Sequence[object]], row: int) -> str:
    """The most telling group of an image; a bare number gets its column name."""
    column = next((c for c in GROUP_COLUMNS if c in meta), None)
    return "" if column is None else named_value(column, meta[column][row])


def prompt_of(meta: Mapping[str, Sequence[object]], row: int, limit: int = 80) -> str:
    """The text a picture was drawn for, where it has one.

    Args:
        meta: columns of the pictures.
        row: of the picture.
        limit: letters, at most.
    """
    text = plain(meta["text"][row]) if isinstance(meta.get("text", [None] * (row + 1))[row], str) else ""
    return text if len(text) <= limit else f"{text[:limit]}..."


def named_value(column: str, value: object) -> str:
    """A value of a column as people read it; a bare number gets the column's name."""
    if value is None:
        return f"no {column}"
    return f"{column} {value}" if isinstance(value, (int, float)) or str(value).isdecimal() else plain(value)


def recipe(scores: Scores) -> dict[str, str]:
    """What a page says of how scores came about."""
    return {
        "json": json.dumps(describe(scores.recipe), indent=2, sort_keys=True, ensure_ascii=False),
        "scale": SCALES.get(scores.scale, scores.scale),
        "sign": POSITIVE if scores.signed else MAGNITUDE,
        "errors": errors_of(scores),
    }


def known(scores: Scores) -> bool:
    """Whether scores have errors that are numbers: values of trainings with one seed have none."""
    return scores.stderr is not None and scores.whole is None and bool(scores.stderr.isfinite().all())


def errors_of(scores: Scores) -> str:
    """What the standard errors of scores are of, and what they do not hold; or why there are none."""
    if scores.stderr is not None and scores.whole is None and not known(scores):
        return f"those of {plain(scores.stderr_of)} are not known: they need two seeds or more of each training"
    if scores.stderr_of in ERRORS:
        drawn, besides = ERRORS[scores.stderr_of]
        of = scores.stderr_of.removeprefix("the ").partition(";")[0]
        return f"of the {of}: what {drawn} would change; {besides}. {reliability_of(scores)}"
    if scores.stderr is not None and not scores.stderr_of.startswith("nothing"):
        return f"of {plain(scores.stderr_of)}"
    return plain(scores.stderr_of) or "not measured: none were asked for"


LOW = 0.5
"""The reliability below which scores are said to depend mostly on what was drawn for them."""


def reliability_of(scores: Scores) -> str:
    """How well another run would agree with this one, over all pictures; empty where that is not known."""
    found = scores.reliability
    known = [] if found is None else [value for value in found.tolist() if value == value]
    if not known:
        return ""
    low, warned = sum(value < LOW for value in known), ""
    if low:
        warned = f"; below {number(LOW)} for {low:,} of {len(known):,}, which depend mostly on what was drawn for them"
    between = f" ({number(min(known), 2)} to {number(max(known), 2)} by picture)" if len(known) > 1 else ""
    mean = number(sum(known) / len(known), 2)
    return f"Reliability, the correlation to be expected between two such runs: {mean}{between}{warned}"


def who_of(results: Mapping[str, Scores]) -> str:
    """What is scored: training images, or contributors with several of them (values of a ledger by a column)."""
    found = [scores.recipe.get("values") for scores in results.values()]
    by_column = any(isinstance(each, Mapping) and each.get("by") != "image" for each in found)
    return "contributors" if by_column else "training images"


def scales_of(results: Mapping[str, Scores]) -> dict[str, list[str]]:
    """What numbers mean -> the methods whose numbers mean it."""
    found: dict[str, list[str]] = {}
    for name, scores in results.items():
        _, _, meaning = SCALES.get(scores.scale, f": {scores.scale}").partition(": ")
        found.setdefault(meaning, []).append(name)
    return found


def scored_of(scores: Scores, n: int) -> str:
    """How many of the training images were scored, and who named them.

    Args:
        scores: of some training images.
        n: all training images.
    """
    if scores.kept is not None:
        return f"the first and the last {scores.kept:,} of each picture were kept, of all {n:,} images"
    note = scores.recipe.get("candidates")
    named = f", named by {plain(note['by'])}" if isinstance(note, Mapping) else ""
    return f"{len(scores.train_ids):,} of {n:,} images{named}"


def question(note: Mapping[str, object] | None, contrast: Mapping[str, object] | None) -> str:
    """What is asked of the pictures, where it is not what a method asks itself; "" where it is.

    Args:
        note: the question of a recipe, as `methods.question.Question` describes it; None for that of the method.
        contrast: the contrast of a recipe, None for none.
    """
    found = [] if contrast is None else [f"why {plain(contrast['this'])} rather than {plain(contrast['not_that'])}"]
    mask, window = (None, None) if note is None else (note["mask"], note["timesteps"])
    if isinstance(mask, Mapping):
        found.append(
            f"a region of the pictures, {number(100 * mask['share'], 2)} % of them (masks/{mask['digest']}.png)"
        )
    if isinstance(window, Sequence):
        found.append(f"timesteps {window[0]} to {window[1] - 1}, 0 being the least noisy")
    return "; ".join(found)


def question_told(scores: Scores) -> str:
    """`question` of scores."""
    call = scores.recipe.get("call")
    note = call.get("question") if isinstance(call, Mapping) else None
    contrast = scores.recipe.get("contrast")
    return question(note, contrast if isinstance(contrast, Mapping) else None)


def all_equal(row: np.ndarray) -> bool:
    """Whether scores [n] differ by no more than rounding does."""
    return float(np.ptp(row)) <= 1e-12 * float(np.abs(row).max())
