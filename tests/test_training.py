"""The trainer: torch's AdamW, keyed randomness, absence without a trace, and runs that end in the same bytes."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

from agreement import close
from errors import refuses
from recipes import changed, pixel_study, recipe_of
from slow_training import MLP, STUDY, UNET, images, kill, start, train_slowly
from whence.data.images import TensorImages, subset, tensor_images
from whence.diffusion.draws import Even
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.diffusion.noise import key_of, stream
from whence.diffusion.outputs import margin
from whence.models import open_model
from whence.training import subjects
from whence.training.checkpoints import load_state, save_checkpoint
from whence.training.dropout import KeyedDropout, active_dropout, key_dropout
from whence.training.loop import stacked_steps, steps
from whence.training.optimizer import SGD, State
from whence.training.optimizer import start as begin
from whence.training.order import draw, flipped, slots
from whence.training.recipe import NoiseSchedule, Recipe, update
from whence.training.recipe_file import read_recipe
from whence.training.runs import train_study
from whence.training.step import Diverged
from whence.training.study import Study
from whence.types import Batch, Draw, Engine, Weights, WhenceError
from worlds import predict, unet

FORWARD = STUDY.forward()
DOUBLE = Engine(dtype=torch.float64)
KEYS = torch.tensor([key_of(d) for d in images().digests])


def network(seed: int = 0) -> nn.Module:
    return STUDY.network_at(seed)


def trained(training: Recipe, n: int = 24, data: TensorImages | None = None, **settings: object) -> State:
    """The last state of a run of the tiny perceptron."""
    for state, _ in steps(network(training.seed), FORWARD, data or images(n), training, **settings):  # noqa: B007
        pass
    return state


@torch.no_grad()
def apart(a: Weights, b: Weights) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def same(a: State, b: State) -> bool:
    parts = ((a.weights, b.weights), (a.m, b.m), (a.v, b.v), (a.ema, b.ema))
    return a.step == b.step and all(torch.equal(x[name], y[name]) for x, y in parts for name in x)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is not of an unfinished folder."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path): (folder / path).read_bytes() for path in files if not path.parts[0].endswith(".tmp")}


# ---------------------------------------------------------------------------------------------------------- optimiser


def reference_rates(training: Recipe, optimiser: torch.optim.Optimizer) -> SequentialLR:
    """Linear to 1 over the warm-up, then half a cosine: torch's own schedulers."""
    warmup = training.schedule.warmup_steps
    rest = training.steps - warmup
    after = CosineAnnealingLR(optimiser, rest) if training.schedule.kind == "cosine" else ConstantLR(optimiser, 1.0)
    up = LinearLR(optimiser, 1 / warmup, 1.0, warmup - 1)
    return SequentialLR(optimiser, [up, after], [warmup])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_update_is_adamw_of_torch(schedule, decay, clip):
    training = recipe_of(
        steps=20,
        learning_rate=0.03,
        warmup_steps=5,
        kind=schedule,
        beta1=0.8,
        beta2=0.97,
        eps=1e-4,
        weight_decay=decay,
        max_grad_norm=clip,
    )
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(4, 3).double()
    optimiser = torch.optim.AdamW(
        net.parameters(),
        lr=training.optimizer.learning_rate,
        betas=(0.8, 0.97),
        eps=1e-4,
        weight_decay=decay,
        foreach=False,
    )
    rates, state, clipped = reference_rates(training, optimiser), begin(net), 0
    for step in range(training.steps):
        grads = {
            name: torch.randn(p.shape, generator=g, dtype=torch.float64) * (1 + step % 3)
            for name, p in net.named_parameters()
        }
        for name, p in net.named_parameters():
            p.grad = grads[name].clone()
        assert optimiser.param_groups[0]["lr"] == pytest.approx(training.rate_at(step), abs=1e-15)
        if clip:
            clipped += bool(nn.utils.clip_grad_norm_(net.parameters(), clip) > clip)
        optimiser.step()
        rates.step()
        state = update(training, state, grads)
        assert apart(state.weights, dict(net.named_parameters())) <= 1e-12
    assert not clip or 0 < clipped < training.steps, "some gradients are clipped, some are not"
    moments = [optimiser.state[p] for p in net.parameters()]
    assert apart(state.m, dict(zip(state.m, (s["exp_avg"] for s in moments), strict=True))) <= 1e-12
    assert apart(state.v, dict(zip(state.v, (s["exp_avg_sq"] for s in moments), strict=True))) <= 1e-12


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_update_is_sgd_of_torch(momentum, clip):
    """With a decay apart from the gradient, which torch's SGD has not: shrunk by hand before its step."""
    training = recipe_of(
        steps=20, learning_rate=0.03, warmup_steps=5, weight_decay=0.3, max_grad_norm=clip, momentum=momentum
    )
    g = torch.Generator().manual_seed(0)
    net = nn.Linear(4, 3).double()
    optimiser = torch.optim.SGD(net.parameters(), lr=training.optimizer.learning_rate, momentum=momentum)
    rates, state = reference_rates(training, optimiser), begin(net)
    for step in range(training.steps):
        grads = {name: torch.randn(p.shape, generator=g, dtype=torch.float64) for name, p in net.named_parameters()}
        for name, p in net.named_parameters():
            p.grad = grads[name].clone()
            p.data *= 1 - training.rate_at(step) * training.optimizer.weight_decay
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimiser.step()
        rates.step()
        state = update(training, state, grads)
        assert apart(state.weights, dict(net.named_parameters())) <= 1e-12
    assert not any(v.any() for v in state.v.values())


