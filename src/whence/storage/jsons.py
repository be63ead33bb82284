"""What is read from JSON: bounded in size and depth, of the types that are expected, and as it was written.

    {                                       a file that we write ends with the digest of all that stands before it:
     "field": ...,                          checksum = sha256 of its own name and of the same text without that line
     "checksum": "9f86d081884c7d65..."      (so that whole files that were mixed up are told, too)
    }

Files of earlier versions have no checksum, or that of the text alone, and those of others have none. Which types those
are is said by a hint as annotations have them: a TypedDict for an object with known fields, `dict[str, int]`, `list[str]`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, TypeGuard, Union, get_args, get_origin, get_type_hints, is_typeddict

from whence.plain import WhenceError

CHECKSUM = "checksum"
LARGEST, LARGEST_OF_OTHERS = 2**31, 2**26  # bytes
DEEPEST = 100  # lists and objects in each other
_SEAL = re.compile(rb',\s+"checksum": "([0-9a-f]{64})"(\n?\})\n\Z')
_END = 200  # bytes that a seal is looked for in


class Malformed(ValueError):
    """What is wrong with a text that should be JSON, in words."""


def parsed(content: bytes, strict: bool = False) -> object:
    """What a JSON text says.

    Args:
        content: UTF-8, also with a byte order mark.
        strict: whether NaN and Infinity, which JSON does not have but Python writes, are refused.

    Raises:
        Malformed: it is no JSON, or nested too deeply to be anybody's.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"), parse_constant=_constant if strict else None)
    except RecursionError:
        raise Malformed(f"nested more than {DEEPEST} deep") from None
    except ValueError as error:  # UnicodeDecodeError, too, and whole numbers of thousands of digits
        raise Malformed(" ".join(str(error).split())) from None
    if content.count(b"[") + content.count(b"{") > DEEPEST and _depth(value) > DEEPEST:
        raise Malformed(f"nested more than {DEEPEST} deep")
    return value


def _constant(name: str) -> float:
    raise Malformed(f"{name} is no number of JSON")


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while level:
        level = [inner for one in level for inner in _inside(one)]
        depth += 1
        if depth > DEEPEST:
            break
    return depth


