"""Feature rows at each half of the draws of every image: what says how far they would move with other draws.

The rows at all draws are a mean of the two, so that this takes twice the room on disk and no further pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from whence.diffusion.draws import Draws
from whence.diffusion.halves import Half
from whence.features.parts import Averaged, Part
from whence.features.rows import rows
from whence.storage.arrays import Rows
from whence.types import Checkpoint, Images, Task


@dataclass(frozen=True)
class Halves:
    """Rows on disk at each half of the draws.

    Args:
        first: at the first half.
        second: at the other.
        share: of the draws that are in the first.
    """

    first: Rows
    second: Rows
    share: float

    def at(self, step: float) -> Rows:
        """mean + step Delta: the rows at all draws, moved by a part of what other draws might move them."""
        a, b = shares(self.share, 1.0, step)
        return self.first.plus(a, self.second, b)

    def moved(self) -> Rows:
        """Delta."""
        a, b = shares(self.share, 0.0, 1.0)
        return self.first.plus(a, self.second, b)

    def all(self) -> Pair:
        """The same in memory: for queries."""
        return Pair(self.first.all().double(), self.second.all().double(), self.share)


@dataclass(frozen=True)
class Pair:
    """Rows in memory at each half of the draws: float64; see `Halves`."""

    first: Tensor
    second: Tensor
    share: float

    def at(self, step: float) -> Tensor:
        """mean + step Delta."""
        a, b = shares(self.share, 1.0, step)
        return a * self.first + b * self.second

    def moved(self) -> Tensor:
        """Delta."""
        a, b = shares(self.share, 0.0, 1.0)
        return a * self.first + b * self.second


def shares(share: float, mean: float, step: float) -> tuple[float, float]:
    """What `mean` times the mean plus `step` times Delta takes of either half (see `diffusion.halves`).

    Args:
        share: of the draws that are in the first half.
        mean: of the mean.
        step: of Delta.
    """
    root = (share * (1 - share)) ** 0.5
    return mean * share + step * root, mean * (1 - share) - step * root


def halves_of(part: Part) -> tuple[Part, Part]:
    """A part whose rows are means over draws, at each half of them."""
    assert isinstance(part, Averaged)
    draws = cast(Draws, part.draws)
    first, second = (replace(part, draws=Half(draws, number)) for number in (0, 1))  # type: ignore[type-var]
    return first, second


def share_of(part: Part) -> float:
    """The share of its draws that is in the first half."""
    assert isinstance(part, Averaged)
    return Half(cast(Draws, part.draws), 0).count / part.draws.count


def in_halves(part: Part, task: Task, checkpoint: Checkpoint, images: Images, what: str) -> Halves:
    """The rows of a part at each half of its draws, each computed and stored where it is not there.

    Args:
        part: whose rows are means over draws.
        task: the question.
        checkpoint: the weights at which features are measured.
        images: n of them.
        what: for the progress bar and errors.
    """
    first, second = (rows(half, task, checkpoint, images, what) for half in halves_of(part))
    return Halves(first, second, share_of(part))
