"""Pictures in tables: Parquet and Arrow files as Hugging Face `datasets` writes them, and its `Dataset` objects.

The pictures are one column of encoded bytes (binary, or struct{bytes, path} as the Image feature keeps it): the one called
`image`, or the only one. Columns of numbers, booleans and texts become metadata; a ClassLabel becomes the names of its
classes, in their order. Names are file/row.

Opening reads the other columns and no picture. A Parquet file is decoded forward, a few rows at a time: reading in order
costs each row once, going back starts at the row group's first row. Arrow files are mapped, not read.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq

from whence.data.folder import fill
from whence.data.layout import Finding, Layout, Row, some
from whence.plain import WhenceError
from whence.storage.opening import regular

PARQUET = ".parquet"
ROWS_AT_ONCE, OPEN_AT_ONCE = 16, 8
BOMB = 100  # times its size on disk that a file of pictures never becomes
LARGE = 2**30  # bytes of a row group from which on going back in it is slow
Cell = Callable[[int], object]  # row -> what the column of pictures holds there


class Features(Protocol):
    """What a `datasets.Dataset` says of its columns."""

    @property
    def arrow_schema(self) -> pa.Schema: ...


@runtime_checkable
class Dataset(Protocol):
    """As much of `datasets.Dataset` as is asked of it."""

    @property
    def features(self) -> Features: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: int | slice) -> pa.Table: ...

    def select_columns(self, names: list[str]) -> Dataset: ...

    def with_format(self, kind: str) -> Dataset: ...


@dataclass(frozen=True)
class Tables:
    """Pictures in tables.

    Args:
        base: the folder that names are relative to; None for a Dataset in Python.
        open: name of a table -> (row -> what the column of pictures holds there).
        opened: the tables that are open, at most OPEN_AT_ONCE.
    """

    base: Path | None
    open: Callable[[str], Cell]
    opened: dict[str, Cell] = field(default_factory=dict)

    def file(self, name: str) -> Path | io.BytesIO:
        shard, _, row = name.rpartition("/")
        try:
            if shard not in self.opened:
                if len(self.opened) >= OPEN_AT_ONCE:
                    self.opened.pop(next(iter(self.opened)))
                self.opened[shard] = self.open(shard)
            cell = self.opened[shard](int(row))
        except (pa.ArrowException, OSError) as error:
            raise WhenceError(
                f"{self.where(name)}: cannot be decoded ({_short(error)}); copy the file again"
            ) from error
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        if isinstance(content, bytes):
            return io.BytesIO(content)
        if path is not None and self.base is None:
            return Path(path)
        # A table may come from anywhere; it must not make us read files elsewhere.
        holds = f"only the path {path!r}" if path is not None else "nothing"
        raise WhenceError(
            f"{self.where(name)}: the column of pictures holds {holds}; accepted: the bytes of a picture file"
        )

    def where(self, name: str) -> str:
        shard, _, row = name.rpartition("/")
        return f"{'data set' if self.base is None else self.base / shard}, row {row}"

    def holder(self, name: str) -> Path | None:
        return None if self.base is None else self.base / name.rpartition("/")[0]


# --------------------------------------------------------------------------------------------------------------- files


def table_layout(base: Path, shards: Sequence[str]) -> Layout:
    """The rows of some files (relative to base), in their order."""
    columns: dict[str, str] = {}
    names: list[str] = []
    found = Layout(Tables(base, lambda shard: _cells(base / shard, columns[shard])))
    rows: list[Row] = []
    for shard in shards:
        path = base / shard
        try:
            table = pq.ParquetFile(regular(path)) if path.suffix.lower() == PARQUET else _arrow(path)
            schema = table.schema_arrow if isinstance(table, pq.ParquetFile) else table.schema
            if len({*schema.names}) == len(schema.names) and not _holding(schema):
                found.empty.append(shard)
            columns[shard] = picture_column(schema)
            if isinstance(table, pq.ParquetFile):
                found.findings += _heavy(table.metadata, columns[shard], path)
            count = table.metadata.num_rows if isinstance(table, pq.ParquetFile) else len(table)
            read = table.read if isinstance(table, pq.ParquetFile) else table.select
            rows += _rows(schema, read(_plain(schema)), count, found)
            names += [f"{shard}/{row}" for row in range(count)]
            found.findings += _skipped(schema, columns[shard], path)
        except WhenceError as error:
            what, _, fix = str(error).partition("; ")
            found.findings.append(Finding("error", what, str(path), fix))
        except (pa.ArrowException, OSError, ValueError) as error:  # texts that are not UTF-8 are ValueErrors
            kind = "Parquet" if path.suffix.lower() == PARQUET else "Arrow"
            what = f"cannot be read as {kind} ({_short(error)})"
            found.findings.append(Finding("error", what, str(path), "copy or download the file again"))
    return _filled(found, names, rows, base / shards[0])


def dataset_layout(given: Dataset, column: str | None = None) -> Layout:
    """A `datasets.Dataset`; column: of the pictures, where several hold some."""
    schema = given.features.arrow_schema
    column = picture_column(schema, column)
    cells, plain = given.select_columns([column]).with_format("arrow"), _plain(schema)
    found = Layout(Tables(None, lambda shard: lambda row: cells[row].column(column)[0].as_py()))
    table = given.select_columns(plain).with_format("arrow")[:] if plain else pa.table({})
    rows = _rows(schema, table, len(given), found)
    return _filled(found, [str(row) for row in range(len(given))], rows, Path("data set"))


def _filled(found: Layout, names: list[str], rows: Sequence[Row], where: Path) -> Layout:
    found.names = found.pictures = names
    fill(found, rows, where)
    if not names and not any(finding.level == "error" for finding in found.findings):
        found.findings.append(Finding("error", "holds no row", str(where), "give a table with a row per picture"))
    return found


def _rows(schema: pa.Schema, table: pa.Table, count: int, found: Layout) -> list[Row]:
    """The columns that are metadata, row by row."""
    columns = {name: table.column(name).to_pylist() for name in table.column_names}
    for name, feature in features(schema).items():
        if name in columns and feature.get("names"):
            classes = tuple(feature["names"])
            beyond = next((v for v in columns[name] if type(v) is int and v >= len(classes)), None)
            if beyond is not None:
                told = f"`{name}` is {beyond}, but {len(classes)} names are noted (ClassLabel)"
                raise WhenceError(f"{told}; write the table again")
            # -1 is how `datasets` writes a label that is not known.
            columns[name] = [classes[v] if type(v) is int and v >= 0 else None for v in columns[name]]
            found.classes = classes if name == "label" else found.classes
    return [{name: values[row] for name, values in columns.items()} for row in range(count)]


# -------------------------------------------------------------------------------------------------------------- schema


def features(schema: pa.Schema) -> dict[str, Mapping[str, Sequence[str]]]:
    """What `datasets` says of the columns, {} for a table that is not of its making."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        described = {name: noted["info"]["features"][name] for name in schema.names}
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: feature if isinstance(feature, dict) else {} for name, feature in described.items()}


