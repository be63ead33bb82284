"""Noising and targets against diffusers' own scheduler."""

import pytest
import torch
from diffusers import DDPMScheduler

from whence.forward import Classifier, Denoiser, linear_schedule
from whence.types import Batch, Draw, WhenceError, describe

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
    torch.testing.assert_close(x_t, SCHEDULER.add_noise(X0, NOISE, T), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    [("epsilon", NOISE), ("v_prediction", SCHEDULER.get_velocity(X0, NOISE, T)), ("sample", X0)],
)
def test_targets(prediction_type, expected):
    _, target = Denoiser(SCHEDULER.alphas_cumprod, prediction_type)(echo, BATCH, DRAW)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-6)


def test_unknown_prediction_type_names_the_known_ones():
    with pytest.raises(WhenceError, match="'flow' is not one of epsilon, v_prediction, sample"):
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
    with pytest.raises(WhenceError, match=rf"\[6, {channels}, 4, 4\] for images \[6, 3, 4, 4\]"):
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
    with pytest.raises(WhenceError, match="class folders or a `label` column"):
        Classifier()(lambda x: x, BATCH, DRAW)
