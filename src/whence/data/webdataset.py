"""Pictures in webdataset shards: `.tar` files whose samples are `key.jpg` (or any image) with what belongs to it beside it.

    key.txt    the caption: column `text`          key.cls    a whole number: column `label`
    key.json   an object of free columns           key        the name up to the first dot after the last slash

Names with more dots: `key.seg.png` beside `key.png` belongs to it and is not read. Where no picture has a plain ending,
`key.rgb.png` is the picture of its sample if it is the only one; else the key goes up to the last dot (`cat.0.jpg`,
`cat.1.jpg`), unless several samples have the same names of parts (`key.left.png`, `key.right.png`): these are refused.

Opening lists the members and keeps where each picture lies; a picture is then read by one seek. Only plain .tar files are
read: a compressed one has no places to seek to.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from whence.data.folder import fill
from whence.data.layout import Finding, Layout, Row, is_hidden, is_image, some, unprintable
from whence.plain import WhenceError
from whence.storage.opening import regular

SAMPLE = re.compile(r"((?:.*/)?[^./]+)((?:\.[^./]+)*)\.([^./]+)")
BLOCK = 512
ONE = "keep one in each sample; if these are samples of their own, name them without dots"


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
            with regular(self.base / shard).open("rb") as file:
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
    """pictures: member -> first byte, number of bytes; columns: what belongs to it; unread: members of other kinds."""

    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    columns: Row = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Member:
    """A file of an archive. parts: its key, what stands between the first and the last dot, and its ending; place: where a
    picture lies; columns: what the others say."""

    name: str
    parts: tuple[str, str, str]
    place: tuple[int, int] | None = None
    columns: Row | None = None


def tar_layout(base: Path, shards: Sequence[str]) -> Layout:
    """The samples of some shards (relative to base) in the order they lie in. Names are shard/member."""
    source = Tars(base, {})
    found = Layout(source)
    rows: list[Row] = []
    for shard in shards:
        try:
            samples = _samples(base / shard, shard, found)
        except WhenceError as error:
            what, _, fix = str(error).partition("; ")
            found.findings.append(Finding("error", what, str(base / shard), fix))
            continue
        without = [key for key, sample in samples.items() if not sample.pictures]
        if without:
            what = f"{len(without)} samples have no picture and are left out: {some(without)}"
            found.findings.append(Finding("warning", what, str(base / shard), "add it if the model was trained on it"))
            found.left_out += [f"{shard}/{key}" for key in without if samples[key].columns]
        if len(without) == len(samples):
            found.empty.append(shard)
        for key, sample in samples.items():
            found.others += [f"{shard}/{name}" for name in sample.unread]
            if len(sample.pictures) > 1:
                what, fix = f"sample {key} has several pictures: {some(sample.pictures)}", ONE
                found.findings.append(Finding("error", what, str(base / shard), fix))
            for member, (start, size) in list(sample.pictures.items())[:1]:
                source.places[f"{shard}/{member}"] = shard, start, size
                rows.append(sample.columns)
    found.names = found.pictures = list(source.places)
    found.skipped += found.others
    found.findings += unprintable(base, found.names)
    fill(found, rows, base / shards[0])
    if not found.names and not any(finding.level == "error" for finding in found.findings):
        fix = "accepted are webdataset shards: key.jpg or another image, with key.txt, key.json or key.cls beside it"
        found.findings.append(Finding("error", "holds no picture", str(base / shards[0]), fix))
    return found


def _samples(path: Path, shard: str, found: Layout) -> dict[str, Sample]:
    """The samples of one shard by key."""
    members: dict[str, Member] = {}
    try:
        with tarfile.open(regular(path), "r:") as tar:
            for info in _members(tar):
                name = posixpath.normpath(info.name)
                split = SAMPLE.fullmatch(name)
                if split is None or is_hidden(name) or not info.isreg():
                    (found.hidden if is_hidden(name) else found.others).append(f"{shard}/{name}")
                    continue
                if name in members:
                    raise WhenceError(f"{name} is there twice; keep one of them")
                members[name] = _member(tar, info, name, (split[1], (split[2] or "")[1:], split[3].lower()))
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise WhenceError(
            f"cannot be read as a tar file ({error}); accepted are plain .tar files, not compressed; copy it again"
        ) from error
    except OSError as error:
        raise WhenceError(f"cannot be read ({error.strerror}); make it readable") from error
    _refuse_truncated(path, end)
    return _grouped(list(members.values()))


def _member(tar: tarfile.TarFile, info: tarfile.TarInfo, name: str, parts: tuple[str, str, str]) -> Member:
    if is_image(name):
        if info.issparse():
            raise WhenceError(f"{name} is stored as a sparse file; write the shard again without --sparse")
        return Member(name, parts, (info.offset_data, info.size))
    read = READERS.get(parts[2])
    return Member(name, parts, None, None if read is None else read(tar, info))


def _grouped(members: Sequence[Member]) -> dict[str, Sample]:
    """Samples by key, as the module says, in the order they lie in."""
    middles: dict[str, set[str]] = {}
    for member in members:
        if member.place is not None:
            middles.setdefault(member.parts[0], set()).add(member.parts[1])
    times = Counter(middle for several in middles.values() if len(several) > 1 for middle in several)
    # What several samples have are parts of a sample. Numbers count samples, and so do dates.
    shared = {middle for middle, count in times.items() if count > 1 and any(letter.isalpha() for letter in middle)}
    samples: dict[str, Sample] = {}
    for member in members:
        key, middle, _ = member.parts
        here = middles.get(key, set())
        if "" in here or len(here) == 1 or here & shared:
            used = middle == "" or (middle in here and "" not in here)
        else:
            key, used = f"{key}.{middle}" if middle else key, True
        _join(samples.setdefault(key, Sample()), member, used)
    return samples


def _join(sample: Sample, member: Member, used: bool) -> None:
    if used and member.place is not None:
        sample.pictures[member.name] = member.place
    elif used and member.columns is not None:
        _add(sample.columns, member.columns, member.name)
    else:
        sample.unread.append(member.name)


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files and links of an archive. tarfile would keep the headers of all of them."""
    while (member := tar.next()) is not None:
        if not member.isdir():
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
        kept = columns.setdefault(name, value)
        if kept is not value and kept != value:  # NaN differs from itself
            raise WhenceError(f"{member}: `{name}` is {value!r} here and {columns[name]!r} beside it; keep one of them")


LONGEST = 2**24  # bytes of a text


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.issparse() or member.size > LONGEST:  # a sparse one may say that it has any number of bytes
        told = "is stored as a sparse file" if member.issparse() else f"has {member.size:,} bytes"
        raise WhenceError(f"{member.name} {told}; accepted: a text of {LONGEST:,} bytes at most, stored as it is")
    file = tar.extractfile(member)
    assert file is not None
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WhenceError(f"{member.name} is not UTF-8 ({error.reason}); write it again") from error


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    return {"text": _content(tar, member)}


def _json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    try:
        value = json.loads(_content(tar, member))
    except (ValueError, RecursionError) as error:
        raise WhenceError(f"{member.name} is not JSON ({error}); accepted: one object of columns") from error
    if not isinstance(value, dict):
        raise WhenceError(f"{member.name} is a {type(value).__name__}; accepted: one object of columns")
    return value


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Row:
    content = _content(tar, member).strip()
    if not (content.isascii() and content.isdecimal() and len(content) < 19):
        raise WhenceError(f"{member.name} is {content[:20]!r}; accepted: the number of a class, from 0")
    return {"label": int(content)}


READERS = {"txt": _text, "json": _json, "cls": _label}
