"""What a folder of images holds: pictures, metadata, and what is wrong with them."""

from __future__ import annotations

import io
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

# A fixed list, not what this machine's Pillow can open: the same folder must be the same images everywhere. All endings of
# Hugging Face's imagefolder that Pillow decodes by itself, and avif.
_FORMATS = "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
_RARE = (
    "apng blp bw cur dcx dds dib fit fits flc fli ftc ftu gbr icb icns ico iim im j2c j2k jpc jpf jpx msp pcd pcx psd pxr "
    "ras rgb rgba sgi vda vst xbm xpm"
)
EXTENSIONS = tuple(f".{name}" for name in f"{_FORMATS} {_RARE}".split(" "))
ACCEPTED = f"accepted are .{', .'.join(_FORMATS.split(' '))} and rarer ones (docs/files.md)"
# Pictures people do train on, but that are not read: Pillow has no decoder for them, or they are programs (ps, eps, svg).
_FOREIGN = (
    "arw bufr cr2 dng emf eps exr grib h5 hdf hdr heic heif jxl mpeg mpg nef npy ps psb qoi raw svg wmf "
    "7z bz2 gz rar tgz xz zip zst"
)
FOREIGN = frozenset(f".{name}" for name in _FOREIGN.split(" "))
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CLASSES = "classes.txt"
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
ASIDE = ("__", "@eaDir")  # __MACOSX, __pycache__; a Synology disk keeps small copies of pictures in @eaDir
FEW = 3  # files that may be skipped without being asked for
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|citation|changelog)(\..*)?|.*\.(md|rst)|dataset_infos?\.json|state\.json"
    r"|thumbs\.db|desktop\.ini|digests\.json",
    re.IGNORECASE,
)
"""Files that tell about a data set: they are no part of it, however many there are."""


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
        meta: one column per key, None where a row has none, in types that can be saved (`storage.columns`).
        labels: the column `label` as it was written, None where there is none.
        folders: of each image, where all lie equally deep: its class, if classes have such names.
        pictures: every image file, listed or not.
        others: the files that are no image.
        skipped: those that are not used.
        left_out: likewise, where a finding tells it already.
        hidden: pictures that are hidden, and hidden folders with some.
        empty: packed files that hold no picture.
        findings: what is wrong with all this.
        classes: the names of the classes in their order, where the data says it.
    """

    source: PictureSource
    names: list[str] = field(default_factory=list)
    meta: Columns = field(default_factory=dict)
    labels: list[object] | None = None
    folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    classes: tuple[str, ...] | None = None


def is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in EXTENSIONS


def is_metadata(name: str) -> bool:
    return posixpath.basename(name) in METADATA


def walk(folder: Path, prefix: str = "", above: tuple[str, ...] = (), hidden: list[str] | None = None) -> Iterator[str]:
    """Relative posix names of all files below; links are followed, loops of links once.

    Hidden ones, __MACOSX and the like are left out, as Hugging Face does; those that are or hold pictures are added to
    `hidden`.
    """
    here, left_out = os.path.realpath(folder), [] if hidden is None else hidden
    if here in above:
        return
    for name in sorted(os.listdir(folder)):
        path = folder / name
        is_folder = path.is_dir()
        if name.startswith(".") or (is_folder and name.startswith(ASIDE)):
            inside = (last for _, _, names in os.walk(path) for last in names) if is_folder else [name]
            left_out += [f"{prefix}{name}{'/' * is_folder}"] * any(is_image(last) for last in inside)
        elif is_folder:
            yield from walk(path, f"{prefix}{name}/", (*above, here), left_out)
        else:  # a link to nowhere names an image that is missing; what opens a pipe refuses it (see `files.regular`)
            yield prefix + name


def is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden, or like __MACOSX."""
    *folders, last = name.split("/")
    return last.startswith(".") or any(folder.startswith((".", *ASIDE)) for folder in folders)


def split_of(name: str) -> str | None:
    """The split that a file or one of its folders is named after: `cc3m-train-00000-of-00002.parquet`, `val/000.tar`."""
    words = re.split(r"[^a-z]+", posixpath.splitext(name)[0].lower())
    return next((word for word in words if word in SPLITS), None)


def train_first(split: str) -> tuple[bool, str]:
    """The order in which one of several splits is proposed."""
    return not split.startswith("train"), split


def skipped(found: Layout, where: str | Path, allowed: bool) -> list[Finding]:
    """What a folder holds that is not used: counted and named, and an error where it is more than a few.

    Args:
        found: what lies in the folder.
        where: the folder.
        allowed: whether its owner knows of it (--skip).
    """
    matter = [name for name in found.skipped if not ABOUT.fullmatch(posixpath.basename(name))]
    about = [name for name in found.skipped if ABOUT.fullmatch(posixpath.basename(name))]
    findings = []
    every = [*found.left_out, *matter]
    if len(every) > FEW and not allowed:
        fix = "accepted: --skip, if they are none of the images that are meant, or a folder without them"
        findings.append(Finding("error", _counted(every, "file", "skipped"), str(where), fix))
    elif matter:
        fix = "nothing needs doing if they are none of the images that are meant"
        findings.append(Finding("warning", _counted(matter, "file", "skipped"), str(where), fix))
    if about:
        what = _counted(about, "file", "about the data and not read")
        findings.append(Finding("note", what, str(where), "nothing needs doing"))
    if found.hidden:
        what, fix = _counted(found.hidden, "hidden picture or folder", "skipped"), "rename them if they were trained on"
        findings.append(Finding("note", what, str(where), fix))
    return findings


def _counted(names: Sequence[str], one: str, what: str) -> str:
    kinds = Counter(posixpath.splitext(name)[1].lower() or "without ending" for name in names).most_common()
    told = f" ({some(f'{count} {kind}' for kind, count in kinds)})" if len(names) > FEW else ""
    many = one.replace(" or ", "s or ") + "s"
    return f"{len(names)} {f'{one} is' if len(names) == 1 else f'{many} are'} {what}{told}: {some(names)}"


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
