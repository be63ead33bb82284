"""What is wrong with the images, by themselves and beside the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from PIL import Image

from whence.data.images import class_labels
from whence.data.inspect import inspect_folder
from whence.data.layout import Finding, PictureSource, some
from whence.data.pixels import PIXELS_16, header_size
from whence.data.sources import layout_of
from whence.doctor.findings import NOTHING, Findings, guarded
from whence.doctor.parts import Requirements
from whence.storage.files import file_digest
from whence.types import WhenceError

GREY = {"1", "L", "LA", "La", "I", "F"} | PIXELS_16


def images(kind: str, folder: Path, requirements: Requirements, resolution: int | None, column: str) -> Findings:
    """A folder of images, by itself and beside the model."""
    findings = guarded(kind, lambda: inspect_folder(folder, resolution or requirements.side))
    findings += guarded(kind, lambda: _fit(folder, requirements, resolution))
    findings += guarded(kind, lambda: _labels(folder, requirements))
    findings += guarded(kind, lambda: _captions(folder, requirements, column))
    return [f if f.where.startswith((kind, "check")) else replace(f, where=f"{kind} {f.where}") for f in findings]


def _names(folder: Path) -> tuple[PictureSource, list[str]]:
    found = layout_of(folder)
    present = set(found.pictures)
    return found.source, [name for name in found.names if name in present]


def _fit(folder: Path, requirements: Requirements, resolution: int | None) -> Findings:
    """Sizes and colours against those of the model."""
    own, channels, where = requirements.side, requirements.channels, str(folder)
    source, names = _names(folder)
    looks = [look for look in (_peek(source, name) for name in names) if look]
    if own is None or not looks:
        return []
    findings, sizes = [], Counter(size for size, _ in looks)
    if resolution is not None and resolution != own:
        what = f"the images are brought to {resolution}x{resolution}, but the model is for {own}x{own}"
        fix = f"leave --resolution out unless it was trained at {resolution}"
        findings.append(Finding("warning", what, where, fix))
    side = resolution or own
    large = [size for size in sizes if min(size) > side]
    if large:
        one = f"{large[0][0]}x{large[0][1]}"
        what = f"images are larger ({one}) than the model's {side}x{side} and get shrunk"
        # A set that is square and of one size was made for a model; photos of all sizes are usually shrunk in training.
        prepared = len(sizes) == 1 and large[0][0] == large[0][1]
        fix = "check that the model was trained on shrunk images"
        findings.append(Finding("warning" if prepared else "note", what, where, fix))
    grey = sum(mode in GREY for _, mode in looks)
    if channels == 3 and grey:
        what = f"{grey} of {len(looks)} images are grey, but the model has 3 channels: they are read as grey RGB"
        findings.append(Finding("warning", what, where, "check that the model was trained on them so"))
    if channels == 1 and grey < len(looks):
        what = f"{len(looks) - grey} of {len(looks)} images are in colour, but the model has 1 channel: read as grey"
        findings.append(Finding("warning", what, where, "check that the model was trained on them so"))
    return findings


def _peek(source: PictureSource, name: str) -> tuple[tuple[int, int], str] | None:
    """Size and mode from the header; None where it cannot be read, which `inspect_folder` tells."""
    try:
        file = source.file(name)
        with Image.open(file) as picture:
            return header_size(file, name), picture.mode
    except (WhenceError, OSError):
        return None


def _labels(folder: Path, requirements: Requirements) -> Findings:
    """A class-conditional model cannot be measured without the class of each image."""
    found, where = layout_of(folder), str(folder)
    if not found.names or not requirements.labels:
        return []
    labels, _ = class_labels(found.meta.get("label"), found.classes, folder)
    if labels is None:
        fix = "give class folders or a `label` column in metadata.jsonl"
        return [Finding("error", "the model is class-conditional, but the images have no labels", where, fix)]
    classes = requirements.classes
    if classes is not None and int(labels.max()) >= classes:
        what = f"labels go up to {int(labels.max())}, but the model has {classes} classes (0 to {classes - 1})"
        return [Finding("error", what, where, "give the images and labels that the model was trained on")]
    return []


def _captions(folder: Path, requirements: Requirements, column: str) -> Findings:
    """A model that reads text cannot be measured without the caption of each image."""
    found, where = layout_of(folder), str(folder)
    if not found.names or not requirements.text:
        return []
    if column not in found.meta:
        what = f"the model reads text, but there is no column {column!r} (columns: {some(found.meta, 9) or 'none'})"
        fix = (
            "write captions in metadata.jsonl (key.txt in a tar, a column of a table), or name it with --caption_column"
        )
        return [Finding("error", what, where, fix)]
    captions = found.meta[column]
    silent = [
        found.source.where(name) for name, text in zip(found.names, captions, strict=True) if type(text) is not str
    ]
    if silent:
        what = f"{len(silent)} of {len(captions)} images have no caption in {column!r}: {some(silent)}"
        return [Finding("error", what, where, "write a text for each, an empty one where it was trained without")]
    what = f"{len(set(captions))} different captions in {column!r}"
    return [Finding("note", what, where, NOTHING)]


def shared_classes(train: Path, queries: Path) -> Findings:
    """The classes of the queries are among those of the training images."""
    own, asked = layout_of(train), layout_of(queries)
    _, classes = class_labels(own.meta.get("label"), own.classes, train)
    class_labels(asked.meta.get("label"), classes, queries)
    return []


def copies(train: Path, queries: Path) -> Findings:
    """Queries that are files of the training set."""
    (seen, names), (asked, wanted) = _names(train), _names(queries)
    sizes = {_length(asked, name) for name in wanted}
    # Only files of equal length can be equal, so that a large folder need not be read once more.
    same = {file_digest(seen.file(name)): name for name in names if _length(seen, name) in sizes}
    found = {name: same[key] for name in wanted if (key := file_digest(asked.file(name))) in same}
    if not found:
        return []
    pairs = some(f"{query} = {image}" for query, image in found.items())
    what = f"{len(found)} of {len(wanted)} images are byte-identical to training images: {pairs}"
    fix = "similarity will just find themselves; give pictures that the model made"
    return [Finding("warning", what, f"query images {queries}", fix)]


def _length(source: PictureSource, name: str) -> int:
    file = source.file(name)
    return file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
