"""Differentiating through training: how a measurement of the trained model moves with the weight of each training image.

    loss_t = 1/(B c) sum_slots w_i f(x_i; theta_t)        c = mean weight, held constant (see `training`)
    s_{t+1} = h(s_t, w),   s = (theta, m, v, ema)         h: gradient, clipping, AdamW, averaging
    reverse    a_T = df_q/ds_T;   df_q/dw += (dh/dw)^T a_{t+1};   a_t = (dh/ds)^T a_{t+1}       all images, one query
    forward    ds_{t+1} = (dh/ds) ds_t + (dh/dw) dw                                             all queries, one direction

With g = sum_b s_b grad l_b the gradient of a step, h is elementwise in (theta, m, v, ema, g): its derivative is a few
vectors (`Slopes`), shared by all queries. What is left is p^T dg for M vectors p, that is H p and <grad l_b, p>: one
backward pass of the gradient, linearised once per step and vectorised over p. H is symmetric, so forward mode is the same
pass, and no operation needs a forward derivative (that of group norm fails on some layouts, and that of layer norm cannot
be differentiated again: torch 2.13).

With curvature "gauss-newton", H is replaced by G = sum_b s_b J_b^T (d2 l_b / d prediction^2) J_b. What it leaves out is
sum_b s_b (dl_b / d prediction) . d2 prediction_b, which has mean zero over the noise where the network predicts as well as
it can: in one step it is noise, which hundreds of steps multiply. The derivative is then no longer that of this very
training, but varies much less from one seed to the next: the better estimate of what happens at other seeds.

Images of weight 0 have a slope too. Units: those of the measurement, per unit of weight (1 = the image once). Sources:
Engstrom et al. 2025 (2503.13751), Ilyas & Engstrom 2025 (2504.16430). Differs from released code: noise, order and flips are
keyed by image, the denominator is constant, AdamW is differentiated by hand, and many queries share one replay.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from whence.draws import Draws
from whence.engine import progress, writing
from whence.gradients import check, measure, one, per_image, repeat
from whence.noise import normals, seed_for, stream, uniforms
from whence.outputs import Output
from whence.training import (
    Diverged,
    State,
    Training,
    active_dropout,
    density_of,
    draw,
    gradient,
    mean_weight,
    noise_keys,
    reader,
    shown,
    slots,
    start,
    taught,
    update,
)
from whence.types import Batch, Draw, Engine, Forward, Images, Trainable, Weights, WhenceError

KEEP = ("all", "sqrt", "tree")
CURVATURES = ("hessian", "gauss-newton")
AT_ONCE = 64  # adjoints in one backward pass, where the budget has room for them
FEW = 4  # adjoints up to which gradients are not formed image by image
STRIP = 4096  # parameters of all adjoints taken at a time, so that they stay in the processor's cache


# ------------------------------------------------------------------------------------------------ what is differentiated


@dataclass(frozen=True, eq=False)
class Run:
    """One training, to be differentiated.

    module: the network before its first step; weights [n]: of the images, 1 each by default; constant: the c that losses are
    divided by, the mean of `weights` by default; engine: its budget bounds what is held at once.
    """

    module: nn.Module
    forward: Forward
    images: Images
    training: Training
    weights: Tensor | None = None
    constant: float | None = None
    engine: Engine = Engine()

    @classmethod
    def of(
        cls,
        study: Trainable,
        images: Images,
        seed: int | None = None,
        weights: Tensor | None = None,
        engine: Engine = Engine(),
    ) -> Run:
        """The training of a study with a seed, its own by default; its prior images, if any, come after the images."""
        seed = study.training.seed if seed is None else seed
        images, weights = taught(study, images, weights)
        return cls(study.network_at(seed), study.forward(), images, study.at(seed), weights, engine=engine)

    @property
    def every(self) -> Tensor:
        """The weight of every image: [n]."""
        return torch.ones(len(self.images)) if self.weights is None else self.weights

    @property
    def c(self) -> float:
        return float(mean_weight(self.training, self.every)) if self.constant is None else self.constant

    def at(self, weights: Tensor) -> Run:
        """The same training at other weights, with the same c: the function of the weights that is differentiated."""
        return replace(self, weights=weights, constant=self.c)


@dataclass(frozen=True, eq=False)
class Queries:
    """Measurements of the trained model: the mean over draws of an output on each of m images."""

    images: Images
    output: Output
    draws: Draws


Outputs = Queries | Callable[[Weights], Tensor]
"""What is measured of the final weights: queries, or any differentiable function weights -> [M]."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Sums of outputs: weights @ f. [R]"""

    outputs: Outputs
    weights: Tensor


def _refuse(run: Run) -> None:
    n = len(run.images)
    if type(run.training) is not Training:
        raise WhenceError(
            f"unroll: no derivative of the optimiser of a {type(run.training).__name__}; accepted: Training (AdamW)"
        )
    if active_dropout(run.module):
        raise WhenceError("unroll: the network has active dropout; train and differentiate it with dropout 0")
    if any(isinstance(layer, _BatchNorm) for layer in run.module.modules()):
        raise WhenceError("unroll: batch normalisation mixes the images of a step; use group or layer normalisation")
    if run.every.shape != (n,) or not bool((run.every != 0).any()) or not run.c > 0:
        raise WhenceError(
            f"unroll: {n} images need as many weights, with a mean above 0; got {tuple(run.every.shape)}, mean {run.c:.3g}"
        )
    check(run.training.output, run.forward)


