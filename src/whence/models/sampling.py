"""Pictures from a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from whence.diffusion.forward import FlowMatching
from whence.diffusion.noise import normals, seed_for, stream
from whence.models.encode import prompt_conditions
from whence.models.families.family import Cond, Config, needs, needs_of
from whence.models.parts import Parts
from whence.models.pipeline import Model, schedule_of
from whence.storage.files import progress
from whence.types import Call, Engine, WhenceError

Predicting = Callable[[Tensor, Tensor], Tensor]  # (x_t, time) -> the network's output
Watch = Callable[[int, Tensor], None]


def sample(
    model: Model,
    count: int,
    seed: int,
    steps: int = 50,
    labels: Tensor | None = None,
    engine: Engine = Engine(),
    network: nn.Module | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Pictures from a model without text, by DDIM (eta 0) or Euler steps: [count, C, H, W] in [-1, 1].

    guidance: towards the classes, for a model that knows pictures of none; that of its pipeline by default. The initial
    noise of picture i is a function of (seed, i), so picture 3 is the same whether 4 or 400 are drawn. network: in place
    of the model's own.
    """
    network = (network or model.final.load()).to(engine.device, engine.dtype).eval()
    noise = start_noise(model, count, seed).to(engine.device, engine.dtype)
    drawn = denoise(network, guided_by_class(model, guidance), noise, steps, cond_of(labels), engine)
    return drawn if model.vae is None else model.parts(engine).pictures(drawn, engine.batch_size)


