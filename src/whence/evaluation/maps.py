"""Maps of an encoder's rows learned on fine-tunes, whose exemplars are known, and shares that are calibrated on them.

Learning (Wang et al. 2023, 2306.09345; temperature, regulariser and batches were not published): with maps f of training
images and g of drawn pictures, rows of length 1, q_j a drawn picture of an exemplar e_j,

    L = - mean_j log softmax_i(<g(q_j), f(i)> / tau)[e_j] - mean_e log softmax_j(<g(q_j), f(e)> / tau)[own] + lambda R

over the exemplars of all fine-tunes and the distractors i, and over all drawn pictures j; R = how far all parameters have
moved from the maps that change nothing, squared and summed. (With ||W^T W - 1||^2 rotations are free, and a few fine-tunes
are learned by heart: on icons average precision on others fell from .69 to .60.) lambda is the one with which maps learned
without a fine-tune find its exemplars best.

Calibration, of scores s over the images that may have made a picture:

    a = exp(kappa (s - max s)),  w = relu(a + 0.001 beta),  p = w / sum w

kappa and beta minimise log sum_i w_i - mean over the exemplars of log w_i, with relu smoothed. p is the calibrated
probability that an image is retrieved as an exemplar, not a causal influence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from whence.evaluation.retrieval import average_precision
from whence.features.maps import KINDS, SIDES, mapped, unmoved
from whence.types import WhenceError

LABEL = "calibrated retrieval probability, not causal influence"
SMOOTH = 1e4
"""Of the softplus in place of relu while kappa and beta are found. With 100, as in released code, every image has a weight
of .007 at least, and kappa comes out a fifth too small among 40 images."""
WIDEST = 20.0
"""Of log kappa, in standard deviations of the scores."""
FLOOR = 1e-3
"""What beta is counted in."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Learning:
    """How maps are learned.

    Args:
        kind: of `features.maps.KINDS`.
        strengths: of the regulariser, tried one by one.
        temperature: tau.
        steps: of Adam, over all pairs at once.
        learning_rate: of Adam.
    """

    kind: str = "linear"
    strengths: tuple[float, ...] = (0.1, 1.0, 10.0, 30.0, 100.0)
    temperature: float = 0.07
    steps: int = 200
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise WhenceError(f"no kind of map {self.kind!r}", "kind", ", ".join(KINDS))
        positive = (*self.strengths, self.temperature, self.learning_rate)
        if not self.strengths or self.steps < 0 or not all(0 < each < float("inf") for each in positive):
            raise WhenceError(f"{self}", "maps", "strengths, temperature and learning_rate above 0, steps from 0")


@dataclass(frozen=True, eq=False)
class Known:
    """A fine-tune whose exemplars are known.

    Args:
        exemplars: their rows of the encoder [e, k].
        drawn: the rows of the pictures that it drew [d, k].
    """

    exemplars: Tensor
    drawn: Tensor


def learn(known: Sequence[Known], distractors: Tensor, how: Learning, strength: float) -> dict[str, dict[str, Tensor]]:
    """The maps of both sides.

    Args:
        known: the fine-tunes.
        distractors: rows of images that made none of the pictures [n, k].
        how: they are learned.
        strength: of the regulariser.
    """
    width = distractors.shape[1]
    first = {side: unmoved(how.kind, width) for side in SIDES}
    moved = {side: {name: v.clone().requires_grad_() for name, v in first[side].items()} for side in SIDES}
    pool = torch.cat([*(each.exemplars for each in known), distractors]).float()
    drawn = torch.cat([each.drawn for each in known]).float()
    owner = torch.cat([torch.full((len(each.exemplars),), number) for number, each in enumerate(known)])
    asks = torch.cat([torch.full((len(each.drawn),), number) for number, each in enumerate(known)])
    own = asks[:, None] == owner  # [drawn, exemplars]
    optimizer = torch.optim.Adam([v for side in SIDES for v in moved[side].values()], how.learning_rate)
    for _ in range(how.steps):
        optimizer.zero_grad()
        logits = cosines(drawn, pool, moved) / how.temperature
        forth, back = logits.log_softmax(1)[:, : own.shape[1]], logits[:, : own.shape[1]].log_softmax(0)
        value = -(forth[own].mean() + back[own].mean())
        value = value + strength * sum(_moved(moved[side], first[side]) for side in SIDES)
        value.backward()
        optimizer.step()
    return {side: {name: v.detach() for name, v in moved[side].items()} for side in SIDES}


