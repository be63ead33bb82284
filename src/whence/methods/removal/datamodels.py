"""Linear datamodels: ridge and LASSO of outcomes on masks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, lasso_path

from whence.methods.removal.leave_out import Estimate
from whence.methods.removal.tables import checked_positive, checked_table
from whence.storage.tables import Array
from whence.types import WhenceError


def ridge(masks: ArrayLike, outputs: ArrayLike, penalty: ArrayLike, better: str = "lower") -> Estimate:
    """Ridge datamodel of every query at once, in the run kernel.

        min_{w,b} ‖Xw + b - y‖² + λ‖w‖²:      w = Xᵀ (XXᵀ + λI)⁻¹ (y - ȳ),   X = masks with centred columns

    Effects are per inclusion. One r×r eigendecomposition serves all queries and penalties, and n enters through products
    only. SE: delete-one jackknife over runs in closed form, λ held: with A = Xᵀ(XXᵀ+λI)⁻¹, e residuals, h leverages (1/r
    included), leaving run j out moves w_i by A_ij e_j/(1-h_j), and SE² = (r-1)/r · Σ_j ( A_ij e_j/(1-h_j) )².
    It measures the spread of w, not the shrinkage λ puts on it. Errors: WhenceError for shapes, λ <= 0, fewer than 3 runs.
    Source: Ilyas et al. 2022 (2202.00622), with ridge for LASSO.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        penalty: λ > 0: one number, or one per query [m] (`ridge_penalty`).
        better: of an output, "lower" or "higher".
    """
    fit = _RidgeFit.of(masks, outputs, better)
    r, m = fit.y.shape
    lam = checked_positive("penalty", penalty, m)
    values, variance = np.empty((fit.x.shape[1], m)), np.empty((fit.x.shape[1], m))
    for one in np.unique(lam):
        here = lam == one
        smoother = (fit.u / (fit.sigma + one)) @ fit.u.T
        back = fit.x.T @ smoother
        values[:, here] = fit.x.T @ (smoother @ fit.y[:, here])
        variance[:, here] = back**2 @ fit.left_out(one)[:, here] ** 2
    return Estimate(fit.sign * values.T, np.sqrt((r - 1) / r * variance).T, r)


def ridge_penalty(masks: ArrayLike, outputs: ArrayLike, penalties: ArrayLike) -> Array:
    """The penalty of each query [m] with the smallest leave-one-run-out error, (y_j - ŷ_j) / (1 - h_j), on the fitted runs.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        penalties: those to choose from.
    """
    fit = _RidgeFit.of(masks, outputs)
    grid = checked_positive("penalties", penalties)
    errors = np.stack([(fit.left_out(one) ** 2).mean(axis=0) for one in grid])
    return grid[errors.argmin(axis=0)]


def ridge_penalty_on(
    masks: ArrayLike, outputs: ArrayLike, tune_masks: ArrayLike, tune_outputs: ArrayLike, penalties: ArrayLike
) -> Array:
    """The penalty of each query [m] with the smallest squared error on tune runs. Errors: WhenceError on shared subsets.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        tune_masks: of the tune runs [r', n].
        tune_outputs: of the tune runs [r', m].
        penalties: those to choose from.
    """
    fit = _RidgeFit.of(masks, outputs)
    grid = checked_positive("penalties", penalties)
    tune_x, tune_y = _tune(masks, outputs, tune_masks, tune_outputs)
    across = ((tune_x - fit.mean_x) @ fit.x.T) @ fit.u
    inner, target = fit.u.T @ fit.y, tune_y - fit.mean_y
    errors = np.stack([((across / (fit.sigma + one) @ inner - target) ** 2).mean(axis=0) for one in grid])
    return grid[errors.argmin(axis=0)]


@dataclass(frozen=True)
class _RidgeFit:
    """Centred masks x [r, n] and outputs y [r, m], with xxᵀ = u diag(sigma) uᵀ."""

    x: Array
    y: Array
    mean_x: Array
    mean_y: Array
    u: Array
    sigma: Array
    sign: float

    @staticmethod
    def of(masks: ArrayLike, outputs: ArrayLike, better: str = "lower") -> _RidgeFit:
        kept, y, sign = checked_table(masks, outputs, better)
        if len(y) < 3:
            raise WhenceError(f"a datamodel of {len(y)} runs; needs >= 3")
        mean_x, mean_y = kept.mean(axis=0), y.mean(axis=0)
        x = kept - mean_x
        return _RidgeFit(x, y - mean_y, mean_x, mean_y, *_run_spectrum(x), sign)

    def left_out(self, penalty: float) -> Array:
        """Error of each run under the fit without it [r, m]: e_j / (1 - h_j)."""
        shrink = self.sigma / (self.sigma + penalty)
        residual = self.y - (self.u * shrink) @ (self.u.T @ self.y)
        leverage = 1 / len(self.y) + (self.u**2 * shrink).sum(axis=1)
        return np.asarray(residual / (1 - leverage)[:, None], np.float64)


def _run_spectrum(x: Array) -> tuple[Array, Array]:
    """u [r, k], sigma [k] with xxᵀ = u diag(sigma) uᵀ, from the smaller of the two Gram matrices."""
    r, n = x.shape
    values, vectors = np.linalg.eigh(x @ x.T if r <= n else x.T @ x)
    kept = values > values[-1] * max(r, n) * np.finfo(np.float64).eps
    sigma, vectors = values[kept], vectors[:, kept]
    return (vectors if r <= n else x @ vectors / np.sqrt(sigma)), sigma


def lasso(
    masks: ArrayLike, outputs: ArrayLike, penalty: ArrayLike, resamples: int, seed: int = 0, better: str = "lower"
) -> Estimate:
    """LASSO datamodel, one coordinate descent per query; for few images, where effects are sparse.

        min_{w,b} ‖Xw + b - y‖² / (2r) + λ‖w‖₁          w = 0 from λ_max = max_i |X_iᵀ(y - ȳ)|/r on, X centred

    SE: standard deviation over bootstraps of the runs, λ held. Effects are per inclusion. Errors: WhenceError for shapes or
    λ <= 0. Source: Ilyas et al. 2022 (2202.00622). Differs from released code: masks are not divided by their standard
    deviation, after which a weight would be per standard deviation.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        penalty: λ > 0: one number, or one per query [m] (`lasso_penalty_on`).
        resamples: bootstraps; with fewer than 2 the errors are NaN.
        seed: of the bootstraps.
        better: of an output, "lower" or "higher".
    """
    kept, y, sign = checked_table(masks, outputs, better)
    lam = checked_positive("penalty", penalty, y.shape[1])
    x = kept.astype(np.float64)
    values = _lasso_weights(x, y, lam)
    error = np.full_like(values, np.nan)
    if resamples > 1:
        rng = np.random.default_rng(seed)
        drawn = (rng.integers(0, len(y), len(y)) for _ in range(resamples))
        error = np.std([_lasso_weights(x[rows], y[rows], lam) for rows in drawn], axis=0, ddof=1)
    return Estimate(sign * values, error, len(y))


def lasso_penalty_on(
    masks: ArrayLike, outputs: ArrayLike, tune_masks: ArrayLike, tune_outputs: ArrayLike, fractions: ArrayLike
) -> Array:
    """The penalty of each query [m], out of `fractions` of its λ_max, with the smallest squared error on tune runs.

    Errors: WhenceError on shared subsets, or where a query's outputs do not vary, so that every penalty is the same.

    Args:
        masks: which images each run was trained on, bool [r, n].
        outputs: what each run says of each query [r, m].
        tune_masks: of the tune runs [r', n].
        tune_outputs: of the tune runs [r', m].
        fractions: of λ_max; the published path has 100 from 1 down to 1e-6.
    """
    kept, y, _ = checked_table(masks, outputs, "lower")
    parts = np.sort(checked_positive("fractions", fractions))[::-1]
    tune_x, tune_y = _tune(masks, outputs, tune_masks, tune_outputs)
    x, centred = kept - kept.mean(axis=0), y - y.mean(axis=0)
    highest = np.abs(x.T @ centred).max(axis=0) / len(y)
    if (highest <= 0).any():
        raise WhenceError(f"query {int(highest.argmin())} has no LASSO path: its outputs do not vary with the masks")
    chosen = np.empty(y.shape[1])
    for q, top in enumerate(highest):
        with _converging():
            grid, weights, _ = lasso_path(x, centred[:, q], alphas=parts * top, max_iter=20_000)
        errors = ((tune_x - kept.mean(axis=0)) @ weights - (tune_y[:, q] - y[:, q].mean())[:, None]) ** 2
        chosen[q] = grid[errors.mean(axis=0).argmin()]
    return chosen


def _lasso_weights(x: Array, y: Array, penalty: Array) -> Array:
    with _converging():
        fits = [Lasso(alpha=one, max_iter=20_000, tol=1e-8).fit(x, y[:, q]) for q, one in enumerate(penalty)]
    return np.stack([fit.coef_ for fit in fits])


@contextmanager
def _converging() -> Iterator[None]:
    """Coordinate descent that stops short is an error, not a warning beside a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            yield
        except ConvergenceWarning as error:
            raise WhenceError(f"LASSO did not converge; larger penalties are accepted ({error})") from error


def _tune(masks: ArrayLike, outputs: ArrayLike, tune_masks: ArrayLike, tune_outputs: ArrayLike) -> tuple[Array, Array]:
    """Tune masks and outputs, once they are known to fit the fitted ones and to share no subset with them."""
    kept, y, _ = checked_table(masks, outputs, "lower")
    tune_kept, tune_y, _ = checked_table(tune_masks, tune_outputs, "lower")
    if tune_kept.shape[1] != kept.shape[1] or tune_y.shape[1] != y.shape[1]:
        raise WhenceError(f"tune runs {tune_kept.shape}, {tune_y.shape} do not fit {kept.shape}, {y.shape}")
    fitted, tuned = ({row.tobytes() for row in np.packbits(table, axis=1)} for table in (kept, tune_kept))
    if fitted & tuned:
        raise WhenceError(f"{len(fitted & tuned)} subsets stand in the fitted and the tune runs; they must share none")
    return tune_kept.astype(np.float64), tune_y
