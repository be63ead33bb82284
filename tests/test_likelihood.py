"""log p(x) by the probability-flow ODE, against a world whose densities are known: images of independent normal pixels."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from agreement import close
from errors import refuses
from recipes import pixel_study, recipe_of
from whence.data.images import tensor_images
from whence.diffusion import likelihood
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Classifier, Custom, Denoiser, FlowMatching, linear_schedule
from whence.diffusion.likelihood import log_likelihood, with_divergence
from whence.diffusion.outputs import OUTPUTS
from whence.features.gradients import measure, per_image_backward, per_image_vmap
from whence.training.unroll import Differentiation, Queries, Run, finite_difference, metagradient
from whence.types import Batch, Draw, Engine

T, SHAPE, ONE = 400, (1, 2, 2), uniform(1)
BAR = linear_schedule(T, 1e-4, 0.1)
SIGMAS = torch.linspace(1 / T, 1, T, dtype=torch.float64)
FORWARDS = {name: Denoiser(BAR, name) for name in ("epsilon", "v_prediction", "sample")} | {
    "velocity": FlowMatching(SIGMAS),
    "preconditioned": FlowMatching(SIGMAS, preconditioned=True),
}


class Normals(nn.Module):
    """The best prediction there is for x0 ~ N(mean, s^2): by Bayes' rule."""

    def __init__(self, kind):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([0.3, -0.2, 0.1, 0.6], dtype=torch.float64).reshape(SHAPE))
        self.log_s = nn.Parameter(torch.tensor([-0.4, 0.2, 0.0, -1.0], dtype=torch.float64).reshape(SHAPE))
        self.kind = kind

    def levels(self, t):
        if self.kind in ("velocity", "preconditioned"):
            sigma = (t / T).reshape(-1, 1, 1, 1)
            return 1 - sigma, sigma
        bar = BAR[t].reshape(-1, 1, 1, 1)
        return bar.sqrt(), (1 - bar).sqrt()

    def forward(self, x, t):
        a, b = self.levels(t)
        variance = (2 * self.log_s).exp()
        shift = (x - a * self.mean) / (a**2 * variance + b**2)
        clean, noise = self.mean + a * variance * shift, b * shift
        found = {"epsilon": noise, "v_prediction": a * noise - b * clean, "sample": clean}
        return found.get(self.kind, noise - clean)

    def density(self, x, forward):
        """log of the density of the least noisy step, per element [b]."""
        first = 1 - forward.sigmas[0] if isinstance(forward, FlowMatching) else BAR[0].sqrt()
        noise = forward.sigmas[0] ** 2 if isinstance(forward, FlowMatching) else 1 - BAR[0]
        spread = (first**2 * (2 * self.log_s).exp() + noise).sqrt()
        return torch.distributions.Normal(first * self.mean, spread).log_prob(x).flatten(1).mean(1)


def rows(count, shape=SHAPE, seed=0):
    g = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(count, *shape, generator=g, dtype=torch.float64) for _ in range(2))
    return Batch(x0, torch.arange(count), {}), Draw(torch.zeros(count, dtype=torch.long), noise)


@pytest.mark.parametrize("kind", FORWARDS)
def test_density_of_a_known_world_and_its_slopes(kind):
    net, forward, (batch, at) = Normals(kind), FORWARDS[kind], rows(3)
    expected = net.density(batch.x0, forward)
    error = [
        float((log_likelihood(forward, net, batch, at, steps) - expected).abs().max().detach())
        for steps in (25, 50, 100)
    ]
    assert error[2] < 1e-3
    assert error[1] < 0.4 * error[0], "of second order in the steps"
    assert error[2] < 0.4 * error[1]
    found = log_likelihood(forward, net, batch, at, 200)
    parameters = list(net.parameters())
    for mine, true in zip(*(torch.autograd.grad(f.sum(), parameters) for f in (found, expected)), strict=True):
        close(mine, true, 5e-3)


