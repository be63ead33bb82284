"""Thumbnails of training images and queries."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from whence.report.statistics import Group, Reading
from whence.report.words import number, plain, tone_of
from whence.types import Images, WhenceError

READ_AT_ONCE = 32  # pictures in memory at full size


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Args:
        image: at the size it is stored with.
        uri: the same as a data URI.
        pixel_art: whether it keeps its hard edges when it is enlarged.
    """

    image: Image.Image
    uri: str
    pixel_art: bool


@dataclass(frozen=True)
class Tile:
    """A training image as shown.

    Args:
        picture: the image.
        rank: from 1.
        text: the number under it.
        tone: of the number, see `words.tone_of`.
        name: of the image.
        label: its group.
        remark: such as that it is the query itself.
        between: the ranks that it may have, from 1, as "2–11"; "" where none are known.
    """

    picture: Picture
    rank: int
    text: str
    tone: str
    name: str
    label: str
    remark: str = ""
    between: str = ""

    @property
    def short(self) -> str:
        """The end of a long name: folders repeat, file names tell."""
        return self.name if len(self.name) <= 30 else "…\N{WORD JOINER}" + self.name[-29:]


@dataclass(frozen=True)
class Strips:
    """What one method says about one query, ready to be shown.

    Args:
        reading: what the scores amount to.
        top: the strongest images.
        bottom: the strongest opponents.
        sums: (column, note, (group, number, its tone) of each).
    """

    reading: Reading
    top: list[Tile]
    bottom: list[Tile]
    sums: list[tuple[str, str, list[tuple[str, str, str]]]]


@dataclass(frozen=True)
class Query:
    """A query as shown.

    Args:
        name: of the query.
        label: the prompt or group under it.
        picture: the query.
        methods: name -> what the method says.
        warning: what is to be known before any score; "" for nothing.
    """

    name: str
    label: str
    picture: Picture
    methods: Mapping[str, Strips]
    warning: str = ""


@dataclass(frozen=True)
class Album:
    """The training pictures that were read, with their names and groups.

    Args:
        train: the training images.
        pictures: row -> picture, of those that are shown.
        groups: columns to group by; the first gives the labels.
    """

    train: Images
    pictures: Mapping[int, Picture]
    groups: Sequence[Group]

    def label(self, row: int) -> str:
        return self.groups[0].names[self.groups[0].codes[row]] if self.groups else ""

    def tile(self, row: int, rank: int, text: str, tone: str = "", remark: str = "") -> Tile:
        """A training image as shown; the arguments are those of `Tile`, its picture, name and label found by its row."""
        return Tile(self.pictures[row], rank, text, tone, plain(self.train.ids[row]), self.label(row), remark)

    def counted(self, counts: Iterable[tuple[int, int]], queries: int) -> list[Tile]:
        return [self.tile(row, rank, f"{count:,} of {queries:,}") for rank, (row, count) in enumerate(counts, 1)]

    def ranked(
        self, scored: Sequence[tuple[int, float]], signed: bool, digest: str, between: Sequence[tuple[int, int]] = ()
    ) -> list[Tile]:
        """Tiles of one strip; a picture that is the query itself, or came earlier in the strip, says so.

        Args:
            scored: (row, score) of each, strongest first.
            signed: whether negative scores mean opponents.
            digest: of the query.
            between: the ranks that each may have, from 1; none where they are not known.
        """
        tiles, seen = [], {digest: "same picture as the query"}
        for rank, (row, score) in enumerate(scored, 1):
            remark = seen.get(self.train.digests[row], "")
            seen.setdefault(self.train.digests[row], f"same picture as {rank}")
            tile = self.tile(row, rank, number(score, plus=signed), tone_of(score, signed), remark)
            tiles.append(replace(tile, between=_between(*between[rank - 1])) if between else tile)
        return tiles

    def strips(self, reading: Reading, digest: str) -> Strips:
        signed = reading.signed
        top = self.ranked(reading.top, signed, digest, reading.between)
        bottom = self.ranked(reading.bottom, signed, digest)
        sums = [
            (column, note, [(name, number(value, plus=signed), tone_of(value, signed)) for name, value in values])
            for column, note, values in reading.sums
        ]
        return Strips(reading, top, bottom, sums)


def _between(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def pictures_of(images: Images, rows: Iterable[int], side: int) -> dict[int, Picture]:
    """The wanted pictures by row, each read once, a few at a time.

    Args:
        images: the data set.
        rows: of the wanted ones.
        side: px that none is larger than.
    """
    wanted = sorted(set(rows))
    pictures = {}
    for start in range(0, len(wanted), READ_AT_ONCE):
        chunk = wanted[start : start + READ_AT_ONCE]
        for row, x0 in zip(chunk, images.batch(chunk).x0, strict=True):
            pictures[row] = _picture(x0, images.ids[row], side)
    return pictures


def _picture(x0: Tensor, name: str, side: int) -> Picture:
    """[C, H, W] in [-1, 1] -> a picture of at most `side` px; WhenceError names the image that is none."""
    if x0.ndim != 3 or x0.shape[0] not in (1, 3):
        raise WhenceError(f"image {name!r} has shape {tuple(x0.shape)}; a report shows [C, H, W] with C = 1 or 3")
    x0 = x0.detach().float().cpu()
    if not bool((x0.abs() <= 1.001).all()):  # also false for NaN
        raise WhenceError(f"image {name!r} has values from {x0.min():.3g} to {x0.max():.3g}; expected [-1, 1]")
    pixels = ((x0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    pixel_art = _is_pixel_art(image)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Picture(image, _data_uri(image), pixel_art)


def _is_pixel_art(image: Image.Image) -> bool:
    """Drawings of a few pixels or a few colours keep their hard edges; photographs are scaled smoothly."""
    longest = max(image.size)
    return longest <= 16 or (longest <= 64 and (image.mode == "L" or image.getcolors(maxcolors=32) is not None))


def _data_uri(image: Image.Image) -> str:
    """Small pictures exactly, as PNG; larger ones as JPEG, a fifth of the size, so that the page stays light."""
    kind, options = ("png", {"optimize": True}) if max(image.size) <= 64 else ("jpeg", {"quality": 88})
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
