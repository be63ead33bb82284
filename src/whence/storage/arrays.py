"""Arrays on disk that grow shard by shard and survive anything.

An array lives in a folder named after the fingerprint of its description (recipe part, checkpoint digest, image
digests). Its shards appear whole, by one rename; a run that was killed goes on at the first missing shard and ends with
the same bytes. safetensors and JSON only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from whence.plain import tensor_bytes
from whence.storage.files import FORMAT_VERSION, differences, note_once, pieces_digest, readable, write_bytes
from whence.storage.opening import tensors_in
from whence.types import WhenceError, describe, digest


@dataclass(frozen=True)
class Rows:
    """An [n, k] array in shards.

    Args:
        folder: of the shards.
        shape: (n, k).
        dtype: of the numbers.
        per_shard: rows of a shard.
        columns: those that are read; None for all.
        mixed: (a, other, b) where what is read is a times these rows plus b times those of another array, in float64.
        factors: of the columns that are read [width], in float64; None for 1.
    """

    folder: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    per_shard: int
    columns: slice | None = None
    mixed: tuple[float, Rows, float] | None = None
    factors: Tensor | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def width(self) -> int:
        return self.shape[1] if self.columns is None else self.columns.stop - self.columns.start

    def only(self, columns: slice) -> Rows:
        """Some of the columns that are read, to be read as an array of their own."""
        mixed = self.mixed and (self.mixed[0], self.mixed[1].only(columns), self.mixed[2])
        factors = None if self.factors is None else self.factors[columns]
        before = 0 if self.columns is None else self.columns.start
        own = slice(before + columns.start, before + columns.stop)
        return replace(self, columns=own, mixed=mixed, factors=factors)

    def plus(self, share: float, other: Rows, others: float) -> Rows:
        """share * these rows + others * those of another array of as many, read as one array.

        Args:
            share: of these.
            other: the other array.
            others: share of its rows.
        """
        return replace(self, mixed=(share, other, others))

    def times(self, factors: Tensor) -> Rows:
        """Each column times its factor [width], read as one array."""
        return replace(self, factors=factors.double())

    @property
    def shards(self) -> list[slice]:
        return [slice(s, min(s + self.per_shard, len(self))) for s in range(0, len(self), self.per_shard)]

    def path(self, rows: slice) -> Path:
        """Where a shard lies."""
        return self.folder / f"part-{rows.start // self.per_shard:05d}.safetensors"

    def has(self, rows: slice) -> bool:
        """Whether a shard is there."""
        return self.path(rows).exists()

    def missing(self) -> list[slice]:
        """The shards still to be computed."""
        return [rows for rows in self.shards if not self.has(rows)]

    def write(self, rows: slice, values: Tensor) -> None:
        """Store a shard; it appears whole, with the digest of its values inside."""
        values = values.detach().to("cpu", self.dtype).contiguous()
        if tuple(values.shape) != (rows.stop - rows.start, self.width):
            raise WhenceError(f"shard of shape {tuple(values.shape)} for rows {rows} of an array {self.shape}")
        write_checked(self.path(rows), {"rows": values}, self._of(rows))

    def _of(self, rows: slice) -> str:
        """What a shard is of: its folder is named after the digest of all that the array depends on."""
        return f"{self.folder.name}/{rows.start}"

    def read(self, rows: slice) -> Tensor:
        """One shard."""
        values = self._file(rows)
        if self.mixed is not None:
            share, other, others = self.mixed
            # One begun earlier may have shards of another size.
            beside = other.read(rows) if rows in other.shards else other.take(range(rows.start, rows.stop))
            values = share * values.double() + others * beside.double()
        return values if self.factors is None else values * self.factors

    def _file(self, rows: slice) -> Tensor:
        """What the file of a shard holds, of which some columns are read alone once it is known to be whole."""
        path = self.path(rows)
        if self.columns is not None and path.is_file() and _state(path) in _VERIFIED:
            with _opened(path) as file:
                values: Tensor = file.get_slice("rows")[:, self.columns]
                return values
        values = self._whole(path, rows)
        return values if self.columns is None else values[:, self.columns]

    def _whole(self, path: Path, rows: slice) -> Tensor:
        """All columns of a shard, compared with their digest."""
        with _opened(path) as file:
            if "rows" not in file.keys():  # noqa: SIM118
                raise WhenceError(f"{path} is damaged (it holds no rows); delete it and run again")
            values = file.get_tensor("rows")
            noted = (file.metadata() or {}).get("sha256")
        if tuple(values.shape) != (rows.stop - rows.start, self.shape[1]) or values.dtype != self.dtype:
            raise WhenceError(
                f"{path} holds {values.dtype} {list(values.shape)}, not {self.dtype} "
                f"[{rows.stop - rows.start}, {self.shape[1]}]; delete it and run again"
            )
        _verified(path, noted, {"rows": values}, self._of(rows))
        return values

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.shards:
            yield rows, self.read(rows)

    def all(self) -> Tensor:
        """The whole array in memory: for queries and tests."""
        return torch.cat([values for _, values in self])

    def block(self, rows: slice) -> Held:
        """Rows that follow each other, in memory."""
        found = [
            self.read(shard)[max(rows.start - shard.start, 0) : rows.stop - shard.start]
            for shard in self.shards
            if shard.start < rows.stop and rows.start < shard.stop
        ]
        return Held.of(found[0] if len(found) == 1 else torch.cat(found))

    def take(self, numbers: Sequence[int]) -> Tensor:
        """Some rows, in this order, without reading the shards they are in as a whole."""
        values = torch.empty(len(numbers), self.width, dtype=self.dtype)
        slots: dict[int, list[int]] = {}
        for slot, number in enumerate(numbers):
            slots.setdefault(number // self.per_shard * self.per_shard, []).append(slot)
        for start in sorted(slots):
            rows = slice(start, min(start + self.per_shard, len(self)))
            path = self.path(rows)
            if path.is_file() and _state(path) not in _VERIFIED:
                self.read(rows)  # as a whole, once
            with _opened(path) as file:
                shard, columns = file.get_slice("rows"), self.columns or slice(0, self.shape[1])
                for slot in slots[start]:
                    values[slot] = shard[numbers[slot] - start : numbers[slot] - start + 1, columns][0]
        if self.mixed is not None:
            share, other, others = self.mixed
            values = share * values.double() + others * other.take(numbers).double()
        return values if self.factors is None else values * self.factors

    def verify(self, finished: bool = True) -> None:
        """Re-hash every shard. finished: whether all are to be there."""
        for rows in self.shards:
            path = self.path(rows)
            if path.is_file():
                _VERIFIED.discard(_state(path))
            if finished or path.exists():
                self.read(rows)


NOWHERE = Path()


@dataclass(frozen=True, eq=False)
class Held(Rows):
    """An [n, k] array in memory, in one shard.

    Args:
        values: its numbers.
    """

    values: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @classmethod
    def of(cls, values: Tensor) -> Held:
        """These numbers [n, k]."""
        n, k = values.shape
        return cls(NOWHERE, (n, k), values.dtype, max(1, n), values=values)

    def has(self, rows: slice) -> bool:
        return True

    def write(self, rows: slice, values: Tensor) -> None:
        raise NotImplementedError("rows in memory are not written")

    def take(self, numbers: Sequence[int]) -> Tensor:
        return self.read(slice(0, len(self)))[list(numbers)]

    def _file(self, rows: slice) -> Tensor:
        return self.values[rows] if self.columns is None else self.values[rows, self.columns]


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A shard to be read; one that is missing or damaged is told."""
    if not path.exists():
        raise WhenceError(f"{path} is missing; run the same command again to finish this array")
    with tensors_in(path, "delete it and run again") as file:
        yield file


