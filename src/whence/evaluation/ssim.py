"""Multi-scale structural similarity of pictures (Wang, Simoncelli & Bovik 2003).

    l  = (2 m_a m_b + C1) / (m_a^2 + m_b^2 + C1)        cs = (2 s_ab + C2) / (s_a^2 + s_b^2 + C2)
    MS-SSIM = mean(l_M cs_M)^w_M  prod_{j < M} mean(cs_j)^w_j

with means m, variances s^2 and covariances s_ab in Gaussian windows of 11 x 11 px (standard deviation 1.5) that lie whole
in the picture, C1 = (.01 R)^2, C2 = (.03 R)^2 for numbers of range R, means over places and channels, and every scale half
the size of the one before, by means of 2 x 2 px. A mean below 0 counts as 0: it has no such powers.

Pictures that are too small for all scales are compared at those that fit, the first weights scaled to the sum of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from whence.types import WhenceError

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of the five scales, the largest picture first (Wang et al. 2003)."""
WINDOW, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03


def scales_that_fit(height: int, width: int, most: int = len(WEIGHTS)) -> int:
    """How many times a picture can be looked at, each time half as large, with a whole window in it.

    Args:
        height: in px.
        width: in px.
        most: no more than these.
    """
    count, side = 0, min(height, width)
    while count < most and side >= WINDOW:
        count, side = count + 1, side // 2
    return count


def ms_ssim(a: Tensor, b: Tensor, value_range: float = 1.0, weights: Sequence[float] = WEIGHTS) -> tuple[Tensor, int]:
    """MS-SSIM of each pair [b], and the number of scales that it was computed at.

    Args:
        a: pictures [b, C, H, W].
        b: others [b, C, H, W].
        value_range: R, the distance from black to white.
        weights: w of each scale, the largest picture first.

    Raises:
        WhenceError: pictures of other shapes, or with a side below 11 px.
    """
    if a.shape != b.shape or a.ndim != 4:
        raise WhenceError(f"pictures {list(a.shape)} and {list(b.shape)}", "ms_ssim", "two of [b, C, H, W]")
    count = scales_that_fit(a.shape[2], a.shape[3], len(weights))
    if not count:
        raise WhenceError(f"pictures of {a.shape[3]}x{a.shape[2]}", "ms_ssim", f"sides of {WINDOW} px or more")
    used = torch.tensor(weights[:count], dtype=torch.float64) * (sum(weights) / sum(weights[:count]))
    a, b = a.double(), b.double()
    found = torch.ones(len(a), dtype=torch.float64, device=a.device)
    for scale, weight in enumerate(used.tolist(), 1):
        light, structure = _terms(a, b, value_range)
        values = light * structure if scale == count else structure
        found = found * values.flatten(1).mean(1).clamp(min=0) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return found, count


def _terms(a: Tensor, b: Tensor, value_range: float) -> tuple[Tensor, Tensor]:
    """l and cs at every place: [b, C, h, w] each."""
    c1, c2 = (K1 * value_range) ** 2, (K2 * value_range) ** 2
    m_a, m_b = _windows(a), _windows(b)
    var_a, var_b, cov = _windows(a * a) - m_a**2, _windows(b * b) - m_b**2, _windows(a * b) - m_a * m_b
    return (2 * m_a * m_b + c1) / (m_a**2 + m_b**2 + c1), (2 * cov + c2) / (var_a + var_b + c2)


def _windows(x: Tensor) -> Tensor:
    """Means in Gaussian windows that lie whole in the picture."""
    places = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - (WINDOW - 1) / 2
    line = torch.exp(-(places**2) / (2 * SPREAD**2))
    line = line / line.sum()
    flat = x.flatten(0, 1)[:, None]
    found = F.conv2d(F.conv2d(flat, line[None, None, :, None]), line[None, None, None, :])
    return found.reshape(*x.shape[:2], *found.shape[2:])