# -------------------------------------------------------------------------------------------------------- one step of it


@dataclass(frozen=True)
class Feed:
    """What one step sees: the image in each slot (rows [b]), its batch and draws."""

    rows: Tensor
    batch: Batch
    at: Draw

    def only(self, here: Tensor) -> Feed:
        """Some of the slots: here [b] bool."""
        if bool(here.all()):
            return self
        there, batch = here.to(self.batch.x0.device), self.batch
        cond = {name: value[there] for name, value in batch.cond.items()}
        picked = Batch(batch.x0[there], batch.keys[here], cond)
        return Feed(self.rows[here], picked, Draw(self.at.t[there], self.at.noise[there]))


Pull = Callable[[tuple[Weights, Tensor]], tuple[Weights, Tensor]]
"""(p, e [b]) -> derivatives of <p, g> + <e, l> with respect to (theta, the scale of each slot [b])."""


class Trainer:
    """The steps of `training.steps`, from any state and one at a time, and their derivative."""

    def __init__(self, run: Run, curvature: str = "hessian"):
        _refuse(run)
        if curvature not in CURVATURES:
            raise WhenceError(f"unroll: curvature={curvature!r} is not one of {', '.join(CURVATURES)}")
        self.curvature = curvature
        self.run, self.training, engine = run, run.training, run.engine
        self.module = run.module.to(engine.device, engine.dtype).train()
        self.read, self.keys = reader(run.images, engine), noise_keys(run.images)
        self.weights, self.constant = run.every, run.training.batch_size * run.c

    def first(self) -> State:
        return start(self.module)

    def feed(self, step: int) -> Feed:
        """All slots of a step, whatever their weight."""
        chosen = slots(self.training, self.keys, step)
        batch = shown(self.training, self.run.images, self.read(chosen.rows), chosen.epochs)
        x0, total = batch.x0, self.run.forward.timesteps
        density = density_of(self.run.forward)
        at = draw([self.training], batch.keys, chosen.epochs, x0.shape[1:], total, x0.dtype, density)
        return Feed(chosen.rows, batch, Draw(at.t.to(x0.device), at.noise.to(x0)))

    def present(self, feed: Feed) -> Tensor:
        """The slots whose image has any weight: [b] bool."""
        return self.weights[feed.rows] != 0

    def scale(self, feed: Feed) -> Tensor:
        """What the loss of each slot is multiplied by: [b]."""
        return self.weights[feed.rows].to(feed.batch.x0) / self.constant

    def after(self, state: State, average: bool = True) -> State:
        """The next state, to the bit that of `training.steps`. Without average its ema is its weights."""
        feed = self.feed(state.step)
        feed = feed.only(self.present(feed))
        given = (self.run.forward, self.training.output, feed.batch, feed.at, self.scale(feed))
        value, grads = gradient(self.module, state.weights, *given)
        if not math.isfinite(value):
            raise Diverged(f"training diverged at step {state.step + 1}: the loss is {value}; lower the learning rate")
        return update(self.training if average else replace(self.training, ema=None), state, grads)

    def losses(self, weights: Weights, scale: Tensor, feed: Feed) -> tuple[Weights, Tensor]:
        """g = sum_b scale_b grad l_b, and l [b]: differentiable in (weights, scale)."""

        def value(w: Weights) -> tuple[Tensor, Tensor]:
            each = measure(self.module, w, self.run.forward, self.training.output, feed.batch, feed.at)
            return (each * scale).sum(), each

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
            gradients, each = grad(value, has_aux=True)(weights)
        return gradients, each

    def step(self, state: State, scale: Tensor, feed: Feed) -> State:
        """h, a pure function of the state and the scale of each slot: the plain form that the rest is tested against."""
        return update(self.training, state, self.losses(state.weights, scale, feed)[0])

    def linearized(self, state: State, feed: Feed) -> tuple[Weights, Pull]:
        """g at a state, and how to pull vectors back through it: one graph for any number of them."""
        if not len(feed.rows):
            zeros = {name: torch.zeros_like(w) for name, w in state.weights.items()}
            return zeros, lambda given: ({name: torch.zeros_like(p) for name, p in given[0].items()}, given[1])
        if self.curvature == "gauss-newton":
            return self._gauss_newton(state, feed)
        (grads, _), pull = vjp(lambda w, s: self.losses(w, s, feed), state.weights, self.scale(feed))  # type: ignore[misc]
        return grads, pull

    def _gauss_newton(self, state: State, feed: Feed) -> tuple[Weights, Pull]:
        """The same with G in place of H: J p for all slots, times what the losses curve, back through J^T."""
        scale, output = self.scale(feed), self.training.output

        def predict(weights: Weights) -> tuple[Tensor, Tensor]:
            def call(*args: object, **kwargs: object) -> object:
                return functional_call(self.module, weights, args, kwargs)

            return self.run.forward(call, feed.batch, feed.at)

        def slope(prediction: Tensor) -> Tensor:
            return grad(lambda y: output.of(y, target, feed.at.t, self.run.forward).sum())(prediction)

        def backward(cotangent: Tensor) -> Weights:  # linear, so that its own derivative is J
            return vjp(predict, state.weights, has_aux=True)[1](cotangent)[0]

        with sdpa_kernel(SDPBackend.MATH):
            prediction, back, target = vjp(predict, state.weights, has_aux=True)  # type: ignore[misc]
            each, bend = vjp(slope, prediction)  # type: ignore[misc]
            _, along = vjp(backward, torch.zeros_like(prediction))  # type: ignore[misc]
        weigh = scale.reshape(-1, *[1] * (prediction.ndim - 1))

        def pull(given: tuple[Weights, Tensor]) -> tuple[Weights, Tensor]:
            p, e = given
            (moved,) = along(p)
            (weights,) = back(weigh * bend(moved)[0] + e.reshape(weigh.shape) * each)
            return weights, (each * moved).flatten(1).sum(1)

        return back(weigh * each)[0], pull

    def linearized_scales(self, state: State, feed: Feed) -> Pull:
        """The same for slots of weight 0, whose gradient is 0 wherever theta goes: a third of the work."""
        _, pull = vjp(lambda s: self.losses(state.weights, s, feed), self.scale(feed))  # type: ignore[misc]
        return lambda given: ({}, pull(given)[0])

    def each(self, state: State, feed: Feed) -> Iterator[tuple[slice, Tensor]]:
        """grad l_b of each slot, some at a time as the budget holds them: [b, D]."""

        def value(w: Weights, x0: Tensor, cond: dict[str, Tensor], t: Tensor, noise: Tensor) -> Tensor:
            one = Batch(x0[None], t[None], {name: c[None] for name, c in cond.items()})
            return measure(self.module, w, self.run.forward, self.training.output, one, Draw(t[None], noise[None]))[0]

        batch, at = feed.batch, feed.at
        size = sum(w.numel() * w.element_size() for w in state.weights.values())
        for rows in _parts_of(len(feed.rows), max(1, self.run.engine.budget // (6 * size))):
            given = (batch.x0[rows], {k: c[rows] for k, c in batch.cond.items()}, at.t[rows], at.noise[rows])
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                blocks = vmap(grad(value), in_dims=(None, 0, 0, 0, 0))(state.weights, *given)
            yield rows, torch.cat([block.flatten(1) for block in blocks.values()], dim=1)


def _parts_of(count: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, count)) for begin in range(0, count, size))


