"""The exact Gauss-Newton system of small networks, d x d: the reference that every approximation is measured against.

    H = sum_i mean_s J_is^T (d^2 f / d prediction^2) J_is + lambda I       J_is = d prediction / d theta  [D, d]

A sum over training images, like the Gram system, so that psi^T H^-1 phi with loss gradients on both sides is the predicted
rise of the query's loss when image i is removed (scale "removal").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, hessian, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from whence.curvature.factors import grouped, passes
from whence.curvature.solve import Basis, Dampings, Problem, Solution, check_damping, decomposed, eigenbasis
from whence.diffusion.draws import DrawRule
from whence.diffusion.outputs import Output
from whence.features.gradients import check, differentiating, measure, one, repeat
from whence.features.parts import Gradient
from whence.features.projections import Identity
from whence.features.rows import prepare
from whence.storage.arrays import Rows
from whence.storage.files import progress
from whence.types import Batch, Draw, Forward, Weights, WhenceError

LARGEST = 20_000  # parameters; the matrix and its eigenvectors then take 6 GB


def unprojected(problem: Problem, train: Rows, what: str) -> Gradient:
    """The feature part whose d x d matrix is asked for; refused where there is none, or it is too large.

    Args:
        problem: the system that is set up.
        train: rows of the training images [n, d].
        what: who asks, for the error.
    """
    part = problem.part
    if not isinstance(part, Gradient) or part.projection != Identity() or len(part.outputs) > 1:
        raise WhenceError(f"{what} needs unprojected gradients of one output (dim=None)")
    if part.draws.unit:
        raise WhenceError(f"{what} is the curvature of the plain mean over draws; accepted: unit=False")
    if train.width > LARGEST:
        raise WhenceError(f"{what} of {train.width} parameters; at most {LARGEST}: choose fewer, or Gram")
    return part


@dataclass(frozen=True)
class GaussNewton:
    """The exact Gauss-Newton matrix, sum_i mean_s J_is^T f'' J_is + lambda I.

    Args:
        damping: lambda in units of the mean eigenvalue of the undamped matrix.
        absolute: whether the damping is lambda itself.
    """

    damping: float
    absolute: bool = False
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        part = unprojected(problem, train, "exact Gauss-Newton")
        basis = eigenbasis(*decomposed(_matrix(problem, part)), train, query.double(), len(problem.task.train))
        return basis.at(dampings, self.damping, self.absolute)


@dataclass(frozen=True)
class Hessian:
    """H = sum_i mean_s d^2 f / d theta^2 + lambda I, of any output; a system that is not positive definite is refused.

    Args:
        damping: lambda in units of the mean positive eigenvalue.
        absolute: whether the damping is lambda itself.
    """

    damping: float
    absolute: bool = False
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        part = unprojected(problem, train, "exact Hessian")
        values, vectors = torch.linalg.eigh(_hessian(problem, part))
        psi = query.double()
        rest = torch.zeros(len(psi), dtype=torch.float64)
        basis = Basis(train, vectors, values, psi @ vectors, rest, dual=False, images=len(problem.task.train))
        unit = 1.0 if self.absolute else basis.mean_eigenvalue()
        for damping in dampings:
            smallest = float(values[0]) + unit * (self.damping if damping is None else damping)
            if not smallest > 0:
                raise WhenceError(
                    f"exact Hessian: not positive definite (smallest eigenvalue {float(values[0]):.3g}, with damping "
                    f"{smallest:.3g}); accepted: Gauss-Newton, or a damping above {-float(values[0]) / unit:.3g}"
                )
        return basis.at(dampings, self.damping, self.absolute)


def _hessian(problem: Problem, part: Gradient) -> Tensor:
    """sum_i mean_s d^2 f / d theta^2 [d, d], a row of it per backward pass of 64 draws."""
    task, (output,) = problem.task, part.outputs
    check(output, task.forward)
    module = prepare(problem.checkpoint, task.engine)
    d = sum(part.sizes(module).values())
    total = torch.zeros(d, d, dtype=torch.float64)
    # The fused attention kernels have no second derivative.
    with differentiating(module, list(part.sizes(module))) as weights, sdpa_kernel(SDPBackend.MATH):
        for group in progress(grouped(task.train, part.draws), "Hessian"):
            for rows in passes(task.train, group, part.draws, task):
                value = measure(module, {}, task.forward, output, rows.batch, rows.draw).sum() / part.draws.count
                if value.requires_grad:
                    total += _second(value, list(weights.values())).double().cpu()
    return (total + total.T) / 2


def _second(value: Tensor, weights: list[Tensor]) -> Tensor:
    """d^2 value / d weights^2 by differentiating each element of the gradient: [d, d]."""

    def flat(of: Tensor, keep: bool) -> Tensor:
        found = torch.autograd.grad(of, weights, create_graph=keep, retain_graph=True, materialize_grads=True)
        return torch.cat([g.flatten() for g in found])

    slopes = flat(value, keep=True)
    zero = torch.zeros_like(slopes)
    return torch.stack([flat(slope, keep=False) if slope.requires_grad else zero for slope in slopes])


def _matrix(problem: Problem, part: Gradient) -> Tensor:
    task, output = problem.task, part.outputs[0]
    module = prepare(problem.checkpoint, task.engine)
    sizes = part.sizes(module)
    weights = {name: p.detach() for name, p in module.named_parameters() if name in sizes}
    total = torch.zeros(sum(sizes.values()), sum(sizes.values()), dtype=torch.float64)
    for i in progress(range(len(task.train)), "Gauss-Newton matrix"):
        image = one(task.train.batch([i]).to(task.engine.device, task.engine.dtype), 0)
        # The fused attention kernels have no vmap rule; a graph of the weights not chosen would grow with the sum.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            total += _of_image(module, weights, task.forward, output, part.draws, image).cpu()
    return total


def _of_image(
    module: torch.nn.Module, weights: Weights, forward: Forward, output: Output, draws: DrawRule, image: Batch
) -> Tensor:
    drawn = draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
    draw = Draw(drawn.t[0].to(image.x0.device), drawn.noise[0].to(image.x0))
    prediction, target = forward(module, repeat(image, draws.count), draw)

    def predict(w: Weights, t: Tensor, noise: Tensor) -> Tensor:
        def call(*args: object, **kwargs: object) -> object:
            return functional_call(module, w, args, kwargs)

        return forward(call, image, Draw(t[None], noise[None]))[0].flatten()

    # A pass per element of the prediction: GroupNorm has no vmap rule for channels-last cotangents.
    jacobian = vmap(jacrev(predict, chunk_size=1), in_dims=(None, 0, 0))(weights, draw.t, draw.noise)
    J = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)  # [S, D, d]

    def value(p: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return output.of(p.reshape(1, *prediction.shape[1:]), y[None], t[None], forward)[0]

    curvature = vmap(hessian(value))(prediction.flatten(1), target, draw.t)  # [S, D, D]
    return torch.einsum("sad,sab,sbe->de", J, curvature, J).double() / draws.count
