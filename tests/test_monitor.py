"""MONTRAGE, our reconstruction: what a step did is credited to its images, exactly; its limit; and whom it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from agreement import close
from errors import refuses
from recipes import changed
from whence.data.images import subset, tensor_images
from whence.diffusion.draws import fixed
from whence.features.activations import Layers
from whence.features.gradients import measure
from whence.methods import MontrageStyle
from whence.training.loop import steps
from whence.training.order import draw, noise_keys, slots
from whence.training.study import Study
from whence.types import Task
from worlds import trained_task

DRAWS = fixed(100, 2, shared=False)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return trained_task(tmp_path_factory.mktemp("monitor"))


def studied(task: Task, root: Path, **settings: object) -> Task:
    """The task with another recipe of its study, in a folder of its own."""
    study = task.study
    assert isinstance(study, Study)
    return replace(task, study=Study(changed(study.recipe, **settings)), root=root)


def moved(task: Task, method: MontrageStyle) -> Tensor:
    """r_q after training, less before [m, k], worked out here."""
    study = task.study
    assert study is not None
    network, look = study.network_at(study.recipe.seed).double(), Layers(method.layers, method.draws)
    batch = task.queries.batch(range(len(task.queries)))
    batch = replace(batch, x0=batch.x0.double())
    run = steps(study.network_at(study.recipe.seed), study.forward(), task.train, study.recipe, engine=task.engine)
    (end, _) = list(run)[-1]
    with torch.no_grad():
        first = look(network, task.forward, batch)
        network.load_state_dict(end.weights, strict=False)
        return look(network, task.forward, batch) - first


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_row_adds_up_to_how_far_the_representation_was_moved(task, tmp_path, every):
    method = MontrageStyle(draws=DRAWS, every=every)
    scores = method(replace(task, root=tmp_path))
    close(scores.values.sum(1), moved(task, method).norm(dim=1), 1e-10)


def test_what_a_step_did_is_shared_by_its_images_alone(task, tmp_path):
    """One step of 8 of 12 images: an eighth each, and nothing for those that were not in it."""
    short, method = studied(task, tmp_path, steps=1), MontrageStyle(draws=DRAWS)
    assert short.study is not None
    scores = method(short).values
    there = slots(short.study.recipe, noise_keys(task.train), 0).rows.tolist()
    share = moved(short, method).norm(dim=1) / 8
    expected = torch.zeros_like(scores)
    expected[:, there] = share[:, None].expand(-1, 8)
    close(scores, expected, 1e-10)


def test_at_small_rates_it_is_the_product_of_gradients(task, tmp_path):
    """rate <grad <r_q, d_q>, -grad l_i> of steps on one image each, by SGD: to 1e-6."""
    rate = 1e-7
    plain = studied(task, tmp_path, steps=5, batch_size=1, momentum=0.0, learning_rate=rate, ema=0.0)
    assert plain.study is not None
    method, study = MontrageStyle(draws=DRAWS), plain.study
    scores = method(plain).values
    way = moved(plain, method)
    way = way / way.norm(dim=1, keepdim=True)
    network = study.network_at(study.recipe.seed).double()
    weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
    look, batch = Layers("", DRAWS), task.queries.batch(range(len(task.queries)))
    along = (look(network, task.forward, replace(batch, x0=batch.x0.double())) * way).sum(1)
    up = [torch.autograd.grad(value, list(weights.values()), retain_graph=True, allow_unused=True) for value in along]
    keys, expected = noise_keys(task.train), torch.zeros_like(scores)
    for step in range(5):
        slot = slots(study.recipe, keys, step)
        image = task.train.batch(slot.rows.tolist())
        image = replace(image, x0=image.x0.double())
        at = draw(
            [study.recipe.seed], image.keys, slot.epochs, image.x0.shape[1:], task.forward.timesteps, torch.float64
        )
        value = measure(network, weights, task.forward, study.recipe.loss, image, at).mean()
        down, here = torch.autograd.grad(value, list(weights.values())), study.recipe.rate_at(step)
        for q, ups in enumerate(up):
            pairs = zip(ups, down, strict=True)
            expected[q, slot.rows] += -here * sum(float((u * g).sum()) for u, g in pairs if u is not None)
    close(scores, expected, 1e-6)


def test_queries_have_the_scores_that_they_have_alone(task, tmp_path):
    method = MontrageStyle(draws=DRAWS)
    whole = method(replace(task, root=tmp_path / "a")).values
    one = method(replace(task, queries=subset(task.queries, [1]), root=tmp_path / "b")).values
    close(one, whole[1:], 1e-12)
    again = method(replace(task, root=tmp_path / "a")).values
    assert torch.equal(again, whole)


def test_what_cannot_be_watched_is_refused(task, tmp_path):
    with refuses("every is 0", "montrage_style"):
        MontrageStyle(every=0)
    with refuses("match no whole module name"):
        MontrageStyle(layers="nothing")(replace(task, root=tmp_path))
    with refuses("it is not known how this one was trained"):
        MontrageStyle()(replace(task, study=None, root=tmp_path))
    some = tensor_images(task.train.batch([0]).x0, ["some"])
    with refuses("takes all training images together"):
        MontrageStyle()(replace(task, scored=some, root=tmp_path))
