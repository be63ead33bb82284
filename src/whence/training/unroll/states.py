"""Going back over the steps of a training: which states are kept, and how the rest are computed again.

A stretch of steps is cut into parts, again and again; the first state of each part is kept, in memory or on disk. A replay
that gives other numbers than the training did is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from whence.storage.arrays import tensor_digest, write_tensors
from whence.storage.files import progress
from whence.training.optimizer import State, start, vector
from whence.training.step import Diverged
from whence.training.unroll.run import Run, Trainer
from whence.types import Weights, WhenceError, digest


class Kept:
    """States by step, in memory up to some bytes and in a folder beyond; their averaged weights are not kept."""

    def __init__(self, room: int, folder: Path | None):
        self.room, self.folder = room, folder
        self.held: dict[int, State] = {}
        self.digests: dict[int, str] = {}

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"state-{step:06d}.safetensors"

    def put(self, state: State) -> None:
        if len(self.held) < self.room or self.folder is None:
            self.held[state.step] = replace(state, ema=state.weights)
            return
        kept = {"weights": state.weights, "m": state.m, "v": state.v}
        flat = {f"{part}/{name}": w.cpu().contiguous() for part, values in kept.items() for name, w in values.items()}
        write_tensors(self._path(state.step), flat)
        self.digests[state.step] = _digest(flat)

    def get(self, step: int, like: State) -> State:
        if step in self.held:
            return self.held[step]
        flat = self._read(step)
        weights, m, v = (
            {name: flat[f"{part}/{name}"].to(w.device) for name, w in like.weights.items()}
            for part in ("weights", "m", "v")
        )
        return State(weights, m, v, weights, step)

    def _read(self, step: int) -> dict[str, Tensor]:
        path = self._path(step)
        try:
            flat = load_file(path)
            whole = _digest(flat) == self.digests[step]
        except (SafetensorError, OSError):
            whole = False
        if not whole:
            told = "a state of the training is not what was written there"
            raise WhenceError(
                told, str(path), "the same again, with a spill folder on another disk if it happens twice"
            )
        return flat

    def drop(self, step: int) -> None:
        if step in self.held:
            del self.held[step]
        else:
            self._path(step).unlink()


def _digest(flat: Weights) -> str:
    return digest([[name, tensor_digest(flat[name])] for name in sorted(flat)], 64)


def fan_of(keep: str, steps: int) -> int:
    """Into how many parts a stretch of steps is cut, again and again, to go back over it."""
    return {"all": steps, "sqrt": math.isqrt(steps - 1) + 1, "tree": 2}[keep]


def parts(low: int, high: int, fan: int) -> range:
    """Where the parts of the steps low .. high-1 begin.

    Args:
        low: the first step.
        high: the step after the last.
        fan: parts, at most.
    """
    return range(low, high, -(-(high - low) // fan))


def held(total: int, fan: int) -> int:
    """States held at once while going back over `total` steps."""
    if total == 1:
        return 1
    starts = parts(0, total, fan)
    return len(starts) - 1 + held(min(starts.step, total), fan)


def _backwards(trainer: Trainer, kept: Kept, low: int, high: int, fan: int, final: State) -> Iterator[State]:
    """The states before steps high-1, ..., low. The first of each part is kept at every level, the rest recomputed."""
    if high - low == 1:
        yield kept.get(low, final)
        return
    starts = parts(low, high, fan)
    state = kept.get(low, final)
    while state.step < starts[-1]:
        state = trainer.after(state, average=False)
        if state.step in starts:
            kept.put(state)
    del state
    for begin in reversed(starts):
        yield from _backwards(trainer, kept, begin, min(begin + starts.step, high), fan, final)
        if begin != low:
            kept.drop(begin)


def replayed(trainer: Trainer, kept: Kept, fan: int, final: State) -> Iterator[State]:
    """The states before steps T-1, ..., 0. The first level of `_backwards` is kept already, and stays.

    Args:
        trainer: takes the steps.
        kept: the states that `final_state` left behind.
        fan: into how many parts a stretch of steps is cut.
        final: the state after the last step.
    """
    total = trainer.recipe.steps
    starts = parts(0, total, fan)
    for begin in reversed(starts):
        yield from _backwards(trainer, kept, begin, min(begin + starts.step, total), fan, final)


def final_state(trainer: Trainer, kept: Kept, fan: int, what: str) -> State:
    """The final state, leaving the first state of each part behind.

    Args:
        trainer: takes the steps.
        kept: where states are left.
        fan: into how many parts the steps are cut.
        what: for the progress bar.
    """
    total = trainer.recipe.steps
    starts = parts(0, total, fan)
    state = trainer.first()
    for _ in progress(range(total), f"{what}: training"):
        if state.step in starts:
            kept.put(state)
        state = trainer.after(state)
    if not all(bool(torch.isfinite(w).all()) for w in state.weights.values()):
        raise Diverged("training diverged at the last step: a weight is NaN or Inf; lower the learning rate")
    return state


def same_end(run: Run, ended: Weights, trained: Weights) -> None:
    """Refuse a replay whose averaged weights end elsewhere than the model did.

    Args:
        run: the training.
        ended: the averaged weights of the replay.
        trained: those of the model.
    """
    missing = sorted(ended.keys() - trained.keys())
    if missing:
        raise WhenceError(f"unroll: the trained model has no parameter {missing[0]!r}; it is not of this study")
    begun = start(run.module).weights

    def distance(a: Weights, b: Weights) -> float:
        return math.sqrt(sum(float((w.double() - b[name].to(w).double()).square().sum()) for name, w in a.items()))

    apart, way = distance(ended, trained), distance(ended, begun)
    if not apart <= 1e-3 * way:
        raise WhenceError(
            f"unroll: replayed to step {run.recipe.steps}, training ends {apart / way:.1e} of its way from the model "
            "given; recipe, seed, images and number format must be those it was trained with"
        )


def reproduced(m: Tensor, later: State) -> None:
    """Refuse a replayed step whose first moment is not the one that it had in training."""
    then = vector(later.m)
    apart, largest = float((m - then).abs().max()), float(then.abs().max())
    # Not to the bit: the batch that is differentiated may be summed in another order.
    if not apart <= (1e-8 if m.dtype == torch.float64 else 1e-3) * largest:
        raise WhenceError(
            f"unroll: step {later.step} gives other numbers when it is replayed (its moment is {apart:.1e} off); images, "
            "network and forward must be the same every time"
        )
