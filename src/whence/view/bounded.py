"""What was made once and is kept while there is room for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

MOST = 64 * 2**20  # bytes


class Bounded:
    """Bytes by their keys; what was asked for longest ago goes first.

    Args:
        most: bytes that are kept.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most, self.held = most, 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], bytes]) -> bytes:
        """What was made for a key, made now where it is not kept. Two who ask at once may both make it."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self.held += len(made) - len(self._kept.get(key, b""))
            self._kept[key] = made
            self._kept.move_to_end(key)
            while self.held > self.most and len(self._kept) > 1:
                _, gone = self._kept.popitem(last=False)
                self.held -= len(gone)
        return made
