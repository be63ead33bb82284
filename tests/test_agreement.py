"""The laws of `agreement.py` and `errors.py`, read off the tests themselves."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import whence
from agreement import close
from errors import refuses
from whence.types import WhenceError


def nodes(folder: Path) -> Iterator[tuple[str, ast.AST]]:
    """All syntax of all files below a folder, each piece with its file name."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            yield path.name, node


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("_")  # _repr_html_ and the like are for others to call


def defined(node: ast.AST) -> str:
    """The name that a piece of syntax gives to something, "" where it gives none."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.id if isinstance(node, ast.Name) else node.attr
    return ""


def used(node: ast.AST) -> list[str]:
    """The names that it looks up in something else: attributes, imports, and texts, for `monkeypatch.setattr`."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.alias):
        return node.name.split(".")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
        return node.value.split(".")
    return []


def test_no_test_uses_a_private_name_of_whence():
    """Tests look at what is promised, so that what is not may change: behaviour, not how it comes about."""
    hidden = {defined(node) for _, node in nodes(Path(whence.__file__).parent)}
    found = [
        f"{file}:{node.lineno} {name}"
        for file, node in nodes(Path(__file__).parent)
        for name in used(node)
        if private(name) and name in hidden
    ]
    assert not found, f"private names of whence: {', '.join(found)}"


def test_a_refusal_is_tested_by_its_fields():
    """Not by its sentence; a regular expression says what a field cannot: one of several."""
    found = []
    for file, node in nodes(Path(__file__).parent):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.raises":
            told = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if ast.unparse(node.args[0]) == "WhenceError" and "|" not in told.get("match", "|"):
                found.append(f"{file}:{node.lineno}")
    assert not found, f"sentences of errors at {', '.join(found)}; use errors.refuses"


def refuse(what: str, where: str = "", accepted: str = "") -> None:
    raise WhenceError(what, where, accepted)


def test_refuses_looks_at_each_field():
    with refuses("3 ... of 4", "file.toml", "1 to 4") as told:
        refuse("3 images of 4", "a/file.toml", "1 to 4, or none")
    assert told.value.where == "a/file.toml"
    with refuses(accepted="1 to 4"):
        refuse("3 images; accepted: 1 to 4")
    for asked in (
        {"what": "file"},
        {"where": "3"},
        {"accepted": "1.4"},
        {"what": "4 ... 3"},
        {"what": "3", "where": "4"},
    ):
        with pytest.raises(AssertionError), refuses(**asked):
            refuse("3 images of 4", "a/file.toml", "1 to 4")
    with pytest.raises(BaseException, match="DID NOT RAISE"), refuses("3"):
        pass
    with pytest.raises(TypeError), refuses():
        refuse("3")


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