def _pulled(pull: Pull, p: Weights, e: Tensor, at_once: int) -> Iterator[tuple[slice, Weights, Tensor]]:
    """M vectors p [M, ...], e [M, b] pulled back, `at_once` at a time."""
    for begin in range(0, len(e), at_once):
        rows = slice(begin, min(begin + at_once, len(e)))
        if rows.stop - begin == 1:  # no machinery for a single one
            weights, scale = pull(({name: value[begin] for name, value in p.items()}, e[begin]))
            yield rows, {name: value[None] for name, value in weights.items()}, scale[None]
        else:
            weights, scale = vmap(pull)(({name: value[rows] for name, value in p.items()}, e[rows]))
            yield rows, weights, scale


def _flat(weights: Weights) -> Tensor:
    """All parameters as one vector [D], in the module's order."""
    return torch.cat([w.flatten() for w in weights.values()])


def _views(rows: Tensor, like: Weights) -> Weights:
    """Rows [M, D] by parameter: [M, ...] each, views."""
    pieces = rows.split([w.numel() for w in like.values()], dim=1)
    return {name: piece.unflatten(1, w.shape) if w.ndim else piece[:, 0]
            for (name, w), piece in zip(like.items(), pieces, strict=True)}  # fmt: skip


@dataclass
class Adjoint:
    """df_q / d(theta, m, v, ema) of M queries, [M, D] each. That of ema is df_q / d(final ema) times a number, `share`."""

    theta: Tensor
    m: Tensor
    v: Tensor
    final: Tensor
    share: float = 1.0

    @classmethod
    def of(cls, training: Training, final: Tensor) -> Adjoint:
        """After the last step, from df_q / d(final averaged weights)."""
        zeros = torch.zeros_like(final)
        return cls(final.clone() if training.ema is None else zeros, zeros.clone(), zeros.clone(), final)


@dataclass(frozen=True, eq=False)
class Tangent:
    """d(theta, m, v, ema) along K directions, [K, D] each."""

    theta: Tensor
    m: Tensor
    v: Tensor
    ema: Tensor


