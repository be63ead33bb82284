"""Pictures from a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from whence.data.images import tensor_images
from whence.diffusion.forward import FlowMatching
from whence.diffusion.noise import normals, seed_for, stream
from whence.models.encode import prompt_conditions, with_text
from whence.models.families.family import Cond
from whence.models.parts import Parts
from whence.models.pipeline import Model
from whence.storage.arrays import Rows, Store
from whence.storage.files import progress
from whence.types import Engine, Images, WhenceError


def sample(
    model: Model,
    count: int,
    seed: int,
    steps: int = 50,
    labels: Tensor | None = None,
    engine: Engine = Engine(),
    network: nn.Module | None = None,
) -> Tensor:
    """Pictures from a model without text, by DDIM (eta 0) or Euler steps, without guidance: [count, C, H, W] in [-1, 1].

    The initial noise of picture i is a function of (seed, i), so picture 3 is the same whether 4 or 400 are drawn. network:
    in place of the model's own.
    """
    network = (network or model.final.load()).to(engine.device, engine.dtype).eval()
    noise = start_noise(model, count, seed).to(engine.device, engine.dtype)
    drawn = denoise(network, model, noise, steps, cond_of(labels), engine)
    return drawn if model.vae is None else Parts(model.folder, engine).pictures(drawn, engine.batch_size)


def cond_of(labels: Tensor | None) -> dict[str, Tensor]:
    """The conditions of pictures of some classes."""
    return {} if labels is None else {"class_labels": labels}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional). without: the conditions of one picture
    that is told nothing."""

    scale: float
    without: Cond


@dataclass(frozen=True)
class Prompted:
    """What pictures were drawn by: a prompt each, the scale of classifier-free guidance, and their side in pixels."""

    prompts: Sequence[str]
    guidance: float
    resolution: int


