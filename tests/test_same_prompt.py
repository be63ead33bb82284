"""Multi-scale structural similarity against hand-computed values, and the first step of prompts."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from torch import Tensor

from agreement import close
from errors import refuses
from families import FAMILIES, save_clip, save_vae, save_whole
from whence.evaluation import same_prompt as room
from whence.evaluation.same_prompt import STABLE_DIFFUSION_1_4, FirstStep, alike, first_steps, same_prompt
from whence.evaluation.ssim import WEIGHTS, ms_ssim, scales_that_fit
from whence.models import Model, open_model
from whence.models.encode import prompt_conditions
from whence.models.sampling import noise_of
from whence.types import Engine


def pictures(count: int, side: int, seed: int = 0, channels: int = 2) -> Tensor:
    """Blurred noise in [0, 1], so that there is something at every scale."""
    x = torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for size in (3, 5, 9):
        x = x + torch.nn.functional.avg_pool2d(x, size, 1, size // 2) * size
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return (x - low) / (high - low)


def by_hand(a: np.ndarray, b: np.ndarray, weights: list[float]) -> float:
    """The formula, written apart: a window of 11 x 11 as one matrix, scipy's correlation, one picture [C, H, W]."""
    y = np.arange(11) - 5
    window = np.exp(-(y[:, None] ** 2 + y[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(x: np.ndarray) -> np.ndarray:
        return np.stack([correlate2d(channel, window, "valid") for channel in x])

    found = 1.0
    for scale, weight in enumerate(weights, 1):
        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        values = (2 * cov + 9e-4) / (va + vb + 9e-4)
        if scale == len(weights):
            values = values * (2 * ma * mb + 1e-4) / (ma**2 + mb**2 + 1e-4)
        found *= max(values.mean(), 0) ** weight
        half = len(a[0]) // 2
        a, b = (x[:, : 2 * half, : 2 * half].reshape(len(x), half, 2, half, 2).mean((2, 4)) for x in (a, b))
    return found


@pytest.mark.parametrize(("side", "scales"), [(176, 5), (96, 4), (44, 3), (12, 1)])
def test_equal_to_the_formula(side, scales):
    """With as many scales as fit; the weights of the first ones are scaled to the sum of all."""
    a, b = pictures(2, side), pictures(2, side, seed=1)
    b = 0.6 * a + 0.4 * b
    found, count = ms_ssim(a, b)
    assert count == scales
    used = np.array(WEIGHTS[:scales]) * sum(WEIGHTS) / sum(WEIGHTS[:scales])
    close(found, [by_hand(x.numpy(), y.numpy(), used.tolist()) for x, y in zip(a, b, strict=True)], 1e-9)


def test_identical_is_one_and_the_order_does_not_matter():
    a, b = pictures(3, 64), pictures(3, 64, seed=1)
    close(ms_ssim(a, a)[0], torch.ones(3), 1e-12)
    close(ms_ssim(a, b)[0], ms_ssim(b, a)[0], 1e-12)
    close(ms_ssim(a[1:2], b[1:2])[0], ms_ssim(a, b)[0][1:2], 1e-12)


@pytest.mark.parametrize(("p", "q"), [(0.2, 0.8), (0.0, 1.0), (0.5, 0.5)])
def test_pictures_of_one_colour_have_a_closed_form(p, q):
    """cs is 1 at every scale, so that only the brightness at the last one counts: l^w_M."""
    a, b = (torch.full((1, 1, 192, 192), value) for value in (p, q))
    expected = ((2 * p * q + 1e-4) / (p * p + q * q + 1e-4)) ** WEIGHTS[-1]
    close(ms_ssim(a, b)[0], [expected], 1e-5)
    close(ms_ssim(255 * a, 255 * b, 255.0)[0], [expected], 1e-5)


def test_more_noise_is_less_alike():
    a = pictures(1, 96)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(2), dtype=a.dtype)
    values = [float(ms_ssim(a, a + size * noise)[0]) for size in (0, 0.02, 0.05, 0.1, 0.3, 1)]
    assert all(first > then for first, then in pairwise(values))
    assert float(ms_ssim(a, 1 - a)[0]) == 0  # opposite structure, which has no power


def test_what_is_too_small_is_refused():
    assert [scales_that_fit(side, 400) for side in (10, 11, 21, 22, 44, 88, 176, 999)] == [0, 1, 1, 2, 3, 4, 5, 5]
    with refuses("pictures of 10x40", "ms_ssim", "11 px or more"):
        ms_ssim(torch.zeros(1, 1, 40, 10), torch.zeros(1, 1, 40, 10))
    with refuses("pictures [1, 1, 20, 20] and [1, 1, 20, 21]"):
        ms_ssim(torch.zeros(1, 1, 20, 20), torch.zeros(1, 1, 20, 21))


# ------------------------------------------------------------------------------------------------------- the first step


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Stable Diffusion of random weights whose latents are 24 x 24."""
    root = tmp_path_factory.mktemp("prompts")
    replace(FAMILIES["sd"], config=FAMILIES["sd"].config | {"sample_size": 24}).save(root / "sd")
    save_vae(root / "sd", scaling_factor=0.7)
    save_clip(root / "sd")
    return root


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return open_model(folder / "sd")


ORDINARY = ["a cat", "two birds", "a red house", "the sea", "some trees", "a hat", "an old man", "blue", "rain"]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_first_step_is_the_predicted_noise_less_the_noise(kind, folder, model):
    """At the sampler's first timestep, without guidance, each channel from 0 to 1; by hand, with diffusers' own network."""
    asked = model
    if kind != "epsilon":
        asked = replace(model, forward=replace(model.forward, prediction_type=kind))
    found = next(first_steps(asked, ["a cat"], FirstStep(seeds=3, seed=4)))
    network = diffusers.UNet2DConditionModel.from_pretrained(folder / "sd/unet").eval()
    cond = prompt_conditions(model, model.parts(Engine()), ["a cat"] * 3, 48)
    x = noise_of(model, range(3), 4, 48)
    scheduler = diffusers.DDIMScheduler.from_config(model.scheduler, steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(50)
    first = int(scheduler.timesteps[0])
    assert first > 900
    bar = float(model.forward.alphas_cumprod[first])
    with torch.no_grad():
        out = network(x, first, **cond).sample
    eps = {
        "epsilon": out,
        "v_prediction": bar**0.5 * out + (1 - bar) ** 0.5 * x,
        "sample": (x - bar**0.5 * out) / (1 - bar) ** 0.5,
    }[kind]
    d = (eps - x).numpy()
    low, high = d.min((2, 3), keepdims=True), d.max((2, 3), keepdims=True)
    close(found, (d - low) / (high - low), 1e-4)


def test_the_largest_pair_counts():
    d = pictures(4, 24)
    d[2] = d[0] + 1e-3 * torch.rand(d[0].shape, generator=torch.Generator().manual_seed(0))
    value, scales = alike(d)
    pairs = [float(ms_ssim(d[k : k + 1], d[l : l + 1], weights=(0.33,) * 3)[0]) for k, l in combinations(range(4), 2)]  # noqa: E741
    assert (value, scales) == (max(pairs), 2)
    assert value == pairs[1] > 0.9


def test_a_prompt_does_not_depend_on_the_others_and_p_is_that_of_the_ordinary_ones(model):
    asked = ["a green dog", "snow"]
    how = FirstStep(seeds=3)
    found = same_prompt(model, asked, ORDINARY, rate=0.1, how=how)
    alone = same_prompt(model, asked[1:], ORDINARY[::-1], rate=0.1, how=how)
    assert alone == found[1:]
    values = [alike(d)[0] for d in first_steps(model, ORDINARY, how)]
    for each in found:
        assert each.p == (1 + sum(value >= each.similarity for value in values)) / 10
        assert each.flagged == (each.p <= 0.1) == bool(each.sentence)
        assert (each.threshold, each.scales) == (max(values), 2)
    assert STABLE_DIFFUSION_1_4 == 0.428


def test_a_prompt_whose_noises_all_go_one_way_is_flagged(model, monkeypatch):
    """As where the network answers a prompt with one picture, whatever the noise."""
    real = first_steps

    def planted(model: Model, prompts: list[str], *how: object):
        for prompt, d in zip(prompts, real(model, prompts, *how), strict=True):
            yield d[:1] + 0.01 * d if prompt == "learned by heart" else d

    monkeypatch.setattr(room, "first_steps", planted)
    one, other = same_prompt(model, ["learned by heart", "snow"], ORDINARY, rate=0.1, how=FirstStep(seeds=3))
    assert (one.flagged, one.p) == (True, 0.1)
    assert one.sentence.startswith("looks memorised: the first step goes the same way from different noises, more so")
    assert other.similarity < one.similarity


def test_what_cannot_be_asked_is_refused(tmp_path, model):
    with refuses("'a cat' is asked about and said not to be memorised"):
        same_prompt(model, ["a cat"], ORDINARY, rate=0.1)
    with refuses("9 similarities to compare with are too few for a rate of 0.01", accepted="0.1 or more, or 99"):
        same_prompt(model, ["snow"], ORDINARY)
    with refuses("1 noises cannot be compared"):
        FirstStep(seeds=1)
    flow = open_model(save_whole("sd3", tmp_path / "sd3"))
    with refuses("flow matching", accepted="DDPM family"):
        next(first_steps(flow, ["a"]))
    with refuses("reads no text"):
        next(first_steps(open_model(save_whole("ddpm", tmp_path / "ddpm")), ["a"]))
