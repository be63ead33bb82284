"""The words of a page, explained to a reader who is no statistician; only those that stand on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from whence.report.words import ESTIMATE, SCALES, known
from whence.types import Scores


def glossary(results: Mapping[str, Scores], page: Mapping[str, object]) -> list[tuple[str, str]]:
    """(word, meaning) of each.

    Args:
        results: method -> scores.
        page: what the page says.
    """
    return [*_of_numbers(results), *_of_errors(results), *_of_page(results, page)]


def _of_numbers(results: Mapping[str, Scores]) -> Iterator[tuple[str, str]]:
    signed = any(scores.signed for scores in results.values())
    yield "query", "a picture that is explained: one that the model drew, or any other"
    yield (
        "score",
        (
            "what a method says a training image did for a query; "
            + ESTIMATE
            + ". Scores of one query and one method can be "
            "compared, others cannot"
        ),
    )
    if signed:
        yield (
            "proponent, opponent",
            "an image that pushed the model towards the query (a score above 0), or away (below 0)",
        )
    yield "rank", "the place of an image when all are sorted by their scores, 1 being the strongest"
    for scale in dict.fromkeys(scores.scale for scores in results.values()):
        name, _, meaning = SCALES.get(scale, f"{scale}: {scale}").partition(": ")
        yield f"scale “{name}”", meaning
    yield (
        "stands out",
        (
            "the score is more than one standard deviation above the largest that as many from a bell curve would reach; "
            "clearly: more than three"
        ),
    )
    yield "standard deviation", "how far scores usually lie from their mean"


def _of_errors(results: Mapping[str, Scores]) -> Iterator[tuple[str, str]]:
    if any(scores.stderr is not None for scores in results.values()):
        yield "standard error", "how far a score would usually move if what is drawn by chance were drawn again"
    if any(known(scores) for scores in results.values()):
        yield (
            "reliability",
            (
                "the correlation to be expected between the scores of two such runs: 1 = the same, 0 = unrelated. Below 0.5 "
                "another run would name other images"
            ),
        )
        yield "rank 2 (1–5)", "the second by its score; with other draws it might be any from the first to the fifth"
    yield "draw", "one timestep and one noise at which the model is measured; means over more draws are surer"
    yield (
        "LDS",
        (
            "linear datamodeling score: the rank correlation between what scores predict and what happens when the model is "
            "trained again on random parts of its images. `whence lds` measures it"
        ),
    )


def _of_page(results: Mapping[str, Scores], page: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    if len(results) > 1:
        yield "Spearman", "rank correlation: 1 = both put the images in the same order, 0 = unrelated, −1 = opposite"
    if page.get("groups"):
        yield (
            "sum by group",
            "the scores of all images of a creator, class or licence added up; larger groups gather more",
        )
    yield "recipe", "all settings, seeds and digests that a result is computed again from, by `whence replay`"
    yield "digest", "a fingerprint of data: another one means other data"
