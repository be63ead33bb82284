"""Retrieval and mislabel detection."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score

from whence.evaluation.tables import ratio
from whence.storage.tables import Array, matrix
from whence.types import WhenceError


def recall_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Array:
    """Share of each query's relevant images (planted duplicates) among its k highest scores: [m], NaN without any.

    Of images that tie for the last places the expected number counts, so neither the order of the images nor a constant
    score can win. Errors: WhenceError for other shapes or k outside 1..n.

    Args:
        scores: [m, n].
        relevant: bool [m, n].
        k: from 1 to n.
    """
    hits, wanted = _hits(scores, relevant, k)
    return ratio(hits, wanted)


def precision_at_k(scores: ArrayLike, train_labels: ArrayLike, query_labels: ArrayLike, k: int) -> Array:
    """Share of each query's k highest scores that carry the query's label (class retrieval): [m]. Ties as `recall_at_k`.

    Looks alike, not: made it. Class retrieval is no counterfactual.

    Args:
        scores: [m, n].
        train_labels: [n].
        query_labels: [m].
        k: from 1 to n.
    """
    hits, _ = _hits(scores, np.equal.outer(np.asarray(query_labels), np.asarray(train_labels)), k)
    return hits / k


def average_precision(scores: ArrayLike, truth: ArrayLike, top: int) -> Array:
    """Average precision of each query [m]: of what the truth ranks first, over the whole set. Its mean is mAP(L).

    AP = sum_k (R_k - R_(k-1)) P_k over the thresholds k, P_k precision and R_k recall, as scikit-learn has it: images of one
    score come in together, so that their order does not enter. Images that tie with the L-th of the truth count as first.

    Args:
        scores: [m, n].
        truth: [m, n], the scores of a teacher.
        top: L, from 1 to n - 1.
    """
    tau, wanted = matrix("scores", scores), matrix("the truth", truth)
    if tau.shape != wanted.shape or not 1 <= top < tau.shape[1]:
        raise WhenceError(f"first {top} of {wanted.shape} against {tau.shape}: needs equal shapes and L in 1..n - 1")
    last = -np.partition(-wanted, top - 1, axis=1)[:, top - 1 : top]
    return np.array([average_precision_score(w >= t, s) for w, t, s in zip(wanted, last, tau, strict=True)])


def mislabel_auroc(self_influence: ArrayLike, mislabelled: ArrayLike) -> float:
    """Probability that a mislabelled image has a higher self-influence than a clean one, ties counting half.

    Errors: WhenceError for other shapes, or without images of both kinds.

    Args:
        self_influence: [n].
        mislabelled: bool [n].
    """
    values, bad = matrix("self-influence", np.atleast_2d(self_influence))[0], np.asarray(mislabelled, bool)
    if values.shape != bad.shape or bad.all() or not bad.any():
        raise WhenceError(
            f"{bad.sum()} of {bad.size} images marked, {values.size} scored: needs both kinds, equally long"
        )
    positive, negative = int(bad.sum()), int((~bad).sum())
    return float((rankdata(values)[bad].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _hits(scores: ArrayLike, relevant: ArrayLike, k: int) -> tuple[Array, Array]:
    """Expected number of relevant images among the k highest, and number of relevant images: [m] each."""
    tau, wanted = matrix("scores", scores), np.asarray(relevant, bool)
    if tau.shape != wanted.shape or not 1 <= k <= tau.shape[1]:
        raise WhenceError(f"top {k} of scores {tau.shape} against {wanted.shape}: needs equal shapes and k in 1..n")
    last = -np.partition(-tau, k - 1, axis=1)[:, k - 1 : k]
    above, tied = tau > last, tau == last
    share = (k - above.sum(axis=1)) / tied.sum(axis=1)
    return (above & wanted).sum(axis=1) + share * (tied & wanted).sum(axis=1), wanted.sum(axis=1).astype(np.float64)
