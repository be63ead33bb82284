"""Methods that look at groups of parameters apart; see `projections.Grouped`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.blocks import BlockGram
from whence.curvature.solve import Dampings, Problem
from whence.diffusion.draws import Draws, once, uniform
from whence.diffusion.outputs import Output, doubt, loss, margin, squared_norm
from whence.features.parts import Gradient, Value
from whence.features.projections import Grouped
from whence.methods import aggregate
from whence.methods.inner_product import FeatureMethod, InnerProduct
from whence.methods.registry import MARGIN, ONE_PASS, method
from whence.storage.arrays import Rows
from whence.types import WhenceError

STEPS, RATE = 200, 0.1  # of Adam on the logits; the objective is then within 5e-4 of its best


@method("Womp Labs", 2024, ONE_PASS, classifier=MARGIN)
def block_trak(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    depth: int = 2,
    ensemble: bool = False,
) -> InnerProduct:
    """sum_b psi_b^T (Phi_b^T Phi_b + lambda_b I)^-1 phi_b * Q_i: TRAK with a system of its own for each group of parameters
    b (Womp Labs 2024). With one group it is TRAK.

    Differs from released code: there is none, only a report on ResNet-9.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of all groups together, as many for each (`projections.Grouped`); exact gradients with None, or no
            more parameters.
        damping: lambda_b in units of the mean non-zero eigenvalue of that group's Phi_b^T Phi_b.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        depth: how many parts of the module path name a group: with 2, up_blocks.1.resnets.0.conv1.weight is in
            up_blocks.1.
        ensemble: mean over the models of `Task.ensemble` and the final one, instead of the final one alone.
    """
    return InnerProduct(
        Gradient(output, draws, Grouped(dim, depth), parameters),
        precondition=BlockGram(damping),
        aggregate=aggregate.mean if ensemble else aggregate.last,
        weight=Value(doubt, once()) if output is margin else None,
    )


def layer_weights(kernels: Tensor, top: int) -> Tensor:
    """The weights of each query's groups that make its best images stand out: kernels [J, m, n] -> [m, J].

        w_q = argmax_w mean of the `top` largest of tau_q / ||tau_q||_2,    tau_q = sum_j w_j kernel_qj

    w is a softmax, by Adam on its logits from even weights. No truth is used: noise with heavy tails looks informative too.
    """
    groups, m, n = kernels.shape
    if not 1 <= top <= n:
        raise WhenceError(f"layer weights: the {top} best of {n} images; accepted: 1 to {n}")
    logits = torch.zeros(m, groups, dtype=kernels.dtype, requires_grad=True)
    adam = torch.optim.Adam([logits], RATE)
    for _ in range(STEPS):
        tau = torch.einsum("mj,jmn->mn", logits.softmax(1), kernels)
        # A query without gradient has no scores; the sum of queries that do not meet keeps each one to itself.
        norm = torch.linalg.vector_norm(tau, dim=1)
        (gain,) = torch.autograd.grad((tau.topk(top).values.mean(1) / norm.where(norm > 0, 1.0)).sum(), [logits])
        logits.grad = -gain
        adam.step()
    return logits.detach().softmax(1)


@dataclass(frozen=True)
class LayerWeighted(FeatureMethod):
    """sum_j w_qj psi_qj^T (Phi_j^T Phi_j + lambda_j I)^-1 phi_ij over groups of parameters j, with w from `layer_weights`.

    Differs from the paper (2506.05647), which finds one w for all queries: here each query has its own, because a score must
    not depend on what else is asked. Holds J matrices of scores.

    Args:
        train: gradients, under a `Grouped` projection.
        precondition: a system for each group.
        top: how many images should stand out.
        name: in recipes and on the screen.
    """

    train: Gradient
    precondition: BlockGram
    top: int
    name: str = ""

    def sides(self) -> tuple[Gradient, Gradient]:
        return self.train, self.train

    def combine(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> Iterator[Tensor]:
        """The weights are found for each damping."""
        blocks = self.precondition.blocks(problem, train, query, dampings).values()
        for at in range(len(dampings)):
            kernels = torch.stack([block[at].kernel() for block in blocks])
            yield torch.einsum("mj,jmn->mn", layer_weights(kernels, self.top), kernels)


@method("arXiv 2506.05647", 2025, ONE_PASS, classifier=None)
def weighted_d_trak(
    output: Output = squared_norm,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    depth: int = 2,
    top: int = 20,
) -> LayerWeighted:
    """D-TRAK with a system per group of parameters, and learned weights of the groups (2506.05647); see `LayerWeighted`.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of all groups together, as many for each (`projections.Grouped`); exact gradients with None, or no
            more parameters.
        damping: lambda_b in units of the mean non-zero eigenvalue of that group's Phi_b^T Phi_b.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        depth: how many parts of the module path name a group: with 2, up_blocks.1.resnets.0.conv1.weight is in
            up_blocks.1.
        top: images that should stand out; our choice, the paper's number is not known to us.
    """
    return LayerWeighted(Gradient(output, draws, Grouped(dim, depth), parameters), BlockGram(damping), top)
