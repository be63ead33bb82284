"""How likely a model finds an image: the density of its probability-flow ODE (Song et al. 2021, 2011.13456).

With x_phi = cos(phi) x0 + sin(phi) eps for the DDPM family, cos(phi)^2 = abar, and x_sigma = (1 - sigma) x0 + sigma eps for
flow matching, images flow to noise along dx/dphi = v(x, phi), the velocity that the network predicts, and

    log p(x) = log N(x_end; 0, I) + integral of div v along the way

from the least noisy timestep, where the image lies as it is, to the noisiest. Heun's method, two calls of the network per
step. The divergence is exact for images of at most `EXACT` elements, and one product with a vector of random signs (those of
the draw's noise; Hutchinson 1990) for larger ones, whose mean over draws is without bias. For small networks: a gradient of
it keeps what a hundred calls and their derivatives need.

Source of the measurement in attribution: Cohen & Engstrom 2025, "Data Attribution for Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.diffusion.forward import Denoiser, FlowMatching
from whence.types import Batch, Call, Draw, Forward, WhenceError

STEPS = 50
"""Of Heun's method, evenly over the timesteps."""
EXACT = 64
"""The most elements of an image whose divergence is summed up one by one."""
AT_ONCE = 32
"""Elements whose derivatives are taken together."""
WHERE = "output 'log_likelihood'"

Velocity = Callable[[Tensor, int], Tensor]
"""(x [b, ...], timestep) -> dx/dphi at it [b, ...]."""


def log_likelihood(forward: Forward, call: Call, batch: Batch, draw: Draw, steps: int = STEPS) -> Tensor:
    """(1/D) log p(x) of each row, in nats per element: [b]. What a draw says of the timestep is not looked at.

    Args:
        forward: knows the noise levels and what the network predicts.
        call: the network.
        batch: the images [b].
        draw: whose noise gives the signs, where the divergence is estimated.
        steps: of Heun's method; as many as there are timesteps less one, at most.
    """
    if isinstance(forward, Denoiser):
        places = forward.alphas_cumprod.double().sqrt().clamp(-1, 1).acos()
        velocity = _of_denoiser(forward, call, batch)
    elif isinstance(forward, FlowMatching):
        places, velocity = forward.sigmas.double(), _of_flow(forward, call, batch)
    else:
        told = f"the flow of a {type(forward).__name__} is not known"
        raise WhenceError(told, WHERE, "Denoiser, FlowMatching")
    if forward.timesteps < 2:
        raise WhenceError(f"this model has {forward.timesteps} timestep", WHERE, "2 timesteps or more")
    grid = torch.linspace(0, forward.timesteps - 1, min(steps, forward.timesteps - 1) + 1).round().long().tolist()
    x = batch.x0.to(draw.noise)
    signs, total = torch.where(draw.noise < 0, -1.0, 1.0).to(x), torch.zeros(len(x)).to(x)
    with sdpa_kernel(SDPBackend.MATH):  # the only attention whose derivative has a derivative
        for here, following in pairwise(grid):
            width = float(places[following] - places[here])
            x, gained = heun(velocity, x, (here, following), width, signs)
            total = total + gained
    size = x[0].numel()
    return (total - x.square().flatten(1).sum(1) / 2) / size - 0.5 * math.log(2 * math.pi)


def _of_denoiser(forward: Denoiser, call: Call, batch: Batch) -> Velocity:
    """v = cos(phi) eps - sin(phi) x0, from whichever of them is predicted."""

    def velocity(x: Tensor, t: int) -> Tensor:
        signal = float(forward.alphas_cumprod[t])
        cos, sin = math.sqrt(signal), math.sqrt(1 - signal)
        if cos == 0 and forward.prediction_type == "epsilon":
            told = "the last timestep has no signal left (zero terminal SNR), where a predicted noise tells nothing"
            raise WhenceError(told, WHERE, "a model that predicts v_prediction or sample")
        made = forward.predict(call, x, torch.full((len(x),), t, device=x.device), _cond(batch, len(x)))
        found = made[:, : x.shape[1]]  # without the variance, where that is learned too
        if forward.prediction_type == "epsilon":
            return (found - sin * x) / cos
        return found if forward.prediction_type == "v_prediction" else (cos * x - found) / sin

    return velocity


def _of_flow(forward: FlowMatching, call: Call, batch: Batch) -> Velocity:
    """eps - x0, which the network returns whether its loss is preconditioned or not."""

    def velocity(x: Tensor, t: int) -> Tensor:
        time = float(forward.sigmas[t]) * forward.timesteps
        return forward.predict(call, x, torch.full((len(x),), time, device=x.device), _cond(batch, len(x)))

    return velocity


def _cond(batch: Batch, count: int) -> dict[str, Tensor]:
    """The conditions of the batch's images, over and over: [count, ...]."""
    times = count // len(batch.x0)
    return {name: value.repeat(times, *[1] * (value.ndim - 1)) for name, value in batch.cond.items()}


def heun(velocity: Velocity, x: Tensor, times: tuple[int, int], width: float, signs: Tensor) -> tuple[Tensor, Tensor]:
    """One step of Heun's method: where x is after it [b, ...], and the integral of the divergence over it [b].

    Args:
        velocity: v.
        x: before the step [b, ...].
        times: the timesteps at both ends.
        width: of the step in phi.
        signs: see `with_divergence`.
    """
    first, spread = with_divergence(velocity, x, times[0], signs)
    second, spread_after = with_divergence(velocity, x + width * first, times[1], signs)
    return x + width / 2 * (first + second), width / 2 * (spread + spread_after)


def with_divergence(velocity: Velocity, x: Tensor, t: int, signs: Tensor) -> tuple[Tensor, Tensor]:
    """v [b, ...] and sum_j dv_j / dx_j of each row [b].

    Args:
        velocity: v, of any number of copies of the rows.
        x: where [b, ...].
        t: the timestep.
        signs: +-1 [b, ...], for images of more than `EXACT` elements.
    """
    size, b = x[0].numel(), len(x)
    if size > EXACT:
        value, pull = vjp(lambda place: velocity(place, t), x)[:2]
        return value, (pull(signs)[0] * signs).flatten(1).sum(1)
    # Copies of the images, each asked for another element, rather than one derivative vectorised over elements: the
    # derivatives of convolutions cannot be (torch 2.13).
    found, total = [], torch.zeros(b).to(x)
    for element in range(0, size, AT_ONCE):
        basis = torch.eye(size, dtype=x.dtype, device=x.device)[element : element + AT_ONCE]
        ways = basis.repeat_interleave(b, dim=0).reshape(-1, *x.shape[1:])
        value, pull = vjp(lambda place: velocity(place, t), x.repeat(len(basis), *[1] * (x.ndim - 1)))[:2]
        total = total + (pull(ways)[0] * ways).flatten(1).sum(1).reshape(len(basis), b).sum(0)
        found.append(value[:b])
    return found[0], total
