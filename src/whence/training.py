"""A small trainer whose every step can be said again.

Order, timesteps, noise, flips and dropout are functions of (seed, image, epoch): leaving an image out, or giving it another
weight, shifts nothing for the others. Slot p of the run holds image order_e[p mod n] of epoch e = p div n, and step s
takes slots s*B .. (s+1)*B - 1. With w_i the weight of image i and c a constant (the mean weight at the start):

    loss_s = 1/(B c) * sum over slots of w_i * f(x_i; t, eps of (seed, image, epoch))
    AdamW    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g^2;  theta = (1 - rate decay) theta - rate m' / (sqrt(v' + r) + eps)

with m', v' the bias-corrected moments and r = eps_root (0 in torch's AdamW; above 0 the square root is differentiable).
A weight of 0 trains as if the image were not there, at the cost of its absence.

Timesteps are drawn from the density that the forward declares, t = floor(T density(u)), evenly unless it says otherwise.

With prior images (Ruiz et al. 2023), which hold the model where it was, each step takes B of them besides, in an order of
their own. Their weight is prior_weight times c, so that the loss is that of Kumari et al. 2023 whatever the subset:

    loss_s = 1/(B c) * sum over B slots of w_i f(x_i)  +  prior_weight * 1/B * sum over B prior slots of f(x_j)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd

from whence.draws import Density, Even
from whence.gradients import check, measure
from whence.noise import key_of, normals, seed_for, stream, uniforms
from whence.outputs import Output, loss
from whence.types import Batch, Draw, Engine, Forward, Images, Trainable, Weights, WhenceError, describe


class Diverged(WhenceError):
    """A run whose loss or weights are no longer finite: the one failure that is a result of training, not of its input."""


@dataclass(frozen=True)
class Training:
    """The recipe of a run.

    rate rises linearly over `warmup` steps, then falls as a half cosine to 0 (or stays, with schedule "constant"). clip: the
    largest gradient norm, None for no limit. ema: decay of the weight average that is sampled from, None for none; it
    starts as (1 + step) / (10 + step), as in diffusers. flip: mirror images at random. seed: of everything. prior: how many
    of the images, the last ones, are prior images (see `taught`). untold: the chance that an image has an empty caption in
    an epoch, so that the model can be drawn from with classifier-free guidance. momentum: that of SGD in place of AdamW,
    m' = momentum m + g, theta' = (1 - rate decay) theta - rate m'.
    """

    steps: int
    batch_size: int = 64
    rate: float = 1e-4
    warmup: int = 0
    schedule: str = "cosine"
    beta1: float = 0.95
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    decay: float = 1e-6
    clip: float | None = 1.0
    ema: float | None = None
    flip: bool = False
    output: Output = loss
    seed: int = 0
    prior: int = 0
    untold: float = 0.0
    momentum: float | None = None

    def describe(self) -> dict[str, Any]:
        """As of any dataclass, without what recipes of before do not name."""
        later = {"prior": 0, "untold": 0.0, "momentum": None}
        found = {f.name: describe(getattr(self, f.name)) for f in fields(self)}
        named = {k: v for k, v in found.items() if k not in later or v != later[k]}
        return {"is": type(self).__name__, **named}

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise WhenceError(f"schedule {self.schedule!r} is not one of cosine, constant")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise WhenceError(f"training: {name} is {getattr(self, name)}; at least 1 is needed")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise WhenceError(f"training: momentum is {self.momentum:g}; accepted: 0 to below 1, None for AdamW")

    def rate_at(self, step: int) -> float:
        """The learning rate of step number `step` (from 0)."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.rate
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


@dataclass(frozen=True)
class State:
    """A point of the run: weights, moments (SGD has no second), averaged weights (the weights without ema), steps done."""

    weights: Weights
    m: Weights
    v: Weights
    ema: Weights
    step: int = 0


