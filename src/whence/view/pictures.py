"""The pictures of one side of a run, by their rows: compared with their digests, decoded, and made small once.

Nobody names a file: a picture is asked for by its number, what is read lies in the folder of the images, a link out of it
is not followed, and bytes whose digest is another one than the scores were computed for are not shown. What is sent was
drawn anew from the decoded pixels: the bytes of a file never are.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from whence.data.decoding import header_size, read_picture
from whence.data.layout import PictureSource
from whence.plain import WhenceError
from whence.storage.files import bytes_digest
from whence.view.bounded import Bounded

Size = Literal["thumb", "picture"]
SIDES: dict[str, int] = {"thumb": 160, "picture": 1024}  # px, the longest side
LARGEST = 2**28  # bytes of a file
PIXELS = 100_000_000
SMALL = 64  # px: what is not larger may be drawn by hand, and keeps its hard edges
HEAD = 16  # px of the pictures that are compared


class Hidden(Exception):
    """Why a picture is not shown, in words."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Where the pictures of one side are.

    Args:
        source: files, shards or tables.
        folder: that they lie in.
        names: of the rows in it.
        digests: of the bytes of each.
        kept: what was made of them.
    """

    source: PictureSource
    folder: Path
    names: Sequence[str]
    digests: Sequence[str]
    kept: Bounded = field(default_factory=Bounded, repr=False)
    reading: threading.Lock = field(default_factory=threading.Lock, repr=False)  # tables are read by one at a time
    decoding: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(2), repr=False)

    def shown(self, row: int, size: Size) -> bytes:
        """A picture as PNG, or as JPEG where it is a large photograph.

        Args:
            row: of it.
            size: "thumb" or "picture".

        Raises:
            Hidden: it cannot be shown; why.
        """

        def made() -> bytes:
            with self.decoding:  # large ones need room
                return drawn(self.decoded(row), SIDES[size])

        return self.kept.get((row, size), made)

    def decoded(self, row: int) -> Image.Image:
        """A picture, if it is the one that was scored."""
        content = self._content(row)
        if bytes_digest(content) != self.digests[row]:
            raise Hidden("the file is not the picture that was scored: it was changed since")
        try:
            width, height = header_size(io.BytesIO(content), self.names[row])
            if width * height > PIXELS:
                raise Hidden(f"{width * height / 1e6:.0f} million pixels are too many to be shown")
            return read_picture(io.BytesIO(content), self.names[row])
        except WhenceError:
            raise Hidden("the file cannot be read as a picture") from None

    def _content(self, row: int) -> bytes:
        """Its bytes, read from a file below the folder."""
        name = self.names[row]
        try:
            holder = self.source.holder(name)
            if holder is not None and not within(holder, self.folder):
                raise Hidden("a link that leads out of the folder of the images is not followed")
            with self.reading:
                file = self.source.file(name)
            if isinstance(file, io.BytesIO):
                return file.getvalue()
            if not file.is_file():
                raise Hidden("the file is not there any more")
            with file.open("rb") as opened:
                content = opened.read(LARGEST + 1)
        except (OSError, WhenceError, ValueError) as error:
            raise Hidden("the file cannot be read") from error
        if len(content) > LARGEST:
            raise Hidden("the file is too large to be shown")
        return content

    def compared(self, row: int) -> np.ndarray:
        """A picture as 16 x 16 grey numbers whose mean is 0 and whose length is 1: their products are cosines."""
        grey = self.decoded(row).convert("L").resize((HEAD, HEAD), Image.Resampling.BOX)
        numbers = np.asarray(grey, np.float32).ravel()
        numbers = numbers - numbers.mean()
        return numbers / (float(np.linalg.norm(numbers)) or 1.0)


def within(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder once all links are followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def drawn(picture: Image.Image, side: int) -> bytes:
    """A picture drawn anew, at most `side` px large. Small drawings are enlarged with hard edges, so that every browser
    shows the pixels that there are."""
    longest = max(picture.size)
    if longest <= SMALL and pixel_art(picture):
        factor = max(1, min(side, 512) // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if longest <= SMALL:
        picture.save(buffer, "PNG")
    else:
        picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def pixel_art(picture: Image.Image) -> bool:
    """Drawings of a few pixels or a few colours; photographs are scaled smoothly. As the report has it."""
    return max(picture.size) <= 16 or picture.getcolors(maxcolors=32) is not None or grey(picture)


def grey(picture: Image.Image) -> bool:
    """Whether all pixels are grey."""
    pixels = np.asarray(picture)
    return bool((pixels == pixels[..., :1]).all())
