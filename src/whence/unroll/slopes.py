"""The derivative of `training.update` by hand: what a step does to small changes of the state, and to adjoints.

Elementwise but for clipping, so a few vectors [D] hold it, shared by all queries and directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.training import State, Training
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
        raw, factor, fall = vector(grads), 1.0, 0.0
        if training.clip is not None:
            norm = float(raw.norm())
            if training.clip < norm + 1e-6:
                factor, fall = training.clip / (norm + 1e-6), training.clip / (norm + 1e-6) ** 2 / norm
        step, rate = state.step + 1, training.rate_at(state.step)
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