def cond_of(labels: Tensor | None) -> dict[str, Tensor]:
    """The conditions of pictures of some classes."""
    return {} if labels is None else {"class_labels": labels}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: unconditional + scale (conditional - unconditional).

    Args:
        scale: of the difference.
        without: the conditions of one picture with an empty prompt.
    """

    scale: float
    without: Cond

    def on(self, model: Model) -> Model:
        """The model, whose network is then called twice."""
        own = model.forward.predict

        @needs(*needs_of(own))
        def predict(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            without = {k: v.to(x_t.device).expand(len(x_t), *v.shape) for k, v in self.without.items()}
            conditional = own(call, x_t, t, cond)[:, : x_t.shape[1]]
            unconditional = own(call, x_t, t, {**cond, **without})[:, : x_t.shape[1]]
            return unconditional + self.scale * (conditional - unconditional)

        return replace(model, forward=replace(model.forward, predict=predict))


def guidance_of(model: Model, scale: float | None) -> float | None:
    """The scale of guidance that a model is drawn from with: a given one, or that of its pipeline; None for a model that
    has no guidance, whatever is given."""
    own = model.family.drawing.guidance
    none = own is None or (model.family.guidance_is_input and not model.config.get("guidance_embeds"))
    return None if none else own if scale is None else scale


def guided_by_class(model: Model, guidance: float | None) -> Model:
    """The model as it is called with guidance towards a class."""
    scale, drawing = guidance_of(model, guidance), model.family.drawing
    if scale is None or scale <= 1 or not drawing.no_class:
        return model
    return Guidance(scale, {"class_labels": torch.tensor(int(model.config[drawing.no_class]))}).on(model)


@dataclass(frozen=True)
class Prompted:
    """What pictures were drawn by: a prompt each, the scale of guidance (that of the pipeline where it is None), and their
    side in pixels."""

    prompts: Sequence[str]
    guidance: float | None
    resolution: int


def start_noise(model: Model, count: int, seed: int) -> Tensor:
    """The noise that pictures 0 .. count-1 of a seed begin with.

    Args:
        model: a pipeline.
        count: pictures.
        seed: of the noise.
    """
    return noise_of(model, range(count), seed, model.resolution)


def noise_of(model: Model, numbers: Sequence[int], seed: int, resolution: int) -> Tensor:
    """The noise that some pictures of a seed begin with: [m, C, h, w].

    Args:
        model: a pipeline.
        numbers: which of the seed's pictures.
        seed: of the noise.
        resolution: side of the pictures, in pixels.
    """
    shape = latent_shape(model, resolution)
    return normals(stream(seed_for(seed, "sample"), 0, torch.tensor(numbers)), shape)


def denoise(
    network: nn.Module,
    model: Model,
    noise: Tensor,
    steps: int,
    cond: Cond,
    engine: Engine,
    quiet: bool = False,
    watch: Watch | None = None,
) -> Tensor:
    """What the network makes of noise, by DDIM (eta 0), or by Euler steps for flow matching: [m, C, h, w].

    Pictures are cut to [-1, 1], latents are not.

    Args:
        network: the network.
        model: how it is called; `Guidance.on` one for guidance.
        noise: [m, C, h, w].
        steps: of the sampler.
        cond: each [m, ...].
        engine: how the work is carried out.
        quiet: no progress bar.
        watch: is given the timestep (as the forward counts them) and the clean images predicted there, batch by batch.
    """
    walk = _euler if isinstance(model.forward, FlowMatching) else _ddim_walk
    pieces = []
    with torch.no_grad():
        starts = range(0, len(noise), engine.batch_size)
        for start in starts if quiet else progress(starts, "sampling"):
            rows = slice(start, start + engine.batch_size)
            x = noise[rows]
            here = {name: value[rows].to(x.device) for name, value in cond.items()}

            def predict(x: Tensor, t: Tensor, here: Cond = here) -> Tensor:
                return model.forward.predict(network, x, t.expand(len(x)).to(x), here)[:, : x.shape[1]]

            pieces.append(walk(model, steps, x, predict, watch))
    drawn = torch.cat(pieces)
    return drawn.clamp(-1, 1) if model.vae is None else drawn


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
    scheduler, places = _flow(model, steps, x.shape[-2:]), timesteps_of(model, steps, x.shape[-2:])
    for t, sigma, following, place in zip(
        scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], places, strict=False
    ):
        velocity = predict(x, t)
        if watch is not None:
            clean = x - sigma.to(x) * velocity
            watch(place, clean.clamp(-1, 1) if model.vae is None else clean)
        x = x + (following - sigma).to(x) * velocity
    return x


def _flow(model: Model, steps: int, size: Sequence[int]) -> FlowMatchEulerDiscreteScheduler:
    """The noise levels by which the pipeline walks. size: [h, w] of the latents."""
    config, drawing = {k: v for k, v in model.scheduler.items() if k != "_class_name"}, model.family.drawing
    if config.get("stochastic_sampling"):
        raise WhenceError(f"{model.folder / 'scheduler'}: stochastic_sampling is not drawn with; accepted: false")
    patch = int(model.config.get("patch_size", 2)) if model.family.packing == 1 else 2
    first, last = (int(config.get(f"{end}_image_seq_len", count)) for end, count in (("base", 256), ("max", 4096)))
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", drawing.max_shift))
    patches = (size[0] // patch) * (size[1] // patch)
    shift = low + (high - low) * (patches - first) / (last - first)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    even = np.linspace(1.0, 1 / steps, steps).tolist() if drawing.even else None
    # The number of steps is told by the levels where there are some; diffusers takes one of both.
    told = {"num_inference_steps": steps} if even is None else {"sigmas": even}
    scheduler.set_timesteps(**told, mu=shift if config.get("use_dynamic_shifting") else None)
    return scheduler


def timesteps_of(model: Model, steps: int, size: Sequence[int]) -> list[int]:
    """The timesteps at which the sampler stops, noisiest first; of flow matching those of the nearest noise level. size:
    [h, w] of what the network sees."""
    if not isinstance(model.forward, FlowMatching):
        return [int(t) for t in _ddim(model, steps).timesteps]
    levels = _flow(model, steps, size).sigmas[:-1].double()  # the last is 0, where the picture is done
    return [int(i) for i in (model.forward.sigmas - levels[:, None]).abs().argmin(1)]


def draw_with_text(
    model: Model,
    prompts: Sequence[str],
    seed: int,
    steps: int,
    guidance: float | None,
    engine: Engine,
    resolution: int,
    network: nn.Module | None = None,
) -> Tensor:
    """Pictures for prompts, as the pipeline of the family draws them: [m, C, H, W] in [-1, 1]. guidance: classifier-free, 1
    for none, that of the pipeline by default; models that are told their guidance (Flux) are told this. Noise and network
    as in `sample`."""
    parts = model.parts(engine)
    guided, cond = prompted(model, parts, Prompted(prompts, guidance, resolution), engine)
    network = (network or model.final.load()).to(engine.device, engine.dtype).eval()
    noise = noise_of(model, range(len(prompts)), seed, resolution).to(engine.device, engine.dtype)
    z = denoise(network, guided, noise, steps, cond, engine)
    return z if model.vae is None else parts.pictures(z, engine.batch_size)


def latent_shape(model: Model, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of what the network sees of square pictures with this side, in pixels."""
    if model.vae is None:
        return (model.channels, resolution, resolution)
    side = resolution // model.vae.shrink
    return (model.vae.latents, side, side)


