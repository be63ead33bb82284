"""Pictures from a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from whence.adapters.folders import Model
from whence.data import TensorImages, tensor_images
from whence.engine import progress
from whence.noise import normals, seed_for, stream
from whence.store import Rows, Store
from whence.types import Engine, WhenceError


def sample(
    model: Model, count: int, seed: int, steps: int = 50, labels: Tensor | None = None, engine: Engine = Engine()
) -> Tensor:
    """Pictures from the model by DDIM (eta 0): [count, C, H, W] in [-1, 1].

    The initial noise of picture i is a function of (seed, i), so picture 3 is the same whether 4 or 400 are drawn.
    """
    network = model.final.load().to(engine.device, engine.dtype).eval()
    return denoise(
        network, model, start_noise(model, count, seed).to(engine.device, engine.dtype), steps, labels, engine
    )


def start_noise(model: Model, count: int, seed: int) -> Tensor:
    """The noise that pictures 0 .. count-1 of a seed begin with."""
    shape = (model.channels, model.resolution, model.resolution)
    return normals(stream(seed_for(seed, "sample"), 0, torch.arange(count)), shape)


def denoise(
    network: nn.Module,
    model: Model,
    noise: Tensor,
    steps: int,
    labels: Tensor | None,
    engine: Engine,
    quiet: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """DDIM from the given noise. watch: is told the timestep and the clean images predicted there, batch by batch."""
    scheduler = _ddim(model, steps)
    pieces = []
    with torch.no_grad():
        starts = range(0, len(noise), engine.batch_size)
        for start in starts if quiet else progress(starts, "sampling"):
            x = noise[start : start + engine.batch_size]
            cond = {} if labels is None else {"class_labels": labels[start : start + engine.batch_size].to(x.device)}
            for t in scheduler.timesteps:
                prediction = model.forward.predict(network, x, t.expand(len(x)).to(x.device), cond)
                moved = scheduler.step(prediction[:, : x.shape[1]], int(t), x, eta=0.0)
                x = moved.prev_sample
                if watch is not None:
                    watch(int(t), moved.pred_original_sample.clamp(-1, 1))
            pieces.append(x.clamp(-1, 1))
    return torch.cat(pieces)


def _ddim(model: Model, steps: int) -> Any:
    scheduler = DDIMScheduler.from_config({k: v for k, v in model.scheduler.items() if k != "_class_name"})
    scheduler.set_timesteps(steps)
    return scheduler


def labels_in_turn(model: Model, count: int) -> Tensor | None:
    """The classes of pictures 0 .. count-1 of a class-conditional model: each in turn; None for others."""
    classes = model.config.get("num_class_embeds")
    return None if classes is None else torch.arange(count) % classes


@dataclass(frozen=True, eq=False)
class Recorded:
    """The journey of pictures that `sample` drew (see `types.Journey`): sampled once more when first asked for, with the
    predicted clean images kept in the run folder. ids: the pictures' names; numbers: which of the seed's pictures they are.
    """

    model: Model
    ids: Sequence[str]
    numbers: Sequence[int]
    seed: int
    steps: int
    root: Path
    engine: Engine = Engine()

    @property
    def timesteps(self) -> list[int]:
        return [int(t) for t in _ddim(self.model, self.steps).timesteps]

    def predicted(self, timestep: int) -> TensorImages:
        arrays = {t: self._array(t) for t in self.timesteps}
        if timestep not in arrays:
            raise WhenceError(f"timestep {timestep} is none of the sampler's; accepted: {_short_list(self.timesteps)}")
        todo = {rows.start: rows for array in arrays.values() for rows in array.missing()}
        for start in progress(sorted(todo), "sampling once more"):
            self._record(arrays, todo[start])
        labels = self._labels()
        x0 = arrays[timestep].all().reshape(len(self.ids), *self._shape)
        return tensor_images(x0, ids=list(self.ids), labels=labels)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.model.channels, self.model.resolution, self.model.resolution)

    def _labels(self) -> Tensor | None:
        every = labels_in_turn(self.model, max(self.numbers) + 1)
        return None if every is None else every[list(self.numbers)]

    def _array(self, timestep: int) -> Rows:
        key = {
            "part": "journey",
            "timestep": timestep,
            "model": self.model.final.digest,
            "scheduler": self.model.scheduler,
            "seed": self.seed,
            "steps": self.steps,
            "numbers": list(self.numbers),
        }
        shape = (len(self.ids), math.prod(self._shape))
        return Store(self.root).array(key, shape, self.engine.dtype, self.engine.batch_size)

    def _record(self, arrays: Mapping[int, Rows], rows: slice) -> None:
        network = self.model.final.load().to(self.engine.device, self.engine.dtype).eval()
        noise = start_noise(self.model, max(self.numbers) + 1, self.seed)[list(self.numbers)][rows]
        labels = self._labels()
        seen: dict[int, list[Tensor]] = {t: [] for t in arrays}
        denoise(
            network,
            self.model,
            noise.to(self.engine.device, self.engine.dtype),
            self.steps,
            None if labels is None else labels[rows],
            self.engine,
            quiet=True,
            watch=lambda t, x0: seen[t].append(x0.flatten(1)),
        )
        for t, pieces in seen.items():
            arrays[t].write(rows, torch.cat(pieces))


def _short_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown} ... {numbers[-1]}" if len(numbers) > 6 else shown
