"""Scores: one number per query and training image, what they mean and how sure they are."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from whence.plain import WhenceError, expect, owner_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from whence.types import Images


SURE = 2.58
"""Standard errors of a difference: of two images that deserve the same score, one is said to be above the other in 1 of 100
cases. With 1.96 (1 of 20) too much is said of the images that are first, which are there because they were lucky, too:
benchmarks/errors.py counts both."""


def surely(row: Tensor, stderr: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
    """Which images are surely above some of them, and which surely below: where |s_i - s_j| > 2.58 sqrt(e_i^2 + e_j^2).

    Args:
        row: scores s [n].
        stderr: e [n]; NaN where nothing is known.
        some: columns [k]; the answers are [k, n].
    """
    row, variance = row.double(), stderr.double().square().nan_to_num(torch.inf)
    apart, sure = row - row[some, None], SURE * (variance + variance[some, None]).sqrt()
    return apart > sure, apart < -sure


def ranks_between(row: Tensor, stderr: Tensor, images: Sequence[int]) -> list[tuple[int, int]]:
    """The ranks (0 = highest score) that each of some images may have: the lowest and the highest.

    Those surely above it come before it, those surely below it after it, and any other may stand on either side.

    Args:
        row: scores [n].
        stderr: theirs [n].
        images: columns.
    """
    found: list[tuple[int, int]] = []
    for some in torch.tensor(list(images), dtype=torch.int64).split(256):  # 256 x n numbers at once
        above, below = surely(row, stderr, some)
        last = len(row) - 1 - below.sum(1)
        found += zip(above.sum(1).tolist(), last.tolist(), strict=True)
    return found


def strongest(row: Tensor, k: int | None) -> Tensor:
    """Columns of the k largest of a row [n], largest first; equal scores keep the order of the images, on every machine.

    Only what is not below the k-th largest is sorted.

    Args:
        row: scores [n].
        k: how many; None, or more than n, for all.
    """
    if k is None or k >= len(row):
        return row.sort(descending=True, stable=True).indices
    some = (row >= row.topk(k, sorted=False).values.min()).nonzero().flatten()
    return some[row[some].sort(descending=True, stable=True).indices[:k]]


def _check_count(k: int | None) -> None:
    if k is not None:
        expect(k, numbers.Integral, "k", "how many images: 1 or more")
    if k is not None and k < 1:  # Python would count from the end
        raise WhenceError(f"k is {k}", "scores", "how many images: 1 or more")


@dataclass(frozen=True)
class Whole:
    """What is known of all scores of each query, where only those of some training images were kept (`top`).

    Args:
        count: training images that were scored, n.
        mean, variance: of the scores of each query [m].
        positive, above: sum of the scores above 0, and how many there are [m].
        edges: of the bars of a histogram, [m, bars + 1].
        bars: scores in each [m, bars].
        groups: column -> names of its groups; their images [groups]; sums of the scores [m, groups].
        reliability: as `Scores.reliability`, of all of them [m]; None where errors are not known.
    """

    count: int
    mean: Tensor
    variance: Tensor
    positive: Tensor
    above: Tensor
    edges: Tensor
    bars: Tensor
    groups: Mapping[str, tuple[Sequence[str], Tensor, Tensor]] = field(default_factory=dict)
    reliability: Tensor | None = None


@dataclass(frozen=True, repr=False)
class Scores:
    """One number per query and training image: larger = this training image did more FOR the query.

    Args:
        values: [m, n].
        query_ids, train_ids: the names of both.
        recipe: what replays the result.
        scale: "removal" (predicted rise of the query's loss when the image is removed), "upweight" (n times that), "value"
            (in units of the measured output, over subsets) or "rank" (no units).
        signed: False where only the magnitude means anything.
        train_meta: the training images' own columns.
        pictures: what queries and training images look like, for notebooks; None where that is not known.
        stderr: standard errors [m, n], 0 where nothing was drawn by chance, NaN where one run cannot tell; None where none
            were asked for or measured.
        stderr_of: what would be drawn anew in a run that differs by as much: "draws", "masks and seeds" ...; where none were
            measured, why.
        whole: what is known of all scores where the training images are only those among the first or last of a query; None
            where all scores are here.
    """

    values: Tensor
    query_ids: Sequence[str]
    train_ids: Sequence[str]
    recipe: Mapping[str, Any]
    scale: str = "rank"
    signed: bool = True
    train_meta: Mapping[str, Sequence[object]] = field(default_factory=dict)
    pictures: tuple[Images, Images] | None = field(default=None, compare=False)
    stderr: Tensor | None = None
    stderr_of: str = ""
    whole: Whole | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        expected, found = (len(self.query_ids), len(self.train_ids)), tuple(self.values.shape)
        if found != expected:
            raise WhenceError(f"scores have shape {found}, but there are {expected} queries and images")
        if self.stderr is not None and (tuple(self.stderr.shape) != found or bool((self.stderr < 0).any())):
            raise WhenceError(f"standard errors {tuple(self.stderr.shape)} of scores {found}; one each, none below 0")
        bad = (~torch.isfinite(self.values)).nonzero()
        if len(bad):
            query, image = self.query_ids[int(bad[0, 0])], self.train_ids[int(bad[0, 1])]
            raise WhenceError(f"{len(bad)} scores are not finite; the first is image {image!r} for query {query!r}")

    @property
    def some_only(self) -> bool:
        """Whether only some of the training images have a score here; the others have none, which is not a score of 0."""
        return "scored" in self.recipe or "top" in self.recipe

    @property
    def complete(self) -> bool:
        """Whether all training images were scored, though only the strongest and weakest of each query may be here."""
        return "scored" not in self.recipe

    @property
    def kept(self) -> int | None:
        """Of how many of the strongest and of the weakest images of each query the scores were kept; None for all."""
        found = self.recipe.get("top")
        return found if isinstance(found, int) and self.whole is not None and self.whole.count > found else None

    @property
    def reliability(self) -> Tensor | None:
        """How well the scores of each query would correlate with those of a run that draws anew: [m], in [0, 1].

            1 - mean_i stderr_i^2 / var_i values_i        the variance between images that is not error

        NaN where all images score alike or errors are not known; None where none were measured.
        """
        if self.whole is not None:
            return self.whole.reliability
        if self.stderr is None:
            return None
        spread = self.values.double().var(1, correction=0)
        share = 1 - self.stderr.double().square().mean(1) / spread
        return torch.where(spread > 0, share, torch.nan).clamp(min=0)

    def top(self, query: int | str, k: int = 10) -> list[tuple[str, float]]:
        """The k strongest proponents of a query, given by its row or its name, strongest first."""
        return self._ranked(query, k, largest=True)

    def bottom(self, query: int | str, k: int = 10) -> list[tuple[str, float]]:
        """The k strongest opponents of a query, given likewise, strongest first."""
        return self._ranked(query, k, largest=False)

    def _ranked(self, query: int | str, k: int, largest: bool) -> list[tuple[str, float]]:
        _check_count(k)
        self._check_kept(k)
        row = self.values[self._row(query)]
        return [(self.train_ids[i], float(row[i])) for i in strongest(row if largest else -row, k).tolist()]

    def _row(self, query: int | str) -> int:
        """The row of a query, given by its number or its name."""
        count, accepted = len(self.query_ids), f"0 to {len(self.query_ids) - 1}, or a name of query_ids"
        expect(query, (numbers.Integral, str), "query", accepted)
        place = self.query_ids.index(query) if query in self.query_ids else query
        if isinstance(place, str) or not -count <= place < count:
            raise WhenceError(f"there is no query {query!r}", "scores", accepted)
        return int(place)

    def _check_kept(self, k: int | None) -> None:
        """Refuse more images of a query than were kept of each: those of other queries are not the next ones."""
        kept = self.kept
        if kept is not None and (k is None or k > kept):
            told = f"of each picture the first and the last {kept} images were kept"
            raise WhenceError(f"{told}, and {'all' if k is None else k} are asked for", "scores", f"up to {kept}")

    def ranks_between(self, query: int | str, images: Sequence[int]) -> list[tuple[int, int]]:
        """The ranks (0 = strongest proponent) that each of some images may have: the lowest and the highest (see `surely`).

        Args:
            query: its row, or its name.
            images: columns.
        """
        if self.whole is not None:
            raise WhenceError("ranks need the scores of all images", "scores", "scores without top")
        if self.stderr is None:
            raise WhenceError("these scores state no standard errors", "scores", "scores of a method that does")
        row, n = self._row(query), len(self.train_ids)
        for image in images:
            expect(image, numbers.Integral, "images", f"columns, 0 to {n - 1}")
            if not 0 <= image < n:
                raise WhenceError(f"there is no training image {image}", "images", f"columns, 0 to {n - 1}")
        return ranks_between(self.values[row], self.stderr[row], images)

    def columns(self, k: int | None = None) -> dict[str, list[object]]:
        """A long table: query, rank (0 = strongest proponent), image, score, and the training images' own columns.

        Where the scores have standard errors: stderr, and first_rank and last_rank of `ranks_between`, too.

        Args:
            k: images per query, the strongest; None for all.
        """
        _check_count(k)
        k = self.kept if k is None else k
        self._check_kept(k)
        count = len(self.train_ids) if k is None else min(k, len(self.train_ids))
        chosen = torch.stack([strongest(row, count) for row in self.values])
        image = chosen.flatten().tolist()
        table: dict[str, list[object]] = {
            "query": [name for name in self.query_ids for _ in range(count)],
            "rank": [rank for _ in self.query_ids for rank in range(count)],
            "image": [self.train_ids[i] for i in image],
            "score": self.values.gather(1, chosen).flatten().tolist(),
        }
        if self.stderr is not None and self.whole is not None:
            table["stderr"] = self.stderr.gather(1, chosen).flatten().tolist()
        elif self.stderr is not None:
            between = [pair for query, row in enumerate(chosen.tolist()) for pair in self.ranks_between(query, row)]
            table["stderr"] = self.stderr.gather(1, chosen).flatten().tolist()
            table["first_rank"], table["last_rank"] = [a for a, _ in between], [b for _, b in between]
        for name, column in self.train_meta.items():
            while name in table:
                name = f"train_{name}"
            table[name] = [column[i] for i in image]
        return table

    def to_frame(self, k: int | None = None) -> DataFrame:
        """The table of `columns` as a pandas DataFrame, where pandas is installed."""
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise WhenceError("to_frame needs pandas", accepted="pip install pandas; to_csv, to_parquet") from None
        return pandas.DataFrame(self.columns(k))

    def to_csv(self, path: str | Path, k: int | None = None) -> None:
        """Write the table of `columns` as CSV, with a header: texts as a spreadsheet shows them, not as formulas."""
        content: bytes = import_module("whence.storage.columns").as_csv(self.columns(k))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    def to_parquet(self, path: str | Path, k: int | None = None) -> None:
        """Write the table of `columns` as Parquet."""
        import_module("whence.storage.scores").to_parquet(self, path, k)

    def plot(self, query: int | str = 0) -> Figure:
        """All scores of one query, from the strongest proponent to the strongest opponent: a matplotlib figure."""
        if self.kept is not None:
            raise only_some("plot", self)
        row = self._row(query)
        figure: Figure = import_module("matplotlib.figure").Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(self.train_ids)), sorted(self.values[row].tolist(), reverse=True), width=1.0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="rank of the training image", ylabel=f"score ({self.scale})", title=str(self.query_ids[row]))
        return figure

    def __repr__(self) -> str:
        method = self.recipe.get("method")
        name = method.get("name", "scores") if isinstance(method, Mapping) else "scores"
        shape = f"{len(self.query_ids):,} queries x {len(self.train_ids):,} training images"
        return f"Scores({name}, {shape}, scale={self.scale!r}; positive = proponent)"

    def _repr_html_(self) -> str:
        """What a notebook shows: the strongest images of the first pictures, with thumbnails."""
        shown: str = import_module("whence.report.notebook").table(self)
        return shown

    def predict(self, weights: Tensor | Sequence[float]) -> Tensor:
        """The predicted rise of every query's loss when the training images weigh this much in the training: [m], float64.

            sum_i (1 - w_i) score_i        over n, the number of images, where the scale is "upweight"

        To first order: what an image does is taken not to depend on the weights of the others. Of scores of scale "rank" the
        number has no units, and only says which of several weightings is worse. Where a query is measured by an output that
        is better when higher, it is the predicted fall.

        Args:
            weights: one real number per training image (or group): 1 as it was trained, 0 without it: [n].
        """
        check_signed("predict", self)
        w = torch.as_tensor(weights, dtype=torch.float64)
        if tuple(w.shape) != (len(self.train_ids),) or not torch.isfinite(w).all():
            count = f"{len(self.train_ids):,} finite numbers, one per training image"
            raise WhenceError(
                f"weights of shape {list(w.shape)}, {int((~w.isfinite()).sum())} not finite", "predict", count
            )
        images = self.recipe["groups"]["images"] if "groups" in self.recipe else len(self.train_ids)
        return self.values.double() @ (1 - w) / (images if self.scale == "upweight" else 1)

    def group_by(self, column: str) -> Scores:
        """Sum the scores of the images of each group (an artist, a class). Sums are not Shapley values, and have no standard
        errors here: those of single images are not independent of each other."""
        if self.some_only:
            raise only_some("scores", self)
        check_groups(self, column, "group_by")
        if column not in self.train_meta:
            raise WhenceError(
                f"no column {column!r} in the training images; there is {sorted(self.train_meta) or 'none'}"
            )
        labels = [owner_of(value) for value in self.train_meta[column]]
        groups = sorted(set(labels))
        place = {group: number for number, group in enumerate(groups)}
        index = torch.tensor([place[label] for label in labels])
        sums = torch.zeros(len(self.query_ids), len(groups), dtype=self.values.dtype)
        sums.index_add_(1, index, self.values)
        recipe = {**self.recipe, "groups": {"by": column, "images": len(labels)}}
        of_groups = dataclasses.replace(self, values=sums, train_ids=groups, train_meta={}, stderr=None, stderr_of="")
        return dataclasses.replace(of_groups, recipe=recipe, pictures=None)


def groups_scored(scores: Scores) -> str | None:
    """The column whose groups have a score each, which their images share equally; None where images have scores."""
    found = scores.recipe.get("unlearned")
    by = found.get("by") if isinstance(found, Mapping) else None
    return None if by in (None, "image") else str(by)


def check_groups(scores: Scores, by: str, where: str) -> None:
    """Refuse sums by another column than the one whose groups were scored: they would be made of equal parts.

    Args:
        scores: any.
        by: the column.
        where: whose error it is.
    """
    own = groups_scored(scores)
    if own not in (None, by):
        told = f"these are scores of the groups of {own!r}, whose images share them equally: they say nothing by {by!r}"
        raise WhenceError(told, where, str(own))


def check_signed(where: str, scores: Scores) -> None:
    """Refuse scores that cannot be added up to what happens without some images: of candidates alone, or without a sign.

    Args:
        where: whose scores they are.
        scores: any.
    """
    if scores.some_only:
        raise only_some(where, scores)
    if not scores.signed:
        raise WhenceError("these scores say how much, and not which way", where, "scores of a method with a sign")


def only_some(where: str, scores: Scores) -> WhenceError:
    """The refusal of scores of some training images where every image needs one.

    Args:
        where: whose scores they are.
        scores: of candidates alone.
    """
    return WhenceError(
        f"only {len(scores.train_ids):,} of the training images have a score, and the others have none",
        where,
        "scores of all training images (`whence attribute` without --candidates and --top)",
    )
