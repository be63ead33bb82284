"""The owners of images (creators, classes): whose rows, and one picture that stands for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from whence.data.images import Subset
from whence.plain import owner_of
from whence.types import Images, WhenceError

IMAGE = "image"
"""Where every image is its own owner."""


def groups(column: Sequence[object]) -> dict[str, list[int]]:
    """The rows of each value of a column (creator, class), sorted. Images without a value are those of `plain.UNKNOWN`:
    nobody is dropped."""
    found: dict[str, list[int]] = {}
    for row, value in enumerate(column):
        found.setdefault(owner_of(value), []).append(row)
    return dict(sorted(found.items()))


def owners(images: Images, by: str) -> dict[str, list[int]]:
    """Owner -> its rows.

    Args:
        images: n of them.
        by: a column of the metadata, or IMAGE for every image by its own name.
    """
    if by == IMAGE:
        return {name: [row] for row, name in enumerate(images.ids)}
    if by not in images.meta:
        known = ", ".join([IMAGE, *images.meta])
        raise WhenceError(f"no column {by!r} in the training images", "by", known)
    return groups(images.meta[by])


def standing_for(images: Images, by: str, chosen: Sequence[str] | None = None) -> Images:
    """One picture for each owner, its first, under the owner's name and with the number of its images.

    Args:
        images: n of them.
        by: see `owners`; IMAGE returns the images as they are.
        chosen: some of the owners, in this order; None for all.
    """
    if by == IMAGE and chosen is None:
        return images
    found: Mapping[str, Sequence[int]] = owners(images, by)
    names = list(found if chosen is None else chosen)
    first = [found[name][0] for name in names]
    counts = {"images": [len(found[name]) for name in names]}
    return Subset(images, first, names, [images.digests[row] for row in first], counts, None)
