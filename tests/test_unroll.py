"""Derivatives through training: against differences of true trainings, plain autograd, and each other."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap

import games
import worlds
from errors import refuses
from recipes import changed, pixel_study, recipe_of
from whence.data.images import tensor_images
from whence.diffusion.draws import once, stratified, uniform
from whence.diffusion.forward import Classifier
from whence.diffusion.noise import stream
from whence.diffusion.outputs import cross_entropy, loss, squared_norm
from whence.features.gradients import measure
from whence.methods import metagradient as unrolled
from whence.methods.metagradient import AveragedMetagradient, Metagradient
from whence.training import unroll
from whence.training.loop import steps
from whence.training.optimizer import State, vector
from whence.training.order import augment, noise_keys, slots
from whence.training.recipe import update
from whence.training.unroll import (
    CURVATURES,
    KEEP,
    Differentiation,
    Queries,
    Resample,
    Run,
    Trainer,
    final_weights,
    finite_difference,
    metagradient,
    sketched,
    smoothness,
    tangent,
)
from whence.training.unroll.measured import slopes_at_the_end, values
from whence.training.unroll.memory import plan_of
from whence.training.unroll.resample import Points
from whence.training.unroll.run import pulled, twin
from whence.training.unroll.slopes import Adjoint, StepSlopes, Tangent, views
from whence.training.unroll.states import Kept, fan_of, final_state, held, replayed
from whence.types import Draw, Engine, Task

N, M = 24, 3
FP64 = Engine(dtype=torch.float64)
RECIPE = recipe_of(
    steps=9,
    batch_size=8,
    learning_rate=3e-3,
    warmup_steps=5,
    beta1=0.9,
    eps_root=1e-8,
    weight_decay=1e-2,
    max_grad_norm=0.0,
    ema=0.9,
    seed=3,
)
MLP = {"_class_name": "MLPDenoiser", "sample_size": 4, "in_channels": 1, "width": 8, "layers": 1}
VARIANTS = {
    "averaged": RECIPE,
    "clipped": changed(RECIPE, max_grad_norm=0.3, flip=True),
    "plain": changed(RECIPE, ema=0.0, kind="constant", max_grad_norm=1.0, batch_size=7),
    "sgd": changed(RECIPE, learning_rate=0.05, momentum=0.8, max_grad_norm=0.3),
}


def pictures(count=N + M, seed=1, side=4):
    """Rings and bars with a little noise, so that pictures resemble each other more or less."""
    g = torch.Generator().manual_seed(seed)
    kinds = torch.where(torch.rand(5, 1, side, side, generator=g) < 0.5, -0.8, 0.8)
    return kinds[torch.arange(count) % 5] + 0.3 * torch.randn(count, 1, side, side, generator=g)


IMAGES, QUERIES = worlds.tensors(pictures()[:N], "train"), worlds.tensors(pictures()[N:], "query")
KEYS = noise_keys(IMAGES)
ASKED = Queries(QUERIES, loss, stratified(6))
HALF = (torch.arange(N) % 2).float()


def run(training=RECIPE, weights=None, engine=FP64, network=MLP):
    return Run.of(pixel_study(network, training), IMAGES, weights=weights, engine=engine)


def close(a, b, tolerance):
    """Equal up to a fraction of the largest entry."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


# ------------------------------------------------------------------------------------------------------------- one step


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_its_steps_are_those_of_the_trainer_to_the_bit(name, dtype):
    """Where the images are all there and where half of them are, in turn."""
    weights = HALF if ([*VARIANTS].index(name) % 2 == 0) == (dtype == torch.float64) else None
    this = run(changed(VARIANTS[name], steps=9), weights, Engine(dtype=dtype))
    trainer = Trainer(this)
    state = trainer.first()
    truth = steps(this.module, this.forward, IMAGES, this.recipe, weights, engine=this.engine)
    for expected, _ in truth:
        feed = trainer.feed(state.step)
        pure = trainer.step(state, trainer.scale(feed), feed)
        state = trainer.after(state)
        assert state.step == expected.step
        for part in ("weights", "m", "v", "ema"):
            for key, value in getattr(expected, part).items():
                assert torch.equal(getattr(state, part)[key], value)
                if dtype == torch.float64:
                    torch.testing.assert_close(getattr(pure, part)[key], value, rtol=0, atol=1e-12)


