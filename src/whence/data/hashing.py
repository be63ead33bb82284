"""The files of pictures as bytes: their digests, whether they have changed since, and the sizes that their headers tell."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict, TypeVar

from tqdm import tqdm

from whence.data.decoding import header_size
from whence.data.layout import PictureSource
from whence.plain import WhenceError, digest
from whence.storage.files import bytes_digest, file_digest, read_json, write_json
from whence.storage.opening import regular

DIGESTS = "digests.json"  # of the training images, in a run folder
LONG = 2000  # files; anything longer than this shows a progress bar
Stamp = tuple[int, int]  # bytes and mtime_ns of a file
Hashed = tuple[int, int, str]  # with the digest of the picture
Item = TypeVar("Item")


class Hashes(TypedDict):
    """What a cache of digests holds."""

    folder: str
    files: dict[str, Hashed]


def progress(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar where there are many; a log file gets a line each half minute instead of a flicker."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, unit=" files", disable=len(items) <= LONG, mininterval=pause)


def stamp_of(path: Path | None) -> Stamp:
    """Bytes and mtime_ns of a file, by which a change is noticed; (0, 0) for what lies in memory."""
    if path is None:
        return 0, 0
    try:
        status = path.stat()
    except OSError as error:
        raise WhenceError(f"{path}: cannot be read ({error.strerror}); open the folder again") from error
    return status.st_size, status.st_mtime_ns


def _digest(source: PictureSource, name: str) -> str:
    file = source.file(name)
    if isinstance(file, io.BytesIO) and not file.getbuffer():
        raise WhenceError(f"{source.where(name)}: 0 bytes; replace or remove the picture")
    return file_digest(file)


def hash_files(
    source: PictureSource, names: Sequence[str], known: Mapping[str, Hashed]
) -> tuple[list[str], list[Stamp]]:
    """Digest of each picture and stamp of the file it is in; only pictures that are not known are read.

    Args:
        source: where the pictures lie.
        names: of the pictures.
        known: name -> what was hashed before.
    """
    holders = [source.holder(name) for name in names]
    by_holder = {holder: stamp_of(holder) for holder in dict.fromkeys(holders)}
    for holder, (size, _) in by_holder.items():
        if holder is not None and regular(holder) and size == 0:
            raise WhenceError(f"{holder}: the file is empty (0 bytes); replace or remove it")
    stamps, digests = [by_holder[holder] for holder in holders], []
    for name, stamp in progress(list(zip(names, stamps, strict=True)), "hashing images"):
        entry = known.get(name)
        digests.append(entry[2] if entry and entry[:2] == stamp else _digest(source, name))
    return digests, stamps


@dataclass(frozen=True)
class Cache:
    """What was hashed before. files: by name, in the order of the rows, {} where they were in another folder; digests: in
    the order of the rows, whatever the folder."""

    files: Mapping[str, Hashed] = field(default_factory=dict)
    digests: Sequence[str] = ()

    def order_of(self, digests: Sequence[str]) -> list[int]:
        """The rows of these pictures in the order they had, where they are the same ones: a file that was renamed keeps its
        place, its features and its scores. As they are, where they are others."""
        order = list(range(len(digests)))
        if sorted(digests) != sorted(self.digests):
            return order
        places: dict[str, list[int]] = {}
        for place, known in enumerate(self.digests):
            places.setdefault(known, []).append(place)
        taken = {row: places[known].pop(0) for row, known in enumerate(digests)}
        return sorted(order, key=taken.__getitem__)


def read_cache(cache: Path, folder: Path) -> Cache:
    """The file {"folder": ..., "files": {name: [bytes, mtime_ns, digest]}}; nothing where there is none yet."""
    if not cache.exists():
        return Cache()
    content = read_json(cache, Hashes, "delete it or name another file: it is no cache of image digests")
    files = {name: (size, time, digest) for name, (size, time, digest) in content["files"].items()}
    # Two folders unpacked from archives may agree in names, sizes and times.
    mine = content["folder"] == os.path.realpath(folder)
    return Cache(files if mine else {}, [digest for _, _, digest in files.values()])


def write_cache(cache: Path, folder: Path, files: Mapping[str, Hashed]) -> None:
    """What `read_cache` reads. In a folder that may not be written nothing is kept: it only saves time."""
    try:
        write_json(cache, {"folder": os.path.realpath(folder), "files": files}, ordered=True)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def fingerprint_of(digests: Sequence[str], labels: Sequence[int] | None, preprocess: Mapping[str, object]) -> str:
    """One sha256 for what is read of some images (see `images.fingerprint`).

    Args:
        digests: of the images, in their order.
        labels: their classes, None for none.
        preprocess: how their pixels are read.
    """
    content = {"digests": list(digests), "labels": labels, "preprocess": dict(preprocess)}
    return bytes_digest(json.dumps(content, sort_keys=True).encode())


def described(kind: str, count: int, preprocess: Mapping[str, object], fingerprint: str) -> dict[str, object]:
    """What a recipe says of images; the arguments are what it says."""
    return {"is": kind, "count": count, **preprocess, "fingerprint": fingerprint}


def identity_of(description: Mapping[str, object], digests: Sequence[str]) -> str:
    """The fingerprint of an ordered set of images and of how their pixels are read.

    Args:
        description: of the images.
        digests: theirs, in their order.
    """
    return digest([description, list(digests)], 32)


def refuse_inside(output: Path, folder: Path) -> None:
    """Refuse a folder of results that lies among the images: its pictures would be read as some of them, the next time.

    Args:
        output: of the results.
        folder: of the images.
    """
    inside, around = Path(os.path.realpath(output)), Path(os.path.realpath(folder))
    if around.is_dir() and inside.is_relative_to(around):
        told = "is" if inside == around else "lies in"
        told = f"{told} the folder of the images {folder}, which would be changed"
        raise WhenceError(told, str(output), "another folder for what is computed")


def common_size(source: PictureSource, where: str | Path, names: Sequence[str]) -> tuple[int, int]:
    """(width, height) of all pictures; an error where they differ.

    Args:
        source: where the pictures lie.
        where: the data set, for the error.
        names: of the pictures.
    """
    first = None
    for name in progress(names, "reading sizes"):
        size = header_size(source.file(name), source.where(name))
        first = first or size
        if size != first:
            differ = f"{names[0]} is {in_pixels(first)} and {name} is {in_pixels(size)}"
            raise WhenceError(
                f"{where}: images of different sizes ({differ}); give --resolution to bring all to one square"
            )
    assert first is not None
    return first


def in_pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
