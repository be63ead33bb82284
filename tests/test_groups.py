"""GUDA: its target is the best denoiser of the images that stay, its step, what is kept, and who has no groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from torch import Tensor

from agreement import close
from errors import refuses
from recipes import pixel_study, recipe_of
from test_membership import NETWORK, digit_images
from whence.data.images import subset, tensor_images
from whence.diffusion.draws import stratified, uniform
from whence.diffusion.forward import Denoiser, FlowMatching, linear_schedule
from whence.diffusion.noise import seed_for
from whence.diffusion.outputs import loss
from whence.diffusion.predicted import NoisePrediction
from whence.evaluation.credit import sums_of
from whence.features.gradients import measure
from whence.methods import guda
from whence.methods.candidates import Candidates
from whence.methods.fisher import Measured
from whence.methods.groups import redirected
from whence.models import open_model
from whence.training.optimizer import AdamW
from whence.training.order import noise_keys
from whence.training.runs import train_study
from whence.types import Batch, Draw, Task
from worlds import classifier_task, linear_world

SCHEDULE = linear_schedule(50)
FORWARDS = {
    **{kind: Denoiser(SCHEDULE, kind) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": FlowMatching(torch.linspace(0.02, 1, 50).double()),
    "preconditioned": FlowMatching(torch.linspace(0.02, 1, 50).double(), preconditioned=True),
}


def best_denoiser(x_t: Tensor, images: Tensor, a: float, s: float) -> np.ndarray:
    """E[x0 | x_t] where x0 is one of the images, each as likely: Bayes' rule with the normal density of x_t."""
    densities = np.array([-((x_t - a * image) ** 2).sum().item() / (2 * s * s) for image in images])
    weights = np.exp(densities - logsumexp(densities))
    return sum(weight * image.numpy() for weight, image in zip(weights, images, strict=True))


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("shape", [(2,), (3, 32, 32)])
def test_the_target_is_that_of_the_best_denoiser_of_those_that_stay(name, shape):
    """To 1e-8, in 2 and in 3,072 dimensions, where exp of the distances themselves is 0 for every image."""
    g, forward = torch.Generator().manual_seed(1), FORWARDS[name]
    lost, stay = (torch.randn(count, *shape, generator=g).double() for count in (6, 9))
    stay[0] = lost[0] + 1e-3  # one that is near
    t = torch.tensor([0, 5, 15, 25, 40, 49])
    drawn = Draw(t, torch.randn(6, *shape, generator=g).double())
    scales = NoisePrediction.of(forward, None, "x").scales(t, lost)
    x0, noise = redirected(lost, stay.expand(6, *stay.shape), drawn, scales, None)
    met: list[Tensor] = []

    def call(x_t: Tensor, *_: object) -> tuple[Tensor]:
        met.append(x_t)
        return (torch.zeros_like(x_t),)

    keys = torch.zeros(6, dtype=torch.int64)
    target = forward(call, Batch(x0, keys, {}), Draw(t, noise))[1]
    forward(call, Batch(lost, keys, {}), drawn)
    close(met[0], met[1], 1e-10)  # what the network sees is the noisy image that is to be forgotten
    for row in range(6):
        a, s = (float(each.flatten()[row]) for each in scales)
        clean = torch.from_numpy(best_denoiser(met[1][row], stay, a, s))
        eps = (met[1][row] - a * clean) / s
        expected = {"epsilon": eps, "v_prediction": a * eps - s * clean, "flow": eps - clean}.get(name, clean)
        close(target[row], expected, 1e-8)
    if shape == (3, 32, 32):
        apart = (met[1][3] - float(scales[0].flatten()[3]) * stay).flatten(1).square().sum(1)
        assert not torch.exp(-apart.float() / 2).any(), "the trap of released code is met"


def test_a_clipped_change_is_no_larger_and_keeps_the_noisy_image():
    g = torch.Generator().manual_seed(0)
    lost, stay = torch.randn(3, 4, generator=g).double(), torch.randn(3, 5, 4, generator=g).double()
    drawn = Draw(torch.tensor([0, 10, 49]), torch.randn(3, 4, generator=g).double())
    scales = NoisePrediction.of(FORWARDS["epsilon"], None, "x").scales(drawn.t, lost)
    x0, noise = redirected(lost, stay, drawn, scales, 0.5)
    assert float((noise - drawn.noise).abs().max()) == pytest.approx(0.5, abs=1e-9)
    close(scales[0] * x0 + scales[1] * noise, scales[0] * lost + scales[1] * drawn.noise, 1e-12)
    free = redirected(lost, stay, drawn, scales, None)[1]
    assert float((free - drawn.noise).abs().max()) > 0.5


