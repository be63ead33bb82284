"""The nearest training image of each picture, and of training images: by a thumbnail of their pixels, or by an encoder.

    s_j = max_i cos(e(q_j), e(x_i))               of each picture
    c_i = max_{l != i} cos(e(x_i), e(x_l))        of training images: the nearest one with other pixels

One pass over the training images for as many rows as fit into the budget. Similarities are kept to nine digits: the others
depend on how sums are grouped. Among equals the image with the lowest digest is the nearest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from whence.diffusion.forward import Classifier
from whence.diffusion.noise import key_of
from whence.features.encoders import Function, Thumbnail
from whence.features.pretrained import Pretrained
from whence.storage.arrays import tensor_digest
from whence.storage.files import progress
from whence.types import Engine, Images, WhenceError

OfPictures = Thumbnail | Pretrained | Function
MOST = 2000
"""Training images whose nearest others are looked for, at most: those with the lowest digests."""
READ_BYTES, READ_MOST = 2**25, 256  # pictures in memory at full size
DIGITS = 9
FLAT = 1e-6  # a row no longer than this has no direction
NONE = -np.inf


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What is nearest to what.

    Args:
        measure: what was compared: "pixels", or the name of the encoder.
        queries: names of the pictures [m].
        nearest: the name of the nearest training image of each [m]; "" where none can be compared.
        similarity: their cosines [m]; NaN where nothing can be compared, as of pictures of one colour.
        exact: whether a training image has the same pixels [m].
        between: c, of training images that are all different.
        images: training images in all.
        duplicates: of them, those with the pixels of another one; such a group counts once.
        one_colour: of them, those that are compared with nothing.
    """

    measure: str
    queries: Sequence[str]
    nearest: Sequence[str]
    similarity: np.ndarray
    exact: np.ndarray
    between: np.ndarray
    images: int
    duplicates: int
    one_colour: int


@dataclass(frozen=True, eq=False)
class _Rows:
    """Unit rows [b, k] float64, zero for pictures of one colour; the digests of the pixels; their first 64 bits [b]."""

    unit: np.ndarray
    pixels: list[str]
    keys: np.ndarray

    @property
    def flat(self) -> np.ndarray:
        return np.logical_not(self.unit.any(axis=1))


