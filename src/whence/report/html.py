"""Pages from their templates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from whence.plain import content_hash

LONGEST = 4000  # letters of one value
FOLDED = 60  # letters of a name in a line of others
PICTURE = "data:image/"
GLUE = "\N{NO-BREAK SPACE}"
TEMPLATES = Path(__file__).parent / "templates"


def shown(value: object) -> object:
    """A value as a page shows it: texts in one line of printable letters, since names of files, captions and creators come
    from anybody, and not longer than a person reads; what is markup already stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = value
    if not value.isprintable():
        text = "".join(
            c if c.isprintable() or c == GLUE else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in value
        )
    if text.startswith(PICTURE):
        return text
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text) - LONGEST:,} letters more)"


def isolated(value: object, longest: int = FOLDED) -> object:
    """A name from anybody within our own sentence: in a direction of its own, and folded in the middle where it is long.

    Args:
        value: the name.
        longest: letters that are shown; the first few hundred are there on hover.
    """
    if isinstance(value, Markup):
        return value
    text = str(shown(str(value)))
    if len(text) <= longest:
        return Markup("<bdi>{}</bdi>").format(Markup("_<wbr>").join(text.split("_")))
    short = f"{text[: longest * 2 // 3]}…{text[-(longest // 3) :]}"
    return Markup('<bdi title="{}">{}</bdi>').format(text[:400], short)


def filled(template: str, page: Mapping[str, object], script: str = "") -> bytes:
    """A page, from `templates/` and what it says. A name that the template lacks a value for is an error.

    Args:
        template: its file.
        page: the values.
        script: the file in `templates/` of the one script that its policy allows; "" for none at all.
    """
    code = (TEMPLATES / script).read_text("utf-8") if script else ""
    allowed = f"script-src '{content_hash(code)}'; " if script else ""
    values = {**page, "script": Markup(code), "scripts_allowed": Markup(allowed)}
    # "replace": file names that are not valid Unicode arrive as surrogates, which no page can hold.
    return _environment().get_template(template).render(values).encode("utf-8", "replace")


@cache
def _environment() -> jinja2.Environment:
    """Once in a process: it keeps the templates that it has read."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    environment.filters["name"] = isolated
    return environment
