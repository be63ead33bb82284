"""Attribution of groups by unlearning (GUDA, Murata et al. 2026, 2601.22651): a model without a class, or without a creator.

From the finished weights, training goes on with the images that stay, while the images of a group are denoised into those:

    L = mean over retained r of l_r + weight * mean over forgotten f of MSE(prediction at x_t, target at x_t)

The target is what the best denoiser of the retained images alone would say at x_t = a x_f + s eps (ReTrack, Shi et al.
2025):

    eps* = sum_r w_r (x_t - a x_r) / s         w_r = softmax over r of -||x_t - a x_r||^2 / (2 s^2)

over the `neighbours` retained images that are nearest to x_f. The score of a group for a query is how much more its loss is
then, `loss(without the group) - loss(model)`; each image of the group carries an equal part of it, so that sums over images
of a group are the group's score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad_and_value

from whence.data.owners import IMAGE, owners
from whence.diffusion.draws import DrawRule, Draws, uniform
from whence.diffusion.noise import seed_for
from whence.diffusion.outputs import Output, loss
from whence.diffusion.predicted import NoisePrediction
from whence.features.gradients import measure
from whence.features.rows import identity
from whence.methods.errors import Stated, unmeasured
from whence.methods.fisher import Measured
from whence.methods.forgetting import Forgotten
from whence.methods.inner_product import recorded
from whence.methods.needs import check_scored
from whence.methods.registry import Trial, method
from whence.methods.unlearning import DRAWS
from whence.report.words import GROUP_COLUMNS
from whence.storage.arrays import Store
from whence.storage.files import progress
from whence.training.optimizer import AdamW, State
from whence.training.order import noise_keys
from whence.types import Batch, Draw, Scores, Task, Weights, WhenceError, describe

FACTS = ("forgotten", "retained")
"""The mean loss of the group's images, and of the others, as multiples of what they were."""
FEW = DRAWS.with_count(4)
"""At which these are measured."""


def redirected(images: Tensor, retained: Tensor, draw: Draw, scales: tuple[Tensor, Tensor], clip: float | None) -> tuple[
    Tensor, Tensor
]:  # fmt: skip
    """The clean image x0* and the noise eps* into which the best denoiser of the retained images splits x_t = a x0 + s eps:
    a x0* + s eps* = x_t again, so that any network's own loss at them has that denoiser as its target.

    eps* - eps = sum_r w_r clip(a (x0 - x_r) / s). Differs from released code: the weights are a softmax of their logarithms;
    exp of the distances themselves is 0 for all of them at 3,072 dimensions.

    Args:
        images: x0 [b, ...].
        retained: the images that each may become [b, k, ...].
        draw: whose noise is eps [b, ...].
        scales: a and s, shaped to multiply images.
        clip: the largest change of the noise, element by element; None for any.
    """
    a, s = (each[:, None].double() for each in scales)
    apart = (images[:, None] - retained).double()
    # ||x_t - a x_r||^2 / s^2 = ||a (x0 - x_r) / s + eps||^2
    w = (-(a * apart / s + draw.noise[:, None].double()).flatten(2).square().sum(2) / 2).softmax(1)
    change = apart if clip is None else apart.clamp(-clip * s / a, clip * s / a)  # of x0: there may be no signal, a = 0
    mean = (w.reshape(*w.shape, *[1] * (images.ndim - 1)) * change).sum(1)
    return (images.double() - mean).to(images), (draw.noise.double() + a[:, 0] / s[:, 0] * mean).to(draw.noise)


