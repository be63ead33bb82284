"""The strongest and the weakest training images of each query, from one pass in which no m x n numbers are held.

    for each block of training images:   s = sum_c eta_c a_q (x_q . phi_i) b_i w_i,   x_q = H_c^-1 psi_q, solved once

Of each query the K largest and the K smallest stay, and mean, variance, histogram and sums by group of all. What was kept of
any query is then scored for every query, by the same systems.

Standard errors are fitted to squares of all images of a query (`errors.pooled`): here to those of `SAMPLED` images, spread
evenly over all of them, that stand for all. They say what the scores that were kept are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from whence.curvature.solve import Problem, Solution
from whence.data.images import subset
from whence.features.rows import identity
from whence.methods.columns import fitted
from whence.methods.errors import MEASURED, unmeasured
from whence.methods.inner_product import FeatureMethod, recorded
from whence.report.statistics import Group, groups_of
from whence.scores import Whole, strongest
from whence.storage.arrays import Held, Rows
from whence.storage.files import progress
from whence.types import Method, Scores, Task, WhenceError, image_by_image

LARGEST = 2**31
"""Bytes that the scores of what is kept may take."""
BARS = 512
"""Bars of a histogram: at least half of them lie between its smallest and its largest score."""
TOGETHER = 4096
"""Images that are scored at once where they do not follow each other."""
SAMPLED = 4096
"""Images that stand for all where errors are measured."""


@dataclass(frozen=True)
class Strongest:
    """Of each query, how many of the strongest and of the weakest training images keep their scores.

    Args:
        count: K, from 1.
    """

    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise WhenceError(f"top is {self.count!r}", accepted="a whole number of images per query, from 1")

    def check(self, queries: int, images: int) -> None:
        """Refuse more than fits, before anything is computed.

        Args:
            queries: m.
            images: n.
        """
        size = 8 * queries * min(images, 2 * self.count * queries)
        if size > LARGEST:
            most = LARGEST // (16 * queries**2)
            told = f"what is kept of {queries:,} pictures, for each of them, takes up to {size / 2**30:.1f} GiB"
            fewer = "fewer pictures at once, in run folders of their own"
            raise WhenceError(told, "top", f"up to {most}, or {fewer}" if most else fewer)

    def score(self, task: Task, method: Method) -> Scores:
        """The scores of the images that are among the first or the last K of any query, and what is known of all.

        Args:
            task: the question.
            method: any. Where the score of an image needs nothing of the other images' rows but one solved system, nothing
                of m x n is held; the scores of other methods are computed as always, and then reduced.
        """
        self.check(len(task.queries), len(task.to_score))
        groups = groups_of(task.to_score.meta, len(task.to_score))
        if isinstance(method, FeatureMethod):
            method = fitted(method, task)
            method.check((method.damping,))
            systems = _systems(task, method)
            if systems is not None:
                return self._streamed(task, method, systems, groups)
        found = method(task)
        collected = Collected(self.count, len(found.query_ids), found.signed, groups, found.train_ids)
        collected.add(slice(0, len(found.train_ids)), found.values.double())
        return self._reduced(found, collected)

    def _streamed(
        self, task: Task, method: FeatureMethod, systems: Sequence[System], groups: Sequence[Group]
    ) -> Scores:
        images, chosen = task.to_score, method.checkpoints(task)
        weight = None if method.weight is None else method.weights(task, chosen)

        def values(some: slice | Tensor) -> Tensor:
            total = torch.stack([system.values(some) for system in systems]).sum(0)
            return total if weight is None else total * weight[some]

        collected = Collected(self.count, len(task.queries), method.signed(), groups, images.ids)
        for span in progress(systems[0].train.shards, "scores"):
            collected.add(span, method.finish(values(span)))
        kept = collected.rows()
        found = torch.cat([values(some) for some in kept.split(TOGETHER)], 1)
        of_kept = replace(task, scored=subset(images, kept.tolist()))
        scores = recorded(method, of_kept, method.finish(found.clone()), method.scale, method.signed(), chosen)
        scored = {name: value for name, value in scores.recipe.items() if name != "scored"}
        if task.scored is not None:
            scored["scored"] = identity(task.scored)
        scores = replace(scores, recipe={**scored, "top": self.count}, whole=collected.whole())
        if not task.errors or method.stated(task).of not in MEASURED:
            return unmeasured(scores, method, task)
        return _with_errors(scores, found, of_kept, task, method, weight)

    def _reduced(self, scores: Scores, collected: Collected) -> Scores:
        """Scores [m, n] of which only what was collected is kept."""
        kept = collected.rows()
        rows = kept.tolist()
        return replace(
            scores,
            values=scores.values[:, kept],
            train_ids=[scores.train_ids[row] for row in rows],
            train_meta={name: [column[row] for row in rows] for name, column in scores.train_meta.items()},
            stderr=None if scores.stderr is None else scores.stderr[:, kept],
            pictures=scores.pictures and (scores.pictures[0], subset(scores.pictures[1], rows)),
            recipe={**scores.recipe, "top": self.count},
            whole=collected.whole(scores.reliability),
        )


def _with_errors(
    scores: Scores, before: Tensor, of_kept: Task, task: Task, method: FeatureMethod, weight: Tensor | None
) -> Scores:
    """Scores with the standard errors that images which stand for all say they have.

    Args:
        scores: what was kept.
        before: the same, before `finish`.
        of_kept: the question about the images that were kept.
        task: the question.
        method: that scored them.
        weight: w [n]; None for 1.
    """
    n = len(task.to_score)
    some = torch.linspace(0, n - 1, min(n, SAMPLED), dtype=torch.float64).round().long()

    def score(problem: Problem, train: Rows, query: Tensor) -> Tensor:
        beside = _beside(method, problem, train, query.reshape(-1, train.width))
        assert beside is not None  # it was not for the scores themselves
        found = method.of_system(beside(Held.of(train.take(some.tolist()))), len(query))
        assert found is not None
        return found

    moved = method.moved(task, len(some), score)
    if weight is not None:
        moved.scores.mul_(weight[some])
    variances, of = method.variances(task, moved, of_kept.to_score, before)
    if variances is None:
        return replace(scores, stderr_of=of)
    of_some, _ = method.variances(task, moved, subset(task.to_score, some.tolist()))
    assert of_some is not None
    assert scores.whole is not None
    spread = scores.whole.variance
    share = torch.where(spread > 0, 1 - of_some.mean(1) / spread, torch.nan).clamp(min=0)
    whole = replace(scores.whole, reliability=share)
    return replace(scores, stderr=variances.sqrt(), stderr_of=of, whole=whole)


@dataclass(frozen=True)
class System:
    """What one checkpoint adds to the scores of any training images.

    Args:
        eta: its weight.
        train: rows of all training images that are scored [n, k].
        beside: rows -> the solved system beside these.
        scores: that system -> [m, images].
    """

    eta: float
    train: Rows
    beside: Callable[[Rows], Solution]
    scores: Callable[[Solution], Tensor | None]

    def values(self, some: slice | Tensor) -> Tensor:
        """Of some images, those of a slice or of these numbers: [m, images]."""
        rows = self.train.block(some) if isinstance(some, slice) else Held.of(self.train.take(some.tolist()))
        found = self.scores(self.beside(rows))
        assert found is not None  # it was not for the first
        return self.eta * found


def _systems(task: Task, method: FeatureMethod) -> list[System] | None:
    """The systems of all checkpoints, each solved once; None where one does not stand apart from the rows it is made of."""
    if type(method).of_system is FeatureMethod.of_system:
        return None
    found = []
    for (checkpoint, eta), where in method.named(method.checkpoints(task)):
        train, query = method.read(task, checkpoint, where)
        problem = Problem(task, checkpoint, method.sides()[0])
        scores = partial(method.of_system, count=len(task.queries))
        beside = _beside(method, problem, train, query.reshape(-1, train.width))
        if beside is None or scores(beside(train.block(train.shards[0]))) is None:
            return None
        found.append(System(eta, train, beside, scores))
    return found


def _beside(method: FeatureMethod, problem: Problem, train: Rows, query: Tensor) -> Callable[[Rows], Solution] | None:
    """rows -> the system beside these. One that is not made of them may be solved beside each block anew."""

    def solved(rows: Rows) -> Solution:
        (system,) = method.precondition.solve(problem, rows, query, (method.damping,))
        return system

    apart, first = image_by_image(method.precondition), train.block(train.shards[0])
    system = solved(first if apart else train)
    if system.beside(first) is None:
        return solved if apart else None
    return cast("Callable[[Rows], Solution]", system.beside)


@dataclass(eq=False)
class Collected:
    """What is kept while blocks of scores go by.

    Args:
        count: K.
        queries: m.
        signed: whether the smallest scores are kept, too.
        groups: columns whose sums are kept.
        names: of the images.
    """

    count: int
    queries: int
    signed: bool
    groups: Sequence[Group]
    names: Sequence[str]
    images: int = 0
    ends: list[End] = field(init=False)
    moments: Tensor = field(init=False)
    bars: Bars = field(default_factory=lambda: Bars())
    sums: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.ends = [End(self.count, sign) for sign in ((1, -1) if self.signed else (1,))]
        self.moments = torch.zeros(4, self.queries, dtype=torch.float64)
        self.sums = [torch.zeros(self.queries, len(group.names), dtype=torch.float64) for group in self.groups]

    def add(self, span: slice, values: Tensor) -> None:
        """Take the scores of some images.

        Args:
            span: which.
            values: theirs [m, images], float64.
        """
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            name = self.names[span.start + int(bad[0, 1])]
            raise WhenceError(
                f"{len(bad)} scores are not finite; the first is image {name!r} for query {int(bad[0, 0])}"
            )
        for end in self.ends:
            end.add(span, values)
        self._add_moments(values)
        self.bars.add(values)
        for sums, group in zip(self.sums, self.groups, strict=True):
            sums.index_add_(1, torch.from_numpy(group.codes[span]), values)

    def _add_moments(self, values: Tensor) -> None:
        """Mean and squared distances from it, joined block by block (Chan et al. 1982), which does not cancel."""
        count, more = self.images, values.shape[1]
        mean, square, positive, above = self.moments
        own = values.mean(1)
        apart = own - mean
        square += (values - own[:, None]).square().sum(1) + apart.square() * (count * more / (count + more))
        mean += apart * (more / (count + more))
        positive += values.clamp(min=0).sum(1)
        above += (values > 0).sum(1)
        self.images += more

    def rows(self) -> Tensor:
        """The images that are kept, in ascending order."""
        return torch.cat([end.images.flatten() for end in self.ends]).unique(sorted=True)

    def whole(self, reliability: Tensor | None = None) -> Whole:
        """What is known of all scores.

        Args:
            reliability: of each query [m], where it is known.
        """
        mean, square, positive, above = (each.clone() for each in self.moments)
        groups = {
            group.column: (group.names, torch.from_numpy(np.bincount(group.codes, minlength=len(group.names))), sums)
            for group, sums in zip(self.groups, self.sums, strict=True)
        }
        spread = square / self.images
        return Whole(
            self.images, mean, spread, positive, above.long(), self.bars.edges(), self.bars.counts, groups, reliability
        )


@dataclass(eq=False)
class End:
    """The images at one end of each query's scores, from the end inwards; of equal ones those that come first.

    Args:
        count: K.
        sign: 1 for the strongest, -1 for the weakest.
    """

    count: int
    sign: int
    values: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    images: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    def add(self, span: slice, values: Tensor) -> None:
        """Take the scores of some images; the arguments as of `Collected.add`."""
        m = len(values)
        numbers = torch.arange(span.start, span.stop).expand(m, -1)
        values, images = self.sign * values, numbers
        if self.values.numel():
            values, images = torch.cat([self.values, values], 1), torch.cat([self.images, images], 1)
        first = first_of(values, self.count)
        self.values, self.images = values.gather(1, first), images.gather(1, first)


def first_of(values: Tensor, k: int) -> Tensor:
    """`scores.strongest` of each row of [m, n]: columns [m, k], all rows at once."""
    if k >= values.shape[1]:
        return values.sort(dim=1, descending=True, stable=True).indices
    columns = values.topk(k, 1, sorted=False).indices.sort(1).values
    chosen = values.gather(1, columns)
    columns = columns.gather(1, chosen.sort(dim=1, descending=True, stable=True).indices)
    # Of equal scores at the end of the first k, `topk` takes any.
    last = chosen.amin(1, keepdim=True)
    for row in ((values == last).sum(1) != (chosen == last).sum(1)).nonzero().flatten().tolist():
        columns[row] = strongest(values[row], k)
    return columns


@dataclass(eq=False)
class Bars:
    """A histogram of each query's scores whose range doubles, two bars becoming one, when a score lies outside of it."""

    low: Tensor = field(default_factory=lambda: torch.empty(0))
    width: Tensor = field(default_factory=lambda: torch.empty(0))
    counts: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def add(self, values: Tensor) -> None:
        """Count scores [m, images], all of them finite."""
        values = values.double()
        smallest, largest = values.amin(1), values.amax(1)
        if not self.low.numel():
            # A little beyond both ends, so that rounding does not put the largest outside.
            spread = largest - smallest
            spread = torch.where(spread > 0, spread, largest.abs().clamp(min=1e-300))
            self.low, self.width = smallest - 0.01 * spread, 1.02 * spread / BARS
            self.counts = torch.zeros(len(values), BARS, dtype=torch.int64)
        for row, (low, high) in enumerate(zip(smallest.tolist(), largest.tolist(), strict=True)):
            while low < self.low[row]:
                self._double(row, downwards=True)
            while high >= self.low[row] + BARS * self.width[row]:
                self._double(row, downwards=False)
        place = ((values - self.low[:, None]) / self.width[:, None]).long().clamp(0, BARS - 1)
        self.counts.scatter_add_(1, place, torch.ones_like(place))

    def _double(self, row: int, downwards: bool) -> None:
        joined = self.counts[row].view(-1, 2).sum(1)
        nothing = torch.zeros_like(joined)
        if downwards:
            self.low[row] -= BARS * self.width[row]
        self.counts[row] = torch.cat([nothing, joined] if downwards else [joined, nothing])
        self.width[row] *= 2

    def edges(self) -> Tensor:
        """[m, bars + 1]"""
        return self.low[:, None] + self.width[:, None] * torch.arange(BARS + 1)
