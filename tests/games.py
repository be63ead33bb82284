"""Games whose values are known in closed form. A game maps masks bool [r, n] to values [r, m], larger = better."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np


@dataclass(frozen=True)
class Pairwise:
    """v(S) = Σ_{i∈S} b_i + Σ_{i<j∈S} Q_ij for m queries: b [m, n], Q [m, n, n] symmetric with zero diagonal.

    It tells the methods apart: Shapley and Banzhaf take half of Σ_j Q_ij, leave-one-out all of it, p-Banzhaf p of it.
    """

    b: np.ndarray
    Q: np.ndarray

    def __call__(self, masks):
        x = np.atleast_2d(masks).astype(float)
        return x @ self.b.T + 0.5 * np.einsum("ri,qij,rj->rq", x, self.Q, x)

    def p_banzhaf(self, p):
        return self.b + p * self.Q.sum(axis=2)

    @property
    def shapley(self):
        return self.p_banzhaf(0.5)

    @property
    def leave_one_out(self):
        return self.p_banzhaf(1.0)


def pairwise(players, queries=3, seed=0, interaction=1.0):
    rng = np.random.default_rng(seed)
    upper = np.triu(interaction * rng.normal(size=(queries, players, players)), 1)
    return Pairwise(rng.normal(size=(queries, players)), upper + upper.transpose(0, 2, 1))


def additive(players, queries=3, seed=0):
    return pairwise(players, queries, seed, interaction=0.0)


def voting(masks):
    """1 where more than half of the players agree: Shapley 1/n each, by symmetry."""
    masks = np.atleast_2d(masks)
    return (masks.sum(axis=1, keepdims=True) > masks.shape[1] / 2).astype(float)


def voting_banzhaf(players):
    """Chance that exactly half of the others agree, n even: that is when one voice decides."""
    return comb(players - 1, players // 2) / 2 ** (players - 1)


@dataclass(frozen=True)
class Airport:
    """v(S) = the longest runway anyone in S needs; costs ascending."""

    costs: np.ndarray

    def __call__(self, masks):
        return (np.atleast_2d(masks) * self.costs).max(axis=1, keepdims=True)

    @property
    def shapley(self):
        steps = np.diff(self.costs, prepend=0.0)
        return np.cumsum(steps / np.arange(len(self.costs), 0, -1))
