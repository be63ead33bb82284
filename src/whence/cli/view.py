"""whence view."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, RUNNING
from whence.cli.options import Option, Verb, error
from whence.cli.terminal import say


@dataclass(frozen=True)
class View:
    """Look at finished runs in a browser, on this machine alone: every picture, every method, every training image."""

    runs: Annotated[tuple[Path, ...], Option("Run folders.", "Arguments", argument=True)]
    images: Annotated[
        tuple[Path, ...], Option("Where images are that moved, or the folder around theirs; may be repeated.", DATA)
    ] = ()
    port: Annotated[int, Option("The first port that is tried; 0 for any.", RUNNING, min=0, max=65535)] = 8700
    host: Annotated[str, Option("An address of this machine that no other one reaches.", RUNNING)] = "127.0.0.1"
    no_browser: Annotated[bool, Option("Open no browser; print the address alone.", RUNNING)] = False


def view(options: View) -> None:
    try:
        from whence.view.serving import Serving, serve
    except ModuleNotFoundError as missing:
        told = f"the viewer needs {missing.name}, which is not installed"
        raise error(told, accepted="pip install 'whence-attribution[view]'") from None
    how = Serving(options.host, options.port, not options.no_browser, options.images)
    serve(options.runs, how, say)


VERB = Verb(view, View)
