"""How alike pictures look, for a glance beside the scores: the cosine of 16 x 16 grey pixels, their mean taken away."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np

from whence.plain import WhenceError
from whence.view.pictures import HEAD, Hidden, Pictures

MOST = 10_000  # training images that are looked at for it: each must be decoded once


@dataclass
class Similarity:
    """The training images as they are compared, made when they are first asked for.

    Args:
        train, queries: the pictures; None where they are not shown.
    """

    train: Pictures | None
    queries: Pictures | None
    _made: np.ndarray | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def why_not(self) -> str:
        """Why there is none; "" where there is."""
        if self.train is None or self.queries is None:
            return "the pictures are not there"
        count = len(self.train.names)
        return "" if count <= MOST else f"of {count:,} images this takes too long: `--method pixel_cosine` keeps it"

    def of(self, query: int) -> np.ndarray:
        """Cosines of a query and every training image [n] float32; NaN for pictures that are not shown."""
        if self.train is None or self.queries is None or self.why_not:
            raise WhenceError(self.why_not, "similarity")
        with self._lock:
            if self._made is None:
                self._made = np.stack([_compared(self.train, row) for row in range(len(self.train.names))])
        return np.asarray(self._made @ _compared(self.queries, query), "<f4")


def _compared(pictures: Pictures, row: int) -> np.ndarray:
    try:
        return pictures.compared(row)
    except Hidden:
        return np.full(HEAD * HEAD, np.nan, np.float32)
