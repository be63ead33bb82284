"""Journey-TRAK: attribution to the trajectory of a sampled picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whence.curvature.gram import Gram
from whence.curvature.solve import Dampings, Problem, Solution
from whence.data.images import subset
from whence.diffusion.draws import Draws, Fixed, uniform
from whence.diffusion.halves import abba, can_be_halved
from whence.diffusion.outputs import Output, loss
from whence.features.halves import Pair, in_halves
from whence.features.parts import Gradient, part
from whence.features.rows import rows
from whence.methods import aggregate
from whence.methods.errors import Stated
from whence.methods.inner_product import FeatureMethod
from whence.methods.needs import known_sampling
from whence.methods.registry import method
from whence.storage.arrays import Rows
from whence.types import Checkpoint, Images, Task, WhenceError


@dataclass(frozen=True)
class JourneyTrak(FeatureMethod):
    """(1/J) sum_t psi_q(t)^T H^-1 phi_i over the J timesteps t of the sampler, H the Gram system of the phi_i.

    psi_q(t): gradient of the loss at the clean image that the network saw in q at t, noised again to t; phi_i as in TRAK.

    Args:
        train: gradients of the training images.
        noises: over which psi_q(t) is averaged.
        step: one timestep of the sampler; None for the mean over all.
        precondition: H.
        ensemble: the mean over the models of `Task.ensemble` and the final one.
        name: in recipes and on the screen.
    """

    train: Gradient
    noises: int
    step: int | None
    precondition: Gram
    ensemble: bool
    name: str = ""

    @property
    def linear_in_query(self) -> bool:
        return self.train.linear

    def sides(self) -> tuple[Gradient, Gradient]:
        return self.train, self.train

    def combine(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> Iterator[Tensor]:
        return (system.kernel() for system in self.precondition.solve(problem, train, query, dampings))

    def of_system(self, system: Solution, count: int) -> Tensor:
        return system.kernel()

    def checkpoints(self, task: Task) -> list[tuple[Checkpoint, float]]:
        return (aggregate.mean if self.ensemble else aggregate.last)(task)

    def queries(self, task: Task, checkpoint: Checkpoint, where: str) -> Tensor:
        """mean over t of psi_q(t): [m, k]. First the mean, then one system: the score is linear in psi."""
        return self._mean(task, checkpoint, where, self._timesteps(task))

    def query_halves(self, task: Task, checkpoint: Checkpoint, where: str) -> Pair:
        """Of half of the steps each, or of half of the noises at a single one."""
        steps = self._timesteps(task)
        if len(steps) == 1:
            images = self._seen(task, steps[0])
            return in_halves(self._at(steps[0]), task, checkpoint, images, f"{where}: queries").all()
        halves = [[steps[number] for number in half] for half in abba(len(steps))]
        first, second = (self._mean(task, checkpoint, where, half) for half in halves)
        return Pair(first, second, len(halves[0]) / len(steps))

    def stated(self, task: Task) -> Stated:
        if len(self._timesteps(task)) == 1 and not can_be_halved(self._at(0).draws):
            return Stated(because="its queries are seen with one noise at one step of the sampler")
        return super().stated(task)

    def _mean(self, task: Task, checkpoint: Checkpoint, where: str, steps: Sequence[int]) -> Tensor:
        """mean over some t of psi_q(t): [m, k]; the other arguments as of `queries`."""
        total = torch.zeros(())
        for number, t in enumerate(steps, 1):
            what = f"{where}: queries at step {number} of {len(steps)}"
            found = rows(self._at(t), task, checkpoint, self._seen(task, t), what).all().double()
            total = total + found / len(steps)
        return total

    def _seen(self, task: Task, t: int) -> Images:
        """The clean images that the network saw in the queries at a step."""
        there = known_sampling(self.name, task).predicted(t)
        place = {name: row for row, name in enumerate(there.ids)}
        missing = [name for name in task.queries.ids if name not in place]
        if missing:
            raise WhenceError(
                f"{self.name}: the journey says nothing of query {missing[0]!r}; give that of all queries"
            )
        return subset(there, [place[name] for name in task.queries.ids])

    def _at(self, t: int) -> Gradient:
        """What is measured of the queries at a step."""
        assert isinstance(self.train.draws, Draws)
        return replace(self.train, draws=replace(self.train.draws, timesteps=Fixed(t, self.noises)))

    def _timesteps(self, task: Task) -> Sequence[int]:
        steps = known_sampling(self.name, task).timesteps
        if self.step is None:
            return steps
        if self.step not in steps:
            raise WhenceError(
                f"{self.name}: step {self.step} is none of the sampler's; accepted: {', '.join(map(str, steps))}"
            )
        return [self.step]


@method("Georgiev et al.", 2023, "a gradient per image, one per step of a query", classifier=None, needs=("journey",))
def journey_trak(
    output: Output = loss,
    draws: Draws = uniform(10, shared=False),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    noises: int = 1,
    step: int | None = None,
    ensemble: bool = False,
) -> JourneyTrak:
    """TRAK of the images on the way to a sampled picture (Georgiev et al. 2023), averaged over sampling steps as in Zheng et
    al. 2024 (one noise per step), or at one of them (published: 20 noises, one score per step); see `JourneyTrak`.

    Differs from released code: noise is keyed by image, not unseeded; means instead of sums over draws; no random flips.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        noises: of each sampling step of a query.
        step: one timestep of the sampler; None for the mean over all.
        ensemble: mean over the models of `Task.ensemble` and the final one, instead of the final one alone.
    """
    features = part(output, draws, dim, parameters)
    return JourneyTrak(features, noises, step, Gram(damping), ensemble)
