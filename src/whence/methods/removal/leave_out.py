"""Values read from retrained models that left images out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from whence.methods.removal.tables import checked_table, counts, mean_variance, side_means, spread_of_mean
from whence.storage.tables import Array, matrix, sign_of
from whence.types import WhenceError


@dataclass(frozen=True)
class Estimate:
    """What each image did FOR each query, and how sure that is.

    Args:
        values: [m, n], in units of the output.
        stderr: standard errors [m, n].
        runs: trainings it rests on.
        names: of the columns, where they are known.
    """

    values: Array
    stderr: Array
    runs: int
    names: Sequence[str] = ()


def leave_one_out(full: ArrayLike, left_out: Sequence[ArrayLike], better: str = "lower") -> Estimate:
    """Retraining without one image, averaged over seeds.

        τ[q, i] = ± ( mean_R y_q(all) - mean_R' y_q(all∖i) )      SE² = s²/R + s_i²/R'

    The effect is O(1/n) and sits below the seed noise for single images of real models: read it with its error, or leave out
    groups. The error assumes independent seeds; paired same-seed runs make it too large. Errors: WhenceError for shapes that
    do not fit or entries that are not finite.

    Args:
        full: outputs of R trainings on everything [R, m].
        left_out: n tables [R', m], trained without image i (an array [n, R', m] will do).
        better: of an output, "lower" or "higher".
    """
    sign = sign_of(better)
    everything = matrix("outputs of the full model", full)
    without = [matrix(f"outputs without image {i}", table) for i, table in enumerate(left_out)]
    if {table.shape[1] for table in without} != {everything.shape[1]}:
        shapes = sorted({table.shape for table in without})
        raise WhenceError(
            f"full outputs {everything.shape}, left-out ones {shapes}; needs the same queries in all of them"
        )
    values = sign * (everything.mean(axis=0)[:, None] - np.stack([table.mean(axis=0) for table in without], axis=1))
    variance = mean_variance(everything)[:, None] + np.stack([mean_variance(table) for table in without], axis=1)
    return Estimate(values, np.sqrt(variance), len(everything) + sum(map(len, without)))


def paired_leave_one_out(full: ArrayLike, left_out: Sequence[ArrayLike], better: str = "lower") -> Estimate:
    """Retraining without one image at the seeds of the trainings on everything, seed by seed.

        τ[q, i] = ± mean_s ( y_q(all; s) - y_q(all∖i; s) )      SE² = var_s of the difference / R, NaN for one seed

    What a seed does to both trainings alike, most of what it does, cancels. Errors: WhenceError for shapes that do not fit
    or entries that are not finite.

    Args:
        full: outputs of R trainings on everything [R, m], a seed each.
        left_out: n tables [R, m], trained without image i at the same seeds in the same order.
        better: of an output, "lower" or "higher".
    """
    everything = matrix("outputs of the full model", full)
    without = [matrix(f"outputs without image {i}", table) for i, table in enumerate(left_out)]
    if any(table.shape != everything.shape for table in without):
        shapes = sorted({table.shape for table in without})
        raise WhenceError(f"full outputs {everything.shape}, left-out ones {shapes}; paired seeds need equal shapes")
    differences = [sign_of(better) * (everything - table) for table in without]
    values = np.stack([each.mean(axis=0) for each in differences], axis=1)
    variance = np.stack([mean_variance(each) for each in differences], axis=1)
    return Estimate(values, np.sqrt(variance), len(everything) * (1 + len(without)))


def empirical_influence(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Mean output with an image minus mean output without it, over models trained on random subsets.

        τ[q, i] = ± ( mean(y_q | i ∈ S) - mean(y_q | i ∉ S) )      SE² = s1²/n1 + s0²/n0

    On fixed-size masks an additive world β gives β_i - mean_{j≠i} β_j. Source: Feldman & Zhang 2020.
    Errors: WhenceError naming an image that is in every run or in none. Differs from released code, which divides by
    max(count, 1) and so reports a whole mean as an influence.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        better: of an output, "lower" or "higher".
    """
    kept, y, sign = checked_table(masks, outputs, better)
    side = kept.astype(np.float64)
    shift = y.mean(axis=0)
    (mean1, var1), (mean0, var0) = (side_means(part, y - shift) for part in (side, 1 - side))
    return Estimate(sign * (mean1 - mean0).T, np.sqrt(var1 + var0).T, len(y))


def memorization(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> Estimate:
    """Influence of every training image on itself: the diagonal of `empirical_influence` without the rest.

    Values and errors [1, n]. Errors: as there.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: of run j on training image i [r, n].
        better: of an output, "lower" or "higher".
    """
    kept, y, sign = checked_table(masks, outputs, better)
    if kept.shape != y.shape:
        raise WhenceError(f"masks {kept.shape} and outputs {y.shape}: memorization needs one output per training image")
    shifted = y - y.mean(axis=0)
    sides = []
    for part in (kept, ~kept):
        count = counts(part.astype(np.float64))
        mean = np.where(part, shifted, 0.0).sum(axis=0) / count
        square = np.where(part, (shifted - mean) ** 2, 0.0).sum(axis=0)
        sides.append((mean, spread_of_mean(square, count)))
    (mean1, var1), (mean0, var0) = sides
    return Estimate(sign * (mean1 - mean0)[None], np.sqrt(var1 + var0)[None], len(y))