def test_a_divergence_that_is_estimated_is_right_on_average(monkeypatch):
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def velocity(x, t):
        return torch.tanh(x.flatten(1) @ matrix.T).reshape(x.shape)

    x = rows(2)[0].x0
    value, exact = with_divergence(velocity, x, 0, torch.ones_like(x))
    inner = x.flatten(1) @ matrix.T
    close(exact, ((1 - inner.tanh() ** 2) * matrix.diagonal()).sum(1), 1e-12)
    monkeypatch.setattr(likelihood, "EXACT", 3)
    every = [
        torch.tensor(signs).double().reshape(SHAPE).expand(2, *SHAPE) for signs in itertools.product((-1, 1), repeat=4)
    ]
    each = torch.stack([with_divergence(velocity, x, 0, signs)[1] for signs in every])
    close(each.mean(0), exact, 1e-12)
    assert float(each.std(0).min()) > 0.1, "an estimate that is always exact would say nothing"
    close(with_divergence(velocity, x, 0, every[0])[0], value, 1e-12)


def test_the_signs_of_the_noise_are_those_of_the_estimate(monkeypatch):
    """The path does not depend on them, so that the mean over all signs is the exact divergence."""
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    forward, (batch, at) = Denoiser(BAR, "v_prediction"), rows(2)

    def call(x, t):
        return torch.tanh(x.flatten(1) @ matrix.T).reshape(x.shape)

    exact = log_likelihood(forward, call, batch, at, steps=5)
    monkeypatch.setattr(likelihood, "EXACT", 3)
    noises = [
        torch.tensor(signs).reshape(SHAPE).expand(2, *SHAPE) * at.noise.abs()
        for signs in itertools.product((-1, 1), repeat=4)
    ]
    each = torch.stack([log_likelihood(forward, call, batch, Draw(at.t, noise), steps=5) for noise in noises])
    close(each.mean(0), exact, 1e-12)
    assert float(each.std(0).min()) > 1e-3, "another noise, another estimate"


def test_gradients_through_attention_are_the_same_whatever_takes_them():
    torch.manual_seed(0)
    net = UNet2DModel(4, 1, 1, block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
                      down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",)).double()  # fmt: skip
    forward = Denoiser(linear_schedule(3, 0.1, 0.4), "v_prediction")
    batch, names = rows(2, (1, 4, 4))[0], [name for name, _ in net.named_parameters()]
    found = [
        take(net, forward, OUTPUTS["log_likelihood"], ONE, batch, names)
        for take in (per_image_vmap, per_image_backward)
    ]
    close(*(torch.cat([blocks[name].flatten(1) for name in names], dim=1) for blocks in found), 1e-9)
    with torch.no_grad():
        value = measure(net, {}, forward, OUTPUTS["log_likelihood"], *rows(2, (1, 4, 4)))
    assert value.shape == (2,)
    assert value.isfinite().all()


def test_it_can_be_measured_at_the_end_of_a_training(tmp_path):
    config = {"_class_name": "MLPDenoiser", "sample_size": 2, "in_channels": 1, "width": 4, "layers": 1}
    study = pixel_study(config, recipe_of(steps=4, batch_size=4, learning_rate=1e-2, warmup_steps=1, ema=0.5, seed=0))
    run = Run.of(study, tensor_images(rows(6)[0].x0.tanh(), list("abcdef")), engine=Engine(dtype=torch.float64))
    short = replace(run, forward=replace(run.forward, alphas_cumprod=run.forward.alphas_cumprod[::200]))
    asked = Queries(tensor_images(rows(2, seed=3)[0].x0.tanh(), ["x", "y"]), OUTPUTS["log_likelihood"], ONE)
    ways = torch.eye(6, dtype=torch.float64)[:2]
    found = metagradient(short, asked, Differentiation(curvature="hessian"))
    close(found[:, :2], finite_difference(short, asked, ways), 1e-5)


@pytest.mark.parametrize(
    ("forward", "accepted"),
    [
        (Classifier(), "Denoiser, FlowMatching"),
        (Custom(lambda call, b, d: call(b.x0, d.t), lambda b, d: b.x0, 3), "Denoiser, FlowMatching"),
        (Denoiser(torch.tensor([0.5, 0.0], dtype=torch.float64)), "v_prediction"),
        (Denoiser(torch.tensor([0.5], dtype=torch.float64)), "2 timesteps or more"),
    ],
)
def test_models_without_a_flow_are_refused_by_name(forward, accepted):
    with refuses(where="log_likelihood", accepted=accepted):
        log_likelihood(forward, lambda x, t: x, *rows(1))


def test_methods_that_take_one_prediction_refuse_it():
    with refuses("no function of one prediction", accepted="loss"):
        OUTPUTS["log_likelihood"].of(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1), FORWARDS["epsilon"])
