"""What classes of diffusers and transformers raise for settings that they do not know: any exception, and here one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from whence.types import WhenceError


@contextmanager
def refusing(what: str, where: str, accepted: str = "the file as save_pretrained wrote it") -> Iterator[None]:
    """Around a call of other people's code, whose errors are those of the settings that it is given.

    Args:
        what: does not work.
        where: the file of the settings.
        accepted: in its place.
    """
    try:
        yield
    except (WhenceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise WhenceError(f"{what} ({why})", where, accepted) from error