def start(module: nn.Module) -> State:
    """The state before the first step, from the module's weights."""
    weights = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    zeros = {name: torch.zeros_like(p) for name, p in weights.items()}
    return State(weights, zeros, dict(zeros), dict(weights))


def update(training: Training, state: State, grads: Weights) -> State:
    """One step of clipping, AdamW or SGD, and averaging: a pure, differentiable function of (state, grads)."""
    if training.clip is not None:
        norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
        factor = (training.clip / (norm + 1e-6)).clamp(max=1.0)
        grads = {name: g * factor for name, g in grads.items()}
    step, rate = state.step + 1, training.rate_at(state.step)
    correct1, correct2 = 1 - training.beta1**step, 1 - training.beta2**step
    weights, m, v = {}, {}, {}
    for name, g in grads.items():
        kept = (1 - rate * training.decay) * state.weights[name]
        if training.momentum is not None:
            m[name], v[name] = training.momentum * state.m[name] + g, state.v[name]
            weights[name] = kept - rate * m[name]
            continue
        m[name] = torch.lerp(state.m[name], g, 1 - training.beta1)
        v[name] = torch.addcmul(training.beta2 * state.v[name], g, g, value=1 - training.beta2)
        spread = (v[name] / correct2 + training.eps_root).sqrt() + training.eps
        weights[name] = torch.addcdiv(kept, m[name], spread, value=-rate / correct1)
    if training.ema is None:
        return State(weights, m, v, weights, step)
    keep = min(training.ema, step / (9 + step))
    ema = {name: torch.lerp(state.ema[name], weights[name], 1 - keep) for name in weights}
    return State(weights, m, v, ema, step)


@dataclass(frozen=True)
class Slots:
    """The rows that fill one step, and the epoch each is in: both [B]."""

    rows: Tensor
    epochs: Tensor


def taught(study: Trainable, images: Images, weights: Tensor | None = None) -> tuple[Images, Tensor]:
    """What a study trains on: images and their weights, 1 each by default, and after them its prior images if it has any."""
    weights = torch.ones(len(images)) if weights is None else weights
    prior: Images | None = getattr(study, "prior", None)
    if prior is None:
        return images, weights
    held = torch.full((len(prior),), study.prior_weight * float(weights.double().mean()), dtype=weights.dtype)  # type: ignore[attr-defined]
    return Together((images, prior)), torch.cat([weights, held])


@dataclass(frozen=True, eq=False)
class Together:
    """Images one after the other, with the columns and conditions that all have."""

    parts: Sequence[Images]

    @property
    def ids(self) -> Sequence[str]:
        return [name for part in self.parts for name in part.ids]

    @property
    def digests(self) -> Sequence[str]:
        return [digest for part in self.parts for digest in part.digests]

    @property
    def meta(self) -> Mapping[str, Sequence[Any]]:
        shared = set.intersection(*(set(part.meta) for part in self.parts))
        return {name: [value for part in self.parts for value in part.meta[name]] for name in sorted(shared)}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def untold(self) -> Mapping[str, Tensor] | None:
        return getattr(self.parts[0], "untold", None)

    @cached_property
    def conditions(self) -> list[str]:
        return sorted(set.intersection(*(set(part.batch([0]).cond) for part in self.parts)))

    def batch(self, rows: Sequence[int]) -> Batch:
        ends = list(accumulate(len(part) for part in self.parts))
        asked = torch.tensor([int(row) for row in rows])
        part = torch.bucketize(asked, torch.tensor(ends), right=True)
        order = torch.argsort(part, stable=True)  # as the batches of the parts follow each other
        places = [(p, asked[part == p] - ends[p] + len(self.parts[p])) for p in part.unique().tolist()]
        found, back = [self.parts[p].batch(local.tolist()) for p, local in places], torch.argsort(order)
        cond = {name: torch.cat([batch.cond[name] for batch in found])[back] for name in self.conditions}
        return Batch(torch.cat([b.x0 for b in found])[back], torch.cat([b.keys for b in found])[back], cond)


