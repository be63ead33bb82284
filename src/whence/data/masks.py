"""Masks: pictures that say which part of another picture is asked about. White is, black is not, grey counts in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whence.data.decoding import has_alpha, opened, read_picture
from whence.data.pixels import write_picture
from whence.storage.arrays import tensor_digest
from whence.types import WhenceError

ACCEPTED = "a grey picture: white where it is asked about, black where not"


@dataclass(frozen=True)
class Mask:
    """A mask as it was drawn.

    Args:
        digest: of the pixels.
        pixels: uint8 [height, width].
        where: its name, in errors.
    """

    digest: str
    pixels: Tensor = field(repr=False, compare=False)
    where: str = field(default="mask", compare=False)

    @property
    def share(self) -> float:
        """How much of the picture is asked about, 0 to 1."""
        return float(self.pixels.double().mean()) / 255

    def at(self, shape: Sequence[int]) -> Tensor:
        """The mask at the resolution of a network, from 0 to 1, float64: each place has the mean over its area.

        Args:
            shape: of what the network sees of a picture; its last two axes are height and width.
        """
        seen, own = tuple(shape[-2:]), tuple(self.pixels.shape)
        if len(shape) < 2 or seen[0] * own[1] != seen[1] * own[0]:
            told = f"{own[1]}x{own[0]}, but the network sees pictures of {'x'.join(map(str, reversed(seen)))}"
            raise WhenceError(told, self.where, "a mask of the same aspect, of the pictures as they are cropped")
        rows, columns = (_areas(small, large) for small, large in zip(seen, own, strict=True))
        return (rows @ (self.pixels.double() / 255) @ columns.T).clamp(0, 1)

    def save(self, folder: Path) -> None:
        """Keep it as FOLDER/DIGEST.png."""
        write_picture(folder / f"{self.digest}.png", self.pixels[None])


def _areas(to: int, of: int) -> Tensor:
    """How much of each of `to` equal pieces of a length lies in each of `of` equal pieces of it: [to, of], rows sum to 1."""
    # In units of 1 / (to * of) of the length all ends are whole numbers, so that a mask of the same size stays as it is.
    start, here = torch.arange(to)[:, None] * of, torch.arange(of)[None] * to
    overlap = torch.minimum(start + of, here + to) - torch.maximum(start, here)
    return overlap.clamp(min=0).double() / of


def read_mask(path: str | Path) -> Mask:
    """The mask in a file.

    Raises:
        WhenceError: it cannot be read, has colours or transparent places, or is black everywhere.
    """
    path = Path(path)
    if not path.is_file():
        raise WhenceError("it is a folder" if path.is_dir() else "there is no such file", str(path), ACCEPTED)
    colours = np.asarray(read_picture(path, str(path)))
    with opened(path) as picture:
        if has_alpha(picture):
            raise WhenceError("it has transparent places, which are neither black nor white", str(path), ACCEPTED)
    if (colours != colours[:, :, :1]).any():
        raise WhenceError("it has colours", str(path), ACCEPTED)
    pixels = torch.from_numpy(colours[:, :, 0].copy())
    if not bool(pixels.any()):
        raise WhenceError("it is black everywhere: nothing is asked about", str(path), ACCEPTED)
    return Mask(tensor_digest(pixels)[:16], pixels, str(path))
