"""Random numbers that depend on (seed, image, draw) and on nothing else.

A counter-based generator (SplitMix64, then Box-Muller) instead of a generator with state: an image's noise is the same
in any batch, order, shard or process, and after a resume. All integer work is exact on every device; the two fp64
functions of Box-Muller may differ in the last bit between devices, which float32 rounding almost always hides.

    mix(x):  x += 0x9E3779B97F4A7C15; x = (x ^ x>>30)*0xBF58476D1CE4E5B9; x = (x ^ x>>27)*0x94D049BB133111EB; x ^ x>>31
    key = mix(mix(seed) + draw);  row = mix(key + image);  c_j = mix(row + j)
    u_j = ((c_j >> 11) + 0.5) * 2^-53;   eps_j = sqrt(-2 ln u_j) * cos(2 pi u_{N+j}),  0 <= j < N
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from whence.types import WhenceError


def _signed(value: int) -> int:
    """The int64 with the same bits as this uint64 (torch wraps int64 arithmetic modulo 2^64)."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA, _M1, _M2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors, any shape."""
    x = x + _GAMMA
    x = (x ^ _shift(x, 30)) * _M1
    x = (x ^ _shift(x, 27)) * _M2
    return x ^ _shift(x, 31)


def check_seed(seed: int) -> None:
    """Refuse a seed that `stream` cannot take."""
    if not -(2**63) <= seed < 2**63:
        raise WhenceError(f"{seed} is no whole number of 64 bits", "seed", f"{-(2**63)} to {2**63 - 1}")


def stream(seed: int | Tensor, draw: int | Tensor, image: Tensor) -> Tensor:
    """The start of the random stream of (seed, draw, image): int64, shape of the broadcast arguments.

    Args:
        seed: a number, or numbers.
        draw: number of the draw.
        image: noise key.
    """
    seed, draw = (torch.as_tensor(v, dtype=torch.int64, device=image.device) for v in (seed, draw))
    return mix(mix(mix(seed) + draw) + image)


def counters(rows: Tensor, count: int, start: int = 0) -> Tensor:
    """Random 64-bit words of each stream: [..., count] int64.

    Args:
        rows: starts of the streams [...].
        count: words of each.
        start: number of the first.
    """
    return mix(rows[..., None] + torch.arange(start, start + count, device=rows.device))


def uniforms(rows: Tensor, count: int, start: int = 0) -> Tensor:
    """Uniform numbers in (0, 1) of each stream: [..., count] float64.

    Args:
        rows: starts of the streams [...].
        count: numbers of each.
        start: number of the first.
    """
    return (_shift(counters(rows, count, start), 11).double() + 0.5) * 2.0**-53


def normals(rows: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal arrays of each stream: [..., *shape].

    Args:
        rows: starts of the streams [...].
        shape: of one array.
        dtype: of the result; they are computed in float64.
    """
    size = math.prod(shape)
    radius = torch.sqrt(-2.0 * torch.log(uniforms(rows, size)))
    angle = torch.cos(2.0 * math.pi * uniforms(rows, size, start=size))
    return (radius * angle).to(dtype).reshape(*rows.shape, *shape)


def key_of(digest: str) -> int:
    """The noise key of an image: the first 64 bits of its content digest (hex)."""
    return _signed(int(digest[:16], 16))


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose (timesteps, flips, one parameter block ...), so that streams never overlap."""
    return key_of(hashlib.sha256(f"{seed}/{purpose}".encode()).hexdigest())
