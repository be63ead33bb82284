"""The page of `whence clean`: each list as a table with pictures, how it was found and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whence.report.html import filled
from whence.report.pictures import Picture, pictures_of
from whence.report.words import plain
from whence.types import Images

MOST = 60  # rows of a page's list; the files have all
SIDE = 96


@dataclass(frozen=True)
class Evidence:
    """A row of a list.

    Args:
        row: the image.
        said: of it.
        beside: the image that is shown beside it; None for none.
        dropped: whether it is on the list of those that may be dropped.
    """

    row: int
    said: str
    beside: int | None
    dropped: bool


@dataclass(frozen=True)
class Section:
    """A list as shown.

    Args:
        name: of its files.
        title: its heading.
        what: how it was found.
        sure: how sure that is.
        rows: those that are shown, the most suspicious first.
        dropped: how many may be dropped.
        file: with their names.
        more: images that are ranked behind the rows.
    """

    name: str
    title: str
    what: str
    sure: str
    rows: Sequence[Evidence]
    dropped: int
    file: str
    more: int = 0


def clean_page(
    title: str, images: Images, labels: Sequence[object], sections: Sequence[Section], absent: Mapping[str, str]
) -> bytes:
    """The page, as bytes. The same input gives the same bytes.

    Args:
        title: of the page.
        images: as they look.
        labels: of the images.
        sections: the lists.
        absent: what was not looked for, and why.
    """
    shown = {each.name: each.rows[:MOST] for each in sections}
    rows = {row for each in shown.values() for one in each for row in (one.row, one.beside) if row is not None}
    pictures = pictures_of(images, rows, SIDE)
    page = {
        "title": title,
        "images": len(images),
        "sections": [
            {
                "name": each.name,
                "title": each.title,
                "what": each.what,
                "sure": each.sure,
                "dropped": each.dropped,
                "file": each.file,
                "cut": len(shown[each.name]) < len(each.rows),
                "more": each.more + len(each.rows) - len(shown[each.name]),
                "beside": any(one.beside is not None for one in shown[each.name]),
                "rows": [_row(one, images, labels, pictures) for one in shown[each.name]],
            }
            for each in sections
        ],
        "absent": [(name, why) for name, why in absent.items()],
    }
    return filled("clean.html", page)


def _row(one: Evidence, images: Images, labels: Sequence[object], pictures: Mapping[int, Picture]) -> dict[str, object]:
    label, beside = labels[one.row], one.beside
    return {
        "picture": pictures[one.row],
        "name": plain(images.ids[one.row]),
        "label": "" if label is None else plain(label),
        "said": plain(one.said),
        "beside": None if beside is None else (pictures[beside], plain(images.ids[beside])),
        "dropped": one.dropped,
    }