@dataclass(frozen=True, eq=False)
class Slopes:
    """`training.update` linearised at one step: what it does to small changes, and, transposed, to adjoints. Vectors [D].

    dg' = f dg - fall g <g, dg>                           f = min(1, clip / (|g| + 1e-6)), g' = f g
    dm' = b1 dm + (1 - b1) dg'                            dv' = b2 dv + by_g dg',  by_g = 2 (1 - b2) g'
    dtheta' = kept dtheta + by_m dm' + by_v dv'           dema' = k dema + (1 - k) dtheta'
    """

    training: Training
    g: Tensor
    m: Tensor  # after the step
    factor: float
    fall: float
    kept: float
    average: float | None
    by_g: Tensor
    by_m: Tensor
    by_v: Tensor

    @classmethod
    def of(cls, training: Training, state: State, grads: Weights) -> Slopes:
        raw, factor, fall = _flat(grads), 1.0, 0.0
        if training.clip is not None:
            norm = float(raw.norm())
            if training.clip < norm + 1e-6:
                factor, fall = training.clip / (norm + 1e-6), training.clip / (norm + 1e-6) ** 2 / norm
        step, rate = state.step + 1, training.rate_at(state.step)
        correct1, correct2 = 1 - training.beta1**step, 1 - training.beta2**step
        g = raw * factor
        m = torch.lerp(_flat(state.m), g, 1 - training.beta1)
        v = torch.addcmul(training.beta2 * _flat(state.v), g, g, value=1 - training.beta2)
        root = (v / correct2 + training.eps_root).sqrt()
        spread = root + training.eps
        bend = rate / correct1 * m / (2 * correct2 * root * spread.square())
        # A parameter that never had a gradient stays where it is: its 0/0 is a 0.
        by_v = torch.where(root > 0, bend, 0.0)
        by_g, by_m = 2 * (1 - training.beta2) * g, -rate / correct1 / spread
        average = None if training.ema is None else min(training.ema, step / (9 + step))
        return cls(training, raw, m, factor, fall, 1 - rate * training.decay, average, by_g, by_m, by_v)

    def _clipped(self, dg: Tensor) -> Tensor:
        """f dg - fall g <g, dg>, in place: its own transpose."""
        return dg if self.fall == 0 else dg.addr_(dg @ self.g, self.g, beta=self.factor, alpha=-self.fall)

    def pull(self, a: Adjoint) -> Tensor:
        """The adjoint of g [M, D]; a, of the state after the step, becomes that before it, but for what g adds."""
        b1, b2 = self.training.beta1, self.training.beta2
        p = torch.empty_like(a.m)
        for begin in range(0, p.shape[1], STRIP):
            c = slice(begin, begin + STRIP)
            theta, m, v = a.theta[:, c], a.m[:, c], a.v[:, c]
            if self.average is not None:
                theta.add_(a.final[:, c], alpha=(1 - self.average) * a.share)
            m.addcmul_(theta, self.by_m[c])
            v.addcmul_(theta, self.by_v[c])
            p[:, c] = ((1 - b1) * m).addcmul_(v, self.by_g[c])
            theta.mul_(self.kept)
            m.mul_(b1)
            v.mul_(b2)
        if self.average is not None:
            a.share *= self.average
        return self._clipped(p)

    def push(self, d: Tangent, dg: Tensor) -> Tangent:
        """The change of the state after the step, from that of the state before it and that of g [K, D]."""
        b1, b2 = self.training.beta1, self.training.beta2
        dg = self._clipped(dg)
        m, v = torch.lerp(d.m, dg, 1 - b1), (b2 * d.v).addcmul_(dg, self.by_g)
        theta = (self.kept * d.theta).addcmul_(m, self.by_m).addcmul_(v, self.by_v)
        return Tangent(theta, m, v, theta if self.average is None else torch.lerp(d.ema, theta, 1 - self.average))


# -------------------------------------------------------------------------------------------- going back over the steps


class _Kept:
    """States by step, in memory up to some bytes and in a folder beyond; their averaged weights are not kept."""

    def __init__(self, room: int, folder: Path | None):
        self.room, self.folder = room, folder
        self.held: dict[int, State] = {}

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"state-{step:06d}.safetensors"

    def put(self, state: State) -> None:
        if len(self.held) < self.room or self.folder is None:
            self.held[state.step] = replace(state, ema=state.weights)
            return
        parts = {"weights": state.weights, "m": state.m, "v": state.v}
        flat = {f"{part}/{name}": w.cpu().contiguous() for part, values in parts.items() for name, w in values.items()}
        with writing(self._path(state.step)) as temporary:
            temporary.write_bytes(save(flat))

    def get(self, step: int, like: State) -> State:
        if step in self.held:
            return self.held[step]
        flat = load_file(self._path(step))
        weights, m, v = (
            {name: flat[f"{part}/{name}"].to(w.device) for name, w in like.weights.items()}
            for part in ("weights", "m", "v")
        )
        return State(weights, m, v, weights, step)

    def drop(self, step: int) -> None:
        if step in self.held:
            del self.held[step]
        else:
            self._path(step).unlink()


