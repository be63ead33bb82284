"""Feature rows: one part of a recipe x one checkpoint x some images -> Rows on disk.

A part knows how wide its rows are and how to make them from a batch; `rows` runs any part through the store, so that
every method resumes, shares and verifies its features in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from whence.draws import Drawing, Draws, Single
from whence.encoders import Encoder
from whence.engine import progress
from whence.gradients import DRAWS_AT_ONCE, measure, one, per_image, repeat, select
from whence.gradients import check as check_output
from whence.outputs import Output, probes
from whence.projections import Identity, Projection, TwoSided
from whence.store import Rows, Store
from whence.types import Batch, Checkpoint, Draw, Engine, Forward, Images, Task, WhenceError, digest

SHARD_BYTES = 64 * 2**20


class Part(Protocol):
    """A kind of feature."""

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int: ...

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        """Memory one image takes before it is compressed."""
        ...

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        """The rows of `count` images that come in batches: [count, width]."""
        ...


@dataclass(frozen=True)
class Gradient:
    """P(mean_s grad_theta f): per-image gradients of an output function, averaged over draws, then projected.

    Several outputs (see `outputs.probes`) stand side by side, scaled so that inner products of rows are means over them.
    """

    output: Output | tuple[Output, ...]
    draws: Drawing
    projection: Projection = Identity()
    parameters: str = "all"

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.output if isinstance(self.output, tuple) else (self.output,)

    def sizes(self, module: nn.Module) -> dict[str, int]:
        every = dict(module.named_parameters())
        return {name: every[name].numel() for name in select(module, self.parameters)}

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        return self.projecting(module).width(self.sizes(module)) * len(self.outputs)

    def projecting(self, module: nn.Module) -> Projection:
        """P, where it must know them with the shapes of this network's parameters."""
        if not isinstance(self.projection, TwoSided):
            return self.projection
        every = dict(module.named_parameters())
        return self.projection.of({name: tuple(every[name].shape) for name in self.sizes(module)})

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return sum(self.sizes(module).values()) * len(self.outputs) * torch.finfo(dtype).bits // 8

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        sizes = self.sizes(module)
        # vmap holds about three copies of each gradient row (forward graph, gradient, output).
        at_once = max(1, min(engine.batch_size, engine.budget // (3 * self.bytes_per_image(module, engine.dtype))))
        buffers = [
            {name: torch.empty(count, size, dtype=engine.dtype, device=engine.device) for name, size in sizes.items()}
            for _ in self.outputs
        ]
        done = 0
        for batch in batches:
            for output, buffer in zip(self.outputs, buffers, strict=True):
                for rows, blocks in per_image(module, forward, output, self.draws, batch, list(sizes), at_once):
                    for name, block in blocks.items():
                        buffer[name][done + rows.start : done + rows.stop] = block
            done += len(batch)
        project = self.projecting(module)
        return torch.cat([project(buffer) for buffer in buffers], dim=1).div_(len(self.outputs) ** 0.5)


@dataclass(frozen=True)
class Pullbacks:
    """P J_s^T v / sqrt(D) for every draw s and `count` random signs v [D] at each, side by side: [b, S count k].

    J_s [D, d] is the Jacobian of the prediction at draw s. The mean over the k-wide pieces u of (u^T delta)^2 estimates
    E_s (1/D) ||J_s delta||^2 without bias: how much a change delta of the parameters changes the prediction.
    """

    count: int
    draws: Draws
    projection: Projection = Identity()
    parameters: str = "all"

    @property
    def pieces(self) -> tuple[Gradient, ...]:
        """One per draw and probe; no two draws share a probe."""
        signs = probes(self.draws.count * self.count, self.draws.seed)
        return tuple(
            Gradient(sign, Single(self.draws, number // self.count), self.projection, self.parameters)
            for number, sign in enumerate(signs)
        )

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        return len(self.pieces) * self.pieces[0].width(module, forward, batch)

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return self.pieces[0].bytes_per_image(module, dtype)

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        every = list(batches)
        return torch.cat([piece.compute(module, forward, iter(every), count, engine) for piece in self.pieces], dim=1)


@dataclass(frozen=True)
class Encoded:
    """Rows of an encoder: pixels, an embedding network, a layer of the model."""

    encoder: Encoder

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        with torch.no_grad():
            return self.encoder(module, forward, batch).shape[1]

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return 1

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.encoder(module, forward, batch) for batch in batches])


Reduce = Callable[[Tensor], Tensor]
"""What becomes of the measurements of one image over its draws: [S] -> scalar."""


def average(values: Tensor) -> Tensor:
    """mean_s v_s"""
    return values.mean()


def unit_average(values: Tensor) -> Tensor:
    """mean_s v_s / ||v||_2: how evenly a measurement is spread over the draws, whatever its size; 0 where all v_s are 0."""
    norm = values.norm()
    return torch.where(norm > 0, values.mean() / norm, 0.0)


@dataclass(frozen=True)
class Value:
    """An output over draws brought to one number, no gradient: [count, 1]. A weight per image, or a loss to look at."""

    output: Output
    draws: Drawing
    reduce: Reduce = average

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        return 1

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return 1

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        check_output(self.output, forward)
        values = []
        with torch.no_grad():
            for batch in batches:
                for i in range(len(batch)):
                    image = one(batch, i)
                    draw = self.draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
                    draw = Draw(draw.t[0].to(image.x0.device), draw.noise[0].to(image.x0))
                    values.append(self.reduce(torch.cat(list(self._measured(module, forward, image, draw)))))
        return torch.stack(values)[:, None]

    def _measured(self, module: nn.Module, forward: Forward, image: Batch, draw: Draw) -> Iterator[Tensor]:
        for start in range(0, len(draw.t), DRAWS_AT_ONCE):  # a thousand draws of one image are no batch
            part = Draw(draw.t[start : start + DRAWS_AT_ONCE], draw.noise[start : start + DRAWS_AT_ONCE])
            yield measure(module, {}, forward, self.output, repeat(image, len(part.t)), part)


def prepare(checkpoint: Checkpoint, engine: Engine) -> nn.Module:
    """The checkpoint's network, ready to be measured: evaluation mode, on the device; weights checked for NaN and Inf."""
    module = checkpoint.load().to(engine.device).eval()
    if any(tensor.dtype != engine.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()):
        module = module.to(engine.dtype)  # only where needed: diffusers warns at every cast
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise WhenceError(f"checkpoint {checkpoint.name}: weight {name} holds NaN or Inf; training diverged there")
    return module


def identity(images: Images) -> str:
    """The fingerprint of an ordered set of images and of how their pixels are read."""
    return digest([images.describe() if hasattr(images, "describe") else None, list(images.digests)], 32)


def rows(part: Part, task: Task, checkpoint: Checkpoint, images: Images, what: str) -> Rows:
    """The rows of a part for all images, from the store where they are there, computed and stored where not."""
    engine = task.engine
    images = _looked_at(part, images)
    first = images.batch([0]).to(engine.device, engine.dtype)
    module = prepare(checkpoint, engine)
    width = part.width(module, task.forward, first)
    row_bytes = width * torch.finfo(engine.dtype).bits // 8
    per_shard = min(SHARD_BYTES // row_bytes, engine.budget // part.bytes_per_image(module, engine.dtype), len(images))
    key = {"part": part, "checkpoint": checkpoint.digest, "forward": task.forward, "images": identity(images)}
    array = Store(task.root).array(key, (len(images), width), engine.dtype, per_shard)

    for shard in progress(array.missing(), what):
        values = part.compute(module, task.forward, _batches(images, shard, engine), shard.stop - shard.start, engine)
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            name = images.ids[shard.start + int(bad[0])]
            raise WhenceError(f"{what}: the feature row of image {name!r} holds NaN or Inf")
        array.write(shard, values)
    return array


def _looked_at(part: Part, images: Images) -> Images:
    """The pictures, for an encoder that reads them, where the network sees latents of them."""
    if isinstance(part, Encoded) and getattr(part.encoder, "of_pictures", False):
        return getattr(images, "pictures", images)
    return images


def _batches(images: Images, shard: slice, engine: Engine) -> Iterator[Batch]:
    for start in range(shard.start, shard.stop, engine.batch_size):
        rows = range(start, min(start + engine.batch_size, shard.stop))
        yield images.batch(list(rows)).to(engine.device, engine.dtype)
