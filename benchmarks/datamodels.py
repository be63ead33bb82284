"""How much faster is one ridge datamodel for all queries than scikit-learn's Ridge per query?

200 queries, 512 half-mask runs, 5000 images, one penalty: our `ridge` (all queries in one solve, standard errors
included) against `sklearn.linear_model.Ridge` fitted once per query, and against one Ridge fitted to all queries at once,
the same machine and the same minute. Coefficients must agree to 1e-4, or there is no result.

    OMP_NUM_THREADS=1 python benchmarks/datamodels.py
"""

from time import perf_counter

import numpy as np
from sklearn.linear_model import Ridge

from _record import SMOKE, record
from whence.methods.removal.datamodels import ridge

RUNS, IMAGES, QUERIES, PENALTY, SEED = 512, 5000, 200, 100.0, 0
if SMOKE:
    RUNS, IMAGES, QUERIES = 16, 12, 3


def bank():
    """Half masks of one size, and outputs of a sparse additive world with seed noise of the same variance."""
    rng = np.random.default_rng(SEED)
    masks = rng.random((RUNS, IMAGES)).argsort(axis=1) < IMAGES // 2
    effects = rng.normal(size=(QUERIES, IMAGES)) * (rng.random((QUERIES, IMAGES)) < 0.02)
    signal = masks @ effects.T
    return masks, signal + signal.std(axis=0) * rng.normal(size=signal.shape)


def timed(work):
    start = perf_counter()
    result = work()
    return result, perf_counter() - start


def main():
    masks, outputs = bank()
    x = masks.astype(np.float64)
    ridge(masks[:64], outputs[:64], PENALTY)  # the first call loads libraries
    Ridge(alpha=PENALTY).fit(x[:64], outputs[:64, 0])
    ours, seconds = timed(lambda: ridge(masks, outputs, PENALTY, "higher").values)
    each, per_query = timed(lambda: [Ridge(alpha=PENALTY).fit(x, y).coef_ for y in outputs.T])
    joint, at_once = timed(lambda: Ridge(alpha=PENALTY).fit(x, outputs).coef_)
    apart = max(float(np.abs(ours - np.stack(each)).max()), float(np.abs(ours - joint).max()))
    if apart > 1e-4:
        raise SystemExit(f"coefficients differ by {apart}; no result is recorded")
    record(
        "datamodels",
        {
            "question": __doc__.splitlines()[0],
            "runs": RUNS,
            "images": IMAGES,
            "queries": QUERIES,
            "penalty": PENALTY,
            "seed": SEED,
            "seconds_whence_with_errors": seconds,
            "seconds_sklearn_per_query": per_query,
            "seconds_sklearn_all_queries": at_once,
            "ratio_per_query": per_query / seconds,
            "ratio_all_queries": at_once / seconds,
            "largest_difference": apart,
            "largest_coefficient": float(np.abs(ours).max()),
        },
    )


if __name__ == "__main__":
    main()
