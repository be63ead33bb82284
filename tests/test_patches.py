"""The patch kernel of the optimal denoiser against loops, against autograd, and at its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agreement import close
from errors import refuses
from whence import nda
from whence.diffusion.draws import Draws, Steps, fixed
from whence.diffusion.forward import Classifier, Denoiser, FlowMatching, linear_schedule
from whence.types import Engine, Task
from worlds import checkpoint, tensors, unet

DRAWS = Draws(Steps((10, 300)))


def task_of(root: Path, train: Tensor, queries: Tensor, **engine: int) -> Task:
    point = checkpoint(unet, "never looked at")
    forward = Denoiser(linear_schedule())
    return Task(forward, (point,), tensors(train, "train"), tensors(queries, "query"), root, Engine(**engine))


def pictures(n: int, seed: int, channels: int = 2, height: int = 5, width: int = 4) -> Tensor:
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def test_flow_matching_has_its_own_noise(tmp_path):
    """x_t = (1 - sigma) x0 + sigma eps with patches of the whole image, from the definition."""
    sigmas = torch.linspace(0.05, 1, 1000, dtype=torch.float64)
    task = replace(task_of(tmp_path, pictures(6, 0), pictures(3, 1)), forward=FlowMatching(sigmas))
    batch, images = task.queries.batch(range(3)), task.train.batch(range(6)).x0
    draw = DRAWS(batch.keys, batch.x0.shape[1:], 1000, torch.float64)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for s, t in enumerate(DRAWS.timesteps.steps):
        sigma = sigmas[t]
        x_t = (1 - sigma) * batch.x0 + sigma * draw.noise[:, s]
        places = (weights_of_flow(x_t[q], images, float(sigma)) for q in range(3))
        expected += torch.stack(list(places)) / len(DRAWS.timesteps.steps)
    torch.testing.assert_close(nda(DRAWS, (1.0,), anywhere=False)(task).values, expected, rtol=1e-9, atol=1e-12)
    assert float(expected.max()) < 1 - 1e-3


def weights_of_flow(x_t: Tensor, images: Tensor, sigma: float) -> Tensor:
    """The mean of softmax weights over the two squares of 4 x 4 in an image of 5 x 4: [n]."""
    found = torch.zeros(len(images), dtype=torch.float64)
    for top in (slice(0, 4), slice(1, 5)):
        far = (x_t[:, top] - (1 - sigma) * images[:, :, top]).square().sum((1, 2, 3))
        found += (-far / (2 * sigma**2)).softmax(0) / 2
    return found


def noisy(task: Task, draws: Draws) -> tuple[Tensor, Tensor]:
    """x_t [m, S, ...] and abar_t [S]."""
    batch = task.queries.batch(range(len(task.queries)))
    draw = draws(batch.keys, batch.x0.shape[1:], 1000, torch.float64)
    signal = task.forward.alphas_cumprod[draw.t[0]]
    a = signal[:, None, None, None]
    return a.sqrt() * batch.x0[:, None] + (1 - a).sqrt() * draw.noise, signal


def weights(x_t: Tensor, images: Tensor, signal: float, side: int, anywhere: bool) -> Tensor:
    """w of each training image at each place of one noisy query, with explicit patches: [n, places]."""
    own = F.unfold(x_t[None], side)[0].T
    theirs = signal**0.5 * F.unfold(images, side).mT
    found = torch.zeros(len(images), len(own), dtype=torch.float64)
    for p in range(len(own)):
        candidates = theirs if anywhere else theirs[:, p : p + 1]
        exponents = -(own[p] - candidates).square().sum(2) / (2 * (1 - signal))
        found[:, p] = exponents.flatten().softmax(0).reshape(exponents.shape).sum(1)
    return found


@pytest.mark.parametrize("anywhere", [True, False])
@pytest.mark.parametrize("budget", [1, 4000, 2**28])
def test_scores_are_means_of_softmax_weights(tmp_path, anywhere, budget):
    """One place, one image and one query at a time, or all together: the same. A row sums to 1."""
    task = task_of(tmp_path, pictures(6, 0), pictures(3, 1), budget=budget)
    found = nda(DRAWS, (0.5, 0.75, 0.3), anywhere)(task).values
    x_t, signal = noisy(task, DRAWS)
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for q in range(3):
        for s in range(2):
            for side in (1, 2, 3):  # 0.3, 0.5 and 0.75 of 4
                expected[q] += weights(x_t[q, s], task.train.x0, float(signal[s]), side, anywhere).mean(1) / 6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
    close(found.sum(1), torch.ones(3), 1e-12)


def test_whole_images_give_the_optimal_denoiser(tmp_path):
    """sum_i w_i x_i = E[x_0 | x_t] = (x_t + s^2 grad log p(x_t)) / a, p the density of noised training images (Tweedie)."""
    task, draws = task_of(tmp_path, pictures(6, 0, height=4), pictures(3, 1, height=4)), fixed(300)
    w = nda(draws, (1.0,))(task).values
    x_t, signal = noisy(task, draws)
    x_t, a, variance = x_t[:, 0].requires_grad_(), float(signal[0]) ** 0.5, 1 - float(signal[0])
    square = (x_t[:, None] - a * task.train.x0).square().sum((2, 3, 4))
    (score,) = torch.autograd.grad((-square / (2 * variance)).logsumexp(1).sum(), x_t)
    mean = torch.einsum("qi,ichw->qchw", w, task.train.x0)
    torch.testing.assert_close(mean, ((x_t + variance * score) / a).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("anywhere", [True, False])
def test_at_small_steps_the_nearest_neighbour_takes_all(tmp_path, anywhere):
    queries = pictures(3, 1, height=4)
    task = task_of(tmp_path, pictures(50, 0, height=4), queries)
    values = nda(fixed(0), (1.0,), anywhere)(task).values
    nearest = torch.cdist(queries.flatten(1), task.train.x0.flatten(1)).argmin(1)
    assert torch.equal(values.argmax(1), nearest)
    assert float(values.max(1).values.min()) > 0.999


def test_a_patch_is_found_anywhere_or_only_in_its_place(tmp_path):
    """The left half of the query stands on the right of a training image that is grey otherwise, as all others are."""
    query, train = pictures(1, 1, height=4, width=8).sign(), torch.zeros(8, 2, 4, 8).double()
    train[5, :, :, 4:] = query[0, :, :, :4]
    task = task_of(tmp_path, train + 1e-3 * pictures(8, 0, height=4, width=8), query)
    found, apart = (nda(fixed(100), (1.0,), anywhere)(task).values[0] for anywhere in (True, False))
    assert found.argmax() == 5
    assert float(found[5]) >= 0.2, "one of the five places of the query is explained by it alone"
    assert float(apart[5]) < 0.05


def test_what_is_refused(tmp_path):
    task = task_of(tmp_path, pictures(2, 0), pictures(1, 1))
    for patches in ((), (0.0,), (1.5,)):
        with refuses(accepted="parts of the image's side, above 0 and at most 1"):
            nda(patches=patches)
    with refuses("nda needs a noise schedule"):
        nda()(replace(task, forward=Classifier()))
