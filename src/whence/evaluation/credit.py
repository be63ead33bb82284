"""Credit: which share of what made some pictures each contributor has, and how sure that is.

    phi[q, c] = sum of the scores of contributor c's images for picture q        (or a value by retraining, see `values`)
    s[q, c] = phi[q, c]+ / sum_d phi[q, d]+,   x+ = max(x, 0)                    0 for all where no contributor is above 0
    share[c] = mean_q s[q, c]          rest = 1 - sum of the shares that can be told from nothing (signal above noise)

Every picture counts alike, so that scores need no units. Sources: the royalty share phi+ / sum phi+, Wang et al. 2024
(2404.13964); what splitting an account in two changes, faithful group Shapley 2025 (2505.19013); a flat fee where the noise
is above the signal, "What's a credit worth?" 2026 (2607.00641). A share is an estimate of influence and no legal claim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from whence.data.owners import IMAGE, groups
from whence.evaluation.lds import around, spearman
from whence.evaluation.tables import pearson_columns
from whence.scores import check_groups
from whence.storage.tables import Array, matrix
from whence.types import Scores, WhenceError, check_signed

SURE, UNSURE, UNKNOWN = "share", "flat fee", "not known"
"""What is advised: to pay the share; a flat fee, since the share is below its noise; neither, where noise is unknown."""

ROUNDING = 1e-12
"""What is below that of a share is no noise."""
OPPOSED = 0.01
"""The share that scores below 0 have in all at least, where shares are taken to say more than likeness."""
ONE_PICTURE = "with one picture, the intervals hold nothing of what other pictures would give"
UNKNOWN_ERRORS = (
    "the errors of these values are not known (one seed tells none), and the intervals hold nothing of them"
)
ALL_ABOVE = (
    "hardly a score of an image is below 0, so that whoever has images gets a share, the larger the more images; likeness "
    "is in it, but not whether the pictures would be others without them"
)


@dataclass(frozen=True, eq=False)
class Sums:
    """What contributors did for pictures.

    `known` says whether their errors are: none, or NaN, are not.

    Args:
        names: k contributors.
        images: how many each of them has [k].
        values: phi [m, k].
        stderr: its standard errors [m, k]; None where none are stated.
        positive: the sums over their images above 0 alone [m, k], what they would have with an account for each image; None
            where single images have no score.
    """

    names: Sequence[str]
    images: Sequence[int]
    values: Array
    stderr: Array | None
    positive: Array | None

    @property
    def known(self) -> bool:
        return self.stderr is not None and bool(np.isfinite(self.stderr).all())


@dataclass(frozen=True, eq=False)
class Credit:
    """The shares of contributors, in their order.

    Args:
        names: k contributors.
        images: how many each of them has [k].
        share: of all pictures [k]; sums to 1, less the pictures that no contributor did anything for.
        low, high: its interval [k], NaN where nothing is known of the noise.
        noise: standard deviation of the share over draws of the pictures and of the errors [k], NaN likewise.
        split: how much the share could rise at most if the contributor had several accounts [k]; NaN where it is not known.
        of_picture: s [m, k].
        level: of the intervals.
        caution: what a reader of these shares must know; "" for nothing.
    """

    names: Sequence[str]
    images: Sequence[int]
    share: Array
    low: Array
    high: Array
    noise: Array
    split: Array
    of_picture: Array
    level: float
    caution: str = ""

    @property
    def signal_to_noise(self) -> Array:
        """share / noise [k]; infinite where nothing was drawn by chance, 0 for a share of nothing."""
        quiet = self.noise == 0
        ratio = np.divide(self.share, self.noise, out=np.zeros_like(self.share), where=~quiet)
        return np.where(quiet & (self.share > 0), np.inf, ratio)

    @property
    def per_image(self) -> Array:
        """share / images [k]."""
        return self.share / np.asarray(self.images, np.float64)

    @property
    def advice(self) -> list[str]:
        """See `SURE`, `UNSURE` and `UNKNOWN`."""
        return [
            UNKNOWN if np.isnan(ratio) else SURE if ratio >= 1 else UNSURE for ratio in self.signal_to_noise.tolist()
        ]

    @property
    def rest(self) -> float:
        """What is attributed to nobody: shares below their noise, and pictures that no contributor did anything for."""
        sure = sum(share for share, advice in zip(self.share.tolist(), self.advice, strict=True) if advice != UNSURE)
        return max(0.0, 1.0 - sure)

    def columns(self) -> dict[str, list[object]]:
        """The table, the largest share first; the last row is the rest. `attributable`, the share or 0 where a flat fee is
        advised, and the rest: sums to 1."""
        order = np.argsort(-self.share, kind="stable").tolist()
        numbers = {
            "share": self.share,
            "attributable": np.where([advice == UNSURE for advice in self.advice], 0.0, self.share),
            "low": self.low,
            "high": self.high,
            "signal_to_noise": self.signal_to_noise,
            "share_per_image": self.per_image,
            "could_rise_by_splitting": self.split,
        }
        table: dict[str, list[object]] = {
            "contributor": [*(self.names[c] for c in order), "not attributable"],
            "images": [*(self.images[c] for c in order), None],
        }
        for name, values in numbers.items():
            table[name] = [None if np.isnan(values[c]) else float(values[c]) for c in order]
            table[name].append(self.rest if name == "attributable" else None)
        table["advice"] = [*(self.advice[c] for c in order), None]
        return table


def sums_of(scores: Scores, by: str, where: str = "--by") -> Sums:
    """What contributors did, from scores of images or from values of the contributors themselves.

    Standard errors of single images are taken to be independent of each other.

    Args:
        scores: [m, n].
        by: the column that names the contributors; images without a value are those of "unknown".
        where: what an error is of.
    """
    check_signed("credit", scores)
    values = scores.values.double().numpy()
    errors = None if scores.stderr is None else scores.stderr.double().numpy()
    of = scores.recipe.get("values")
    if isinstance(of, dict) and of.get("by") == by:
        counts = [int(str(count)) for count in scores.train_meta["images"]]
        return Sums(list(scores.train_ids), counts, values, errors, None)
    if isinstance(of, dict) and of.get("by") != IMAGE:
        raise WhenceError(
            f"these are values by {of.get('by')!r}, and say nothing by {by!r}", where, f"--by {of.get('by')}"
        )
    check_groups(scores, by, where)
    if by not in scores.train_meta:
        raise WhenceError(f"no column {by!r} in the training images", where, ", ".join(scores.train_meta) or "metadata")
    rows = groups(scores.train_meta[by])
    if len(rows) < 2:
        raise WhenceError(
            f"the column {by!r} holds one value, {next(iter(rows))!r}: there is nothing to share", where, "2 or more"
        )

    owner = np.empty(values.shape[1], np.int64)
    for number, own in enumerate(rows.values()):
        owner[own] = number

    def summed(table: Array) -> Array:
        return np.stack([np.bincount(owner, weights=row, minlength=len(rows)) for row in table])

    stated = None if errors is None else np.sqrt(summed(errors**2))
    return Sums(list(rows), [len(own) for own in rows.values()], summed(values), stated, summed(values.clip(min=0)))


def credit(sums: Sums, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Credit:
    """Shares with intervals: pictures drawn again, and phi moved by its standard errors, for all pictures alike, `resamples`
    times.

    The interval is the quantiles of the resampled share, moved so that their mean stands at the share: noise on top of noise
    pulls shares towards each other. With one picture and no errors, or none but 0, there is no interval (NaN).

    Args:
        sums: what contributors did.
        level: of the intervals.
        resamples: draws.
        seed: of them.
    """
    phi = matrix("sums of scores", sums.values)
    if not 0 < level < 1 or resamples < 100:
        raise WhenceError(f"level {level}, {resamples} resamples", "credit", "a level between 0 and 1, 100 or more")
    m, k = phi.shape
    of_picture = shares(phi)
    share, known = of_picture.mean(axis=0), m > 1 or (sums.known and bool(np.any(sums.stderr)))
    low = high = noise = np.full(k, np.nan)
    if known:
        drawn = _resampled(phi, sums.stderr, resamples, np.random.default_rng(seed))
        ends = [around(float(at), column, level) for at, column in zip(share, drawn.T, strict=True)]
        low, high = (np.clip([end[side] for end in ends], 0, 1) for side in (0, 1))
        noise = drawn.std(axis=0, ddof=1)
        noise = np.where(noise > ROUNDING, noise, 0.0)
    opposed = np.inf if sums.positive is None else float((sums.positive - phi).sum())
    cautions = {
        ALL_ABOVE: opposed <= OPPOSED * np.abs(phi).sum(),
        ONE_PICTURE: m == 1 and known,
        UNKNOWN_ERRORS: sums.stderr is not None and not sums.known,
    }
    caution = "; ".join(told for told, true in cautions.items() if true)
    return Credit(sums.names, sums.images, share, low, high, noise, _split(sums, share), of_picture, level, caution)


def shares(phi: ArrayLike) -> Array:
    """s [m, k]: the positive parts of each picture as shares of their sum, 0 where there is none."""
    positive = np.clip(np.asarray(phi, np.float64), 0, None)
    total = positive.sum(axis=1, keepdims=True)
    return np.divide(positive, total, out=np.zeros_like(positive), where=total > 0)


def _resampled(phi: Array, stderr: Array | None, resamples: int, rng: np.random.Generator) -> Array:
    """The share in each resample [B, k]. An unknown error (NaN) counts as none: the pictures alone say something then.

    A contributor's errors in several pictures move together: they are those of the same trainings, or of the same
    measurements of the training images. Taken apart they would cancel over pictures, and intervals from few coalitions would
    hold the true share in 81-84 % of cases in place of 93-97 % (benchmarks/credit.py).
    """
    m, k = phi.shape
    errors = np.zeros_like(phi) if stderr is None else np.nan_to_num(stderr)
    drawn = np.empty((resamples, k))
    for b in range(resamples):
        rows = rng.integers(0, m, m)
        drawn[b] = shares(phi[rows] + errors[rows] * rng.standard_normal(k)).mean(axis=0)
    return drawn


def _split(sums: Sums, share: Array) -> Array:
    """The most that a contributor's share rises by if its images stood in several accounts, those that did harm apart."""
    if sums.positive is None:
        return np.full_like(share, np.nan)
    positive = np.clip(sums.values, 0, None)
    others = positive.sum(axis=1, keepdims=True) - positive
    total = others + sums.positive
    apart = np.divide(sums.positive, total, out=np.zeros_like(total), where=total > 0)
    return np.asarray(np.clip(apart.mean(axis=0) - share, 0, None), np.float64)


def agreement(one: Sums, other: Sums) -> tuple[float, float]:
    """Rank and linear correlation over contributors between two sets of sums of the same pictures, mean over pictures."""
    if list(one.names) != list(other.names) or one.values.shape != other.values.shape:
        raise WhenceError(
            f"{len(one.names)} contributors and {len(one.values)} pictures beside {len(other.names)} and "
            f"{len(other.values)}",
            "credit",
            "sums of the same contributors and pictures",
        )
    pairs = one.values.T, other.values.T
    return float(np.nanmean(spearman(*pairs))), float(np.nanmean(pearson_columns(*pairs)))
