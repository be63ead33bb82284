"""Every output function against its formula in plain numpy."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from agreement import close
from errors import refuses
from whence.diffusion import outputs
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.diffusion.outputs import OUTPUTS, elbo_weight, probes
from whence.features.gradients import check
from whence.types import describe

G = torch.Generator().manual_seed(0)
P = torch.randn(5, 2, 3, 3, generator=G, dtype=torch.float64)
Y = torch.randn(5, 2, 3, 3, generator=G, dtype=torch.float64)
LOGITS = 3 * torch.randn(5, 4, generator=G, dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 2, 2])
PROBABILITY = np.exp(LOGITS.numpy()) / np.exp(LOGITS.numpy()).sum(1, keepdims=True)
OWN = PROBABILITY[np.arange(5), LABELS.numpy()]

DENOISER = {
    "loss": lambda p, y: ((p - y) ** 2).mean(),
    "rmse": lambda p, y: np.sqrt(((p - y) ** 2).mean()),
    "elbo": lambda p, y: ((p - y) ** 2).mean(),
    "weighted": lambda p, y: ((p - y) ** 2).mean(),
    "squared_norm": lambda p, y: (p**2).mean(),
    "mean": lambda p, y: p.mean(),
    "l1": lambda p, y: np.abs(p).sum(),
    "l2": lambda p, y: np.sqrt((p**2).sum()),
    "linf": lambda p, y: np.abs(p).max(),
}
CLASSIFIER = {
    "cross_entropy": -np.log(OWN),
    "margin": np.log(OWN) - np.log(1 - OWN),
    "doubt": 1 - OWN,
}


def test_every_output_is_tested():
    assert set(OUTPUTS) == DENOISER.keys() | CLASSIFIER.keys() | {"log_likelihood"}  # that one in test_likelihood
    assert all(output.name == name for name, output in OUTPUTS.items())


@pytest.mark.parametrize("name", DENOISER)
def test_output_of_a_denoiser(name):
    expected = [DENOISER[name](p, y) for p, y in zip(P.numpy(), Y.numpy(), strict=True)]
    np.testing.assert_allclose(OUTPUTS[name].value(P, Y), expected, rtol=1e-12)
    assert OUTPUTS[name].models == "denoiser"


@pytest.mark.parametrize("name", CLASSIFIER)
def test_output_of_a_classifier(name):
    np.testing.assert_allclose(OUTPUTS[name].value(LOGITS, LABELS), CLASSIFIER[name], rtol=1e-12)
    assert OUTPUTS[name].models == "classifier"


def test_margin_of_a_certain_image_is_finite():
    """log p - log(1 - p) by its definition is infinite from p = 1 - 1e-17 on; the difference of logits is not."""
    logits = torch.tensor([[100.0, 0.0, 0.0]], requires_grad=True)
    value = outputs.margin.value(logits, torch.tensor([0]))
    assert float(value.detach()) == pytest.approx(100 - np.log(2), rel=1e-6)
    value.sum().backward()
    np.testing.assert_allclose(logits.grad, [[1.0, -0.5, -0.5]], rtol=1e-6)


def test_directions():
    assert {name: o.better for name, o in OUTPUTS.items() if o.better} == {
        "loss": "lower",
        "rmse": "lower",
        "elbo": "lower",
        "weighted": "lower",
        "cross_entropy": "lower",
        "doubt": "lower",
        "margin": "higher",
        "log_likelihood": "higher",
    }


def test_elbo_weight_is_the_textbook_one():
    """beta^2 / (2 sigma^2 alpha (1 - alphabar)) with sigma^2 = beta (Ho et al. 2020, eq. 12)."""
    beta = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    close(beta, DDPMScheduler(num_train_timesteps=50).betas)
    alpha, bar = 1 - beta, (1 - beta).cumprod(0)
    expected = beta**2 / (2 * beta * alpha * (1 - bar))
    t = torch.tensor([0, 1, 7, 49])
    np.testing.assert_allclose(elbo_weight(bar, t), expected[t], rtol=1e-10)
    values = outputs.elbo.of(P[:4], Y[:4], t, Denoiser(bar))
    np.testing.assert_allclose(values, expected[t] * outputs.loss.value(P[:4], Y[:4]), rtol=1e-10)
    np.testing.assert_array_equal(outputs.loss.of(P, Y, t, None), outputs.loss.value(P, Y))


def test_elbo_without_a_schedule_or_for_another_target_is_refused():
    with refuses("noise schedule"):
        outputs.elbo.of(P, Y, torch.zeros(5, dtype=torch.int64), Classifier())
    check(outputs.elbo, Denoiser(linear_schedule(10)))
    check(outputs.loss, Denoiser(linear_schedule(10), "v_prediction"))
    for other in ("v_prediction", "sample"):
        with refuses(other):
            check(outputs.elbo, Denoiser(linear_schedule(10), other))


def test_outputs_for_the_other_kind_of_model_are_refused():
    with refuses("'margin' is for a classifier; this model is a denoiser"):
        check(outputs.margin, Denoiser(linear_schedule(10)))
    with refuses("'loss' is for a denoiser; this model is a classifier"):
        check(outputs.loss, Classifier())
    for forward in (Classifier(), Denoiser(linear_schedule(10))):
        check(probes(1)[0], forward)


def directions(count: int, seed: int = 0) -> torch.Tensor:
    """v / sqrt(D) of each probe, read off by measuring the unit vectors."""
    unit = torch.eye(18, dtype=torch.float64).reshape(18, 2, 3, 3)
    return torch.stack([probe.value(unit, unit) for probe in probes(count, seed)])


def test_probes_are_random_signs_shared_by_all_images():
    v = directions(3)
    np.testing.assert_allclose(v.abs(), 18**-0.5, rtol=1e-12)
    np.testing.assert_allclose(probes(1)[0].value(P, Y), P.flatten(1) @ v[0], rtol=1e-10)
    assert torch.equal(directions(5)[:3], v), "more probes begin with the same ones"
    assert not torch.equal(directions(3, seed=1), v)
    assert describe(list(probes(2))) == ["probe 0 of seed 0", "probe 1 of seed 0"]


def test_probes_estimate_the_trace_without_bias():
    """mean_v <J'v, J''v> = trace(J' J''^T) / D: the mean of v v^T is the identity."""
    v = directions(2000)
    mean = 18 * v.T @ v / 2000
    assert float((mean - torch.eye(18)).abs().max()) < 5 / 2000**0.5
    J1, J2 = torch.randn(2, 18, 7, generator=G, dtype=torch.float64)
    single = ((v @ J1) * (v @ J2)).sum(1)
    error = single.std() / 2000**0.5
    assert abs(float(single.mean() - torch.trace(J1 @ J2.T) / 18)) < 4 * float(error)
