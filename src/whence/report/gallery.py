"""The gallery: all queries and their strongest training images in one PNG."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from whence.report.pictures import Picture, Query, Strips
from whence.report.words import ESTIMATE, MAGNITUDE, ORDER, POSITIVE, plain

GALLERY_ROWS, GALLERY_TOP = 9, 10  # a figure to take in at a glance: the page shows the rest
MARGIN, TILE, GAP, GUTTER, HEAD, FOOT, CAPTION, HEADING = 36, 128, 16, 56, 116, 110, 82, 34  # px
INK, MUTED, LINE = "#1b1f24", "#5d6670", "#d8dde3"
NARROWEST = 900  # px: the sentences must fit
NOBODY = "no single image stands out"
TONES = {"pro": "#0b5cad", "con": "#b04208", "": INK}


def gallery_size(queries: int, methods: int, k: int) -> tuple[int, int]:
    """Width and height of a gallery, in px.

    Args:
        queries: shown.
        methods: rows of each query.
        k: images per row.
    """
    width = 2 * MARGIN + _portrait_side(methods) + GUTTER + k * (TILE + GAP) - GAP
    return max(width, NARROWEST), HEAD + queries * _block_height(methods) + FOOT


def _portrait_side(methods: int) -> int:
    return TILE if methods == 1 else TILE + HEADING + CAPTION


def _block_height(methods: int) -> int:
    return GAP + methods * _row_height(methods)


def _row_height(methods: int) -> int:
    return TILE + CAPTION + (HEADING if methods > 1 else 0)


def draw_gallery(title: str, blocks: Sequence[Query], queries: int) -> bytes:
    """Each query on the left, per method one row of its strongest training images on the right, as a PNG.

    Args:
        title: the headline.
        blocks: what may be shown.
        queries: how many there are.
    """
    methods = blocks[0].methods
    blocks = blocks[: max(1, GALLERY_ROWS // len(methods))]
    k = min(GALLERY_TOP, *(len(strips.top) for strips in methods.values()))
    canvas = Image.new("RGB", gallery_size(len(blocks), len(methods), k), "white")
    draw = ImageDraw.Draw(canvas)
    width, right = canvas.width - 2 * MARGIN, MARGIN + _portrait_side(len(methods)) + GUTTER
    _text(draw, (MARGIN, 30), title, 28, width, INK, bold=True)
    _text(draw, (MARGIN, HEAD - 38), "query" if queries == 1 else "queries", 17, width, MUTED)
    told = "the training images that did most for it"
    told += f" ({next(iter(methods))})" if len(methods) == 1 else ""
    _text(draw, (right, HEAD - 38), told, 17, canvas.width - MARGIN - right, MUTED)
    for place, block in enumerate(blocks):
        _gallery_block(canvas, draw, HEAD + place * _block_height(len(methods)), block, k)
    counted = f"the first {len(blocks):,} of {queries:,} pictures; " if len(blocks) < queries else ""
    for line, text in enumerate((_gallery_law(methods), ESTIMATE, counted + ORDER)):
        _text(draw, (MARGIN, canvas.height - FOOT + 20 + 26 * line), text, 16, width, MUTED if line else INK)
    buffer = io.BytesIO()
    canvas.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _gallery_law(methods: Mapping[str, Strips]) -> str:
    unsigned = [name for name, strips in methods.items() if not strips.reading.signed]
    if not unsigned:
        return POSITIVE
    return MAGNITUDE if len(unsigned) == len(methods) else f"{POSITIVE} (magnitude only: {', '.join(unsigned)})"


def _gallery_block(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, block: Query, k: int) -> None:
    methods, side = block.methods, _portrait_side(len(block.methods))
    draw.line([(MARGIN, y), (canvas.width - MARGIN, y)], LINE)
    _paste(canvas, block.picture, MARGIN, y + GAP, side)
    _text(draw, (MARGIN, y + GAP + side + 6), block.label or block.name, 15, side + GUTTER - GAP, INK)
    if block.label:  # the prompt, where there is one
        _text(draw, (MARGIN, y + GAP + side + 27), block.name, 15, side + GUTTER - GAP, MUTED)
    if len(methods) == 1 and next(iter(methods.values())).reading.folded:
        _text(draw, (MARGIN, y + GAP + side + 48), NOBODY, 13, side + GUTTER - GAP, INK, bold=True)
    for place, (name, strips) in enumerate(methods.items()):
        x, upper = MARGIN + side + GUTTER, y + GAP + place * _row_height(len(methods))
        if len(methods) > 1:
            _text(draw, (x, upper), _heading(name, strips), 18, k * (TILE + GAP), INK, bold=True)
            upper += HEADING
        for column, tile in enumerate(strips.top[:k]):
            left = x + column * (TILE + GAP)
            _paste(canvas, tile.picture, left, upper, TILE)
            _text(draw, (left, upper + TILE + 5), tile.text, 17, TILE, TONES[tile.tone], bold=True)
            lines = [tile.label, tile.name] if tile.label else [tile.name]
            for line, text in enumerate(lines):
                _text(draw, (left, upper + TILE + 27 + 19 * line), text, 15, TILE + GAP - 4, MUTED)


def _heading(name: str, strips: Strips) -> str:
    return f"{name}: {NOBODY}" if strips.reading.folded else name


def _paste(canvas: Image.Image, picture: Picture, x: int, y: int, side: int) -> None:
    """A picture in the middle of a square: pixel art by whole factors with hard edges, photographs smoothly."""
    image = picture.image.convert("RGB")
    factor = side / max(image.size)
    if picture.pixel_art:
        factor = max(1, int(factor))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    scaled = image.resize(size, Image.Resampling.NEAREST if picture.pixel_art else Image.Resampling.LANCZOS)
    corner = (x + (side - size[0]) // 2, y + (side - size[1]) // 2)
    canvas.paste(scaled, corner)
    box = (corner[0] - 1, corner[1] - 1, corner[0] + size[0], corner[1] + size[1])
    ImageDraw.Draw(canvas).rectangle(box, outline=LINE)  # else a white picture has no edge


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, width: int, fill: str, bold: bool = False
) -> None:
    """One line of text, shortened in its middle until it fits."""
    font, text = _font(size, bold), plain(text)
    shown, kept = text, min(len(text), 1 + width)  # a letter is a pixel or more
    if kept < len(text):
        shown = text[:kept]
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = text[: kept // 2] + "…" + text[len(text) - (kept - kept // 2) :]
    draw.text(at, shown, fill=fill, font=font)


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
