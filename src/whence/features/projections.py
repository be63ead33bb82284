"""Compression of gradients: a row of d numbers -> k numbers whose inner products are those of the rows, on average.

Every entry is a function of (seed, block name, row, column) alone: the same on every device, under any sharding, and the
first k' columns of a wider projection are the narrower one (up to the factor 1/sqrt(k)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from whence.diffusion.noise import counters, mix, seed_for, uniforms
from whence.types import Blocks, WhenceError

ENTRIES_AT_ONCE = 2**24  # entries of the matrix held at a time (64 MiB; of a sparse one 128)
ROWS_AT_ONCE = 32  # rows of gradients in one product


Shapes = Mapping[str, tuple[int, ...]]  # parameter name -> its shape


class Projection(Protocol):
    """A compression of gradient rows."""

    def width(self, shapes: Shapes) -> int:
        """Columns of the result for gradients of parameters of these shapes; an error where they do not fit."""
        ...

    def __call__(self, blocks: Blocks) -> Tensor:
        """Gradients in the shapes of their parameters, [b, *shape] each -> [b, width]."""
        ...


def _flat(block: Tensor) -> Tensor:
    """[b, *shape] -> [b, size]; a view of what is contiguous."""
    return block.reshape(len(block), -1)


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Identity:
    """No compression: the blocks side by side, exact and d wide."""

    def width(self, shapes: Shapes) -> int:
        return sum(_sizes(shapes).values())

    def __call__(self, blocks: Blocks) -> Tensor:
        return torch.cat([_flat(block) for block in blocks.values()], dim=1)


def _fits(k: int, shapes: Shapes) -> int:
    total = sum(_sizes(shapes).values())
    if not 1 <= k <= total:
        raise WhenceError(
            f"projection dim {k}: there are {total} parameters; accepted: 1 to {total}, or no projection (--dim 0; dim=None "
            "in Python)"
        )
    return k


def _dense(blocks: Blocks, k: int, entries: _Entries) -> Tensor:
    """sum over blocks of block @ P_block / sqrt(k), with P made a slab of rows at a time."""
    first = next(iter(blocks.values()))
    total = torch.zeros(len(first), k, dtype=first.dtype, device=first.device)
    slab = max(1, ENTRIES_AT_ONCE // k)
    for name, block in blocks.items():
        flat = _flat(block)
        for start in range(0, flat.shape[1], slab):
            stop = min(start + slab, flat.shape[1])
            _add_product(total, flat[:, start:stop], entries(name, start, stop, k).to(flat))
    return total / math.sqrt(k)


def _add_product(total: Tensor, rows: Tensor, matrix: Tensor) -> None:
    """total += rows @ matrix, always ROWS_AT_ONCE rows at a time.

    The order in which a product is summed depends on its number of rows, and with it the last bits of each row; a row must
    not depend on its company.
    """
    for start in range(0, len(rows), ROWS_AT_ONCE):
        few = rows[start : start + ROWS_AT_ONCE]
        if len(few) < ROWS_AT_ONCE:
            few = torch.cat([few, few.new_zeros(ROWS_AT_ONCE - len(few), few.shape[1])])
        total[start : start + ROWS_AT_ONCE] += (few @ matrix)[: len(rows) - start]


class _Entries(Protocol):
    def __call__(self, name: str, start: int, stop: int, k: int) -> Tensor: ...


@dataclass(frozen=True)
class Rademacher:
    """Entries of random sign, +-1/sqrt(k): column j of row i is bit j mod 64 of a word hashed from (block, i, j // 64).

    Args:
        k: columns.
        seed: of the signs.
    """

    k: int
    seed: int = 0

    def width(self, shapes: Shapes) -> int:
        return _fits(self.k, shapes)

    def entries(self, name: str, start: int, stop: int, k: int) -> Tensor:
        """Some rows of the matrix of a block, times sqrt(k): [stop - start, k].

        Args:
            name: of the block.
            start: the first row.
            stop: the row after the last.
            k: columns.
        """
        rows = _row_streams(self.seed, name, start, stop)
        words = counters(rows, math.ceil(k / 64)).numpy().astype("<i8", copy=False)
        bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, :k]
        return torch.from_numpy(bits).float().mul_(2).sub_(1)

    def __call__(self, blocks: Blocks) -> Tensor:
        return _dense(blocks, self.k, self.entries)


@dataclass(frozen=True)
class Gaussian:
    """Normal entries of variance 1/k: slower to make than signs, and no more accurate.

    Args:
        k: columns.
        seed: of the entries.
    """

    k: int
    seed: int = 0

    def width(self, shapes: Shapes) -> int:
        return _fits(self.k, shapes)

    def entries(self, name: str, start: int, stop: int, k: int) -> Tensor:
        # Two words per column, side by side, so that a narrower projection is a prefix of a wider one.
        """Some rows of the matrix of a block, times sqrt(k): [stop - start, k].

        Args:
            name: of the block.
            start: the first row.
            stop: the row after the last.
            k: columns.
        """
        u = uniforms(_row_streams(self.seed, name, start, stop), 2 * k)
        return (torch.sqrt(-2 * torch.log(u[:, ::2])) * torch.cos(2 * math.pi * u[:, 1::2])).float()

    def __call__(self, blocks: Blocks) -> Tensor:
        return _dense(blocks, self.k, self.entries)


@dataclass(frozen=True)
class SJLT:
    """Sparse Johnson-Lindenstrauss transform with one entry, +-1, per row (Kane & Nelson 2014).

    Parameter i is added to column hash(i) mod k with a random sign. As good as dense signs in practice, and the cost of
    reading the gradient once. Unlike the dense ones a narrower SJLT is not a prefix of a wider one.

    Args:
        k: columns.
        seed: of columns and signs.
    """

    k: int
    seed: int = 0

    def width(self, shapes: Shapes) -> int:
        return _fits(self.k, shapes)

    def entries(self, name: str, size: int) -> tuple[Tensor, Tensor]:
        """The column and the sign of each row: [size] each."""
        words = _row_streams(self.seed, name, 0, size)
        return (words >> 1) % self.k, 1 - 2 * (words & 1)

    def _slots(self, sizes: Mapping[str, int], device: torch.device) -> Tensor:
        """Where each parameter is added, of 2 k sums: those with sign 1, then those with sign -1."""
        found = []
        for name, size in sizes.items():
            column, sign = self.entries(name, size)
            found.append(column + self.k * (sign < 0))
        return torch.cat(found).to(device)

    def __call__(self, blocks: Blocks) -> Tensor:
        first = next(iter(blocks.values()))
        total = torch.zeros(len(first), self.k, dtype=first.dtype, device=first.device)
        precise = torch.promote_types(first.dtype, torch.float32)
        for some in _slabs(blocks):
            sizes = {name: block.shape[1:].numel() for name, block in some.items()}
            slots = Kept.of((self, *sizes.items(), first.device), partial(self._slots, sizes, first.device))
            for number, target in enumerate(total):  # one image at a time: no second copy of all gradients
                row = torch.cat([block[number].reshape(-1) for block in some.values()]).to(precise)
                plus, minus = row.new_zeros(2 * self.k).scatter_add_(0, slots, row).split(self.k)
                target += plus - minus
        return total


def _slabs(blocks: Blocks) -> Iterator[Blocks]:
    """The blocks in order, as many at a time as have `ENTRIES_AT_ONCE` parameters, one at least."""
    some: Blocks = {}
    size = 0
    for name, block in blocks.items():
        size += block.shape[1:].numel()
        if some and size > ENTRIES_AT_ONCE:
            yield some
            some, size = {}, block.shape[1:].numel()
        some[name] = block
    yield some


class Kept:
    """Entries of sparse projections that were made last, `ENTRIES_AT_ONCE` of them at most: every shard takes the same."""

    found: ClassVar[dict[Hashable, Tensor]] = {}

    @classmethod
    def of(cls, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The entries under a key; made where they are not there."""
        if key not in cls.found:
            entries = make()
            while cls.found and sum(map(len, cls.found.values())) + len(entries) > ENTRIES_AT_ONCE:
                cls.found.pop(next(iter(cls.found)))
            if len(entries) > ENTRIES_AT_ONCE:
                return entries
            cls.found[key] = entries
        return cls.found[key]


@dataclass(frozen=True)
class Layerwise:
    """Each layer's gradient (its weight and bias together) divided by its norm before a projection.

    Inner products of rows are then sums of cosines over layers. A layer without gradient counts nothing.

    Args:
        inner: the projection.
    """

    inner: Projection = Identity()

    def width(self, shapes: Shapes) -> int:
        return self.inner.width(shapes)

    def __call__(self, blocks: Blocks) -> Tensor:
        squares: dict[str, Tensor] = {}
        for name, block in blocks.items():
            layer, square = name.rpartition(".")[0], _flat(block).square().sum(1)
            squares[layer] = squares[layer] + square if layer in squares else square
        factors = {layer: torch.where(square > 0, square.rsqrt(), 0.0)[:, None] for layer, square in squares.items()}
        return self.inner(
            {name: (_flat(b) * factors[name.rpartition(".")[0]]).view_as(b) for name, b in blocks.items()}
        )


@dataclass(frozen=True)
class Grouped:
    """Each group of parameters on its own, side by side in columns of its own.

    With k columns and G groups, a sparse projection to k // G columns each; where parameters are fewer, they themselves.
    A group is what shares the first parts of the module path: with depth 2, up_blocks.1.resnets.0.conv1.weight is in
    up_blocks.1. The columns of a group depend on no other group but through k // G.

    Args:
        k: columns of all groups; None for the parameters themselves.
        depth: parts of the module path that name a group.
        seed: of the projections.
    """

    k: int | None
    depth: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise WhenceError(
                f"groups of parameters: depth is {self.depth}; at least 1 part of the module path is needed"
            )

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The parameters of each group, in the module's order."""
        found: dict[str, list[str]] = {}
        for name in names:
            path = name.split(".")
            found.setdefault(".".join(path[:-1][: self.depth] or path), []).append(name)
        return found

    def columns(self, shapes: Shapes) -> dict[str, slice]:
        """Where each group stands."""
        sizes, groups, start, found = _sizes(shapes), self.groups(shapes), 0, {}
        if self.k is not None and _fits(self.k, shapes) < len(groups):
            raise WhenceError(
                f"projection dim {self.k}: there are {len(groups)} groups of parameters; accepted: {len(groups)} to "
                f"{sum(sizes.values())}"
            )
        for group, names in groups.items():
            own = sum(sizes[name] for name in names)
            width = own if self.k is None else min(own, self.k // len(groups))
            found[group] = slice(start, start + width)
            start += width
        return found

    def width(self, shapes: Shapes) -> int:
        return max(columns.stop for columns in self.columns(shapes).values())

    def __call__(self, blocks: Blocks) -> Tensor:
        shapes = {name: tuple(block.shape[1:]) for name, block in blocks.items()}
        columns, parts = self.columns(shapes), []
        for group, names in self.groups(shapes).items():
            own, width = {name: blocks[name] for name in names}, columns[group].stop - columns[group].start
            exact = width == Identity().width({name: shapes[name] for name in names})
            parts.append(Identity()(own) if exact else SJLT(width, self.seed)(own))
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class TwoSided:
    """Each parameter's gradient G [d_o, d_i] from both sides: P1^T G P2 (Pruthi et al. 2020).

    Entries of P1 and P2 are normal with variance 1/r, r = floor(sqrt(k)). For one position, G = delta x^T, that is
    (P1^T delta)(P2^T x)^T, which needs d_o r + d_i r random numbers instead of d_o d_i k.

    A side that has no more than r entries is left as it is. A parameter of more axes is a matrix of its first axis and the
    rest, one of a single axis a column.

    Args:
        k: columns per parameter, at most.
        seed: of the entries.
    """

    k: int
    seed: int = 0

    def side(self, name: str, size: int) -> Tensor:
        """P [size, r]."""
        r = math.isqrt(self.k)
        return torch.eye(size) if size <= r else Gaussian(r, self.seed).entries(name, 0, size, r) / math.sqrt(r)

    def width(self, shapes: Shapes) -> int:
        r = math.isqrt(_fits(self.k, shapes))
        return sum(min(r, d_o) * min(r, d_i) for d_o, d_i in map(_as_matrix, shapes.values()))

    def __call__(self, blocks: Blocks) -> Tensor:
        parts = []
        for name, block in blocks.items():
            d_o, d_i = _as_matrix(tuple(block.shape[1:]))
            P1, P2 = self.side(f"{name} output", d_o).to(block), self.side(f"{name} input", d_i).to(block)
            # One image at a time: a row must not depend on its company.
            parts.append(torch.stack([(P1.mT @ row.reshape(d_o, d_i) @ P2).flatten() for row in block]))
        return torch.cat(parts, dim=1)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0] if shape else 1, math.prod(shape[1:])


def unprojected(projection: object, parameters: int) -> Projection | None:
    """What stands for a projection of no more parameters than it has columns: they themselves, whose inner products are
    exact and take no more room. None where it is a projection of more.

    Args:
        projection: any.
        parameters: how many there are.
    """
    if isinstance(projection, Layerwise):
        inner = unprojected(projection.inner, parameters)
        return None if inner is None else replace(projection, inner=inner)
    if not isinstance(projection, SJLT | Rademacher | Gaussian | Grouped | TwoSided):
        return None
    if projection.k is None or not 1 <= parameters <= projection.k:
        return None
    return replace(projection, k=None) if isinstance(projection, Grouped) else Identity()


def _row_streams(seed: int, name: str, start: int, stop: int) -> Tensor:
    return mix(seed_for(seed, f"projection {name}") + torch.arange(start, stop))
