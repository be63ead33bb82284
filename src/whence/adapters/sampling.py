"""Pictures from a model."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from whence.adapters.folders import Model
from whence.engine import progress
from whence.noise import normals, seed_for, stream
from whence.types import Engine


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
) -> Tensor:
    """DDIM from the given noise."""
    scheduler = DDIMScheduler.from_config({k: v for k, v in model.scheduler.items() if k != "_class_name"})
    scheduler.set_timesteps(steps)
    pieces = []
    with torch.no_grad():
        starts = range(0, len(noise), engine.batch_size)
        for start in starts if quiet else progress(starts, "sampling"):
            x = noise[start : start + engine.batch_size]
            cond = {} if labels is None else {"class_labels": labels[start : start + engine.batch_size].to(x.device)}
            for t in scheduler.timesteps:
                prediction = model.forward.predict(network, x, t.expand(len(x)).to(x.device), cond)
                x = scheduler.step(prediction[:, : x.shape[1]], int(t), x, eta=0.0).prev_sample
            pieces.append(x.clamp(-1, 1))
    return torch.cat(pieces)
