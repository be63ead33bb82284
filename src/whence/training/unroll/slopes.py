"""The derivative of `training.recipe.update` by hand: what a step does to small changes of the state, and to adjoints.

Elementwise but for clipping, so a few vectors [D] hold it, shared by all queries and directions; each optimizer has its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.training.optimizer import Slopes, State, vector
from whence.training.recipe import Recipe
from whence.types import Weights

STRIP = 4096  # parameters of all adjoints taken at a time, so that they stay in the processor's cache


def views(rows: Tensor, like: Weights) -> Weights:
    """Rows [M, D] by parameter: [M, ...] each, views."""
    pieces = rows.split([w.numel() for w in like.values()], dim=1)
    return {name: piece.unflatten(1, w.shape) if w.ndim else piece[:, 0]
            for (name, w), piece in zip(like.items(), pieces, strict=True)}  # fmt: skip


@dataclass
class Adjoint:
    """df_q / d(theta, m, v, ema) of M queries. That of ema is df_q / d(final ema) times a number.

    Args:
        theta: [M, D].
        m: [M, D].
        v: [M, D].
        final: df_q / d(final ema) [M, D].
        share: the number.
    """

    theta: Tensor
    m: Tensor
    v: Tensor
    final: Tensor
    share: float = 1.0

    @classmethod
    def of(cls, recipe: Recipe, final: Tensor) -> Adjoint:
        """After the last step, from df_q / d(final averaged weights)."""
        zeros = torch.zeros_like(final)
        return cls(final.clone() if not recipe.ema else zeros, zeros.clone(), zeros.clone(), final)


@dataclass(frozen=True, eq=False)
class Tangent:
    """d(theta, m, v, ema) along K directions.

    Args:
        theta: [K, D].
        m: [K, D].
        v: [K, D].
        ema: [K, D].
    """

    theta: Tensor
    m: Tensor
    v: Tensor
    ema: Tensor


@dataclass(frozen=True, eq=False)
class StepSlopes:
    """`update` linearised at one step: what it does to small changes, and, transposed, to adjoints.

        dg' = f dg - fall g <g, dg>          f = min(1, max_grad_norm / (|g| + 1e-6)), g' = f g
        then the optimizer's (see `optimizer.Slopes`), and dema' = k dema + (1 - k) dtheta'

    Args:
        g: the gradient before clipping [D].
        factor: f.
        fall: 0 where nothing is clipped.
        average: k; None where weights are not averaged.
        own: the optimizer's.
    """

    g: Tensor
    factor: float
    fall: float
    average: float | None
    own: Slopes

    @classmethod
    def of(cls, recipe: Recipe, state: State, grads: Weights) -> StepSlopes:
        """The derivative of one step.

        Args:
            recipe: of the training.
            state: before the step.
            grads: the gradient at it.
        """
        raw, factor, fall, limit = vector(grads), 1.0, 0.0, recipe.max_grad_norm
        if limit:
            norm = float(raw.norm())
            if limit < norm + 1e-6:
                factor, fall = limit / (norm + 1e-6), limit / (norm + 1e-6) ** 2 / norm
        own = recipe.optimizer.slopes(state, raw * factor, recipe.rate_at(state.step))
        return cls(raw, factor, fall, recipe.averaged(state.step + 1), own)

    def _clipped(self, dg: Tensor) -> Tensor:
        """f dg - fall g <g, dg>, in place: its own transpose."""
        return dg if self.fall == 0 else dg.addr_(dg @ self.g, self.g, beta=self.factor, alpha=-self.fall)

    def pull(self, a: Adjoint) -> Tensor:
        """The adjoint of g [M, D]; a, of the state after the step, becomes that before it, but for what g adds."""
        p, own = torch.empty_like(a.m), self.own
        for begin in range(0, p.shape[1], STRIP):
            c = slice(begin, begin + STRIP)
            theta, m, v = a.theta[:, c], a.m[:, c], a.v[:, c]
            if self.average is not None:
                theta.add_(a.final[:, c], alpha=(1 - self.average) * a.share)
            m.addcmul_(theta, own.by_m[c])
            v.addcmul_(theta, own.by_v[c])
            p[:, c] = (own.taken * m).addcmul_(v, own.by_g[c])
            theta.mul_(own.kept)
            m.mul_(own.held)
            v.mul_(own.stays)
        if self.average is not None:
            a.share *= self.average
        return self._clipped(p)

    def push(self, d: Tangent, dg: Tensor) -> Tangent:
        """The change of the state after the step, from that of the state before it and that of g [K, D]."""
        dg, own = self._clipped(dg), self.own
        m = (own.held * d.m).add_(dg, alpha=own.taken)
        v = (own.stays * d.v).addcmul_(dg, own.by_g)
        theta = (own.kept * d.theta).addcmul_(m, own.by_m).addcmul_(v, own.by_v)
        return Tangent(theta, m, v, theta if self.average is None else torch.lerp(d.ema, theta, 1 - self.average))
