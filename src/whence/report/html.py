"""Pages from their templates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

LONGEST = 4000  # letters of one value
PICTURE = "data:image/"


def shown(value: object) -> object:
    """A value as a page shows it: texts in one line of printable letters, since names of files, captions and creators come
    from anybody, and not longer than a person reads; what is markup already stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = value
    if not value.isprintable():
        text = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in value)
    if text.startswith(PICTURE):
        return text
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text) - LONGEST:,} letters more)"


def filled(template: str, page: Mapping[str, object]) -> bytes:
    """A page, from `templates/` and what it says. A name that the template lacks a value for is an error.

    Args:
        template: its file.
        page: the values.
    """
    # "replace": file names that are not valid Unicode arrive as surrogates, which no page can hold.
    return _environment().get_template(template).render(page).encode("utf-8", "replace")


@cache
def _environment() -> jinja2.Environment:
    """Once in a process: it keeps the templates that it has read."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
