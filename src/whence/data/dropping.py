"""Lists of images to leave out: one name a line, as `whence clean` writes them and a person would.

A name that a line cannot hold (with a line break in it, in quotes, or with space around it) is written as JSON, in quotes.
Empty lines and lines that begin with # say nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from whence.data.images import ImageFolder
from whence.data.layout import some
from whence.storage.files import text_of, write_bytes
from whence.types import WhenceError

HEAD = "# images to leave out, one name a line\n"


def write_names(path: Path, names: Sequence[str]) -> None:
    """A list of names, which `read_names` reads.

    Args:
        path: of the file.
        names: of the images.
    """
    write_bytes(path, (HEAD + "".join(f"{_line(name)}\n" for name in names)).encode("utf-8"))


def _line(name: str) -> str:
    plain = bool(name) and name == name.strip() and name.isprintable() and name[0] not in '"#'
    return name if plain else json.dumps(name)


def read_names(path: Path) -> list[str]:
    """The names in such a file.

    Args:
        path: of the file.
    """
    text = text_of(path, "a text file with the name of an image per line")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            found.append(_read(line, f"{path}, line {number}"))
    return found


def _read(line: str, where: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        name = json.loads(line)
    except ValueError:
        name = None
    if not isinstance(name, str):
        raise WhenceError(f"{line[:80]} is no name", where, 'a name as it is, or as JSON in quotes ("...")')
    return name


def rows_without(names: Sequence[str], path: Path) -> list[int]:
    """The rows that a list leaves. A name that is no image is refused: it would be dropped in thought alone.

    Args:
        names: of the images.
        path: of the list.
    """
    gone, there = set(read_names(path)), set(names)
    unknown = sorted(gone - there)
    if unknown:
        like = f"names as these images have them, like {names[0]}"
        raise WhenceError(
            f"{len(unknown):,} of {len(gone):,} names are no image here: {some(unknown)}", str(path), like
        )
    kept = [row for row, name in enumerate(names) if name not in gone]
    if not kept:
        raise WhenceError("it names every image", str(path), "a list that leaves some")
    return kept


def without(images: ImageFolder, paths: Sequence[Path]) -> ImageFolder:
    """The images that no list names, as if the others did not lie there. Their classes keep their numbers.

    Args:
        images: of a folder.
        paths: of the lists.
    """
    kept = set(range(len(images)))
    for path in paths:
        kept &= set(rows_without(images.ids, path))
    if not kept:
        raise WhenceError("together they name every image", ", ".join(map(str, paths)), "lists that leave some")
    rows = sorted(kept)
    if len(rows) == len(images):
        return images
    return replace(
        images,
        ids=[images.ids[row] for row in rows],
        digests=[images.digests[row] for row in rows],
        meta={name: [column[row] for row in rows] for name, column in images.meta.items()},
        stamps=[images.stamps[row] for row in rows],
        labels=None if images.labels is None else images.labels[rows],
    )
