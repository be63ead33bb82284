"""The law of `agreement.py`, read off the tests themselves."""

import ast
from pathlib import Path

import pytest

from agreement import close


def test_no_rounding_is_forgiven_absolutely():
    """`assert_close` names its tolerances (its own default forgives 1e-5 in float32), and none is absolute but those of
    float64, to 1e-8, and those of chance, from 1e-2. What else a test needs is a share of a size: `close`, or rtol."""
    found = []
    for path in Path(__file__).parent.rglob("test_*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("assert_close", "assert_allclose"):
                told = {word.arg: word.value for word in call.keywords}
                atol = told.get("atol")
                atol = atol.value if isinstance(atol, ast.Constant) else 0  # else worked out from a size
                if 1e-8 < atol < 1e-2 or (call.func.attr == "assert_close" and not {"rtol", "atol"} <= told.keys()):
                    found.append(f"{path.name}:{call.lineno}")
    assert not found, f"absolute tolerances at {', '.join(found)}; use agreement.close"


def test_close_is_relative_to_the_largest():
    close([0.0, 1e6], [1.0, 1e6])
    for found, expected in (([1.0, 2e-5], [1.0, 0.0]), ([float("nan")], [1.0]), ([1.0], [1.0, 1.0]), ([1e-9], [0.0])):
        with pytest.raises(AssertionError):
            close(found, expected)
