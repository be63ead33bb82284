"""Which LoRAs are related? The cosine of what they change, without forming it (after Liu et al. 2024).

    <dW_i, dW_j> = s_i s_j tr(A_i^T B_i^T B_j A_j) = s_i s_j sum((B_i^T B_j) * (A_i A_j^T))        summed over layers
    cos(i, j)    = sum_l <dW_i, dW_j>_l / sqrt(sum_l |dW_i|_l^2  sum_l |dW_j|_l^2)                 over the layers l of both
    centred      the same of dW_i - mean_k dW_k, the mean over the LoRAs of the collection with this layer, 3 or more:
                 G -> (1 - 1 w^T) G (1 - w 1^T) per layer, exactly

in float64. It does not depend on how dW was split into B and A. LoRAs of one base have a direction in common (what all
trainings do), which the centred one takes away; then what is left is relative to the collection, and n LoRAs that have
nothing in common are at -1 / (n - 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import permutation_test

from whence.models.lora_changes import Change
from whence.types import WhenceError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
KINDS = ("plain", "centred")
FEWEST = 3  # LoRAs whose mean says something of each
RANKS = 2048  # of the LoRAs that are multiplied at once
SHUFFLES = 9999
NOISE = 1e-12  # share of a sum of products that float64 cannot tell from 0
WHERE = "LoRA similarity"


@dataclass(frozen=True, eq=False)
class Relations:
    """How n LoRAs are related.

    Args:
        names: of the LoRAs.
        cosine: by kind, [n, n]; NaN where two cannot be compared; "centred" from 3 of the collection on.
        shared: layers that two have in common [n, n].
        coverage: share of |dW_i|^2 that lies in layers that j has, too [n, n].
        norms: |dW| [n]; 0 for a LoRA that changes nothing.
        reasons: why two cannot be compared, by their numbers i < j.
    """

    names: tuple[str, ...]
    cosine: Mapping[str, Array]
    shared: NDArray[np.int64]
    coverage: Array
    norms: Array
    reasons: Mapping[tuple[int, int], str]

    def of(self, kind: str) -> Array:
        """The cosines of a kind; refused where the collection is too small for it."""
        if kind not in self.cosine:
            what = f"the mean of {len(self.names)} LoRAs says nothing of them"
            raise WhenceError(what, "--similarity centred", "3 or more, or --similarity plain")
        return self.cosine[kind]


def relations(loras: Mapping[str, Mapping[str, Change]], collection: Sequence[str] | None = None) -> Relations:
    """How LoRAs are related to each other.

    Args:
        loras: what each changes, by layer (see `whence.models.lora_changes.changes`).
        collection: names of those whose mean is taken away from all; all by default.

    Raises:
        WhenceError: fewer than two.
    """
    if len(loras) < 2:
        raise WhenceError(f"{len(loras)} LoRAs", WHERE, "2 or more")
    names, every = tuple(loras), list(loras.values())
    whole = np.array([_size(found) for found in every])
    inside = np.array([collection is None or name in collection for name in names]) & (whole > 0)
    sums = _Sums(whole)
    for layer in sorted({layer for found in every for layer in found}):
        having = [(i, found[layer]) for i, found in enumerate(every) if layer in found]
        _conflicts(layer, having, sums.reasons)
        for shape in sorted({change.shape for _, change in having}):
            alike = [(i, change) for i, change in having if change.shape == shape]
            sums.add(np.array([i for i, _ in alike]), *products([change for _, change in alike]), inside)
    return sums.relations(names, enough=int(inside.sum()) >= FEWEST)


def _size(found: Mapping[str, Change]) -> float:
    """|dW|^2 of a LoRA; 0 where float64 cannot tell it from 0."""
    each = [products([change]) for change in found.values()]
    own, behind = (sum(float(one[k].sum()) for one in each) for k in (0, 1))
    return own if own > NOISE * behind else 0.0


class _Sums:
    """Sums over layers: inner products, and the squared norms of i where j has the layer, too."""

    def __init__(self, whole: Array):
        n = len(whole)
        self.whole = whole
        self.products = {kind: np.zeros((n, n)) for kind in KINDS}
        self.own = {kind: np.zeros((n, n)) for kind in KINDS}
        self.noise = np.zeros((n, n))
        self.shared = np.zeros((n, n), np.int64)
        self.reasons: dict[tuple[int, int], str] = {}

    def add(self, rows: NDArray[np.int64], gram: Array, size: Array, inside: Mask) -> None:
        """One layer. rows: the LoRAs that have it; gram: of these; size: what each |dW|^2 was summed up from."""
        here = np.ix_(rows, rows)
        self.shared[here] += 1
        self.noise[here] += NOISE * size[:, None]
        grams = {"plain": gram}
        if int(inside[rows].sum()) >= FEWEST:
            grams["centred"] = _centred(gram, inside[rows])
        for kind, found in grams.items():
            self.products[kind][here] += found
            self.own[kind][here] += np.diag(found)[:, None]

    def relations(self, names: tuple[str, ...], enough: bool) -> Relations:
        n, still = len(names), self.whole == 0
        reasons = {pair: why for pair in combinations(range(n), 2) if (why := self._apart(names, *pair))}
        apart = np.zeros((n, n), bool)
        for i, j in reasons:
            apart[i, j] = apart[j, i] = True
        apart[still, still] = True
        cosine = {kind: self._cosine(kind, apart) for kind in (KINDS if enough else KINDS[:1])}
        with np.errstate(invalid="ignore", divide="ignore"):
            coverage = np.where(still[:, None], np.nan, self.own["plain"] / self.whole[:, None])
        return Relations(names, cosine, self.shared, coverage, np.sqrt(self.whole), reasons)

    def _apart(self, names: Sequence[str], i: int, j: int) -> str:
        """Why two cannot be compared, "" where they can."""
        if (i, j) in self.reasons:
            return self.reasons[i, j]
        nothing = " and ".join(names[k] for k in (i, j) if self.whole[k] == 0)
        if nothing:
            return f"{nothing} changes nothing"
        if not self.shared[i, j]:
            return "they have no layer in common"
        ends = ((i, j), (j, i))
        nothing = " and ".join(names[pair[0]] for pair in ends if self.own["plain"][pair] <= self.noise[pair])
        return f"{nothing} changes none of the layers that they share" if nothing else ""

    def _cosine(self, kind: str, apart: Mask) -> Array:
        own = np.where(self.own[kind] <= self.noise, np.nan, self.own[kind])  # what is the mean has no direction
        found = self.products[kind] / np.sqrt(own * own.T)
        return np.where(apart, np.nan, np.clip(found, -1, 1))


def _conflicts(layer: str, having: Sequence[tuple[int, Change]], reasons: dict[tuple[int, int], str]) -> None:
    """Note LoRAs whose bases differ, since a layer has other shapes."""
    for k, (i, a) in enumerate(having):
        for j, b in having[k + 1 :]:
            if a.shape != b.shape:
                one, other = sorted([list(a.shape), list(b.shape)])  # the same reason for every pair of such bases
                reasons.setdefault(
                    (i, j), f"they are for other bases: {layer} is {one} in one and {other} in the other"
                )


def products(alike: Sequence[Change]) -> tuple[Array, Array]:
    """Of some LoRAs at a layer of one shape: <dW_i, dW_j> [n, n], and what |dW_i|^2 would be without signs [n].

    Args:
        alike: their changes of this layer.
    """
    blocks = _blocks([len(change.A) for change in alike])
    gram, size = np.zeros((len(alike), len(alike))), np.zeros(len(alike))
    for rows in blocks:
        for columns in blocks:
            if columns.start < rows.start:
                continue
            found, sizes = _block(alike[rows], alike[columns])
            gram[rows, columns] = found
            gram[columns, rows] = found.T
            if rows == columns:
                gram[rows, rows], size[rows] = (found + found.T) / 2, np.diag(sizes)
    return gram, size


def _blocks(ranks: Sequence[int]) -> list[slice]:
    """LoRAs whose ranks are together RANKS or less, or one: how many numbers are held at once."""
    starts, total = [0], 0
    for k, rank in enumerate(ranks):
        total += rank
        if total > RANKS and k > starts[-1]:
            starts, total = [*starts, k], rank
    return [slice(start, end) for start, end in pairwise([*starts, len(ranks)])]


def _block(some: Sequence[Change], others: Sequence[Change]) -> tuple[Array, Array]:
    """<dW_i, dW_j> between two groups, and the sum of the sizes of its terms."""
    left, right = (torch.cat([change.B.double() * change.scale for change in group], 1) for group in (some, others))
    above, below = (torch.cat([change.A.double() for change in group]) for group in (some, others))
    each = ((left.T @ right) * (above @ below.T)).numpy()  # [ranks of some, ranks of the others]
    starts = [np.cumsum([0, *(len(change.A) for change in group)])[:-1] for group in (some, others)]
    found, sizes = (np.add.reduceat(np.add.reduceat(x, starts[0], 0), starts[1], 1) for x in (each, np.abs(each)))
    return found, sizes


def _centred(gram: Array, inside: Mask) -> Array:
    """Of what is left without the mean of the LoRAs of the collection; none of them: nothing is taken away."""
    w = inside / max(int(inside.sum()), 1)
    mean = gram @ w
    return gram - mean[:, None] - mean[None] + w @ mean


# -------------------------------------------------------------------------------------------------------------- neighbours


def nearest(cosine: Array, among: Iterable[int] | None = None) -> NDArray[np.int64]:
    """The number of the LoRA nearest to each [n], -1 where it can be compared with none; the first of equals.

    Args:
        cosine: of all pairs [n, n].
        among: those that are looked at; all by default.
    """
    if not len(cosine):
        return np.zeros(0, np.int64)
    columns = np.zeros(len(cosine), bool)
    columns[list(range(len(cosine)) if among is None else among)] = True
    seen = np.where(np.isfinite(cosine) & columns & ~np.eye(len(cosine), dtype=bool), cosine, -np.inf)
    return np.where(np.isfinite(seen).any(1), seen.argmax(1), -1)


@dataclass(frozen=True)
class Labelled:
    """How often the nearest LoRA has the same label.

    Args:
        correct: LoRAs whose neighbour has their label.
        count: of those with a label and a neighbour that has one.
        chance: correct ones if each neighbour were one at random.
        p: how often labels at random have as many or more.
        labels: number of labels.
    """

    correct: int
    count: int
    chance: float
    p: float
    labels: int


def labelled(cosine: Array, labels: Sequence[str | None]) -> Labelled:
    """Leave-one-out: each LoRA gets the label of its nearest neighbour among the others.

    p is that of a permutation test: the neighbours stay, the labels are shuffled, all ways where there are few and 9,999
    of them otherwise. LoRAs count as independent; several of one training do not.

    Args:
        cosine: of all pairs [n, n].
        labels: None for one that has none.

    Raises:
        WhenceError: fewer than two labels, or none of two LoRAs or more.
    """
    having = [i for i, label in enumerate(labels) if label is not None]
    known = cosine[np.ix_(having, having)]
    beside = nearest(known)
    counted = np.flatnonzero(beside >= 0)
    kinds, codes = np.unique([str(labels[i]) for i in having], return_inverse=True)
    if len(kinds) < 2 or len(kinds) == len(having) or not len(counted):
        what = f"{len(kinds)} labels of {len(having)} LoRAs that can be compared"
        raise WhenceError(what, WHERE, "2 labels or more, one of them of 2 LoRAs or more")
    comparable = np.isfinite(known) & ~np.eye(len(having), dtype=bool)
    own = comparable & np.equal.outer(codes, codes)
    chance = float((own.sum(1)[counted] / comparable.sum(1)[counted]).sum())

    def correct(shuffled: NDArray[np.int64], axis: int = -1) -> NDArray[np.int64]:
        return (shuffled[..., counted] == shuffled[..., beside[counted]]).sum(axis)

    how = {"permutation_type": "pairings", "alternative": "greater", "n_resamples": SHUFFLES, "vectorized": True}
    test = permutation_test((codes,), correct, rng=np.random.default_rng(0), **how)
    return Labelled(int(correct(codes)), len(counted), chance, float(test.pvalue), len(kinds))
