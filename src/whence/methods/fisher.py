"""A network whose weights are changed and whose loss is measured again, and the Fisher matrices that precondition its steps.

F = mean over training images and draws of (d l / d theta)^2        element by element, or by EK-FAC
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from whence.curvature.factors import Factors
from whence.curvature.kfac import EKFAC
from whence.curvature.solve import Problem, check_damping
from whence.diffusion.draws import Draws, OneDraw
from whence.diffusion.outputs import Output
from whence.features.checks import refuse_unfit
from whence.features.gradients import check, draws_of, measure, one, per_image, repeat, select
from whence.features.parts import Gradient
from whence.features.rows import identity, prepare
from whence.storage.arrays import Store
from whence.storage.files import progress
from whence.training.unroll import twin
from whence.types import Batch, Draw, Images, Task, Weights

ROUNDING = 1e-10
"""The share of the mean of F below which a parameter tensor's is rounding, as of the biases of keys, which attention does
not see: divided by that, their gradients would be all of a step."""


@dataclass(frozen=True)
class Measured:
    """A network whose weights are changed, and how its loss is measured.

    Args:
        module: a copy to call with other weights.
        weights: by parameter, those that are changed.
        task: the question.
        output: the loss.
        draws: at which it is measured.
    """

    module: nn.Module
    weights: Weights
    task: Task
    output: Output
    draws: Draws

    @classmethod
    def of(cls, task: Task, output: Output, draws: Draws, parameters: str) -> Measured:
        check(output, task.forward)
        module = twin(prepare(task.trajectory[-1], task.engine))
        refuse_unfit(module, task.forward, task.queries, task.engine)
        chosen = dict(module.named_parameters())
        weights = {name: chosen[name].detach().clone() for name in select(module, parameters)}
        return cls(module, weights, task, output, draws)

    def read(self, images: Images, rows: Sequence[int]) -> Batch:
        return images.batch(list(rows)).to(self.task.engine.device, self.task.engine.dtype)

    def drawn(self, image: Batch) -> Iterator[Draw]:
        """The draws of an image, some at a time."""
        return draws_of(image, self.draws, self.task.forward)

    def losses(self, weights: Weights, image: Batch) -> Tensor:
        """Of one image at each draw: [S] float64."""
        parts = [
            measure(self.module, weights, self.task.forward, self.output, repeat(image, len(draw.t)), draw)
            for draw in self.drawn(image)
        ]
        return torch.cat(parts).double()

    def loss(self, weights: Weights, image: Batch) -> float:
        """The mean over the draws, without a graph."""
        with torch.no_grad():
            return float(self.losses(weights, image).mean())

    def slope(self, weights: Weights, image: Batch) -> tuple[Weights, float]:
        """The gradient of the mean over the draws, and that mean."""
        total, value, count = {name: torch.zeros_like(w) for name, w in weights.items()}, 0.0, self.draws.count
        for draw in self.drawn(image):

            def part(w: Weights, draw: Draw = draw) -> Tensor:
                images = repeat(image, len(draw.t))
                return measure(self.module, w, self.task.forward, self.output, images, draw).sum() / count

            gradient, share = grad_and_value(part)(weights)
            value += float(share)
            total = {name: total[name] + gradient[name] for name in total}
        return total, value

    def table(self, weights: Weights, images: Images, mirrored: bool) -> Tensor:
        """The losses of all images at each draw: [n, S], of the mirror images where so asked."""
        found = []
        with torch.no_grad():
            for start in range(0, len(images), self.task.engine.batch_size):
                batch = self.read(images, range(start, min(start + self.task.engine.batch_size, len(images))))
                batch = replace(batch, x0=batch.x0.flip(-1)) if mirrored else batch
                # One image at a time: the last bits of a row must not depend on its company.
                found += [self.losses(weights, one(batch, i)) for i in range(len(batch))]
        return torch.stack(found).cpu()

    def means(self, weights: Weights, images: Images) -> Tensor:
        """The mean loss of each image over the draws: [n]."""
        return self.table(weights, images, False).mean(1)


Inverse = Callable[[Weights], Weights]
"""F^-1 of a gradient."""


class Curvature(Protocol):
    """A choice of F."""

    def inverse(self, network: Measured, parameters: str) -> Inverse: ...


@dataclass(frozen=True)
class DiagonalFisher:
    """F = mean over training images and draws of (d l / d theta)^2, element by element.

    Args:
        damping: lambda in units of the mean of F over each parameter tensor; released code for AbU divides by F as it is.
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def inverse(self, network: Measured, parameters: str) -> Inverse:
        task, names = network.task, list(network.weights)
        key = {
            "part": "squared gradients",
            "of": part_of(network, parameters),
            "checkpoint": task.trajectory[-1].digest,
        }
        key |= {"forward": task.forward, "images": identity(task.train)}
        width = sum(w.numel() for w in network.weights.values())
        array = Store(task.folder_of(task.train)).array(key, (1, width), torch.float64, 1)
        for rows in array.missing():
            array.write(rows, self._squares(network, names)[None])
        found = array.all()[0]
        pieces, least = found.split([w.numel() for w in network.weights.values()]), ROUNDING * found.mean()
        damped = {}
        for (name, w), piece in zip(network.weights.items(), pieces, strict=True):
            full = piece + self.damping * piece.mean()
            damped[name] = (1 / full if piece.mean() > least else torch.zeros_like(full)).view_as(w).to(w)
        return lambda gradient: {name: damped[name] * g for name, g in gradient.items()}

    def _squares(self, network: Measured, names: list[str]) -> Tensor:
        """[d] float64."""
        task, count = network.task, network.draws.count
        total = [torch.zeros(w.numel(), dtype=torch.float64, device=w.device) for w in network.weights.values()]
        held = 3 * sum(w.numel() * w.element_size() for w in network.weights.values())
        at_once = max(1, min(task.engine.batch_size, task.engine.budget // held))
        starts = range(0, len(task.train), task.engine.batch_size)
        for start in progress(starts, "squared gradients"):
            batch = network.read(task.train, range(start, min(start + task.engine.batch_size, len(task.train))))
            for number in range(count):
                draw = OneDraw(network.draws, number)
                passes = per_image(network.module, task.forward, network.output, draw, batch, names, at_once)
                for _, blocks in passes:
                    for sums, name in zip(total, names, strict=True):
                        sums += blocks[name].double().square().sum(0)
        return torch.cat(total).cpu() / (len(task.train) * count)


@dataclass(frozen=True)
class EKFACFisher:
    """F by EK-FAC (see `curvature.kfac`).

    Args:
        damping: lambda in units of the mean eigenvalue of each layer.
        factors: how the factors are estimated.
    """

    damping: float
    factors: Factors

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def inverse(self, network: Measured, parameters: str) -> Inverse:
        problem = Problem(network.task, network.task.trajectory[-1], part_of(network, parameters))
        curvature = EKFAC(self.damping, factors=self.factors).curvature(problem)
        sizes = [w.numel() for w in network.weights.values()]

        def inverse(gradient: Weights) -> Weights:
            row = torch.cat([g.flatten() for g in gradient.values()])[None].cpu().double()
            found = torch.zeros_like(row)
            for eigen in curvature:
                eigen.block.scatter(eigen.back(eigen.rotate(row) * eigen.inverse(self.damping, False)), found)
            pieces = zip(gradient.items(), found[0].split(sizes), strict=True)
            return {name: piece.view_as(g).to(g) for (name, g), piece in pieces}

        return inverse


def part_of(network: Measured, parameters: str) -> Gradient:
    return Gradient(network.output, network.draws, parameters=parameters)
