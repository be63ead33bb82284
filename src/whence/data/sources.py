"""Which kind of data set lies at a path: image files, or one of the packed kinds of `SOURCES`."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from whence.data.classes import lines_of
from whence.data.folder import folder_layout
from whence.data.layout import CLASSES, Files, Finding, Layout, is_image, is_metadata, some, split_of, train_first, walk
from whence.data.parquet import table_layout
from whence.data.webdataset import tar_layout
from whence.plain import WhenceError

SOURCES: dict[str, Callable[[Path, Sequence[str]], Layout]] = {
    ".tar": tar_layout,
    ".parquet": table_layout,
    ".arrow": table_layout,
}
"""Ending of a packed file -> what some of them hold, given their folder and their names in it (docs/extending.md)."""


def layout_of(path: Path) -> Layout:
    """What a data set holds; everything wrong with it is among its findings.

    Args:
        path: a folder of images, a folder of packed files, one of them, or a pattern like `data/train-*.tar`.
    """
    if path.is_dir():
        hidden: list[str] = []
        try:
            files = list(walk(path, "", (), hidden))
        except OSError as error:
            what = f"cannot be listed ({error.strerror})"
            return _nothing(Finding("error", what, str(error.filename), "make the folder readable"))
        found = _with_classes(_in_folder(path, files), path / CLASSES)
        found.hidden = hidden
        return found
    if _is_packed(path.name) and path.is_file():
        return _packed(path.parent, [path.name], path)
    matching = sorted(found.name for found in path.parent.glob(path.name)) if "*" in path.name else []
    packed = [name for name in matching if _is_packed(name)]
    if packed:
        found = _packed(path.parent, packed, path)
        found.skipped += [name for name in matching if name not in packed]
        return _with_classes(found, path.parent / CLASSES)
    what = "is not a folder" if path.exists() else "no such folder"
    *others, last = SOURCES
    fix = f"give a folder of images, or {', '.join(others)} or {last} files (a folder of them, one, or a pattern like "
    return _nothing(Finding("error", what, str(path), f"{fix}train-*.tar)"))


def _in_folder(path: Path, files: Sequence[str]) -> Layout:
    """Image files, or packed files, or what there are more pictures in: a data set's repository has a picture beside its
    shards, and a folder of images may have a table."""
    beside = _beside(path, files)
    packed = [name for name in files if _is_packed(name) and not is_metadata(name) and name not in beside]
    loose = [name for name in files if is_image(name)]
    if not packed or (loose and any(is_metadata(name) for name in files)):
        return folder_layout(path, files)
    found = _packed(path, packed, path)
    if loose and (len(found.empty) == len(packed) or len(loose) > len(found.names) > 0):
        plain = folder_layout(path, files)
        # Each picture counts: one skipped shard may hold them all.
        holders = {found.source.holder(name) for name in found.names}
        plain.skipped = [name for name in plain.skipped if path / name not in holders] + found.names
        return plain
    found.others = [*found.others, *(name for name in files if name not in packed)]
    found.skipped += [name for name in files if name not in packed and name != CLASSES]
    return found


def _beside(path: Path, files: Sequence[str]) -> set[str]:
    """00000.parquet beside 00000.tar, where it tells of its pictures once more and holds none (img2dataset)."""
    shards = {name.rpartition(".")[0] for name in files if _kind(name) == ".tar"}
    tables = [name for name in files if _kind(name) == ".parquet" and name.rpartition(".")[0] in shards]
    return {name for name in tables if not table_layout(path, [name]).names}


def _is_packed(name: str) -> bool:
    return _kind(name) in SOURCES


def _kind(name: str) -> str:
    return Path(name).suffix.lower()


def _with_classes(found: Layout, path: Path) -> Layout:
    """The names of classes in a classes.txt beside the images, where the data itself does not say them."""
    if path.is_file() and found.classes is None:
        try:
            found.classes = lines_of(path)
        except WhenceError as error:
            found.findings.append(Finding("error", error.what, str(path), f"accepted: {error.accepted}"))
    return found


def _nothing(finding: Finding) -> Layout:
    return Layout(Files(Path(finding.where)), findings=[finding])


def _packed(base: Path, shards: Sequence[str], given: Path) -> Layout:
    kinds = sorted({_kind(name) for name in shards})
    if len({SOURCES[kind] for kind in kinds}) > 1:
        what = f"holds {' and '.join(kinds)} files"
        one = _pattern(base, [name for name in shards if _kind(name) == kinds[0]], shards, "")
        return _nothing(Finding("error", what, str(given), f"give one kind of them, such as '{one}'"))
    splits = sorted({split for name in shards if (split := split_of(name))}, key=train_first)
    if len(splits) > 1:
        one = _pattern(base, [name for name in shards if split_of(name) == splits[0]], shards, splits[0])
        what = f"holds splits ({some(splits)}), not images of one data set"
        return _nothing(Finding("error", what, str(given), f"give one of them, such as '{one}'"))
    found = SOURCES[kinds[0]](base, shards)
    if splits and not all(split_of(name) for name in shards):
        what = f"files named like a split ({splits[0]}) are read together with the others"
        found.findings.append(Finding("warning", what, str(given), "give one split, as a pattern"))
    return found


def _pattern(base: Path, mine: Sequence[str], every: Sequence[str], word: str) -> Path:
    """What to give to open some shards and no others: their folder, a pattern, or the first of them.

    Args:
        base: the folder that names are relative to.
        mine: the shards that are meant.
        every: all that there are.
        word: what their names have in common.
    """
    parent, kind = Path(mine[0]).parent, Path(mine[0]).suffix
    mine = [name for name in mine if Path(name).parent == parent]
    if parent != Path() and all(name in mine for name in every if Path(name).is_relative_to(parent)):
        return base / parent
    names = [Path(name).name for name in mine]
    others = [name for name in os.listdir(base / parent) if name not in names]
    shared = next(
        (size for size in range(len(names[0]), 0, -1) if all(name[:size] == names[0][:size] for name in names)), 0
    )
    at = names[0][:shared].lower().find(word)
    for start in (names[0][: at + len(word)] if at >= 0 else names[0][:shared], names[0][:shared]):
        alone = not any(name.startswith(start) and name.endswith(kind) for name in others)
        if alone and all(name.endswith(kind) for name in names):
            return base / parent / f"{glob.escape(start)}*{kind}"
    return base / parent / names[0]