_VERIFIED: set[tuple[object, ...]] = set()
"""States of the files whose content this process has compared with its digest: once each, while they stay as they are."""


def _state(path: Path) -> tuple[object, ...]:
    stat = path.stat()
    return path.absolute(), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _verified(path: Path, noted: str | None, values: Mapping[str, Tensor], of: str, then: str = "run again") -> None:
    """Refuse a file whose values are not those that were written: disks and copies flip bits, people mix up files."""
    state = _state(path)
    if state in _VERIFIED:
        return
    refuse_changed(path, noted or "", values, of, then)
    _VERIFIED.add(state)


def seal_of_tensors(tensors: Mapping[str, Tensor], of: str) -> str:
    """What a file says of its tensors: the digest of their names, shapes, types and bytes and of what they are, and that.

    Args:
        tensors: by name.
        of: what they are, so that a whole file in the place of another is told; "" where the place says nothing.
    """
    told = [f"{name} {list(one.shape)} {one.dtype}" for name, one in sorted(tensors.items())]
    bytes_of = (tensor_bytes(one) for _, one in sorted(tensors.items()))
    return f"{pieces_digest([json.dumps([of, *told]).encode(), *bytes_of])} {of}".rstrip()


def refuse_changed(path: Path, seal: str, tensors: Mapping[str, Tensor], of: str | None, then: str) -> None:
    """Refuse tensors that are not those that were written, or not those of this place.

    Args:
        path: of their file.
        seal: what it says of them (see `seal_of_tensors`); earlier versions wrote the digest of their bytes alone.
        tensors: by name.
        of: what they should be; None for anything.
        then: what makes the file anew when it is deleted.
    """
    said = seal.partition(" ")[2]
    if seal != seal_of_tensors(tensors, said) and seal != values_digest(*(tensors[name] for name in sorted(tensors))):
        raise WhenceError(f"{path}: its content does not match its digest; delete it and {then}")
    if said and of is not None and said != of:
        raise WhenceError(f"{path}: it belongs elsewhere: whole, but written for another place; delete it and {then}")


