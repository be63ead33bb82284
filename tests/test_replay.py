"""Diff-TracIn and Diff-ReTrac: training events are replayed as they were, and the sum is a plain loop's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from errors import refuses
from recipes import recipe_of
from whence.data.images import tensor_images
from whence.diffusion.draws import Draws, Grid, Linspace, uniform
from whence.diffusion.noise import normals, stream
from whence.diffusion.outputs import loss
from whence.evaluation.lds import lds
from whence.features.parts import Gradient
from whence.features.rows import rows
from whence.methods.retrac import diffusion_tracin, retrac
from whence.training import order, step
from whence.training.loop import steps
from whence.training.order import AsTrained, ReplayedDraw, epoch_before, noise_keys
from whence.types import Draw, Task
from worlds import Log, checkpoint, half_masks, linear_world, tensors, unet_task

N, BATCH = 10, 4


@pytest.fixture(scope="module")
def world():
    return linear_world(n=N, m=3, dim=4)


@pytest.fixture
def task(world, tmp_path: Path) -> Task:
    """Three checkpoints of made-up rates at uneven intervals, of a training with batches of 4."""
    points = tuple(
        replace(world.task(tmp_path, batch_size=3).trajectory[0], name=f"checkpoint-{s}", step=s, rate=r, digest=f"{s}")
        for s, r in ((2, 0.3), (6, 0.2), (9, 0.1))
    )
    return replace(world.task(tmp_path), trajectory=points, study=Log(recipe_of(9, BATCH, seed=3)))


@pytest.mark.parametrize("flip", [False, True])
def test_replayed_draws_are_those_that_training_used(tmp_path, monkeypatch, flip):
    """Every call of the trainer for noise, recorded while it runs, against the replay of the same epoch."""
    task = unet_task(tmp_path, n=6)
    training = recipe_of(5, 3, seed=4, flip=flip)
    told, shown = [], []
    real_draw, real_flip = order.draw, order.flipped

    def draw(seeds, keys, epochs, *rest):
        found = real_draw(seeds, keys, epochs, *rest)
        told.extend(
            (int(k), int(e), int(t), eps) for k, e, t, eps in zip(keys, epochs, found.t, found.noise, strict=True)
        )
        return found

    def flipped(training, batch, epochs):
        found = real_flip(training, batch, epochs)
        shown.extend((int(k), int(e), x0) for k, e, x0 in zip(batch.keys, epochs, found.x0, strict=True))
        return found

    monkeypatch.setattr(step, "draw", draw)
    monkeypatch.setattr(order, "flipped", flipped)
    net = task.trajectory[0].load()
    assert len(list(steps(net, task.forward, task.train, training))) == 5
    monkeypatch.undo()
    keys = noise_keys(task.train)
    place = {int(k): row for row, k in enumerate(keys)}
    assert len(told) == 15
    assert {e for _, e, _, _ in told} == {0, 1, 2}
    for key, epoch, t, eps in told:
        found = ReplayedDraw(training.seed, epoch)(keys, task.train.x0.shape[1:], task.forward.timesteps)
        assert found.t.shape == (6, 1)
        assert int(found.t[place[key], 0]) == t
        assert torch.equal(found.noise[place[key], 0], eps)
    for key, epoch, x0 in shown:
        assert torch.equal(AsTrained(task.train, training, epoch).batch([place[key]]).x0[0], x0)
    mirrored = [not torch.equal(x0, task.train.x0[place[key]]) for key, _, x0 in shown]
    assert any(mirrored) == flip


def test_epoch_of_a_checkpoint():
    """The last one that every image had seen: 10 images in batches of 4, epochs end within steps 3, 5 and 8."""
    assert [epoch_before(recipe_of(9, BATCH), N, s) for s in (2, 3, 5, 7, 8)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(("make", "unit"), [(retrac, True), (diffusion_tracin, False)])
def test_scores_are_the_loop(task, make, unit):
    """Written out with autograd: one event per image, the mean over timesteps of (unit) means over noises."""

    def gradient(image, t, eps) -> torch.Tensor:
        net = task.trajectory[0].load().double()
        value = 0.0
        for timestep, noise in zip(t, eps, strict=True):
            prediction, target = task.forward(net, image, Draw(timestep[None], noise[None]))
            value = value + (prediction - target).square().mean() / len(t)
        (g,) = torch.autograd.grad(value, [net.linear.weight])
        return g.flatten() / (g.norm() if unit else 1.0)

    expected, before = torch.zeros(3, N, dtype=torch.float64), 0
    query = []
    for q in range(3):
        image = task.queries.batch([q])
        draw = Draws(Grid(6))(image.keys, image.x0.shape[1:], 6, torch.float64)
        eps = [normals(stream(0, 2 * s + torch.arange(2), image.keys), (4,), torch.float64) for s in range(6)]
        query.append(torch.stack([gradient(image, draw.t[0, [s, s]], eps[s]) for s in range(6)]).mean(0))
    for point in task.trajectory:
        epoch = {2: 0, 6: 1, 9: 2}[point.step]
        train = []
        for i in range(N):
            image = task.train.batch([i])
            event = order.draw([task.study.recipe.seed], image.keys, torch.tensor([epoch]), (4,), 6, torch.float64)
            train.append(gradient(image, event.t, event.noise))
        eta = point.rate * BATCH * (point.step - before) / N
        expected += eta * torch.stack(query) @ torch.stack(train).T
        before = point.step
    found = make(draws=uniform(6, shared=False), dim=None, noises=2)(task)
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-13)
    assert found.recipe["eta"] == pytest.approx([0.3 * 0.8, 0.2 * 1.6, 0.1 * 1.2])


def test_unit_gradients_take_away_the_timestep(tmp_path):
    """Diffusion-TracIn ranks images by the norm of the one gradient they happened to have, ReTrac does not."""
    world = linear_world(n=200, m=10, dim=6)
    task = replace(world.task(tmp_path), study=Log(recipe_of(1, 200)))

    def spread(make) -> float:
        """Correlation over images of the mean size of the score and the norm of the event's gradient."""
        size = make(draws=uniform(6, shared=False), dim=None, noises=2)(task).values.abs().mean(0)
        return float(np.corrcoef(size, norms)[0, 1])

    events = Gradient(loss, ReplayedDraw(task.study.recipe.seed, 0))
    norms = rows(events, task, task.trajectory[0], task.train, "x").all().norm(dim=1).numpy()
    plain, unit = spread(diffusion_tracin), spread(retrac)
    assert plain > 0.7
    assert abs(unit) < 0.5 * plain


