"""One picture decoded: from the bytes of a file to eight bits, upright, and what its header tells. It needs no torch.

The content of a file counts, not its name; what is a program (PostScript) is not read; the huge are refused. `pixels` says
what becomes of a picture then.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from whence.plain import WhenceError
from whence.storage.opening import regular

ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap width and height
PROGRAMS = {"EPS", "WMF"}  # Pillow has others draw them
PIXELS_16 = {"I;16", "I;16L", "I;16B", "I;16N"}


def read_picture(file: Path | io.BytesIO, where: str, channels: int = 3) -> Image.Image:
    """The decoded picture: first frame, upright, 8 bits.

    Args:
        file: of the picture, or its bytes.
        where: its name in errors.
        channels: 3 for mode RGB, 1 for L.
    """
    try:
        with opened(file) as picture:
            kind = picture.format or "picture"
            return _flatten(ImageOps.exif_transpose(picture), kind, "L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise _unreadable(where, error) from error


@contextmanager
def opened(file: Path | io.BytesIO) -> Iterator[Image.Image]:
    """A picture whose header was read. Its content counts, not its name: PostScript is a program, and none is run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large ones are read; Pillow refuses the huge
        picture = Image.open(regular(file) if isinstance(file, Path) else file)
    with picture:
        if picture.format in PROGRAMS:
            raise ValueError(f"{picture.format} is not read")
        yield picture


def _unreadable(where: str, error: Exception) -> WhenceError:
    if isinstance(error, WhenceError):
        return WhenceError(f"{where}: {error.what}; accepted: {error.accepted}")
    if isinstance(error, PermissionError):
        return WhenceError(f"{where}: cannot be read ({error.strerror}); make it readable")
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return WhenceError(f"{where}: more than {most / 1e6:.0f} million pixels; make it smaller, or remove it")
    why = "no known format" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())
    return WhenceError(f"{where}: not a readable image ({why}); replace or remove the file")


def _flatten(picture: Image.Image, kind: str, mode: str) -> Image.Image:
    """Eight bits, no alpha, one colour mode."""
    if picture.mode in PIXELS_16 or (picture.mode == "I" and kind in ("PNG", "PPM")):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        # No range is agreed on for these (0..1? 0..65535?), and Pillow would clip them silently.
        raise ValueError(f"32-bit {kind}; 8-bit and 16-bit pictures are accepted")
    if has_alpha(picture):
        colour = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    return picture.convert(mode)


def has_alpha(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def header_size(file: Path | io.BytesIO, where: str) -> tuple[int, int]:
    """(width, height) of the upright picture, from the file's header: no pixel is decoded."""
    try:
        with opened(file) as picture:
            # Asking a PNG for EXIF data it does not carry up front would decode its pixels.
            known = picture.format != "PNG" or "exif" in picture.info
            turned = known and picture.getexif().get(ORIENTATION, 1) >= 5
            if turned and picture.format == "TIFF":
                picture.load()  # Pillow turns these by itself: some versions on opening, some on decoding
                return picture.size
            return (picture.height, picture.width) if turned else picture.size
    except Exception as error:  # as in read_picture
        raise _unreadable(where, error) from error