def picture_column(schema: pa.Schema, wanted: str | None = None) -> str:
    """The column that holds the pictures."""
    twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if twice is not None:
        raise WhenceError(f"column {twice!r} is there twice; write the table again with one of them")
    holding = _holding(schema)
    accepted = "accepted: a column `image` of bytes, or of struct{bytes, path} as `datasets` writes it"
    if wanted is not None and wanted not in holding:
        raise WhenceError(f"column {wanted!r} holds no pictures (columns: {some(schema.names, 9)}); {accepted}")
    chosen = [name for name in holding if name == (wanted or "image")] or holding
    if not chosen:
        raise WhenceError(f"no column of pictures (columns: {some(schema.names, 9)}); {accepted}")
    if len(chosen) > 1:
        fix = "call the one that was trained on `image`"
        raise WhenceError(f"{len(chosen)} columns hold bytes ({some(chosen, 9)}); {fix}")
    if not _encoded(schema.field(chosen[0]).type):
        raise WhenceError(f"column {chosen[0]!r} is {schema.field(chosen[0]).type}; {accepted}")
    return chosen[0]


def _holding(schema: pa.Schema) -> list[str]:
    """The columns that may hold pictures."""
    described = features(schema)
    noted = [name for name in schema.names if described.get(name, {}).get("_type") == "Image"]
    return noted or [name for name in schema.names if _encoded(schema.field(name).type)]