def _moved(way: dict[str, Tensor], first: dict[str, Tensor]) -> Tensor:
    return torch.stack([(v - first[name]).square().sum() for name, v in way.items()]).sum()


def cosines(drawn: Tensor, images: Tensor, sides: dict[str, dict[str, Tensor]]) -> Tensor:
    """<g(q), f(i)> of rows of length 1: [d, n].

    Args:
        drawn: rows of the encoder [d, k].
        images: rows of the encoder [n, k].
        sides: the maps.
    """
    found = (F.normalize(mapped(rows, sides[side]), dim=1) for side, rows in (("drawn", drawn), ("train", images)))
    g, f = found
    return g @ f.T


@dataclass(frozen=True, eq=False)
class Learned:
    """Maps, and how well maps that were learned without a fine-tune find its exemplars.

    Args:
        sides: the maps.
        strength: of the regulariser that did best.
        without: (mean average precision of the encoder alone, of the maps), each fine-tune by maps learned on the others.
        calibration: kappa and beta, of the cosines that these found.
    """

    sides: dict[str, dict[str, Tensor]]
    strength: float
    without: tuple[float, float]
    calibration: Calibration


def learn_and_calibrate(known: Sequence[Known], distractors: Tensor, how: Learning) -> Learned:
    """Maps with the strength that finds the exemplars of fine-tunes left out best, and the calibration of those cosines.

    Args:
        known: the fine-tunes, three or more.
        distractors: rows of images that made none of the pictures [n, k].
        how: they are learned.
    """
    if len(known) < 3:
        raise WhenceError(
            f"{len(known)} fine-tunes to learn on",
            "abc fit",
            "3 or more: each is left out once to choose and calibrate",
        )
    plain = {side: unmoved(how.kind, distractors.shape[1]) for side in SIDES}
    raw = [_cosines_and_truth(each, distractors, plain) for each in known]
    tried: dict[float, list[tuple[Array, NDArray[np.bool_]]]] = {}
    for strength in how.strengths:
        tried[strength] = []
        for left in range(len(known)):
            sides = learn([each for number, each in enumerate(known) if number != left], distractors, how, strength)
            tried[strength].append(_cosines_and_truth(known[left], distractors, sides))
    best = max(tried, key=lambda strength: mean_average_precision(tried[strength]))
    return Learned(
        learn(known, distractors, how, best),
        best,
        (mean_average_precision(raw), mean_average_precision(tried[best])),
        calibrate([(row, truth) for values, told in tried[best] for row, truth in zip(values, told, strict=True)]),
    )


def _cosines_and_truth(
    known: Known, distractors: Tensor, sides: dict[str, dict[str, Tensor]]
) -> tuple[Array, NDArray[np.bool_]]:
    values = cosines(known.drawn.float(), torch.cat([known.exemplars, distractors]).float(), sides).double().numpy()
    truth = np.zeros(values.shape, bool)
    truth[:, : len(known.exemplars)] = True
    return values, truth


def average_precisions(scores: Array, truth: NDArray[np.bool_]) -> Array:
    """Of each query's ranking of its exemplars, as many for each (see `retrieval.average_precision`): [m].

    Args:
        scores: [m, n].
        truth: bool [m, n].
    """
    return average_precision(scores, truth.astype(np.float64), int(truth[0].sum()))


def mean_average_precision(found: Iterable[tuple[Array, NDArray[np.bool_]]]) -> float:
    """Over the queries of all fine-tunes.

    Args:
        found: scores and truth of each.
    """
    return float(np.concatenate([average_precisions(*each) for each in found]).mean())