def _inside(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def sealed(text: bytes, digest: str) -> bytes:
    """The text of a file; that of an object has its checksum at the end.

    Args:
        text: what `plain_text` made.
        digest: of it, hex.
    """
    if not text.endswith(b"}") or text == b"{}":
        return text + b"\n"
    end = b"\n}" if text.endswith(b"\n}") else b"}"
    space = b"\n " if end == b"\n}" else b" "
    return text[: -len(end)] + b"," + space + f'"{CHECKSUM}": "{digest}"'.encode() + end + b"\n"


def plain_text(value: object, ordered: bool = False) -> bytes:
    """A value as text, without a checksum.

    Args:
        value: as JSON has it.
        ordered: whether the order of its fields means something: they stay as they are, and on one line.
    """
    how: dict[str, Any] = {} if ordered else {"indent": 1, "sort_keys": True}
    return json.dumps(value, allow_nan=False, **how).encode()


def seal_of(content: bytes) -> tuple[bytes, str] | None:
    """(the text that was digested, its digest) of a sealed file, None of another."""
    found = _SEAL.search(content[-_END:])
    if found is None:
        return None
    return content[: len(content) - len(content[-_END:]) + found.start()] + found[2], found[1].decode()


# ----------------------------------------------------------------------------------------------------------------- types


def unexpected(value: object, hint: Any, at: str = "") -> str:
    """Where a JSON value is not of a type: "`field` is 3; accepted: a text"; "" where it is.

    Args:
        value: as JSON has it.
        hint: the type, as annotations say it.
        at: its place in the file: "rows.3.name".
    """
    if is_typeddict(hint):
        return _unexpected_object(value, hint, at)
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        problems = [unexpected(value, one, at) for one in inner if one is not NoneType or value is None]
        if not all(problems) or (value is None and NoneType in inner):
            return ""
        return problems[0] if len(problems) == 1 and is_typeddict(inner[0]) else _told(value, hint, at)
    if origin is Literal:
        return "" if value in inner else _told(value, hint, at)
    if origin is tuple and inner[-1] is not Ellipsis:
        if not isinstance(value, list) or len(value) != len(inner):
            return _told(value, hint, at)
        return _first(
            unexpected(one, kind, f"{at}.{i}") for i, (one, kind) in enumerate(zip(value, inner, strict=True))
        )
    if origin in (list, tuple):
        if not isinstance(value, list):
            return _told(value, hint, at)
        if inner[0] is Any:
            return ""
        if inner[0] in _LEAVES:  # in one go: there may be a million
            return "" if all(_LEAVES[inner[0]](one) for one in value) else _told_first(value, inner[0], at)
        return _first(unexpected(one, inner[0], f"{at}.{i}") for i, one in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            return _told(value, hint, at)
        if not inner or _all_rows(value, inner[1]):
            return ""
        return _first(unexpected(one, inner[1], f"{at}.{name}") for name, one in value.items())
    return "" if _LEAVES.get(hint, _anything)(value) else _told(value, hint, at)


def _all_rows(value: dict[str, Any], hint: Any) -> bool:
    """Whether all values are lists of as many single values as a tuple names; in one go, as above."""
    checks = [_LEAVES.get(kind) for kind in get_args(hint)] if get_origin(hint) is tuple else [None]
    if None in checks:
        return False
    return all(
        type(one) is list and len(one) == len(checks) and all(map(_holds, checks, one)) for one in value.values()
    )


def _holds(check: Any, value: object) -> bool:
    return bool(check(value))


def _unexpected_object(value: object, hint: Any, at: str) -> str:
    if not isinstance(value, dict):
        return _told(value, dict, at)
    hints, required = _fields(hint)
    missing = sorted(required - value.keys())
    if missing:
        return f"`{f'{at}.{missing[0]}'.lstrip('.')}` is missing"
    return _first(unexpected(value[name], hints[name], f"{at}.{name}") for name in hints if name in value)


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The types of the fields of a TypedDict, and those that must be there: its own list does not know of annotations that
    are texts, as all of ours are."""
    told = get_type_hints(kind, include_extras=True)
    required = frozenset(name for name, one in told.items() if get_origin(one) is not NotRequired)
    return get_type_hints(kind), required


def _first(problems: Iterator[str]) -> str:
    return next((problem for problem in problems if problem), "")


def _told_first(values: list[object], hint: Any, at: str) -> str:
    place = next(i for i, one in enumerate(values) if not _LEAVES[hint](one))
    return _told(values[place], hint, f"{at}.{place}")


def _told(value: object, hint: Any, at: str) -> str:
    what = f"`{at.lstrip('.')}` is" if at.lstrip(".") else "it holds"
    return f"{what} {shortly(value)}; accepted: {_words(hint)}"


def shortly(value: object) -> str:
    """A value of JSON in a few words."""
    text = json.dumps(value, ensure_ascii=True) if not isinstance(value, dict | list) or not value else ""
    if text and len(text) <= 40:
        return text
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text"}
    kind = kinds.get(type(value), "a number")
    size = len(value) if isinstance(value, dict | list | str) else len(text)
    return f"{kind} of {size:,} {'characters' if isinstance(value, str) else 'digits' if text else 'entries'}"


def _anything(value: object) -> bool:
    return True


def whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number that 64 bits hold, and no truth value."""
    return type(value) is int and -(2**63) <= value < 2**63


def number(value: object) -> bool:
    """Whether it is a finite number, and no truth value."""
    return whole(value) or (type(value) is float and math.isfinite(value))


_LEAVES: dict[Any, Any] = {
    str: lambda value: isinstance(value, str),
    int: whole,
    float: number,
    bool: lambda value: isinstance(value, bool),
    None: lambda value: value is None,
    NoneType: lambda value: value is None,
}
_NAMES = {str: "text", int: "whole number", float: "number", bool: "truth value", dict: "object"}


def _words(hint: Any, many: bool = False) -> str:
    """A type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_words(one, many) for one in inner)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if hint in (None, NoneType):
        return "null"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"{'lists' if many else 'a list'} of {len(inner)}"
    if origin in (list, tuple):
        return f"{'lists' if many else 'a list'} of {_words(inner[0], True)}"
    if origin is dict and len(inner) == 2:
        return f"{'objects' if many else 'an object'} of {_words(inner[1], True)}"
    name = _NAMES.get(dict if is_typeddict(hint) else hint, "value")
    return f"{name}s" if many else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def refuse_unexpected(value: object, hint: Any, where: str, otherwise: str) -> None:
    """Refuse a value that is not of a type, in a line that says where it is and what would be accepted.

    Args:
        value: as JSON has it.
        hint: the type.
        where: the file.
        otherwise: what to do with it.
    """
    problem = unexpected(value, hint)
    if problem:
        what, _, accepted = problem.partition("; accepted: ")
        raise WhenceError(what, where, f"{accepted}; {otherwise}" if accepted else otherwise)
