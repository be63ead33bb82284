"""What a folder of images holds: pictures, metadata, and what is wrong with them."""

from __future__ import annotations

import io
import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

# A fixed list, not what this machine's Pillow can open: the same folder must be the same images everywhere.
_FORMATS = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
EXTENSIONS = tuple(f".{name}" for name in _FORMATS.split(" "))
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}


Columns = dict[str, list[object]]  # metadata: one value per image, None where it has none
Row = dict[str, object]  # the metadata of one image


@dataclass(frozen=True)
class Finding:
    """One thing to know about a folder.

    Args:
        level: "error" where it cannot be used so, "warning" for what is probably not meant, "note".
        what: was found.
        where: it was found.
        fix: what to do.
    """

    level: Literal["error", "warning", "note"]
    what: str
    where: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.fix}"


class PictureSource(Protocol):
    """Where the encoded pictures of a data set lie, by their names."""

    def file(self, name: str) -> Path | io.BytesIO:
        """What Pillow opens: the file of a picture, or its bytes."""

    def where(self, name: str) -> str:
        """The picture as an error names it."""

    def holder(self, name: str) -> Path | None:
        """The file on disk that it is in, None for what lies in memory."""


@dataclass(frozen=True)
class Files:
    """One file per picture."""

    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def holder(self, name: str) -> Path:
        return self.folder / name


@dataclass
class Layout:
    """What a folder holds.

    Args:
        source: where its pictures lie.
        names: the images of the data set, sorted (packed ones in the order of their files).
        meta: one column per key, None where a row has none.
        pictures: every image file, listed or not.
        others: the files that are no image.
        findings: what is wrong with it.
        classes: the names of the classes in their order, where the data says it; None where not.
    """

    source: PictureSource
    names: list[str] = field(default_factory=list)
    meta: Columns = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    classes: tuple[str, ...] | None = None


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in EXTENSIONS


def is_metadata(name: str) -> bool:
    return posixpath.basename(name) in METADATA


def walk(folder: Path, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Relative posix names of all files below. Hidden ones are left out; links are followed, loops of links once.

    Args:
        folder: where the walk begins.
        prefix: of the names.
        above: the folders that the walk is in, to find loops.
    """
    here = os.path.realpath(folder)
    if here in above:
        return
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith("."):
            continue
        if not path.is_dir():
            # A link to nowhere is kept: it names an image that is missing. Pipes and sockets would block a reader.
            if path.is_file() or path.is_symlink():
                yield prefix + name
        elif not name.startswith("__"):  # __MACOSX and the like; Hugging Face skips them too
            yield from walk(path, f"{prefix}{name}/", (*above, here))


def some(names: Iterable[object], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - limit} more" if len(texts) > limit else ""
    return ", ".join(texts[:limit]) + more


def misnamed(folder: Path, pictures: Sequence[str]) -> list[Finding]:
    """Names that lead to no file, and names that cannot be written down."""
    findings = unprintable(folder, pictures)
    broken = [name for name in pictures if not os.path.exists(folder / name)]
    if broken:
        what = f"{len(broken)} symbolic links lead nowhere: {some(broken)}"
        findings.append(Finding("error", what, str(folder), "restore what they point to, or remove them"))
    return findings


def unprintable(where: Path, names: Sequence[str]) -> list[Finding]:
    # Control characters, and bytes that are not UTF-8 (Python holds those as lone surrogates).
    odd = [ascii(name) for name in names if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)]
    if not odd:
        return []
    return [Finding("error", f"{len(odd)} file names are not printable UTF-8: {some(odd)}", str(where), "rename them")]