def prompted(model: Model, parts: Parts, told: Prompted, engine: Engine) -> tuple[Model, Cond]:
    """The model as it is called with guidance, where it takes any, and what its network is told for the prompts."""
    drawing, scale = model.family.drawing, guidance_of(model, told.guidance)

    def conditions(texts: Sequence[str]) -> dict[str, Tensor]:
        texts = [drawing.prompt(text) for text in texts]
        return prompt_conditions(model, parts, texts, told.resolution, drawing.tokens(model.folder))

    cond = conditions(told.prompts)
    if scale is not None and model.family.guidance_is_input:
        cond["guidance"] = torch.full((len(told.prompts),), scale)
    elif scale is not None and scale > 1:  # the pipelines take 1 and less for none
        nothing = {name: _floats(value[0], engine) for name, value in drawing.nothing(parts, conditions([""])).items()}
        model = Guidance(scale, nothing).on(model)
    return model, {name: _floats(value, engine) for name, value in cond.items()}


def _floats(value: Tensor, engine: Engine) -> Tensor:
    return value.to(engine.dtype) if value.is_floating_point() else value


def _ddim(model: Model, steps: int) -> DDIMScheduler:
    config = {k: v for k, v in model.scheduler.items() if k != "_class_name"}
    if model.vae is not None:  # latents have no range, and schedulers that know none do not say so
        config = {"clip_sample": False, **config}
    scheduler = DDIMScheduler.from_config({**config, **model.family.drawing.scheduler, **_betas(config)})
    scheduler.set_timesteps(steps)
    if config.get("prediction_type", "epsilon") == "epsilon" and 0 in scheduler.alphas_cumprod[scheduler.timesteps]:
        raise WhenceError(
            "zero terminal SNR with prediction_type 'epsilon' tells nothing of a picture at the first step",
            str(model.folder / "scheduler"),
            "v_prediction or sample, or pictures drawn elsewhere, by --query_data_dir",
        )
    return scheduler


def _betas(config: Config) -> dict[str, object]:
    """The noise schedule where it is one that DDIMScheduler does not know, number by number."""
    if config.get("trained_betas") is not None or config.get("beta_schedule") in (None, *OF_DDIM):
        return {}
    plain = {name: value for name, value in config.items() if name != "rescale_betas_zero_snr"}
    return {"trained_betas": schedule_of(plain).betas.tolist()}


OF_DDIM = ("linear", "scaled_linear", "squaredcos_cap_v2")


def labels_in_turn(model: Model, count: int) -> Tensor | None:
    """The classes of pictures 0 .. count-1 of a class-conditional model: each in turn; None for others."""
    classes = model.config.get(model.family.classes)
    return None if classes is None else torch.arange(count) % classes
