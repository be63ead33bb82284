"""Is it a copy? Whether the training image nearest to a picture is nearer than training images are to each other.

    p_j = (1 + #{i : c_i >= s_j}) / (n + 1);      flagged where p_j <= rate (see `conformal`)

with s_j the cosine of picture j and the nearest training image, c_i that of training image i and the nearest other one (see
`neighbours`). The same pixels as a training image are an exact copy, whatever the rate. Training images with the same pixels
count once, and pictures of one colour, which have no direction, are compared with nothing.

Picture j is compared with n images, training image i with n - 1, because the picture is no neighbour of i. The price: of
fresh pictures of the same kind at most rate + 1 / (n + 1) are flagged in expectation, not at most rate.

After Somepalli et al. 2023, "Diffusion Art or Digital Forgery?" (arXiv 2212.03860), who compare pictures with their nearest
training images. A flag says how near a picture is, not who made whom: a motif that everybody draws alike is near, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from whence.data.hashing import refuse_inside
from whence.data.images import image_folder
from whence.evaluation.conformal import Calibration, check_rate, least_rate
from whence.evaluation.neighbours import MOST, Neighbours, OfPictures, neighbours
from whence.features.encoders import Thumbnail
from whence.features.rows import identity
from whence.storage.columns import as_csv
from whence.storage.files import FORMAT_VERSION, readable, write_bytes, write_json
from whence.task.reports import COPIES
from whence.types import Engine, Images, WhenceError, describe, expect

TWINS = 0.99  # a threshold above it says that many training images have a twin


@dataclass(frozen=True)
class Copy:
    """What is known of one picture.

    Args:
        query: its name.
        nearest: the name of the nearest training image; "" where none can be compared.
        similarity: their cosine; None where nothing can be compared, as of a picture of one colour.
        threshold: what the similarity must be above to be flagged; None where only exact copies are looked for.
        p: how often a picture that is no copy is as near as this one; None likewise.
        exact: whether a training image has the same pixels.
        flagged: whether it is exact, or above the threshold.
        sentence: for a person, to be read after the name; "" where it is not flagged.
    """

    query: str
    nearest: str
    similarity: float | None
    threshold: float | None
    p: float | None
    exact: bool
    flagged: bool
    sentence: str


def near_copies(
    train: Images,
    queries: Images,
    rate: float = 0.01,
    encoder: OfPictures = Thumbnail(),
    most: int = MOST,
    engine: Engine = Engine(),
) -> list[Copy]:
    """The training image nearest to each picture, and whether the picture looks like a copy of it.

    Args:
        train: the training images, as they look.
        queries: the pictures, of the same size.
        rate: the share of pictures that are no copies that may be flagged.
        encoder: by what they are compared: `Thumbnail`, `Pretrained(folder)`, or `Function(call, digest)`.
        most: training images that say how near they are to each other, at most.
        engine: device of the encoder, and bytes of the rows that are held at once.

    Raises:
        WhenceError: a rate that so few training images do not allow, pictures of other sizes, none at all.
    """
    for name, images in (("train", train), ("queries", queries)):
        expect(images, Images, name, "Images: whence.image_folder(FOLDER, resolution), whence.tensor_images(x)")
    check_rate(rate, "rate")  # before anything is read
    return judged(neighbours(train, queries, encoder, most, engine), rate)


def judged(found: Neighbours, rate: float | None) -> list[Copy]:
    """What is known of each picture.

    Args:
        found: the nearest training images.
        rate: the share of pictures that are no copies that may be flagged; None for exact copies alone.
    """
    known = None if rate is None else calibrated(found, rate)
    return [_copy(found, j, known) for j in range(len(found.queries))]


def calibrated(found: Neighbours, rate: float) -> Calibration:
    """How near training images are to each other, as what is no copy.

    Args:
        found: the nearest training images.
        rate: the share of pictures that are no copies that may be flagged.
    """
    check_rate(rate, "rate")
    if not len(found.between):
        what = "there are no two training images that differ and can be compared"
        raise WhenceError(what, f"{found.images} training images", "more of them, that are not of one colour")
    return Calibration(found.between, rate)


def allows(found: Neighbours, rate: float) -> bool:
    """Whether there are training images enough for a rate."""
    return rate * (len(found.between) + 1) >= 1 - 1e-9


def _copy(found: Neighbours, j: int, known: Calibration | None) -> Copy:
    similarity, exact = float(found.similarity[j]), bool(found.exact[j])
    comparable = bool(np.isfinite(similarity))
    near = known is not None and comparable and known.flags(similarity)
    sentence = f"is an exact copy of {found.nearest[j]}: the same pixels" if exact else ""
    if near and not exact and known is not None:
        sentence = f"looks like a near-copy of {found.nearest[j]}: closer to it than {_share(known.rate)}"
    return Copy(
        found.queries[j],
        found.nearest[j],
        similarity if comparable else None,
        None if known is None else known.threshold,
        None if known is None else known.p(similarity) if comparable else 1.0,
        exact,
        exact or near,
        sentence,
    )


def _share(rate: float) -> str:
    """So many that are farther apart: true of what is flagged, since less than `rate` of the c_i reach it."""
    return f"{100 * (1 - rate):.6g} % of the training images are to any other"


def sentences(*found: Sequence[Copy]) -> dict[str, str]:
    """The warning that belongs above all scores, of each picture that is flagged, by its name. An exact copy comes before
    what only looks like one, then the first measure.

    Args:
        found: what is known of the pictures, by one measure or several.
    """
    flagged = [copy for copies in found for copy in copies if copy.flagged]
    told: dict[str, str] = {}
    for copy in sorted(flagged, key=lambda copy: not copy.exact):
        told.setdefault(copy.query, copy.sentence)
    return told


# ------------------------------------------------------------------------------------------------------ looked and kept


def sides(train: Path, queries: Path, resolution: int | None, skip: bool, folder: Path) -> tuple[Images, Images]:
    """Training images and pictures, in colour, of one size.

    Args:
        train: anything that `image_folder` opens.
        queries: likewise.
        resolution: side of the square that all are brought to; None for pictures as they are.
        skip: whether files that are not read may be skipped, however many.
        folder: of the results, which may lie in neither of them.
    """
    for source in (train, queries):
        refuse_inside(folder, source)
    found = [image_folder(source, resolution, skip=skip) for source in (train, queries)]
    return found[0], found[1]


@dataclass(frozen=True)
class Look:
    """How near-copies are looked for, and with what.

    Args:
        rate: the share of pictures that are no copies that each measure may flag.
        measures: what is compared.
        exact_at_least: whether too few training images for the rate are no error: exact copies are found all the same.
    """

    rate: float = 0.01
    measures: tuple[OfPictures, ...] = (Thumbnail(),)
    exact_at_least: bool = False


class Kept(TypedDict):
    """What copies.json holds."""

    asked: dict[str, Any]
    measures: list[dict[str, Any]]
    warnings: dict[str, str]


def looked(folder: Path, train: Images, queries: Images, how: Look, engine: Engine = Engine()) -> dict[str, Any]:
    """What FOLDER/copies.json holds from now on; read where it holds it already.

    `measures`: what was compared, calibrated on what, and all of `Copy` for each picture; `warnings`: name -> sentence.

    Args:
        folder: that keeps it.
        train: the training images, as they look.
        queries: the pictures.
        how: the rate, and what is compared.
        engine: see `near_copies`.
    """
    check_rate(how.rate, "rate")
    asked = {"train": identity(train), "queries": identity(queries), "rate": how.rate}
    asked["measures"] = [describe(measure) for measure in how.measures]
    if (folder / COPIES).is_file():
        found = readable(folder / COPIES, Kept)
        if found.get("asked") == asked:
            return found
    measured, every = [], []
    for encoder in how.measures:
        near = neighbours(train, queries, encoder, engine=engine)
        rate = None if how.exact_at_least and not allows(near, how.rate) else how.rate
        every.append(judged(near, rate))
        measured.append(_plain(near, rate, every[-1]))
    result = {"format_version": FORMAT_VERSION, "asked": asked, "measures": measured, "warnings": sentences(*every)}
    write_json(folder / COPIES, result)
    return result


def _plain(near: Neighbours, rate: float | None, copies: Sequence[Copy]) -> dict[str, Any]:
    return {
        "measure": near.measure,
        "rate": rate,
        "least_rate": least_rate(len(near.between)) if len(near.between) else None,
        "threshold": None if rate is None else calibrated(near, rate).threshold,
        "images": near.images,
        "compared": len(near.between),
        "duplicates": near.duplicates,
        "one_colour": near.one_colour,
        "pictures": [asdict(copy) for copy in copies],
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """The pictures that look like copies, a line each.

    Args:
        result: what `looked` returns.
    """
    return [f"{name} {sentence}" for name, sentence in result["warnings"].items()]


def summary(result: Mapping[str, Any]) -> str:
    """How many look like copies.

    Args:
        result: what `looked` returns.
    """
    pictures, flagged = result["measures"][0]["pictures"], len(result["warnings"])
    exact = sum(copy["exact"] for copy in pictures)
    verb = "looks like a copy of a training image" if flagged == 1 else "look like copies of training images"
    told = f"{flagged:,} of {len(pictures):,} pictures {verb}{f' ({exact:,} exact)' if exact else ''}"
    if any(measure["rate"] is not None for measure in result["measures"]):
        return told
    return f"{told}; only exact copies were looked for, since there are too few training images to tell near ones"


def meaning(measure: Mapping[str, Any]) -> str:
    """By what a measure calls a picture a copy.

    Args:
        measure: one of those of `looked`.
    """
    left_out = {"with the pixels of another one": measure["duplicates"], "of one colour": measure["one_colour"]}
    told = "".join(f"; {count:,} training images {what} left out" for what, count in left_out.items() if count)
    name, n = measure["measure"], measure["compared"]
    if measure["rate"] is None:
        least = measure["least_rate"]
        allowed = "" if least is None else f" (they allow rates from {least:g} on)"
        return f"{name}, exact copies only: {n:,} training images are too few to say more{allowed}{told}"
    some = f" ({n:,} of {measure['images']:,} looked at)" if n < measure["images"] else ""
    if measure["threshold"] > TWINS:
        told += "; there are near-twins among the training images themselves, so that only closer copies stand out"
    return f"{name}, similarity above {measure['threshold']:.4g}: closer than {_share(measure['rate'])}{some}{told}"


COLUMNS = ("query", "measure", "nearest", "similarity", "threshold", "p", "exact", "flagged", "sentence")


def write_table(path: Path, result: Mapping[str, Any]) -> None:
    """A row per picture and measure, as CSV.

    Args:
        path: of the file.
        result: what `looked` returns.
    """
    rows = [{"measure": measure["measure"], **copy} for measure in result["measures"] for copy in measure["pictures"]]
    write_bytes(path, as_csv({name: [row[name] for row in rows] for name in COLUMNS}))