@dataclass(frozen=True)
class GroupUnlearning:
    """See the head of this module.

    Args:
        by: the column of the training images that names the groups; "image" for every image by itself; None for the first
            of `words.GROUP_COLUMNS` that they have, or their only column.
        output: the loss of queries.
        draws: at which it is measured.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        learning_rate: of AdamW.
        weight: of the forgotten images beside the retained.
        neighbours: retained images that a forgotten one may become; None for all.
        clip: the largest change of its noise; None for any.
        batch_size: retained images per step, and forgotten ones at most.
        steps: of training.
        runs: with other batches and noise, averaged.
        seed: of these.
        name: in recipes and on the screen.
    """

    by: str | None = None
    output: Output = loss
    draws: Draws = DRAWS
    parameters: str = "trained"
    learning_rate: float = 1e-5
    weight: float = 0.03
    neighbours: int | None = 10
    clip: float | None = None
    batch_size: int = 64
    steps: int = 200
    runs: int = 1
    seed: int = 0
    name: str = "guda"
    image_by_image = True  # no setting: it has no annotation

    def __post_init__(self) -> None:
        counts = [self.batch_size, self.steps, self.runs, *([] if self.neighbours is None else [self.neighbours])]
        amounts = [self.weight, self.learning_rate, *([] if self.clip is None else [self.clip])]
        if min(counts) < 1 or not all(0 < each < float("inf") for each in amounts):
            told = "neighbours, batch_size, steps and runs from 1; weight, learning_rate and clip above 0"
            raise WhenceError(f"{self}", self.name, told)

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> GroupUnlearning:
        """The arguments are those of `question.Narrowable`: another part of the query is looked at."""
        return replace(self, output=output(self.output), draws=draws(self.draws))

    def stated(self, task: Task) -> Stated:
        return Stated(because="each group is forgotten once, and its images share what that does")

    def __call__(self, task: Task) -> Scores:
        check_scored(self.name, self, task)
        by, members = self._members(task)
        places = {name: place for place, name in enumerate(task.to_score.ids)}
        wanted = [name for name, rows in members.items() if any(task.train.ids[row] in places for row in rows)]
        key = {"part": "groups unlearned", "method": self, "checkpoint": task.trajectory[-1].digest}
        key |= {"forward": task.forward, "train": identity(task.train), "queries": identity(task.queries)}
        key |= {"groups": {name: [task.train.ids[row] for row in members[name]] for name in wanted}}
        key |= {"study": None if task.study is None else describe(task.study.recipe)}
        width = len(task.queries) + len(FACTS)
        array = Store(task.root).array(key, (len(wanted) * self.runs, width), torch.float64, 1)
        missing = array.missing()
        if missing:
            forget = _Forgetting.of(self, task)
        for rows in progress(missing, self.name):
            group, run = divmod(rows.start, self.runs)
            array.write(rows, forget(members[wanted[group]], wanted[group], run)[None])
        table = array.all().unflatten(0, (len(wanted), self.runs)).mean(1)
        values = torch.zeros(len(task.queries), len(places), dtype=torch.float64)
        for name, row in zip(wanted, table, strict=True):
            for image in members[name]:
                if (place := places.get(task.train.ids[image])) is not None:
                    values[:, place] = row[: len(task.queries)] / len(members[name])
        scores = recorded(self, task, values, chosen=[(task.trajectory[-1], 1.0)])
        told = {
            "by": by,
            "groups": wanted,
            **{fact: table[:, len(task.queries) + i].tolist() for i, fact in enumerate(FACTS)},
        }
        return unmeasured(replace(scores, recipe={**scores.recipe, "unlearned": told}), self, task)

    def forgotten(self, task: Task, name: str) -> Forgotten:
        """The model without a group, by its name.

        Args:
            task: the question; its queries are not looked at.
            name: of the group.
        """
        rows = self.rows_of(task, name)
        found = _Forgetting.of(self, task).without(rows, name, 0)
        return replace(found, facts={**found.facts, "images": float(len(rows))})

    def rows_of(self, task: Task, name: str) -> list[int]:
        """The training images of a group; the arguments are those of `forgotten`."""
        by, members = self._members(task)
        if name not in members:
            known = ", ".join(list(members)[:20]) + (" ..." if len(members) > 20 else "")
            raise WhenceError(f"no training image has the {by} {name!r}", self.name, known)
        return members[name]

    def _members(self, task: Task) -> tuple[str, dict[str, list[int]]]:
        """What names the groups, and the rows of each."""
        columns = list(task.train.meta)
        known = [column for column in GROUP_COLUMNS if column in columns] or columns[: len(columns) == 1]
        by = self.by or next(iter(known), None)
        if by is None:
            told = "the training images have no column that names groups, like creator or label"
            raise WhenceError(
                told, self.name, f"metadata with one, or --set by=COLUMN of {', '.join([IMAGE, *columns])}"
            )
        found = owners(task.train, by)
        if len(found) < 2:
            told = f"all training images have the same {by} ({next(iter(found))!r}), and nothing stays without it"
            raise WhenceError(told, self.name, "a column with two values or more, as --set by=COLUMN")
        return by, found


