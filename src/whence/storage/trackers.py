"""Losses for a tracker of experiments, by accelerate's adapters: TensorBoard, or Weights & Biases.

Both write files below a folder. Weights & Biases would send them away, so it is started offline unless its own variable
WANDB_MODE says otherwise; `wandb sync` sends what was written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from whence.types import WhenceError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = ("tensorboard", "wandb")
LOGS = "logs"
Told = Callable[[int, Mapping[str, float]], None]
"""Takes a step and numbers by name."""


def silent(step: int, values: Mapping[str, float]) -> None:
    """No tracker."""


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, before anything is computed.

    Args:
        name: one of TRACKERS.
    """
    if name not in TRACKERS:
        raise WhenceError(f"no tracker {name!r}", "--report_to", ", ".join(TRACKERS))
    if find_spec(name) is None:
        raise WhenceError(f"{name} is not installed", "--report_to", f"pip install {name}, or no such option")


@contextmanager
def tracked(name: str | None, folder: Path, settings: Mapping[str, object]) -> Iterator[Told]:
    """What takes numbers while a work goes on; they lie in FOLDER/logs.

    Args:
        name: one of TRACKERS; None for none.
        folder: of the work.
        settings: of the work, kept beside its numbers.
    """
    if name is None:
        yield silent
        return
    check_tracker(name)
    tracker = _started(name, folder)
    try:
        tracker.store_init_configuration(flat(settings))
        yield lambda step, values: tracker.log(dict(values), step=step)
    finally:
        tracker.finish()


def _started(name: str, folder: Path) -> GeneralTracker:
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # which the adapters ask who the main process is
    logs = folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    if name == "tensorboard":
        tracker: GeneralTracker = TensorBoardTracker("whence", str(logs))
    else:
        tracker = WandBTracker("whence", dir=str(logs), mode=os.environ.get("WANDB_MODE", "offline"))
    tracker.start()
    return tracker


def flat(settings: Mapping[str, object], before: str = "") -> dict[str, bool | int | float | str]:
    """Settings in settings under one name each, "optimizer.learning_rate"; what is no number, truth value or text as text.

    Args:
        settings: by name.
        before: what their names begin with.
    """
    found: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}.")
        else:
            found[before + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
