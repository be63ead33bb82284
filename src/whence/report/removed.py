"""What really happened: models trained again without the images that were named, and what a page shows of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

RANDOM = "random"
"""The arm that leaves out as many images that nobody named."""


class NoteOfRedrawn(TypedDict):
    """A picture as a model draws it. arm: "" for the model as it is; rise: of its loss, as a share; png: base64."""

    arm: str
    rise: NotRequired[float]
    png: str


class NoteOfArm(TypedDict):
    """The mean rise of the loss over pictures, as a share, and its interval."""

    name: str
    mean: float
    low: float
    high: float


class NoteOfDifference(TypedDict):
    """How much more the loss rises without the images of one arm than without those of another."""

    more: str
    less: str
    mean: float
    low: float
    high: float


class NoteOfRemoved(TypedDict):
    """What removed.json holds. train, queries: identities of what it is of; scores: digests of those that named the images,
    by method; count: of images that are left out."""

    train: str
    queries: str
    scores: dict[str, str]
    count: int
    said: str
    basis: str
    arms: list[NoteOfArm]
    differences: list[NoteOfDifference]
    pictures: dict[str, list[NoteOfRedrawn]]


@dataclass(frozen=True)
class Redrawn:
    """A picture as a model draws it that was trained without some images.

    Args:
        caption: what was left out.
        rise: of its loss, in words; "" for the model as it is.
        uri: of the picture.
    """

    caption: str
    rise: str
    uri: str


@dataclass(frozen=True)
class Removed:
    """What a page says of it.

    Args:
        said: the sentence.
        basis: what it rests on.
        arms: name, mean, interval and width of a bar, of each.
        differences: two arms, mean and interval, of each pair.
        pictures: of each query.
    """

    said: str
    basis: str
    arms: Sequence[tuple[str, str, str, float]]
    differences: Sequence[tuple[str, str, str, str]]
    pictures: dict[str, list[Redrawn]]


def shown_of(note: NoteOfRemoved) -> Removed:
    """What a page shows of removed.json."""
    widest = max((arm["mean"] for arm in note["arms"]), default=0.0)
    arms = [
        (
            "nobody: random ones" if arm["name"] == RANDOM else arm["name"],
            percent(arm["mean"]),
            interval(arm["low"], arm["high"]),
            arm["mean"],
        )
        for arm in note["arms"]
    ]
    return Removed(
        note["said"],
        note["basis"],
        [
            (name, mean, between, max(0.0, round(100 * value / widest, 1)) if widest > 0 else 0.0)
            for name, mean, between, value in arms
        ],
        [
            (each["more"], each["less"], percent(each["mean"]), interval(each["low"], each["high"]))
            for each in note["differences"]
        ],
        {
            query: [
                Redrawn(
                    left_out(each["arm"], note["count"]),
                    percent(each["rise"]) if "rise" in each else "",
                    "data:image/png;base64," + re.sub("[^A-Za-z0-9+/=]", "", each["png"]),
                )
                for each in found
            ]
            for query, found in note["pictures"].items()
        },
    )


def left_out(arm: str, count: int) -> str:
    """What an arm leaves out, in words."""
    if not arm:
        return "the model as it is"
    return f"without {count:,} random images" if arm == RANDOM else f"without the {count:,} that {arm} names"


def percent(value: float) -> str:
    """A share with its sign."""
    text = f"{100 * abs(value):.0f}" if abs(value) >= 0.1 else f"{100 * abs(value):.1f}"
    sign = "" if float(text) == 0 else "−" if value < 0 else "+"
    return f"{sign}{text}\N{NO-BREAK SPACE}%"


def interval(low: float, high: float) -> str:
    """Two shares."""
    return f"[{percent(low)}, {percent(high)}]"
