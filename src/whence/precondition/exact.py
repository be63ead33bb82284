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

from whence.draws import Draws
from whence.engine import progress
from whence.features import Gradient, prepare
from whence.gradients import one, repeat
from whence.outputs import Output
from whence.precondition.solve import Dampings, Site, Solution, check_damping, eigenbasis
from whence.projections import Identity
from whence.store import Rows
from whence.types import Batch, Draw, Forward, Weights, WhenceError

LARGEST = 20_000  # parameters; the matrix and its eigenvectors then take 6 GB


@dataclass(frozen=True)
class GaussNewton:
    """damping: lambda in units of the mean eigenvalue of the undamped matrix, or as it is where `absolute`."""

    damping: float
    absolute: bool = False

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, site: Site, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        part = site.part
        if not isinstance(part, Gradient) or part.projection != Identity() or len(part.outputs) > 1:
            raise WhenceError("exact Gauss-Newton needs unprojected gradients of one output (dim=None)")
        if part.draws.unit:
            raise WhenceError("exact Gauss-Newton is the curvature of the plain mean over draws; accepted: unit=False")
        if train.width > LARGEST:
            raise WhenceError(
                f"exact Gauss-Newton of {train.width} parameters; at most {LARGEST}: choose fewer, or Gram"
            )
        return eigenbasis(_matrix(site, part), train, query.double()).at(dampings, self.damping, self.absolute)


def _matrix(site: Site, part: Gradient) -> Tensor:
    task, output = site.task, part.outputs[0]
    module = prepare(site.checkpoint, task.engine)
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
    module: torch.nn.Module, weights: Weights, forward: Forward, output: Output, draws: Draws, image: Batch
) -> Tensor:
    every = draws(image.keys, image.x0.shape[1:], forward.timesteps, image.x0.dtype)
    draw = Draw(every.t[0].to(image.x0.device), every.noise[0].to(image.x0))
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
