"""The few training images that, taken away together, change a function of the model most (Hu et al. 2024, 2409.18153).

    S* = argmax_{|S| <= k} f(theta_{-S}) - f(theta)        theta_{-S}: the model fitted without S

    greedy      the k largest v_i > 0             v_i: the rise of f without i, to first order
    LAGS        the k largest v_i / (1 - h_i) > 0         (leverage-corrected: one image is right, if f is linear)
    adaptive    the largest f(theta_{-i}) - f(theta) > 0, the exact refit without i, and again, k times

All stop where no score is positive. The k largest scores are not the best set: copies stand in for each other, so that each
alone does little, and images that hold each other in balance do much alone and little together. c copies of one row, of
leverage h each, do c (1 - h) / (1 - c h) times what the first of them does. Adaptive greedy sees this, since it looks again
after each removal; it is no search of all sets (`exhaustive`), and may miss the best one.

For least squares, every step has a closed form; computed in float64:

    theta = A^-1 X^T Y,   A = X^T X + lambda I,   r = Y - X theta,   h_i = x_i^T A^-1 x_i,   H = X A^-1 X^T
    theta_{-i} - theta = -A^-1 x_i r_i / (1 - h_i)
    theta_{-S} - theta = -A^-1 X_S^T (I - H_SS)^-1 r_S
    A_{-i}^-1 = A^-1 + A^-1 x_i x_i^T A^-1 / (1 - h_i)        (Sherman & Morrison)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from numbers import Integral
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from whence.storage.tables import Array, matrix
from whence.types import WhenceError


@dataclass(frozen=True)
class Influential:
    """A set of images in the order in which they are taken away.

    Args:
        images: their rows.
        rises: predicted rise of f once each of them and those before it are gone.
        asked: k, how many there were to be at most.
    """

    images: tuple[int, ...]
    rises: tuple[float, ...]
    asked: int

    @property
    def stopped(self) -> bool:
        """Whether it ended before k images because no other had a positive score."""
        return len(self.images) < self.asked


class Removable(Protocol):
    """A model and a function f of it, from which images can be taken."""

    def rises(self) -> Array:
        """What the removal of each image adds to f, [n]: exact for this model. -inf for images that are gone."""
        ...

    def without(self, image: int) -> Removable:
        """The model fitted again without an image."""
        ...


def check_count(k: int, n: int) -> None:
    """Refuse a number of images of which some would not remain, or none be gone.

    Args:
        k: images to be taken away.
        n: training images.
    """
    if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k < n:
        raise WhenceError(
            f"k is {k!r}, and there are {n:,} training images", "k", f"a whole number from 1 to {n - 1:,}"
        )


def greedy(scores: ArrayLike, k: int) -> Influential:
    """The k images of the largest positive scores; of equal ones the first. The rise of a set is the sum of its scores.

    Args:
        scores: of one query, larger = f rises more without the image: [n].
        k: images at most.
    """
    values = np.asarray(scores, np.float64)
    check_count(k, len(values))
    order = [int(i) for i in np.argsort(-values, kind="stable")[:k] if values[i] > 0]
    return Influential(tuple(order), tuple(np.cumsum(values[order]).tolist()), k)


ROUNDING = 1e-12  # as a share of the largest score there was: below, a positive score is a zero that was rounded


def adaptive(model: Removable, k: int) -> Influential:
    """The image whose removal raises f most, then the one that does so once the model is fitted without it, and so on.

    Args:
        model: with all images.
        k: images at most.
    """
    scores = model.rises()
    check_count(k, len(scores))
    rounding = ROUNDING * float(np.abs(scores[np.isfinite(scores)]).max(initial=0.0))
    images: list[int] = []
    rises: list[float] = []
    while len(images) < k:
        image = int(np.argmax(scores))
        if not scores[image] > rounding:
            break
        images.append(image)
        rises.append(float(scores[image]) + (rises[-1] if rises else 0.0))
        if len(images) < k:
            model = model.without(image)
            scores = model.rises()
    return Influential(tuple(images), tuple(rises), k)


MOST_SETS, AT_ONCE = 1_000_000, 10_000  # that `exhaustive` looks at: some seconds


def exhaustive(model: Linear, k: int) -> Influential:
    """The best of all sets of at most k images: the truth, for a few images.

    Args:
        model: with all images.
        k: images at most.
    """
    n = len(model.X)
    check_count(k, n)
    count = sum(math.comb(n, size) for size in range(1, k + 1))
    if count > MOST_SETS:
        raise WhenceError(
            f"there are {count:,} sets of up to {k} of {n} images", "exhaustive", f"up to {MOST_SETS:,} sets"
        )
    best, effect = np.zeros(0, np.int64), 0.0
    for size in range(1, k + 1):
        every = combinations(range(n), size)
        while len(sets := np.array([*islice(every, AT_ONCE)], np.int64)):
            effects = model.effects(sets)
            first = int(np.argmax(effects))
            if effects[first] > effect:
                best, effect = sets[first], float(effects[first])
    rises = [float(model.effects(best[None, : size + 1])[0]) for size in range(len(best))]
    return Influential(tuple(best.tolist()), tuple(rises), k)


# ------------------------------------------------------------------------------------------------------- least squares


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f(theta) = tr(theta^T A theta) - 2 tr(B^T theta) + c.

    Args:
        A: symmetric [k, k].
        B: [k, D].
        c: a number.
    """

    A: Array
    B: Array
    c: float = 0.0

    @classmethod
    def linear(cls, direction: ArrayLike) -> Quadratic:
        """f(theta) = <direction, theta>. direction: [k] or [k, D]."""
        B = -_columns(direction) / 2
        return cls(np.zeros((len(B), len(B))), B)

    @classmethod
    def squared_error(cls, x: ArrayLike, y: ArrayLike) -> Quadratic:
        """f(theta) = ||y - theta^T x||^2, the loss of one query.

        Args:
            x: its features [k].
            y: its target, a number or [D].
        """
        features, target = np.asarray(x, np.float64), np.atleast_1d(np.asarray(y, np.float64))
        return cls(np.outer(features, features), np.outer(features, target), float(target @ target))

    def __call__(self, theta: Array) -> Array:
        """f of one or more theta: [..., k, D] -> [...]."""
        return ((self.A @ theta - 2 * self.B) * theta).sum((-2, -1)) + self.c

    def gradient(self, theta: Array) -> Array:
        """[k, D]."""
        return 2 * (self.A @ theta - self.B)