def test_the_derivative_of_the_update_by_hand_is_that_of_autograd():
    g = torch.Generator().manual_seed(0)
    for training in [*VARIANTS.values(), changed(RECIPE, max_grad_norm=1e-3, ema=0.999)]:

        def like(positive=False):
            parts = {"a": torch.randn(3, 4, generator=g).double(), "b": torch.randn(5, generator=g).double()}
            return {name: part.square() if positive else part for name, part in parts.items()}

        point = (like(), like(), like(positive=True), like(), like())
        change = tuple(like() for _ in point)

        def after(weights, m, v, ema, grads, training=training):
            state = update(training, State(weights, m, v, ema, 4), grads)
            return state.weights, state.m, state.v, state.ema

        slopes = StepSlopes.of(training, State(*point[:4], 4), point[4])
        flat = [vector(part)[None].clone() for part in change]
        _, expected = jvp(after, point, change)
        pushed = slopes.push(Tangent(*flat[:4]), flat[4])
        for part, truth in zip((pushed.theta, pushed.m, pushed.v, pushed.ema), expected, strict=True):
            close(part[0], vector(truth), 1e-12)

        theta, m, v, final = (like() for _ in range(4))  # any adjoint, not only one after the last step
        zeros = {name: torch.zeros_like(value) for name, value in final.items()}
        truth = vjp(after, *point)[1]((theta, m, v, zeros if not training.ema else final))
        adjoint = Adjoint(*(vector(part)[None] for part in (theta, m, v, final)))
        p = slopes.pull(adjoint)
        ema = adjoint.share * adjoint.final if training.ema else 0 * adjoint.final
        for part, expected_part in zip((adjoint.theta, adjoint.m, adjoint.v, ema, p), truth, strict=True):
            close(part[0], vector(expected_part), 1e-12)


def test_a_parameter_without_gradients_has_no_slope_even_without_eps_root():
    training, zeros = changed(RECIPE, eps_root=0.0), {"a": torch.zeros(2)}
    slopes = StepSlopes.of(training, State(zeros, zeros, zeros, zeros), zeros)
    assert torch.equal(slopes.own.by_v, torch.zeros(2))


# --------------------------------------------------------------------------------------------------- against the truth


def together(this, weights):
    """The final averaged weights of trainings that differ in the weights [S, n] of their images."""
    trainer = Trainer(this)
    first, count = trainer.first(), len(weights)
    parts = [{k: w.expand(count, *w.shape) for k, w in p.items()} for p in (first.weights, first.m, first.v, first.ema)]
    for number in range(this.recipe.steps):
        feed = trainer.feed(number)

        def advance(w, m, v, ema, scale, number=number, feed=feed):
            after = trainer.step(State(w, m, v, ema, number), scale, feed)
            return after.weights, after.m, after.v, after.ema

        parts = vmap(advance)(*parts, weights[:, feed.rows] / trainer.constant)
    return parts[3]


@pytest.mark.parametrize(
    ("name", "weights"), [("averaged", None), ("clipped", None), ("plain", None), ("clipped", HALF)]
)
def test_metagradients_are_central_differences_of_trainings(name, weights):
    this = run(VARIANTS[name], weights)
    found = metagradient(this, ASKED)
    assert found.shape == (M, N)
    assert (found != 0).all()  # images of weight 0 have a slope as well
    rows, h = torch.arange(20), 1e-5
    ends = together(this, torch.cat([this.all_weights + sign * h * torch.eye(N).double()[rows] for sign in (1, -1)]))
    f = torch.stack([values(Trainer(this), ASKED, {k: w[i] for k, w in ends.items()}) for i in range(40)])
    close(found[:, rows], (f[:20] - f[20:]).T / (2 * h), 1e-5)
    way = torch.randn(1, N, generator=torch.Generator().manual_seed(7))
    close(found @ way.T.double(), finite_difference(this, ASKED, way), 1e-5)


