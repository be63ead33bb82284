"""The words every room shares: a batch, a draw, a checkpoint, a task, and the scores that come out.

Axis letters everywhere: n training images, m queries, b batch, k feature size, r retraining runs, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from whence.plain import WhenceError, describe, digest, expect, from_plain  # noqa: F401  # words of every room, too
from whence.scores import Scores, check_signed, only_some  # noqa: F401  # likewise

VERSION: str = import_module("whence").__version__  # of the code that runs, whatever is installed beside it
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
    """How the work is carried out: device and number format of the model, images read at a time, the bytes that the
    per-image gradients held at once may take, processes (CPU), each with as many bytes, or the address of a Ray cluster.
    Apart from the number formats none of it changes a result. feature_dtype: that in which the features of training images
    are kept; as they are computed where None."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    batch_size: int = 16
    budget: int = 256 * 2**20
    workers: int = 1
    ray: str = ""
    feature_dtype: torch.dtype | None = None


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
        errors: whether standard errors are measured, too, by methods that state some.
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
    errors: bool = False

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
