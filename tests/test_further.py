"""Attribution from the finished weights alone: against differences of true further trainings."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import worlds
from agreement import close
from errors import refuses
from recipes import pixel_study, recipe_of
from whence.data.images import subset, tensor_images
from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.methods import further
from whence.methods.further import FurtherTraining, probe
from whence.training.order import noise_keys
from whence.training.unroll import Queries, Run, final_weights, finite_difference
from whence.types import Checkpoint, Engine, Task

N, M = 24, 3
FP64 = Engine(dtype=torch.float64)
MLP = {"_class_name": "MLPDenoiser", "sample_size": 4, "in_channels": 1, "width": 8, "layers": 1}
STUDY = pixel_study(MLP, recipe_of(steps=300, batch_size=8, learning_rate=3e-3, warmup_steps=5, ema=0.9, seed=3))
ASKED = stratified(4, seed=5)
METHOD = FurtherTraining(
    steps=6,
    learning_rate=1e-3,
    warmup_steps=2,
    schedule="constant",
    batch_size=8,
    masks=2,
    draws=ASKED,
    curvature="hessian",
    resample_draws=None,
)


def pictures(count, seed, first=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 1, 4, 4, generator=g, dtype=torch.float64) * 2 - 1
    return tensor_images(
        values, [f"image-{first + i:02d}" for i in range(count)], {"owner": ["ab"[i % 2] for i in range(count)]}
    )


TRAIN, QUERIES = pictures(N, 1), pictures(M, 2, N)


def trained(steps=None):
    net = STUDY.network_at(3).double()
    if steps != 0:
        net.load_state_dict(final_weights(Run.of(STUDY, TRAIN, engine=FP64)), strict=False)
    return net


@pytest.fixture(scope="module")
def network():
    return trained()


def task(root, network, **changes):
    """Nothing is known but the model and its images."""
    made = Task(STUDY.forward(), (worlds.checkpoint(lambda: network, "final"),), TRAIN, QUERIES, root, FP64)
    return replace(made, **changes)


def test_scores_are_differences_of_true_further_trainings(tmp_path, network):
    question = task(tmp_path, network)
    found = METHOD.estimate(question).values
    study, expected = METHOD.study(question), []
    some = torch.eye(N, dtype=torch.float64)[[0, 5, 11]]
    for group in METHOD.averaged().jobs(noise_keys(TRAIN)):
        for job in group:
            run = Run.of(study, TRAIN, job.seed, job.mask.double(), FP64)
            ways = some - job.mask.double() / job.mask.sum()  # what is left weighs as much as all did
            expected.append(-finite_difference(run, Queries(QUERIES, loss, ASKED), ways))
    close(found[:, [0, 5, 11]], torch.stack(expected).mean(0), 1e-4)  # Adam bends at small v: the quotient is not exact


def test_the_model_stays_as_it_is_and_nothing_else_is_needed(tmp_path, network):
    own = copy.deepcopy(network)  # loaded as it is: the other checkpoints here are copies
    scores = METHOD(task(tmp_path, own, trajectory=(Checkpoint(lambda: own, "own"),)))
    assert all(torch.equal(w, network.state_dict()[name]) for name, w in own.state_dict().items())
    assert not own.training, "the prepared network is shared: what trains on is a copy"
    assert scores.scale == "rank", "a short training moves less than a removal does"
    assert scores.recipe["study"]["checkpoint"] == "own"
    again = METHOD(task(tmp_path / "again", network, engine=replace(FP64, batch_size=3)))
    close(again.values, scores.values, 1e-10)
    owners = METHOD.estimate(task(tmp_path / "owners", network), "owner")
    close(owners.values, scores.group_by("owner").values, 1e-10)
    assert np.isnan(owners.stderr).all(), "one pair of halves says nothing about its error"


def test_more_steps_from_the_start_are_another_question(tmp_path, network):
    one, two = METHOD(task(tmp_path, network)).values, replace(METHOD, steps=12)(task(tmp_path, network)).values
    assert not torch.allclose(one, two)
    falling = replace(METHOD, schedule="cosine")
    assert falling.study(task(tmp_path, network)).recipe.schedule.rate(1.0, METHOD.steps - 1) < 0.2
    assert not torch.allclose(one, falling(task(tmp_path, network)).values)


def test_the_probe_takes_the_largest_rate_that_does_not_raise_the_loss(tmp_path, network, monkeypatch):
    question = task(tmp_path, network)
    open_rate = replace(METHOD, learning_rate=None)
    study = open_rate.study(question)
    found = probe(study, question)
    assert found.after <= found.before * (1 + further.RISE)
    assert study.recipe.optimizer.learning_rate == found.rate
    larger = [rate for rate in further.RATES if rate > found.rate]
    for rate in larger:
        tried = probe(study, replace(question, root=tmp_path / f"{rate:g}"))
        assert tried.rate < rate
        with monkeypatch.context() as only, refuses("rises at every learning rate", accepted="a learning_rate"):
            only.setattr(further, "RATES", (rate,))
            probe(study, replace(question, root=tmp_path / f"only {rate:g}"))
    assert larger, "the largest of all would say nothing"

    def never(*_, **__):
        raise AssertionError("what was tried is kept")

    monkeypatch.setattr(further, "final_weights", never)
    assert open_rate.study(question).recipe == study.recipe


@pytest.mark.parametrize(("share", "number"), [(0.5 * further.RISE, 0), (2 * further.RISE, 1), (torch.inf, 3)])
def test_a_rise_within_the_noise_of_fresh_moments_is_none(share, number, tmp_path, network, monkeypatch):
    """The loss rises by so much at the largest rate, half as much at the next, and so on."""
    question = task(tmp_path, network)
    rates = list(further.RATES)

    def loss_at(study, task, rows, after):
        rise = share / 2 ** rates.index(study.recipe.optimizer.learning_rate) if after else 0.0
        rise = 0.0 if share == torch.inf and study.recipe.optimizer.learning_rate <= rates[3] else rise
        return torch.tensor([[1.0 + rise]], dtype=torch.float64)

    monkeypatch.setattr(further, "loss_of", loss_at)
    assert replace(METHOD, learning_rate=None).study(question).recipe.optimizer.learning_rate == rates[number]


def test_a_model_that_is_not_at_rest_is_said(tmp_path):
    question = task(tmp_path, trained(steps=0))
    with pytest.warns(UserWarning, match="was not trained to its end"):
        replace(METHOD, learning_rate=None, steps=30).study(question)


def test_settings_that_cannot_be_honoured(tmp_path, network):
    with refuses("batch_size is 25, but there are 24", accepted="1 to 24"):
        replace(METHOD, batch_size=25)(task(tmp_path, network))
    assert replace(METHOD, batch_size=None).study(task(tmp_path, network)).recipe.batch_size == N
    with refuses("no complementary halves"):
        replace(METHOD, masks=3)
    with refuses("kind is 'linear'", accepted="cosine, constant"):
        replace(METHOD, schedule="linear")
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"batch_size": 0}, {"warmup_steps": -1}):
        with refuses(next(iter(wrong))):
            replace(METHOD, **wrong)
    frozen = trained()
    frozen.requires_grad_(False)
    with refuses("no weight of the model is trained"):
        METHOD(task(tmp_path, frozen))
    rough = replace(METHOD, learning_rate=3.0, steps=16, min_smoothness=0.95)
    with refuses("metasmoothness ... below 0.95", accepted="steps up to"):
        rough(task(tmp_path, network))


def test_images_that_were_not_trained_on_are_attributed_too(tmp_path, network):
    """They are told apart from none: the method cannot know; the probe's loss is theirs."""
    other = subset(pictures(N, 9, 50), range(12))
    scores = replace(METHOD, batch_size=None)(task(tmp_path, network, train=other))
    assert scores.values.shape == (M, 12)
