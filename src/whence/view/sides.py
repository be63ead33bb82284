"""The two sides of a run, training images and queries: their names, their columns, and where their pictures are.

What a run noted of its images says which pictures were scored: their identity is a fingerprint of every digest in order. It
is computed again from the digests that the run keeps, without opening a file, and where that does not do, from the files.
A picture is shown only where the identity is that of the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from whence.data.classes import Classes, Labels, class_labels
from whence.data.folder import folder_labels
from whence.data.hashing import (
    DIGESTS,
    Cache,
    Hashed,
    Hashes,
    described,
    fingerprint_of,
    hash_files,
    identity_of,
    read_cache,
)
from whence.data.layout import Files, Layout
from whence.data.sources import layout_of
from whence.plain import UNKNOWN, WhenceError, owner_of
from whence.storage.files import read_json
from whence.storage.jsons import refuse_unexpected
from whence.storage.notes import NoteOfImages
from whence.view.pictures import Pictures

IMAGES, ONCE_MORE = "images.json", "run `whence attribute` in it once more"
Columns = Mapping[str, Sequence[object]]


@dataclass(frozen=True, eq=False)
class Side:
    """Training images, or queries.

    Args:
        ids: their names, as they were scored.
        meta: their columns.
        pictures: None where they cannot be shown.
        problem: why not, and what would help; "" where they can.
        folder: where they are, or were; "" for images that were in memory.
        moved: whether to say where they are now would help.
    """

    ids: Sequence[str]
    meta: Columns
    pictures: Pictures | None = None
    problem: str = ""
    folder: str = ""
    moved: bool = False


def noted_side(root: Path, name: str) -> tuple[NoteOfImages | None, str]:
    """What a run noted of one side, and why it is nothing.

    Args:
        root: the run folder.
        name: "train" or "queries".
    """
    if not (root / IMAGES).is_file():
        return None, f"{root} does not say where its images are; {ONCE_MORE}"
    note = read_json(root / IMAGES, dict, ONCE_MORE).get(name)
    refuse_unexpected(note, NoteOfImages | None, str(root / IMAGES), ONCE_MORE)
    if note is None:
        return (
            None,
            f"the {name if name == 'queries' else 'training'} images were in memory: there are no files to show",
        )
    return note, ""


def open_side(root: Path, name: str, scored: Side, others: Sequence[Path]) -> Side:
    """One side of a run with its pictures, where they are found.

    Args:
        root: the run folder.
        name: "train" or "queries".
        scored: names and columns as the scores have them; no columns where they do not.
        others: folders in which pictures that moved may be.
    """
    note, why = noted_side(root, name)
    if note is None:
        return replace(scored, problem=why)
    was = root / note["folder"]
    places = [was, *(place for other in others for place in (other, other / was.name))]
    side = replace(scored, problem=f"there is no folder {was}", folder=str(was), moved=True)
    for place in dict.fromkeys(places):
        if place.exists() or (place.parent.is_dir() and "*" in place.name):
            found = _opened(root, name, place, note, scored)
            if found.pictures is not None:
                return found
            side = found if place == was or side.problem.startswith("there is no") else side
    return side


def _opened(root: Path, name: str, place: Path, note: NoteOfImages, scored: Side) -> Side:
    """A side whose pictures are looked for in one place."""
    there = replace(scored, folder=str(place))
    try:
        if name == "train" and "by" not in note and scored.meta is not NO_COLUMNS:
            quick = _by_digests(root, place, note, there)
            if quick is not None:
                return quick
        return _by_files(root, name, place, note, there)
    except WhenceError as error:
        return replace(there, problem=str(error), moved=True)


NO_COLUMNS: Columns = {}
"""Of images whose columns are not known yet."""


def _by_digests(root: Path, place: Path, note: NoteOfImages, scored: Side) -> Side | None:
    """From the digests that the run keeps: no file is opened before its picture is asked for."""
    if not place.is_dir() or not (root / DIGESTS).is_file():
        return None
    files: dict[str, Hashed] = read_json(root / DIGESTS, Hashes)["files"]
    names, digests = list(files), [digest for _, _, digest in files.values()]
    if len(names) != len(scored.ids) or not (place / names[0]).is_file() or not (place / names[-1]).is_file():
        return None
    found = Layout(Files(place), names=names, meta={key: list(column) for key, column in scored.meta.items()})
    found.labels = list(scored.meta["label"]) if "label" in scored.meta else None
    if not found.meta:  # no metadata: the sub-folders may be classes
        folder_labels(place, found)
    if _identity(found, place, note, digests) != note["pictures"]:
        return None
    return replace(scored, pictures=Pictures(found.source, place, names, digests))


def _by_files(root: Path, name: str, place: Path, note: NoteOfImages, scored: Side) -> Side:
    """From the files themselves, all of which are hashed, but for those that the run has the digests of."""
    found = layout_of(place)
    wrong = next((finding for finding in found.findings if finding.level == "error"), None)
    if wrong is not None:
        return replace(scored, problem=str(wrong), moved=True)
    cache = read_cache(root / DIGESTS, place) if name == "train" else Cache()
    digests, _ = hash_files(found.source, found.names, cache.files)
    order = cache.order_of(digests)
    found.names, digests = [found.names[row] for row in order], [digests[row] for row in order]
    found.meta = {key: [column[row] for row in order] for key, column in found.meta.items()}
    found.labels = None if found.labels is None else [found.labels[row] for row in order]
    found.folders = [found.folders[row] for row in order] if found.folders else []
    if _identity(found, place, note, digests) != note["pictures"]:
        told = f"{place} holds other images than were scored"
        return replace(scored, problem=told, moved=True)
    rows = list(range(len(digests)))
    meta: Columns = found.meta
    ids: Sequence[str] = found.names
    if note.get("by", "image") != "image" or note.get("players") is not None:
        ids, rows = _standing(note, found)
        meta = {}
    if len(rows) != len(scored.ids) and scored.ids:
        return replace(
            scored, problem=f"{place} holds {len(rows):,} images, and {len(scored.ids):,} were scored", moved=True
        )
    pictures = Pictures(
        found.source,
        place if place.is_dir() else place.parent,
        [found.names[row] for row in rows],
        [digests[row] for row in rows],
    )
    return replace(scored, ids=scored.ids or ids, meta=scored.meta or meta, pictures=pictures)


def _standing(note: NoteOfImages, found: Layout) -> tuple[list[str], list[int]]:
    """The names of those who were scored in place of their images, and the row of the picture that stands for each; see
    `data.owners.standing_for`."""
    by = note["by"]
    column = found.names if by == "image" else found.meta.get(by)
    if column is None:
        raise WhenceError(f"no column {by!r} in the training images")
    first: dict[str, int] = {}
    for row, value in enumerate(column):
        first.setdefault(owner_of(value), row)
    names = note.get("players") or sorted(first)
    if any(name not in first for name in names):
        raise WhenceError(f"no image of {next(name for name in names if name not in first)!r} any more")
    return list(names), [first[name] for name in names]


def _identity(found: Layout, place: Path, note: NoteOfImages, digests: Sequence[str]) -> str:
    """As `features.rows.identity` has it for a folder of images."""
    classes = None if note["classes"] is None else tuple(note["classes"])
    try:
        labels = class_labels(found, Classes(classes), place)
    except WhenceError:
        labels = Labels()
    numbers = None if labels.numbers is None else list(labels.numbers)
    how = {"resolution": note["resolution"], "channels": note["channels"]}
    told = described("image_folder", len(digests), how, fingerprint_of(digests, numbers, how))
    return identity_of(told, digests)


def owner(value: object) -> str:
    """Whose an image is, see `plain.owner_of`; of nobody, so."""
    return "nobody known" if (name := owner_of(value)) == UNKNOWN else name