# ------------------------------------------------------------------------------------------------------------ the method


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> Task:
    """A perceptron that learned 60 digits of ten classes; six of them are the queries."""
    root = tmp_path_factory.mktemp("groups")
    study = pixel_study(NETWORK, recipe_of(300, 60, learning_rate=5e-3, seed=1))
    train = digit_images(0, 60)
    train_study(study, train, root / "model", 300)
    model = open_model(root / "model")
    return Task(model.forward, (model.final,), train, subset(train, range(6)), root / "run")


QUICK: dict[str, Any] = {
    "steps": 12,
    "learning_rate": 1e-3,
    "draws": replace(stratified(8), shared=True),
    "weight": 1.0,
}


def test_the_class_of_a_query_is_the_one_without_which_it_is_known_less(learned, tmp_path):
    scores = guda(**QUICK)(replace(learned, root=tmp_path))
    told, labels = scores.recipe["unlearned"], learned.train.meta["digit"]
    assert (told["by"], len(told["groups"])) == ("digit", 10)
    sums = scores.group_by("digit")
    names = list(sums.train_ids)
    assert sum(names[int(row.argmax())] == str(labels[q]) for q, row in enumerate(sums.values)) >= 5
    assert min(told["forgotten"]) > max(1.0, *(0.9 * each for each in told["retained"]))
    for name in told["groups"]:  # an equal part for each image
        rows = [row for row, label in enumerate(labels) if str(label) == name]
        assert len(set(scores.values[0, rows].tolist())) == 1


def test_sums_by_another_column_are_refused(learned, tmp_path):
    """They would be made of the equal parts that the images of each group have."""
    digits = [int(str(each)) for each in learned.train.meta["digit"]]
    meta = {"digit": digits, "maker": [f"maker {digit % 3}" for digit in digits]}
    train = tensor_images(learned.train.batch(range(60)).x0, list(learned.train.ids), meta)
    scores = guda(**{**QUICK, "steps": 1, "by": "maker"})(replace(learned, train=train, root=tmp_path))
    assert scores.group_by("maker").values.shape == (6, 3)
    with refuses("scores of the groups of 'maker', whose images share them equally: they say nothing by 'digit'"):
        scores.group_by("digit")
    assert sums_of(scores, "maker").values.shape == (6, 3)
    with refuses("they say nothing by 'digit'", "--by", "maker"):
        sums_of(scores, "digit")
    alone = guda(**{**QUICK, "steps": 1, "by": "image"})
    few = replace(learned, train=subset(train, range(4)), root=tmp_path / "image")
    assert alone(few).group_by("digit").values.shape == (6, 4), "of images by themselves any column may be asked"


def test_a_step_is_down_the_loss_of_those_that_stay_and_towards_what_they_would_say(learned, tmp_path, monkeypatch):
    """grad L_retained + weight grad MSE at the step's own batch and noise, written out."""
    met: list[dict[str, Tensor]] = []
    monkeypatch.setattr(
        AdamW, "update", lambda self, state, grads, rate: met.append(grads) or (state.weights, state.m, state.v)
    )
    task = replace(learned, root=tmp_path)
    method = guda(**{**QUICK, "steps": 1, "weight": 0.7, "batch_size": 8, "neighbours": 5})
    with pytest.warns(UserWarning, match="these scores say nothing"):
        scores = method(task)
    assert not scores.values.any(), "no step was taken"
    labels = [str(label) for label in task.train.meta["digit"]]
    group = scores.recipe["unlearned"]["groups"][3]
    seed = seed_for(0, "groups unlearned, run 0, step 0") % 2**31
    order = torch.argsort(noise_keys(task.train), stable=True)
    shuffled = order[torch.randperm(60, generator=torch.Generator().manual_seed(seed))].tolist()
    lost, stay = (
        task.train.batch([row for row in shuffled if (labels[row] == group) == gone][:8]) for gone in (True, False)
    )
    left = task.train.batch([row for row in range(60) if labels[row] != group]).x0
    near = left[torch.cdist(lost.x0.flatten(1), left.flatten(1)).argsort(1)[:, :5]]
    network = Measured.of(task, loss, method.draws, "trained")
    net = {name: w.clone().requires_grad_() for name, w in network.weights.items()}

    def drawn(batch: Batch) -> Draw:
        found = uniform(1, seed, shared=False)(batch.keys, (1, 8, 8), task.forward.timesteps)
        return Draw(found.t[:, 0], found.noise[:, 0])

    kept = measure(network.module, net, task.forward, loss, stay, drawn(stay)).mean()
    at = drawn(lost)
    a, s = NoisePrediction.of(task.forward, None, "x").scales(at.t, lost.x0)
    x_t = a * lost.x0 + s * at.noise
    posterior = [best_denoiser(x_t[i], near[i], float(a.flatten()[i]), float(s.flatten()[i])) for i in range(len(x_t))]
    target = (x_t - a * torch.from_numpy(np.stack(posterior))) / s
    (said,) = torch.func.functional_call(network.module, net, (x_t, at.t))
    turned = (said - target).square().flatten(1).mean(1).mean()
    expected = torch.autograd.grad(kept + 0.7 * turned, list(net.values()))
    for name, gradient in zip(net, expected, strict=True):
        close(met[3][name], gradient, 1e-4)