@dataclass(frozen=True, eq=False)
class Linear:
    """Least squares with a ridge, sum_i ||y_i - x_i^T theta||^2 + lambda ||theta||^2, and a function f of theta.

    The sum, not the mean: lambda stays what it is when images are taken away.

    Args:
        X: features [n, k].
        Y: targets [n, D].
        damping: lambda.
        f: a function of theta.
        inverse: A^-1 of the images that are left [k, k].
        theta: fitted to them [k, D].
        gone: the images that are not left.
    """

    X: Array
    Y: Array
    damping: float
    f: Quadratic
    inverse: Array
    theta: Array
    gone: tuple[int, ...] = ()

    @property
    def leverage(self) -> Array:
        """h [n], in the fit to the images that are left."""
        return ((self.X @ self.inverse) * self.X).sum(1)

    @property
    def residual(self) -> Array:
        """r [n, D]."""
        return self.Y - self.X @ self.theta

    def first_order(self) -> Array:
        """v_i = -<grad f, A^-1 x_i r_i^T>: [n], the scores of greedy."""
        slopes = self.X @ self.inverse @ self.f.gradient(self.theta)
        return _here(-(slopes * self.residual).sum(1), self.gone)

    def corrected(self) -> Array:
        """v_i / (1 - h_i): [n], the scores of LAGS."""
        return self.first_order() / _kept(self.leverage, self.gone)

    def rises(self) -> Array:
        """f(theta_{-i}) - f(theta): [n]. For linear f it is `corrected`."""
        moved = self.X @ self.inverse
        deleted = self.residual / _kept(self.leverage, self.gone)[:, None]
        square = ((moved @ self.f.A) * moved).sum(1) * np.square(deleted).sum(1)
        return _here(square - ((moved @ self.f.gradient(self.theta)) * deleted).sum(1), self.gone)

    def without(self, image: int) -> Linear:
        moved = self.inverse @ self.X[image]
        kept = _kept(self.leverage, self.gone)[image]
        return replace(
            self,
            inverse=self.inverse + np.outer(moved, moved) / kept,
            theta=self.theta - np.outer(moved, self.residual[image]) / kept,
            gone=(*self.gone, image),
        )

    def effect(self, rows: Sequence[int]) -> float:
        """f(theta_{-S}) - f(theta), the images S taken away at once."""
        return float(self.effects(np.array([list(rows)], np.int64))[0]) if len(rows) else 0.0

    def effects(self, sets: NDArray[np.int64]) -> Array:
        """The same of many sets of one size: [s, size] -> [s]."""
        few, back = self.X[sets], self.X[sets] @ self.inverse
        inner = np.eye(sets.shape[1]) - back @ few.swapaxes(1, 2)
        if float(np.linalg.eigvalsh(inner)[:, 0].min()) < 1e-10:
            raise _undetermined(f"without some {sets.shape[1]} of these images")
        moved = back.swapaxes(1, 2) @ np.linalg.solve(inner, self.residual[sets])
        found: Array = self.f(self.theta - moved) - self.f(self.theta)
        return found

    def refit(self, weights: ArrayLike) -> Array:
        """argmin_theta sum_i w_i ||y_i - x_i^T theta||^2 + lambda ||theta||^2: [k, D], of all images.

        Args:
            weights: one per image, real: 0 without it, 1 as it was: [n]. Below 0 where A stays positive definite.
        """
        w = np.asarray(weights, np.float64)
        if w.shape != (len(self.X),) or not np.isfinite(w).all():
            raise WhenceError(
                f"weights of shape {list(w.shape)} for {len(self.X)} images", "refit", "one finite number per image"
            )
        weighted = self.X.T * w
        return cho_solve(_factor(weighted @ self.X, self.damping, "with these weights"), weighted @ self.Y)


