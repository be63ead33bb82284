"""Forward mode: how the trained model moves along a few directions of image weights; and both modes together, `sketched`."""

from __future__ import annotations

import torch
from torch import Tensor

from whence.diffusion.noise import normals, seed_for, stream
from whence.storage.files import progress
from whence.training.optimizer import vector
from whence.training.recipe import update
from whence.training.unroll.measured import Outputs, count_of, slopes_at_the_end
from whence.training.unroll.resample import Points
from whence.training.unroll.reverse import metagradient
from whence.training.unroll.run import AT_ONCE, Differentiation, Run, Trainer, final_weights, pulled
from whence.training.unroll.slopes import StepSlopes, Tangent, views
from whence.types import Weights, WhenceError


def tangent(
    run: Run, direction: Tensor, how: Differentiation = Differentiation(), what: str = "tangent"
) -> tuple[Weights, Weights]:
    """Final averaged weights, and how they move when the image weights move along a direction.

        d theta = sum_i direction_i d theta / d w_i

    Any measurement follows from it.

    Args:
        run: the training.
        direction: [n], or [K, n] for K at once, whose changes then have a leading axis K: an image, a contributor, or minus
            the indicator of a set R, which makes theta + d theta the model without R to first order.
        how: what is differentiated.
        what: its name in progress.
    """
    trainer, recipe = Trainer(run, how.curvature), run.recipe
    points = None if how.resample is None else Points(trainer, how.resample)
    if direction.shape[-1:] != (len(run.images),) or direction.ndim > 2:
        raise WhenceError(
            f"tangent: directions have shape [n] or [K, n], n = {len(run.images)}; got {tuple(direction.shape)}"
        )
    state, ways = trainer.first(), direction.reshape(-1, len(run.images))
    zeros = torch.zeros_like(vector(state.weights)).repeat(len(ways), 1)
    d = Tangent(zeros, zeros, zeros, zeros)
    for _ in progress(range(recipe.steps), what):
        feed = trainer.feed(state.step)
        present = trainer.present(feed)
        feed = feed.only(present if points is not None else present | (ways[:, feed.rows] != 0).any(0))
        grads, pull = trainer.linearized(state, feed)
        moved = ways[:, feed.rows].to(feed.batch.x0) / trainer.constant
        if points is not None:
            moved = torch.zeros_like(moved)
            if points.begins(state):
                pushed = torch.zeros_like(d.theta)
                for rows, each in points.each(state, (ways != 0).any(0)):
                    pushed.addmm_(ways[:, rows].to(each), each, alpha=1 / points.constant)
        # dg = H dtheta + sum_b dscale_b grad l_b, H being symmetric: (dtheta, dscale) pulled back.
        pieces = pulled(pull, views(d.theta, grads), moved, AT_ONCE)
        dg = torch.cat([torch.cat([g.flatten(1) for g in piece.values()], dim=1) for _, piece, _ in pieces])
        if points is not None:
            dg += pushed
        d = StepSlopes.of(recipe, state, grads).push(d, dg)
        state = update(recipe, state, grads)
    changes = views(d.ema, state.weights)
    return state.ema, changes if direction.ndim == 2 else {name: value[0] for name, value in changes.items()}


def sketched(
    run: Run,
    outputs: Outputs,
    rank: int,
    how: Differentiation = Differentiation(),
    trained: Weights | None = None,
    what: str = "metagradient",
) -> Tensor:
    """`metagradient` Y [M, n] at the price of `rank` queries, from what sums of outputs share.

        S = Z Y  (reverse mode, Z [rank, M] random)      Q = an orthonormal basis of the rows of S      Y ~ (Y Q) Q^T

    with Y Q from forward mode along the columns of Q, for all queries at once: exact where Y has that rank. Each output
    is divided by the norm of its slope, so that large ones do not drown the others. Sources: the randomised range finder
    (Halko et al. 2011); MAGE and SPELL for sharing replays.

    Args:
        run: the training.
        outputs: M measurements of the trained model.
        rank: sums of outputs that are carried backwards.
        how: what is differentiated, and what is kept for it.
        trained: the averaged weights that the run is said to have ended with.
        what: its name in progress and errors.
    """
    if rank < 1:
        raise WhenceError(f"unroll: rank={rank}; at least 1 is needed")
    final = final_weights(run)
    if rank >= (count := count_of(outputs, final)):
        return metagradient(run, outputs, how, trained, what)
    trainer = Trainer(run)
    slopes = slopes_at_the_end(trainer, outputs, final, range(count))
    size = slopes.norm(dim=1).clamp(min=torch.finfo(slopes.dtype).tiny)
    keys = stream(seed_for(run.recipe.seed, "sketch"), torch.zeros(rank, dtype=torch.int64), torch.arange(rank))
    mix = normals(keys, (count,), slopes.dtype).to(slopes) / size
    summed = metagradient(run, outputs, how, trained, what, mix)
    basis = torch.linalg.qr(summed.mT).Q
    _, moved = tangent(run, basis.mT, how, f"{what}: forward")
    changes = torch.cat([change.flatten(1) for change in moved.values()], dim=1)
    return (slopes @ changes.mT).double().cpu() @ basis.mT
