"""Which images surely come before others, by scores and their standard errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SURE = 2.58
"""Standard errors of a difference: of two images that deserve the same score, one is said to be above the other in 1 of 100
cases. With 1.96 (1 of 20) too much is said of the images that are first, which are there because they were lucky, too:
benchmarks/results/errors.json counts both."""


def surely(row: Tensor, stderr: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Which images are surely above some of them, and which surely below: where |s_i - s_j| > 2.58 sqrt(e_i^2 + e_j^2).

    Args:
        row: scores s [n].
        stderr: e [n]; NaN where nothing is known.
        some: columns [k]; the answers are [k, n].
    """
    row, variance = row.double(), stderr.double().square().nan_to_num(torch.inf)
    apart, sure = row - row[some, None], SURE * (variance + variance[some, None]).sqrt()
    return apart > sure, apart < -sure


def ranks_between(row: Tensor, stderr: Tensor, images: Sequence[int]) -> list[tuple[int, int]]:
    """The ranks (0 = highest score) that each of some images may have: the lowest and the highest.

    Those surely above it come before it, those surely below it after it, and any other may stand on either side.

    Args:
        row: scores [n].
        stderr: theirs [n].
        images: columns.
    """
    found: list[tuple[int, int]] = []
    for some in torch.tensor(list(images), dtype=torch.int64).split(256):  # 256 x n numbers at once
        above, below = surely(row, stderr, some)
        last = len(row) - 1 - below.sum(1)
        found += zip(above.sum(1).tolist(), last.tolist(), strict=True)
    return found
