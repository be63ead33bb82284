"""What a page says of each method: in plain words, whose it is, and its formula."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from whence.methods import METHODS
from whence.report.answer import About

AGAIN = "It trains a model again, and follows what each training image does to what is learned."
WITHOUT = "It estimates how the trained weights would change without each image, and what that does to the picture."
PLAIN = {
    "reads retrained": "It reads models that were really trained with and without images.",
    "training per": AGAIN,
    "trainings": AGAIN,
    "passes over": WITHOUT,
    "systems": WITHOUT,
    "matrix": WITHOUT,
    "gradient": "It asks the model which way each training image, and the picture, pull its weights, and compares both.",
    "forward pass": "It compares what the inner layers of the model make of both pictures.",
    "embeds": "It compares what another network sees in both pictures; the model that is explained is not asked.",
    "images": "It compares the pictures themselves; the model is not asked.",
}
"""What a cost holds -> the method in plain words, the first that fits."""


def abouts(names: Iterable[str]) -> dict[str, About]:
    """What is known of the methods of whence among some.

    Args:
        names: of methods.
    """
    return {name: _about(name) for name in names if name in METHODS}


def _about(name: str) -> About:
    entry = METHODS[name]
    plain = next((words for part, words in PLAIN.items() if part in entry.cost), "")
    year = "" if entry.year is None or str(entry.year) in entry.paper else f" {entry.year}"
    words = f"{plain} {entry.paper[0].upper()}{entry.paper[1:]}{year}: {_first(inspect.getdoc(entry.make) or '')}"
    return About(words.strip(), entry.pictures_alone)


def _first(text: str) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join(text.partition("\n\n")[0].split()).replace("`", "")
    return re.split(r"(?<=[\w)\]])(?<!\bal)\.\s+(?=[A-Z])", paragraph)[0].rstrip(". ") + "."
