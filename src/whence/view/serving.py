"""The server: on this machine alone, at the first free port, under an address that nobody can guess."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from whence.plain import WhenceError
from whence.view.app import viewer_app
from whence.view.run import open_run

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TRIES = 20  # ports that follow each other


@dataclass(frozen=True)
class Serving:
    """How the runs are served.

    Args:
        host: an address of this machine that no other one reaches.
        port: the first that is tried; 0 for any that is free.
        browser: whether one is opened.
        images: folders in which pictures that moved may be.
    """

    host: str = "127.0.0.1"
    port: int = 8700
    browser: bool = True
    images: tuple[Path, ...] = ()


def bound(host: str, port: int, say: Callable[[str], None]) -> socket.socket:
    """A socket at the first of some ports that is free; it is said where that is another one.

    Args:
        host: of `LOOPBACK`.
        port: the first; 0 for any.
        say: what is done with the line.
    """
    if host not in LOOPBACK:
        raise WhenceError(
            f"{host} can be reached from other machines",
            "--host",
            f"{', '.join(LOOPBACK)}; `ssh -L` for a machine elsewhere",
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    last = min(port + TRIES, 2**16) if port else 1
    for number in range(port, last):
        found = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere this would let two listen at one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((host, number))
            found.listen(128)  # at once: who asks before the server is ready waits, and is not refused
        except OSError:
            found.close()
            continue
        if port and number != port:
            say(f"port {port} is in use; {number} is taken instead")
        return found
    raise WhenceError(
        f"ports {port} to {last - 1} cannot be used on {host}", "--port", "a free port above 1023, 0 for any"
    )


def address(found: socket.socket, host: str, token: str) -> str:
    """What to open in a browser."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{found.getsockname()[1]}/{token}/"


def has_display() -> bool:
    """Whether a browser would be seen: on Linux only with a screen."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def serve(roots: Sequence[Path], how: Serving, say: Callable[[str], None]) -> None:
    """Open the runs, say where they are to be seen, and answer until Ctrl-C.

    Args:
        roots: run folders.
        how: they are served.
        say: what is done with each line.
    """
    token = secrets.token_urlsafe(24)
    with bound(how.host, how.port, say) as found:
        runs = [open_run(root, how.images) for root in roots]
        for run in runs:
            methods, train, queries = ", ".join(run.methods), len(run.train), len(run.queries)
            say(f"{run.root}: {queries:,} pictures, {train:,} training images, {methods}")
            for line in run.told:
                say(f"{run.root}: {line}")
        where = address(found, how.host, token)
        say(where)
        say("open this address in a browser of this machine; Ctrl-C ends it")
        if how.browser and not has_display():
            say("there is no display here, so no browser was opened")
        elif how.browser:
            webbrowser.open(where)
        config = uvicorn.Config(
            viewer_app(runs, token),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            timeout_graceful_shutdown=2,
        )
        with suppress(KeyboardInterrupt):  # it ends by itself, and raises the signal once more
            uvicorn.Server(config).run(sockets=[found])
