"""Pictures written as PNG files with their metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from whence.data.images import refuse_repeated
from whence.data.pixels import to_pixels, write_picture
from whence.storage.files import building, write_bytes
from whence.types import WhenceError


def save_png(
    folder: str | Path, images: Tensor, names: Sequence[str], metadata: Sequence[Mapping[str, object]] | None = None
) -> Path:
    """Write images as 8-bit PNGs with a metadata.jsonl, for `image_folder` to read back.

    The folder appears whole, by one rename, or not at all.

    Args:
        folder: a new or empty one.
        images: [b, C, H, W] in [-1, 1].
        names: file names inside the folder; ".png" is added where absent. Rows are read back sorted by name, so number
            them with leading zeros.
        metadata: one mapping of free columns per image; None for none.
    """
    folder = Path(folder)
    names = [name if name.endswith(".png") else f"{name}.png" for name in names]
    rows = [{}] * len(images) if metadata is None else [dict(row) for row in metadata]
    _check_savable(folder, images, names, rows)
    lines = [_metadata_line(name, row) for name, row in zip(names, rows, strict=True)]
    with building(folder) as new:
        for name, pixels in zip(names, to_pixels(images), strict=True):
            write_picture(new / name, pixels)
        write_bytes(new / "metadata.jsonl", "".join(lines).encode())
        os.replace(new, folder)
    return folder


def _check_savable(folder: Path, images: Tensor, names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise WhenceError(f"images have shape {list(images.shape)}; [b, 1 or 3, height, width] is accepted")
    if not len(images) == len(names) == len(rows):
        raise WhenceError(f"{len(images)} images, {len(names)} names, {len(rows)} rows of metadata; give one per image")
    for name, image in zip(names, images, strict=True):
        parts = name.split("/")
        if "\\" in name or any(not part or part.startswith((".", "__")) for part in parts):
            # A hidden file would be written and then never read back; a backslash is read as a slash.
            raise WhenceError(f"name {name!r}: accepted are relative names with no hidden part")
        if not torch.isfinite(image).all():
            raise WhenceError(f"image {name!r} has values that are not finite")
    refuse_repeated(names)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WhenceError(f"{folder}: exists and is not empty; give a new folder")


def _metadata_line(name: str, row: Mapping[str, object]) -> str:
    if "file_name" in row:
        raise WhenceError(f"metadata of {name!r} has a column `file_name`; it is written from the names")
    try:
        return json.dumps({"file_name": name, **row}, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise WhenceError(f"metadata of {name!r} cannot be written as JSON ({error})") from error
