"""Pictures from a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from whence.adapters.encode import Parts, prompt_conditions
from whence.adapters.folders import Model
from whence.adapters.networks import CallFlux, Cond
from whence.data import TensorImages, tensor_images
from whence.engine import progress
from whence.forward import FlowMatching
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
    noise = start_noise(model, count, seed).to(engine.device, engine.dtype)
    return denoise(network, model, noise, steps, cond_of(labels), engine)


def cond_of(labels: Tensor | None) -> dict[str, Tensor]:
    """The conditions of pictures of some classes."""
    return {} if labels is None else {"class_labels": labels}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional). without: the conditions of one picture
    that is told nothing."""

    scale: float
    without: Cond


def start_noise(model: Model, count: int, seed: int) -> Tensor:
    """The noise that pictures 0 .. count-1 of a seed begin with."""
    shape = (model.channels, model.resolution, model.resolution)
    return normals(stream(seed_for(seed, "sample"), 0, torch.arange(count)), shape)


def denoise(
    network: nn.Module,
    model: Model,
    noise: Tensor,
    steps: int,
    cond: Cond,
    engine: Engine,
    quiet: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
    guidance: Guidance | None = None,
) -> Tensor:
    """What the network makes of noise [m, C, h, w], by DDIM (eta 0), or by Euler steps for flow matching. Pictures are cut
    to [-1, 1], latents are not. cond: each [m, ...]. watch: is told the timestep and the clean images predicted there (DDIM
    only), batch by batch."""
    walk = _euler if isinstance(model.forward, FlowMatching) else _ddim_walk
    pieces = []
    with torch.no_grad():
        starts = range(0, len(noise), engine.batch_size)
        for start in starts if quiet else progress(starts, "sampling"):
            rows = slice(start, start + engine.batch_size)
            x = noise[rows]
            here = {name: value[rows].to(x.device) for name, value in cond.items()}

            def predict(x: Tensor, t: Tensor, here: Cond = here) -> Tensor:
                told = model.forward.predict(network, x, t.expand(len(x)).to(x), here)[:, : x.shape[1]]
                if guidance is None:
                    return told
                nothing = {k: v.to(x.device).expand(len(x), *v.shape) for k, v in guidance.without.items()}
                untold = model.forward.predict(network, x, t.expand(len(x)).to(x), {**here, **nothing})[:, : x.shape[1]]
                return untold + guidance.scale * (told - untold)

            pieces.append(walk(model, steps, x, predict, watch))
    drawn = torch.cat(pieces)
    return drawn.clamp(-1, 1) if model.vae is None else drawn


Predicting = Callable[[Tensor, Tensor], Tensor]  # (x_t, time) -> the network's output
Watch = Callable[[int, Tensor], None]


def _ddim_walk(model: Model, steps: int, x: Tensor, predict: Predicting, watch: Watch | None) -> Tensor:
    scheduler = _ddim(model, steps)
    for t in scheduler.timesteps:
        moved = scheduler.step(predict(x, t), int(t), x, eta=0.0)
        x = moved.prev_sample
        if watch is not None:
            watch(int(t), moved.pred_original_sample.clamp(-1, 1))
    return x


def _euler(model: Model, steps: int, x: Tensor, predict: Predicting, watch: Watch | None) -> Tensor:
    config = {k: v for k, v in model.scheduler.items() if k != "_class_name"}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**config, "use_dynamic_shifting": False})
    scheduler.set_timesteps(steps)
    for t, sigma, following in zip(scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False):
        x = x + (following - sigma).to(x) * predict(x, t)
    return x


def draw_with_text(
    model: Model, prompts: Sequence[str], seed: int, steps: int, guidance: float, engine: Engine, resolution: int
) -> Tensor:
    """Pictures for prompts: [m, C, H, W] in [-1, 1]. guidance: classifier-free, 1 for none; models that
    are told their guidance (Flux) get none of it. Noise as in `sample`."""
    parts = Parts(model.folder, engine, model.token)
    cond = prompt_conditions(model, parts, prompts, resolution)
    shape = (model.channels, resolution, resolution)
    if model.vae is not None:
        side = resolution // 2 ** (len(model.vae["block_out_channels"]) - 1)
        shape = (int(model.vae["latent_channels"]), side, side)
    noise = normals(stream(seed_for(seed, "sample"), 0, torch.arange(len(prompts))), shape)
    network = model.final.load().to(engine.device, engine.dtype).eval()
    guided = None
    if guidance != 1 and not isinstance(model.forward.predict, CallFlux):
        without = prompt_conditions(model, parts, [""], resolution)
        guided = Guidance(guidance, {name: _floats(value[0], engine) for name, value in without.items()})
    cond = {name: _floats(value, engine) for name, value in cond.items()}
    z = denoise(network, model, noise.to(engine.device, engine.dtype), steps, cond, engine, guidance=guided)
    return z if model.vae is None else parts.pictures(z, engine.batch_size)


def _floats(value: Tensor, engine: Engine) -> Tensor:
    return value.to(engine.dtype) if value.is_floating_point() else value


def _ddim(model: Model, steps: int) -> Any:
    config = {k: v for k, v in model.scheduler.items() if k != "_class_name"}
    if (
        model.vae is not None
    ):  # latents have no range; schedulers of other kinds do not say so, as diffusers' pipelines know
        config["clip_sample"] = False
    scheduler = DDIMScheduler.from_config(config)
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
            cond_of(None if labels is None else labels[rows]),
            self.engine,
            quiet=True,
            watch=lambda t, x0: seen[t].append(x0.flatten(1)),
        )
        for t, pieces in seen.items():
            arrays[t].write(rows, torch.cat(pieces))


def _short_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown} ... {numbers[-1]}" if len(numbers) > 6 else shown
