"""Noising and targets against diffusers' own scheduler."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from agreement import close
from errors import refuses
from whence.diffusion import draws, outputs
from whence.diffusion.draws import Even, LogitNormal, Mode
from whence.diffusion.forward import (
    Classifier,
    CosMap,
    Custom,
    Denoiser,
    FlowMatching,
    MinSNR,
    SigmaSqrt,
    linear_schedule,
)
from whence.features.gradients import check
from whence.types import Batch, Draw, describe

SCHEDULER = DDPMScheduler(num_train_timesteps=100)
G = torch.Generator().manual_seed(0)
X0, NOISE = torch.randn(2, 6, 3, 4, 4, generator=G)
T = torch.tensor([0, 1, 10, 50, 98, 99])
BATCH, DRAW = Batch(X0, torch.arange(6)), Draw(T, NOISE)


def echo(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network that returns its input, so that the prediction is x_t."""
    return x


def test_noisy_image_is_add_noise():
    x_t, _ = Denoiser(SCHEDULER.alphas_cumprod)(echo, BATCH, DRAW)
    close(x_t, SCHEDULER.add_noise(X0, NOISE, T), 1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", NOISE), ("v_prediction", SCHEDULER.get_velocity(X0, NOISE, T)), ("sample", X0)],
)
def test_targets(prediction_type, expected):
    _, target = Denoiser(SCHEDULER.alphas_cumprod, prediction_type)(echo, BATCH, DRAW)
    close(target, expected, 1e-6)


def test_unknown_prediction_type_names_the_known_ones():
    with refuses("'flow' is not one of epsilon, v_prediction, sample"):
        Denoiser(SCHEDULER.alphas_cumprod, "flow")


def test_network_is_called_with_timesteps_and_conditions():
    seen = {}

    def net(x, t, **cond):
        seen.update(cond, t=t)
        return x

    Denoiser(SCHEDULER.alphas_cumprod)(net, Batch(X0, torch.arange(6), {"class_labels": T}), DRAW)
    assert torch.equal(seen["t"], T)
    assert torch.equal(seen["class_labels"], T)


def test_learned_variance_channels_are_left_out():
    prediction, _ = Denoiser(SCHEDULER.alphas_cumprod)(lambda x, t: torch.cat([x, 7 + x], 1), BATCH, DRAW)
    assert torch.equal(prediction, Denoiser(SCHEDULER.alphas_cumprod)(echo, BATCH, DRAW)[0])


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_prediction_of_another_shape_is_refused(channels):
    """A single channel would be broadcast in silence."""
    with refuses(f"[6, {channels}, 4, 4] for images [6, 3, 4, 4]"):
        Denoiser(SCHEDULER.alphas_cumprod)(lambda x, t: x[:, [0] * channels], BATCH, DRAW)


def test_linear_schedule_is_that_of_diffusers():
    torch.testing.assert_close(linear_schedule(1000).float(), DDPMScheduler().alphas_cumprod, rtol=2e-5, atol=0)
    assert Denoiser(linear_schedule(7)).timesteps == 7


def test_recipes_tell_denoisers_apart():
    every = [
        Denoiser(linear_schedule(10)),
        Denoiser(linear_schedule(11)),
        Denoiser(linear_schedule(10), "sample"),
        Denoiser(linear_schedule(10), predict=echo),
    ]
    assert len({str(describe(forward)) for forward in every}) == len(every)


def test_classifier():
    labelled = Batch(X0, torch.arange(6), {"class_labels": T})
    logits, labels = Classifier()(lambda x: x.flatten(1)[:, :5], labelled, DRAW)
    assert torch.equal(logits, X0.flatten(1)[:, :5])
    assert torch.equal(labels, T)
    assert Classifier().timesteps == 1


def test_classifier_without_labels_says_where_they_come_from():
    with refuses("class folders, a `label` column"):
        Classifier()(lambda x: x, BATCH, DRAW)


# ------------------------------------------------------------------------------- flow matching, training weights, Custom

FLOW = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)
SIGMAS = FLOW.sigmas.flip(0)


def test_flow_noisy_image_is_scale_noise_and_the_network_gets_the_timesteps_of_the_scheduler():
    seen = {}

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.update(x=x, t=t)
        return x

    _, target = FlowMatching(SIGMAS)(net, BATCH, DRAW)
    there = FLOW.timesteps[99 - T]
    close(seen["t"], there)
    close(seen["x"], FLOW.scale_noise(X0, there, NOISE))
    close(target, NOISE - X0)


def test_preconditioned_flow_has_the_error_of_the_plain_one_times_sigma():
    """x_t - sigma v - x0 = -sigma (v - (eps - x0)): the same fit, another weight."""
    plain, pre = (FlowMatching(SIGMAS, preconditioned=p)(echo, BATCH, DRAW) for p in (False, True))
    sigma = SIGMAS[T].reshape(-1, 1, 1, 1)
    close(pre[0] - pre[1], -sigma * (plain[0] - plain[1]))