def gradient_of(trainer, curvature, weights, feed, scale):
    """g, differentiable: with "gauss-newton" that of the network made linear in its weights where it stands, with "none" in
    `scale` alone."""
    if curvature == "hessian":
        value = measure(trainer.module, weights, trainer.run.forward, loss, feed.batch, feed.at) @ scale
        return torch.autograd.grad(value, list(weights.values()), create_graph=True)

    if curvature == "none":
        here = {name: w.detach() for name, w in weights.items()}
        each = partial(
            measure, trainer.module, forward=trainer.run.forward, output=loss, batch=feed.batch, draw=feed.at
        )
        return vjp(lambda w: each(weights=w), here)[1](scale)[0].values()

    def predict(w):
        call = partial(functional_call, trainer.module, w)
        return trainer.run.forward(lambda *given, **more: call(given, more), feed.batch, feed.at)[0]

    here = {name: w.detach() for name, w in weights.items()}
    moved = {name: w - here[name] for name, w in weights.items()}
    prediction = predict(here) + jvp(predict, (here,), (moved,))[1]
    target = trainer.run.forward(trainer.module, feed.batch, feed.at)[1]
    error = 2 * (prediction - target) * scale[:, None, None, None] / prediction[0].numel()
    return vjp(predict, here)[1](error)[0].values()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_metagradients_are_plain_autograd_through_all_steps(curvature):
    short = changed(VARIANTS["clipped"], steps=4, batch_size=16)
    this = run(short, HALF)
    trainer = Trainer(this)
    weights = HALF.double().requires_grad_()
    leaf = {name: w.requires_grad_() for name, w in trainer.first().weights.items()}
    zeros = {name: torch.zeros_like(w) for name, w in leaf.items()}
    state = State(leaf, zeros, zeros, leaf)
    for step in range(short.steps):
        feed = trainer.feed(step)
        scale = weights[feed.rows] / trainer.constant
        grads = gradient_of(trainer, curvature, state.weights, feed, scale)
        state = update(short, state, dict(zip(state.weights, grads, strict=True)))
    probes = [
        torch.randn(w.shape, generator=torch.Generator().manual_seed(i)).double() for i, w in enumerate(leaf.values())
    ]

    def measured(w):
        return torch.stack(
            [sum((a * b).sum() for a, b in zip(w.values(), probes, strict=True)), w["out.bias"].exp().sum()]
        )

    truth = [torch.autograd.grad(f, weights, retain_graph=True)[0] for f in measured(state.ema)]
    close(metagradient(this, measured, Differentiation(curvature)), torch.stack(truth), 1e-10)


def test_without_curvature_they_are_tracin_along_the_steps():
    """SGD without momentum or decay: - sum_t rate_t / (B c) <grad f(theta_T), grad l_i(theta_t)>."""
    plain = changed(RECIPE, momentum=0.0, learning_rate=0.05, weight_decay=0.0, ema=0.0)
    this = run(plain)
    trainer, truth = Trainer(this), torch.zeros(M, N).double()
    at_the_end = slopes_at_the_end(trainer, ASKED, final_weights(this), range(M))
    state = trainer.first()
    for step in range(plain.steps):
        feed = trainer.feed(step)
        gradients = torch.cat([rows for _, rows in trainer.each(state, feed)])
        truth.index_add_(1, feed.rows, -plain.rate_at(step) / trainer.constant * at_the_end @ gradients.T)
        state = trainer.after(state)
    close(metagradient(this, ASKED, Differentiation("none")), truth, 1e-10)


PLAIN, GAUSS_NEWTON, RESAMPLED = (
    *(Differentiation(), Differentiation("gauss-newton")),
    Differentiation(resample=Resample(5, 3, 2)),
)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("averaged", PLAIN), ("averaged", RESAMPLED), ("clipped", PLAIN), ("clipped", GAUSS_NEWTON)),
        *(("plain", RESAMPLED), ("sgd", GAUSS_NEWTON)),
    ],
)
def test_forward_mode_is_reverse_mode(name, how):
    this = run(VARIANTS[name], HALF)
    ways = torch.randn(2, N, generator=torch.Generator().manual_seed(5)).double()
    final, moved = tangent(this, ways, how)
    expected = final_weights(this)
    for key, value in expected.items():
        torch.testing.assert_close(final[key], value, rtol=0, atol=1e-12)
    slopes = slopes_at_the_end(Trainer(this), ASKED, final, range(M))
    through = slopes @ torch.cat([moved[k].flatten(1) for k in final], dim=1).T
    close(through, metagradient(this, ASKED, how) @ ways.T, 1e-10)
    one = tangent(this, ways[1], how)[1]
    for key in final:
        close(one[key], moved[key][1], 1e-10)


