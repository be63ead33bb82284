"""Pictures that are in memory already, in whatever people have them, and what their numbers mean.

value_range (low, high)   x -> 2 (x - low) / (high - low) - 1, in [-1, 1]
            (-1, 1)       as the network takes them: untouched
            None          not said: untouched, too; a denoiser refuses those that look as if they were in [0, 1]
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from whence.data.pixels import to_x0
from whence.types import WhenceError

Range = tuple[float, float]
READY: Range = (-1, 1)
BYTES: Range = (0, 255)
ACCEPTED = "a tensor or an array [n, C, H, W], a list of PIL pictures, Images, or a folder"
InMemory = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray] | Sequence[Image.Image]


def as_tensor(name: str, given: object, value_range: Range | None = None) -> tuple[Tensor, Range | None]:
    """Pictures as numbers for the network, and what was said of their range. Pictures of PIL say it themselves.

    Args:
        name: what they are, for errors.
        given: a tensor, an array, a list of equal ones, or a list of pictures of PIL.
        value_range: the numbers that are black and white in them, None where nobody says them.
    """
    if isinstance(given, list | tuple) and any(isinstance(one, Image.Image) for one in given):
        if value_range not in (None, BYTES):
            raise WhenceError(f"pictures of PIL have bytes, not {_told(value_range)}", name, "no value_range")
        return _from_pil(name, given), BYTES
    x0 = _numbers(name, given)
    return (x0 if value_range is None else _scaled(name, x0, value_range)), value_range


def _numbers(name: str, given: object) -> Tensor:
    if not isinstance(given, Tensor | np.ndarray | list | tuple):
        raise WhenceError(f"a {type(given).__name__} holds no pictures", name, ACCEPTED)
    try:
        if isinstance(given, np.ndarray):
            x0 = torch.from_numpy(np.asarray(given, order="C"))
        else:
            x0 = given if isinstance(given, Tensor) else torch.stack([torch.as_tensor(one) for one in given])
    except (TypeError, ValueError, RuntimeError) as error:
        raise WhenceError(f"they make no array of pictures ({error})", name, ACCEPTED) from None
    if x0.is_complex():
        raise WhenceError("complex numbers are no pixels", name, ACCEPTED)
    if x0.ndim == 0 or x0.layout != torch.strided or x0.is_meta or x0.is_quantized:
        kind = "one number" if x0.ndim == 0 else "a sparse, quantized or empty shell of a tensor"
        raise WhenceError(f"{kind} holds no pictures", name, ACCEPTED)
    if not x0.numel():
        raise WhenceError(f"shape {list(x0.shape)}: there is no picture", name, ACCEPTED)
    if x0.is_floating_point() and x0.dtype.itemsize == 1:  # 8 bits know no arithmetic
        return x0.detach().float()
    return x0.detach().long() if x0.dtype in (torch.uint16, torch.uint32, torch.uint64) else x0.detach()


def _from_pil(name: str, given: Sequence[object]) -> Tensor:
    pictures = [one for one in given if isinstance(one, Image.Image)]
    kinds = {(one.mode, one.size) for one in pictures}
    if len(pictures) < len(given) or len(kinds) > 1 or {mode for mode, _ in kinds} - {"L", "RGB"}:
        others = {type(one).__name__ for one in given if not isinstance(one, Image.Image)}
        found = sorted({f"{mode} {width}x{height}" for mode, (width, height) in kinds} | others)
        raise WhenceError(
            f"pictures of PIL as {', '.join(found[:4])}",
            name,
            "all RGB or all L, all of one size: x.convert('RGB').resize((side, side))",
        )
    arrays = [np.asarray(one).reshape(one.height, one.width, -1).transpose(2, 0, 1) for one in pictures]
    return to_x0(np.stack(arrays))


def _scaled(name: str, x0: Tensor, value_range: Range) -> Tensor:
    """The pictures in [-1, 1]; a range that they plainly do not have is refused."""
    try:
        low, high = (0.0, 0.0) if isinstance(value_range, str) else (float(end) for end in value_range)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not -np.inf < low < high < np.inf:
        accepted = "(0, 1), (0, 255), or (-1, 1) for what the network takes as it is"
        raise WhenceError(f"{value_range!r} is no range", "value_range", accepted)
    if (low, high) == READY or not x0.numel():
        return x0
    x = x0 if x0.dtype == torch.float64 else x0.float()
    least, most = span(x)
    slack = (high - low) / 1000  # rounding
    if not (low - slack <= least <= most <= high + slack):
        raise WhenceError(f"they go from {least:g} to {most:g}", name, f"values in {_told(value_range)}, as is said")
    if least < most < low + (high - low) / 100:
        accepted = f"value_range={_told(likely(least, most))}, or (-1, 1) for what the network takes as it is"
        raise WhenceError(f"they go from {least:g} to {most:g}, a hundredth of {_told(value_range)}", name, accepted)
    return (x - low) / ((high - low) / 2) - 1


def span(x: Tensor) -> Range:
    """The least and the largest of some numbers."""
    least, most = torch.aminmax(x)
    return float(least), float(most)


def likely(least: float, most: float) -> Range | None:
    """The range that numbers seem to have, None where it is as the network takes them: as there are pictures in both
    ranges, those of many that never fall below zero are none in [-1, 1]. A little below counts as zero: pictures that were
    resized overshoot."""
    if most <= 0 or least < -most / 10:
        return None
    return next((one for one in ((0, 1), BYTES, (0, 65535)) if most < 2 * one[1]), (0, most))


def _told(value_range: Range | None) -> str:
    return "None" if value_range is None else f"({value_range[0]:g}, {value_range[1]:g})"