# ------------------------------------------------------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Calibration:
    """Scores of one query to probabilities; see the head of this module.

    Args:
        kappa: how fast they fall from the highest score.
        beta: in thousandths of the highest weight, what every image has (above 0) or lacks (below).
    """

    kappa: float
    beta: float

    def __post_init__(self) -> None:
        if not 0 < self.kappa < float("inf") or not abs(self.beta) < float("inf"):
            raise WhenceError(f"kappa={self.kappa}, beta={self.beta}", "calibration", "kappa above 0, numbers")

    def __call__(self, scores: Array) -> Array:
        """p of each image, each query by itself: [m, n], sums 1.

        Args:
            scores: [m, n].
        """
        a = np.exp(self.kappa * (scores - scores.max(1, keepdims=True)))
        w = np.maximum(a + FLOOR * self.beta, 0.0)
        total = w.sum(1, keepdims=True)
        # With beta at -1000 or below no image has any weight: all of it is the first image's, the limit from above.
        return np.where(total > 0, w / np.where(total > 0, total, 1.0), a == 1.0)


def calibrate(found: Sequence[tuple[Array, NDArray[np.bool_]]]) -> Calibration:
    """kappa and beta of queries whose exemplars are known.

    Args:
        found: scores [n] and truth [n] of each query.
    """
    if not found or not any(truth.any() for _, truth in found):
        raise WhenceError("no query with a known exemplar", "calibration", "one or more")
    n = max(len(scores) for scores, _ in found)
    below, truth, real = np.zeros((len(found), n)), np.zeros((len(found), n), bool), np.zeros((len(found), n), bool)
    for row, (scores, told) in enumerate(found):
        below[row, : len(scores)], truth[row, : len(scores)], real[row, : len(scores)] = (
            scores - scores.max(),
            told,
            True,
        )
    spread = float(np.mean([np.std(scores) for scores, _ in found]))
    if not spread > 0:
        raise WhenceError("all images have the same score", "calibration", "scores that differ")

    def bounded(at: Array) -> tuple[float, float]:
        """kappa and beta; below -1,000 / 2 not even the first image would keep half of its weight."""
        return float(np.exp(np.clip(at[0], -WIDEST, WIDEST)) / spread), float(np.clip(at[1], -0.5 / FLOOR, None))

    def value(at: Array) -> float:
        kappa, beta = bounded(at)
        log_w = _log_softplus(SMOOTH * (np.exp(kappa * below) + FLOOR * beta))
        known = (log_w * truth).sum(1) / np.maximum(truth.sum(1), 1)
        return float((logsumexp(log_w, axis=1, b=real) - known)[truth.any(1)].mean())

    starts = [np.array([np.log(k), b]) for k in (0.5, 3.0) for b in (0.0, -5.0)]
    best = min((minimize(value, start, method="Nelder-Mead") for start in starts), key=lambda found: float(found.fun))
    return Calibration(*bounded(best.x))


def _log_softplus(z: Array) -> Array:
    """log log(1 + e^z), which is z far below 0, where e^z itself is 0."""
    return np.where(z < -30, z, np.log(np.logaddexp(0.0, np.maximum(z, -30))))


def calibration_error(probabilities: Array, truth: NDArray[np.bool_], bins: int = 10) -> float:
    """How far the probability of each query's first image is from the share of the truth that it has: the mean over bins of
    equal width of |mean p - mean share|, weighted by their queries.

    Args:
        probabilities: [m, n].
        truth: bool [m, n]; an exemplar has 1 / exemplars of the truth.
        bins: of p.
    """
    first = probabilities.argmax(1)
    rows = np.arange(len(first))
    p = probabilities[rows, first]
    share = truth[rows, first] / truth.sum(1)
    place = np.minimum((p * bins).astype(int), bins - 1)
    apart = [abs(p[place == b].mean() - share[place == b].mean()) * (place == b).mean() for b in np.unique(place)]
    return float(sum(apart))
