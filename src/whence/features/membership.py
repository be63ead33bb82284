"""What attacks on membership measure of one image: the features of CDI (Dubinski et al. 2024, arXiv 2411.12858).

With x_t = a_t x0 + s_t eps and eps_hat the predicted noise (`diffusion.predicted`), steps counted for T = 1000 timesteps and
brought to the model's own, ||v||_p = (mean_j |v_j|^p)^(1/p):

    denoising loss    mean of ||eps - eps_hat(x_t, t)||_2 over noises, at t = 100 (Carlini et al. 2023, 2301.13188)
    loss at t         the same at t = 0, 100 ... 900, other noises ("multiple loss" of CDI)
    masked loss at t  ||(eps - x0 - eps_hat(y_t, t)) on M||_2, where M is the fifth of the elements of x_t with the largest
                      |d ||eps - eps_hat(x_t, t)||_2 / d x_t|, and y_t is x_t with eps itself on M: nothing of the image is
                      left there, and who remembers it puts it back ("gradient masking" of CDI)
    SecMI             ||z - z'||_2: z the image brought to t = 100 in ten deterministic steps of DDIM, z' the same after one
                      step further and back (Duan et al. 2023, 2302.01316)
    PIA, PIAN         ||e - eps_hat(a_t x0 + s_t e, t)||_5 at t = 200, e = eps_hat(x0, 0); for PIAN e is first brought to
                      the mean absolute value of a normal variable (Kong et al. 2024, 2305.18355)

24 of CDI's 26 numbers. Left out are the two of noise optimisation: an optimisation for every image, which the released code
carries out over a whole batch at once, so that what it finds of an image depends on the others.

Differs from released code: noise is keyed by the image's content, not drawn by batch; norms are means, which only changes
units; masked losses replace elements of the noisy image, not of the clean one, and have one noise at each t; PIAN's e has
the mean absolute value of a normal variable, sqrt(2/pi), not sqrt(pi/2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whence.diffusion.draws import Draws, Repeated, Steps
from whence.diffusion.noise import seed_for
from whence.diffusion.predicted import NoisePrediction
from whence.features.gradients import DRAWS_AT_ONCE, one
from whence.types import Batch, Draw, Engine, Forward, WhenceError

WHERE = "membership"
OF = 1000  # timesteps that published steps are counted in
LEAST = 100  # timesteps: with fewer, the steps of SecMI fall together
LOSS, PIA, SECMI, SECMI_STEPS = 100, 200, 100, 10
GRID = tuple(range(0, 1000, 100))
MASKED = 0.2
NAMES = (
    "denoising loss",
    *(f"loss at {t}" for t in GRID),
    *(f"masked loss at {t}" for t in GRID),
    "SecMI",
    "PIA",
    "PIAN",
)


@dataclass(frozen=True)
class Signals:
    """The numbers above of each image, in the order of `NAMES`: [b, 24].

    Args:
        noises: at each timestep of the losses (CDI: 5).
        seed: of the noises.
    """

    noises: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.noises < 1:
            raise WhenceError(f"{self.noises} noises", WHERE, "1 or more")

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        return len(NAMES)

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return 1

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        predicted = NoisePrediction.of(forward, module, WHERE)
        if forward.timesteps < LEAST:
            raise WhenceError(f"a model of {forward.timesteps} timesteps", WHERE, f"{LEAST} timesteps or more")
        with torch.no_grad():
            return torch.stack(
                [self._of(_Image(predicted, one(batch, i))) for batch in batches for i in range(len(batch))]
            )

    def _of(self, image: _Image) -> Tensor:
        first = image.losses(self._draw(image, "denoising loss", (LOSS,), self.noises)).mean()
        grid = image.losses(self._draw(image, "multiple loss", GRID, self.noises)).reshape(len(GRID), -1).mean(1)
        masked = image.masked_losses(self._draw(image, "gradient masking", GRID, 1))
        return torch.cat([first[None], grid, masked, torch.stack([image.secmi(), *image.pia()])])

    def _draw(self, image: _Image, purpose: str, steps: tuple[int, ...], noises: int) -> Draw:
        """(timestep, noise) pairs of one image, those of a timestep side by side."""
        rule = Repeated(Steps(tuple(image.step(t) for t in steps)), noises)
        draws = Draws(rule, seed_for(self.seed, f"membership {purpose}"))
        drawn = draws(image.batch.keys, image.x0.shape[1:], image.predicted.forward.timesteps, image.x0.dtype)
        return Draw(drawn.t[0].to(image.x0.device), drawn.noise[0].to(image.x0))


def _norm(values: Tensor, p: float = 2) -> Tensor:
    """(mean_j |v_j|^p)^(1/p) of each row: [b]."""
    return values.flatten(1).abs().pow(p).mean(1).pow(1 / p)


@dataclass(frozen=True, eq=False)
class _Image:
    """One image, measured by itself: a row cannot depend on its neighbours."""

    predicted: NoisePrediction
    batch: Batch

    @property
    def x0(self) -> Tensor:
        return self.batch.x0

    def step(self, t: int) -> int:
        """A published timestep among those of this model."""
        return t * self.predicted.forward.timesteps // OF

    def cond(self, count: int) -> Mapping[str, Tensor]:
        return {name: value.expand(count, *value.shape[1:]) for name, value in self.batch.cond.items()}

    def noise_of(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.predicted.noise(x_t, t, self.cond(len(x_t)))

    def at(self, t: int) -> Tensor:
        return torch.full((1,), self.step(t), device=self.x0.device)

    def noisy(self, draw: Draw) -> Tensor:
        a, s = self.predicted.scales(draw.t, draw.noise)
        return a * self.x0 + s * draw.noise

    def losses(self, draw: Draw) -> Tensor:
        """||eps - eps_hat||_2 of each draw: [S]."""
        found = []
        for start in range(0, len(draw.t), DRAWS_AT_ONCE):
            few = slice(start, start + DRAWS_AT_ONCE)
            part = Draw(draw.t[few], draw.noise[few])
            found.append(_norm(part.noise - self.noise_of(self.noisy(part), part.t)))
        return torch.cat(found)

    def masked_losses(self, draw: Draw) -> Tensor:
        """How far off the network is where it depends most on what it sees, with nothing of the image left there: [S]."""
        x_t = self.noisy(draw)
        with torch.enable_grad():
            x = x_t.clone().requires_grad_()
            (slope,) = torch.autograd.grad(_norm(draw.noise - self.noise_of(x, draw.t)).sum(), x)
        size = slope[0].numel()
        chosen = slope.flatten(1).abs().topk(max(1, int(MASKED * size)), dim=1).indices
        mask = torch.zeros(len(slope), size, dtype=torch.bool, device=slope.device).scatter_(1, chosen, True)
        y = torch.where(mask.view_as(x_t), draw.noise, x_t)
        error = (draw.noise - self.x0 - self.noise_of(y, draw.t)).flatten(1)
        return torch.stack([_norm(row[at][None])[0] for row, at in zip(error, mask, strict=True)])

    def moved(self, x: Tensor, start: int, end: int) -> Tensor:
        """A deterministic step of DDIM from one timestep to another: a' x0_hat + s' eps_hat."""
        eps = self.noise_of(x, self.at(start))
        (a, s), (a_end, s_end) = (self.predicted.scales(self.at(t), x) for t in (start, end))
        return a_end * (x - s * eps) / a + s_end * eps

    def secmi(self) -> Tensor:
        step, z = SECMI // SECMI_STEPS, self.x0
        for t in range(0, SECMI, step):
            z = self.moved(z, t, t + step)
        back = self.moved(self.moved(z, SECMI, SECMI + step), SECMI + step, SECMI)
        return _norm(z - back)[0]

    def pia(self) -> list[Tensor]:
        first = self.noise_of(self.x0, self.at(0))
        normal = first / _norm(first, 1).clamp(min=1e-12) * math.sqrt(2 / math.pi)
        a, s = self.predicted.scales(self.at(PIA), self.x0)
        return [_norm(e - self.noise_of(a * self.x0 + s * e, self.at(PIA)), 5)[0] for e in (first, normal)]