@dataclass(frozen=True, eq=False)
class _Forgetting:
    """Training without a group, and what is measured then.

    Args:
        method: its settings.
        asked: how queries are measured.
        trained: how training images are.
        order: rows by content, whatever the order of the files.
    """

    method: GroupUnlearning
    asked: Measured
    trained: Measured
    order: Tensor

    @classmethod
    def of(cls, method: GroupUnlearning, task: Task) -> _Forgetting:
        asked = Measured.of(task, method.output, method.draws, method.parameters)
        NoisePrediction.of(task.forward, asked.module, method.name)  # refuses what predicts no noise
        order = torch.argsort(noise_keys(task.train), stable=True)
        return cls(method, asked, replace(asked, output=loss, draws=FEW), order)

    @cached_property
    def queries(self) -> Tensor:
        """Losses of the queries with all images [m]."""
        return self.asked.means(self.asked.weights, self.asked.task.queries)

    @cached_property
    def images(self) -> Tensor:
        """Losses of the training images, likewise [n]."""
        return self.trained.means(self.trained.weights, self.trained.task.train)

    def __call__(self, rows: list[int], name: str, run: int) -> Tensor:
        """How much more the loss of each query is without the images of these rows, and the facts: [m + 2]."""
        found = self.without(rows, name, run)
        after = self.asked.means(found.weights, self.asked.task.queries)
        if not after.isfinite().all():
            raise self._overflow(name)
        return torch.cat([after - self.queries, torch.tensor([found.facts[fact] for fact in FACTS]).double()])

    def without(self, rows: list[int], name: str, run: int) -> Forgotten:
        """The model without the images of these rows."""
        gone = torch.zeros(len(self.order), dtype=torch.bool)
        gone[rows] = True
        near = self._nearest(gone)
        rate = self.method.learning_rate
        optimizer = AdamW(rate, beta1=0.9, eps_root=0.0, weight_decay=0.0)
        zeros = {key: torch.zeros_like(w) for key, w in self.asked.weights.items()}
        state = State(self.asked.weights, zeros, dict(zeros), self.asked.weights)
        for step in range(self.method.steps):
            grads, _ = grad_and_value(self._objective(gone, near, run, step))(state.weights)
            state = State(*optimizer.update(state, grads, rate), state.ema, step + 1)
        after = self.trained.means(state.weights, self.trained.task.train)
        if not after.isfinite().all():
            raise self._overflow(name)
        facts = [float(after[kept].mean() / self.images[kept].mean()) for kept in (gone, ~gone)]
        return Forgotten(state.weights, dict(zip(FACTS, facts, strict=True)))

    def _overflow(self, name: str) -> WhenceError:
        return WhenceError(
            f"the model without {name!r} has no finite loss", self.method.name, "a smaller learning_rate"
        )

    def _objective(self, gone: Tensor, near: dict[int, list[int]], run: int, step: int) -> Callable[[Weights], Tensor]:
        """The loss of one step. Its batches are those of a permutation of all images, without those that take no part, so
        that the models without one group and without another differ by their groups, and not by chance as well."""
        task, method = self.asked.task, self.method
        seed = seed_for(method.seed, f"groups unlearned, run {run}, step {step}") % 2**31
        order = self.order[torch.randperm(len(gone), generator=torch.Generator().manual_seed(seed))]
        forgotten, retained = (order[which[order]][: method.batch_size].tolist() for which in (gone, ~gone))
        kept, lost = (self.trained.read(task.train, each) for each in (retained, forgotten))
        at, beside = (self._drawn(batch, seed) for batch in (kept, lost))
        others = sorted({row for image in forgotten for row in near[image]})
        place = {row: number for number, row in enumerate(others)}
        images = self.trained.read(task.train, others).x0
        become = torch.stack([images[[place[row] for row in near[image]]] for image in forgotten])
        scales = NoisePrediction.of(task.forward, self.trained.module, method.name).scales(beside.t, lost.x0)
        x0, noise = redirected(lost.x0, become, beside, scales, method.clip)

        def value(w: Weights) -> Tensor:
            stay = measure(self.trained.module, w, task.forward, loss, kept, at).mean()
            turned = replace(lost, x0=x0), Draw(beside.t, noise)
            return stay + method.weight * measure(self.trained.module, w, task.forward, loss, *turned).mean()

        return value

    def _drawn(self, batch: Batch, seed: int) -> Draw:
        forward = self.asked.task.forward
        drawn = uniform(1, seed, shared=False)(batch.keys, batch.x0.shape[1:], forward.timesteps, batch.x0.dtype)
        return Draw(drawn.t[:, 0].to(batch.x0.device), drawn.noise[:, 0].to(batch.x0))

    def _nearest(self, gone: Tensor) -> dict[int, list[int]]:
        """The rows of the retained images that are nearest to each forgotten one, of equal ones the first by content."""
        task, at_once = self.asked.task, self.asked.task.engine.batch_size
        forgotten, retained = (self.order[which[self.order]].tolist() for which in (gone, ~gone))
        count = len(retained) if self.method.neighbours is None else min(self.method.neighbours, len(retained))
        found: dict[int, list[int]] = {}
        for start in range(0, len(forgotten), at_once):
            rows = forgotten[start : start + at_once]
            images = task.train.batch(rows).x0.flatten(1).double()
            apart = [
                torch.cdist(images, task.train.batch(retained[at : at + at_once]).x0.flatten(1).double())
                for at in range(0, len(retained), at_once)
            ]
            near = torch.cat(apart, 1).sort(dim=1, stable=True).indices[:, :count]
            found |= {
                row: [retained[place] for place in places] for row, places in zip(rows, near.tolist(), strict=True)
            }
        return found


