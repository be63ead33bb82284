"""Pictures in webdataset shards: `.tar` files whose samples are `key.jpg` (or any image) with what belongs to it beside it.

    key.txt    the caption: column `text`          key.cls    a whole number: column `label`
    key.json   an object of free columns           key        the name up to the first dot after the last slash

Opening lists the members and keeps where each picture lies; a picture is then read by one seek. Only plain .tar files are
read: a compressed one has no places to seek to.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whence.data.folder import gathered
from whence.data.layout import Finding, Layout, Row, is_image, some, unprintable
from whence.types import WhenceError

SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
BLOCK = 512


@dataclass(frozen=True)
class Tars:
    """Pictures in tar files.

    Args:
        base: the folder that shards are relative to.
        places: name of a picture -> shard, first byte, number of bytes.
    """

    base: Path
    places: dict[str, tuple[str, int, int]]

    def file(self, name: str) -> io.BytesIO:
        shard, start, size = self.places[name]
        try:
            with (self.base / shard).open("rb") as file:
                file.seek(start)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise WhenceError(f"{self.base / shard}: cannot be read ({error.strerror}); make it readable") from error

    def where(self, name: str) -> str:
        return str(self.base / name)

    def holder(self, name: str) -> Path:
        return self.base / self.places[name][0]


@dataclass
class Sample:
    """One sample of a shard.

    Args:
        pictures: member -> first byte, number of bytes.
        columns: its metadata.
    """

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    columns: Row = field(default_factory=dict)


def tar_layout(base: Path, shards: Sequence[str]) -> Layout:
    """The samples of some shards (relative to base) in the order they lie in. Names are shard/member."""
    source = Tars(base, {})
    found = Layout(source)
    rows: list[Row] = []
    for shard in shards:
        try:
            samples = _samples(base / shard, found)
        except WhenceError as error:
            what, _, fix = str(error).partition("; ")
            found.findings.append(Finding("error", what, str(base / shard), fix))
            continue
        without = [key for key, sample in samples.items() if not sample.pictures]
        if without:
            what = f"{len(without)} samples have no picture and are left out: {some(without)}"
            found.findings.append(Finding("warning", what, str(base / shard), "add it if the model was trained on it"))
        for key, sample in samples.items():
            if len(sample.pictures) > 1:
                what, fix = f"sample {key} has several pictures: {some(sample.pictures)}", "keep one in each sample"
                found.findings.append(Finding("error", what, str(base / shard), fix))
            for member, (start, size) in list(sample.pictures.items())[:1]:
                source.places[f"{shard}/{member}"] = shard, start, size
                rows.append(sample.columns)
    found.names = found.pictures = list(source.places)
    found.findings += unprintable(base, found.names)
    found.meta = gathered(found.names, rows, base / shards[0], found.findings)
    if not found.names and not any(finding.level == "error" for finding in found.findings):
        fix = "accepted are webdataset shards: key.jpg or another image, with key.txt, key.json or key.cls beside it"
        found.findings.append(Finding("error", "holds no picture", str(base / shards[0]), fix))
    return found


def _samples(path: Path, found: Layout) -> dict[str, Sample]:
    """The samples of one shard by key."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in _members(tar):
                name = posixpath.normpath(member.name)
                split = SAMPLE.fullmatch(name)
                if split is None or "__MACOSX" in name.split("/"):
                    continue
                key, kind = split[1], split[2].lower()
                if kind in READERS:
                    _add(samples.setdefault(key, Sample()).columns, READERS[kind](tar, member), name)
                elif "." not in kind and is_image(name):
                    sample = samples.setdefault(key, Sample())
                    if member.issparse():
                        raise WhenceError(f"{name} is stored as a sparse file; write the shard again without --sparse")
                    if name in sample.pictures:
                        raise WhenceError(f"{name} is there twice; keep one of them")
                    sample.pictures[name] = member.offset_data, member.size
                else:
                    found.others.append(f"{path.name}/{name}")
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise WhenceError(
            f"cannot be read as a tar file ({error}); accepted are plain .tar files, not compressed; copy it again"
        ) from error
    except OSError as error:
        raise WhenceError(f"cannot be read ({error.strerror}); make it readable") from error
    _refuse_truncated(path, end)
    return samples


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an archive. tarfile would keep the headers of all of them."""
    while (member := tar.next()) is not None:
        if member.isreg():
            yield member
        tar.members = []  # type: ignore[attr-defined]


def _refuse_truncated(path: Path, end: int) -> None:
    """Refuse an archive that does not end with a block of zeros: tarfile takes a cut or damaged header for the end."""
    with path.open("rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise WhenceError(f"truncated or damaged after {end:,} bytes; copy or download the file again")


def _add(columns: Row, more: Row, member: str) -> None:
    for name, value in more.items():
        if columns.setdefault(name, value) != value:
            raise WhenceError(f"{member}: `{name}` is {value!r} here and {columns[name]!r} beside it; keep one of them")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = tar.extractfile(member)
    assert file is not None
    try:
        return file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise WhenceError(f"{member.name} is not UTF-8 ({error.reason}); write it again") from error


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    return {"text": _content(tar, member)}


def _json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    try:
        value = json.loads(_content(tar, member))
    except json.JSONDecodeError as error:
        raise WhenceError(f"{member.name} is not JSON ({error}); accepted: one object of columns") from error
    if not isinstance(value, dict):
        raise WhenceError(f"{member.name} is a {type(value).__name__}; accepted: one object of columns")
    return value


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    content = _content(tar, member).strip()
    if not content.isdecimal():
        raise WhenceError(f"{member.name} is {content[:20]!r}; accepted: the number of a class, from 0")
    return {"label": int(content)}


READERS = {"txt": _text, "json": _json, "cls": _label}
