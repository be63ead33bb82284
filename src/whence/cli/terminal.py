"""What a terminal is told. Names of files, captions and creators come from anybody: they may hold what moves its cursor,
turns its direction, sets its title, or begins a line that looks like one of ours.

Every line and every cell is therefore printed in letters that are seen; all others are spelt out: "\\x1b", "\\u202e".
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: str) -> str:
    """One line that a terminal shows as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def joined(text: str) -> str:
    """A text of several lines, as libraries write them, as one line."""
    return printable(" ".join(text.split()))


def say(line: object, err: bool = False) -> None:
    """Print a line.

    Args:
        line: of any letters.
        err: on stderr.
    """
    stream = sys.stderr if err else sys.stdout
    text = printable(str(line))
    # Whatever letters it takes: a pipe of a job may know nothing but ASCII.
    code = getattr(stream, "encoding", None) or "utf-8"
    typer.echo(text.encode(code, "backslashreplace").decode(code), err=err)


def console(width: int | None = None, soft_wrap: bool = False) -> Console:
    """What prints tables, in which texts are texts: no markup, no emoji, nothing that is not seen.

    Args:
        width: in letters; that of the terminal by default.
        soft_wrap: whether long lines stay lines.
    """
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            code = self.encoding or "utf-8"
            return super().render_str(printable(text).encode(code, "backslashreplace").decode(code), **how)

    return Plain(width=width, soft_wrap=soft_wrap, markup=False, emoji=False)
