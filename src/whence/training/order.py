"""Which images a step takes, and what it shows of them: order, timesteps, noise, mirror images, empty captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from whence.diffusion.draws import Density, Even
from whence.diffusion.noise import key_of, normals, seed_for, stream, uniforms
from whence.training.recipe import Recipe
from whence.types import Batch, Draw, Images, Trainable, WhenceError


@dataclass(frozen=True)
class Slots:
    """The rows that fill one step, and the epoch each is in: both [B]."""

    rows: Tensor
    epochs: Tensor


def with_prior_images(study: Trainable, images: Images, weights: Tensor | None = None) -> tuple[Images, Tensor]:
    """What a study trains on: images and their weights, and after them its prior images if it has any.

    Args:
        study: what is trained, and how.
        images: n of them.
        weights: [n], 1 each by default.
    """
    weights = torch.ones(len(images)) if weights is None else weights
    if study.prior is None:
        return images, weights
    count, height = len(study.prior), study.prior_weight * float(weights.double().mean())
    held = torch.full((count,), height, dtype=weights.dtype)
    return Together((images, study.prior)), torch.cat([weights, held])


@dataclass(frozen=True, eq=False)
class Together:
    """Images one after the other, with the columns and conditions that all have."""

    parts: Sequence[Images]

    @property
    def ids(self) -> Sequence[str]:
        return [name for part in self.parts for name in part.ids]

    @property
    def digests(self) -> Sequence[str]:
        return [digest for part in self.parts for digest in part.digests]

    @property
    def meta(self) -> Mapping[str, Sequence[object]]:
        shared = set.intersection(*(set(part.meta) for part in self.parts))
        return {name: [value for part in self.parts for value in part.meta[name]] for name in sorted(shared)}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def labels(self) -> Tensor | None:
        labels = [part.labels for part in self.parts if part.labels is not None]
        return torch.cat(labels) if len(labels) == len(self.parts) else None

    @property
    def preprocess(self) -> Mapping[str, object]:
        return {}

    @property
    def empty_caption(self) -> Mapping[str, Tensor] | None:
        return self.parts[0].empty_caption

    @property
    def pictures(self) -> Images:
        pictures = [part.pictures for part in self.parts]
        return self if all(p is part for p, part in zip(pictures, self.parts, strict=True)) else Together(pictures)

    def describe(self) -> Mapping[str, object] | None:
        parts = [part.describe() for part in self.parts]
        return {"together": parts, "counts": [len(part) for part in self.parts]} if any(parts) else None

    @cached_property
    def conditions(self) -> list[str]:
        return sorted(set.intersection(*(set(part.batch([0]).cond) for part in self.parts)))

    def batch(self, rows: Sequence[int]) -> Batch:
        ends = list(accumulate(len(part) for part in self.parts))
        asked = torch.tensor([int(row) for row in rows])
        part = torch.bucketize(asked, torch.tensor(ends), right=True)
        order = torch.argsort(part, stable=True)  # as the batches of the parts follow each other
        places = [(p, asked[part == p] - ends[p] + len(self.parts[p])) for p in part.unique().tolist()]
        found, back = [self.parts[p].batch(local.tolist()) for p, local in places], torch.argsort(order)
        cond = {name: torch.cat([batch.cond[name] for batch in found])[back] for name in self.conditions}
        return Batch(torch.cat([b.x0 for b in found])[back], torch.cat([b.keys for b in found])[back], cond)


def mean_weight(recipe: Recipe, weights: Tensor) -> Tensor:
    """c: the mean weight of the images that are no prior images, float64; weights [..., n]."""
    return weights[..., : weights.shape[-1] - recipe.data.prior].double().mean(-1)


def slots(recipe: Recipe, keys: Tensor, step: int) -> Slots:
    """Which images a step takes, from all n images whatever their weight.

    Args:
        recipe: of the training.
        keys: noise keys of the images [n].
        step: from 0.
    """
    n = len(keys) - recipe.data.prior
    own = _slots(recipe, keys[:n], step)
    if not recipe.data.prior:
        return own
    prior = _slots(recipe, keys[n:], step)
    return Slots(torch.cat([own.rows, n + prior.rows]), torch.cat([own.epochs, prior.epochs]))


def _slots(recipe: Recipe, keys: Tensor, step: int) -> Slots:
    n = len(keys)
    positions = torch.arange(step * recipe.batch_size, (step + 1) * recipe.batch_size)
    epochs = positions // n
    rows = torch.empty_like(positions)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        rows[here] = _order(recipe.seed, epoch, keys)[positions[here] % n]
    return Slots(rows, epochs)


def _order(seed: int, epoch: int, keys: Tensor) -> Tensor:
    # Sorting hashes of the images, not shuffling positions: the relative order of two images depends on them alone.
    return torch.argsort(stream(seed_for(seed, "order"), epoch, keys), stable=True)


def draw(
    seeds: Sequence[int],
    keys: Tensor,
    epochs: Tensor,
    shape: torch.Size,
    total: int,
    dtype: torch.dtype,
    density: Density = Even(),
) -> Draw:
    """The timestep and noise of each slot: those of several runs, of equal length one after the other.

    Args:
        seeds: of the runs, one each.
        keys: noise keys of the slots [b].
        epochs: of the slots [b].
        shape: of one image.
        total: T, the timesteps of the schedule.
        dtype: of the noise.
        density: of the timesteps.
    """

    def streams(purpose: str) -> Tensor:
        each = torch.tensor([seed_for(seed, purpose) for seed in seeds])
        return stream(each.repeat_interleave(len(keys) // len(seeds)), epochs, keys)

    t = (density(uniforms(streams("timestep"), 1)[:, 0]) * total).long().clamp(0, total - 1)
    return Draw(t, normals(streams("noise"), shape, dtype))


@dataclass(frozen=True)
class ReplayedDraw:
    """The (timestep, noise) that a training showed each image in an epoch (see `draws.DrawRule`).

    Args:
        seed: of the training.
        epoch: from 0.
        unit: divide gradients by their norm.
        density: of the training's timesteps.
    """

    seed: int
    epoch: int
    unit: bool = False
    density: Density = Even()
    group = 1
    count = 1

    def __call__(self, keys: Tensor, shape: Sequence[int], total: int, dtype: torch.dtype = torch.float32) -> Draw:
        epochs = torch.full_like(keys, self.epoch)
        seen = draw([self.seed], keys, epochs, torch.Size(shape), total, dtype, self.density)
        return Draw(seen.t[:, None], seen.noise[:, None])


@dataclass(frozen=True, eq=False)
class AsTrained:
    """Images as training showed them in an epoch: mirrored or not, with or without caption.

    Args:
        images: as they are.
        recipe: of the training.
        epoch: from 0.
    """

    images: Images
    recipe: Recipe
    epoch: int

    @property
    def ids(self) -> Sequence[str]:
        return self.images.ids

    @property
    def digests(self) -> Sequence[str]:
        return self.images.digests

    @property
    def meta(self) -> Mapping[str, Sequence[object]]:
        return self.images.meta

    @property
    def labels(self) -> Tensor | None:
        return self.images.labels

    @property
    def preprocess(self) -> Mapping[str, object]:
        return self.images.preprocess

    @property
    def empty_caption(self) -> Mapping[str, Tensor] | None:
        return self.images.empty_caption

    @property
    def pictures(self) -> Images:
        return self

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int]) -> Batch:
        batch = self.images.batch(rows)
        return augment(self.recipe, self.images, batch, torch.full_like(batch.keys, self.epoch))

    def describe(self) -> dict[str, object]:
        """What the images depend on: neither seed nor epoch where nothing is mirrored or left out."""
        data = self.recipe.data
        when = [self.recipe.seed, self.epoch] if data.flip or data.empty_caption else None
        shown = {"flip": data.flip, "empty_caption": data.empty_caption, "when": when}
        return {"is": "AsTrained", "images": self.images.describe(), **shown}


def epoch_before(recipe: Recipe, n: int, step: int) -> int:
    """The last epoch that all images had been seen in when some steps were done; 0 where that is none yet.

    Args:
        recipe: of the training.
        n: images.
        step: steps done.
    """
    return max(0, step * recipe.batch_size // n - 1)


def augment(recipe: Recipe, images: Images, batch: Batch, epochs: Tensor) -> Batch:
    """A batch of the images as training shows it: mirrored, or with its caption left out.

    Args:
        recipe: of the training.
        images: what the batch is of; they know their empty caption.
        batch: b of the images.
        epochs: of each row [b].
    """
    batch = flipped(recipe, batch, epochs)
    if not recipe.data.empty_caption:
        return batch
    unconditional = images.empty_caption
    if unconditional is None:
        raise WhenceError("training: these images have no caption that could be left out; accepted: empty_caption=0")
    u = uniforms(stream(seed_for(recipe.seed, "untold"), epochs, batch.keys), 1)[:, 0]
    without_caption = u < recipe.data.empty_caption
    cond = dict(batch.cond)
    for name, value in unconditional.items():
        here = without_caption.to(cond[name].device).reshape(-1, *[1] * value.ndim)
        cond[name] = torch.where(here, value.to(cond[name]), cond[name])
    return replace(batch, cond=cond)


def flipped(recipe: Recipe, batch: Batch, epochs: Tensor) -> Batch:
    """Mirror about half of the images, left to right.

    Args:
        recipe: of the training.
        batch: b images.
        epochs: of each row [b].
    """
    if not recipe.data.flip:
        return batch
    mirrored = uniforms(stream(seed_for(recipe.seed, "flip"), epochs, batch.keys), 1)[:, 0] < 0.5
    shape = (-1, *[1] * (batch.x0.ndim - 1))
    x0 = torch.where(mirrored.to(batch.x0.device).reshape(shape), batch.x0.flip(-1), batch.x0)
    return replace(batch, x0=x0)


def slots_of(recipe: Recipe, keys: Tensor, weights: Tensor, step: int) -> Slots:
    """The slots of a step whose image has any weight.

    Args:
        recipe: of the training.
        keys: noise keys of the images [n].
        weights: of the images [n].
        step: from 0.
    """
    chosen = slots(recipe, keys, step)
    present = weights[chosen.rows] != 0
    return Slots(chosen.rows[present], chosen.epochs[present])


def filled_up(chosen: Slots, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots brought to a length with copies of row 0 that count for nothing: rows, epochs, 1 where real."""
    missing = length - len(chosen.rows)
    rows, epochs = (F.pad(part, (0, missing)) for part in (chosen.rows, chosen.epochs))
    return rows, epochs, F.pad(torch.ones(len(chosen.rows)), (0, missing))


def noise_keys(images: Images) -> Tensor:
    """The noise key of every image, without reading its pixels: [n] int64."""
    return torch.tensor([key_of(digest) for digest in images.digests], dtype=torch.int64)
