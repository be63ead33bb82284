"""Kinds of features: what becomes of an image. A part knows how wide its rows are and how to make them from a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from whence.diffusion.draws import DrawRule, Draws, OneDraw
from whence.diffusion.outputs import Output, probes
from whence.features.encoders import Encoder
from whence.features.gradients import check as check_output
from whence.features.gradients import draws_of, joined, measure, one, per_image, repeat, select
from whence.features.projections import SJLT, Identity, Layerwise, Projection
from whence.types import Batch, Engine, Forward


class Part(Protocol):
    """A kind of feature."""

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        """Columns of a row.

        Args:
            module: the network.
            forward: image and draw -> prediction and target.
            batch: any images of the set.
        """
        ...

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        """Memory one image takes before it is compressed."""
        ...

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        """The rows of `count` images that come in batches: [count, width].

        Args:
            module: the network.
            forward: image and draw -> prediction and target.
            batches: the images.
            count: how many images these are.
            engine: how the work is carried out.
        """
        ...


@runtime_checkable
class Averaged(Protocol):
    """A part that says whether its rows are means over its draws, so that halves of them give those of all."""

    @property
    def averaged(self) -> bool: ...

    @property
    def draws(self) -> DrawRule: ...


@dataclass(frozen=True)
class Gradient:
    """P(mean_s grad_theta f): per-image gradients of an output function, averaged over draws, then projected.

    Several outputs (see `outputs.probes`) stand side by side, scaled so that inner products of rows are means over them.

    Args:
        output: f, or several.
        draws: the (timestep, noise) pairs s.
        projection: P.
        parameters: theta, those that are differentiated (see `gradients.select`).
    """

    output: Output | tuple[Output, ...]
    draws: DrawRule
    projection: Projection = Identity()
    parameters: str = "trained"

    @property
    def averaged(self) -> bool:
        """Whether a row is the mean of those of the draws: not where the mean is divided by its norms."""
        return not isinstance(self.projection, Layerwise)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.output if isinstance(self.output, tuple) else (self.output,)

    @property
    def linear(self) -> bool:
        """Whether rows are linear in what is measured: no norm of its own divides a draw, or a layer."""
        return not self.draws.unit and not isinstance(self.projection, Layerwise)

    def shapes(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        parameters = dict(module.named_parameters())
        return {name: tuple(parameters[name].shape) for name in select(module, self.parameters)}

    def sizes(self, module: nn.Module) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes(module).items()}

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        return self.projection.width(self.shapes(module)) * len(self.outputs)

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return sum(self.sizes(module).values()) * len(self.outputs) * torch.finfo(dtype).bits // 8

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        sizes, shapes = self.sizes(module), self.shapes(module)
        # vmap holds about three copies of each gradient row (forward graph, gradient, output).
        at_once = max(1, engine.budget // (3 * self.bytes_per_image(module, engine.dtype)))
        buffers = [
            {name: torch.empty(count, size, dtype=engine.dtype, device=engine.device) for name, size in sizes.items()}
            for _ in self.outputs
        ]
        done = 0
        for batch in joined(batches, self.draws, module):
            for output, buffer in zip(self.outputs, buffers, strict=True):
                for rows, blocks in per_image(module, forward, output, self.draws, batch, list(sizes), at_once):
                    for name, block in blocks.items():
                        buffer[name][done + rows.start : done + rows.stop] = block
            done += len(batch)
        shaped = ({name: row.view(count, *shapes[name]) for name, row in buffer.items()} for buffer in buffers)
        found = [self.projection(blocks) for blocks in shaped]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1).div_(len(found) ** 0.5)


@dataclass(frozen=True)
class Pullbacks:
    """P J_s^T v / sqrt(D) for every draw s and `count` random signs v [D] at each, side by side: [b, S count k].

    J_s [D, d] is the Jacobian of the prediction at draw s. The mean over the k-wide pieces u of (u^T delta)^2 estimates
    E_s (1/D) ||J_s delta||^2 without bias: how much a change delta of the parameters changes the prediction.

    Args:
        count: probes v per draw.
        draws: the (timestep, noise) pairs s, and the seed of the probes.
        projection: P.
        parameters: those that are differentiated (see `gradients.select`).
    """

    count: int
    draws: Draws
    projection: Projection = Identity()
    parameters: str = "trained"

    @property
    def pieces(self) -> tuple[Gradient, ...]:
        """One per draw and probe; no two draws share a probe."""
        signs = probes(self.draws.count * self.count, self.draws.seed)
        return tuple(
            Gradient(sign, OneDraw(self.draws, number // self.count), self.projection, self.parameters)
            for number, sign in enumerate(signs)
        )

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        return len(self.pieces) * self.pieces[0].width(module, forward, batch)

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return self.pieces[0].bytes_per_image(module, dtype)

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        images = list(batches)
        return torch.cat([piece.compute(module, forward, iter(images), count, engine) for piece in self.pieces], dim=1)


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
    """An output over draws brought to one number, no gradient: [count, 1]. A weight per image, or a loss to look at.

    Args:
        output: what is measured.
        draws: at these (timestep, noise) pairs.
        reduce: the measurements of one image over its draws [S] -> scalar.
    """

    output: Output
    draws: DrawRule
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
                    parts = [
                        measure(module, {}, forward, self.output, repeat(image, len(draw.t)), draw)
                        for draw in draws_of(image, self.draws, forward)
                    ]
                    values.append(self.reduce(torch.cat(parts)))
        return torch.stack(values)[:, None]


def part(
    output: Output | tuple[Output, ...], draws: Draws, dim: int | None, parameters: str, seed: int = 0
) -> Gradient:
    """The gradient feature of a method; train and query share its noise seed and its projection.

    Args:
        output: what is measured, or several outputs.
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the projection; None for exact gradients.
        parameters: those that are differentiated (see `gradients.select`).
        seed: of the projection.
    """
    return Gradient(output, draws, Identity() if dim is None else SJLT(dim, seed), parameters)
