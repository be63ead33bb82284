"""Checks by training again: the derivative against differences, and whether the training is smooth enough to have one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from whence.diffusion.noise import seed_for, stream, uniforms
from whence.training.optimizer import AdamW, vector
from whence.training.order import noise_keys
from whence.training.recipe import Recipe
from whence.training.unroll.measured import Outputs, values
from whence.training.unroll.run import Run, Trainer, final_weights


def finite_difference(run: Run, outputs: Outputs, directions: Tensor, step: float = 1e-5) -> Tensor:
    """( f_q(w + step v) - f_q(w - step v) ) / (2 step) from two trainings per direction: [M, K] float64.

    What `metagradient(...) @ directions.T` must be; use an Engine of dtype float64.

    Args:
        run: the training, at weights w.
        outputs: M measurements f of the trained model.
        directions: v of the image weights [K, n].
        step: of the difference.
    """
    trainer, weights = Trainer(run), run.all_weights.double()
    found = []
    for way in directions.double():
        up, down = (values(trainer, outputs, final_weights(run.at(weights + s * way))) for s in (step, -step))
        found.append((up - down) / (2 * step))
    return torch.stack(found, dim=1)


@dataclass(frozen=True)
class Smoothness:
    """How smooth a training is in its image weights.

    Args:
        score: in [-1, 1].
        enough: whether it reaches what was asked.
        text: a sentence for people.
    """

    score: float
    enough: bool
    text: str


def smoothness(run: Run, step: float = 0.1, seed: int = 0, min_smoothness: float = 0.5) -> Smoothness:
    """How straight the trained weights move when image weights move along a random direction v: the metasmoothness score.

        d1 = theta(w + h v) - theta(w);  d2 = theta(w + 2 h v) - theta(w + h v);  v_i = +-1 (+1 where w_i = 0)
        score = sum_j |d1_j| sign(d1_j) sign(d2_j) / sum_j |d1_j|

    Three trainings. 1 for a straight line, 0 for noise: a derivative through training then tells nothing about removals.
    Source: Definition 2 of 2503.13751, whose weighting is our reading.

    Args:
        run: the training, at weights w.
        step: h.
        seed: of the direction.
        min_smoothness: the score that is enough.
    """
    weights, keys = run.all_weights, noise_keys(run.images)
    signs = torch.where(uniforms(stream(seed_for(seed, "smoothness"), 0, keys), 1)[:, 0] < 0.5, -1.0, 1.0)
    way = torch.where(weights == 0, 1.0, signs).double()
    points = []
    for k in range(3):
        final = final_weights(run.at(weights.double() + k * step * way))
        points.append(vector(final).double())
    first, second = points[1] - points[0], points[2] - points[1]
    score = float((first.abs() * first.sign() * second.sign()).sum() / first.abs().sum())
    found = f"metasmoothness {score:.2f}"
    if not score >= min_smoothness:
        text = f"{found}, below {min_smoothness:g}: derivatives through this training mislead; {levers(run.recipe)}"
    else:
        text = f"{found}, at least {min_smoothness:g}: small changes of the weights move the trained model along a line"
    optimizer = run.recipe.optimizer
    if isinstance(optimizer, AdamW) and optimizer.eps_root == 0:
        text += "; eps_root is 0, where Adam's square root has no slope bound: 1e-8 or more is safer"
    return Smoothness(score, score >= min_smoothness, text)


def levers(recipe: Recipe) -> str:
    """What makes a training smoother in its weights, and how it is set now."""
    own = recipe.optimizer
    root = f" or eps_root 1e-8 to 1e-2 (now {own.eps_root:g})" if isinstance(own, AdamW) else ""
    return (
        f"smoother with larger batches (now {recipe.batch_size}), averaged weights (ema, now {recipe.ema:g}), a lower "
        f"learning rate (now {own.learning_rate:g}) or longer warm-up (now {recipe.schedule.warmup_steps}), clipping "
        f"(max_grad_norm, now {recipe.max_grad_norm:g}), weight decay (now {own.weight_decay:g}){root}"
    )
