"""A score matrix on disk [m, n], of which single rows and columns are read: a million scores and more stay in their file.

    score[j, i] stands at   start + size (j n + i)   in scores.safetensors

The file is compared with its digest when it is opened, and stays open: what is read later is what was compared.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from whence.plain import WhenceError
from whence.storage.files import file_digest, pieces_digest
from whence.storage.jsons import Malformed, parsed, unexpected
from whence.storage.notes import AGAIN

Array = NDArray[np.float64]
KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
TYPES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
LARGEST = 2**24  # bytes of a header
PIECE = 2**22  # bytes read at once


class Placed(TypedDict):
    """Where a tensor stands behind the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Matrix:
    """Numbers in a file.

    Args:
        file: its descriptor.
        where: its name in errors.
        kind: of the numbers, as safetensors names it.
        start: where the first one stands.
        shape: (m, n).
    """

    file: int
    where: str
    kind: str
    start: int
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return np.dtype(KINDS[self.kind]).itemsize

    def row(self, query: int) -> Array:
        """The scores of a query [n]."""
        return self.stored(query).astype(np.float64)

    def stored(self, query: int) -> NDArray[np.floating]:
        """The same in the type that they are stored in, for what goes through all of them."""
        width = self.shape[1] * self.size
        return self._numbers(os.pread(self.file, width, self.start + query * width))

    def column(self, image: int) -> Array:
        """The scores of a training image [m]."""
        width = self.shape[1] * self.size
        places = range(self.start + image * self.size, self.start + self.shape[0] * width, width)
        return self._numbers(b"".join(os.pread(self.file, self.size, place) for place in places)).astype(np.float64)

    def rows(self) -> Iterator[NDArray[np.floating]]:
        """All rows as they are stored, one after the other."""
        return (self.stored(query) for query in range(self.shape[0]))

    def _numbers(self, content: bytes) -> NDArray[np.floating]:
        found = np.frombuffer(content, KINDS[self.kind])
        return (found.astype(np.uint32) << 16).view(np.float32) if self.kind == "BF16" else found


@dataclass(frozen=True, eq=False)
class Opened:
    """The file of a method's scores.

    Args:
        values: its scores.
        stderr: their standard errors, None where none were measured.
        compared: whether there was a digest to compare the file with: earlier versions noted none.
    """

    values: Matrix
    stderr: Matrix | None
    compared: bool


def open_scores(path: Path, noted: str | None, shape: tuple[int, int]) -> Opened:
    """Open the scores of a method, after comparing the file with its digest.

    Args:
        path: of scores.safetensors.
        noted: the digest in scores.json, None where there is none.
        shape: queries and training images of scores.json.
    """
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise WhenceError(f"cannot be read ({error.strerror})", str(path), AGAIN) from None
    try:
        own, places, start = _header(file, path)
        tensors: dict[str, Matrix] = {
            name: _placed(file, path, places[name], start, shape) for name in ("values", "stderr") if name in places
        }
        if "values" not in tensors:
            raise WhenceError("holds no scores", str(path), AGAIN)
        if noted is not None and file_digest(path) != noted:
            raise WhenceError("is not the file that was written with its scores.json", str(path), AGAIN)
        # The names in their order: stderr before values.
        if noted is None and own is not None and own not in (_seal(places, tensors, own), _values_digest(tensors)):
            raise WhenceError("its numbers do not match their digest: it was changed or damaged", str(path), AGAIN)
    except BaseException:
        os.close(file)
        raise
    opened = Opened(tensors["values"], tensors.get("stderr"), (noted or own) is not None)
    weakref.finalize(opened, os.close, file)
    return opened


def _header(file: int, path: Path) -> tuple[str | None, dict[str, Placed], int]:
    """The digest of the numbers that the header holds, where each tensor stands, and where the first begins."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 2 <= length <= min(LARGEST, os.fstat(file).st_size - 8):
        raise WhenceError("is no safetensors file", str(path), AGAIN)
    try:
        found = parsed(os.pread(file, length, 8))
    except Malformed as error:
        raise WhenceError(f"its header cannot be read ({error})", str(path), AGAIN) from None
    about = found.pop("__metadata__", {}) if isinstance(found, dict) else {}
    problem = unexpected(found, dict[str, Placed])
    if problem or not isinstance(found, dict):
        raise WhenceError(f"its header is of something else ({problem})", str(path), AGAIN)
    own = about.get("sha256") if isinstance(about, dict) else None
    return own if isinstance(own, str) else None, found, 8 + length


def _placed(file: int, path: Path, place: Placed, start: int, shape: Sequence[int]) -> Matrix:
    """A tensor where its header says it is, if it can be there."""
    begin, end = place["data_offsets"]
    if place["dtype"] not in KINDS or place["shape"] != list(shape):
        told = f"holds {place['dtype']} of shape {place['shape']}, and its scores.json is of {list(shape)}"
        raise WhenceError(told, str(path), AGAIN)
    found = Matrix(file, str(path), place["dtype"], start + begin, (shape[0], shape[1]))
    if begin < 0 or end - begin != shape[0] * shape[1] * found.size or start + end > os.fstat(file).st_size:
        raise WhenceError("is cut off, or damaged", str(path), AGAIN)
    return found


def _seal(places: dict[str, Placed], tensors: dict[str, Matrix], own: str) -> str:
    """What `storage.arrays.seal_of_tensors` says of the same tensors; "" where the file holds others besides."""
    if places.keys() != tensors.keys():
        return ""
    of = own.partition(" ")[2]
    told = [f"{name} {list(one.shape)} {TYPES[one.kind]}" for name, one in sorted(tensors.items())]
    pieces = (piece for name in sorted(tensors) for piece in _pieces(tensors[name]))
    return f"{pieces_digest([json.dumps([of, *told]).encode(), *pieces])} {of}".rstrip()


def _values_digest(tensors: dict[str, Matrix]) -> str:
    """What `storage.arrays.values_digest` says of the same tensors."""
    return pieces_digest(piece for name in sorted(tensors) for piece in _pieces(tensors[name]))


def _pieces(matrix: Matrix) -> Iterator[bytes]:
    end = matrix.start + matrix.shape[0] * matrix.shape[1] * matrix.size
    for place in range(matrix.start, end, PIECE):
        yield os.pread(matrix.file, min(PIECE, end - place), place)