def mean_weight(training: Training, weights: Tensor) -> Tensor:
    """c: the mean weight of the images that are no prior images, float64; weights [..., n]."""
    return weights[..., : weights.shape[-1] - training.prior].double().mean(-1)


def slots(training: Training, keys: Tensor, step: int) -> Slots:
    """Which images a step takes, from all n images whatever their weight."""
    if training.prior:
        n, alone = len(keys) - training.prior, replace(training, prior=0)
        own, prior = slots(alone, keys[:n], step), slots(alone, keys[n:], step)
        return Slots(torch.cat([own.rows, n + prior.rows]), torch.cat([own.epochs, prior.epochs]))
    n = len(keys)
    positions = torch.arange(step * training.batch_size, (step + 1) * training.batch_size)
    epochs = positions // n
    rows = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        rows[here] = _order(training.seed, epoch, keys)[positions[here] % n]
    return Slots(rows, epochs)


def _order(seed: int, epoch: int, keys: Tensor) -> Tensor:
    # Sorting hashes of the images, not shuffling positions: the relative order of two images depends on them alone.
    return torch.argsort(stream(seed_for(seed, "order"), epoch, keys), stable=True)


def density_of(forward: Forward) -> Density:
    """Of the timesteps of a training."""
    return getattr(forward, "density", Even())


def draw(
    trainings: Sequence[Training],
    keys: Tensor,
    epochs: Tensor,
    shape: torch.Size,
    total: int,
    dtype: torch.dtype,
    density: Density = Even(),
) -> Draw:
    """The timestep and noise of each slot: the slots of several runs of equal length one after the other."""

    def streams(purpose: str) -> Tensor:
        seeds = torch.tensor([seed_for(training.seed, purpose) for training in trainings])
        return stream(seeds.repeat_interleave(len(keys) // len(trainings)), epochs, keys)

    t = (density(uniforms(streams("timestep"), 1)[:, 0]) * total).long().clamp(0, total - 1)
    return Draw(t, normals(streams("noise"), shape, dtype))


@dataclass(frozen=True)
class Replayed:
    """The (timestep, noise) that training showed each image in an epoch, as draws (see `draws.Drawing`)."""

    training: Training
    epoch: int
    unit: bool = False
    density: Density = Even()
    group = 1
    count = 1

    def describe(self) -> dict[str, Any]:
        """As of any dataclass, without an even density, which features of before do not name."""
        names = ("training", "epoch", "unit") if self.density == Even() else ("training", "epoch", "unit", "density")
        return {"is": "Replayed", **{name: describe(getattr(self, name)) for name in names}}

    def __call__(self, keys: Tensor, shape: Sequence[int], total: int, dtype: torch.dtype = torch.float32) -> Draw:
        epochs = torch.full_like(keys, self.epoch)
        seen = draw([self.training], keys, epochs, torch.Size(shape), total, dtype, self.density)
        return Draw(seen.t[:, None], seen.noise[:, None])


@dataclass(frozen=True, eq=False)
class Seen:
    """Images as training showed them in an epoch: the way round, and with or without caption."""

    images: Images
    training: Training
    epoch: int

    @property
    def ids(self) -> Sequence[str]:
        return self.images.ids

    @property
    def digests(self) -> Sequence[str]:
        return self.images.digests

    @property
    def meta(self) -> Mapping[str, Sequence[Any]]:
        return self.images.meta

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int]) -> Batch:
        batch = self.images.batch(rows)
        return shown(self.training, self.images, batch, torch.full_like(batch.keys, self.epoch))

    def describe(self) -> dict[str, Any]:
        own = self.images.describe() if hasattr(self.images, "describe") else None
        flips = {"seed": self.training.seed, "epoch": self.epoch} if self.training.flip else None
        told = {"untold": [self.training.untold, self.training.seed, self.epoch]} if self.training.untold else {}
        return {"is": "seen", "images": own, "flips": flips, **told}


