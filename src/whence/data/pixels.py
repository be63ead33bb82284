"""One picture: from a file to 8-bit pixels and back.

What a picture becomes, in this order:

    decode -> EXIF orientation -> 8 bits -> alpha over white -> RGB (or L) -> resize -> centre crop -> pixel / 127.5 - 1

* Only the first frame of an animation is read. Colour profiles are ignored, as in diffusers' training scripts.
* 16-bit grey keeps its high byte, which is what Pillow itself does to 16-bit colour; 32-bit pictures are refused.
* Palette, CMYK, YCbCr, LAB, HSV and 1-bit pictures are converted by Pillow.
* Resize is diffusers' `Resize(resolution)`: bilinear, shorter side to `resolution`, longer side rounded down.

Differs from diffusers' scripts: the crop is always the centre one (they crop at random unless `--center_crop`) and
there is no random flip, because a row must be the same each time it is read; transparent pixels become white (they drop
alpha and so show whatever colour lies beneath).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from whence.storage.files import writing
from whence.storage.opening import regular
from whence.types import WhenceError

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


def fit(picture: Image.Image, resolution: int | None) -> Image.Image:
    """Shorter side to `resolution` (bilinear), then the centre square; None leaves the picture as it is."""
    if resolution is None:
        return picture
    width, height = _resized(picture.size, resolution)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    return picture.crop((left, top, left + resolution, top + resolution))


def is_cropped(size: tuple[int, int], resolution: int | None) -> bool:
    """Whether `fit` leaves out parts of a picture of this size: one that is not square."""
    return resolution is not None and _resized(size, resolution) != (resolution, resolution)


def _resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    width, height = (int(resolution * side / min(size)) for side in size)
    return width, height


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


def to_x0(pixels: np.ndarray) -> Tensor:
    """uint8 [b, C, H, W] -> float32 in [-1, 1]."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """[b, C, H, W] in [-1, 1] -> uint8: round((x + 1) * 127.5), clamped. The inverse of `to_x0`."""
    return ((images.detach().float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_picture(path: Path, pixels: Tensor) -> None:
    """Write uint8 pixels [1 or 3, H, W] as a PNG, and wait until they are on the disk."""
    array = pixels.permute(1, 2, 0).numpy()
    with writing(path) as temporary:
        Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0]).save(temporary, "PNG")