def test_many_events_predict_retraining(tmp_path):
    """A checkpoint after each of 40 epochs, at the weights of the end: LDS far above chance, rising with the events."""
    world, masks = linear_world(n=100, m=10, dim=6), half_masks(96, 100)
    base, retrained = world.task(tmp_path), world.retrained(masks)
    net = base.trajectory[0].load

    def value(epochs: int) -> float:
        points = tuple(replace(checkpoint(net, f"checkpoint-{e}", e), digest=f"{e}") for e in range(1, epochs + 1))
        task = replace(base, trajectory=points, study=Log(recipe_of(epochs, 100)))
        return float(np.mean(lds(retrac(draws=uniform(6), dim=None, noises=4)(task).values, masks, retrained)))

    few, many = value(2), value(40)
    assert many > few + 0.05
    assert many > 0.4


def test_linspace_has_both_ends():
    assert Linspace(5)(0, torch.zeros(2, dtype=torch.int64), 1000).tolist() == [[1, 250, 500, 750, 999]] * 2
    with refuses("7 draws do not divide into groups of 2"):
        Draws(Grid(7), group=2)


def test_images_seen_keep_names_and_rows():
    images = tensors(torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0)), "train")
    plain, mirrored = AsTrained(images, recipe_of(1), 0), AsTrained(images, recipe_of(1, flip=True), 0)
    assert list(plain.ids) == list(images.ids)
    assert plain.describe() != mirrored.describe()
    assert mirrored.describe() != AsTrained(images, recipe_of(1, flip=True), 1).describe()
    assert (
        plain.describe()
        == AsTrained(tensor_images(images.x0, ids=list(images.ids)), recipe_of(1, seed=5), 3).describe()
    )
