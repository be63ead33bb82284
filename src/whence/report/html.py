"""Pages from their templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jinja2


def filled(template: str, page: Mapping[str, object]) -> bytes:
    """A page, from `templates/` and what it says. A name that the template lacks a value for is an error.

    Args:
        template: its file.
        page: the values.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # "replace": file names that are not valid Unicode arrive as surrogates, which no page can hold.
    return environment.get_template(template).render(page).encode("utf-8", "replace")
