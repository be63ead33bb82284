"""Attribution by differentiating through training: at all images, and averaged over random subsets and seeds.

    tau[q, i] = -df_q / dw_i  (+ where a higher output is better)          by how much f_q gets worse without image i
              = -(d_i - sum_j w_j d_j / sum_j w_j)                         d: df_q / dw at the constant c of `unroll`

A training without an image divides by what is left, c(w) = mean w, as a ledger's trainings do; twice the weights for all are
then the same training, which is what the subtracted mean says. It moves all scores of a query alike.

Differs from the other methods in what it needs: `Task.study`, which trained the model, because it trains it again. Each
training that is differentiated is stored in the run folder when it is done, and an interrupted run goes on with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whence.diffusion.draws import DrawRule, Draws, stratified
from whence.diffusion.noise import seed_for, stream
from whence.diffusion.outputs import Output, loss
from whence.features.rows import identity, prepare
from whence.methods.errors import MASKS, REDRAWN, Stated, States, pooled, unmeasured
from whence.methods.inner_product import recorded
from whence.methods.needs import check_scored, known_study
from whence.methods.registry import method
from whence.methods.removal.leave_out import Estimate
from whence.plain import owner_of
from whence.storage.arrays import Rows, Store, values_digest
from whence.storage.workers import Work, share
from whence.training.order import noise_keys
from whence.training.unroll import Differentiation, Queries, Resample, Run, metagradient, sketched, smoothness
from whence.types import Scores, Task, Weights, WhenceError, describe

DRAWS = stratified(100, shared=False)  # measured once, at the end: cheap beside the trainings


@dataclass(frozen=True, eq=False)
class Job:
    """One training to differentiate: the images it takes [n], its seed, and the draws that queries are measured at."""

    mask: Tensor
    seed: int
    draws: Draws


@method("Engstrom et al.", 2025, "half a training per query", classifier=None, needs=("training",))
@dataclass(frozen=True)
class Metagradient:
    """The derivative of the very training that made the model, at w = 1: what removing one image, or few, does.

    A task whose last checkpoint its study does not reproduce is refused. Sources: Engstrom et al. 2025 (2503.13751), Ilyas &
    Engstrom 2025 (2504.16430).

    Args:
        name: in recipes and on the screen.
        output: what is measured on the queries.
        draws: the (timestep, noise) pairs that a query is measured at.
        keep: which states of the training stay in memory: "all", "sqrt" or "tree" (see `unroll.Differentiation`).
        curvature: "hessian", the derivative itself, "gauss-newton", or "none" (see `unroll`).
        resample_draws: draws of its own at which the slope of each image is measured, for half as many images as the steps
            between have slots (see `unroll.Resample`); None for the slopes at the draws of the training.
        resample_every: steps between two such measurements.
        rank: of the sketch of the queries, see `unroll.sketched`; None for all queries.
        min_smoothness: the metasmoothness asked for before all, at the price of three trainings; None asks for none.
    """

    name: str = "metagradient"
    output: Output = loss
    draws: Draws = DRAWS
    keep: str = "sqrt"
    curvature: str = "hessian"
    resample_draws: int | None = None
    resample_every: int = 16
    rank: int | None = None
    min_smoothness: float | None = None
    linear_in_query = True  # no setting: it has no annotation

    def __call__(self, task: Task) -> Scores:
        return _scores(self, task)

    def stated(self, task: Task) -> Stated:
        return Stated(because="it is the derivative of one training, and there is no other to compare it with")

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> Metagradient:
        """The arguments are those of `question.Narrowable`; output and draws are of the queries alone here."""
        return replace(self, output=output(self.output), draws=draws(self.draws))

    def estimate(self, task: Task, column: str | None = None) -> Estimate:
        """Values [m, n], or [m, groups]; one training says nothing about its error, which is NaN."""
        job = Job(torch.ones(len(task.train)), known_study(self.name, task).recipe.seed, self.draws)
        module = prepare(task.trajectory[-1], task.engine)
        trained = {name: p.detach() for name, p in module.named_parameters()}
        values = _summed(task, column, _derivatives(self, task, job, "metagradient", trained)).numpy()
        return Estimate(values, np.full_like(values, np.nan), 1)


@method("whence", 2026, "half a training per query and mask", classifier=None, needs=("training",))
@dataclass(frozen=True)
class AveragedMetagradient:
    """The mean of metagradients at random subsets and seeds: what removing an image does on average over subsets.

        c_i = E[f | w_i = 1] - E[f | w_i = 0] = E integral_0^1 df/dw_i dw_i  ~  E_mask df/dw_i,  w_i = 0 or 1

    An image that is left out has a slope too, so that one training says something about every image. By default it is not
    the plain derivative of each training that is taken: slopes are measured again along its path, at draws of their own. The
    masks then agree better with each other, so that fewer of them do. More masks reuse the trainings of fewer.

    Args:
        name: in recipes and on the screen.
        masks: random subsets.
        seeds: trainings per subset, no two alike.
        fraction: share of the images in a subset.
        pairs: every second subset is the complement of the one before, which cancels what is due to pairs of images
            meeting more or less often than by chance; only for halves.
        output: what is measured on the queries.
        draws: the (timestep, noise) pairs that a query is measured at.
        redraw: each group of trainings measures at draws of its own (the first one at `draws`), so that the error between
            groups holds that of the draws, and their mean less of it; False where `draws` are what is asked about.
        keep: which states of the training stay in memory: "all", "sqrt" or "tree" (see `unroll.Differentiation`).
        curvature: "hessian", the derivative itself, "gauss-newton", or "none" (see `unroll`).
        resample_draws: draws of its own at which the slope of each image is measured, for half as many images as the steps
            between have slots (see `unroll.Resample`); None for the slopes at the draws of the training.
        resample_every: steps between two such measurements.
        rank: of the sketch of the queries, see `unroll.sketched`; None for all queries.
        min_smoothness: the metasmoothness asked for before all, at the price of three trainings; None asks for none.
        mask_seed: of the subsets; another than that of the retrainings which judge the scores.
        first_seed: of the trainings, likewise.
    """

    name: str = "averaged_metagradient"
    masks: int = 12
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
    first_seed: int = 7000
    linear_in_query = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        if self.masks < 1 or self.seeds < 1 or not 0 < self.fraction < 1:
            raise WhenceError(
                f"averaged metagradient: {self.masks} masks of {self.fraction:g} with {self.seeds} seeds; at least 1 of "
                "each and a fraction between 0 and 1 are needed"
            )
        if self.pairs and (self.fraction != 0.5 or self.masks % 2):
            raise WhenceError(
                f"averaged metagradient: {self.masks} masks of {self.fraction:g} are no complementary halves; give an even "
                "number at fraction 0.5, or pairs=False"
            )

    def subset(self, keys: Tensor, number: int) -> Tensor:
        """Mask `number`, 0 or 1 for each image, by its noise key [n]. No mask depends on another."""
        base, n = number // 2 if self.pairs else number, len(keys)
        # Sorting hashes of the images, not shuffling positions: a mask is the same whatever the order of the images.
        order = torch.argsort(stream(seed_for(self.mask_seed, "mask"), base, keys), stable=True)
        mask = torch.zeros(n)
        mask[order[: round(self.fraction * n)]] = 1
        return 1 - mask if self.pairs and number % 2 else mask

    def jobs(self, keys: Tensor) -> list[list[Job]]:
        """The trainings, in groups that are independent of each other: a pair of masks, or the seeds of one."""
        seeds = iter(range(self.first_seed, self.first_seed + self.masks * self.seeds))
        of_each_mask, together = [], 2 if self.pairs else 1
        for k in range(self.masks):
            mask, draws = self.subset(keys, k), self.drawn(k // together)
            of_each_mask.append([Job(mask, next(seeds), draws) for _ in range(self.seeds)])
        return [list(chain(*of_each_mask[k : k + together])) for k in range(0, self.masks, together)]

    def drawn(self, group: int) -> Draws:
        """The draws that a group of trainings is measured at."""
        if group == 0 or not self.redraw:
            return self.draws
        return replace(self.draws, seed=seed_for(self.draws.seed, f"group {group}"))

    def finished(self, task: Task) -> int:
        """How many of the trainings are there already."""
        jobs = [job for group in self.jobs(noise_keys(task.train)) for job in group]
        return sum(not _rows(self, task, job).missing() for job in jobs)

    def __call__(self, task: Task) -> Scores:
        return _scores(self, task)

    @property
    def groups(self) -> int:
        """Of trainings that are independent of each other."""
        return self.masks // 2 if self.pairs else self.masks

    def stated(self, task: Task) -> Stated:
        """Of masks and seeds, and of draws where each group has its own; one group alone says nothing of them."""
        if self.groups > 1:
            return Stated(REDRAWN if self.redraw else MASKS)
        return Stated(
            because=f"one {'pair of masks' if self.pairs else 'mask'} has none beside it; give masks=4 or more"
        )

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> AveragedMetagradient:
        """The arguments are those of `question.Narrowable`; output and draws are of the queries alone here."""
        return replace(self, output=output(self.output), draws=draws(self.draws))

    def estimate(self, task: Task, column: str | None = None) -> Estimate:
        """Values and standard errors: [m, n], or [m, groups] for the values of a column of the training images, sorted.

        The weight of a contributor moves those of all of his images, so that his derivative is the sum of theirs, in every
        training; his error comes from these sums, and is NaN where there is one group of trainings only, and none beside:
        a pair of masks, or a mask without `pairs`. An interval: values +- t stderr, t of (groups of jobs - 1) degrees.
        """
        groups = self.jobs(noise_keys(task.train))
        _compute(self, task, list(chain.from_iterable(groups)))
        mean = spread = torch.zeros(())
        for count, group in enumerate(groups, start=1):
            values = torch.zeros(())
            for job in group:
                values = values + _summed(task, column, _derivatives(self, task, job, "metagradient", None))
            step = values / len(group) - mean
            mean = mean + step / count
            spread = spread + step.square() * (count - 1) / count  # sum of squares around the mean, group by group
        error = (
            (spread / (len(groups) * (len(groups) - 1))).sqrt() if len(groups) > 1 else torch.full_like(mean, torch.nan)
        )
        names = task.train.ids if column is None else sorted({owner_of(one) for one in task.train.meta[column]})
        return Estimate(mean.numpy(), error.numpy(), self.masks * self.seeds, names)


Unrolled = Metagradient | AveragedMetagradient


def differentiation(method: Unrolled, task: Task) -> Differentiation:
    """How the method differentiates.

    Slopes are resampled for half as many images as the training has slots between two points: the price does not
    depend on n.
    """
    resample, steps = None, method.resample_every
    if method.resample_draws is not None:
        count = known_study(method.name, task).recipe.batch_size * steps
        resample = Resample(max(1, min(len(task.train), count // 2)), steps, method.resample_draws)
    return Differentiation(method.curvature, resample, method.keep)


def _rows(method: Unrolled, task: Task, job: Job) -> Rows:
    """Where the derivatives of one training are kept: [m, n]."""
    key = {
        "part": "metagradient",
        "study": known_study(method.name, task),
        "seed": job.seed,
        "mask": values_digest(job.mask.double()),
        "engine": str(task.engine.dtype),
        "forward": task.forward,
        "images": identity(task.train),
        "queries": identity(task.queries),
        "output": method.output,
        "draws": job.draws,
        "curvature": method.curvature,
        "resample": differentiation(method, task).resample,
        "rank": method.rank,
    }
    m, n = len(task.queries), len(task.train)
    return Store(task.root).array(key, (m, n), torch.float64, m)


def _compute(method: Unrolled, task: Task, jobs: Sequence[Job]) -> None:
    """The derivatives of all trainings that are not there, each by one of several processes."""
    parts = [(number, job, _rows(method, task, job)) for number, job in enumerate(jobs, 1)]

    def compute(part: Iterable[tuple[int, Job, Rows]]) -> Tensor:
        ((number, job, _),) = part
        return _derived(method, task, job, f"metagradient {number}/{len(jobs)}", None)

    def place(part: tuple[int, Job, Rows]) -> Path:
        return part[2].path(part[2].shards[0])

    def keep(part: tuple[int, Job, Rows], values: Tensor) -> None:
        part[2].write(part[2].shards[0], values)

    share(parts, Work(lambda part: place(part).exists(), place, compute, keep), "", task.engine)


def _derivatives(method: Unrolled, task: Task, job: Job, what: str, trained: Weights | None) -> Tensor:
    """tau of one training [m, n]: read where it is there, computed and stored where not."""
    output = method.output
    if output.better is None:
        raise WhenceError(
            f"metagradient: output {output.name!r} says nothing about better or worse; give a loss or margin"
        )
    array = _rows(method, task, job)
    for rows in array.missing():
        array.write(rows, _derived(method, task, job, what, trained))
    slopes, present = array.all(), job.mask.double()
    return (slopes - slopes @ present[:, None] / present.sum()) * (-1 if output.better == "lower" else 1)


def _derived(method: Unrolled, task: Task, job: Job, what: str, trained: Weights | None) -> Tensor:
    """df_q / dw_i of one training [m, n]; the arguments as of `_derivatives`."""
    run = Run.of(known_study(method.name, task), task.train, job.seed, job.mask, task.engine)
    if method.min_smoothness is not None:
        found = smoothness(run, min_smoothness=method.min_smoothness)
        if not found.enough:
            raise WhenceError(f"{what}: {found.text}")
    asked, how = Queries(task.queries, method.output, job.draws), differentiation(method, task)
    if method.rank is None:
        values = metagradient(run, asked, how, trained, what)
    else:
        values = sketched(run, asked, method.rank, how, trained, what)
    return values[:, : len(task.train)]  # prior images belong to the recipe: they are not attributed


def _summed(task: Task, column: str | None, values: Tensor) -> Tensor:
    """Scores [m, n] summed over the images of each value of a column, sorted: [m, groups]."""
    if column is None:
        return values
    scores = Scores(values, task.queries.ids, task.train.ids, {}, train_meta=task.train.meta)
    return scores.group_by(column).values


def _scores(method: Unrolled, task: Task) -> Scores:
    check_scored(method.name, method, task)
    estimate = method.estimate(task)
    study = known_study(method.name, task)
    chosen = [(task.trajectory[-1], 1.0)] if isinstance(method, Metagradient) else []
    scores = recorded(method, task, torch.from_numpy(estimate.values), "removal", chosen=chosen)
    return with_estimate(replace(scores, recipe={**scores.recipe, "study": describe(study)}), estimate, method, task)


def with_estimate(scores: Scores, estimate: Estimate, method: States, task: Task) -> Scores:
    """Scores with the errors of an average over groups of trainings, pooled over the images of a query.

    Args:
        scores: of the method.
        estimate: values and errors of each, NaN where a single group cannot tell.
        method: what computed them.
        task: the question.
    """
    of = method.stated(task).of
    if not task.errors or of not in (MASKS, REDRAWN):
        return unmeasured(scores, method, task)
    variances = pooled(torch.from_numpy(estimate.stderr).square(), scores.values)
    return replace(scores, stderr=variances.sqrt(), stderr_of=of)
