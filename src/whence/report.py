"""The report: one self-contained HTML page and one gallery picture of who made what.

`write` reads only the pictures it shows, computes every sentence from the scores, and never asks the network for
anything. All texts say the same law: positive = proponent.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from whence.types import Images, Scores, WhenceError, describe

POSITIVE = "positive = proponent: the image pushed the model towards this picture"
MAGNITUDE = "magnitude only: a large score says that the image mattered, not in which direction"
ESTIMATE = "scores are estimates of influence, not proof of copying"
SCALES = {
    "removal": "removal: the predicted rise of the query's loss if this training image were removed",
    "upweight": "upweight: the predicted fall of the query's loss per unit of extra weight on this training image "
    "(n times the effect of removing it)",
    "rank": "rank: no units; only the order of the images within one query means something",
}
GROUP_COLUMNS = ("creator", "artist", "author", "label", "class", "category", "license", "source")

THUMB, LARGE = 160, 320  # px: longest side of a training picture and of a query as stored in the page
READ_AT_ONCE = 32  # pictures in memory at full size
MOST_GROUPS = 10  # rows of a group table
GALLERY_ROWS, GALLERY_TOP = 9, 10  # a figure to take in at a glance: the page shows the rest


# ---------------------------------------------------------------------------------------------------------- the page


def write(
    folder: Path,
    results: Mapping[str, Scores],
    train: Images,
    queries: Images,
    title: str,
    facts: Mapping[str, str],
    top: int = 8,
    max_queries: int = 24,
) -> Path:
    """Write `report.html` and `gallery.png` into a folder; return the path of the page.

    results: method name -> scores [m, n] of the same queries and training images, in the order of the images; facts:
    plain lines about model and data; top: training images shown per query; max_queries: queries shown (the overview
    counts all of them). The same input gives the same bytes. Errors: WhenceError on bad input.
    """
    _check(results, train, queries, top, max_queries)
    shown, k = range(min(len(queries), max_queries)), min(top, len(train))
    groups = _groups(next((s.train_meta for s in results.values() if s.train_meta), train.meta), len(train))
    readings = [{name: _read_query(scores, j, k, groups) for name, scores in results.items()} for j in shown]
    leaders = {name: _leaders(scores, k) for name, scores in results.items()}

    rows = [row for query in readings for reading in query.values() for row, _ in reading.top + reading.bottom]
    pictures = _pictures(train, rows + [row for counts in leaders.values() for row, _ in counts], THUMB)
    portraits = _pictures(queries, shown, LARGE)
    album = Album(train, pictures, groups)
    page: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "counts": {"train": len(train), "queries": len(queries), "shown": len(shown), "top": k},
        "signed": [name for name, scores in results.items() if scores.signed],
        "unsigned": [name for name, scores in results.items() if not scores.signed],
        "law": {"positive": POSITIVE, "magnitude": MAGNITUDE, "estimate": ESTIMATE},
        "agreement": [_agreement(a, b, results, k) for a, b in itertools.combinations(results, 2)],
        "leaders": {name: album.counted(counts, len(queries)) for name, counts in leaders.items()},
        "groups": [_group_table(group, results) for group in groups],
        "queries": [
            {
                "name": plain(queries.ids[j]),
                "label": _prompt(queries.meta, j) or _label(queries.meta, j),
                "picture": portraits[j],
                "methods": {name: album.strips(reading, queries.digests[j]) for name, reading in found.items()},
            }
            for j, found in zip(shown, readings, strict=True)
        ],
        "recipes": {name: _recipe(scores) for name, scores in results.items()},
    }
    gallery = _gallery(title, page["queries"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "gallery.png", gallery)
    _replace(folder / "report.html", _render(page))
    return folder / "report.html"


def _check(results: Mapping[str, Scores], train: Images, queries: Images, top: int, max_queries: int) -> None:
    """Refuse what cannot be reported, and say which method and which image is wrong."""
    if not results:
        raise WhenceError("no results to report; pass the scores of at least one method")
    if top < 1 or max_queries < 1:
        raise WhenceError(f"top={top} and max_queries={max_queries} must both be at least 1")
    if not len(train) or not len(queries):
        raise WhenceError(
            f"{len(train)} training images and {len(queries)} queries; a report needs at least one of each"
        )
    for name, scores in results.items():
        _check_ids(name, "training image", scores.train_ids, train.ids)
        _check_ids(name, "query", scores.query_ids, queries.ids)


def _check_ids(method: str, kind: str, scored: Sequence[str], given: Sequence[str]) -> None:
    for place, (a, b) in enumerate(itertools.zip_longest(scored, given)):
        if a != b:
            raise WhenceError(
                f"{method}: {kind} {place} is {a!r} in the scores ({len(scored):,}) and {b!r} in the images "
                f"({len(given):,}); report the same images, in the same order, as were scored"
            )


def _render(page: Mapping[str, Any]) -> bytes:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # "replace": file names that are not valid Unicode arrive as surrogates, which no page can hold.
    return environment.get_template("report.html").render(page).encode("utf-8", "replace")


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------- words and numbers


def number(value: float, digits: int = 3, plus: bool = False) -> str:
    """A number for people: significant digits, thousands separators, a true minus, powers of ten when far from 1."""
    if value == 0:
        return "0"
    mantissa, power = f"{abs(value):.{digits - 1}e}".split("e")
    exponent = int(power)
    if -4 <= exponent < 6:
        text = f"{float(f'{mantissa}e{power}'):,.{max(0, digits - 1 - exponent)}f}"
    else:
        text = f"{mantissa}×10{str(exponent).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    return ("−" if value < 0 else "+" if plus else "") + text


def _tone(value: float, signed: bool) -> str:
    """The colour of a number, as a word the style sheet knows: "pro", "con", or none where there is no sign."""
    return "" if not signed or value == 0 else "pro" if value > 0 else "con"


def plain(text: Any) -> str:
    """One line of printable text: no line breaks, control characters or direction overrides from file names."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(str(text).split()))