@dataclass(frozen=True, eq=False)
class _Reader:
    """Reads and encodes some of some images."""

    images: Images
    encoder: OfPictures
    engine: Engine

    def pieces(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """A few rows at a time: of larger pictures fewer."""
        size = 4 * self.images.batch([0]).x0[0].numel()
        step = max(1, min(READ_MOST, READ_BYTES // size))
        return [rows[start : start + step] for start in range(0, len(rows), step)]

    def rows(self, rows: Sequence[int]) -> _Rows:
        batch = self.images.batch(list(rows))
        pixels = [tensor_digest(picture) for picture in batch.x0]
        # In float64, so that nothing is left of a picture of one colour when its mean is taken off.
        small = isinstance(self.encoder, Thumbnail)
        moved = batch.to("cpu" if small else self.engine.device, torch.float64 if small else torch.float32)
        with torch.no_grad():
            values: Tensor = self.encoder(nn.Module(), Classifier(), moved).double().cpu()
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            name = self.images.ids[rows[int(bad[0])]]
            raise WhenceError("what is compared of it holds NaN or Inf", f"image {name!r}", "finite numbers")
        norm = values.norm(dim=1, keepdim=True)
        unit = torch.where(norm > FLAT, values / norm, 0.0).numpy()
        return _Rows(unit, pixels, np.array([key_of(digest) for digest in pixels], np.int64))


def neighbours(
    train: Images, queries: Images, encoder: OfPictures = Thumbnail(), most: int = MOST, engine: Engine = Engine()
) -> Neighbours:
    """The nearest training image of each picture, and of training images.

    Args:
        train: the training images, as they look.
        queries: the pictures, of the same size.
        encoder: by what they are compared: `Thumbnail`, `Pretrained(folder)`, or `Function(call, digest)`.
        most: training images whose nearest others are looked for, at most.
        engine: device of the encoder, and bytes of the rows that are held at once.

    Raises:
        WhenceError: pictures of other sizes, none at all, an encoder that fails.
    """
    for images, what in ((train, "training images"), (queries, "pictures to look at")):
        if not len(images):
            raise WhenceError("there are none", what, "one or more")
    _same_shape(train, queries)
    order = sorted(range(len(train)), key=lambda row: (train.digests[row], train.ids[row]))
    rank = np.argsort(order)
    own = list({train.digests[row]: row for row in reversed(order)}.values())[::-1][:most]
    asked, there = _Reader(queries, encoder, engine), _Reader(train, encoder, engine)
    m, total = len(queries), len(queries) + len(own)
    step = max(1, engine.budget // (8 * there.rows([0]).unit.shape[1]))
    seen: dict[int, tuple[str, bool]] = {}
    value, row, content = np.full(total, NONE), np.full(total, -1), [""] * total
    for start in range(0, total, step):
        block = range(start, min(start + step, total))
        anchors = _joined(
            [asked.rows(rows) for rows in asked.pieces([j for j in block if j < m])]
            + [there.rows(rows) for rows in there.pieces([own[j - m] for j in block if j >= m])]
        )
        here = slice(block.start, block.stop)
        value[here], row[here] = _nearest(anchors, np.array(block) >= m, there, rank, seen)
        content[here] = anchors.pixels
    first = {seen[image][0]: image for image in reversed(order)}  # of images with the same pixels
    exact = np.array([pixels in first for pixels in content[:m]])
    at = [first.get(pixels, int(image)) for pixels, image in zip(content[:m], row[:m], strict=True)]
    # One of each: other files may hold the same pixels.
    different = {pixels: c for pixels, c in zip(content[m:], value[m:], strict=True) if c > NONE}
    return Neighbours(
        _name(encoder),
        list(queries.ids),
        ["" if image < 0 else train.ids[image] for image in at],
        np.where(value[:m] > NONE, value[:m], np.nan),
        exact,
        np.array(list(different.values()), np.float64),
        len(train),
        len(train) - len(first),
        sum(flat for _, flat in seen.values()),
    )


def _nearest(
    anchors: _Rows, mine: np.ndarray, there: _Reader, rank: np.ndarray, seen: dict[int, tuple[str, bool]]
) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each anchor with the nearest training image [a], and the row of that; -inf and -1 where there is none.

    Args:
        anchors: pictures, and training images [a].
        mine: which of them are training images, whose pixels are no neighbours of themselves [a].
        there: all training images.
        rank: the place of each in an order of their content; the lower one wins among equals [n].
        seen: takes the pixels of each training image, and whether it is of one colour.
    """
    best, at = np.full(len(mine), NONE), np.full(len(mine), -1)
    for rows in progress(there.pieces(range(len(rank))), "looking for copies"):
        inside = sorted(rows, key=lambda row: rank[row])  # argmax takes the first of equals
        found = there.rows(inside)
        seen.update(zip(inside, zip(found.pixels, found.flat.tolist(), strict=True), strict=True))
        similar = np.round(anchors.unit @ found.unit.T, DIGITS)
        similar[:, found.flat] = similar[anchors.flat] = NONE
        similar[mine[:, None] & (anchors.keys[:, None] == found.keys)] = NONE
        value, row = similar.max(1), np.array(inside)[similar.argmax(1)]
        better = (value > best) | ((value == best) & (value > NONE) & (rank[row] < rank[at]))
        best, at = np.where(better, value, best), np.where(better, row, at)
    return best, at


def _joined(parts: Sequence[_Rows]) -> _Rows:
    return _Rows(
        np.concatenate([part.unit for part in parts]),
        [digest for part in parts for digest in part.pixels],
        np.concatenate([part.keys for part in parts]),
    )


def _same_shape(train: Images, queries: Images) -> None:
    """Refuse pictures that cannot be laid over each other."""
    a, b = (list(images.batch([0]).x0.shape[1:]) for images in (train, queries))
    if a != b:
        how = "both grey or both in colour" if a[:1] != b[:1] else "--resolution, which brings both to one size"
        raise WhenceError(f"they are {_shape(b)}, the training images {_shape(a)}", "pictures to look at", how)


def _shape(shape: Sequence[int]) -> str:
    if len(shape) != 3:
        return f"of shape {list(shape)}"
    kind = {1: "grey", 3: "in colour"}.get(shape[0], f"of {shape[0]} channels")
    return f"{shape[2]}x{shape[1]} {kind}"


def _name(encoder: OfPictures) -> str:
    if isinstance(encoder, Thumbnail):
        return "pixels"
    return Path(encoder.folder).name if isinstance(encoder, Pretrained) else encoder.name
