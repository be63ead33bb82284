"""Columns of metadata as JSON, Arrow and CSV all hold them: what people write beside their images is anything."""

from __future__ import annotations

import csv
import io
import json
import math
import unicodedata
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
    if _one_kind(found):
        return Column(found)
    kinds = {type(value) for value in found}
    told = " and ".join(word for kind, word in WORDS.items() if kind in kinds)
    if kinds <= {int, float, type(None)}:
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


def _one_kind(values: Values) -> bool:
    """Whether Arrow has a type for these values, and for any of them in any order: it takes that of the first for all."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {list}:
        return _one_kind([inner for value in values if isinstance(value, list) for inner in value])
    if kinds and kinds <= {int, float}:
        bits = 63 if kinds == {int} else 53  # whole numbers that a float64 tells apart
        return all(-(2**bits) <= value < 2**bits for value in values if isinstance(value, int))
    return kinds in (set(), {str}, {bool})


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def as_csv(table: Mapping[str, Sequence[object]]) -> bytes:
    """A table as CSV with a header, for people and their spreadsheets; Parquet keeps texts to the letter.

    What is written is what is shown: letters that move a cursor or turn the direction, and half letters, are spelt out; and
    a text that a spreadsheet would take for a formula begins with an apostrophe, as one writes it there.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow([_cell(name) for name in table])
    writer.writerows([_cell(value) for value in row] for row in zip(*table.values(), strict=True))
    return text.getvalue().encode("utf-8", "backslashreplace")


FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a formula begins with; the last four are the same in full width."""
TURNING = {*map(chr, (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))}
"""Letters that are not seen and turn the direction of those that are."""


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    told = "".join(_seen(letter) for letter in value) if not value.isprintable() else value
    return f"'{told}" if told.startswith(FORMULA) and not _is_number(told) else told


def _seen(letter: str) -> str:
    hidden = letter in TURNING or (unicodedata.category(letter) == "Cc" and letter not in "\n\t")
    return letter.encode("unicode_escape").decode() if hidden else letter


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def as_parquet(table: Mapping[str, object]) -> bytes:
    """A table as Parquet; columns are what Arrow takes, and names of files that are no valid Unicode are spelt out."""
    valid = {name: [*map(_spelt, column)] if isinstance(column, list) else column for name, column in table.items()}
    content = pa.BufferOutputStream()
    pq.write_table(pa.table(valid), content)
    return bytes(content.getvalue().to_pybytes())


def _spelt(value: object) -> object:
    return valid_text(value) if isinstance(value, str) else value
