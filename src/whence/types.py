"""The words every room shares: a batch, a draw, a checkpoint, a task, and the scores that come out.

Axis letters everywhere: n training images, m queries, b batch, k feature size, r retraining runs, T timesteps.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from whence.plain import WhenceError, describe, digest, from_plain  # noqa: F401  # words of every room, too

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

VERSION = version("whence")
Weights = dict[str, Tensor]  # parameter name -> value
Blocks = dict[str, Tensor]  # parameter name -> [b, numel] or [b, *shape], one row per image
Call = Callable[..., Any]  # a network, or a functional stand-in for it


@dataclass(frozen=True)
class Batch:
    """A few images in memory.

    x0: [b, ...] clean images in [-1, 1] (or any array the forward understands); keys: [b] int64, the noise key of each
    image; cond: named conditions, each [b, ...] (class labels, embeddings).
    """

    x0: Tensor
    keys: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x0)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        """The same elsewhere. Pictures become numbers of this type whatever they were; integers among conditions stay."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype) if value.is_floating_point() else value.to(device)

        return Batch(self.x0.to(device, dtype), self.keys, {name: move(value) for name, value in self.cond.items()})


@dataclass(frozen=True)
class Draw:
    """One (timestep, noise) pair per row of a batch: t [b] int64, noise shaped like x0."""

    t: Tensor
    noise: Tensor


@runtime_checkable
class Images(Protocol):
    """Images with stable names. Neither their order nor their grouping in batches ever changes a result.

    ids: unique readable names; digests: content fingerprints (hex), which key the noise, so that a renamed or
    reordered file keeps its noise and its features; meta: one column per group key (creator, license, label ...).

    labels: [n] int64 class indices, None without classes; preprocess: how pixels became what `batch` returns, {} where
    they were taken as they are; empty_caption: the conditions of a picture that is told nothing, None where there are no
    captions; pictures: what these images look like, themselves save where the network sees latents of them; describe: what
    stored features know them by besides their digests, None where those say everything.
    """

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def digests(self) -> Sequence[str]: ...

    @property
    def meta(self) -> Mapping[str, Sequence[object]]: ...

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def preprocess(self) -> Mapping[str, object]: ...

    @property
    def empty_caption(self) -> Mapping[str, Tensor] | None: ...

    @property
    def pictures(self) -> Images: ...

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch: ...

    def describe(self) -> Mapping[str, object] | None: ...


