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

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from whence.storage.files import writing


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
