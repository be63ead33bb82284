"""The derivative of `training.update` by hand: what a step does to small changes of the state, and to adjoints.

Elementwise but for clipping, so a few vectors [D] hold it, shared by all queries and directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.training.optimizer import State
from whence.training.recipe import Training
from whence.types import Weights

STRIP = 4096  # parameters of all adjoints taken at a time, so that they stay in the processor's cache


def vector(weights: Weights) -> Tensor:
    """All parameters as one vector [D], in the module's order."""
    return torch.cat([w.flatten() for w in weights.values()])


def views(rows: Tensor, like: Weights) -> Weights:
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
    dm' = held dm + taken dg'                             dv' = stays dv + by_g dg',  by_g = 2 (1 - b2) g'
    dtheta' = kept dtheta + by_m dm' + by_v dv'           dema' = k dema + (1 - k) dtheta'

    held, taken and stays are b1, 1 - b1 and b2 with AdamW; the momentum, 1 and 1 with SGD, where nothing depends on v.
    """

    g: Tensor
    m: Tensor  # after the step
    factor: float
    fall: float
    kept: float
    average: float | None
    held: float
    taken: float
    stays: float
    by_g: Tensor
    by_m: Tensor
    by_v: Tensor

    @classmethod
    def of(cls, training: Training, state: State, grads: Weights) -> Slopes:
        raw, factor, fall = vector(grads), 1.0, 0.0
        if training.clip is not None:
            norm = float(raw.norm())
            if training.clip < norm + 1e-6:
                factor, fall = training.clip / (norm + 1e-6), training.clip / (norm + 1e-6) ** 2 / norm
        step, rate = state.step + 1, training.rate_at(state.step)
        average = None if training.ema is None else min(training.ema, step / (9 + step))
        kept = 1 - rate * training.decay
        if training.momentum is not None:
            m, none = training.momentum * vector(state.m) + raw * factor, torch.zeros_like(raw)
            by_m = torch.full_like(raw, -rate)
            return cls(raw, m, factor, fall, kept, average, training.momentum, 1.0, 1.0, none, by_m, none)
        correct1, correct2 = 1 - training.beta1**step, 1 - training.beta2**step
        g = raw * factor
        m = torch.lerp(vector(state.m), g, 1 - training.beta1)
        v = torch.addcmul(training.beta2 * vector(state.v), g, g, value=1 - training.beta2)
        root = (v / correct2 + training.eps_root).sqrt()
        spread = root + training.eps
        bend = rate / correct1 * m / (2 * correct2 * root * spread.square())
        # A parameter that never had a gradient stays where it is: its 0/0 is a 0.
        by_v = torch.where(root > 0, bend, 0.0)
        by_g, by_m = 2 * (1 - training.beta2) * g, -rate / correct1 / spread
        b1, b2 = training.beta1, training.beta2
        return cls(raw, m, factor, fall, kept, average, b1, 1 - b1, b2, by_g, by_m, by_v)

    def _clipped(self, dg: Tensor) -> Tensor:
        """f dg - fall g <g, dg>, in place: its own transpose."""
        return dg if self.fall == 0 else dg.addr_(dg @ self.g, self.g, beta=self.factor, alpha=-self.fall)

    def pull(self, a: Adjoint) -> Tensor:
        """The adjoint of g [M, D]; a, of the state after the step, becomes that before it, but for what g adds."""
        p = torch.empty_like(a.m)
        for begin in range(0, p.shape[1], STRIP):
            c = slice(begin, begin + STRIP)
            theta, m, v = a.theta[:, c], a.m[:, c], a.v[:, c]
            if self.average is not None:
                theta.add_(a.final[:, c], alpha=(1 - self.average) * a.share)
            m.addcmul_(theta, self.by_m[c])
            v.addcmul_(theta, self.by_v[c])
            p[:, c] = (self.taken * m).addcmul_(v, self.by_g[c])
            theta.mul_(self.kept)
            m.mul_(self.held)
            v.mul_(self.stays)
        if self.average is not None:
            a.share *= self.average
        return self._clipped(p)

    def push(self, d: Tangent, dg: Tensor) -> Tangent:
        """The change of the state after the step, from that of the state before it and that of g [K, D]."""
        dg = self._clipped(dg)
        m = (self.held * d.m).add_(dg, alpha=self.taken)
        v = (self.stays * d.v).addcmul_(dg, self.by_g)
        theta = (self.kept * d.theta).addcmul_(m, self.by_m).addcmul_(v, self.by_v)
        return Tangent(theta, m, v, theta if self.average is None else torch.lerp(d.ema, theta, 1 - self.average))
