"""The state of a training, and one step of the optimiser: a pure, differentiable function."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from whence.training.recipe import Training
from whence.types import Weights


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