def test_sums_of_outputs_share_replays():
    """Five outputs made of two: exact from two replays, and not from one."""
    this = run(changed(VARIANTS["clipped"], steps=6), HALF)
    parts = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -1], [0, 3]]).double()

    def measured(w):
        return parts @ torch.stack([w["out.bias"].exp().sum(), w["into.weight"].square().sum()])

    truth = metagradient(this, measured)
    close(metagradient(this, measured, mix=parts.T), parts.T @ truth, 1e-10)
    for how in (Differentiation(), Differentiation("gauss-newton", Resample(5, 4, 3))):
        close(sketched(this, measured, 2, how), metagradient(this, measured, how), 1e-8)
    close(sketched(this, ASKED, M), metagradient(this, ASKED), 1e-12)
    one = sketched(this, measured, 1)
    assert 0.01 * truth.norm() < (one - truth).norm() < truth.norm()
    assert torch.linalg.matrix_rank(one, rtol=1e-10) == 1
    with refuses("rank=0; at least 1"):
        sketched(this, ASKED, 0)


def test_a_unet_with_attention_and_group_norm():
    images = worlds.tensors(torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1, "train")
    training = changed(RECIPE, steps=3, batch_size=4, warmup_steps=0)
    forward = worlds.unet_task(None).forward
    this = Run(worlds.unet(), forward, images, training, engine=FP64)
    asked = Queries(images, loss, uniform(4))
    found = metagradient(this, asked)
    way = torch.randn(1, 6, generator=torch.Generator().manual_seed(2))
    close(found @ way.T.double(), finite_difference(this, asked, way), 1e-5)
    final, moved = tangent(this, way[0])
    slopes = slopes_at_the_end(Trainer(this), asked, final, range(6))
    close(slopes @ vector(moved), found @ way[0].double(), 1e-10)


# ------------------------------------------------------------------------------------------------- ways of computing it


def test_what_is_kept_changes_nothing(tmp_path):
    this = run()
    truth = metagradient(this, ASKED, Differentiation(keep="all"))
    for keep in ("sqrt", "tree"):
        assert torch.equal(metagradient(this, ASKED, Differentiation(keep=keep)), truth)
    state = 3 * 8 * sum(p.numel() for p in this.module.parameters())
    small = run(engine=replace(FP64, budget=7 * state))
    with refuses("keep='all' holds", accepted="keep='sqrt' ...keep='tree'...spill"):
        metagradient(small, ASKED, Differentiation(keep="all"))
    close(metagradient(small, ASKED, Differentiation(keep="all", spill=tmp_path)), truth, 1e-12)
    assert not list(tmp_path.iterdir())
    with refuses(accepted="all, sqrt, tree"):
        metagradient(this, ASKED, Differentiation(keep="some"))


@pytest.mark.parametrize("total", [1, 2, 3, 10, 37])
@pytest.mark.parametrize("keep", KEEP)
def test_going_back_visits_every_state_once(total, keep):
    class Counting:
        recipe = changed(RECIPE, steps=total)
        most = computed = 0

        def first(self):
            return State({}, {}, {}, {})

        def after(self, state, average=True):
            self.computed += 1
            return replace(state, step=state.step + 1)

    trainer, fan, kept = Counting(), fan_of(keep, total), Kept(10**9, None)
    final = final_state(trainer, kept, fan, "counting")
    for _ in range(2):  # as often as one likes
        seen = []
        for state in replayed(trainer, kept, fan, final):
            seen.append(state.step)
            trainer.most = max(trainer.most, len(kept.held))
        assert seen == list(range(total))[::-1]
    assert trainer.most <= held(total, fan)
    if keep != "tree":
        assert trainer.computed <= 3 * total


def test_queries_do_not_depend_on_their_company():
    this = run(changed(VARIANTS["clipped"], steps=20), HALF)
    truth = metagradient(this, ASKED)
    for row in range(M):
        alone = Queries(worlds.tensors(QUERIES.x0[row : row + 1], "q"), ASKED.output, ASKED.draws)
        close(metagradient(this, alone)[0], truth[row], 1e-10)
    tight = replace(this, engine=replace(FP64, budget=340_000))
    plan = plan_of(Trainer(tight), Differentiation(keep="tree"))
    assert (plan.at_once, plan.queries) == (1, 2)
    close(metagradient(tight, ASKED, Differentiation(keep="tree")), truth, 1e-10)


