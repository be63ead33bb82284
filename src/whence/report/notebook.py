"""What a notebook shows of scores: the strongest images of the first pictures, with thumbnails where pictures are known."""

from __future__ import annotations

import html
from collections.abc import Mapping

from whence.report.pictures import pictures_of
from whence.types import Images, Scores, WhenceError

PICTURES, IMAGES, SIDE = 10, 5, 48


def table(scores: Scores) -> str:
    """HTML: a row for each of the first pictures, with its strongest proponents and opponents."""
    strongest = scores.values[:PICTURES].sort(dim=1, descending=True, stable=True).indices
    count = min(IMAGES, len(scores.train_ids))
    shown = [[*row[:count], *row.flip(0)[:count]] for row in strongest]
    queries, train = scores.pictures or (None, None)
    own = _thumbnails(queries, range(len(shown)))
    theirs = _thumbnails(train, {int(i) for row in shown for i in row})
    rows = []
    for query, row in enumerate(shown):
        cells = [
            f"<td>{theirs.get(int(i), '')}{html.escape(str(scores.train_ids[i]))} ({scores.values[query, i]:+.3g})</td>"
            for i in row
        ]
        name = html.escape(str(scores.query_ids[query]))
        rows.append(f"<tr><th>{own.get(query, '')}{name}</th>{''.join(cells)}</tr>")
    heads = "".join(f"<th colspan={count}>strongest {what}</th>" for what in ("proponents", "opponents"))
    return f"<p>{html.escape(repr(scores))}</p><table><tr><th>query</th>{heads}</tr>{''.join(rows)}</table>"


def _thumbnails(images: Images | None, rows: range | set[int]) -> Mapping[int, str]:
    """An <img> for each of some images, none where they are no pictures."""
    if images is None:
        return {}
    try:
        found = pictures_of(images, rows, SIDE)
    except (WhenceError, OSError):  # features, latents, or files that are gone: the names are enough
        return {}
    style = f"display:block;width:{SIDE}px;image-rendering:"
    return {
        row: f'<img src="{picture.uri}" style="{style}{"pixelated" if picture.pixel_art else "auto"}">'
        for row, picture in found.items()
    }
