"""A Gram system per group of parameters: H = blockdiag(Phi_b^T Phi_b + lambda_b I), for rows that stand side by side.

psi^T H^-1 phi = sum_b psi_b^T (Phi_b^T Phi_b + lambda_b I)^-1 phi_b        lambda_b in units of block b's mean eigenvalue
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from whence.curvature.gram import Gram
from whence.curvature.solve import Dampings, Problem, Solution, check_damping
from whence.features.parts import Gradient
from whence.features.projections import Grouped
from whence.features.rows import prepare
from whence.storage.arrays import Rows
from whence.types import WhenceError


@dataclass(frozen=True)
class BlockSum(Solution):
    """The system whose blocks these are."""

    blocks: Sequence[Solution]

    def kernel(self) -> Tensor:
        return torch.stack([block.kernel() for block in self.blocks]).sum(0)

    def train_self(self) -> Tensor:
        return torch.stack([block.train_self() for block in self.blocks]).sum(0)

    def train_square(self) -> Tensor:
        return torch.stack([block.train_square() for block in self.blocks]).sum(0)

    def query_self(self) -> Tensor:
        return torch.stack([block.query_self() for block in self.blocks]).sum(0)

    def train_norm(self) -> Tensor:
        return torch.stack([block.train_norm().square() for block in self.blocks]).sum(0).sqrt()


@dataclass(frozen=True)
class BlockGram:
    """A Gram system per group of parameters. Needs a `Grouped` projection.

    Args:
        damping: lambda_b in units of the mean non-zero eigenvalue of Phi_b^T Phi_b.
    """

    damping: float

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def solve(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> list[Solution]:
        blocks = self.blocks(problem, train, query, dampings).values()
        return [BlockSum([block[at] for block in blocks]) for at in range(len(dampings))]

    def blocks(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> dict[str, list[Solution]]:
        """The systems of each group of parameters, one per damping. Groups without any gradient have none.

        The arguments are those of `Preconditioner.solve`.
        """
        part = problem.part
        if not isinstance(part, Gradient) or not isinstance(part.projection, Grouped) or len(part.outputs) > 1:
            raise WhenceError("a Gram system per block needs gradients of one output under a Grouped projection")
        largest = torch.stack([values.abs().amax(0) for _, values in train]).amax(0)
        columns = part.projection.columns(part.shapes(prepare(problem.checkpoint, problem.task.engine)))
        used = {group: own for group, own in columns.items() if bool((largest[own] > 0).any())}
        if not used:
            raise WhenceError("all training features are zero; nothing can be attributed with them")
        gram = Gram(self.damping)
        return {group: gram.solve(problem, train.only(own), query[:, own], dampings) for group, own in used.items()}