@pytest.mark.parametrize("budget", [2**28, 40_000])
def test_many_queries_share_the_gradients_of_absent_images(monkeypatch, budget):
    """Formed image by image, where few queries pull through the losses instead."""
    this = replace(run(VARIANTS["clipped"], HALF), engine=replace(FP64, budget=2**28))
    truth = metagradient(this, ASKED)
    trainer = Trainer(this)
    feed = trainer.feed(0).only(~trainer.present(trainer.feed(0)))
    trainer.run = replace(this, engine=replace(FP64, budget=budget))
    pieces = [rows for rows, _ in trainer.each(trainer.first(), feed)]
    assert (len(pieces) > 1) == (budget < 10**6)
    monkeypatch.setattr(unroll.reverse, "FEW", 0)
    monkeypatch.setattr(unroll.slopes, "STRIP", 100)
    monkeypatch.setattr(Trainer, "linearized_scales", None)
    close(metagradient(this, ASKED), truth, 1e-10)


@pytest.mark.parametrize(
    ("resample", "small"),
    [(Resample(5, 3, 2), 1), (Resample(N + 4, 6, 4), 1), (Resample(5, 1, 1), 2048), (Resample(5, 3, 2), 2048)],
)
def test_fresh_slopes_are_means_over_draws_along_the_same_path(monkeypatch, resample, small):
    monkeypatch.setattr(unroll.resample, "SMALL", small)
    this = run(VARIANTS["clipped"], HALF)
    found = metagradient(this, ASKED, Differentiation(resample=resample))
    close(found, _by_hand(this, resample), 1e-10)
    truth = metagradient(this, ASKED)
    assert (found - truth).abs().max() > 0.1 * truth.abs().max()


def _by_hand(this, resample):
    """What each image moves, by forward mode: (images c) dg = the sum over its places at the last point of grad f."""
    trainer, points = Trainer(this), Points(Trainer(this), resample)
    slopes = slopes_at_the_end(trainer, ASKED, final_weights(this), range(M))
    state, zeros = trainer.first(), torch.zeros(N, slopes.shape[1], dtype=torch.float64)
    moved = Tangent(zeros, zeros, zeros, zeros)
    for step in range(this.recipe.steps):
        feed = trainer.feed(step).only(trainer.present(trainer.feed(step)))
        grads, pull = trainer.linearized(state, feed)
        no_losses = torch.zeros(N, len(feed.rows)).double()
        ((_, curved, _),) = pulled(pull, views(moved.theta, grads), no_losses, N)
        dg = torch.cat([value.flatten(1) for value in curved.values()], dim=1)
        if step % resample.every == 0:
            own, number = zeros.clone(), step // resample.every
            taken = slots(points.recipe, KEYS, number)
            for i, epoch in zip(taken.rows.tolist(), taken.epochs.tolist(), strict=True):
                own[i] += _slope(trainer, state, i, epoch, points) / (resample.images * this.c)
        moved = StepSlopes.of(this.recipe, state, grads).push(moved, dg + own)
        state = update(this.recipe, state, grads)
    return slopes @ moved.ema.T


def _slope(trainer, state, i, epoch, points):
    """grad of the mean loss of one image over its draws, one after the other."""
    key = stream(points.recipe.seed, torch.tensor([epoch]), KEYS[[i]])
    at = points.draws(key, (1, 4, 4), trainer.run.forward.timesteps, torch.float64)
    batch = augment(points.recipe, IMAGES, trainer.read(torch.tensor([i])), torch.tensor([epoch]))
    total = 0
    for s in range(points.draws.count):
        leaves = {name: w.detach().clone().requires_grad_() for name, w in state.weights.items()}
        value = measure(trainer.module, leaves, trainer.run.forward, loss, batch, Draw(at.t[:, s], at.noise[:, s]))
        grads = torch.autograd.grad(value.sum(), list(leaves.values()), materialize_grads=True)
        total = total + torch.cat([g.flatten() for g in grads])
    return total / points.draws.count


def test_where_no_noise_is_drawn_and_every_step_takes_all_images_fresh_slopes_are_those_of_the_slots():
    """A classifier in full batches: the units, and the derivative itself."""
    training = changed(RECIPE, steps=6, batch_size=12, warmup_steps=0, output=cross_entropy)
    weights = (torch.arange(12) % 2).float()
    this = Run(worlds.ConvClassifier(), Classifier(), worlds.labelled(12, "train"), training, weights, engine=FP64)
    asked = Queries(worlds.labelled(3, "query", seed=1), cross_entropy, once())
    close(metagradient(this, asked, Differentiation(resample=Resample(12, 1, 2))), metagradient(this, asked), 1e-10)


