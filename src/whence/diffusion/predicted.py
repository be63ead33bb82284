"""What a denoiser says of a noisy image, whatever it was trained to predict: its noise, and its clean image.

x_t = a_t x0 + s_t eps           DDPM family  a = sqrt(abar), s = sqrt(1 - abar)      flow matching  a = 1 - sigma, s = sigma
eps_hat                          epsilon: p      v_prediction: a p + s x_t      sample: (x_t - a p) / s
                                 flow matching: x_t + a p, since p is the velocity eps - x0, preconditioned or not
x0_hat = (x_t - s eps_hat) / a
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.diffusion.forward import Denoiser, FlowMatching
from whence.types import Call, Forward, WhenceError


@dataclass(frozen=True, eq=False)
class NoisePrediction:
    """eps_hat of a network.

    Args:
        forward: how it is measured.
        call: the network.
    """

    forward: Denoiser | FlowMatching
    call: Call

    @classmethod
    def of(cls, forward: Forward, call: Call, where: str) -> NoisePrediction:
        """Refuses what has no such prediction.

        Args:
            forward: how the network is measured.
            call: the network.
            where: what asks, for the error.
        """
        if not isinstance(forward, Denoiser | FlowMatching):
            raise WhenceError(f"the noise that a {type(forward).__name__} predicts is not known", where, KINDS)
        return cls(forward, call)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t of each row, shaped to multiply images.

        Args:
            t: timesteps [b].
            like: the images [b, ...].
        """
        forward = self.forward
        if isinstance(forward, Denoiser):
            bar = forward.alphas_cumprod.double().to(t.device)[t]
            found = bar.sqrt(), (1 - bar).sqrt()
        else:
            sigma = forward.sigmas.double().to(t.device)[t]
            found = 1 - sigma, sigma
        a, s = (each.reshape(-1, *[1] * (like.ndim - 1)).to(like) for each in found)
        return a, s

    def noise(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """eps_hat [b, ...].

        Args:
            x_t: noisy images [b, ...].
            t: timesteps [b].
            cond: conditions by name, [b, ...] each.
        """
        forward, (a, s) = self.forward, self.scales(t, x_t)
        if isinstance(forward, FlowMatching):
            time = (forward.sigmas.double().to(t.device)[t] * forward.timesteps).to(
                torch.promote_types(x_t.dtype, FLOAT)
            )
            return x_t + a * forward.predict(self.call, x_t, time, cond)
        made = forward.predict(self.call, x_t, t, cond)[
            :, : x_t.shape[1]
        ]  # without the variance, where that is learned
        if forward.prediction_type == "epsilon":
            return made
        return a * made + s * x_t if forward.prediction_type == "v_prediction" else (x_t - a * made) / s


FLOAT, KINDS = torch.float32, "Denoiser, FlowMatching"
