"""What is wrong with a folder of images, before a long job finds out: `whence doctor`.

Every image is decoded once, as `data` would decode it. Nothing is changed on disk.
"""

from __future__ import annotations

import posixpath
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from whence.data.classes import Classes, class_labels
from whence.data.decoding import has_alpha, opened, read_picture
from whence.data.hashing import Cache, Stamp, progress, stamp_of
from whence.data.images import ImageFolder, Reading, open_layout
from whence.data.layout import FOREIGN, Finding, Layout, PictureSource, skipped, some
from whence.data.pixels import is_cropped
from whence.data.sources import layout_of
from whence.storage.files import file_digest

LEVELS = ("error", "warning", "note")


@dataclass(frozen=True)
class Look:
    """What one image file turned out to be.

    Args:
        name: of the picture.
        problem: why it cannot be read, and then nothing else is known; None where it can.
        stamp: (bytes, mtime_ns) of the file.
        digest: of its bytes.
        size: (width, height) of the upright picture.
        mode: of its colours, as Pillow names it.
        format: as Pillow names it.
        frames: of an animation; 1 for a picture.
        transparent: whether any pixel is.
    """

    name: str
    problem: str | None = None
    stamp: Stamp = (0, 0)
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    frames: int = 1
    transparent: bool = False


@dataclass(frozen=True)
class Inspected:
    """A folder of images that was looked at: walked once, each picture decoded once.

    Args:
        folder: the path that was opened.
        layout: what lies in it.
        looks: what each picture turned out to be.
    """

    folder: Path
    layout: Layout
    looks: Sequence[Look]

    @property
    def readable(self) -> list[Look]:
        return [look for look in self.looks if look.problem is None]

    @property
    def named(self) -> list[tuple[str, str]]:
        """(name, digest) of what can be read."""
        return [(look.name, look.digest) for look in self.readable]

    def findings(self, resolution: int | None = None, skip: bool = True) -> list[Finding]:
        """Everything worth knowing, errors first; the arguments as given to `image_folder`."""
        folder, found, good = self.folder, self.layout, self.readable
        findings = [
            *found.findings,
            *_broken(found.source, self.looks),
            *_sizes(folder, good, resolution),
            *_modes(folder, good),
            *_contents(folder, good),
            *_names(folder, [look.name for look in self.looks], found),
            *(finding for finding in skipped(found, folder, skip) if finding.level == "error"),
            *_labels(folder, found),
        ]
        return sorted(findings, key=lambda finding: LEVELS.index(finding.level))

    def images(self, reading: Reading, before: Cache = Cache()) -> ImageFolder:
        """The images, as `image_folder` opens them, without another walk; only files that changed are read again.

        Args:
            reading: how they are read.
            before: what the run folder knows of them.
        """
        known = {look.name: (*look.stamp, look.digest) for look in self.readable}
        return open_layout(self.layout, self.folder, reading, Cache(known, before.digests))


def look_at(folder: str | Path) -> Inspected:
    """Walk a folder of images, or packed files, and decode every picture once."""
    found = layout_of(Path(folder))
    present = set(found.pictures)
    names = [name for name in found.names if name in present] or found.pictures
    return Inspected(Path(folder), found, [_look(found.source, name) for name in progress(names, "reading images")])


def inspect_folder(folder: str | Path, resolution: int | None = None) -> list[Finding]:
    """Everything worth knowing about a folder of images, errors first.

    Args:
        folder: as given to `image_folder`.
        resolution: likewise. An "error" makes `image_folder`, or reading a row of it, fail.
    """
    return look_at(folder).findings(resolution)


def _look(source: PictureSource, name: str) -> Look:
    where = source.where(name)
    try:
        file = source.file(name)
        if (file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())) == 0:
            return Look(name, "0 bytes")
        stamp, digest, upright = stamp_of(source.holder(name)), file_digest(file), read_picture(file, where)
        with opened(file) as picture:
            alpha = has_alpha(picture) and picture.convert("RGBA").getchannel("A").getextrema()[0] != 255
            frames, kind = getattr(picture, "n_frames", 1), picture.format or ""
            return Look(name, None, stamp, digest, upright.size, picture.mode, kind, frames, alpha)
    except Exception as error:  # one strange picture is a finding; the others are looked at, too
        return Look(name, " ".join(str(error).split()).removeprefix(f"{where}: ") or type(error).__name__)


def _broken(source: PictureSource, looks: Sequence[Look]) -> list[Finding]:
    findings = []
    for look in looks:
        if look.problem is not None:
            what, _, fix = look.problem.partition("; ")
            findings.append(Finding("error", what, source.where(look.name), fix or "replace or remove the file"))
    return findings


