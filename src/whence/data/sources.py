"""Which kind of data set lies at a path: image files, or one of the packed kinds of `SOURCES`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from whence.data.folder import folder_layout
from whence.data.layout import SPLITS, Files, Finding, Layout, is_image, is_metadata, some, walk
from whence.data.parquet import table_layout
from whence.data.webdataset import tar_layout

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
        try:
            files = list(walk(path))
        except OSError as error:
            what = f"cannot be listed ({error.strerror})"
            return _nothing(Finding("error", what, str(error.filename), "make the folder readable"))
        packed = [name for name in files if _is_packed(name)]
        if not packed or any(is_image(name) or is_metadata(name) for name in files):
            return folder_layout(path, files)
        return _packed(path, packed, path)
    if _is_packed(path.name) and path.is_file():
        return _packed(path.parent, [path.name], path)
    matching = sorted(found.name for found in path.parent.glob(path.name)) if "*" in path.name else []
    if matching and all(_is_packed(name) for name in matching):
        return _packed(path.parent, matching, path)
    what = "is not a folder" if path.exists() else "no such folder"
    *others, last = SOURCES
    fix = f"give a folder of images, or {', '.join(others)} or {last} files (a folder of them, one, or a pattern like "
    return _nothing(Finding("error", what, str(path), f"{fix}train-*.tar)"))


def _is_packed(name: str) -> bool:
    return Path(name).suffix in SOURCES


def _nothing(finding: Finding) -> Layout:
    return Layout(Files(Path(finding.where)), findings=[finding])


def _packed(base: Path, shards: Sequence[str], given: Path) -> Layout:
    kinds = sorted({Path(name).suffix for name in shards})
    if len({SOURCES[kind] for kind in kinds}) > 1:
        what = f"holds {' and '.join(kinds)} files"
        return _nothing(Finding("error", what, str(given), "give one kind of them"))
    splits = sorted({split for name in shards if (split := split_of(name))})
    if len(splits) > 1:
        first = next(name for name in shards if split_of(name) == splits[0])
        one = base / Path(first).parent / f"{splits[0]}*{Path(first).suffix}"
        what = f"holds splits ({some(splits)}), not images of one data set"
        return _nothing(Finding("error", what, str(given), f"give one of them, such as '{one}'"))
    return SOURCES[kinds[0]](base, shards)


def split_of(name: str) -> str | None:
    """The split that a shard is named after: `train-00000-of-00002.parquet`, `val/000.tar`."""
    *folders, last = Path(name).parts
    words = [*(folder.lower() for folder in folders), re.split(r"[-_.]", last.lower())[0]]
    return next((word for word in words if word in SPLITS), None)
