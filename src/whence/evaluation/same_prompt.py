"""Does a prompt bring back a memorised picture? Whether the first step already goes the same way from every noise.

    d_k = eps_hat(x_T^k, T, c) - x_T^k,   each channel brought to [0, 1] by its own least and largest value;   k = 1 ... 10
    s(c) = max_{k < l} MS-SSIM(d_k, d_l)        flagged where p = (1 + #{i : s(c_i) >= s(c)}) / (n + 1) <= rate

over prompts c_i that are surely not memorised (Hintersdorf et al. 2024, arXiv 2406.02366, "Finding NeMo"). Without guidance
and at three scales of equal weight, as there. The largest pair, not the mean: a prompt may bring back its picture from some
noises only. Such similarities differ from model to model: the published threshold, `STABLE_DIFFUSION_1_4`, the mean plus one
standard deviation over prompts that are not memorised, is that of one model.

Differs from released code: there the noise is shown to the network as that of the second of 50 timesteps, here of the first;
here the noise is a function of (seed, k), and p comes from prompts of your own, asked in the same way (the released script
that a threshold is computed by asks with guidance 7, the one that applies it with 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from whence.diffusion.forward import Denoiser
from whence.diffusion.predicted import NoisePrediction
from whence.evaluation.conformal import Calibration, check_rate
from whence.evaluation.ssim import ms_ssim
from whence.features.rows import prepare
from whence.models import Model
from whence.models.sampling import Prompted, noise_of, prompted, timesteps_of
from whence.storage.files import progress
from whence.types import Engine, WhenceError

STABLE_DIFFUSION_1_4 = 0.428
"""The published threshold of Stable Diffusion 1.4; of no other model."""
WEIGHTS = (0.33, 0.33, 0.33)
WHERE = "same prompt"


@dataclass(frozen=True)
class FirstStep:
    """How the first step is looked at.

    Args:
        seeds: noises for each prompt.
        seed: that they are made from.
        steps: of the sampler, which say what the first timestep is.
        resolution: side of the pictures; the model's own by default.
    """

    seeds: int = 10
    seed: int = 0
    steps: int = 50
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise WhenceError(f"{self.seeds} noises cannot be compared", WHERE, "2 or more; NeMo has 10")


@dataclass(frozen=True)
class SamePrompt:
    """What is known of one prompt.

    Args:
        prompt: the prompt.
        similarity: the largest MS-SSIM of two noises.
        threshold: what it must be above to be flagged.
        p: how often a prompt that is not memorised has one as large.
        flagged: whether it is above the threshold.
        scales: that the similarity was computed at; fewer than 3 where pictures are small.
        sentence: for a person; "" where it is not flagged.
    """

    prompt: str
    similarity: float
    threshold: float
    p: float
    flagged: bool
    scales: int
    sentence: str


def same_prompt(
    model: Model,
    prompts: Sequence[str],
    not_memorised: Sequence[str],
    rate: float = 0.01,
    how: FirstStep = FirstStep(),
    engine: Engine = Engine(),
) -> list[SamePrompt]:
    """Which prompts look as if they brought back a memorised picture.

    Args:
        model: one that reads text, of the DDPM family.
        prompts: that are asked about.
        not_memorised: prompts of the same kind that surely bring back nothing, such as captions written for this; as many as
            the rate takes.
        rate: the share of prompts that are not memorised that may be flagged.
        how: noises and timestep.
        engine: how the work is carried out.
    """
    check_rate(rate, "rate")
    both = sorted(set(prompts) & set(not_memorised))
    if both:
        raise WhenceError(f"{both[0]!r} is asked about and said not to be memorised", WHERE, "one of both")
    Calibration(np.zeros(len(not_memorised)), rate)  # before anything is computed: whether there are enough
    every = [*not_memorised, *prompts]
    found = [alike(d) for d in progress(first_steps(model, every, how, engine), "first steps", total=len(every))]
    known = Calibration(np.array([value for value, _ in found[: len(not_memorised)]]), rate)
    return [_told(prompt, known, *each) for prompt, each in zip(prompts, found[len(not_memorised) :], strict=True)]


def _told(prompt: str, known: Calibration, similarity: float, scales: int) -> SamePrompt:
    flagged, sentence = known.flags(similarity), ""
    if flagged:
        sentence = (
            "looks memorised: the first step goes the same way from different noises, more so than for "
            f"{100 * (1 - known.rate):.6g} % of the prompts that are not"
        )
    return SamePrompt(prompt, similarity, known.threshold, known.p(similarity), flagged, scales, sentence)


def first_steps(
    model: Model,
    prompts: Sequence[str],
    how: FirstStep = FirstStep(),
    engine: Engine = Engine(),
    network: nn.Module | None = None,
) -> Iterator[Tensor]:
    """d of each prompt, each channel in [0, 1]: [seeds, C, h, w]. A channel of one value becomes 0.

    Args:
        model: one that reads text, of the DDPM family.
        prompts: whose first steps are taken; each by itself.
        how: noises and timestep.
        engine: how the work is carried out.
        network: another one in place of the model's, ready to be measured.
    """
    if not model.reads_text:
        raise WhenceError(f"{model.folder} reads no text", WHERE, "a model that does")
    if not isinstance(model.forward, Denoiser):
        told = "at the first step of flow matching the image is noise alone, and the predicted noise is the same"
        raise WhenceError(told, str(model.folder), "a model of the DDPM family")
    side, parts = model.side(how.resolution), model.parts(engine)
    x = noise_of(model, range(how.seeds), how.seed, side).to(engine.device, engine.dtype)
    t = torch.full((1,), timesteps_of(model, how.steps, x.shape[2:])[0], device=x.device)
    predicted = NoisePrediction(model.forward, network or prepare(model.final, engine))
    for prompt in prompts:
        _, given = prompted(model, parts, Prompted([prompt], 1.0, side), engine)
        cond = {name: value.to(engine.device) for name, value in given.items()}
        with torch.no_grad():  # one at a time: the last bits of a row depend on the batch
            d = torch.cat([predicted.noise(noise[None], t, cond) - noise for noise in x])
        low, high = d.amin((2, 3), keepdim=True), d.amax((2, 3), keepdim=True)
        yield torch.where(high > low, (d - low) / (high - low), 0.0)


def alike(d: Tensor) -> tuple[float, int]:
    """The largest MS-SSIM of two of some pictures in [0, 1], and the scales that it was computed at.

    Args:
        d: pictures [k, C, h, w].
    """
    pairs = torch.tensor(list(combinations(range(len(d)), 2)))
    values, scales = ms_ssim(d[pairs[:, 0]], d[pairs[:, 1]], weights=WEIGHTS)
    return float(values.max()), scales
