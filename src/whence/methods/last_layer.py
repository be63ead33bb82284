"""Exact leave-one-out of the last layer, refitted as a ridge: no first-order step, no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from whence.curvature.solve import Dampings, NoPreconditioner, Problem, check_damping
from whence.diffusion.draws import DrawRule, Draws, uniform
from whence.features.gradients import one, repeat
from whence.methods.errors import Stated, by_halves
from whence.methods.inner_product import FeatureMethod
from whence.methods.registry import ONCE, method
from whence.storage.arrays import Rows
from whence.storage.files import progress
from whence.types import Batch, Draw, Engine, Forward, Task, WhenceError

DRAWS = uniform(100, shared=False)


@dataclass(frozen=True)
class Moments:
    """What a ridge of the last layer needs of an image: [A_i | B_i | c_i] as one row of k k + k D + 1 numbers.

        A_i = Z^T Z,  B_i = Z^T Y,  c_i = ||Y||^2,  each over M D

    Z [M, k]: what the Linear or Conv2d that is called last reads at each of its M positions (draws, pixels, tokens): the
    unfolded patch of a convolution, 1 appended for a bias; Y [M, D]: the targets there, in the order in which the layer
    gives them (patches of a transformer), one-hot labels for a classifier.
    """

    draws: DrawRule
    averaged = True  # no setting: it has no annotation

    def width(self, module: nn.Module, forward: Forward, batch: Batch) -> int:
        Z, Y = self._sides(module, forward, batch)
        return Z.shape[1] * (Z.shape[1] + Y.shape[1]) + 1

    def bytes_per_image(self, module: nn.Module, dtype: torch.dtype) -> int:
        return 1

    def compute(
        self, module: nn.Module, forward: Forward, batches: Iterator[Batch], count: int, engine: Engine
    ) -> Tensor:
        found = []
        for batch in batches:
            for i in range(len(batch)):
                Z, Y = self._sides(module, forward, one(batch, i))
                parts = (Z.T @ Z).flatten(), (Z.T @ Y).flatten(), Y.square().sum()[None]
                found.append(torch.cat(parts) / Y.numel())
        return torch.stack(found)

    def _sides(self, module: nn.Module, forward: Forward, image: Batch) -> tuple[Tensor, Tensor]:
        draw = self.draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
        draw = Draw(draw.t[0].to(image.x0.device), draw.noise[0].to(image.x0))
        called: list[tuple[nn.Module, Tensor, Tensor]] = []

        def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output = output.detach().requires_grad_()  # what follows is a graph of its own
            called[:] = [(layer, inputs[0].detach(), output)]
            return output

        layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        handles = [layer.register_forward_hook(watch) for layer in layers]
        try:
            with torch.enable_grad():
                prediction, target = forward(module, repeat(image, self.draws.count), draw)
        finally:
            for handle in handles:
                handle.remove()
        if not called:
            raise _no_last_layer()
        layer, x, output = called[0]
        if not target.is_floating_point():
            target = F.one_hot(target, prediction.shape[1]).to(prediction)
        target, used = _at_output(prediction, target, output)
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
                raise WhenceError("last_layer_ridge: the last convolution has groups or no plain zero padding")
            x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
            target, used = target.flatten(2).mT, used.flatten(2).mT
        Z, Y, used = (v.reshape(-1, v.shape[-1]) for v in (x, target, used))
        columns = used[0]
        if not torch.equal(used, columns.expand_as(used)):
            raise _no_last_layer()
        return (Z if layer.bias is None else torch.cat([Z, Z.new_ones(len(Z), 1)], 1)), Y[:, columns]


def _at_output(prediction: Tensor, target: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """S^T target and which of the outputs are used, shaped like the output, where prediction = S output and S picks and
    orders entries: transformers put patches in their places, and a learned variance is left out."""
    if not prediction.requires_grad:
        raise _no_last_layer()

    def back(v: Tensor) -> Tensor:
        found = torch.autograd.grad(prediction, output, v.to(prediction), retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(output) if found is None else found

    picked = back(torch.ones_like(prediction))
    # Of another kind S^T S is no mask, and does not give the output back.
    if not (((picked == 0) | (picked == 1)).all() and torch.equal(back(prediction.detach()), output.detach() * picked)):
        raise _no_last_layer()
    return back(target), picked.bool()


def _no_last_layer() -> WhenceError:
    return WhenceError("last_layer_ridge: the model does not end with a Linear or Conv2d that gives its prediction")


@dataclass(frozen=True)
class LastLayerRidge(FeatureMethod):
    """The rise of the query's squared error when image i is removed and the last layer is fitted again, exactly.

        theta = (A + lambda I)^-1 B,   theta_{-i} = (A - A_i + lambda I)^-1 (B - B_i),   A = sum_i A_i, B = sum_i B_i
        score[q, i] = f_q(theta_{-i}) - f_q(theta),   f_q(theta) = tr(theta^T A_q theta) - 2 tr(theta^T B_q) + c_q

    (Ling 1984, Cook 1977; see `regression`.) What lies below the last layer stays as it is. It solves n systems of k x k and
    keeps k (k + D) numbers per image: last layers of up to some hundred inputs (patch of a convolution: channels x height x
    width).

    Args:
        name: in recipes and on the screen.
        draws: the (timestep, noise) pairs that the layer is fitted to. Each image has its own, since a fit gains from every
            other noise (docs/noise.md); each costs a forward pass.
        damping: lambda in units of the mean eigenvalue of A.
        absolute: whether the damping is lambda itself.
    """

    name: str = "last_layer_ridge"
    draws: Draws = DRAWS
    damping: float = 0.01
    absolute: bool = False
    scale = "removal"  # no setting: it has no annotation
    linear_in_query = True  # likewise

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def sides(self) -> tuple[Moments, Moments]:
        return Moments(self.draws), Moments(self.draws)

    def with_damping(self, damping: float | None) -> LastLayerRidge:
        return self if damping is None else replace(self, damping=damping)

    def stated(self, task: Task) -> Stated:
        return by_halves(*self.sides(), NoPreconditioner(), task.forward)

    def combine(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> Iterator[Tensor]:
        A, B, unit = self._sums(problem, train)
        k = len(A)
        chosen = [self.damping if value is None else value for value in dampings]
        ridges = [value * unit * torch.eye(k, dtype=torch.float64) for value in chosen]
        with_all = [_errors(torch.linalg.solve(A + ridge, B), query, k) for ridge in ridges]
        found = torch.zeros(len(chosen), len(query), len(train), dtype=torch.float64)
        for cut, values in progress(train, f"{self.name}: leaving out", total=len(train.shards)):
            for i, (A_i, B_i, _) in enumerate(zip(*_split(values.double(), k), strict=True), cut.start):
                for row, ridge in enumerate(ridges):
                    without = torch.linalg.solve(A - A_i + ridge, B - B_i)
                    found[row, :, i] = _errors(without, query, k) - with_all[row]
        return iter(found)

    def removable(self, problem: Problem, train: Rows, query: Tensor) -> list[LayerWithout]:
        """The fitted layer, from which images can be taken: one for each query.

        Args:
            problem: where it is fitted.
            train: rows of the training images.
            query: rows of the queries [m, width], float64.
        """
        A, B, unit = self._sums(problem, train)
        A = A + self.damping * unit * torch.eye(len(A), dtype=torch.float64)
        return [LayerWithout(train, one, A, B) for one in query.split(1)]

    def _sums(self, problem: Problem, train: Rows) -> tuple[Tensor, Tensor, float]:
        """A [k, k] and B [k, D] of all images, and the unit of the damping."""
        total = sum((values.double().sum(0) for _, values in train), torch.zeros(train.width, dtype=torch.float64))
        k = _inputs(train.width, problem.task, problem.checkpoint.load(), Moments(self.draws))
        A, B, _ = _split(total[None], k)
        unit = 1.0 if self.absolute else float(A.diagonal(dim1=1, dim2=2).mean())
        if not unit > 0:
            raise WhenceError(
                f"{self.name}: all inputs of the last layer are zero; nothing can be attributed with them"
            )
        return A[0], B[0], unit


@dataclass(frozen=True, eq=False)
class LayerWithout:
    """The last layer fitted without some images, and the squared error f of one query (see `sets.Removable`).

        rise without i = f((A - A_i)^-1 (B - B_i)) - f(A^-1 B)

    Args:
        train: rows [A_i | B_i | c_i] of all training images.
        query: that of the query [1, width], float64.
        A: sum of the A_i of the images that are left, and lambda I [k, k].
        B: likewise [k, D].
        gone: the images that are not left.
    """

    train: Rows
    query: Tensor
    A: Tensor
    B: Tensor
    gone: tuple[int, ...] = ()

    def rises(self) -> NDArray[np.float64]:
        """Exact: [n]. n systems of k x k."""
        found = torch.zeros(len(self.train), dtype=torch.float64)
        for cut, values in self.train:
            A_i, B_i, _ = _split(values.double(), len(self.A))
            found[cut] = self._errors(torch.linalg.solve(self.A - A_i, self.B - B_i))
        found -= self._errors(torch.linalg.solve(self.A, self.B))
        found[list(self.gone)] = -torch.inf
        return found.numpy()

    def without(self, image: int) -> LayerWithout:
        A_i, B_i, _ = _split(self.train.take([image]).double(), len(self.A))
        return replace(self, A=self.A - A_i[0], B=self.B - B_i[0], gone=(*self.gone, image))

    def _errors(self, theta: Tensor) -> Tensor:
        """f at one or several theta: [..., k, D] -> [...]."""
        A, B, c = _split(self.query, len(self.A))
        return (theta * (A[0] @ theta - 2 * B[0])).sum((-2, -1)) + c[0]


@method("Ling", 1984, "k x k systems, k inputs of the last layer", classifier=ONCE)
def last_layer_ridge(draws: Draws = DRAWS, damping: float = 0.01) -> LastLayerRidge:
    """Exact leave-one-out of the last layer, refitted as a ridge on what it reads.

    Args:
        draws: the (timestep, noise) pairs that the layer is fitted to. Each image has its own, since a fit gains from every
            other noise; each costs a forward pass.
        damping: lambda in units of the mean eigenvalue of A.
    """
    return LastLayerRidge(draws=draws, damping=damping)


def _split(values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A [n, k, k], B [n, k, D], c [n] of rows."""
    A, rest = values[:, : k * k], values[:, k * k : -1]
    return A.unflatten(1, (k, k)), rest.unflatten(1, (k, -1)), values[:, -1]


def _errors(theta: Tensor, query: Tensor, k: int) -> Tensor:
    """f_q(theta) of every query: [m]."""
    A, B, c = _split(query, k)
    return torch.einsum("kd,qkl,ld->q", theta, A, theta) - 2 * torch.einsum("kd,qkd->q", theta, B) + c


def _inputs(width: int, task: Task, module: nn.Module, part: Moments) -> int:
    """k, the inputs of the last layer."""
    first = task.train.batch([0]).to(task.engine.device, task.engine.dtype)
    Z, _ = part._sides(module.to(task.engine.device, task.engine.dtype).eval(), task.forward, first)
    return Z.shape[1]