def test_points_take_every_image_equally_often_and_only_those_that_are_wanted():
    this = run(weights=HALF)
    points = Points(Trainer(this), Resample(6, 2, 2))
    states = [replace(Trainer(this).first(), step=step) for step in range(0, 8)]
    there = [state for state in states if points.begins(state)]
    assert [state.step for state in there] == [0, 2, 4, 6]
    taken = [torch.cat([rows for rows, _ in points.each(state)]) for state in there]
    assert torch.equal(torch.cat(taken).sort().values, torch.arange(N))
    wanted = torch.arange(N) == taken[1][2]
    ((rows, alone),) = points.each(there[1], wanted)
    assert rows.tolist() == [int(taken[1][2])]
    close(alone[0], torch.cat([g for _, g in points.each(there[1])])[2], 1e-12)
    assert not list(points.each(there[0], wanted))
    for field in ("images", "every", "draws"):
        with refuses(f"{field} is 0", accepted="at least 1"):
            replace(Resample(1), **{field: 0})


def test_a_twin_shares_what_is_not_trained():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    net[0].requires_grad_(False)
    other = twin(net)
    assert other[0].weight is net[0].weight
    assert not other.training
    assert net.training
    kept = net[1].weight.clone()
    other.load_state_dict({"1.weight": torch.zeros(2, 2)}, strict=False)
    assert torch.equal(net[1].weight, kept)


def test_float32_is_close_to_float64():
    close(metagradient(run(engine=Engine()), ASKED), metagradient(run(), ASKED), 1e-3)


# ----------------------------------------------------------------------------------------------------- what it is good for


def test_removing_the_best_image_hurts_and_leave_one_out_is_predicted():
    this = run(changed(RECIPE, steps=60, batch_size=24, learning_rate=2e-3, eps_root=1e-4, max_grad_norm=0.5))
    gradient = metagradient(this, ASKED)
    ends = together(this, torch.cat([torch.ones(1, N), 1 - torch.eye(N)]).double())
    f = torch.stack([values(Trainer(this), ASKED, {k: w[i] for k, w in ends.items()}) for i in range(N + 1)])
    truth = (f[1:] - f[0]).T
    for q in range(M):
        assert torch.corrcoef(torch.stack([-gradient[q], truth[q]]))[0, 1] > 0.95
        assert truth[q, (-gradient[q]).argmax()] > 0


def test_the_gate_tells_smooth_from_rough_training():
    smooth = smoothness(run(changed(RECIPE, steps=60), engine=Engine()))
    assert smooth.enough
    assert smooth.score > 0.8
    rough = smoothness(
        run(changed(RECIPE, steps=60, learning_rate=0.5, warmup_steps=0, ema=0.0, eps_root=0.0), engine=Engine())
    )
    assert not rough.enough
    assert rough.score < 0.5
    assert "larger batches (now 8)" in rough.text
    assert "eps_root is 0" in rough.text


# --------------------------------------------------------------------------------------------------------------- methods


STUDY = pixel_study(MLP, changed(RECIPE, steps=6))


def task(root, study=STUDY, **changes):
    """A task for the model that the study trains; contributors own every third image."""
    net = study.network_at(study.recipe.seed).double()
    final = final_weights(Run.of(study, IMAGES, engine=FP64))
    net.load_state_dict(final, strict=False)
    labels = torch.arange(N) % 3
    owned = tensor_images(IMAGES.x0, list(IMAGES.ids), {"owner": [f"owner-{i}" for i in labels.tolist()]})
    made = Task(study.forward(), (worlds.checkpoint(lambda: net, "final"),), owned, QUERIES, root, FP64, study=study)
    return replace(made, **changes)


def centred(slopes, present=None):
    """Less their mean over the images of the training."""
    present = torch.ones(N) if present is None else present
    return slopes - slopes[:, present > 0].mean(1, keepdim=True)


