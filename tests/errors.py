"""The law of refusals: a test checks the fields of an error, what is wrong, where and what is accepted, not its sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from whence.types import WhenceError


@contextmanager
def refuses(
    what: str = "", where: str = "", accepted: str = "", kind: type[WhenceError] = WhenceError
) -> Iterator[pytest.ExceptionInfo[WhenceError]]:
    """The block raises a WhenceError that has each of these texts in the field of its name; at least one is given.

    "..." in a text stands for anything, or nothing: "dim ... of ... parameters". What comes back has the error as `.value`.
    """
    if not (what + where + accepted).strip(". "):
        raise TypeError("a refusal is tested by what it says; give what, where or accepted")
    with pytest.raises(kind) as caught:
        yield caught
    error = caught.value
    for name, text, found in (
        ("what", what, error.what),
        ("where", where, error.where),
        ("accepted", accepted, error.accepted),
    ):
        pattern = ".*".join(map(re.escape, text.split("...")))
        assert re.search(pattern, found, re.DOTALL), f"{name} is {found!r}, without {text!r}"
