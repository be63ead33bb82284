"""Reverse mode: the slopes of a few measurements with respect to the weights of all images, from one replay backwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from whence.storage.files import made, progress
from whence.training.optimizer import State
from whence.training.unroll.checks import levers
from whence.training.unroll.measured import Mixed, Outputs, count_of, slopes_at_the_end
from whence.training.unroll.memory import plan_of
from whence.training.unroll.resample import Points
from whence.training.unroll.run import Differentiation, Run, Trainer, pulled
from whence.training.unroll.slopes import Adjoint, StepSlopes, views
from whence.training.unroll.states import Kept, fan_of, final_state, parts, replayed, reproduced, same_end
from whence.types import Weights, WhenceError

FEW = 4  # adjoints up to which gradients are not formed image by image


def metagradient(
    run: Run,
    outputs: Outputs,
    how: Differentiation = Differentiation(),
    trained: Weights | None = None,
    what: str = "metagradient",
    mix: Tensor | None = None,
) -> Tensor:
    """df_q / dw_i of every query and training image at the weights of the run: [M, n] float64.

    Queries are taken as many at a time as the budget holds. Errors: WhenceError for what cannot be differentiated or
    replayed, and when the budget is too small, saying what helps.

    Args:
        run: the training.
        outputs: M measurements of the trained model.
        how: what is differentiated, and what is kept for it.
        trained: the averaged weights that the run is said to have ended with.
        what: its name in progress and errors.
        mix: [R, M] for the derivatives of the sums mix @ f instead, [R, n].
    """
    trainer = Trainer(run, how.curvature)
    points = None if how.resample is None else Points(trainer, how.resample)
    steps, n = trainer.recipe.steps, len(run.images)
    fan, plan, spill = fan_of(how.keep, steps), plan_of(trainer, how), how.spill
    with ExitStack() as stack:
        folder = None
        if spill is not None:
            made(spill)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=spill)))
        kept = Kept(plan.states, folder)
        final = final_state(trainer, kept, fan, what)
        if trained is not None:
            same_end(run, final.ema, trained)
        count = count_of(outputs, final.ema)
        asked: Outputs | Mixed = outputs
        if mix is not None:
            asked, count = Mixed(outputs, mix), len(mix)
        total = torch.zeros(count, n, dtype=torch.float64)
        pieces = -(-count // plan.queries)
        for begin in (rows := parts(0, count, pieces)):
            chunk = range(begin, min(begin + rows.step, count))
            name = what if pieces == 1 else f"{what}: queries {chunk.start + 1}-{chunk.stop} of {count}"
            states = progress(replayed(trainer, kept, fan, final), name, steps)
            total[chunk.start : chunk.stop] = _reverse(trainer, points, asked, final, states, chunk, plan.at_once)
    bad = (~torch.isfinite(total)).nonzero()
    if len(bad):
        raise WhenceError(
            f"unroll: {len(bad)} derivatives are not finite, the first for image {run.images.ids[int(bad[0, 1])]!r}; "
            f"training is not smooth enough: {levers(run.recipe)}"
        )
    return total


def _reverse(
    trainer: Trainer,
    points: Points | None,
    outputs: Outputs | Mixed,
    final: State,
    states: Iterator[State],
    rows: range,
    at_once: int,
) -> Tensor:
    """The rows of some queries, from the states before steps T-1, ..., 0. points: where the images' slopes are taken."""
    adjoint = Adjoint.of(trainer.recipe, slopes_at_the_end(trainer, outputs, final.ema, rows))
    into = views(adjoint.theta, final.weights)
    device = adjoint.theta.device
    total = torch.zeros(len(rows), len(trainer.run.images), dtype=torch.float64, device=device)
    stretch, later = adjoint.theta.new_zeros(()) if points is None else torch.zeros_like(adjoint.theta), final
    for state in states:
        feed = trainer.feed(state.step)
        here = trainer.present(feed)
        present = feed.only(here)
        grads, pull = trainer.linearized(state, present)
        slopes = StepSlopes.of(trainer.recipe, state, grads)
        reproduced(slopes.own.m, later)
        flat = slopes.pull(adjoint)
        p = views(flat, final.weights)
        if points is not None:
            stretch += flat
            if points.begins(state):
                for images, gradients in points.each(state):
                    total.index_add_(1, images.to(device), (stretch @ gradients.mT).double() / points.constant)
                stretch.zero_()
        elif len(rows) > FEW:  # then gradients image by image are shared by enough queries
            absent = feed.only(~here)
            for some, gradients in trainer.each(state, absent):
                products = (flat @ gradients.mT).double() / trainer.constant
                total.index_add_(1, absent.rows[some].to(device), products)
        elif not bool(here.all()):
            absent = feed.only(~here)
            through = trainer.linearized_scales(state, absent)
            no_losses = adjoint.theta.new_zeros(len(rows), len(absent.rows))
            for piece, _, scale in pulled(through, p, no_losses, at_once):
                total[piece].index_add_(1, absent.rows.to(device), scale.double() / trainer.constant)
        no_losses = adjoint.theta.new_zeros(len(rows), len(present.rows))
        for piece, weights, scale in pulled(pull, p, no_losses, at_once):
            for name, value in weights.items():
                into[name][piece] += value
            if points is None:
                total[piece].index_add_(1, present.rows.to(device), scale.double() / trainer.constant)
        later = state
    return total.cpu()
