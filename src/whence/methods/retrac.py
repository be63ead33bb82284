"""Diffusion-TracIn and Diffusion-ReTrac: TracIn with the timesteps and noise that training itself drew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from whence.curvature.solve import NoPreconditioner, Plain
from whence.diffusion.draws import Draws, Linspace, Repeated
from whence.diffusion.outputs import Output, loss
from whence.features.halves import in_halves
from whence.features.parts import Gradient, part
from whence.features.projections import Projection
from whence.features.rows import rows
from whence.methods import aggregate
from whence.methods.columns import fitted
from whence.methods.errors import OF_HALVES, OF_QUERIES, Stated, by_halves, pooled, unmeasured
from whence.methods.inner_product import recorded
from whence.methods.needs import check_scored, known_study
from whence.methods.registry import EVERY_CHECKPOINT, method
from whence.training.order import AsTrained, ReplayedDraw, epoch_before
from whence.training.recipe import Recipe
from whence.types import Checkpoint, Scores, Task


@dataclass(frozen=True)
class Replay:
    """sum_c rate_c B (step_c - step_c-1) / n <psi_q, phi_i> over training checkpoints, B images per step: TracIn whose
    training images are seen as training saw them.

        phi_i = P grad loss(i; t_i, eps_i)  [unit]                the event of image i in the last complete epoch before c
        psi_q = P mean_t [unit of] mean over noises of grad loss(q)   over the timesteps and noises of `query`

    Args:
        name: in recipes and on the screen.
        output: the loss.
        query: the draws of the queries.
        unit: divide both by their norms before projection, so that no image stands out for the timestep it happened to
            get.
        projection: P.
        parameters: those that are differentiated (`gradients.select`).
    """

    name: str
    output: Output
    query: Draws
    unit: bool
    projection: Projection
    parameters: str

    damping = None

    @property
    def linear_in_query(self) -> bool:
        return self._part(self.query).linear

    def __call__(self, task: Task) -> Scores:
        check_scored(self.name, self, task)
        if (used := fitted(self, task)) != self:
            return used(task)
        recipe = known_study(self.name, task).recipe
        measured = task.errors and self.stated(task).of == OF_QUERIES
        total = torch.zeros(1 + measured, len(task.queries), len(task.train), dtype=torch.float64)
        chosen = self._checkpoints(task, recipe)
        for number, (checkpoint, eta) in enumerate(chosen, 1):
            where = f"{self.name} {number}/{len(chosen)}"
            epoch = epoch_before(recipe, len(task.train), checkpoint.step or 0)
            seen = AsTrained(task.train, recipe, epoch)
            shown = ReplayedDraw(recipe.seed, epoch, self.unit, task.forward.density)
            train = rows(self._part(shown), task, checkpoint, seen, f"{where}: training images")
            asked = (self._part(self.query), task, checkpoint, task.queries, f"{where}: queries")
            if measured:  # linear in the query: its move is a product with Delta (see `errors`)
                halves = in_halves(*asked).all()
                query = torch.cat([halves.at(0), halves.moved()])
            else:
                query = rows(*asked).all().double()
            total += eta * Plain(train, query).kernel().unflatten(0, (-1, len(task.queries)))
        scores = recorded(self, task, total[0].clone(), chosen=chosen)
        if not measured:
            return unmeasured(scores, self, task)
        return replace(scores, stderr=pooled(total[1].square(), total[0]).sqrt(), stderr_of=OF_QUERIES)

    def stated(self, task: Task) -> Stated:
        """Of the draws of the queries alone: those of training are replayed, and would be the same again."""
        part = self._part(self.query)
        found = by_halves(part, part, NoPreconditioner(), task.forward)
        return Stated(OF_QUERIES) if found.of in OF_HALVES else found

    def _part(self, draws: Draws | ReplayedDraw) -> Gradient:
        return Gradient(self.output, draws, self.projection, self.parameters)

    def _checkpoints(self, task: Task, recipe: Recipe) -> list[tuple[Checkpoint, float]]:
        """eta_c = rate_c B (step_c - step_c-1) / n: the steps taken on image i in the interval, on average."""
        found, before = [], 0
        for checkpoint, rate in sorted(aggregate.rate_weighted(task), key=lambda pair: pair[0].step or 0):
            step = checkpoint.step or 0
            found.append((checkpoint, rate * recipe.batch_size * (step - before) / len(task.train)))
            before = step
        return found


def _replay(
    name: str, output: Output, draws: Draws, noises: int, unit: bool, dim: int | None, parameters: str
) -> Replay:
    query = replace(draws, timesteps=Repeated(draws.timesteps, noises), unit=unit, group=noises)
    return Replay(name, output, query, unit, part(output, draws, dim, parameters).projection, parameters)


@method("Xie et al.", 2024, EVERY_CHECKPOINT, classifier=None, needs=("checkpoints", "training"))
def diffusion_tracin(
    output: Output = loss,
    draws: Draws = Draws(Linspace(10)),
    dim: int | None = 4096,
    parameters: str = "trained",
    noises: int = 4,
) -> Replay:
    """Diffusion-TracIn (Xie et al. 2024): TracIn with the timestep and noise that training itself drew; see `Replay`. An
    image that got a timestep of large gradients looks influential for every query: see `retrac`.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the timesteps at which queries are measured, each with `noises` noises, and their seed.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        noises: at each timestep of a query.
    """
    return _replay("diffusion_tracin", output, draws, noises, False, dim, parameters)


@method("Xie et al.", 2024, EVERY_CHECKPOINT, classifier=None, needs=("checkpoints", "training"))
def retrac(
    output: Output = loss,
    draws: Draws = Draws(Linspace(10)),
    dim: int | None = 4096,
    parameters: str = "trained",
    noises: int = 4,
) -> Replay:
    """Diffusion-ReTrac (Xie et al. 2024): `diffusion_tracin` with unit gradients; see `Replay`. Published: 100 timesteps
    from 1 to T-1, 16 noises at each, L1 loss, a checkpoint every 20 epochs.

    Differs from released code: the noise of training is replayed too, not only its timestep, and so are its flips; the
    loss is `output`; intervals between checkpoints may differ. One event per image and checkpoint is noisy: it takes many
    checkpoints.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the timesteps at which queries are measured, each with `noises` noises, and their seed.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        noises: at each timestep of a query.
    """
    return _replay("retrac", output, draws, noises, True, dim, parameters)