def start_noise(model: Model, count: int, seed: int) -> Tensor:
    """The noise that pictures 0 .. count-1 of a seed begin with."""
    shape = latent_shape(model, model.resolution)
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
    to [-1, 1], latents are not. cond: each [m, ...]. watch: is told the timestep (as the forward counts them) and the clean
    images predicted there, batch by batch."""
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
                unconditional = model.forward.predict(network, x, t.expand(len(x)).to(x), {**here, **nothing})[
                    :, : x.shape[1]
                ]
                return unconditional + guidance.scale * (told - unconditional)

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
            clean = moved.pred_original_sample
            watch(int(t), clean.clamp(-1, 1) if model.vae is None else clean)
    return x


def _euler(model: Model, steps: int, x: Tensor, predict: Predicting, watch: Watch | None) -> Tensor:
    scheduler, places = _flow(model, steps), timesteps_of(model, steps)
    for t, sigma, following, place in zip(
        scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], places, strict=False
    ):
        velocity = predict(x, t)
        if watch is not None:
            clean = x - sigma.to(x) * velocity
            watch(place, clean.clamp(-1, 1) if model.vae is None else clean)
        x = x + (following - sigma).to(x) * velocity
    return x


def _flow(model: Model, steps: int) -> FlowMatchEulerDiscreteScheduler:
    config = {k: v for k, v in model.scheduler.items() if k != "_class_name"}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**config, "use_dynamic_shifting": False})
    scheduler.set_timesteps(steps)
    return scheduler


def timesteps_of(model: Model, steps: int) -> list[int]:
    """The timesteps at which the sampler stops, noisiest first; of flow matching those of the nearest noise level."""
    if not isinstance(model.forward, FlowMatching):
        return [int(t) for t in _ddim(model, steps).timesteps]
    levels = _flow(model, steps).sigmas[:-1].double()  # the last is 0, where the picture is done
    return [int(i) for i in (model.forward.sigmas - levels[:, None]).abs().argmin(1)]


def draw_with_text(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    guidance: float,
    engine: Engine,
    resolution: int,
    network: nn.Module | None = None,
) -> Tensor:
    """Pictures for prompts: [m, C, H, W] in [-1, 1]. guidance: classifier-free, 1 for none; models that
    are told their guidance (Flux) get none of it. Noise and network as in `sample`."""
    parts = Parts(model.folder, engine, model.token)
    told = Prompted(prompts, guidance, resolution)
    z = _latents_with_text(model, parts, told, range(len(prompts)), seed, steps, engine, network=network)
    return z if model.vae is None else parts.pictures(z, engine.batch_size)


def latent_shape(model: Model, resolution: int) -> tuple[int, int, int]:
    """Of what the network sees of pictures of a side."""
    if model.vae is None:
        return (model.channels, resolution, resolution)
    side = resolution // 2 ** (len(model.vae["block_out_channels"]) - 1)
    return (int(model.vae["latent_channels"]), side, side)


def _latents_with_text(
    model: Model,
    parts: Parts,
    told: Prompted,
    numbers: Sequence[int],
    seed: int,
    steps: int,
    engine: Engine,
    quiet: bool = False,
    watch: Watch | None = None,
    network: nn.Module | None = None,
) -> Tensor:
    """The latents of pictures `numbers` of a seed, a prompt each: [m, c, h, w]."""
    cond = prompt_conditions(model, parts, told.prompts, told.resolution)
    noise = normals(stream(seed_for(seed, "sample"), 0, torch.tensor(numbers)), latent_shape(model, told.resolution))
    network = (network or model.final.load()).to(engine.device, engine.dtype).eval()
    guided = None
    if told.guidance != 1 and not model.family.told_guidance:
        without = prompt_conditions(model, parts, [""], told.resolution)
        guided = Guidance(told.guidance, {name: _floats(value[0], engine) for name, value in without.items()})
    cond = {name: _floats(value, engine) for name, value in cond.items()}
    noise = noise.to(engine.device, engine.dtype)
    return denoise(network, model, noise, steps, cond, engine, quiet, watch, guided)


def _floats(value: Tensor, engine: Engine) -> Tensor:
    return value.to(engine.dtype) if value.is_floating_point() else value


def _ddim(model: Model, steps: int) -> DDIMScheduler:
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
    classes = model.config.get(model.family.classes)
    return None if classes is None else torch.arange(count) % classes


@dataclass(frozen=True, eq=False)
class Recorded:
    """The journey of pictures that `sample` or `draw_with_text` drew (see `types.Trajectory`): sampled once more when first
    asked for, with the predicted clean images (latents, for a model of latents) kept in the run folder. ids: the pictures'
    names; numbers: which of the seed's pictures they are; told: their prompts, None without.
    """

    model: Model
    ids: Sequence[str]
    numbers: Sequence[int]
    seed: int
    steps: int
    root: Path
    engine: Engine = Engine()
    told: Prompted | None = None

    @property
    def timesteps(self) -> list[int]:
        found = timesteps_of(self.model, self.steps)
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
        if self.told is None:
            return tensor_images(x0, ids=list(self.ids), labels=self._labels())
        seen = tensor_images(x0, ids=list(self.ids), meta={"text": self.told.prompts})
        return with_text(self.model, seen, self.root, self.engine, self.told.resolution)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return latent_shape(self.model, self.model.resolution if self.told is None else self.told.resolution)

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
            **({} if self.told is None else {"told": self.told}),
        }
        shape = (len(self.ids), math.prod(self._shape))
        return Store(self.root).array(key, shape, self.engine.dtype, self.engine.batch_size)

    def _record(self, arrays: Mapping[int, Rows], rows: slice) -> None:
        seen: dict[int, list[Tensor]] = {t: [] for t in arrays}

        def watch(t: int, x0: Tensor) -> None:
            seen[t].append(x0.flatten(1))

        if self.told is None:
            network = self.model.final.load().to(self.engine.device, self.engine.dtype).eval()
            noise = start_noise(self.model, max(self.numbers) + 1, self.seed)[list(self.numbers)][rows]
            noise, labels = noise.to(self.engine.device, self.engine.dtype), self._labels()
            cond = cond_of(None if labels is None else labels[rows])
            denoise(network, self.model, noise, self.steps, cond, self.engine, True, watch)
        else:
            told, numbers = replace(self.told, prompts=self.told.prompts[rows]), self.numbers[rows]
            parts = Parts(self.model.folder, self.engine)
            _latents_with_text(self.model, parts, told, numbers, self.seed, self.steps, self.engine, True, watch)
        for t, pieces in seen.items():
            arrays[t].write(rows, torch.cat(pieces))


def _short_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown} ... {numbers[-1]}" if len(numbers) > 6 else shown