def _encoded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _encoded(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _plain(schema: pa.Schema) -> list[str]:
    """The columns of texts, numbers and truth values."""
    is_ = pa.types
    texts, numbers = (is_.is_string, is_.is_large_string, is_.is_string_view), (is_.is_integer, is_.is_floating)

    def plain(kind: pa.DataType) -> bool:
        kind = kind.value_type if is_.is_dictionary(kind) else kind
        return any(test(kind) for test in (*texts, *numbers, is_.is_boolean))

    return [name for name in schema.names if plain(schema.field(name).type)]


def _skipped(schema: pa.Schema, column: str, path: Path) -> list[Finding]:
    others = [name for name in schema.names if name != column and name not in _plain(schema)]
    if not others:
        return []
    what = f"columns of lists, structs, bytes or times are not read: {some(others)}"
    return [Finding("warning", what, str(path), "write them as texts or numbers if they are groups or captions")]


def _heavy(metadata: pq.FileMetaData, column: str, path: Path) -> list[Finding]:
    largest = max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)
    size = path.stat().st_size
    if largest > max(LARGE, BOMB * size):
        what = f"{size:,} bytes that become {largest / 1e9:.1f} GB when they are read"
        return [Finding("error", what, str(path), "pictures as they are stored, which cannot be made so much smaller")]
    if largest < LARGE:
        return []
    what = f"row groups of {largest / 1e9:.1f} GB: a picture in the middle of one is slow to read"
    fix = "write the file again with row groups of some 100 rows if the images are read out of order"
    return [Finding("warning", what, str(path), fix)]


# ------------------------------------------------------------------------------------------------------------- reading


def _cells(path: Path, column: str) -> Cell:
    if path.suffix.lower() == PARQUET:
        return Forward(path, column)
    cells = _arrow(path).column(column)
    return lambda row: cells[row].as_py()


def _arrow(path: Path) -> pa.Table:
    """An Arrow file, mapped: a stream, as `save_to_disk` and the cache of `datasets` have it, or a file."""
    with pa.memory_map(str(regular(path))) as content:
        try:
            return pa.ipc.open_stream(content).read_all()
        except pa.ArrowInvalid:
            content.seek(0)
            return pa.ipc.open_file(content).read_all()


class Forward:
    """The pictures of one Parquet file, of which it holds ROWS_AT_ONCE and the page they are on (how many rows that has is
    up to who wrote the file; 1,024 at most by default)."""

    def __init__(self, path: Path, column: str):
        # Without these two, pyarrow would hold whole row groups.
        self.file, self.column = pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20), column
        sizes = [self.file.metadata.row_group(i).num_rows for i in range(self.file.metadata.num_row_groups)]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.batches: Iterator[pa.RecordBatch] = iter(())
        self.held: pa.Array = pa.array([])
        self.first = -1  # row of the first that is held

    def __call__(self, row: int) -> object:
        group = bisect_right(self.starts, row) - 1
        stop = self.first + len(self.held)
        if self.first < 0 or row < self.first or self.starts[group] > stop:
            groups = range(group, len(self.starts))
            self.batches = self.file.iter_batches(ROWS_AT_ONCE, groups, [self.column])
            self.held, self.first = pa.array([]), self.starts[group]
        while row >= self.first + len(self.held):
            self.first += len(self.held)
            batch = next(self.batches, None)
            if batch is None:
                raise pa.ArrowInvalid("it holds fewer rows than it says")
            self.held = batch.column(0)
        return self.held[row - self.first].as_py()


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
