"""What identifies a result: versions, digests and settings, for whoever quotes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from whence.plain import digest
from whence.report.words import plain
from whence.types import VERSION, Scores, describe

DATE = "Date"
"""The line of a page's facts that says when it was computed."""
SETTINGS = 30  # of a method, in a line


def cited(results: Mapping[str, Scores], title: str, facts: Mapping[str, str]) -> dict[str, object]:
    """What the block to cite says, and what stands at the foot of each printed page.

    Args:
        results: method -> scores.
        title: the headline.
        facts: lines about model and data; the date among them.
    """
    recipes = {name: scores.recipe for name, scores in results.items()}
    date, versions = facts.get(DATE, ""), _each(recipes, "whence") or [VERSION]
    methods = [
        {
            "name": name,
            "settings": ", ".join(settings_of(scores)),
            "recipe": digest(scores.recipe),
            "scores": digest(scores.values),
        }
        for name, scores in results.items()
    ]
    checkpoints = sorted(
        {plain(each)[:64] for recipe in recipes.values() for each in _texts(recipe.get("checkpoints"))}
    )
    lines = {
        "whence": ", ".join(versions),
        "computed": date or "no date was noted",
        "model, sha256": ", ".join(checkpoints) or "not asked, or not noted",
        "training images": ", ".join(_each(recipes, "train")) or "not noted",
        "pictures": ", ".join(_each(recipes, "queries")) or "not noted",
    }
    foot = " · ".join(filter(None, [f"whence {_safe(versions[0])}", _safe(date), f"recipe {methods[0]['recipe']}"]))
    return {"title": title, "lines": lines, "methods": methods, "foot": foot, "version": VERSION, "date": date}


def _each(recipes: Mapping[str, Mapping[str, object]], key: str) -> list[str]:
    """What the recipes say, once each."""
    return list(
        dict.fromkeys(plain(recipe[key])[:64] for recipe in recipes.values() if isinstance(recipe.get(key), str))
    )


def _texts(found: object) -> list[str]:
    return [each for each in found if isinstance(each, str)] if isinstance(found, list | tuple) else []


def _safe(text: str) -> str:
    """Letters that mean nothing to a style sheet."""
    return re.sub(r"[^\w.+:-]", "", text, flags=re.ASCII)[:24]


def settings_of(scores: Scores) -> list[str]:
    """The settings of a method as "name value", those that hold others last."""
    found = list(_leaves(describe(scores.recipe.get("method", {})), ""))
    found.sort(key=lambda pair: (pair[0].count("."), pair[0]))
    more = [f"and {len(found) - SETTINGS} more"] if len(found) > SETTINGS else []
    return [f"{plain(name)} {plain(value)}" for name, value in found[:SETTINGS]] + more


def _leaves(thing: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(thing, Mapping):
        for key, value in thing.items():
            if key not in ("is", "name"):
                yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(thing, str | int | float) and not isinstance(thing, bool) and str(thing) not in ("", "none"):
        yield name, f"{thing:g}" if isinstance(thing, float) else str(thing)