def epoch_before(training: Training, n: int, step: int) -> int:
    """The last epoch that all n images had seen when `step` steps were done; 0 where that is none yet."""
    return max(0, step * training.batch_size // n - 1)


def shown(training: Training, images: Images, batch: Batch, epochs: Tensor) -> Batch:
    """A batch of the images as training shows it in these epochs: mirrored, or with its caption left out."""
    batch = flipped(training, batch, epochs)
    if not training.untold:
        return batch
    nothing: Mapping[str, Tensor] | None = getattr(images, "untold", None)
    if nothing is None:
        raise WhenceError("training: these images have no caption that could be left out; accepted: untold=0")
    silent = uniforms(stream(seed_for(training.seed, "untold"), epochs, batch.keys), 1)[:, 0] < training.untold
    cond = dict(batch.cond)
    for name, value in nothing.items():
        here = silent.to(cond[name].device).reshape(-1, *[1] * value.ndim)
        cond[name] = torch.where(here, value.to(cond[name]), cond[name])
    return replace(batch, cond=cond)


def flipped(training: Training, batch: Batch, epochs: Tensor) -> Batch:
    """Mirror about half of the images, left to right."""
    if not training.flip:
        return batch
    mirrored = uniforms(stream(seed_for(training.seed, "flip"), epochs, batch.keys), 1)[:, 0] < 0.5
    shape = (-1, *[1] * (batch.x0.ndim - 1))
    x0 = torch.where(mirrored.to(batch.x0.device).reshape(shape), batch.x0.flip(-1), batch.x0)
    return replace(batch, x0=x0)


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of (seed, layer, image, epoch) instead of the position in the batch."""

    def __init__(self, p: float, seed: int):
        super().__init__()
        self.p, self.seed = p, seed
        self.rows: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rows is None:
            return x
        keep = uniforms(self.rows, x[0].numel()).reshape(x.shape) >= self.p
        return x * keep.to(x) / (1 - self.p)


def active_dropout(module: nn.Module) -> bool:
    """Whether any layer of a network drops something in training."""
    return any(isinstance(layer, (_DropoutNd, KeyedDropout)) and layer.p > 0 for layer in module.modules())


def key_dropout(module: nn.Module, seed: int) -> list[KeyedDropout]:
    """Replace every active dropout layer of a network, in place; layers replaced before get the seed of this run."""
    layers: list[KeyedDropout] = []
    for parent in list(module.modules()):
        if hasattr(parent, "token_drop") and getattr(parent, "dropout_prob", False):  # LabelEmbedding of diffusers
            raise WhenceError(f"training: {type(parent).__name__} drops labels at random; set its dropout_prob to 0")
        for name, child in list(parent.named_children()):
            if not isinstance(child, (_DropoutNd, KeyedDropout)) or child.p == 0:
                continue
            if not isinstance(child, (nn.Dropout, KeyedDropout)):
                raise WhenceError(
                    f"training: dropout of kind {type(child).__name__} cannot be replayed; use nn.Dropout"
                )
            layers.append(KeyedDropout(child.p, seed_for(seed, f"dropout {len(layers)}")))
            setattr(parent, name, layers[-1])
    return layers


def steps(
    module: nn.Module,
    forward: Forward,
    images: Images,
    training: Training,
    weights: Tensor | None = None,
    state: State | None = None,
    engine: Engine = Engine(),
) -> Iterator[tuple[State, float]]:
    """Train, yielding (state, loss) after every step. weights [n]: a weight per image, 1 each by default.

    `state` goes on from a point reached before: the steps that follow are bit-identical to an uninterrupted run.
    """
    check(training.output, forward)
    module.to(engine.device, engine.dtype).train()
    dropout = key_dropout(module, training.seed)
    weights = torch.ones(len(images)) if weights is None else weights
    if weights.shape != (len(images),) or not bool((weights > 0).any()):
        raise WhenceError(
            f"training: {len(images)} images need as many weights, one of them above 0; got {weights.shape}"
        )
    read, keys = reader(images, engine), noise_keys(images)
    constant = training.batch_size * float(mean_weight(training, weights))
    state = start(module) if state is None else _placed(state, module, engine)
    while state.step < training.steps:
        chosen = _slots_of(training, keys, weights, state.step)
        rows, epochs = chosen.rows, chosen.epochs
        batch = shown(training, images, read(rows), epochs)
        shape, total = batch.x0.shape[1:], forward.timesteps
        at = draw([training], batch.keys, epochs, shape, total, batch.x0.dtype, density_of(forward))
        at = Draw(at.t.to(batch.x0.device), at.noise.to(batch.x0))
        for layer in dropout:
            layer.rows = stream(layer.seed, epochs, batch.keys)
        scale = weights[rows].to(batch.x0) / constant
        value, grads = gradient(module, state.weights, forward, training.output, batch, at, scale)
        state = update(training, state, grads)
        if not math.isfinite(value):
            raise Diverged(f"training diverged at step {state.step}: the loss is {value}; lower the learning rate")
        yield state, value


def stacked_steps(
    module: nn.Module,
    forward: Forward,
    images: Images,
    trainings: Sequence[Training],
    weights: Tensor,
    starts: Sequence[Weights],
    engine: Engine = Engine(),
) -> Iterator[tuple[State, Tensor]]:
    """Train S models at once, one vectorised computation per step; yields (states with a leading axis S, losses [S]).

    trainings: equal but for their seeds; weights [S, n]; starts: the initial weights of each. Every model sees exactly the
    slots, noise and denominators that it would see alone in `steps`; images of weight 0 are left out and the shorter
    batches filled up with rows of weight 0. Networks with active dropout are refused.
    """
    recipe = trainings[0]
    if any(replace(other, seed=recipe.seed) != recipe for other in trainings):
        raise WhenceError("stacked training: the recipes differ in more than their seeds; train them one by one")
    if active_dropout(module):
        raise WhenceError("stacked training: the network has active dropout; train the models one by one")
    if weights.shape != (len(trainings), len(images)) or not bool((weights > 0).any(1).all()):
        raise WhenceError(
            f"stacked training: {len(trainings)} models of {len(images)} images need as many weights, one of each model "
            f"above 0; got {tuple(weights.shape)}"
        )
    check(recipe.output, forward)
    module.to(engine.device, engine.dtype).train()
    read, keys = reader(images, engine), noise_keys(images)
    constants = recipe.batch_size * mean_weight(recipe, weights)
    first = {name: torch.stack([w[name] for w in starts]).to(engine.device, engine.dtype) for name in starts[0]}
    zeros = {name: torch.zeros_like(w) for name, w in first.items()}
    state = State(first, zeros, dict(zeros), dict(first))

    def value(w: Weights, batch: Batch, at: Draw, scale: Tensor) -> Tensor:
        return (measure(module, w, forward, recipe.output, batch, at) * scale).sum()

    def loss_and_grad(w: Weights, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor, scale: Tensor) -> Any:
        return grad_and_value(value)(w, Batch(x0, t, cond), Draw(t, noise), scale)

    def advance(w: Weights, m: Weights, v: Weights, ema: Weights, g: Weights) -> tuple[Weights, ...]:
        after = update(recipe, State(w, m, v, ema, state.step), g)
        return after.weights, after.m, after.v, after.ema

    while state.step < recipe.steps:
        pieces = [_slots_of(t, keys, w, state.step) for t, w in zip(trainings, weights, strict=True)]
        longest = max(1, *(len(piece.rows) for piece in pieces))  # networks may refuse a batch of no image
        filled = [_fill(piece, longest) for piece in pieces]
        batches = [shown(t, images, read(rows), epochs) for t, (rows, epochs, _) in zip(trainings, filled, strict=True)]
        x0 = torch.stack([batch.x0 for batch in batches])
        at = draw(
            trainings,
            torch.cat([batch.keys for batch in batches]),
            torch.cat([epochs for _, epochs, _ in filled]),
            x0.shape[2:],
            forward.timesteps,
            x0.dtype,
            density_of(forward),
        )
        t, noise = at.t.reshape(x0.shape[:2]), at.noise.reshape(x0.shape)
        scale = torch.stack([
            (w[rows] * real).to(x0.dtype) / c for w, c, (rows, _, real) in zip(weights, constants, filled, strict=True)
        ])  # fmt: skip
        cond = {name: torch.stack([batch.cond[name] for batch in batches]) for name in batches[0].cond}
        with sdpa_kernel(SDPBackend.MATH):
            grads, losses = vmap(loss_and_grad)(state.weights, x0, cond, t.to(x0.device), noise.to(x0), scale.to(x0))
        w, m, v, ema = vmap(advance)(state.weights, state.m, state.v, state.ema, grads)
        state = State(w, m, v, ema, state.step + 1)
        if not torch.isfinite(losses).all():
            raise Diverged(f"training diverged at step {state.step}; lower the learning rate")
        yield state, losses


def _slots_of(training: Training, keys: Tensor, weights: Tensor, step: int) -> Slots:
    """The slots of a step whose image has any weight."""
    chosen = slots(training, keys, step)
    present = weights[chosen.rows] != 0
    return Slots(chosen.rows[present], chosen.epochs[present])


def _fill(chosen: Slots, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots brought to a length with copies of row 0 that count for nothing: rows, epochs, 1 where real."""
    missing = length - len(chosen.rows)
    rows, epochs = (F.pad(part, (0, missing)) for part in (chosen.rows, chosen.epochs))
    return rows, epochs, F.pad(torch.ones(len(chosen.rows)), (0, missing))


def gradient(
    module: nn.Module, weights: Weights, forward: Forward, output: Output, batch: Batch, at: Draw, scale: Tensor
) -> tuple[float, Weights]:
    """The loss sum_b scale_b f_b and its gradient; no image, no gradient."""
    if not len(batch):
        return 0.0, {name: torch.zeros_like(w) for name, w in weights.items()}
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    value = (measure(module, leaves, forward, output, batch, at) * scale).sum()
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    filled = {
        name: torch.zeros_like(w) if g is None else g for (name, w), g in zip(weights.items(), grads, strict=True)
    }
    return float(value.detach()), filled


def noise_keys(images: Images) -> Tensor:
    """The noise key of every image, without reading its pixels: [n] int64."""
    return torch.tensor([key_of(digest) for digest in images.digests], dtype=torch.int64)


def _placed(state: State, module: nn.Module, engine: Engine) -> State:
    """The state on the engine's device and in the module's order: a checkpoint is read on the CPU, sorted by name, and the
    norm of the gradient is a sum in that order, to the last bit."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parts = (state.weights, state.m, state.v, state.ema)
    weights, m, v, ema = ({name: part[name].to(engine.device) for name in names} for part in parts)
    return State(weights, m, v, ema, state.step)


def reader(images: Images, engine: Engine) -> Callable[[Tensor], Batch]:
    """Rows -> batch on the device; kept in memory when all images fit in the budget, read from disk otherwise."""
    size = images.batch([0]).x0.numel() * torch.finfo(engine.dtype).bits // 8
    if size * len(images) > engine.budget:
        return lambda rows: images.batch(rows.tolist()).to(engine.device, engine.dtype)
    every = images.batch(range(len(images))).to(engine.device, engine.dtype)

    def pick(rows: Tensor) -> Batch:
        there = rows.to(every.x0.device)
        return Batch(every.x0[there], every.keys[rows], {k: v[there] for k, v in every.cond.items()})

    return pick
