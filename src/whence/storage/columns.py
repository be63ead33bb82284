"""Columns of metadata as JSON, Arrow and CSV all hold them: what people write beside their images is anything."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Values = list[object]
DEEPEST = 32  # lists in lists: Arrow and JSON recurse
WORDS = {bool: "truth values", int: "whole numbers", float: "numbers", str: "texts", list: "lists", dict: "objects"}


@dataclass(frozen=True)
class Column:
    """values: None where there is none; changed: what was found, where it had to be written as texts, else ""."""

    values: Values
    changed: str = ""


def plain_columns(columns: Mapping[str, Sequence[object]]) -> dict[str, Values]:
    """Columns that can be saved, whatever they held."""
    return {valid_text(str(name)): plain_column(values).values for name, values in columns.items()}


def plain_column(values: Sequence[object]) -> Column:
    """One type per column, or texts.

    NaN is what tables write for a value that is missing, and becomes None. A column of one kind that Arrow and JSON hold
    stays as it is; any other (numbers beside texts, integers beyond 64 bits, objects ...) becomes texts: texts as they are,
    the rest as JSON.
    """
    found = [plain_value(value) for value in values]
    kinds = {type(value) for value in found} - {type(None)}
    if kinds in ({str}, {bool}, {float}, set()) or (kinds == {int} and all(_in_64_bits(value) for value in found)):
        return Column(found)
    if _held(found):
        return Column(found)
    told = " and ".join(word for kind, word in WORDS.items() if kind in kinds)
    if kinds <= {int, float}:
        told = "numbers beyond 64 bits"
    return Column([None if value is None else _text(value) for value in found], told)


def plain_value(value: object, depth: int = 0) -> object:
    """A value as JSON has it; what JSON does not know, dates and bytes and infinity, as text."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value).decode("utf-8", "backslashreplace")
    if depth >= DEEPEST:
        return valid_text(str(value))
    if isinstance(value, Mapping):
        return {valid_text(str(key)): plain_value(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(inner, depth + 1) for inner in value]
    return valid_text(str(value))


def valid_text(text: str) -> str:
    """Text that can be written as UTF-8: JSON can spell half a character."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _in_64_bits(value: object) -> bool:
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _held(values: Values) -> bool:
    """Whether Arrow has a type for them, and for any of them, that Parquet can write."""
    if any(_has_object(value) for value in values):
        return False  # {} alone is a type without fields, which Parquet refuses
    try:
        pq.write_table(pa.table({"column": values}), io.BytesIO())
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True


def _has_object(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(_has_object(inner) for inner in value))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