def _sizes(folder: Path, looks: Sequence[Look], resolution: int | None) -> list[Finding]:
    sizes = Counter(look.size for look in looks)
    if resolution is None:
        if len(sizes) < 2:
            return []
        one, other = (next(look for look in looks if look.size == size) for size in list(sizes)[:2])
        what = f"{len(sizes)} different sizes: {_sized(one)}, {_sized(other)}"
        return [Finding("error", what, str(folder), "give --resolution to bring all to one square")]
    findings = []
    small = [_sized(look) for look in looks if min(look.size) < resolution]
    if small:
        what = f"{len(small)} images are smaller than {resolution} and get enlarged: {some(small)}"
        findings.append(Finding("warning", what, str(folder), "give the --resolution the model was trained with"))
    oblong = [_sized(look) for look in looks if is_cropped(look.size, resolution)]
    if oblong:
        what = f"{len(oblong)} images are not square, only their centre is read: {some(oblong)}"
        fix = "crop them yourself if the model was trained on other parts (diffusers crops at random by default)"
        findings.append(Finding("note", what, str(folder), fix))
    return findings


def _sized(look: Look) -> str:
    return f"{look.name} is {look.size[0]}x{look.size[1]}"


def _modes(folder: Path, looks: Sequence[Look]) -> list[Finding]:
    findings, modes = [], Counter(look.mode for look in looks)
    if len(modes) > 1:
        what = f"different colour modes: {', '.join(f'{count} {mode}' for mode, count in modes.most_common())}"
        fix = "all are read as RGB (or as grey with channels=1); convert them if training read them otherwise"
        findings.append(Finding("warning", what, str(folder), fix))
    transparent = [look.name for look in looks if look.transparent]
    if transparent:
        what = f"{len(transparent)} images are partly transparent: {some(transparent)}"
        fix = "they are read over white; diffusers' scripts drop alpha instead: save them without it to get the same"
        findings.append(Finding("warning", what, str(folder), fix))
    animated = [look.name for look in looks if look.frames > 1]
    if animated:
        what = f"{len(animated)} files have several frames, only the first is read: {some(animated)}"
        findings.append(Finding("warning", what, str(folder), "save the frames you mean as files of their own"))
    return findings


def _contents(folder: Path, looks: Sequence[Look]) -> list[Finding]:
    """Copies, and files that are of another format than their name says."""
    findings, same = [], defaultdict(list)
    for look in looks:
        same[look.digest].append(look.name)
    copies = [names for names in same.values() if len(names) > 1]
    if copies:
        count = sum(len(names) - 1 for names in copies)
        what = f"{count} files are exact copies of another: {some(' = '.join(names[:3]) for names in copies)}"
        fix = "remove them if the model was trained on one; copies get the same score, and sums count each"
        findings.append(Finding("warning", what, str(folder), fix))
    formats = Image.registered_extensions()
    disguised = []
    for look in looks:
        expected = formats.get(posixpath.splitext(look.name)[1].lower(), look.format)
        if look.format != expected and {look.format, expected} != {"JPEG", "MPO"}:
            disguised.append(f"{look.name} is {look.format}")
    if disguised:
        what = f"{len(disguised)} files are of another format than their name says: {some(disguised)}"
        findings.append(Finding("note", what, str(folder), "they are read as what they are; nothing needs doing"))
    return findings


def _names(folder: Path, names: Sequence[str], found: Layout) -> list[Finding]:
    findings, where = [], str(folder)
    upper = [name for name in names if (end := posixpath.splitext(name)[1]) != end.lower()]
    if upper:
        what = f"{len(upper)} file extensions are in upper case: {some(upper)}"
        findings.append(
            Finding("note", what, where, "they are read; other tools may skip them, so check the training did")
        )
    foreign = [name for name in found.others if posixpath.splitext(name)[1].lower() in FOREIGN]
    if foreign:
        what = f"{len(foreign)} pictures are of a format that is not read: {some(foreign)}"
        findings.append(Finding("warning", what, where, "save them as PNG if the model was trained on them"))
    rest = [name for name in found.skipped if name not in foreign]
    if rest:
        what = f"{len(rest)} files are not images and are skipped: {some(rest)}"
        findings.append(Finding("note", what, where, "nothing needs doing"))
    if found.hidden:
        what = f"{len(found.hidden)} hidden pictures or folders are skipped: {some(found.hidden)}"
        findings.append(Finding("note", what, where, "rename them if the model was trained on them"))
    return findings


def _labels(folder: Path, found: Layout) -> list[Finding]:
    values, where, findings = found.meta.get("label"), str(folder), []
    if values is None:
        tops = {name.split("/")[0] for name in found.names if "/" in name}
        if len(tops) > 1 and any(posixpath.basename(name).startswith("metadata.") for name in found.others):
            what = "sub-folders are not read as class labels, because there is a metadata file"
            findings.append(Finding("note", what, where, "add a column `label` to it if the classes matter"))
        return findings
    labels = class_labels(found, Classes(), where)
    if labels.problem and None not in values:
        findings.append(Finding("warning", labels.problem, where, "write all names, or all class indices"))
    classes = labels.names or ()
    if all(name.isdecimal() for name in classes) and list(classes) != sorted(classes, key=int):
        what = f"class names are numbers sorted as text: {some(classes)}"
        findings.append(
            Finding("warning", what, where, "check that training did so too, or write indices as JSON numbers")
        )
    return findings
