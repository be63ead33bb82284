"""Attribution from the finished weights alone: the derivative of a short further training.

    theta_0 = the model      theta_{s+1} = AdamW step on the loss of a random half of the training images
    tau[q, i] = - d f_q(theta_K) / d w_i,  averaged over halves and seeds          (+ where a higher output is better)

w_i is the weight of image i in the K further steps. Nothing but the model and its training images is needed: no log, no
seed, no checkpoint. What the measurement moves by is exact, there is no Hessian to invert and no damping to choose; what is
approximated is the question, since the images had their say before these steps, too. K -> 0: inner products of gradients,
preconditioned by Adam; K -> long: the averaged metagradient of a training that begins at the model. Leaving an image out of
further training also lets the model drift for reasons that have nothing to do with it; the derivative at fixed order and
noise holds none of that drift, so that there is nothing to take off (the "adjustment" of the source).

Source: further training as the gold standard where only the finished model is there, Wei et al. 2024 (2412.03906), who
compare approximations of it. To our knowledge it was not differentiated before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from whence.data.images import subset
from whence.diffusion.draws import DrawRule, Draws, stratified
from whence.diffusion.forward import Denoiser, FlowMatching
from whence.diffusion.outputs import Output, loss, weighted
from whence.features.rows import identity, prepare
from whence.methods.errors import Stated
from whence.methods.inner_product import recorded
from whence.methods.metagradient import DRAWS, AveragedMetagradient, with_estimate
from whence.methods.needs import check_scored
from whence.methods.registry import Trial, method
from whence.methods.removal.leave_out import Estimate
from whence.models import tell_labels
from whence.storage.arrays import Store
from whence.training.optimizer import AdamW
from whence.training.order import noise_keys
from whence.training.recipe import Objective, Recipe, Schedule
from whence.training.step import Diverged
from whence.training.unroll import Queries, Run, Trainer, final_weights, smoothness, twin
from whence.training.unroll.measured import values
from whence.types import Checkpoint, Engine, Forward, Scores, Task, WhenceError, describe

BATCH = 64
RATES = tuple(10.0**-e * height for e in range(3, 8) for height in (3.0, 1.0))
"""Tried from the largest down, where no learning rate is given."""
PROBE = stratified(8, seed=4_242, shared=False)
"""The draws at which the probe measures the training images."""
RISE = 1e-3
"""The share by which the loss may rise and still counts as not rising: near a minimum a few steps, with moments that have
seen nothing yet, raise it a little at any rate."""
PROBED = 512
"""The most images that the probe measures."""
FIRST_SEED, PROBE_SEED = 8000, 7999
"""Of the further trainings; apart from those of retrainings (1000 ...) and of `averaged_metagradient` (7000 ...)."""


@dataclass(frozen=True, eq=False)
class Further:
    """Training on from a checkpoint (a `Trainable`). Every seed begins at the same weights.

    Args:
        checkpoint: the finished weights.
        measured: how the network is measured, by its training as well.
        recipe: of the further training.
        engine: the device and the number format, in which the weights are taken.
    """

    checkpoint: Checkpoint
    measured: Forward
    recipe: Recipe
    engine: Engine

    prior = None
    prior_weight = 1.0

    def network_at(self, seed: int) -> nn.Module:
        """The finished network; a copy, so that the model stays as it is. A class-conditional one is told every label."""
        return tell_labels(twin(prepare(self.checkpoint, self.engine)))

    def forward(self) -> Forward:
        return self.measured

    def at(self, seed: int) -> Recipe:
        return replace(self.recipe, seed=seed)

    def describe(self) -> dict[str, object]:
        return {"is": "Further", "checkpoint": self.checkpoint.digest, "recipe": describe(self.recipe)}


@dataclass(frozen=True)
class Probe:
    """What a short further training on all images does to their loss.

    Args:
        rate: the largest of the rates tried at which the loss does not rise (by more than `RISE`).
        before: the mean loss of the images at the finished weights.
        after: after the steps at that rate.
    """

    rate: float
    before: float
    after: float


@method("whence", 2026, "a short training per mask and its derivative", classifier=None, trial=Trial(measured=True))
@dataclass(frozen=True)
class FurtherTraining:
    """The derivative of further training, averaged over random halves and seeds; see the head of this module.

    Optimizer: AdamW with fresh moments, beta1 .9, no clipping. Where no rate is given a probe takes the largest of 3e-3,
    1e-3, 3e-4 ... at which as many steps on all images do not raise their loss, at the price of a few of these trainings
    without their derivatives.

    Args:
        name: in recipes and on the screen.
        steps: K, of each further training.
        learning_rate: after the warm-up; None for that of the probe.
        warmup_steps: in which the rate rises.
        schedule: of the rate after the warm-up: "constant", or "cosine", down to 0.
        batch_size: images per step; None for 64, or all where there are fewer.
        masks: random subsets.
        seeds: trainings per subset, no two alike.
        fraction: share of the images in a subset.
        pairs: every second subset is the complement of the one before; only for halves.
        output: what is measured on the queries.
        draws: the (timestep, noise) pairs that a query is measured at.
        redraw: each group of trainings measures at draws of its own, see `AveragedMetagradient`.
        keep: which states of the training stay in memory: "all", "sqrt" or "tree" (see `unroll.Differentiation`).
        curvature: "hessian", the derivative itself, "gauss-newton", or "none" (see `unroll`).
        resample_draws: draws of its own at which the slope of each image is measured (see `unroll.Resample`); None for the
            slopes at the draws of the training.
        resample_every: steps between two such measurements.
        rank: of the sketch of the queries, see `unroll.sketched`; None for all queries.
        min_smoothness: the metasmoothness asked for before all, at the price of three trainings; None asks for none.
        mask_seed: of the subsets.
        first_seed: of the trainings.
    """

    name: str = "further_training"
    steps: int = 200
    learning_rate: float | None = None
    warmup_steps: int = 5
    schedule: str = "cosine"
    batch_size: int | None = None
    masks: int = 4
    seeds: int = 1
    fraction: float = 0.5
    pairs: bool = True
    output: Output = loss
    draws: Draws = DRAWS
    redraw: bool = True
    keep: str = "sqrt"
    curvature: str = "gauss-newton"
    resample_draws: int | None = 16
    resample_every: int = 16
    rank: int | None = None
    min_smoothness: float | None = None
    mask_seed: int = 0
    first_seed: int = FIRST_SEED
    linear_in_query = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        self.averaged()  # refuses masks, seeds and fractions that do not fit
        if self.steps < 1 or self.warmup_steps < 0:
            raise WhenceError(f"steps is {self.steps}, warmup_steps {self.warmup_steps}", self.name, "at least 1 and 0")
        Schedule(self.steps, kind=self.schedule)  # refuses an unknown one
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise WhenceError(f"learning_rate is {self.learning_rate:g}", self.name, "above 0, or None for the probe's")
        if self.batch_size is not None and self.batch_size < 1:
            raise WhenceError(f"batch_size is {self.batch_size}", self.name, "at least 1")

    def averaged(self) -> AveragedMetagradient:
        """The average that is taken over halves and seeds."""
        shared = {
            name: value for name, value in vars(self).items() if name in AveragedMetagradient.__dataclass_fields__
        }
        return AveragedMetagradient(**{**shared, "min_smoothness": None})  # the gate is one of our own, which names K

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> FurtherTraining:
        """The arguments are those of `question.Narrowable`; output and draws are of the queries alone here."""
        return replace(self, output=output(self.output), draws=draws(self.draws))

    def __call__(self, task: Task) -> Scores:
        check_scored(self.name, self, task)
        study, estimate = self.estimated(task)
        values = torch.from_numpy(estimate.values)
        scores = recorded(self, task, values, chosen=[(task.trajectory[-1], 1.0)])
        return with_estimate(replace(scores, recipe={**scores.recipe, "study": describe(study)}), estimate, self, task)

    def stated(self, task: Task) -> Stated:
        return self.averaged().stated(task)

    def estimate(self, task: Task, column: str | None = None) -> Estimate:
        """Values and standard errors as `AveragedMetagradient.estimate`: [m, n], or [m, groups] of a column."""
        return self.estimated(task, column)[1]

    def estimated(self, task: Task, column: str | None = None) -> tuple[Further, Estimate]:
        """The further training that was chosen, and what came of it."""
        study = self.study(task)
        if self.min_smoothness is not None:
            _gate(self, study, task)
        return study, self.averaged().estimate(replace(task, study=study), column)

    def study(self, task: Task) -> Further:
        """The further training, at the probe's rate where none is given."""
        n = len(task.train)
        if self.batch_size is not None and self.batch_size > n:
            raise WhenceError(f"batch_size is {self.batch_size}, but there are {n} images", self.name, f"1 to {n}")
        forward = task.forward
        if not isinstance(forward, Denoiser | FlowMatching):
            raise WhenceError(
                f"{self.name} trains a model on, and how {type(forward).__name__} is trained is not known",
                accepted="a Denoiser or FlowMatching",
            )
        recipe = Recipe(
            None,
            AdamW(self.learning_rate or RATES[0], beta1=0.9),
            Schedule(self.steps, self.warmup_steps, self.schedule),
            Objective(loss if forward.weighting is None else weighted),
            batch_size=self.batch_size or min(BATCH, n),
            max_grad_norm=0.0,
            ema=0.0,
            seed=PROBE_SEED,
        )
        study = Further(task.trajectory[-1], forward, recipe, task.engine)
        if not any(p.requires_grad for p in prepare(task.trajectory[-1], task.engine).parameters()):
            raise WhenceError(f"{self.name}: no weight of the model is trained; there is nothing to train on")
        if self.learning_rate is not None:
            return study
        found = probe(study, task)
        return _at_rate(study, found.rate)