def _label(meta: Mapping[str, Sequence[Any]], row: int) -> str:
    """The most telling group of an image; a bare number gets its column name."""
    column = next((c for c in GROUP_COLUMNS if c in meta), None)
    return "" if column is None else _named(column, meta[column][row])


def _prompt(meta: Mapping[str, Sequence[Any]], row: int, longest: int = 80) -> str:
    """The text a picture was drawn for, where it has one."""
    text = plain(meta["text"][row]) if isinstance(meta.get("text", [None] * (row + 1))[row], str) else ""
    return text if len(text) <= longest else f"{text[:longest]}..."


def _named(column: str, value: Any) -> str:
    if value is None:
        return f"no {column}"
    return f"{column} {value}" if isinstance(value, (int, float)) or str(value).isdecimal() else plain(value)


def _recipe(scores: Scores) -> dict[str, str]:
    return {
        "json": json.dumps(describe(scores.recipe), indent=2, sort_keys=True, ensure_ascii=False),
        "scale": SCALES.get(scores.scale, scores.scale),
        "sign": POSITIVE if scores.signed else MAGNITUDE,
    }


# ------------------------------------------------------------------------------------------------ reading the scores


@dataclass(frozen=True)
class Group:
    """A column of the training images: names of its groups and the group of each image, codes [n]."""

    column: str
    names: list[str]
    codes: np.ndarray

    def sums(self, row: np.ndarray) -> np.ndarray:
        """Sum of the scores [n] of each group. A sum is not a Shapley value: it ignores how images work together."""
        return np.bincount(self.codes, weights=row, minlength=len(self.names))


@dataclass(frozen=True)
class Histogram:
    """Counts of one query's scores, the bars drawn as one SVG path; places are x coordinates in it."""

    bars: str
    tallest: int
    ticks: list[tuple[float, str]]
    zero: float | None
    top: list[float]
    bottom: list[float]