@pytest.mark.parametrize("sigmas", [[0.0, 0.5], [0.5, 0.2], [0.5, 1.5], []])
def test_sigmas_must_rise_within_0_and_1(sigmas):
    with refuses("rise from the least noisy step"):
        FlowMatching(torch.tensor(sigmas))


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none"])
def test_flow_weights_are_those_of_diffusers(scheme):
    rule = {"sigma_sqrt": SigmaSqrt(), "cosmap": CosMap(), "none": None}[scheme]
    expected = compute_loss_weighting_for_sd3(scheme, SIGMAS[T])
    torch.testing.assert_close(
        FlowMatching(SIGMAS, weighting=rule).weight(T).float(), expected.float(), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_is_that_of_diffusers_and_finite_without_any_signal(kind):
    snr = compute_snr(SCHEDULER, T)
    below = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    forward = Denoiser(SCHEDULER.alphas_cumprod.double(), kind, weighting=MinSNR(5.0))
    torch.testing.assert_close(forward.weight(T).float(), snr.clamp(max=5.0) / below, rtol=1e-5, atol=0)
    ends = Denoiser(torch.tensor([1.0, 0.0]), kind, weighting=MinSNR(5.0)).weight(torch.tensor([0, 1]))
    assert ends.tolist() == {"epsilon": [0.0, 1.0], "v_prediction": [0.0, 0.0], "sample": [5.0, 0.0]}[kind]


def test_only_the_weighted_output_applies_the_weights():
    forward = Denoiser(SCHEDULER.alphas_cumprod, weighting=MinSNR(5.0))
    pair = forward(echo, BATCH, DRAW)
    plain, weighted = (output.of(*pair, T, forward) for output in (outputs.loss, outputs.weighted))
    close(plain, (pair[0] - pair[1]).square().flatten(1).mean(1))
    torch.testing.assert_close(weighted, plain * forward.weight(T).float(), rtol=1e-5, atol=0)
    assert not torch.allclose(plain, weighted)
    undeclared = replace(forward, weighting=None)
    assert torch.equal(outputs.weighted.of(*pair, T, undeclared), plain)
    with refuses("Classifier declares no training weight"):
        outputs.weighted.of(*pair, T, Classifier())
    with refuses("this model predicts velocity"):
        check(outputs.elbo, FlowMatching(SIGMAS))


@pytest.mark.parametrize(
    ("density", "scheme"),
    [(Even(), {}), (LogitNormal(0.5, 0.8), {"logit_mean": 0.5, "logit_std": 0.8}), (Mode(1.29), {"mode_scale": 1.29})],
)
def test_density_draws_follow_the_training_of_diffusers(density, scheme):
    """The share of timesteps below each level, drawn by compute_density_for_timestep_sampling and by our quantiles."""
    name = {Even: "none", LogitNormal: "logit_normal", Mode: "mode"}[type(density)]
    g = torch.Generator().manual_seed(0)
    u = compute_density_for_timestep_sampling(name, 40_000, **scheme, generator=g)
    theirs = 99 - (u * 100).long()
    ours = draws.density(10, FlowMatching(SIGMAS, density=density), shared=False)(
        torch.arange(2000), (1,), 100
    ).t.flatten()
    levels = torch.arange(100)[:, None]
    gap = ((ours <= levels).double().mean(1) - (theirs <= levels).double().mean(1)).abs().max()
    assert gap < 0.015
    assert len(set(ours.tolist())) > 60


def test_density_draws_of_a_model_without_a_density_are_refused():
    with refuses("Classifier declares no density"):
        draws.density(4, Classifier())


def edm_predict(call, batch, draw):
    """EDM: D(x + sigma eps, sigma) with sigma in place of the timestep."""
    level = edm_sigmas[draw.t].to(batch.x0)
    return call(batch.x0 + level.reshape(-1, 1, 1, 1) * draw.noise, level)


def edm_target(batch, draw):
    return batch.x0


@dataclass(frozen=True)
class EDMWeight:
    """(sigma^2 + sigma_d^2) / (sigma sigma_d)^2"""

    sigma_data: float = 0.5

    def __call__(self, forward, t):
        s, d = edm_sigmas[t], self.sigma_data
        return (s**2 + d**2) / (s * d) ** 2


edm_sigmas = torch.linspace(0.01, 10, 100, dtype=torch.float64)


def test_a_forward_of_ones_own_is_two_functions():
    """EDM, which no forward here knows: loss, weight and recipe."""
    forward = Custom(edm_predict, edm_target, 100, weighting=EDMWeight())
    pair = forward(echo, BATCH, DRAW)
    s = edm_sigmas[T]
    by_hand = (s.float()[:, None] * NOISE.flatten(1)).square().mean(1) * ((s**2 + 0.25) / (0.5 * s) ** 2).float()
    torch.testing.assert_close(outputs.weighted.of(*pair, T, forward), by_hand, rtol=1e-5, atol=0)
    told = str(describe(forward))
    assert "edm_predict" in told
    assert "EDMWeight" in told


def test_a_prediction_of_ones_own_must_fit_its_target():
    with refuses("[6, 1, 4, 4] for images [6, 3, 4, 4]"):
        Custom(lambda call, batch, draw: batch.x0[:, :1], edm_target, 100)(echo, BATCH, DRAW)


def test_recipes_tell_the_declared_training_apart():
    every = [
        FlowMatching(SIGMAS),
        FlowMatching(SIGMAS, preconditioned=True),
        FlowMatching(SIGMAS, weighting=CosMap()),
        FlowMatching(SIGMAS, density=LogitNormal()),
        FlowMatching(SIGMAS, density=LogitNormal(1.0)),
        FlowMatching(SIGMAS.sqrt()),
        Denoiser(linear_schedule(10)),
        Denoiser(linear_schedule(10), weighting=MinSNR(5.0)),
        Denoiser(linear_schedule(10), weighting=MinSNR(4.0)),
    ]
    assert len({str(describe(forward)) for forward in every}) == len(every)