def _at_rate(study: Further, rate: float) -> Further:
    recipe = study.recipe
    return replace(study, recipe=replace(recipe, optimizer=replace(recipe.optimizer, learning_rate=rate)))


def probe(study: Further, task: Task) -> Probe:
    """Try rates from the largest down, and take the first at which training on does not raise the loss of the images.

    What was tried is kept in the run folder. A warning says so where the weights are not at rest: where the loss falls by a
    tenth or more the model was not trained to its end, or not with this loss.

    Args:
        study: the further training, at any rate.
        task: the question.
    """
    some = torch.argsort(noise_keys(task.train), stable=True)[:PROBED].tolist()
    key = {"part": "further probe", "study": study, "images": identity(task.train), "draws": PROBE}
    array = Store(task.folder_of(task.train)).array(
        {**key, "forward": task.forward}, (1 + len(RATES), 1), torch.float64, 1
    )
    missing = {rows.start for rows in array.missing()}
    if 0 in missing:
        array.write(slice(0, 1), loss_of(study, task, some, after=False))
    before = float(array.read(slice(0, 1)))
    for number, rate in enumerate(RATES, start=1):
        rows = slice(number, number + 1)
        if number in missing:
            array.write(rows, loss_of(_at_rate(study, rate), task, some, after=True))
        after = float(array.read(rows))
        if after <= before * (1 + RISE):
            if after < 0.9 * before:
                warnings.warn(
                    f"further training: {study.recipe.steps} steps at {rate:g} take the loss of the training images from "
                    f"{before:.4g} to {after:.4g}: the model was not trained to its end, or with another loss; what "
                    "further training says may differ from what its own training did",
                    stacklevel=2,
                )
            return Probe(rate, before, after)
    raise WhenceError(
        f"further training: the loss of the training images, {before:.4g}, rises at every learning rate from {RATES[0]:g} "
        f"down to {RATES[-1]:g}; these may not be the images or the loss of its training",
        accepted="its own training images, or a learning_rate",
    )