def test_the_metagradient_method_predicts_the_rise_of_the_loss_and_needs_the_model_of_its_study(tmp_path):
    method, question = Metagradient(draws=ASKED.draws), task(tmp_path)
    scores = method(question)
    assert scores.scale == "removal"
    close(scores.values, -centred(metagradient(Run.of(STUDY, IMAGES, engine=FP64), ASKED)), 1e-12)
    grouped = method.estimate(question, "owner")
    close(torch.from_numpy(grouped.values), scores.group_by("owner").values, 1e-12)
    assert np.isnan(grouped.stderr).all()
    with refuses("replayed to step 6"):
        method(replace(question, study=pixel_study(MLP, changed(STUDY.recipe, learning_rate=1e-2))))
    with refuses("says nothing about better"):
        replace(method, output=squared_norm)(question)
    with refuses("not known how this one was trained", accepted="a folder of `whence train`"):
        method(replace(question, study=None))
    rough = pixel_study(MLP, changed(STUDY.recipe, learning_rate=10.0, ema=0.0))
    with refuses("metasmoothness ... below 0.9"):
        replace(method, min_smoothness=0.9)(task(tmp_path, rough))


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_is_taken_out_of_a_training_that_divides_by_what_is_left(tmp_path, name):
    """As a ledger's do: the scores are central differences of trainings whose constant goes with the weights."""
    study = pixel_study(MLP, changed(VARIANTS[name], steps=6))
    scores, trained, h = (
        Metagradient(draws=ASKED.draws)(task(tmp_path, study)),
        Run.of(study, IMAGES, engine=FP64),
        1e-4,
    )

    def losses(weights):
        trainer = Trainer(trained)
        return values(trainer, ASKED, final_weights(replace(trained, weights=weights)))

    for image in (0, 5):
        way = h * torch.eye(N, dtype=torch.float64)[image]
        rise = (losses(1 - way) - losses(1 + way)) / (2 * h)
        close(scores.values[:, image], rise, 1e-5)


def test_averages_are_means_over_subsets_with_the_error_of_their_spread(tmp_path):
    method, question = AveragedMetagradient(masks=4, draws=ASKED.draws), task(tmp_path)
    found = method.estimate(question)
    groups = method.jobs(KEYS)
    how = Differentiation("gauss-newton", Resample(N))
    each = []
    for job in [job for group in groups for job in group]:
        trained, asked = Run.of(STUDY, IMAGES, job.seed, job.mask, FP64), replace(ASKED, draws=job.draws)
        each.append(-centred(metagradient(trained, asked, how), job.mask))
    each = torch.stack(each)
    pairs = each.unflatten(0, (2, 2)).mean(1)
    close(torch.from_numpy(found.values), each.mean(0), 1e-12)
    close(torch.from_numpy(found.stderr), pairs.std(0) / 2**0.5, 1e-10)
    assert found.runs == 4
    assert torch.equal(method(question).values, torch.from_numpy(found.values))
    owners = method.estimate(question, "owner")
    summed = torch.stack([pairs[:, :, i::3].sum(2) for i in range(3)], dim=2)
    close(torch.from_numpy(owners.values), summed.mean(0), 1e-12)
    close(torch.from_numpy(owners.stderr), summed.std(0) / 2**0.5, 1e-10)


def test_groups_of_trainings_measure_at_draws_of_their_own():
    """So that their differences hold what other draws would change; the first group's are those that were asked for."""
    method = AveragedMetagradient(masks=6, draws=ASKED.draws)
    of_groups = [{job.draws for job in group} for group in method.jobs(KEYS)]
    assert [len(draws) for draws in of_groups] == [1, 1, 1]
    assert of_groups[0] == {ASKED.draws}
    seeds = {draws.pop().seed for draws in of_groups}
    assert len(seeds) == 3
    another = replace(method, draws=replace(ASKED.draws, seed=ASKED.draws.seed + 1))
    assert not seeds & {job.draws.seed for group in another.jobs(KEYS) for job in group}
    assert {job.draws for group in replace(method, redraw=False).jobs(KEYS) for job in group} == {ASKED.draws}


def test_an_interrupted_average_goes_on_with_the_next_training(tmp_path, monkeypatch):
    method, asked = AveragedMetagradient(masks=4, draws=ASKED.draws), []
    truth = method(task(tmp_path / "whole")).values

    def failing(run, *rest, **more):
        asked.append(run.recipe.seed)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return metagradient(run, *rest, **more)

    monkeypatch.setattr(unrolled, "metagradient", failing)
    with pytest.raises(KeyboardInterrupt):
        method(task(tmp_path / "parts"))
    assert torch.equal(method(task(tmp_path / "parts")).values, truth)
    assert asked == [7000, 7001, 7002, 7002, 7003]
    assert replace(method, masks=6).finished(task(tmp_path / "parts")) == 4
    replace(method, masks=2)(task(tmp_path / "parts"))  # fewer masks are the first of more
    assert len(asked) == 5
    replace(method, masks=2)(task(tmp_path / "parts", queries=worlds.tensors(QUERIES.x0[:1], "q")))
    assert len(asked) == 7


