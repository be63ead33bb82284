"""Settings chosen on tune subsets, reported on test subsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import ArrayLike

from whence.evaluation.lds import Setting, lds
from whence.storage.tables import Array, checked_masks, matrix
from whence.types import WhenceError


@dataclass(frozen=True)
class Nested(Generic[Setting]):
    """A setting chosen on tune runs and judged on test runs.

    Args:
        setting: the one chosen.
        lds: its mean LDS on the test runs, the number to report.
        optimism: how much higher the best setting on the test runs stands.
        tune: setting -> mean LDS on the tune runs.
        test: setting -> mean LDS on the test runs.
    """

    setting: Setting
    lds: float
    optimism: float
    tune: Mapping[Setting, float]
    test: Mapping[Setting, float]


def choose(
    candidates: Mapping[Setting, ArrayLike], tune_masks: ArrayLike, tune_outputs: ArrayLike, better: str = "lower"
) -> Setting:
    """The setting whose scores have the highest mean LDS on the tune runs; the first of equals.

    A query about which a candidate predicts nothing (constant) counts 0 for it in the choice; a query without variance
    is left out for all. Errors: WhenceError when there is no candidate or no query has variance.

    Args:
        candidates: setting -> scores [m, n].
        tune_masks: which images each tune run was trained on, bool [r, n].
        tune_outputs: what each tune run says of each query [r, m].
        better: of an output, "lower" or "higher".
    """
    curve = _curve(candidates, tune_masks, tune_outputs, better)
    return max(curve, key=lambda setting: curve[setting])


def nested(
    candidates: Mapping[Setting, ArrayLike],
    tune_masks: ArrayLike,
    tune_outputs: ArrayLike,
    test_masks: ArrayLike,
    test_outputs: ArrayLike,
    better: str = "lower",
) -> Nested[Setting]:
    """Choose on tune runs, report on test runs, and say what choosing on the test runs would have pretended.

    Errors: WhenceError when a subset stands in both, or as `choose`.

    Args:
        candidates: setting -> scores [m, n].
        tune_masks: which images each tune run was trained on, bool [r, n].
        tune_outputs: what each tune run says of each query [r, m].
        test_masks: of the test runs [r', n].
        test_outputs: of the test runs [r', m].
        better: of an output, "lower" or "higher".
    """
    tuned, tested = checked_masks(tune_masks), checked_masks(test_masks)
    shared = {row.tobytes() for row in np.packbits(tuned, axis=1)} & {
        row.tobytes() for row in np.packbits(tested, axis=1)
    }
    if shared:
        raise WhenceError(f"{len(shared)} subsets stand in the tune and the test runs; they must have none in common")
    tune = _curve(candidates, tuned, tune_outputs, better)
    test = _curve(candidates, tested, test_outputs, better)
    setting = max(tune, key=lambda key: tune[key])
    return Nested(setting, test[setting], max(test.values()) - test[setting], tune, test)


def _curve(
    candidates: Mapping[Setting, ArrayLike], masks: ArrayLike, outputs: ArrayLike, better: str
) -> dict[Setting, float]:
    varies = np.ptp(matrix("outputs", outputs), axis=0) > 0
    if not candidates or not varies.any():
        raise WhenceError(
            f"cannot choose between {len(candidates)} candidates on {varies.sum()} queries that vary; needs 1"
        )
    judged = {setting: lds(scores, masks, outputs, better)[varies] for setting, scores in candidates.items()}
    return {setting: float(np.nan_to_num(values).mean()) for setting, values in judged.items()}


def sharpen(scores: ArrayLike, power: float) -> Array:
    """sign(tau) |tau|^power: large scores stand out of the sum over a subset, small ones drop out. object shape -> the same.

    The order of a query's scores, and with it removal and retrieval, stays; only sums (LDS) change. The power is chosen on
    tune rows, as a damping is: `nested({p: sharpen(tau, p) for p in powers}, ...)`. Errors: a power that is not above 0.
    """
    if not 0 < power < np.inf:
        raise WhenceError(f"sharpen: power {power}; it must be above 0 and finite, or the order of the scores is lost")
    tau = np.asarray(scores, dtype=np.float64)
    return np.sign(tau) * np.abs(tau) ** power