def _parts(low: int, high: int, fan: int) -> range:
    """Where the at most `fan` parts of the steps low .. high-1 begin."""
    return range(low, high, -(-(high - low) // fan))


def _held(total: int, fan: int) -> int:
    """States held at once while going back over `total` steps."""
    if total == 1:
        return 1
    starts = _parts(0, total, fan)
    return len(starts) - 1 + _held(min(starts.step, total), fan)


def _backwards(trainer: Trainer, kept: _Kept, low: int, high: int, fan: int, final: State) -> Iterator[State]:
    """The states before steps high-1, ..., low. The first of each part is kept at every level, the rest recomputed."""
    if high - low == 1:
        yield kept.get(low, final)
        return
    starts = _parts(low, high, fan)
    state = kept.get(low, final)
    while state.step < starts[-1]:
        state = trainer.after(state, average=False)
        if state.step in starts:
            kept.put(state)
    del state
    for begin in reversed(starts):
        yield from _backwards(trainer, kept, begin, min(begin + starts.step, high), fan, final)
        if begin != low:
            kept.drop(begin)


def _replayed(trainer: Trainer, kept: _Kept, fan: int, final: State) -> Iterator[State]:
    """The states before steps T-1, ..., 0. The first level of `_backwards` is kept already, and stays."""
    total = trainer.training.steps
    starts = _parts(0, total, fan)
    for begin in reversed(starts):
        yield from _backwards(trainer, kept, begin, min(begin + starts.step, total), fan, final)


def _trained(trainer: Trainer, kept: _Kept, fan: int, what: str) -> State:
    """The final state, leaving the first of each part behind."""
    total = trainer.training.steps
    starts = _parts(0, total, fan)
    state = trainer.first()
    for _ in progress(range(total), f"{what}: training"):
        if state.step in starts:
            kept.put(state)
        state = trainer.after(state)
    if not all(bool(torch.isfinite(w).all()) for w in state.weights.values()):
        raise Diverged("training diverged at the last step: a weight is NaN or Inf; lower the learning rate")
    return state


def same_end(run: Run, ended: Weights, trained: Weights) -> None:
    """Refuse a replay whose averaged weights end elsewhere than the model did."""
    missing = sorted(ended.keys() - trained.keys())
    if missing:
        raise WhenceError(f"unroll: the trained model has no parameter {missing[0]!r}; it is not of this study")
    begun = start(run.module).weights

    def distance(a: Weights, b: Weights) -> float:
        return math.sqrt(sum(float((w.double() - b[name].to(w).double()).square().sum()) for name, w in a.items()))

    apart, way = distance(ended, trained), distance(ended, begun)
    if not apart <= 1e-3 * way:
        raise WhenceError(
            f"unroll: replayed to step {run.training.steps}, training ends {apart / way:.1e} of its way from the model "
            "given; recipe, seed, images and number format must be those it was trained with"
        )


def _reproduced(m: Tensor, later: State) -> None:
    """Refuse a step that gives another first moment than when it was taken."""
    then = _flat(later.m)
    apart, most = float((m - then).abs().max()), float(then.abs().max())
    # Not to the bit: the batch that is differentiated may be summed in another order.
    if not apart <= (1e-8 if m.dtype == torch.float64 else 1e-3) * most:
        raise WhenceError(
            f"unroll: step {later.step} gives other numbers when it is replayed (its moment is {apart:.1e} off); images, "
            "network and forward must be the same every time"
        )


# ----------------------------------------------------------------------------------------------------- what is measured


def _loaded(trainer: Trainer, weights: Weights) -> nn.Module:
    module = copy.deepcopy(trainer.module)
    module.load_state_dict(weights, strict=False)
    return module.eval()


def _check_queries(queries: Queries, forward: Forward) -> None:
    check(queries.output, forward)
    if queries.draws.unit:
        raise WhenceError("unroll: unit draws are no measurement, they only rescale gradients; give draws without unit")


def _values(trainer: Trainer, outputs: Outputs, weights: Weights) -> Tensor:
    """f of every query at these weights: [M] float64."""
    if not isinstance(outputs, Queries):
        with torch.no_grad():
            return outputs(weights).double().cpu()
    _check_queries(outputs, trainer.run.forward)
    engine, module, found = trainer.run.engine, _loaded(trainer, weights), []
    with torch.no_grad():
        for row in range(len(outputs.images)):
            image = outputs.images.batch([row]).to(engine.device, engine.dtype)
            at = outputs.draws(image.keys, image.x0.shape[1:], trainer.run.forward.timesteps, engine.dtype)
            at = Draw(at.t[0].to(image.x0.device), at.noise[0].to(image.x0))
            batch = repeat(one(image, 0), outputs.draws.count)
            found.append(measure(module, {}, trainer.run.forward, outputs.output, batch, at).double().mean())
    return torch.stack(found).cpu()


def _slopes_at_the_end(trainer: Trainer, outputs: Outputs | Mixed, weights: Weights, rows: range) -> Tensor:
    """df_q / d(final averaged weights) of some queries: [M, D]."""
    engine = trainer.run.engine
    if isinstance(outputs, Mixed):
        total = torch.zeros(
            len(rows), sum(w.numel() for w in weights.values()), device=engine.device, dtype=engine.dtype
        )
        for q in range(outputs.weights.shape[1]):
            slope = _slopes_at_the_end(trainer, outputs.outputs, weights, range(q, q + 1))
            total.addr_(outputs.weights[rows.start : rows.stop, q].to(total), slope[0])
        return total
    if isinstance(outputs, Queries):
        _check_queries(outputs, trainer.run.forward)
        module, names = _loaded(trainer, weights), list(weights)
        batch = outputs.images.batch(rows).to(engine.device, engine.dtype)
        pieces = per_image(module, trainer.run.forward, outputs.output, outputs.draws, batch, names, engine.batch_size)
        return torch.cat([torch.cat([blocks[name] for name in names], dim=1) for _, blocks in pieces])
    leaves = {name: w.detach().clone().requires_grad_() for name, w in weights.items()}
    values = outputs(leaves)
    every = list(leaves.values())
    grads = [torch.autograd.grad(values[q], every, retain_graph=True, materialize_grads=True) for q in rows]
    return torch.stack([torch.cat([g.flatten() for g in of]) for of in grads])


def _count(outputs: Outputs, weights: Weights) -> int:
    if isinstance(outputs, Queries):
        if not len(outputs.images):
            raise WhenceError("unroll: there is no query")
        return len(outputs.images)
    with torch.no_grad():
        found = outputs(weights)
    if found.ndim != 1 or not len(found):
        raise WhenceError(f"unroll: outputs must be a function weights -> [M]; it returns shape {tuple(found.shape)}")
    return len(found)


# --------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class _Plan:
    """States held in memory, adjoints in one backward pass, queries in one replay."""

    states: int
    at_once: int
    queries: int


def _plan(trainer: Trainer, keep: str, spill: Path | None) -> _Plan:
    """What fits in the budget: half for states, a quarter for a backward pass, the rest for adjoints."""
    steps, budget = trainer.training.steps, trainer.run.engine.budget
    one_copy = sum(w.numel() * w.element_size() for w in trainer.first().weights.values())
    state = 3 * one_copy
    needs = {name: _held(steps, _fan(name, steps)) * state for name in KEEP}
    states = _held(steps, _fan(keep, steps))
    if needs[keep] > budget // 2:
        if spill is None:
            less = ", ".join(f"keep={name!r} ({_mb(needs[name])})" for name in KEEP if needs[name] < needs[keep])
            raise WhenceError(
                f"unroll: keep={keep!r} holds {_mb(needs[keep])} of states, over half of the budget of {_mb(budget)}; "
                f"accepted: {less + ', ' if less else ''}a spill folder on disk, a larger Engine(budget=...)"
            )
        states = budget // 2 // state
    once = 3 * _activations(trainer) + 2 * one_copy  # of one adjoint in a backward pass
    at_once = max(1, min(AT_ONCE, budget // 4 // once))
    adjoint = 5 * one_copy
    free = budget - states * state - at_once * once
    if free < adjoint:
        raise WhenceError(
            f"unroll: the adjoint of one query takes {_mb(adjoint)}, but of the budget of {_mb(budget)} only {_mb(free)} is "
            "left; keep fewer states or give a larger Engine(budget=...)"
        )
    return _Plan(states, at_once, free // adjoint)


def _fan(keep: str, steps: int) -> int:
    """Into how many parts a stretch of steps is cut, again and again, to go back over it."""
    if keep not in KEEP:
        raise WhenceError(f"unroll: keep={keep!r} is not one of {', '.join(KEEP)}")
    return {"all": steps, "sqrt": math.isqrt(steps - 1) + 1, "tree": 2}[keep]


def _mb(count: int) -> str:
    return f"{max(0, count) / 2**20:.3g} MB"


def _activations(trainer: Trainer) -> int:
    """Bytes that the forward pass of a step leaves for its backward pass."""
    feed, found = trainer.feed(0), 0

    def pack(value: Tensor) -> Tensor:
        nonlocal found
        found += value.numel() * value.element_size()
        return value

    leaves = {name: w.requires_grad_() for name, w in trainer.first().weights.items()}
    with saved_tensors_hooks(pack, lambda value: value):
        measure(trainer.module, leaves, trainer.run.forward, trainer.training.output, feed.batch, feed.at)
    return found


# ------------------------------------------------------------------------------------------------------------- reverse


def metagradient(
    run: Run,
    outputs: Outputs,
    keep: str = "sqrt",
    spill: Path | None = None,
    trained: Weights | None = None,
    what: str = "metagradient",
    curvature: str = "hessian",
    fresh: int | None = None,
    mix: Tensor | None = None,
) -> Tensor:
    """df_q / dw_i of every query and training image at the weights of the run: [M, n] float64.

    keep: which states of the training stay in memory: "all"; "sqrt", about 2 sqrt(T) of them, the rest computed again, once;
    "tree", log2(T) of them, each step computed log2(T)/2 times more. All give the same numbers. spill: a folder for states
    beyond half of the engine's budget. trained: the averaged weights that the run is said to have ended with. curvature:
    "hessian", the derivative itself, or "gauss-newton", see above. fresh: images a step whose slopes are taken, in an order
    and with noise of their own, in place of the slots of the step: df/dw_i as the mean over the orders and noise that the
    training might as well have had, along the path it took. mix [R, M]: the derivatives of the sums mix @ f instead, [R, n].
    Queries are taken as many at a time as the budget holds. Errors: WhenceError for what cannot be differentiated or
    replayed, and when the budget is too small, saying what helps.
    """
    trainer = Trainer(run, curvature)
    other = None if fresh is None else Trainer(_elsewhere(run, fresh))
    steps, n = trainer.training.steps, len(run.images)
    fan, plan = _fan(keep, steps), _plan(trainer, keep, spill)
    with ExitStack() as stack:
        folder = None
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=spill)))
        kept = _Kept(plan.states, folder)
        final = _trained(trainer, kept, fan, what)
        if trained is not None:
            same_end(run, final.ema, trained)
        count = _count(outputs, final.ema)
        asked: Outputs | Mixed = outputs
        if mix is not None:
            asked, count = Mixed(outputs, mix), len(mix)
        total = torch.zeros(count, n, dtype=torch.float64)
        pieces = -(-count // plan.queries)
        for begin in (rows := _parts(0, count, pieces)):
            chunk = range(begin, min(begin + rows.step, count))
            name = what if pieces == 1 else f"{what}: queries {chunk.start + 1}-{chunk.stop} of {count}"
            states = progress(_replayed(trainer, kept, fan, final), name, steps)
            total[chunk.start : chunk.stop] = _reverse(trainer, other, asked, final, states, chunk, plan.at_once)
    bad = (~torch.isfinite(total)).nonzero()
    if len(bad):
        raise WhenceError(
            f"unroll: {len(bad)} derivatives are not finite, the first for image {run.images.ids[int(bad[0, 1])]!r}; "
            f"training is not smooth enough: {_levers(run.training)}"
        )
    return total


def _elsewhere(run: Run, count: int) -> Run:
    """A run that takes `count` images a step in another order, with other noise."""
    if count < 1:
        raise WhenceError(f"unroll: fresh={count}; at least 1 image a step is needed")
    return replace(run, training=replace(run.training, batch_size=count, seed=seed_for(run.training.seed, "fresh")))


def _reverse(
    trainer: Trainer,
    other: Trainer | None,
    outputs: Outputs | Mixed,
    final: State,
    states: Iterator[State],
    rows: range,
    at_once: int,
) -> Tensor:
    """The rows of some queries, from the states before steps T-1, ..., 0. other: whose feeds the images' slopes are of."""
    adjoint = Adjoint.of(trainer.training, _slopes_at_the_end(trainer, outputs, final.ema, rows))
    into = _views(adjoint.theta, final.weights)
    device = adjoint.theta.device
    total = torch.zeros(len(rows), len(trainer.run.images), dtype=torch.float64, device=device)
    later = final
    for state in states:
        feed = trainer.feed(state.step)
        here = trainer.present(feed)
        present = feed.only(here)
        grads, pull = trainer.linearized(state, present)
        slopes = Slopes.of(trainer.training, state, grads)
        _reproduced(slopes.m, later)
        flat = slopes.pull(adjoint)
        p = _views(flat, final.weights)
        apart, constant = feed.only(~here), trainer.constant
        if other is not None:
            apart, constant = other.feed(state.step), other.constant
        shared = len(rows) > FEW  # then gradients image by image are shared by enough queries
        if shared:
            for some, gradients in trainer.each(state, apart):
                products = (flat @ gradients.mT).double() / constant
                total.index_add_(1, apart.rows[some].to(device), products)
        elif len(apart.rows):
            through = trainer.linearized_scales(state, apart)
            no_losses = adjoint.theta.new_zeros(len(rows), len(apart.rows))
            for piece, _, scale in _pulled(through, p, no_losses, at_once):
                total[piece].index_add_(1, apart.rows.to(device), scale.double() / constant)
        no_losses = adjoint.theta.new_zeros(len(rows), len(present.rows))
        for piece, weights, scale in _pulled(pull, p, no_losses, at_once):
            for name, value in weights.items():
                into[name][piece] += value
            if other is None:
                total[piece].index_add_(1, present.rows.to(device), scale.double() / constant)
        later = state
    return total.cpu()


# ------------------------------------------------------------------------------------------------------------- forward


def final_weights(run: Run) -> Weights:
    """The averaged weights a run ends with."""
    trainer = Trainer(run)
    state = trainer.first()
    for _ in range(trainer.training.steps):
        state = trainer.after(state)
    return state.ema


def tangent(
    run: Run, direction: Tensor, what: str = "tangent", curvature: str = "hessian", fresh: int | None = None
) -> tuple[Weights, Weights]:
    """Final averaged weights, and how they move when the image weights move along a direction.

        d theta = sum_i direction_i d theta / d w_i

    direction [n], or [K, n] for K at once, whose changes then have a leading axis K: an image, a contributor, or minus the
    indicator of a set R, which makes theta + d theta the model without R to first order. Any measurement follows from it.
    curvature, fresh: as in `metagradient`.
    """
    trainer, training = Trainer(run, curvature), run.training
    other = None if fresh is None else Trainer(_elsewhere(run, fresh))
    if direction.shape[-1:] != (len(run.images),) or direction.ndim > 2:
        raise WhenceError(
            f"tangent: directions have shape [n] or [K, n], n = {len(run.images)}; got {tuple(direction.shape)}"
        )
    state, ways = trainer.first(), direction.reshape(-1, len(run.images))
    zeros = torch.zeros_like(_flat(state.weights)).repeat(len(ways), 1)
    d = Tangent(zeros, zeros, zeros, zeros)
    for _ in progress(range(training.steps), what):
        feed = trainer.feed(state.step)
        present = trainer.present(feed)
        feed = feed.only(present if other is not None else present | (ways[:, feed.rows] != 0).any(0))
        grads, pull = trainer.linearized(state, feed)
        moved = ways[:, feed.rows].to(feed.batch.x0) / trainer.constant
        if other is not None:
            moved = torch.zeros_like(moved)
        # dg = H dtheta + sum_b dscale_b grad l_b, H being symmetric: (dtheta, dscale) pulled back.
        pieces = _pulled(pull, _views(d.theta, grads), moved, AT_ONCE)
        dg = torch.cat([torch.cat([g.flatten(1) for g in piece.values()], dim=1) for _, piece, _ in pieces])
        if other is not None:
            there = other.feed(state.step)
            for rows, each in trainer.each(state, there):
                dg.addmm_(ways[:, there.rows[rows]].to(each), each, alpha=1 / other.constant)
        d = Slopes.of(training, state, grads).push(d, dg)
        state = update(training, state, grads)
    changes = _views(d.ema, state.weights)
    return state.ema, changes if direction.ndim == 2 else {name: value[0] for name, value in changes.items()}


def sketched(
    run: Run,
    outputs: Outputs,
    rank: int,
    keep: str = "sqrt",
    spill: Path | None = None,
    trained: Weights | None = None,
    what: str = "metagradient",
    curvature: str = "hessian",
    fresh: int | None = None,
) -> Tensor:
    """`metagradient` Y [M, n] at the price of `rank` queries, from what sums of outputs share.

        S = Z Y  (reverse mode, Z [rank, M] random)      Q = an orthonormal basis of the rows of S      Y ~ (Y Q) Q^T

    with Y Q from forward mode along the columns of Q, for all queries at once: exact where Y has that rank. Each output
    counts by its slope, so that none drowns. Sources: the randomised range finder (Halko et al. 2011); MAGE and SPELL for
    sharing replays.
    """
    if rank < 1:
        raise WhenceError(f"unroll: rank={rank}; at least 1 is needed")
    final = final_weights(run)
    if rank >= (count := _count(outputs, final)):
        return metagradient(run, outputs, keep, spill, trained, what, curvature, fresh)
    trainer = Trainer(run)
    slopes = torch.cat([_slopes_at_the_end(trainer, outputs, final, range(q, q + 1)) for q in range(count)])
    size = slopes.norm(dim=1).clamp(min=torch.finfo(slopes.dtype).tiny)
    keys = stream(seed_for(run.training.seed, "sketch"), torch.zeros(rank, dtype=torch.int64), torch.arange(rank))
    mix = normals(keys, (count,), slopes.dtype).to(slopes) / size
    summed = metagradient(run, outputs, keep, spill, trained, what, curvature, fresh, mix)
    basis = torch.linalg.qr(summed.mT).Q
    _, moved = tangent(run, basis.mT, f"{what}: forward", curvature, fresh)
    along = torch.cat([change.flatten(1) for change in moved.values()], dim=1)
    return (slopes @ along.mT).double().cpu() @ basis.mT


# --------------------------------------------------------------------------------------------- checks of the derivative


def finite_difference(run: Run, outputs: Outputs, directions: Tensor, step: float = 1e-5) -> Tensor:
    """( f_q(w + step v) - f_q(w - step v) ) / (2 step) from two trainings per direction: [K, n] -> [M, K] float64.

    What `metagradient(...) @ directions.T` must be; use an Engine of dtype float64.
    """
    trainer, weights = Trainer(run), run.every.double()
    found = []
    for way in directions.double():
        up, down = (_values(trainer, outputs, final_weights(run.at(weights + s * way))) for s in (step, -step))
        found.append((up - down) / (2 * step))
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Smoothness:
    """score in [-1, 1]; enough: whether it reaches what was asked; text: a sentence for people."""

    score: float
    enough: bool
    text: str


def smoothness(run: Run, step: float = 0.1, seed: int = 0, least: float = 0.5) -> Smoothness:
    """How straight the trained weights move along a random direction v of image weights: the metasmoothness score.

        d1 = theta(w + h v) - theta(w);  d2 = theta(w + 2 h v) - theta(w + h v);  v_i = +-1 (+1 where w_i = 0)
        score = sum_j |d1_j| sign(d1_j) sign(d2_j) / sum_j |d1_j|

    Three trainings. 1 for a straight line, 0 for noise: a derivative through training then tells nothing about removals.
    Source: Definition 2 of 2503.13751, whose weighting is our reading.
    """
    weights, keys = run.every, noise_keys(run.images)
    signs = torch.where(uniforms(stream(seed_for(seed, "smoothness"), 0, keys), 1)[:, 0] < 0.5, -1.0, 1.0)
    way = torch.where(weights == 0, 1.0, signs).double()
    points = []
    for k in range(3):
        final = final_weights(run.at(weights.double() + k * step * way))
        points.append(_flat(final).double())
    first, second = points[1] - points[0], points[2] - points[1]
    score = float((first.abs() * first.sign() * second.sign()).sum() / first.abs().sum())
    found = f"metasmoothness {score:.2f}"
    if not score >= least:
        text = f"{found}, below {least:g}: derivatives through this training mislead; {_levers(run.training)}"
    else:
        text = f"{found}, at least {least:g}: small changes of the image weights move the trained model along a line"
    if run.training.eps_root == 0:
        text += "; eps_root is 0, where Adam's square root has no slope bound: 1e-8 or more is safer"
    return Smoothness(score, score >= least, text)


def _levers(training: Training) -> str:
    """What makes a training smoother in its weights, and how it is set now."""
    return (
        f"smoother with larger batches (now {training.batch_size}), averaged weights (ema, now {training.ema}), a lower "
        f"rate (now {training.rate:g}) or longer warm-up (now {training.warmup}), clipping (now {training.clip}), weight "
        f"decay (now {training.decay:g}) or eps_root 1e-8 to 1e-2 (now {training.eps_root:g})"
    )
