"""The draws of an image in two halves, which say how far its measurements would move with other draws.

A = draws 0, 3, 4, 7, 8 ...   B = draws 1, 2, 5, 6, 9 ...    (ABBA: what rises or falls steadily with the draws cancels)
mean = w_A mean_A + w_B mean_B,   w: shares of the draws
Delta = sqrt(w_A w_B) (mean_A - mean_B)                     has the variance of the mean, where draws are independent
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from whence.diffusion.draws import Draws
from whence.types import Draw, WhenceError


@dataclass(frozen=True)
class Half:
    """Half of the draws of another rule, with the timesteps and the noise that they have there.

    Antithetic pairs and groups of draws that are divided by one norm stay together.

    Args:
        draws: the other rule.
        number: of the half, 0 or 1.
    """

    draws: Draws
    number: int

    def __post_init__(self) -> None:
        if self.number not in (0, 1) or not can_be_halved(self.draws):
            raise WhenceError(
                f"half {self.number} of {self.draws.count} draws", accepted="0 or 1, of two draws or more"
            )

    @property
    def numbers(self) -> list[int]:
        """Which draws these are."""
        size = together(self.draws)
        return [b * size + i for b in abba(self.draws.count // size)[self.number] for i in range(size)]

    @property
    def count(self) -> int:
        return len(self.numbers)

    @property
    def unit(self) -> bool:
        return self.draws.unit

    @property
    def group(self) -> int:
        return self.draws.group

    def __call__(
        self, keys: torch.Tensor, shape: Sequence[int], total: int, dtype: torch.dtype = torch.float32
    ) -> Draw:
        drawn, here = self.draws(keys, shape, total, dtype), self.numbers
        return Draw(drawn.t[:, here], drawn.noise[:, here])


def abba(count: int) -> tuple[list[int], list[int]]:
    """0, 3, 4, 7 ... and 1, 2, 5, 6 ... below a number."""
    first = [number for number in range(count) if number % 4 in (0, 3)]
    return first, [number for number in range(count) if number % 4 in (1, 2)]


def together(draws: Draws) -> int:
    """Successive draws that are not independent of each other, or are divided by one norm."""
    return math.lcm(draws.group if draws.unit else 1, 2 if draws.antithetic else 1)


def can_be_halved(draws: object) -> bool:
    """Whether halves of these draws say how far apart others would be: not one draw alone."""
    return isinstance(draws, Draws) and draws.count >= 2 * together(draws)
