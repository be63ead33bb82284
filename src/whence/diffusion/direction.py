"""A direction of an encoder as an output: what made the picture look more like this than like that, in an encoder's eyes.

    f = <E(x0_hat(x_t)), u>       u = (E(this) - E(that)) / ||E(this) - E(that)||

x0_hat is the clean picture that the network predicts from x_t. With prediction p and target y of the training measure

    x0_hat = x0 + c_t (y - p)     c_t = s/a (epsilon), s (v_prediction), -1 (sample), sigma_t (velocity)
                                  a^2 = abar_t, s^2 = 1 - abar_t

because y is what p would be if x0_hat were x0, and both are linear in the clean picture. s/a is large for noisy steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from whence.diffusion.forward import Denoiser, FlowMatching
from whence.diffusion.outputs import Output
from whence.types import Batch, Call, Draw, Forward, WhenceError
from whence.types import digest as digest_of

Encode = Callable[[Tensor], Tensor]
"""Pictures as the network sees them [b, ...] -> [b, k], each row of its own picture alone, differentiable. For a model of
latents that is the decoder of its VAE and the encoder behind it."""


def predicted_clean(forward: Forward, call: Call, batch: Batch, draw: Draw) -> Tensor:
    """x0_hat of each row of a batch, one draw per row: [b, ...].

    Args:
        forward: a `Denoiser` or `FlowMatching`.
        call: the network.
        batch: the images [b].
        draw: timestep [b] and noise [b, ...] of each row.
    """
    if not isinstance(forward, Denoiser | FlowMatching):
        told = f"{type(forward).__name__} does not say which clean picture it predicts"
        raise WhenceError(told, "direction", "a Denoiser or FlowMatching")
    prediction, target = forward(call, batch, draw)
    c = _factor(forward, draw.t).to(prediction).reshape(-1, *[1] * (prediction.ndim - 1))
    return batch.x0 + c * (target - prediction)


def _factor(forward: Denoiser | FlowMatching, t: Tensor) -> Tensor:
    """c_t [b], float64."""
    if forward.prediction_type == "sample":
        return -torch.ones(len(t), dtype=torch.float64, device=t.device)
    if isinstance(forward, FlowMatching):
        return forward.sigmas.double().to(t.device)[t]
    bar = forward.alphas_cumprod.double().to(t.device)[t]
    noise = (1 - bar).sqrt()
    return noise / bar.sqrt() if forward.prediction_type == "epsilon" else noise


@dataclass(frozen=True)
class Direction:
    """<E(x0_hat), u>, one number per row.

    Args:
        known: names E and u in recipes.
        encode: E.
        u: a unit vector [k].
    """

    known: str
    encode: Encode = field(repr=False, compare=False)
    u: Tensor = field(repr=False, compare=False)

    def describe(self) -> str:
        return self.known

    def __call__(self, forward: Forward, call: Call, batch: Batch, draw: Draw) -> Tensor:
        clean = predicted_clean(forward, call, batch, draw)
        return self.encode(clean) @ self.u.to(clean)


def _of_clean_pictures(prediction: Tensor, target: Tensor) -> Tensor:
    raise WhenceError("it is a function of the predicted clean picture, not of a prediction", "direction", "loss")


def direction(encode: Encode, digest: str, this: Tensor, that: Tensor) -> Output:
    """An output that is high where the predicted clean picture looks like this rather than that; for queries.

    Args:
        encode: E.
        digest: of E, any text that changes whenever its results do (a version, the digest of its weights).
        this: a picture as the network sees it, [C, height, width].
        that: another.
    """
    if not digest:
        raise WhenceError("digest is empty", "direction", "a text that changes whenever the encoder's results do")
    with torch.no_grad():
        apart = encode(this[None])[0] - encode(that[None])[0]
    length = apart.norm()
    if not (torch.isfinite(length) and length > 0):
        raise WhenceError("the two pictures are the same to the encoder", "direction", "two that it tells apart")
    u = (apart / length).detach()
    known = digest_of(u.double().cpu())
    name = f"direction {known} of encoder {digest}"
    return Output(name, _of_clean_pictures, "higher", whole=Direction(name, encode, u))
