"""How pictures came about: the clean images that the network saw in them on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from whence.data.images import tensor_images
from whence.models.encode import with_text
from whence.models.families.family import Cond
from whence.models.pipeline import Model
from whence.models.sampling import (
    Prompted,
    cond_of,
    denoise,
    guided_by_class,
    labels_in_turn,
    latent_shape,
    noise_of,
    prompted,
    start_noise,
    timesteps_of,
)
from whence.storage.arrays import Rows, Store
from whence.storage.files import progress
from whence.types import Engine, Images, WhenceError


@dataclass(frozen=True, eq=False)
class Recorded:
    """The journey of pictures that `sample` or `draw_with_text` drew (see `types.Trajectory`): sampled once more when first
    asked for, with the predicted clean images (latents, for a model of latents) kept in the run folder. ids: the pictures'
    names; numbers: which of the seed's pictures they are; told: their prompts, None without; guidance: towards a class.
    """

    model: Model
    ids: Sequence[str]
    numbers: Sequence[int]
    seed: int
    steps: int
    root: Path
    engine: Engine = Engine()
    prompted: Prompted | None = None
    guidance: float | None = None

    @property
    def timesteps(self) -> list[int]:
        found = timesteps_of(self.model, self.steps, self._shape[1:])
        if len(set(found)) < len(found):
            raise WhenceError(
                f"journey: two of {self.steps} sampling steps have the same of the model's "
                f"{self.model.forward.timesteps} noise levels nearest to them; draw with fewer steps"
            )
        return found

    def predicted(self, timestep: int) -> Images:
        arrays = {t: self._array(t) for t in self.timesteps}
        if timestep not in arrays:
            raise WhenceError(f"timestep {timestep} is none of the sampler's; accepted: {_short_list(self.timesteps)}")
        todo = {rows.start: rows for array in arrays.values() for rows in array.missing()}
        for start in progress(sorted(todo), "sampling once more"):
            self._record(arrays, todo[start])
        x0 = arrays[timestep].all().reshape(len(self.ids), *self._shape)
        if self.prompted is None:
            return tensor_images(x0, ids=list(self.ids), labels=self._labels())
        seen = tensor_images(x0, ids=list(self.ids), meta={"text": self.prompted.prompts})
        return with_text(self.model, seen, self.root, self.engine, self.prompted.resolution)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return latent_shape(self.model, self.model.resolution if self.prompted is None else self.prompted.resolution)

    def _labels(self) -> Tensor | None:
        labels = labels_in_turn(self.model, max(self.numbers) + 1)
        return None if labels is None else labels[list(self.numbers)]

    def _array(self, timestep: int) -> Rows:
        key = {
            "part": "journey",
            "timestep": timestep,
            "model": self.model.final.digest,
            "scheduler": self.model.scheduler,
            "seed": self.seed,
            "steps": self.steps,
            "numbers": list(self.numbers),
            **({} if self.prompted is None else {"told": self.prompted}),
            **({} if self.guidance is None else {"guidance": self.guidance}),
        }
        shape = (len(self.ids), math.prod(self._shape))
        return Store(self.root).array(key, shape, self.engine.dtype, self.engine.batch_size)

    def _record(self, arrays: Mapping[int, Rows], rows: slice) -> None:
        seen: dict[int, list[Tensor]] = {t: [] for t in arrays}

        def watch(t: int, x0: Tensor) -> None:
            seen[t].append(x0.flatten(1))

        network = self.model.final.load().to(self.engine.device, self.engine.dtype).eval()
        model, noise, cond = self._start(rows)
        noise = noise.to(self.engine.device, self.engine.dtype)
        denoise(network, model, noise, self.steps, cond, self.engine, True, watch)
        for t, pieces in seen.items():
            arrays[t].write(rows, torch.cat(pieces))

    def _start(self, rows: slice) -> tuple[Model, Tensor, Cond]:
        """What some of the pictures were drawn by, from which noise, and under which conditions."""
        if self.prompted is None:
            noise = start_noise(self.model, max(self.numbers) + 1, self.seed)[list(self.numbers)][rows]
            labels = self._labels()
            return guided_by_class(self.model, self.guidance), noise, cond_of(None if labels is None else labels[rows])
        how = replace(self.prompted, prompts=self.prompted.prompts[rows])
        model, cond = prompted(self.model, self.model.parts(self.engine), how, self.engine)
        return model, noise_of(self.model, self.numbers[rows], self.seed, how.resolution), cond


def _short_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown} ... {numbers[-1]}" if len(numbers) > 6 else shown