@method(
    "Murata et al.",
    2026,
    "a short training per group",
    classifier=None,
    trial=Trial(grid=("learning_rate", (1e-5, 1e-4, 1e-3)), on_request=True),
)
def guda(
    by: str | None = None,
    output: Output = loss,
    draws: Draws = DRAWS,
    parameters: str = "trained",
    learning_rate: float = 1e-5,
    weight: float = 0.03,
    neighbours: int | None = 10,
    clip: float | None = None,
    batch_size: int = 64,
    steps: int = 200,
    runs: int = 1,
    seed: int = 0,
) -> GroupUnlearning:
    """Groups of images, like those of a creator, by unlearning: the rise of the query's loss in a model that was trained on
    without a group (GUDA, Murata et al. 2026; see `groups`). Each image carries an equal part of its group's score.

    Differs from released code: the weights of the target are a softmax of logarithms, where exp(-distances) is 0 at 3,072
    dimensions; batches and noise are keyed, and the same for all groups; `output` is the loss, elbo in the paper.

    Args:
        by: the column of the training images that names the groups; "image" for every image by itself; None for the first
            of creator, artist, author, label, class, category, license and source that they have, or their only column.
        output: the loss of queries (`outputs`).
        draws: the (timestep, noise) pairs at which it is measured.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        learning_rate: of AdamW.
        weight: of the forgotten images beside the retained.
        neighbours: retained images that a forgotten one may become; None for all.
        clip: the largest change of its noise; None for any.
        batch_size: retained images per step, and forgotten ones at most.
        steps: of training.
        runs: averaged.
        seed: of batches and noise.
    """
    return GroupUnlearning(
        by, output, draws, parameters, learning_rate, weight, neighbours, clip, batch_size, steps, runs, seed
    )
