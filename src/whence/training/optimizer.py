"""The state of a training, and the optimizers: each one's step and, beside it, the derivative of that step.

    AdamW    m' = b1 m + (1 - b1) g;  v' = b2 v + (1 - b2) g^2
             theta' = (1 - rate decay) theta - rate m'/(1 - b1^k) / (sqrt(v'/(1 - b2^k) + eps_root) + eps)   in step k >= 1
    SGD      m' = momentum m + g;  theta' = (1 - rate decay) theta - rate m'

Both are elementwise, so that a few vectors hold the derivative (`Slopes`). rate is that of the step (see `recipe.Schedule`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whence.types import Weights, WhenceError


@dataclass(frozen=True)
class State:
    """A point of the run.

    Args:
        weights: by parameter.
        m: first moments.
        v: second moments; SGD has none, and leaves them as they are.
        ema: averaged weights; the weights where there is no average.
        step: steps done.
    """

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


def vector(weights: Weights) -> Tensor:
    """All parameters as one vector [D], in the module's order."""
    return torch.cat([w.flatten() for w in weights.values()])


@dataclass(frozen=True, eq=False)
class Slopes:
    """An optimizer's step linearised at a state and a gradient: numbers and vectors [D].

        dm' = held dm + taken dg        dv' = stays dv + by_g dg        dtheta' = kept dtheta + by_m dm' + by_v dv'

    Args:
        m: the first moment after the step.
        kept, held, taken, stays: numbers.
        by_g, by_m, by_v: vectors [D].
    """

    m: Tensor
    kept: float
    held: float
    taken: float
    stays: float
    by_g: Tensor
    by_m: Tensor
    by_v: Tensor


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), whose square root may be smoothed.

    Args:
        learning_rate: at its height (see `recipe.Schedule`).
        beta1, beta2: of the moments.
        eps: added to the square root.
        eps_root: added under it; 0 in torch's AdamW, and above 0 differentiable where the second moment is 0.
        weight_decay: of the weights, times the rate in every step.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.95
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 1e-8
    weight_decay: float = 1e-6

    def update(self, state: State, grads: Weights, rate: float) -> tuple[Weights, Weights, Weights]:
        """(weights, m, v) after a step: a pure, differentiable function of (state, grads).

        Args:
            state: before the step.
            grads: by parameter, clipped.
            rate: the learning rate of the step.
        """
        step = state.step + 1
        correct1, correct2 = 1 - self.beta1**step, 1 - self.beta2**step
        weights, m, v = {}, {}, {}
        for name, g in grads.items():
            kept = (1 - rate * self.weight_decay) * state.weights[name]
            m[name] = torch.lerp(state.m[name], g, 1 - self.beta1)
            v[name] = torch.addcmul(self.beta2 * state.v[name], g, g, value=1 - self.beta2)
            spread = (v[name] / correct2 + self.eps_root).sqrt() + self.eps
            weights[name] = torch.addcdiv(kept, m[name], spread, value=-rate / correct1)
        return weights, m, v

    def slopes(self, state: State, g: Tensor, rate: float) -> Slopes:
        """The derivative of `update`.

        Args:
            state: before the step.
            g: the gradient at it [D], clipped.
            rate: the learning rate of the step.
        """
        step = state.step + 1
        correct1, correct2 = 1 - self.beta1**step, 1 - self.beta2**step
        m = torch.lerp(vector(state.m), g, 1 - self.beta1)
        v = torch.addcmul(self.beta2 * vector(state.v), g, g, value=1 - self.beta2)
        root = (v / correct2 + self.eps_root).sqrt()
        spread = root + self.eps
        bend = rate / correct1 * m / (2 * correct2 * root * spread.square())
        # A parameter that never had a gradient stays where it is: its 0/0 is a 0.
        by_v = torch.where(root > 0, bend, 0.0)
        by_g, by_m = 2 * (1 - self.beta2) * g, -rate / correct1 / spread
        return Slopes(m, 1 - rate * self.weight_decay, self.beta1, 1 - self.beta1, self.beta2, by_g, by_m, by_v)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum and decoupled weight decay.

    Args:
        learning_rate: at its height (see `recipe.Schedule`).
        momentum: 0 for none, below 1.
        weight_decay: of the weights, times the rate in every step.
    """

    learning_rate: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise WhenceError(f"momentum is {self.momentum:g}", "SGD", "0 to below 1")

    def update(self, state: State, grads: Weights, rate: float) -> tuple[Weights, Weights, Weights]:
        """(weights, m, v) after a step; see `AdamW.update`."""
        weights, m = {}, {}
        for name, g in grads.items():
            m[name] = self.momentum * state.m[name] + g
            weights[name] = (1 - rate * self.weight_decay) * state.weights[name] - rate * m[name]
        return weights, m, dict(state.v)

    def slopes(self, state: State, g: Tensor, rate: float) -> Slopes:
        """The derivative of `update`; see `AdamW.slopes`."""
        m, none = self.momentum * vector(state.m) + g, torch.zeros_like(g)
        by_m = torch.full_like(g, -rate)
        return Slopes(m, 1 - rate * self.weight_decay, self.momentum, 1.0, 1.0, none, by_m, none)


Optimizer = AdamW | SGD
"""Anything else with `learning_rate`, `update` and `slopes` is trained and differentiated as well."""
