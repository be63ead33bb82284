"""Where a long training stands, kept about every twenty seconds, so that little is lost with it.

Going on from there gives the same bits as never having stopped. The file is gone when the training is over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from whence.storage.arrays import read_checked, write_checked
from whence.training.optimizer import State
from whence.types import Weights, digest

Said = TypeVar("Said")
EVERY = 20.0
"""Seconds of training between two states that are kept."""
SHARE = 20
"""A state is kept after so many times as long as keeping the last one took: at most this part of the time goes there."""
PARTS = ("weights", "m", "v", "ema")


@dataclass
class Standing:
    """The state of a training that is not over.

    Args:
        folder: in which it is kept; None for nowhere.
        name: of the training, for people.
        key: what the state depends on: of another training nothing is gone on from.
    """

    folder: Path | None
    name: str
    key: Mapping[str, object]
    seconds: float = field(default=0.0, init=False)  # that were spent before it was gone on from

    @property
    def path(self) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.name}-{digest(self.key)}.safetensors"

    def state(self) -> State | None:
        """Where it stands; None where nothing was kept."""
        if self.path is None or not self.path.is_file():
            return None
        found = read_checked(self.path, then="run again, which begins it anew")
        parts: dict[str, Weights] = {part: {} for part in PARTS}
        for name, value in found.items():
            part, _, weight = name.partition("/")
            if part in parts:
                parts[part][weight] = value
        self.seconds = float(found["seconds"])
        return State(**parts, step=int(found["step"]))

    def kept(self, run: Iterator[tuple[State, Said]], steps: int) -> Iterator[tuple[State, Said]]:
        """The states of a training, each passed on; now and then one is kept.

        Args:
            run: (state, what is said of it) after every step.
            steps: of the training; its last state is a result.
        """
        begun = last = time.monotonic()
        pause = EVERY
        for state, said in run:
            yield state, said
            now = time.monotonic()
            if self.path is not None and state.step < steps and now - last >= pause:
                self._keep(self.path, state, self.seconds + now - begun)
                last = time.monotonic()
                pause = max(EVERY, SHARE * (last - now))

    def _keep(self, path: Path, state: State, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flat = {f"{part}/{name}": w.clone() for part in PARTS for name, w in getattr(state, part).items()}
        numbers = {"step": torch.tensor(state.step), "seconds": torch.tensor(seconds, dtype=torch.float64)}
        write_checked(path, {**flat, **numbers})

    def over(self) -> None:
        """The training has given its result."""
        if self.folder is not None:
            for path in self.folder.glob(f"{self.name}-*.safetensors"):
                path.unlink(missing_ok=True)


@dataclass
class RecentLoss:
    """The mean of the last losses, for a bar: each is that of a few timesteps, and scatters.

    Args:
        over: about as many.
    """

    over: int = 50
    mean: float = field(default=0.0, init=False)
    seen: int = field(default=0, init=False)

    def told(self, step: tuple[State, object]) -> str:
        """What is said after a step of one training, or of several at once."""
        value = float(torch.as_tensor(step[1]).double().mean())
        self.seen += 1
        self.mean += (value - self.mean) / min(self.seen, self.over)
        return f"loss {self.mean:.4g}"
