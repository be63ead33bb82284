"""Which kind of data set lies at a path: image files, webdataset shards, Parquet or Arrow files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from whence.data import folder
from whence.data import parquet as tables
from whence.data import webdataset as tarfiles
from whence.data.layout import SPLITS, Files, Finding, Layout, is_image, is_metadata, some, walk

PACKED = {".tar": tarfiles.tar_layout, ".parquet": tables.table_layout, ".arrow": tables.table_layout}

FIX = (
    "give a folder of images, or .tar, .parquet or .arrow files (a folder of them, one, or a pattern like train-*.tar)"
)


def layout_of(path: Path) -> Layout:
    """What a data set holds; everything wrong with it is among its findings."""
    if path.is_dir():
        try:
            files = list(walk(path))
        except OSError as error:
            what = f"cannot be listed ({error.strerror})"
            return _nothing(Finding("error", what, str(error.filename), "make the folder readable"))
        packed = [name for name in files if Path(name).suffix in PACKED]
        if not packed or any(is_image(name) or is_metadata(name) for name in files):
            return folder.folder_layout(path, files)
        return _packed(path, packed, path)
    if path.suffix in PACKED and path.is_file():
        return _packed(path.parent, [path.name], path)
    matching = sorted(found.name for found in path.parent.glob(path.name)) if "*" in path.name else []
    if matching and all(Path(name).suffix in PACKED for name in matching):
        return _packed(path.parent, matching, path)
    what = "is not a folder" if path.exists() else "no such folder"
    return _nothing(Finding("error", what, str(path), FIX))


def _nothing(finding: Finding) -> Layout:
    return Layout(Files(Path(finding.where)), findings=[finding])


def _packed(base: Path, shards: Sequence[str], asked: Path) -> Layout:
    kinds = sorted({Path(name).suffix for name in shards})
    if len({PACKED[kind] for kind in kinds}) > 1:
        what = f"holds {' and '.join(kinds)} files"
        return _nothing(Finding("error", what, str(asked), "give one kind of them"))
    splits = sorted({split for name in shards if (split := split_of(name))})
    if len(splits) > 1:
        first = next(name for name in shards if split_of(name) == splits[0])
        one = base / Path(first).parent / f"{splits[0]}*{Path(first).suffix}"
        what = f"holds splits ({some(splits)}), not images of one data set"
        return _nothing(Finding("error", what, str(asked), f"give one of them, such as '{one}'"))
    return PACKED[kinds[0]](base, shards)


def split_of(name: str) -> str | None:
    """The split that a shard is named after: `train-00000-of-00002.parquet`, `val/000.tar`."""
    *folders, last = Path(name).parts
    words = [*(folder.lower() for folder in folders), re.split(r"[-_.]", last.lower())[0]]
    return next((word for word in words if word in SPLITS), None)