def test_masks_are_halves_and_complements():
    method = AveragedMetagradient(masks=6, seeds=2)
    groups = method.jobs(KEYS)
    assert [len(group) for group in groups] == [4, 4, 4]
    for first, second, third, fourth in groups:
        assert first.mask.sum() == N / 2
        assert torch.equal(first.mask, second.mask)
        assert torch.equal(third.mask, fourth.mask)
        assert torch.equal(first.mask + third.mask, torch.ones(N))
    assert len({job.seed for group in groups for job in group}) == 12
    assert torch.equal(method.subset(KEYS, 3), replace(method, masks=10).subset(KEYS, 3))
    assert replace(method, fraction=0.25, pairs=False).subset(KEYS, 3).sum() == N / 4
    for wrong in ({"masks": 3}, {"fraction": 0.25}, {"masks": 0}, {"fraction": 1.0}):
        with refuses("averaged metagradient"):
            replace(method, **wrong)


def test_complements_give_the_banzhaf_value_of_a_pairwise_game_and_all_images_leave_one_out():
    game = games.pairwise(N)

    def slope(mask):  # of the multilinear extension, also for players that are out
        return torch.from_numpy(game.b + game.Q @ mask.double().numpy())

    method = AveragedMetagradient(masks=2)
    pair = torch.stack([slope(job.mask) for group in method.jobs(KEYS) for job in group])
    close(pair.mean(0), torch.from_numpy(game.shapley), 1e-12)
    close(slope(torch.ones(N)), torch.from_numpy(game.leave_one_out), 1e-12)


# -------------------------------------------------------------------------------------------------------------- refusals


class Forgetful(worlds.TensorImages):
    """Images that are never read twice the same."""

    def batch(self, rows):
        found = super().batch(rows)
        return replace(found, x0=found.x0 + 0.1 * torch.randn_like(found.x0))


def test_refusals():
    with refuses("dropout"):
        metagradient(replace(run(), module=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))), ASKED)
    with refuses("batch normalisation"):
        metagradient(replace(run(), module=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))), ASKED)

    class Lion:
        learning_rate = 1e-3

    with refuses("no derivative of a Lion", accepted="AdamW, SGD"):
        metagradient(replace(run(), recipe=replace(RECIPE, optimizer=Lion())), ASKED)
    with refuses("24 images need as many weights"):
        metagradient(run(weights=torch.ones(3)), ASKED)
    with refuses("unit draws"):
        metagradient(run(), Queries(QUERIES, loss, uniform(4, unit=True)))
    with refuses("shape [n] or [K, n]"):
        tangent(run(), torch.ones(3))
    many = changed(RECIPE, steps=20, batch_size=64)
    told = "a step of 64 images and the adjoint of one query take"
    with refuses(told, accepted="--budget_mb 1,") as error:
        metagradient(run(many, engine=replace(FP64, budget=330_000)), ASKED, Differentiation(keep="tree"))
    least = float(re.search(r"a budget of ([\d.]+) MB", error.value.accepted)[1]) * 2**20
    metagradient(run(many, engine=replace(FP64, budget=int(1.01 * least))), ASKED, Differentiation(keep="tree"))
    with refuses(told):
        metagradient(run(many, engine=replace(FP64, budget=int(0.98 * least))), ASKED, Differentiation(keep="tree"))
    other = final_weights(run(changed(RECIPE, seed=4)))
    with refuses("replayed to step 9"):
        metagradient(run(), ASKED, trained=other)
    with refuses("no parameter"):
        metagradient(run(), ASKED, trained={})


def test_images_that_change_when_read_again_are_refused():
    images = Forgetful(**vars(worlds.tensors(pictures(8_000), "train")))
    engine = replace(FP64, budget=1_000_000)  # too little to read them once and for all
    with refuses("step 9 gives other numbers when it is replayed"):
        metagradient(Run.of(pixel_study(MLP, RECIPE), images, engine=engine), ASKED)