@dataclass(frozen=True)
class Reading:
    """What one method says about one query: (row, score) of the strongest images, and what that amounts to."""

    top: list[tuple[int, float]]
    bottom: list[tuple[int, float]]
    signed: bool
    verdict: tuple[str, str]
    histogram: Histogram
    sums: list[tuple[str, str, list[tuple[str, float]]]]


def _row(scores: Scores, query: int) -> np.ndarray:
    """Scores of one query over all training images: [n] in double precision."""
    return scores.values[query].detach().double().cpu().numpy()


def _strongest(row: np.ndarray, k: int) -> list[int]:
    """Positions of the k largest of [n], largest first; equal scores keep the order of the images, as in Scores.top."""
    threshold = np.partition(row, len(row) - k)[len(row) - k]
    candidates = np.flatnonzero(row >= threshold)
    return candidates[np.argsort(-row[candidates], kind="stable")][:k].tolist()


def _read_query(scores: Scores, query: int, k: int, groups: Sequence[Group]) -> Reading:
    row = _row(scores, query)
    top = _strongest(row, k)
    # Only images below zero are opponents; with few images the two ends may meet.
    bottom = [i for i in _strongest(-row, (k + 1) // 2) if row[i] < 0 and i not in top] if scores.signed else []
    return Reading(
        top=[(i, float(row[i])) for i in top],
        bottom=[(i, float(row[i])) for i in bottom],
        signed=scores.signed,
        verdict=verdict(row, k, scores.signed),
        histogram=_histogram(row, top, bottom),
        sums=[_largest_sums(group, row) for group in groups[:1]],
    )


def _largest_sums(group: Group, row: np.ndarray, most: int = 4) -> tuple[str, str, list[tuple[str, float]]]:
    sums = group.sums(row)
    named = [(group.names[g], float(sums[g])) for g in _strongest(sums, min(most, len(sums)))]
    return group.column, "" if len(sums) <= most else f"{most} largest of {len(sums):,} groups", named


def _equal(row: np.ndarray) -> bool:
    """Whether scores [n] differ by no more than rounding does."""
    return float(np.ptp(row)) <= 1e-12 * float(np.abs(row).max())


def verdict(row: np.ndarray, k: int, signed: bool) -> tuple[str, str]:
    """What the scores [n] of a query amount to: the finding, and the numbers it rests on.

    z = (max − mean) / std is compared with the expected maximum of n bell-shaped scores, Φ⁻¹((n − 3/8) / (n + 1/4))
    (Blom 1958); the largest of such scores exceeds that by 1 in about one case of twenty or fewer, by 3 hardly ever.
    """
    n, spread = len(row), float(row.std())
    if _equal(row):
        return "Nothing to tell", f"all {n:,} scores are equal"
    z = (float(row.max()) - float(row.mean())) / spread
    chance = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    finding = "The strongest image does not stand out"
    if z > chance + 1:
        finding = (
            "The strongest image stands out clearly" if z > chance + 3 else "The strongest image stands out a little"
        )
    return finding, (
        f"it scores {number(z, 2)} standard deviations above the mean of all {n:,} (the largest of as many "
        f"scores from a bell curve would reach about {number(chance, 2)}); {_share(row, k, signed)}"
    )


def _share(row: np.ndarray, k: int, signed: bool) -> str:
    positive = row.clip(min=0)
    if not positive.any():
        return "no image scores above zero"
    share = float(np.sort(np.partition(positive, len(row) - k)[len(row) - k :]).sum() / positive.sum())
    who = "the first image carries" if k == 1 else f"the top {k} carry"
    return f"{who} {number(100 * share, 2)}\N{NO-BREAK SPACE}% of the total {'positive ' if signed else ''}score"


LEFT, RIGHT, SKY, FLOOR = 10, 410, 22, 98  # the plot within the 420 x 136 box of the histogram in report.html


def _histogram(row: np.ndarray, top: Sequence[int], bottom: Sequence[int], bins: int = 60) -> Histogram:
    low, high = float(row.min()), float(row.max())
    if _equal(row):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)

    def place(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (value - low) / (high - low), 1)

    counts, edges = np.histogram(row, bins=bins, range=(low, high))
    # Every bar that holds an image is at least 1.5 high: a lone image far out must not vanish.
    heights = [max(1.5, (FLOOR - SKY) * count / counts.max()) for count in counts]
    bars = [
        f"M{place(left)} {FLOOR}V{FLOOR - height:.1f}H{place(right) - 0.6:.1f}V{FLOOR}Z"
        for left, right, height, count in zip(edges[:-1], edges[1:], heights, counts, strict=True)
        if count
    ]
    return Histogram(
        bars="".join(bars),
        tallest=int(counts.max()),
        ticks=[(place(value), text) for value, text in _ticks(low, high)],
        zero=place(0.0) if low < 0 < high else None,
        top=[place(row[i]) for i in top],
        bottom=[place(row[i]) for i in bottom],
    )


def _ticks(low: float, high: float) -> list[tuple[float, str]]:
    """A few round numbers between two scores, written with just the digits that tell them apart."""
    values = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(low, high)
    step = float(values[1] - values[0])
    inside = [0.0 if abs(value) < step / 1e6 else float(value) for value in values if low <= value <= high]
    return [(value, number(value, 1 + _power(value) - _power(step)) if value else "0") for value in inside]


def _power(value: float) -> int:
    return math.floor(math.log10(abs(value)) + 1e-9)


# ---------------------------------------------------------------------------------------------------- over all queries


def _ranks(row: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two score rows [n]; NaN where one of them is constant."""
    a, b = _ranks(a) - (len(a) + 1) / 2, _ranks(b) - (len(b) + 1) / 2
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


def _agreement(a: str, b: str, results: Mapping[str, Scores], k: int) -> dict[str, Any]:
    """How alike two methods rank the images, over all queries; by magnitude where either of them has no sign."""
    magnitude = not (results[a].signed and results[b].signed)
    correlations, shared = [], []
    for query in range(len(results[a].query_ids)):
        pair = [np.abs(row) if magnitude else row for row in (_row(results[a], query), _row(results[b], query))]
        correlations.append(spearman(*pair))
        shared.append(len(set(_strongest(pair[0], k)) & set(_strongest(pair[1], k))))
    known = [value for value in correlations if not math.isnan(value)]
    return {
        "pair": (a, b),
        "magnitude": magnitude,
        "spearman": number(float(np.mean(known)), 2) if known else "undefined",
        "range": (number(min(known), 2), number(max(known), 2)) if len(known) > 1 else None,
        "shared": number(float(np.mean(shared)), 2),
        "chance": number(k * k / len(results[a].train_ids), 2),
    }


def _leaders(scores: Scores, k: int, most: int = 8) -> list[tuple[int, int]]:
    """(row, count) of the images that are among the k strongest of more than one query, most frequent first."""
    counts: Counter[int] = Counter()
    for query in range(len(scores.query_ids)):
        counts.update(_strongest(_row(scores, query), k))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(row, count) for row, count in ordered[:most] if count > 1]


def _groups(meta: Mapping[str, Sequence[Any]], n: int) -> list[Group]:
    """Columns to group by: those with a telling name, else the first one whose values repeat."""
    wrong = next((column for column in meta if len(meta[column]) != n), None)
    if wrong is not None:
        raise WhenceError(f"column {wrong!r} has {len(meta[wrong]):,} values for {n:,} training images")
    known = [_group(column, meta[column]) for column in GROUP_COLUMNS if column in meta]
    others = (_group(column, meta[column]) for column in meta)
    return known or list(itertools.islice((group for group in others if 1 < len(group.names) < n), 1))


def _group(column: str, values: Sequence[Any]) -> Group:
    labels = [_named(column, value) for value in values]
    index = {name: code for code, name in enumerate(sorted(set(labels)))}
    return Group(column, list(index), np.array([index[label] for label in labels]))


def _group_table(group: Group, results: Mapping[str, Scores]) -> dict[str, Any]:
    """Sums over all queries, one row per group, the largest of the first method first."""
    totals = {
        name: group.sums(s.values.detach().sum(0, dtype=torch.float64).cpu().numpy()) for name, s in results.items()
    }
    order = _strongest(next(iter(totals.values())), min(MOST_GROUPS, len(group.names)))
    sizes = np.bincount(group.codes, minlength=len(group.names))
    widest = {name: float(np.abs(sums).max()) or 1.0 for name, sums in totals.items()}
    return {
        "column": group.column,
        "groups": len(group.names),
        "rows": [
            {
                "name": group.names[g],
                "images": int(sizes[g]),
                "sums": [
                    (number(value, plus=signed), _tone(value, signed), round(100 * abs(value) / widest[name]))
                    for name, value, signed in ((name, totals[name][g], s.signed) for name, s in results.items())
                ],
            }
            for g in order
        ],
    }


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Picture:
    """A picture at the size it is stored with, its data URI, and whether its pixels are the drawing."""

    image: Image.Image
    uri: str
    pixel_art: bool


@dataclass(frozen=True)
class Tile:
    """A training image as shown: picture, rank, number under it and its tone, names, and a remark."""

    picture: Picture
    rank: int
    text: str
    tone: str
    name: str
    label: str
    remark: str = ""

    @property
    def short(self) -> str:
        """The end of a long name: folders repeat, file names tell."""
        return self.name if len(self.name) <= 30 else "…\N{WORD JOINER}" + self.name[-29:]


@dataclass(frozen=True)
class Album:
    """The training pictures that were read, with their names and groups."""

    train: Images
    pictures: Mapping[int, Picture]
    groups: Sequence[Group]

    def label(self, row: int) -> str:
        return self.groups[0].names[self.groups[0].codes[row]] if self.groups else ""

    def tile(self, row: int, rank: int, text: str, tone: str = "", remark: str = "") -> Tile:
        return Tile(self.pictures[row], rank, text, tone, plain(self.train.ids[row]), self.label(row), remark)

    def counted(self, counts: Iterable[tuple[int, int]], queries: int) -> list[Tile]:
        return [self.tile(row, rank, f"{count:,} of {queries:,}") for rank, (row, count) in enumerate(counts, 1)]

    def ranked(self, scored: Iterable[tuple[int, float]], signed: bool, digest: str) -> list[Tile]:
        """Tiles of one strip; a picture that is the query itself, or came earlier in the strip, says so."""
        tiles, seen = [], {digest: "same picture as the query"}
        for rank, (row, score) in enumerate(scored, 1):
            remark = seen.get(self.train.digests[row], "")
            seen.setdefault(self.train.digests[row], f"same picture as {rank}")
            tiles.append(self.tile(row, rank, number(score, plus=signed), _tone(score, signed), remark))
        return tiles

    def strips(self, reading: Reading, digest: str) -> dict[str, Any]:
        return {
            "reading": reading,
            "top": self.ranked(reading.top, reading.signed, digest),
            "bottom": self.ranked(reading.bottom, reading.signed, digest),
            "sums": [
                (
                    column,
                    note,
                    [(name, number(value, plus=reading.signed), _tone(value, reading.signed)) for name, value in sums],
                )
                for column, note, sums in reading.sums
            ],
        }


def _pictures(images: Images, rows: Iterable[int], side: int) -> dict[int, Picture]:
    """The wanted pictures, each read once, a few at a time, and kept no larger than `side`."""
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


# ----------------------------------------------------------------------------------------------------------- gallery

MARGIN, TILE, GAP, GUTTER, HEAD, FOOT, CAPTION, HEADING = 36, 128, 16, 56, 116, 84, 64, 34  # px
NARROWEST = 900  # px: the sentences must fit
INK, MUTED, LINE = "#1b1f24", "#5d6670", "#d8dde3"
TONES = {"pro": "#0b5cad", "con": "#b04208", "": INK}


def gallery_size(queries: int, methods: int, k: int) -> tuple[int, int]:
    """Width and height in px of a gallery of so many queries, methods and images per row."""
    width = 2 * MARGIN + _portrait_side(methods) + GUTTER + k * (TILE + GAP) - GAP
    return max(width, NARROWEST), HEAD + queries * _block_height(methods) + FOOT


def _portrait_side(methods: int) -> int:
    return TILE if methods == 1 else TILE + HEADING + CAPTION


def _block_height(methods: int) -> int:
    return GAP + methods * _row_height(methods)


def _row_height(methods: int) -> int:
    return TILE + CAPTION + (HEADING if methods > 1 else 0)


def _gallery(title: str, blocks: Sequence[Mapping[str, Any]]) -> bytes:
    """Each query on the left, per method one row of its strongest training images on the right, as a PNG."""
    methods = blocks[0]["methods"]
    blocks = blocks[: max(1, GALLERY_ROWS // len(methods))]
    k = min(GALLERY_TOP, *(len(strips["top"]) for strips in methods.values()))
    canvas = Image.new("RGB", gallery_size(len(blocks), len(methods), k), "white")
    draw = ImageDraw.Draw(canvas)
    width, right = canvas.width - 2 * MARGIN, MARGIN + _portrait_side(len(methods)) + GUTTER
    _text(draw, (MARGIN, 30), title, 28, width, INK, bold=True)
    _text(draw, (MARGIN, HEAD - 38), "query", 17, width, MUTED)
    only = f" ({next(iter(methods))})" if len(methods) == 1 else ""
    _text(draw, (right, HEAD - 38), f"its strongest training images{only}", 17, canvas.width - MARGIN - right, MUTED)
    for place, block in enumerate(blocks):
        _gallery_block(canvas, draw, HEAD + place * _block_height(len(methods)), block, k)
    for line, text in enumerate((_gallery_law(methods), ESTIMATE)):
        _text(draw, (MARGIN, canvas.height - FOOT + 20 + 26 * line), text, 16, width, MUTED if line else INK)
    buffer = io.BytesIO()
    canvas.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def _gallery_law(methods: Mapping[str, Any]) -> str:
    unsigned = [name for name, strips in methods.items() if not strips["reading"].signed]
    if not unsigned:
        return POSITIVE
    return MAGNITUDE if len(unsigned) == len(methods) else f"{POSITIVE} (magnitude only: {', '.join(unsigned)})"


def _gallery_block(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, block: Mapping[str, Any], k: int) -> None:
    methods, side = block["methods"], _portrait_side(len(block["methods"]))
    draw.line([(MARGIN, y), (canvas.width - MARGIN, y)], LINE)
    _paste(canvas, block["picture"], MARGIN, y + GAP, side)
    _text(draw, (MARGIN, y + GAP + side + 6), block["label"] or block["name"], 15, side + GUTTER - GAP, INK)
    if block["label"]:  # the prompt, where there is one
        _text(draw, (MARGIN, y + GAP + side + 27), block["name"], 15, side + GUTTER - GAP, MUTED)
    for place, (name, strips) in enumerate(methods.items()):
        x, upper = MARGIN + side + GUTTER, y + GAP + place * _row_height(len(methods))
        if len(methods) > 1:
            _text(draw, (x, upper), name, 18, k * (TILE + GAP), INK, bold=True)
            upper += HEADING
        for column, tile in enumerate(strips["top"][:k]):
            left = x + column * (TILE + GAP)
            _paste(canvas, tile.picture, left, upper, TILE)
            _text(draw, (left, upper + TILE + 5), tile.text, 17, TILE, TONES[tile.tone], bold=True)
            _text(draw, (left, upper + TILE + 27), tile.label or tile.name, 15, TILE, MUTED)


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
    shown, kept = text, len(text)
    while kept > 2 and font.getlength(shown) > width:
        kept -= 1
        shown = text[: kept // 2] + "…" + text[len(text) - (kept - kept // 2) :]
    draw.text(at, shown, fill=fill, font=font)


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same letters on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