class Forward(Protocol):
    """Image and draw -> (prediction, target). `call` is the module itself or a functional stand-in for it.

    timesteps: T (1 for a classifier). alphas_cumprod: [T] signal fractions, or None where there is no such schedule.
    models: "denoiser" or "classifier", whose outputs fit it, or "any"; prediction_type: what is predicted, as diffusers
    names it ("epsilon", "sample" ...). Of the training: the density of its timesteps, u in (0, 1) -> fraction of the
    schedule, and the weight w_t of its loss at timesteps t [b]: [b].
    """

    @property
    def timesteps(self) -> int: ...

    @property
    def alphas_cumprod(self) -> Tensor | None: ...

    @property
    def models(self) -> str: ...

    @property
    def prediction_type(self) -> str: ...

    @property
    def density(self) -> Callable[[Tensor], Tensor]: ...

    def weight(self, t: Tensor) -> Tensor: ...

    def __call__(self, call: Call, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights: how to load them, what they are (digest), and where in training they stand.

    rate: the learning rate in force there, or None when the folder does not say; methods that weight checkpoints by it
    then refuse to run instead of assuming 1. problem: why it cannot be read, "" where it can; only methods that read it
    refuse then.
    """

    load: Callable[[], nn.Module]
    digest: str
    name: str = "model"
    step: int | None = None
    rate: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Engine:
    """How the work is carried out: device and number format of the model, images read at a time, and the bytes that the
    per-image gradients held at once may take. Apart from dtype none of it changes a result."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    budget: int = 256 * 2**20


class Trainable(Protocol):
    """What made a model, so that it can be made again: `training.study.Study`, or anything like it.

    recipe: a `training.recipe.Recipe`; prior, prior_weight: prior images that every step sees besides, and what one of them
    counts beside another image (None and 1 without).
    """

    @property
    def recipe(self) -> Any: ...

    @property
    def prior(self) -> Images | None: ...

    @property
    def prior_weight(self) -> float: ...

    def network_at(self, seed: int) -> nn.Module:
        """The network before training."""

    def forward(self) -> Forward:
        """How it is measured."""

    def at(self, seed: int) -> Any:
        """The recipe with another seed."""


class Trajectory(Protocol):
    """How the queries were sampled. timesteps: of the sampler, noisiest first; `predicted`: the clean images that the
    network saw in the queries at one of them, under the names of the queries."""

    @property
    def timesteps(self) -> Sequence[int]: ...

    def predicted(self, timestep: int) -> Images: ...


@dataclass(frozen=True)
class Task:
    """A question: which of `train` made `queries`?

    Args:
        forward: how the network is measured.
        trajectory: checkpoints of one training, the final one, which sampled the queries, last.
        train: the images of that training.
        queries: the pictures to explain.
        root: the run folder, where features are kept and resumed from.
        engine: how the work is carried out.
        ensemble: final weights of further models trained alike, for methods that average over models.
        study: how the model was trained, None where it is not known: methods that need it say so.
        sampled: how the queries were sampled, None likewise.
        index: where what is computed of the training images is kept, for several runs; the run folder where None.
        scored: the training images that are scored; all of `train` where None. The curvature is that of all of them.
    """

    forward: Forward
    trajectory: Sequence[Checkpoint]
    train: Images
    queries: Images
    root: Path
    engine: Engine = Engine()
    ensemble: Sequence[Checkpoint] = ()
    study: Trainable | None = None
    sampled: Trajectory | None = None
    index: Path | None = None
    scored: Images | None = None

    @property
    def to_score(self) -> Images:
        """The training images that get a score."""
        return self.train if self.scored is None else self.scored

    def folder_of(self, images: Images) -> Path:
        """Where what is computed of these images is kept."""
        return self.root if self.index is None or images is not self.train else self.index


class Method(Protocol):
    """Everything that attributes is this: a task in, scores out."""

    def __call__(self, task: Task) -> Scores: ...


@runtime_checkable
class ImageByImage(Protocol):
    """A method, or the preconditioner of one, that declares whether it looks at the training images that are scored one by
    one, so that a score is the same whichever others are scored."""

    @property
    def image_by_image(self) -> bool: ...


def image_by_image(part: object) -> bool:
    """Whether a method, or a preconditioner, says that it scores image by image. Who says nothing is taken not to."""
    return isinstance(part, ImageByImage) and part.image_by_image


def _check_count(k: int | None) -> None:
    if k is not None and k < 1:  # Python would count from the end
        raise WhenceError(f"k is {k}", "scores", "how many images: 1 or more")


@dataclass(frozen=True, repr=False)
class Scores:
    """One number per query and training image: larger = this training image did more FOR the query.

    Args:
        values: [m, n].
        query_ids, train_ids: the names of both.
        recipe: what replays the result.
        scale: "removal" (predicted rise of the query's loss when the image is removed), "upweight" (n times that) or "rank"
            (no units).
        signed: False where only the magnitude means anything.
        train_meta: the training images' own columns.
        pictures: what queries and training images look like, for notebooks; None where that is not known.
    """

    values: Tensor
    query_ids: Sequence[str]
    train_ids: Sequence[str]
    recipe: Mapping[str, Any]
    scale: str = "rank"
    signed: bool = True
    train_meta: Mapping[str, Sequence[object]] = field(default_factory=dict)
    pictures: tuple[Images, Images] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        expected, found = (len(self.query_ids), len(self.train_ids)), tuple(self.values.shape)
        if found != expected:
            raise WhenceError(f"scores have shape {found}, but there are {expected} queries and images")
        bad = (~torch.isfinite(self.values)).nonzero()
        if len(bad):
            query, image = self.query_ids[int(bad[0, 0])], self.train_ids[int(bad[0, 1])]
            raise WhenceError(f"{len(bad)} scores are not finite; the first is image {image!r} for query {query!r}")

    @property
    def some_only(self) -> bool:
        """Whether only some of the training images were scored; the others have no score, which is not a score of 0."""
        return "scored" in self.recipe

    def top(self, query: int | str, k: int = 10) -> list[tuple[str, float]]:
        """The k strongest proponents of a query, given by its row or its name, strongest first."""
        return self._ranked(query, k, largest=True)

    def bottom(self, query: int | str, k: int = 10) -> list[tuple[str, float]]:
        """The k strongest opponents of a query, given likewise, strongest first."""
        return self._ranked(query, k, largest=False)

    def _ranked(self, query: int | str, k: int, largest: bool) -> list[tuple[str, float]]:
        count = len(self.query_ids)
        place = self.query_ids.index(query) if query in self.query_ids else query
        if isinstance(place, str) or not -count <= place < count:
            raise WhenceError(f"there is no query {query!r}", "scores", f"0 to {count - 1}, or a name of query_ids")
        _check_count(k)
        row = self.values[place]
        # A stable sort: equal scores keep the order of the images, on every machine.
        order = torch.sort(row, descending=largest, stable=True).indices[:k].tolist()
        return [(self.train_ids[i], float(row[i])) for i in order]

    def columns(self, k: int | None = None) -> dict[str, list[object]]:
        """A long table: query, rank (0 = strongest proponent), image, score, and the training images' own columns.

        Args:
            k: images per query, the strongest; None for all.
        """
        _check_count(k)
        count = len(self.train_ids) if k is None else min(k, len(self.train_ids))
        order = self.values.sort(dim=1, descending=True, stable=True)
        image = order.indices[:, :count].flatten().tolist()
        table: dict[str, list[object]] = {
            "query": [name for name in self.query_ids for _ in range(count)],
            "rank": [rank for _ in self.query_ids for rank in range(count)],
            "image": [self.train_ids[i] for i in image],
            "score": order.values[:, :count].flatten().tolist(),
        }
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
        """Write the table of `columns` as CSV, with a header."""
        table = self.columns(k)
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))

    def to_parquet(self, path: str | Path, k: int | None = None) -> None:
        """Write the table of `columns` as Parquet."""
        import_module("whence.storage.scores").to_parquet(self, path, k)

    def plot(self, query: int = 0) -> Figure:
        """All scores of one query, from the strongest proponent to the strongest opponent: a matplotlib figure."""
        figure: Figure = import_module("matplotlib.figure").Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        axes.bar(range(len(self.train_ids)), sorted(self.values[query].tolist(), reverse=True), width=1.0)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="rank of the training image", ylabel=f"score ({self.scale})", title=str(self.query_ids[query]))
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
        number has no units, and only says which of several weightings is worse. Of an output that is better when higher, it
        is the predicted fall.

        Args:
            weights: one real number per training image (or group): 1 as it was trained, 0 without it: [n].
        """
        check_signed("predict", self)
        w = torch.as_tensor(weights, dtype=torch.float64)
        if tuple(w.shape) != (len(self.train_ids),) or not torch.isfinite(w).all():
            what = f"weights of shape {list(w.shape)}, {int((~w.isfinite()).sum())} not finite"
            raise WhenceError(what, "predict", f"{len(self.train_ids):,} finite numbers, one per training image")
        images = self.recipe["groups"]["images"] if "groups" in self.recipe else len(self.train_ids)
        return self.values.double() @ (1 - w) / (images if self.scale == "upweight" else 1)

    def group_by(self, column: str) -> Scores:
        """Sum the scores of the images of each group (an artist, a class). Sums are not Shapley values."""
        if self.some_only:
            raise only_some("scores", self)
        if column not in self.train_meta:
            raise WhenceError(
                f"no column {column!r} in the training images; there is {sorted(self.train_meta) or 'none'}"
            )
        labels = [str(value) for value in self.train_meta[column]]
        groups = sorted(set(labels))
        index = torch.tensor([groups.index(label) for label in labels])
        sums = torch.zeros(len(self.query_ids), len(groups), dtype=self.values.dtype)
        sums.index_add_(1, index, self.values)
        recipe = {**self.recipe, "groups": {"by": column, "images": len(labels)}}
        return dataclasses.replace(self, values=sums, train_ids=groups, recipe=recipe, train_meta={}, pictures=None)


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
        f"only {len(scores.train_ids):,} of the training images were scored, and the others have no score",
        where,
        "scores of all training images (`whence attribute` without --candidates)",
    )
