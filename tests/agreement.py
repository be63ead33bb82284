"""The law of all tests: two ways of computing a thing agree in float64, or up to a share of the size of that thing.

How float32 rounds is the processor's affair, and it rounds relative to what it adds up: an absolute tolerance on numbers
of any size asks too much of large ones and nothing of small ones. Equal bits are asked only of the same code on the same
numbers (going on, the order, the batch).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def close(found: Any, expected: Any, relative: float = 1e-5) -> None:
    """max |found - expected| <= relative * max |expected|, worked out in float64; shapes are the same, nothing is NaN."""
    a, b = (np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x, np.float64) for x in (found, expected))
    assert a.shape == b.shape, f"shape {a.shape} for {b.shape}"
    apart, size = float(np.abs(a - b).max(initial=0)), float(np.abs(b).max(initial=0))
    assert apart <= relative * size, f"apart by {apart:.2e} at a size of {size:.2e}; accepted: {relative} of it"