def linear(X: ArrayLike, Y: ArrayLike, f: Quadratic, damping: float = 0.0) -> Linear:
    """Fit least squares with a ridge.

    Args:
        X: features [n, k].
        Y: targets [n] or [n, D].
        f: a function of theta.
        damping: lambda, 0 or more.
    """
    features, targets = matrix("features", X), matrix("targets", _columns(Y))
    if len(features) != len(targets):
        raise WhenceError(f"{len(features)} rows of features and {len(targets)} of targets", "linear", "as many")
    if f.B.shape != (features.shape[1], targets.shape[1]):
        raise WhenceError(
            f"f is of theta {list(f.B.shape)}", "linear", f"one of {[features.shape[1], targets.shape[1]]}"
        )
    if not 0 <= damping < np.inf:
        raise WhenceError(f"damping {damping}", "linear", "0 or more, and finite")
    factor = _factor(features.T @ features, damping, "with these images")
    inverse = cho_solve(factor, np.eye(features.shape[1]))
    return Linear(features, targets, damping, f, inverse, cho_solve(factor, features.T @ targets))


def _columns(values: ArrayLike) -> Array:
    """[k] as [k, 1]."""
    table = np.asarray(values, np.float64)
    return table[:, None] if table.ndim == 1 else table


def _factor(gram: Array, damping: float, how: str) -> tuple[Array, bool]:
    """The Cholesky factor of gram + lambda I. how: what it is made of, for the refusal."""
    try:
        factor, lower = cho_factor(gram + damping * np.eye(len(gram)))
    except LinAlgError:
        raise _undetermined(how) from None
    diagonal = np.diag(factor)
    if not float(diagonal.min()) >= 1e-7 * float(diagonal.max()):  # squared: the rounding of the matrix itself
        raise _undetermined(how)
    return factor, lower


def _undetermined(how: str) -> WhenceError:
    return WhenceError(f"{how} the fit is not determined", "least squares", "a larger damping")


def _kept(leverage: Array, gone: Sequence[int]) -> Array:
    """1 - h: [n], and 1 for images that are gone."""
    kept = 1 - leverage
    kept[list(gone)] = 1.0
    if float(kept.min()) < 1e-10:
        raise _undetermined(f"without image {int(kept.argmin())}")
    return kept


def _here(values: Array, gone: Sequence[int]) -> Array:
    """Scores [n], -inf for images that are gone."""
    values[list(gone)] = -np.inf
    return values


# ------------------------------------------------------------------------------------------------- gradient features


@dataclass(frozen=True, eq=False)
class Kernel:
    """Least squares on features of which only the kernels are known: what a method with a Gram matrix leaves behind.

        rise without S = c_S^T (I - H_SS)^-1 r_S
        c = psi^T A^-1 Phi^T,   H = Phi A^-1 Phi^T,   A = Phi^T Phi + lambda I

    Fitted again without i (Sherman & Morrison on A^-1, and the residuals that follow from it):

        c' = c + c_i H_:i / (1 - h_i),    r' = r + r_i H_:i / (1 - h_i),    H' = H + H_:i H_i: / (1 - h_i)

    Of H, only its diagonal and the columns of images that are taken away are ever needed.

    Args:
        c: [n].
        leverage: h, the diagonal of H [n].
        residual: r [n].
        column: i -> H_:i [n].
        gone: the images that are not left.
    """

    c: Array
    leverage: Array
    residual: Array
    column: Callable[[int], Array]
    gone: tuple[int, ...] = ()

    def first_order(self) -> Array:
        """c_i r_i: [n], the scores of the method."""
        return _here(self.c * self.residual, self.gone)

    def rises(self) -> Array:
        """c_i r_i / (1 - h_i): [n], which is LAGS, and exact."""
        return self.first_order() / _kept(self.leverage, self.gone)

    def without(self, image: int) -> Kernel:
        own, column = self.column(image), self.column
        step = own / _kept(self.leverage, self.gone)[image]
        return Kernel(
            self.c + self.c[image] * step,
            self.leverage + own * step,
            self.residual + self.residual[image] * step,
            lambda i: column(i) + step * own[i],
            (*self.gone, image),
        )


@dataclass(frozen=True, eq=False)
class Together:
    """Several models of the same images, whose functions are added: those of an ensemble."""

    models: tuple[Kernel, ...]

    def first_order(self) -> Array:
        return np.sum([model.first_order() for model in self.models], axis=0)

    def rises(self) -> Array:
        return np.sum([model.rises() for model in self.models], axis=0)

    def without(self, image: int) -> Together:
        return Together(tuple(model.without(image) for model in self.models))