def write_checked(path: Path, tensors: Mapping[str, Tensor], of: str = "") -> None:
    """A safetensors file that appears whole, with the digest of its values inside, for `read_checked`.

    Args:
        path: of the file.
        tensors: by name.
        of: what they are (see `seal_of_tensors`).
    """
    write_tensors(path, tensors, {"sha256": seal_of_tensors({name: w.cpu() for name, w in tensors.items()}, of)})


def read_checked(path: Path, then: str = "run again", of: str | None = None) -> dict[str, Tensor]:
    """What `write_checked` wrote, compared with its digest where it has one (files of earlier versions have none).

    Args:
        path: of the file.
        then: what makes the file anew when it is deleted.
        of: what they should be; None for anything.
    """
    with tensors_in(path, f"delete it and {then}" if path.exists() else then) as file:
        found = {name: file.get_tensor(name) for name in sorted(file.keys())}
        noted = (file.metadata() or {}).get("sha256")
    if noted is not None:
        refuse_changed(path, noted, found, of, then)
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file that appears whole.

    Args:
        path: of the file.
        tensors: by name.
        metadata: texts in its header.
    """
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # Not save_file: it reports a full disk as a SafetensorError and hides the file from other users (mode 600).
    # One entry only: the order of several is another one in every process.
    header = (
        {"sha256": values_digest(*(on_cpu[name] for name in sorted(on_cpu)))} if metadata is None else dict(metadata)
    )
    write_bytes(path, save(on_cpu, metadata=header))


def values_digest(*values: Tensor) -> str:
    """sha256 of the bytes of tensors, hex."""
    return pieces_digest(tensor_bytes(one) for one in values)


def tensor_digest(values: Tensor) -> str:
    """sha256 of shape, type and bytes of a tensor, hex: two tensors of the same bytes and other shapes differ."""
    return pieces_digest([f"{list(values.shape)} {values.dtype} ".encode(), tensor_bytes(values)])


DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


class Manifest(TypedDict):
    """What the manifest.json of an array holds."""

    key: dict[str, Any]
    shape: tuple[int, int]
    dtype: str
    per_shard: int


@dataclass(frozen=True)
class Store:
    """The arrays of one run folder."""

    root: Path

    def array(self, key: Mapping[str, object], shape: tuple[int, int], dtype: torch.dtype, per_shard: int) -> Rows:
        """Open or begin an array; one begun earlier keeps its own shard size.

        Args:
            key: describes the array.
            shape: (n, k).
            dtype: of the numbers.
            per_shard: rows of a shard, at least 1.
        """
        folder = self._folder(key, shape[0], dtype)
        manifest = folder / "manifest.json"
        layout = {"shape": list(shape), "dtype": str(dtype), "per_shard": max(1, per_shard)}
        # Once: of two processes with other budgets, both take the shards of the first.
        note_once(manifest, {"format_version": FORMAT_VERSION, "key": describe(key), **layout})
        found = readable(manifest, Manifest)
        expected = {"key": describe(key), "shape": list(shape), "dtype": str(dtype)}
        different = differences(expected, {name: found.get(name) for name in expected})
        if different:
            raise WhenceError(
                f"{manifest} does not describe this array ({different[0]}); delete {folder} and run again"
            )
        if found["per_shard"] < 1:
            raise WhenceError(f"{found['per_shard']} rows a shard", str(manifest), f"{folder} deleted, to run again")
        return Rows(folder, shape, dtype, int(found["per_shard"]))

    def known(self, key: Mapping[str, object], count: int, dtype: torch.dtype) -> Rows | None:
        """An array where it was begun, None where not: how wide it is need not be known.

        Args:
            key: describes the array.
            count: its rows.
            dtype: of the numbers.
        """
        manifest = self._folder(key, count, dtype) / "manifest.json"
        if not manifest.exists():
            return None
        width = int(readable(manifest, Manifest)["shape"][1])
        return self.array(key, (count, width), dtype, 1)

    def _folder(self, key: Mapping[str, object], count: int, dtype: torch.dtype) -> Path:
        return self.root / "features" / digest({**key, "rows": count, "dtype": str(dtype)})

    def arrays(self) -> list[Rows]:
        """Every array of the folder."""
        found = []
        for manifest in sorted(self.root.glob("features/*/manifest.json")):
            layout = readable(manifest, Manifest)
            if layout["dtype"] not in DTYPES or layout["per_shard"] < 1 or min(layout["shape"]) < 0:
                told = f"describes no array ({layout['dtype']} {layout['shape']}, {layout['per_shard']} rows a shard)"
                raise WhenceError(told, str(manifest), "its folder deleted, to compute it again")
            found.append(Rows(manifest.parent, tuple(layout["shape"]), DTYPES[layout["dtype"]], layout["per_shard"]))
        return found