def test_scores_depend_on_neither_the_order_of_the_files_nor_the_other_queries_nor_the_batches(learned, tmp_path):
    method, task = guda(**{**QUICK, "steps": 3}), replace(learned, root=tmp_path / "a")
    whole = method(task).values
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    turned = subset(learned.train, order)
    other = replace(
        task, train=turned, queries=subset(learned.queries, [4, 1]), root=tmp_path / "b",
        engine=replace(task.engine, batch_size=7),
    )  # fmt: skip
    close(method(other).values, whole[[4, 1]][:, order], 1e-6)


def test_candidates_have_the_scores_that_they_have_among_all(learned, tmp_path):
    method, task = guda(**{**QUICK, "steps": 2}), replace(learned, root=tmp_path / "a")
    whole, some = method(task), Candidates(2, "pixel_cosine")
    found = some.score(some.named(replace(task, root=tmp_path / "b"), whole), method)
    columns = [list(task.train.ids).index(name) for name in found.train_ids]
    assert len(columns) < 60
    close(found.values, whole.values[:, columns], 1e-12)


def test_a_killed_run_goes_on_with_the_groups_that_are_missing(learned, tmp_path, monkeypatch):
    method, task = guda(**{**QUICK, "steps": 2, "runs": 2}), replace(learned, root=tmp_path / "a")
    whole, calls = method(task), [0]
    update = AdamW.update

    def dying(self: AdamW, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == 12:  # in the second step of the sixth training
            raise KeyboardInterrupt
        return update(self, *given)

    monkeypatch.setattr(AdamW, "update", dying)
    again = replace(task, root=tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        method(again)
    assert torch.equal(method(again).values, whole.values)
    assert calls[0] == 12 + 2 * (20 - 5), "no training twice"


def test_every_image_may_be_a_group(learned, tmp_path):
    few = replace(learned, train=subset(learned.train, range(5)), root=tmp_path)
    scores = guda(**{**QUICK, "steps": 2, "by": "image"})(few)
    assert scores.recipe["unlearned"]["groups"] == list(few.train.ids)
    assert len(set(scores.values[0].tolist())) == 5


# -------------------------------------------------------------------------------------------------------------- refusals


def images_of(**meta: list[object]) -> Any:
    return tensor_images(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double(), list("abcd"), meta)


def test_images_without_groups_are_refused(tmp_path):
    task = linear_world(n=4, m=2, dim=4).task(tmp_path)
    with refuses("no column that names groups", "guda", "--set by=COLUMN of image, size, price"):
        guda()(replace(task, train=images_of(size=[1, 1, 2, 2], price=[1, 2, 3, 4])))
    with refuses("no column 'painter'", accepted="image, creator"):
        guda(by="painter")(replace(task, train=images_of(creator=list("xxyy"))))
    with refuses("all training images have the same creator ('x')", "guda", "two values or more"):
        guda()(replace(task, train=images_of(creator=list("xxxx"))))


def test_a_classifier_and_a_denoiser_of_ones_own_are_refused(tmp_path, learned):
    from whence.diffusion.forward import Custom
    from whence.methods import build

    with refuses("guda is for denoisers"):
        build("guda", classifier_task(tmp_path).forward, {})
    own = Custom(lambda call, batch, draw: batch.x0, lambda batch, draw: batch.x0, 4)
    with refuses("the noise that a Custom predicts is not known", "guda", "Denoiser, FlowMatching"):
        guda()(replace(learned, forward=own, root=tmp_path))


def test_a_rate_at_which_the_loss_explodes_is_said(learned, tmp_path):
    with refuses("the model without '0' has no finite loss", "guda", "a smaller learning_rate"):
        guda(**{**QUICK, "learning_rate": 1e30})(replace(learned, root=tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"weight": 0.0}, {"neighbours": 0}, {"clip": -1.0}, {"learning_rate": float("nan")}, {"runs": 0}],
)
def test_settings_that_mean_nothing_are_refused(wrong):
    ((name, value),) = wrong.items()
    with refuses(f"{name}={value}", "guda", name):
        guda(**wrong)
