"""How much of what retraining does could any linear score foresee?

python benchmarks/linear.py [FOLDER]      about a quarter of an hour of one core

A score adds up over images, f(S) ~ const + sum_{i in S} tau_i, and training does not. With halves S and their complements
S', an additive f has (f(S) + f(S')) / 2 = const: what varies there, beyond the noise of seeds, is of even order in the
images, and no score has it. On the digits bank: the complements of the test subsets are trained with as many other seeds.

    odd = var (f(S) - f(S')) / 2 - noise      even = var (f(S) + f(S')) / 2 - noise
    the best linear score's correlation <= ceiling sqrt(odd / (odd + even))

Orders three, five ... are part of `odd`, so that this is still an upper bound. The rank correlation is that of a normal
distribution with the same correlation, as in `evaluate.ceiling`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from _record import RUNS, digits, digits_bank, record
from whence.diffusion.outputs import loss
from whence.evaluation import banks
from whence.evaluation.designs import Subset
from whence.evaluation.ledger import Ledger
from whence.types import Engine

ENGINE, FIRST = Engine(budget=2**31), 50_000


def by_subset(table):
    """Masks [K, n], and outputs of each subset and seed: [K, seeds, m]."""
    masks, _ = table.averaged()
    found = [table.outputs[np.asarray(table.subsets) == k] for k in np.unique(table.subsets)]
    return masks.astype(bool), np.stack(found)


def shares(one, other):
    """odd, even and noise variances of each query: [m]. one, other: outputs of subsets and their complements [K, s, m]."""
    seeds = one.shape[1]
    noise = (one.var(1, ddof=1) + other.var(1, ddof=1)).mean(0) / 2
    a, b = one.mean(1), other.mean(1)
    odd, even = (((a + sign * b) / 2).var(0, ddof=1) - noise / (2 * seeds) for sign in (-1, 1))
    return odd, even, noise


def bound(one, other, limit, rows):
    """The best linear score's rank correlation, mean over queries, from some of the subsets."""
    odd, even, _ = shares(one[rows], other[rows])
    pearson = limit.pearson.estimate * np.sqrt(np.clip(odd / (odd + even), 0, 1))
    return float((6 / np.pi * np.arcsin(pearson / 2)).mean())


def main(folder):
    recipe = digits()
    bank, result = digits_bank(recipe), {}
    for kind in banks.QUERIES:
        table = bank.tables[kind].role("test")
        masks, one = by_subset(table)
        seeds = one.shape[1]
        subsets = [
            Subset(~mask, "test", "complement", tuple(range(FIRST + seeds * k, FIRST + seeds * (k + 1))), 0.5)
            for k, mask in enumerate(masks)
        ]
        ledger = Ledger.plan(folder / "complements", recipe.study, recipe.train, subsets, recipe.stack)
        ledger.run(engine=ENGINE)
        ledger.measure(kind, bank.queries[kind], loss, recipe.draws, ENGINE)
        there, other = by_subset(ledger.table(kind))
        assert np.array_equal(there, ~masks)
        limit = table.ceiling()

        rng, every = np.random.default_rng(0), np.arange(len(one))
        drawn = [bound(one, other, limit, rng.choice(every, len(every))) for _ in range(1000)]
        odd, even, noise = shares(one, other)
        result[kind] = {
            "ceiling": limit.spearman.estimate,
            "even share": float((even / (odd + even)).mean()),
            "noise of one seed / (odd + even)": float((noise / (odd + even)).mean()),
            "linear ceiling": bound(one, other, limit, every),
            "linear ceiling, 95 %": [float(q) for q in np.quantile(drawn, (0.025, 0.975))],
        }
    return {"question": __doc__.split("\n")[0], "subsets": len(one), "seeds": seeds, **result}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = main(Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "bench-digits")
    record("linear", found)
