"""Ctrl-C and SIGTERM, which schedulers send: one line and exit code 130, from the first moment on. Nothing is imported here
that takes time.

While Python imports, an exception out of nowhere ends in whatever the library that is just being imported makes of it: a
traceback, another exception, or nothing. Nothing is half done then, so the process ends on the spot.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # by Ctrl-C, as shells have it
MESSAGE = "stopped; what is finished is kept, run the same command again to go on"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
IMPORTING = "<frozen importlib._bootstrap>"


def stop(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that temporary files go, or on the spot where that cannot be: see above."""
    _listen(at_once)  # whoever sends a second one means it
    if _importing(frame):
        at_once(number, frame)
    raise KeyboardInterrupt


def at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, f"whence: {MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            return True
        frame = frame.f_back
    return False


def _listen(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a script
            signal.signal(number, handler)


@contextmanager
def listening() -> Iterator[None]:
    """Signals end what is done meanwhile; afterwards they do what they did before."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other one ask for signals
        yield
        return
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    _listen(stop)
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def stopped() -> bool:
    """Whether a signal came: an error afterwards is what some library made of it."""
    return signal.getsignal(signal.SIGINT) is at_once or signal.getsignal(signal.SIGTERM) is at_once


def _is_the_program() -> bool:
    """Whether this process is `whence` or `python -m whence.cli.main`, and not somebody who imports it."""
    name = os.path.basename(sys.argv[0]) if sys.argv else ""
    return name in ("whence", "whence.exe") or (name == "-m" and "whence.cli.main" in sys.orig_argv)


if _is_the_program():
    _listen(at_once)