@pytest.mark.parametrize("momentum", [-0.1, 1.0, math.nan])
def test_momentum_below_one(momentum):
    with refuses(accepted="0 to below 1"):
        SGD(momentum=momentum)


def test_rates():
    cosine = recipe_of(steps=110, learning_rate=2.0, warmup_steps=10)
    assert [cosine.rate_at(s) for s in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert cosine.rate_at(60) == pytest.approx(1.0)
    assert cosine.rate_at(109) == pytest.approx(1 + math.cos(math.pi * 99 / 100))
    constant = changed(cosine, kind="constant")
    assert [constant.rate_at(s) for s in (0, 10, 109)] == [0.2, 2.0, 2.0]
    assert recipe_of(steps=3, learning_rate=2.0).rate_at(0) == 2.0


def test_eps_root_makes_the_step_differentiable_at_a_zero_gradient():
    training = recipe_of(steps=1, learning_rate=0.1, weight_decay=0.0, eps_root=1e-4, max_grad_norm=0.0)
    state = begin(nn.Linear(2, 1, bias=False).double())
    g = torch.tensor([[0.0, 3e-3]], dtype=torch.float64, requires_grad=True)
    after = update(training, state, {"weight": g}).weights["weight"]
    expected = state.weights["weight"] - 0.1 * g / ((g.square() + 1e-4).sqrt() + 1e-8)
    assert torch.allclose(after, expected, rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(after[0, 0], g)
    assert float(slope[0, 0]) == pytest.approx(-0.1 / (1e-2 + 1e-8), rel=1e-9)


def test_ema_is_a_naive_loop():
    training = recipe_of(steps=60, learning_rate=0.1, ema=0.8)
    g = torch.Generator().manual_seed(0)
    state = begin(nn.Linear(3, 2).double())
    naive = {name: w.clone() for name, w in state.weights.items()}
    for step in range(60):
        state = update(training, state, {n: torch.randn(w.shape, generator=g).double() for n, w in naive.items()})
        keep = min(0.8, (1 + step) / (10 + step))
        naive = {name: keep * naive[name] + (1 - keep) * state.weights[name] for name in naive}
        assert apart(state.ema, naive) <= 1e-14
    assert keep == 0.8, "past the start"
    assert apart(update(changed(training, ema=0.0), state, state.m).ema, state.ema) > 0
    plain = update(changed(training, ema=0.0), state, state.m)
    assert plain.ema is plain.weights


@pytest.mark.parametrize(
    ("setting", "value", "accepted"),
    [
        ("kind", "linear", "cosine, constant"),
        ("steps", 0, "at least 1"),
        ("warmup_steps", -1, "0 or more"),
        ("batch_size", 0, "at least 1"),
        ("max_grad_norm", math.nan, "above 0, or 0 for no limit"),
        ("ema", 1.5, "0 (no average) to 1"),
        ("empty_caption", 2.0, "a chance, 0 to 1"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(setting, value, accepted):
    with refuses(setting, accepted=accepted) as error:
        changed(recipe_of(3), **{setting: value})
    assert error.value.accepted == accepted


# -------------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize("batch", [1, 3, 7, 17])
def test_every_epoch_is_a_permutation(batch):
    n, training = 7, recipe_of(steps=1, batch_size=batch)
    every = [slots(training, KEYS[:n], step) for step in range(math.ceil(42 / batch))]
    rows, epochs = (torch.cat([getattr(s, name) for s in every])[:42].reshape(6, n) for name in ("rows", "epochs"))
    assert all(len(s.rows) == len(s.epochs) == batch for s in every)
    assert torch.equal(epochs, torch.arange(6)[:, None].expand(6, n))
    assert torch.equal(rows.sort(1).values, torch.arange(n).expand(6, n))
    assert len({tuple(row) for row in rows.tolist()}) == 6, "each epoch has an order of its own"
    assert not torch.equal(slots(changed(training, seed=1), KEYS, 0).rows, slots(training, KEYS, 0).rows)


def test_the_order_of_two_images_depends_on_them_alone():
    def order(keys: Tensor, epoch: int) -> list[int]:
        return keys[slots(recipe_of(steps=1, batch_size=len(keys), seed=3), keys, epoch).rows].tolist()

    for epoch in range(4):
        everybody = order(KEYS, epoch)
        for left_out in (0, 11, 23):
            rest = torch.cat([KEYS[:left_out], KEYS[left_out + 1 :]])
            assert order(rest, epoch) == [key for key in everybody if key != int(KEYS[left_out])]
        assert order(KEYS.flip(0), epoch) == everybody


# ------------------------------------------------------------------------------------------------- weights and absence


@dataclass
class Recorder:
    """A forward that remembers what it was asked."""

    inner: Denoiser
    seen: list[dict[int, tuple[int, Tensor, Tensor]]] = field(default_factory=list)
    models = "denoiser"
    prediction_type = "epsilon"
    density = Even()

    @property
    def timesteps(self) -> int:
        return self.inner.timesteps

    def weight(self, t: Tensor) -> Tensor:
        return self.inner.weight(t)

    @property
    def alphas_cumprod(self) -> Tensor:
        return self.inner.alphas_cumprod

    def __call__(self, call: object, batch: Batch, at: Draw) -> tuple[Tensor, Tensor]:
        keys = batch.keys.tolist()
        rows = zip(keys, at.t.tolist(), at.noise.clone(), batch.x0.clone(), strict=True)
        self.seen.append({key: (t, noise, x0) for key, t, noise, x0 in rows})
        return self.inner(call, batch, at)


def test_training_is_the_formula():
    """Slot by slot, image by image, with torch's own optimiser."""
    training = recipe_of(steps=9, batch_size=5, learning_rate=1e-2, warmup_steps=2, max_grad_norm=0.5, seed=4)
    weights = torch.rand(24, generator=torch.Generator().manual_seed(1)) * 3
    weights[[2, 5, 6, 7, 19]] = 0
    net = network(4).double()
    optimiser = torch.optim.AdamW(net.parameters(), betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6, foreach=False)
    run = steps(network(4), FORWARD, images(), training, weights, engine=DOUBLE)
    for step, (state, value) in enumerate(run):
        chosen, total = slots(training, KEYS, step), torch.zeros((), dtype=torch.float64)
        for row, epoch in zip(chosen.rows.tolist(), chosen.epochs.tolist(), strict=True):
            x0, key = images().x0[row : row + 1].double(), KEYS[row : row + 1]
            at = draw([training.seed], key, torch.tensor([epoch]), x0.shape[1:], 50, torch.float64)
            prediction, target = FORWARD(net, Batch(x0, key), at)
            total = total + float(weights[row]) * (prediction - target).square().mean()
        total = total / (training.batch_size * float(weights.double().mean()))
        optimiser.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimiser.param_groups[0]["lr"] = training.rate_at(step)
        optimiser.step()
        assert value == pytest.approx(float(total.detach()), rel=1e-6)
        assert apart(state.weights, dict(net.named_parameters())) <= 1e-8
    assert step == 8


def test_an_image_of_weight_0_leaves_no_trace():
    training = changed(STUDY.recipe, steps=15, flip=True)
    weights = torch.ones(24)
    absent = [0, 3, 10, 23]
    weights[absent] = 0
    garbage = images().x0.clone()
    garbage[absent] = 1e6 * torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    # The same names and digests, so that only the pixels differ.
    assert same(
        trained(training, weights=weights), trained(training, 24, replace(images(), x0=garbage), weights=weights)
    )
    assert not same(trained(training, weights=weights), trained(training))


def test_leaving_an_image_out_shifts_nothing_for_the_others():
    training = changed(STUDY.recipe, steps=15, flip=True)
    weights = torch.ones(24)
    weights[[0, 3, 10, 23]] = 0
    everybody, without = Recorder(FORWARD), Recorder(FORWARD)
    for forward, given in ((everybody, None), (without, weights)):
        for _ in steps(network(), forward, images(), training, given):
            pass
    assert len(everybody.seen) == len(without.seen) == 15
    for a, b in zip(everybody.seen, without.seen, strict=True):
        assert b.keys() == a.keys() - set(KEYS[weights == 0].tolist())
        for key in b:
            assert a[key][0] == b[key][0]
            assert torch.equal(a[key][1], b[key][1])
            assert torch.equal(a[key][2], b[key][2])


def test_draws_depend_on_seed_image_and_epoch_alone():
    def at(seed: int, keys: Tensor, epochs: Sequence[int]) -> Draw:
        return draw([seed], keys, torch.tensor(epochs), (1, 4, 4), 50, torch.float32)

    four = at(0, KEYS[:4], [0, 0, 1, 2])
    one = at(0, KEYS[2:3], [1])
    assert torch.equal(one.noise[0], four.noise[2])
    assert int(one.t[0]) == int(four.t[2])
    for other in (at(1, KEYS[2:3], [1]), at(0, KEYS[2:3], [2]), at(0, KEYS[3:4], [1])):
        assert not torch.equal(other.noise, one.noise)
    many = draw([0], KEYS.repeat(100), torch.arange(2400) // 24, (16,), 50, torch.float64)
    assert int(many.t.min()) == 0
    assert int(many.t.max()) == 49
    assert abs(float(many.t.double().mean()) - 24.5) < 1
    assert abs(float(many.noise.mean())) < 0.02
    assert abs(float(many.noise.std()) - 1) < 0.02
    # Several runs side by side: each as if alone.
    side = draw([7, 8], KEYS[:6], torch.zeros(6).long(), (1, 4, 4), 50, torch.float32)
    alone = at(8, KEYS[3:6], [0, 0, 0])
    assert torch.equal(side.noise[3:], alone.noise)
    assert torch.equal(side.t[3:], alone.t)


def test_only_the_proportions_of_the_weights_count():
    training = changed(STUDY.recipe, steps=5)
    weights = torch.rand(24, generator=torch.Generator().manual_seed(1))
    a, b = (trained(training, weights=w, engine=DOUBLE) for w in (weights, 7 * weights))
    assert apart(a.weights, b.weights) <= 1e-6
    assert apart(a.weights, trained(training, engine=DOUBLE).weights) > 1e-3


@pytest.mark.parametrize(
    "weights", [torch.ones(23), torch.ones(24, 1), torch.zeros(24), -torch.ones(24)], ids=["23", "24x1", "0", "-1"]
)
def test_weights_must_fit_the_images(weights):
    with refuses("24 images need as many weights, one of them above 0"):
        next(steps(network(), FORWARD, images(), STUDY.recipe, weights))
    with refuses("1 models of 24 images need as many weights"):
        next(stacked_steps(network(), FORWARD, images(), [STUDY.recipe], weights[None], [begin(network()).weights]))


def test_an_output_that_does_not_fit_the_model_is_refused():
    with refuses("'margin' is for a classifier"):
        trained(changed(STUDY.recipe, output=margin))


@dataclass(frozen=True, eq=False)
class Counted(TensorImages):
    """Images that know how many were read at once."""

    most: list[int] = field(default_factory=list)

    def batch(self, rows: Sequence[int]) -> Batch:
        self.most.append(len(rows))
        return super().batch(rows)


def test_images_over_the_budget_are_read_batch_by_batch():
    i = images()
    counted = Counted(i.x0, i.ids, i.digests, i.meta, i.labels)
    assert same(trained(STUDY.recipe, data=counted, engine=Engine(budget=1)), trained(STUDY.recipe))
    assert max(counted.most) == STUDY.recipe.batch_size


# ---------------------------------------------------------------------------------------------------- flips and dropout


def test_flips_are_keyed_by_image_and_epoch():
    n = 300
    data = tensor_images(torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    training, batch = recipe_of(steps=1, flip=True), data.batch(range(n))

    def mirrored(training: Recipe, batch: Batch, epoch: int) -> dict[int, bool]:
        x0 = flipped(training, batch, torch.full((len(batch),), epoch)).x0
        same, other = ((x0 == y).flatten(1).all(1) for y in (batch.x0, batch.x0.flip(-1)))
        assert bool((same ^ other).all())
        return dict(zip(batch.keys.tolist(), other.tolist(), strict=True))

    first = mirrored(training, batch, 0)
    assert 0.4 < sum(first.values()) / n < 0.6
    part = data.batch(range(100, 40, -1))
    assert mirrored(training, part, 0).items() <= first.items(), "whatever the batch"
    assert mirrored(training, batch, 1) != first
    assert mirrored(changed(training, seed=1), batch, 0) != first
    plain = changed(training, flip=False)
    assert flipped(plain, batch, torch.zeros(n).long()) is batch


def dropped(layer: KeyedDropout, keys: Tensor, epoch: int, shape: tuple[int, ...] = (50,)) -> Tensor:
    layer.rows = stream(layer.seed, epoch, keys)
    return layer(torch.ones(len(keys), *shape))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_keyed_by_image_and_epoch(p):
    layer = KeyedDropout(p, seed=5)
    x = dropped(layer, KEYS, 0, (10, 5, 20))
    share = float((x == 0).double().mean())
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / x.numel())
    assert torch.allclose(x[x != 0], torch.tensor(1 / (1 - p)))
    rows = torch.tensor([17, 2, 9])
    assert torch.equal(dropped(layer, KEYS[rows], 0, (10, 5, 20)), x[rows]), "whatever the batch"
    assert not torch.equal(x[0], x[1])
    assert not torch.equal(dropped(layer, KEYS, 1, (10, 5, 20)), x)
    assert not torch.equal(dropped(KeyedDropout(p, seed=6), KEYS, 0, (10, 5, 20)), x)
    layer.eval()
    assert torch.equal(layer(torch.ones(24, 7)), torch.ones(24, 7))
    assert torch.equal(KeyedDropout(p, seed=5)(torch.ones(24, 7)), torch.ones(24, 7)), (
        "no images known, nothing dropped"
    )


def with_dropout(p: float = 0.3) -> nn.Module:
    """The perceptron with two layers of dropout after its block."""
    net = network()
    net.blocks.append(Dropouts(p))
    return net


class Dropouts(nn.Module):
    def __init__(self, p: float):
        super().__init__()
        self.first, self.second, self.off = nn.Dropout(p), nn.Dropout(p), nn.Dropout(0.0)

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return self.off(self.second(self.first(h)))


def test_every_active_dropout_gets_a_key_of_its_own_and_of_the_run():
    net = with_dropout()
    first, second = key_dropout(net, seed=0)
    assert first.seed != second.seed
    assert isinstance(net.blocks[1].off, nn.Dropout)
    again = key_dropout(net, seed=0)
    assert [layer.seed for layer in again] == [first.seed, second.seed]
    assert not {layer.seed for layer in key_dropout(net, seed=1)} & {first.seed, second.seed}
    assert [type(m).__name__ for m in net.blocks[1].children()] == ["KeyedDropout", "KeyedDropout", "Dropout"]


def test_training_with_dropout_replays_and_is_dropout():
    def final(net: nn.Module, seed: int = 0, data: TensorImages | None = None) -> Weights:
        training = changed(STUDY.recipe, seed=seed)
        weights = torch.ones(24)
        weights[3] = 0
        for state, _ in steps(net, FORWARD, data or images(), training, weights):  # noqa: B007
            pass
        return state.weights

    used = with_dropout()
    first = final(used)
    assert apart(first, final(used)) == 0
    assert apart(first, final(with_dropout(0.0))) > 1e-3
    assert apart(final(used, seed=1), final(with_dropout(), seed=1)) == 0, "no matter what it was trained with before"
    other = images().x0.clone()
    other[3] = 1
    assert apart(first, final(with_dropout(), data=replace(images(), x0=other))) == 0


def test_a_step_drops_by_image_and_epoch():
    net, training = with_dropout(), changed(STUDY.recipe, steps=12)
    for state, _ in steps(net, FORWARD, images(), training):
        chosen, layers = slots(training, KEYS, state.step - 1), (net.blocks[1].first, net.blocks[1].second)
        assert all(torch.equal(x.rows, stream(x.seed, chosen.epochs, KEYS[chosen.rows])) for x in layers)
    assert int(chosen.epochs.max()) == 2


@pytest.mark.parametrize("kind", [nn.Dropout2d, nn.AlphaDropout])
def test_dropout_that_cannot_be_keyed_is_refused(kind):
    net = with_dropout()
    net.blocks[1].second = kind(0.1)
    with refuses(f"dropout of kind {kind.__name__} cannot be replayed; use nn.Dropout"):
        next(steps(net, FORWARD, images(), STUDY.recipe))
    assert active_dropout(net)
    net.blocks[1].first, net.blocks[1].second = nn.Dropout(0.0), kind(0.0)
    assert not active_dropout(net)
    assert key_dropout(net, seed=0) == []


# ------------------------------------------------------------------------------------------------------------- resuming


def test_a_run_goes_on_from_any_state_to_the_same_bits(tmp_path):
    training = changed(STUDY.recipe, steps=8, flip=True)
    every = [state for state, _ in steps(network(), FORWARD, images(), training)]

    def nothing(folder):  # the weights for others; going on needs the state alone
        folder.mkdir(exist_ok=True)

    for step in (1, 5, 7):
        save_checkpoint(tmp_path, nothing, every[step - 1], training, {})
        read = load_state(tmp_path / f"checkpoint-{step}", {})
        assert same(read, every[step - 1])
        assert same(trained(training, state=read), every[-1])
    shutil.copy(tmp_path / "checkpoint-1" / "state.safetensors", tmp_path / "checkpoint-5")
    with refuses("checkpoint-5/state.safetensors: it belongs elsewhere"):
        load_state(tmp_path / "checkpoint-5", {})
    assert list(steps(network(), FORWARD, images(), training, state=every[-1])) == []
    assert not list(tmp_path.glob(".*"))


def test_a_killed_training_ends_with_the_same_bytes(tmp_path):
    """kill -9 twice in the middle of a UNet with attention, dropout and flips, then the same command again."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for least in (1, 3):
        process = start(train_slowly, killed, 0.05)
        deadline = time.monotonic() + 300
        while len(list(killed.glob("checkpoint-*"))) < least:
            assert process.is_alive(), "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.07)  # now in the middle between two checkpoints
        kill(process)
    assert 3 <= len(list(killed.glob("checkpoint-*"))) < 6
    before = contents(killed)
    train_study(UNET, images(), killed, every=2)
    train_study(UNET, images(), whole, every=2)
    assert contents(killed) == contents(whole)
    assert len(list(whole.glob("checkpoint-*"))) == 6
    assert contents(killed).items() >= before.items(), "finished checkpoints stay"
    train_study(UNET, images(), killed, every=2)
    assert contents(killed) == contents(whole), "a finished folder is left as it is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished training of the tiny perceptron."""
    path = tmp_path_factory.mktemp("model")
    train_study(STUDY, images(), path, every=4)
    return path


OTHERS = {
    "study.recipe.optimizer.learning_rate": (
        replace(STUDY, recipe=changed(STUDY.recipe, learning_rate=2e-2)),
        images(),
    ),
    "study.recipe.seed": (replace(STUDY, recipe=changed(STUDY.recipe, seed=1)), images()),
    "study.recipe.ema": (replace(STUDY, recipe=changed(STUDY.recipe, ema=0.0)), images()),
    "study.recipe.schedule.steps": (replace(STUDY, recipe=changed(STUDY.recipe, steps=7)), images()),
    "study.recipe.model.network.width": (pixel_study({**MLP, "width": 8}, STUDY.recipe, steps=50), images()),
    "study.recipe.model.noise.beta_schedule": (
        pixel_study(MLP, STUDY.recipe, steps=50, beta_schedule="scaled_linear"),
        images(),
    ),
    "images": (STUDY, images(seed=1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_of_another_run_is_refused_with_the_field(folder, name):
    study, data = OTHERS[name]
    before = contents(folder)
    with refuses(f"checkpoint-6 is from another run ({name}: found ..., expected ...another --out"):
        train_study(study, data, folder, every=4)
    assert contents(folder) == before


def test_the_order_of_the_images_is_part_of_the_data(folder):
    with refuses("(images: "):
        train_study(STUDY, subset(images(), range(23, -1, -1)), folder, every=4)


def test_images_and_network_must_agree_in_channels(tmp_path):
    with refuses("images have 3 channels, the model takes 1"):
        train_study(STUDY, tensor_images(torch.rand(4, 3, 4, 4)), tmp_path, every=1)


@pytest.mark.parametrize("there", ["unet/config.json", "model_index.json", "checkpoint-500/optimizer.bin"])
def test_a_model_of_somebody_else_is_not_overwritten(tmp_path, there):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("precious")
    with refuses(f"{Path(there).parts[0]} was not written by whence train; choose another"):
        train_study(STUDY, images(), tmp_path, every=4)
    assert contents(tmp_path) == {there: b"precious"}


def test_an_interruption_while_the_pipeline_is_written_leaves_none(tmp_path, monkeypatch):
    """scheduler/ stands for a whole pipeline (see banks.train_reference), model_index.json likewise (see demo)."""

    def interrupted(building: Path, *rest: object) -> None:
        (building / "scheduler").mkdir(parents=True)
        (building / "scheduler" / "scheduler_config.json").write_text("{")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subjects, "save_pipeline", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_study(UNET, images(), tmp_path, every=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "recipe.toml"]
    moved = Path.rename

    def once(path: Path, target: Path) -> Path:
        if target.name == "scheduler":
            raise KeyboardInterrupt
        return moved(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", once)
        with pytest.raises(KeyboardInterrupt):
            train_study(UNET, images(), tmp_path, every=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "recipe.toml", "unet"]
    train_study(UNET, images(), tmp_path, every=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-12",
        "model_index.json",
        "recipe.toml",
        "scheduler",
        "unet",
    ]
    DDPMPipeline.from_pretrained(tmp_path)


def test_two_processes_that_train_the_same_model(tmp_path):
    """As two shards of a bank do when they are started together."""
    workers = [start(train_slowly, tmp_path / "race", 0.01) for _ in range(2)]
    train_study(UNET, images(), tmp_path / "whole", every=2)
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    assert contents(tmp_path / "race") == contents(tmp_path / "whole")
    assert not list((tmp_path / "race").glob(".*"))


def test_a_leftover_of_a_killed_checkpoint_is_harmless(tmp_path, folder):
    left = tmp_path / f".checkpoint-4.{os.getpid()}.tmp"
    (left / "unet").mkdir(parents=True)
    (left / "state.safetensors").write_bytes(b"half")
    (left / "unet" / "config.json").write_text("{")
    train_study(STUDY, images(), tmp_path, every=4)
    assert contents(tmp_path) == contents(folder)
    assert not left.exists()


# --------------------------------------------------------------------------------------------------------- on the shelf


def test_a_trained_unet_is_a_diffusers_pipeline(tmp_path):
    noise = NoiseSchedule(50, "squaredcos_cap_v2")
    study = Study(changed(UNET.recipe, steps=3, model=replace(UNET.recipe.model, noise=noise)))
    train_study(study, images(), tmp_path, every=2)
    for last, _ in steps(study.network_at(0), study.forward(), images(), study.recipe):  # noqa: B007
        pass
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert apart(dict(pipeline.unet.named_parameters()), last.ema) == 0
    assert pipeline.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipeline.scheduler.config.num_train_timesteps == 50
    model = open_model(tmp_path)
    assert apart(dict(model.final.load().named_parameters()), last.ema) == 0
    assert apart(dict(model.checkpoints[-1].load().named_parameters()), last.weights) == 0
    assert [c.step for c in model.checkpoints] == [2, 3]
    assert [c.rate for c in model.checkpoints] == [study.recipe.rate_at(1), study.recipe.rate_at(2)]
    close(model.forward.alphas_cumprod, pipeline.scheduler.alphas_cumprod)
    assert model.resolution == 4
    assert model.channels == 1


def test_a_trained_perceptron_comes_back(folder):
    model, last = open_model(folder), trained(STUDY.recipe)
    assert apart(dict(model.final.load().named_parameters()), last.ema) == 0
    assert apart(dict(model.checkpoints[-1].load().named_parameters()), last.weights) == 0
    assert [c.step for c in model.checkpoints] == [4, 6]
    assert (
        json.loads((folder / "checkpoint-6" / "whence.json").read_text())["study"]["recipe"]["model"]["network"] == MLP
    )
    assert read_recipe(folder) == STUDY.recipe
    x, t, net = torch.randn(2, 1, 4, 4), torch.tensor([3, 40]), network()
    net.load_state_dict(last.ema)
    assert torch.equal(model.final.load()(x, t)[0], net(x, t)[0])


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = begin(network(3)).weights
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert apart(a, begin(network(3)).weights) == 0
    assert apart(a, begin(network(4)).weights) > 0


# -------------------------------------------------------------------------------------------------------------- stacked


SCHEDULE = Denoiser(linear_schedule(50), predict=predict)
NETWORKS = {"perceptron": (network, FORWARD), "unet": (unet, SCHEDULE)}


def some_weights() -> Tensor:
    """Three models: a half mask, any weights, and a quarter mask; image 0, which fills up short batches, in one of them."""
    weights = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) + 0.5
    weights[0] = torch.tensor([1, 0] * 6)
    weights[2] = torch.tensor([0, 0, 0, 1] * 3)
    return weights


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("name", "flip"), [("perceptron", False), ("perceptron", True), ("unet", True)])
def test_stacked_training_is_training_one_by_one(name, dtype, tolerance, flip):
    make, forward = NETWORKS[name]
    # With eps_root, because the sign of a gradient that is 0 but for rounding (a bias before a norm) is no result.
    recipe = recipe_of(
        steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=4, weight_decay=1e-2, eps_root=1e-8, ema=0.9, flip=flip
    )
    trainings = [changed(recipe, seed=s) for s in (3, 1, 4)]
    weights, engine = some_weights(), Engine(dtype=dtype)
    if name == "unet":  # which takes its time
        weights, trainings = weights[[0, 2]], trainings[1:]
    starts = [begin(make(s)).weights for s in range(len(trainings))]
    together = list(stacked_steps(make(9), forward, images(12), trainings, weights, starts, engine))
    assert [state.step for state, _ in together] == list(range(1, 13))
    for model in range(len(trainings)):
        alone = list(steps(make(model), forward, images(12), trainings[model], weights[model], engine=engine))
        assert len(alone) == 12
        for (_, losses), (_, value) in zip(together, alone, strict=True):
            assert float(losses[model]) == pytest.approx(value, rel=tolerance)
        (a, _), (b, _) = together[-1], alone[-1]
        for part in ("weights", "m", "v", "ema"):
            mine = {name: values[model] for name, values in getattr(a, part).items()}
            assert next(iter(mine.values())).dtype == dtype
            close(*(torch.cat([w[k].flatten() for k in mine]) for w in (mine, getattr(b, part))), tolerance)
        assert apart(b.weights, {k: v.to(dtype) for k, v in starts[model].items()}) > 5e-3, "they moved"


def test_stacked_steps_without_any_image():
    """A quarter of the images, one slot per step: in most steps nobody has an image, and momentum alone moves them."""
    recipe = recipe_of(steps=12, batch_size=1, learning_rate=1e-2, eps_root=1e-8)
    weights = torch.zeros(2, 12)
    weights[:, [2, 3, 4]] = 1
    trainings = [changed(recipe, seed=s) for s in (0, 1)]
    empty = [
        len(slots(t, KEYS[:12], s).rows[weights[0][slots(t, KEYS[:12], s).rows] > 0])
        for s in range(12)
        for t in trainings
    ]
    assert (0, 0) in zip(empty[::2], empty[1::2], strict=True)
    starts = [begin(network(s)).weights for s in (0, 1)]
    for name, (make, forward) in NETWORKS.items():
        starts = [begin(make(s)).weights for s in (0, 1)]
        for state, losses in stacked_steps(make(0), forward, images(12), trainings, weights, starts, DOUBLE):  # noqa: B007
            assert torch.isfinite(losses).all()
        for model in (0, 1):
            for alone, _ in steps(make(model), forward, images(12), trainings[model], weights[model], engine=DOUBLE):  # noqa: B007
                pass
            assert apart({k: v[model] for k, v in state.weights.items()}, alone.weights) <= 1e-9, name


def test_what_cannot_be_stacked_is_refused():
    two = [STUDY.recipe, changed(STUDY.recipe, seed=1)]
    starts, weights = [begin(network()).weights] * 2, torch.ones(2, 24)
    with refuses("differ in more than their seeds"):
        next(stacked_steps(network(), FORWARD, images(), [two[0], changed(two[1], learning_rate=1.0)], weights, starts))
    keyed = with_dropout()
    key_dropout(keyed, 0)
    for net in (with_dropout(), keyed):
        with refuses("active dropout; train the models one by one"):
            next(stacked_steps(net, FORWARD, images(), two, weights, starts))
    next(stacked_steps(with_dropout(0.0), FORWARD, images(), two, weights, starts))
    weights[1] = 0
    with refuses("2 models of 24 images need as many weights, one of each model above 0"):
        next(stacked_steps(network(), FORWARD, images(), two, weights, starts))


def test_a_diverging_run_says_so():
    wild = changed(STUDY.recipe, steps=30, learning_rate=1e30, warmup_steps=0, max_grad_norm=0.0)
    with pytest.raises(
        Diverged, match=r"training diverged at step \d+: the loss is (inf|nan); lower the learning rate"
    ):
        trained(wild)
    starts = [begin(network()).weights] * 2
    with pytest.raises(Diverged, match=r"training diverged at step \d+: the loss is (inf|nan); lower"):
        list(stacked_steps(network(), FORWARD, images(), [wild, wild], torch.ones(2, 24), starts))
    assert issubclass(Diverged, WhenceError)


def test_one_diverging_model_stops_the_stack():
    starts = [begin(network()).weights, {k: 1e30 * w for k, w in begin(network()).weights.items()}]
    with pytest.raises(Diverged):
        list(stacked_steps(network(), FORWARD, images(), [STUDY.recipe] * 2, torch.ones(2, 24), starts))