def loss_of(study: Further, task: Task, rows: list[int], after: bool) -> Tensor:
    """The mean loss of some images [1, 1] before or after training on; infinite where that diverges."""
    run = Run.of(study, task.train, engine=task.engine)
    trainer, asked = Trainer(run), Queries(subset(task.train, rows), study.recipe.loss, PROBE)
    try:
        mean = values(trainer, asked, final_weights(run) if after else trainer.first().weights).mean()
    except Diverged:
        mean = torch.tensor(torch.inf, dtype=torch.float64)
    return torch.where(mean.isfinite(), mean, torch.inf).reshape(1, 1)


def _gate(method: FurtherTraining, study: Further, task: Task) -> None:
    """Refuse a further training that is not smooth in the weights of its images, naming the longest that is."""
    asked, steps = float(method.min_smoothness or 0), method.steps
    first, longest = None, 0
    while steps >= 1:
        schedule = replace(study.recipe.schedule, steps=steps)
        shorter = replace(study, recipe=replace(study.recipe, schedule=schedule))
        found = smoothness(Run.of(shorter, task.train, method.first_seed, engine=task.engine), min_smoothness=asked)
        if found.enough:
            longest = steps
            break
        first, steps = first or found, steps // 2
    if first is not None:
        raise WhenceError(
            f"{method.name}: {first.text}", accepted=f"steps up to {longest}" if longest else "a lower rate"
        )
