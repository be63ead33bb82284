"""The formula that most methods are an instance of, and its executor.

    score[q, i] = sum_c eta_c * a_q * (psi_q^T H_c^-1 phi_i) * b_i * w_i

psi, phi: feature parts of query and training image (`features`); H: `precondition`; a, b: `normalize`; eta: `aggregate`;
w: one number per training image, averaged over checkpoints apart from the rest (the Q of TRAK).
"""

from __future__ import annotations

import platform
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from whence.curvature.gram import Dual, Primal, formed_once
from whence.curvature.solve import Damped, Dampings, NoPreconditioner, Preconditioner, Problem, Solution, check_damping
from whence.diffusion.draws import DrawRule, Draws
from whence.diffusion.outputs import Output
from whence.features.halves import Pair, in_halves
from whence.features.parts import Encoded, Gradient, Part, Value
from whence.features.rows import identity, rows
from whence.methods.aggregate import Aggregate, last
from whence.methods.columns import fitted
from whence.methods.errors import (
    DRAWS,
    MEASURED,
    OF_HALVES,
    SHARED,
    STEP,
    Moved,
    Stated,
    by_halves,
    column_factors,
    same,
    unmeasured,
    variances_of,
)
from whence.methods.needs import check_scored
from whence.methods.normalize import LINEAR, Normalize, none
from whence.storage.arrays import Rows
from whence.types import VERSION, Checkpoint, Images, Scores, Task, WhenceError, describe, expect, image_by_image

TASK = "whence.task_from_pretrained(...) or whence.task_from_module(...)"


class FeatureMethod(ABC):
    """A method that compares feature rows of queries and of training images at each checkpoint, at any dampings at once.

        score = sum_c eta_c combine(phi_c, psi_c) * w        phi, psi: rows of training images and of queries

    A class with code, because `grid` is the same for every method that shares its work between dampings. A method says what
    its rows are (`sides`) and what becomes of them (`combine`), and where it differs, the rest.
    """

    name: str
    precondition: Preconditioner  # read by `damping` and `with_damping` alone
    weight: Value | None = None
    scale: str = "rank"

    @abstractmethod
    def sides(self) -> tuple[Part, Part]:
        """The features of training images and of queries."""

    @abstractmethod
    def combine(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> Iterable[Tensor]:
        """The scores of one checkpoint at each damping: [m, n] each.

        Args:
            problem: where the system is set up.
            train: rows of the training images [n, k].
            query: rows of the queries [m, k], float64.
            dampings: those asked for; None for the method's own.
        """

    def of_system(self, system: Solution, count: int) -> Tensor | None:
        """The scores [m, n] of one checkpoint beside one solved system, before eta, w and `finish`; None where they are made
        of more than that.

        Args:
            system: solved for the queries.
            count: m.
        """
        return None

    def checkpoints(self, task: Task) -> list[tuple[Checkpoint, float]]:
        """The checkpoints that count, each with its eta."""
        return last(task)

    def queries(self, task: Task, checkpoint: Checkpoint, where: str) -> Tensor:
        """The rows of the queries: [m, k], float64.

        Args:
            task: the question.
            checkpoint: the weights at which they are measured.
            where: for the progress bar.
        """
        return rows(self.sides()[1], task, checkpoint, task.queries, f"{where}: queries").all().double()

    def query_halves(self, task: Task, checkpoint: Checkpoint, where: str) -> Pair:
        """The rows of the queries at each half of their draws; the arguments as of `queries`."""
        return in_halves(self.sides()[1], task, checkpoint, task.queries, f"{where}: queries").all()

    def read(self, task: Task, checkpoint: Checkpoint, where: str) -> tuple[Rows, Tensor]:
        """The rows of the training images, and of the queries, as the scores were computed from them: means of halves where
        errors are measured. The arguments as of `queries`."""
        part, images = self.sides()[0], task.to_score
        if not self.halved(task):
            return rows(part, task, checkpoint, images, f"{where}: training images"), self.queries(
                task, checkpoint, where
            )
        train = in_halves(part, task, checkpoint, images, f"{where}: training images")
        return train.at(0), self.query_halves(task, checkpoint, where).at(0)

    def halved(self, task: Task) -> bool:
        """Whether rows are computed at each half of their draws, for the errors of the scores."""
        return task.errors and self.stated(task).of in OF_HALVES

    def stated(self, task: Task) -> Stated:
        """Whether the method states standard errors, and of what (see `errors.States`)."""
        return by_halves(*self.sides(), self.precondition, task.forward)

    def finish(self, total: Tensor) -> Tensor:
        """What becomes of the sums over checkpoints."""
        return total

    def signed(self) -> bool:
        return True

    @property
    def image_by_image(self) -> bool:
        """Whether `combine` looks at the training images one by one (see `types.ImageByImage`)."""
        return False

    @property
    def damping(self) -> float | None:
        return self.precondition.damping

    def with_damping(self, damping: float | None) -> Self:
        """The method at another damping; None leaves its own."""
        if damping is None:
            return self
        other = replace(self.precondition, damping=damping)  # type: ignore[type-var]  # both are dataclasses
        return replace(self, precondition=other)  # type: ignore[type-var]

    def called(self, name: str) -> Self:
        """With this name where it has none."""
        return self if self.name else replace(self, name=name)  # type: ignore[type-var]

    def check(self, dampings: Dampings) -> None:
        """Refuse what cannot be computed, before anything is."""
        for damping in dampings:
            if damping is None:
                continue
            if self.damping is None:
                raise WhenceError(f"{self.name} has no damping, so there is no grid of dampings to try")
            check_damping(damping)

    def __call__(self, task: Task) -> Scores:
        expect(task, Task, "task", TASK)
        used = fitted(self, task)
        if task.errors and used.stated(task).of in MEASURED:
            return used._with_errors(task)
        return unmeasured(used.grid(task, (self.damping,))[0], used, task)

    def grid(self, task: Task, dampings: Dampings) -> list[Scores]:
        """Scores for each damping, from one set of features and one eigendecomposition per checkpoint. Without errors."""
        expect(task, Task, "task", TASK)
        expect(dampings, (list, tuple), "dampings", "a list, like [0.01, 0.1, 1]")
        self.check(dampings)
        check_scored(self.name, self, task)
        if (used := fitted(self, task)) != self:
            return used.grid(task, dampings)
        chosen, (part, _), images = self.checkpoints(task), self.sides(), task.to_score
        total = torch.zeros(len(dampings), len(task.queries), len(images), dtype=torch.float64)
        for (checkpoint, eta), where in self.named(chosen):
            train = rows(part, task, checkpoint, images, f"{where}: training images")
            query = self.queries(task, checkpoint, where)
            for at, values in enumerate(self.combine(Problem(task, checkpoint, part), train, query, dampings)):
                total[at] += eta * values
        if self.weight is not None:
            total *= self.weights(task, chosen)
        return [
            recorded(self.with_damping(damping), task, values, self.scale, self.signed(), chosen)
            for values, damping in zip(self.finish(total), dampings, strict=True)
        ]

    def _with_errors(self, task: Task) -> Scores:
        """The scores, and their standard errors by halves of the draws and of the columns: see `errors`. The curvature of
        K-FAC is that of all draws throughout."""
        self.check((self.damping,))
        check_scored(self.name, self, task)
        chosen = self.checkpoints(task)
        found = self.moved(task, len(task.to_score), self._one)
        if self.weight is not None:
            found.scores.mul_(self.weights(task, chosen))
        variances, of = self.variances(task, found, task.to_score)
        scores = recorded(self, task, self.finish(found.values.clone()), self.scale, self.signed(), chosen)
        return replace(scores, stderr=None if variances is None else variances.sqrt(), stderr_of=of)

    def moved(self, task: Task, count: int, score: Callable[[Problem, Rows, Tensor], Tensor]) -> Moved:
        """The scores of some training images as they are, and as halves of the draws and of the columns move them.

        Args:
            task: the question.
            count: how many these images are.
            score: (problem, rows of all training images, rows of queries [M, k]) -> their scores [M, count].
        """
        stated, part = self.stated(task).of, self.sides()[0]
        found = Moved(torch.zeros(2, 5, len(task.queries), count, dtype=torch.float64))
        for (checkpoint, eta), where in self.named(self.checkpoints(task)):
            problem, each = Problem(task, checkpoint, part), self._moved(task, checkpoint, where)
            with formed_once():
                for number, (at, train, query) in enumerate(each):
                    found.scores[0, at] += eta * score(problem, train, query).unflatten(0, (-1, len(task.queries)))
                    if stated in (DRAWS, SHARED):
                        continue
                    if not number:  # the rows as they are
                        found.foreseen = max(found.foreseen, self._foreseen(problem, train))
                    weighed = column_factors(part, train.width)
                    values = score(problem, train.times(weighed), query * weighed)
                    found.scores[1, at] += eta * values.unflatten(0, (-1, len(task.queries)))
        return found

    def variances(
        self, task: Task, found: Moved, images: Images, at: Tensor | None = None
    ) -> tuple[Tensor | None, str]:
        """Of scores, and what they are of; None where they are not known, and why.

        Args:
            task: the question.
            found: how the scores of some training images move, those that are asked about or some that stand for all.
            images: those that are asked about.
            at: their scores [m, k], before `finish`; None where they are those that were moved.
        """
        return variances_of(found, self.stated(task).of, self.signed(), same(task.queries, images), at)

    def _moved(self, task: Task, checkpoint: Checkpoint, where: str) -> list[tuple[slice, Rows, Tensor]]:
        """The rows of both sides, as they are and as halves of the draws move them, with their places in `Moved`."""
        if not self.halved(task):
            return [(slice(0, 1), *self.read(task, checkpoint, where))]
        train = in_halves(self.sides()[0], task, checkpoint, task.to_score, f"{where}: training images")
        query = self.query_halves(task, checkpoint, where)
        both = torch.cat([query.at(STEP), query.at(-STEP)])
        return [
            (slice(0, 1), train.at(0), query.at(0)),
            (slice(1, 3), train.at(STEP), both),
            (slice(3, 5), train.at(-STEP), both),
        ]

    def _one(self, problem: Problem, train: Rows, query: Tensor) -> Tensor:
        """The scores at the method's own damping."""
        (values,) = self.combine(problem, train, query, (self.damping,))
        return values

    def _foreseen(self, problem: Problem, train: Rows) -> float:
        """tr(Phi H^-1 Phi^T) / k: see `errors`."""
        if isinstance(self.precondition, NoPreconditioner):
            return 0.0
        nobody = torch.zeros(1, train.width, dtype=torch.float64)
        (system,) = self.precondition.solve(problem, train, nobody, (self.damping,))
        assert isinstance(system, Damped | Primal | Dual)
        return system.freedom() / train.width

    def named(self, chosen: Sequence[tuple[Checkpoint, float]]) -> Iterator[tuple[tuple[Checkpoint, float], str]]:
        """The checkpoints, each with what the progress bar calls it."""
        for number, pair in enumerate(chosen, 1):
            yield pair, f"{self.name} {number}/{len(chosen)}" if len(chosen) > 1 else self.name

    def weights(self, task: Task, chosen: Sequence[tuple[Checkpoint, float]]) -> Tensor:
        """w, the mean over checkpoints: [n]."""
        weight = torch.zeros(len(task.to_score), dtype=torch.float64)
        assert self.weight is not None
        for (checkpoint, _), where in self.named(chosen):
            q = rows(self.weight, task, checkpoint, task.to_score, f"{where}: weights").all().double()
            weight += q[:, 0] / len(chosen)
        return weight


@dataclass(frozen=True)
class InnerProduct(FeatureMethod):
    """A method by its parts. Calling it on a task gives scores.

    Args:
        train: features phi of the training images.
        query: features psi of the queries; None where they are measured as the training images are.
        precondition: H.
        normalize: row scales a and b.
        aggregate: the checkpoints, and eta.
        weight: w, one number per training image; None for 1.
        square: the score times itself, which says how much an image matters and no longer which way.
        scale: see `Scores`.
        name: in recipes and on the screen; a function under `registry.method` gives it its own.
    """

    train: Gradient | Encoded
    query: Gradient | Encoded | None = None
    precondition: Preconditioner = NoPreconditioner()
    normalize: Normalize = none
    aggregate: Aggregate = last
    weight: Value | None = None
    square: bool = False
    scale: str = "rank"
    name: str = ""

    def sides(self) -> tuple[Gradient | Encoded, Gradient | Encoded]:
        return self.train, self.query or self.train

    def combine(self, problem: Problem, train: Rows, query: Tensor, dampings: Dampings) -> Iterator[Tensor]:
        return (self.normalize(system) for system in self.precondition.solve(problem, train, query, dampings))

    def of_system(self, system: Solution, count: int) -> Tensor:
        return self.normalize(system)

    def checkpoints(self, task: Task) -> list[tuple[Checkpoint, float]]:
        return self.aggregate(task)

    def finish(self, total: Tensor) -> Tensor:
        total *= self.sign()
        return total.square_() if self.square else total

    def signed(self) -> bool:
        return not self.square

    @property
    def image_by_image(self) -> bool:
        return image_by_image(self.precondition)

    @property
    def linear_in_query(self) -> bool:
        """See `question.LinearInQuery`: no factor of a query's own, nor of its draws or layers, nor a square."""
        query = self.sides()[1]
        return self.normalize in LINEAR and not self.square and (isinstance(query, Encoded) or query.linear)

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> InnerProduct:
        """The same method with other measurements of the queries; the arguments are those of `question.Narrowable`."""
        query = self.sides()[1]
        if isinstance(query, Encoded):
            told = f"{self.name} compares pictures by an encoder, and measures no output of the model"
            raise WhenceError(told, "question", "a method that measures an output, such as d_trak or ek_fac")
        found = tuple(output(one) for one in query.outputs)
        measured = replace(
            query, output=found if isinstance(query.output, tuple) else found[0], draws=draws(query.draws)
        )
        return replace(self, query=measured)

    def check(self, dampings: Dampings) -> None:
        super().check(dampings)
        self.sign()

    def sign(self) -> float:
        """+1 where query and training image are measured in the same direction, -1 where one is a loss and the other a
        score to be high, so that larger always means: did more for the query."""
        train, query = self.sides()
        if isinstance(query, Encoded) or isinstance(train, Encoded):
            return 1.0
        directions = {output.better for output in (*query.outputs, *train.outputs)}
        if len(directions) == 1:
            return 1.0
        if directions == {"lower", "higher"}:
            return -1.0
        raise WhenceError(
            f"{self.name}: outputs {query.outputs[0].name!r} and {train.outputs[0].name!r} have no common sign"
        )


def self_influence(method: InnerProduct, task: Task) -> Tensor:
    """score[i, i] of every training image that is scored, for itself: [n], without the n x n matrix.

        sum_c eta_c * a_i * (phi_i^T H_c^-1 phi_i) * b_i * w_i

    Large for images that the model learned from themselves and not from others like them: mislabelled ones, outliers.
    """
    expect(method, InnerProduct, "method", "a method that compares rows, like whence.trak(), and not its name")
    expect(task, Task, "task", TASK)
    if method.query is not None and method.query != method.train:
        raise WhenceError(f"{method.name} measures queries in another way than training images; none is its own query")
    check_scored(method.name, method, task)
    method = fitted(method, task)
    images, chosen = task.to_score, method.aggregate(task)
    total = torch.zeros(len(images), dtype=torch.float64)
    weight = torch.zeros(len(images), dtype=torch.float64)
    for checkpoint, eta in chosen:
        train = rows(method.train, task, checkpoint, images, f"{method.name}: training images")
        no_query = torch.zeros(1, train.width, dtype=torch.float64)
        problem = Problem(task, checkpoint, method.train)
        (system,) = method.precondition.solve(problem, train, no_query, [method.damping])
        total += eta * method.normalize(system.diagonal()).flatten()
        if method.weight is not None:
            weight += rows(method.weight, task, checkpoint, images, "weights").all().double()[:, 0] / len(chosen)
    return total if method.weight is None else total * weight


def _say_what_says_nothing(values: Tensor, task: Task) -> None:
    """Warn of pictures for which every training image has the same score."""
    constant = (values == values[:, :1]).all(1).nonzero().flatten().tolist()
    if constant and values.shape[1] > 1:
        name, value = task.queries.ids[constant[0]], float(values[constant[0], 0])
        warnings.warn(
            f"all training images have the same score, {value:g}, for {len(constant)} of {len(values)} pictures, such as "
            f"{name!r}: these scores say nothing; its features, or a weight of every image, are 0",
            stacklevel=3,
        )


def recorded(
    method: object,
    task: Task,
    values: Tensor,
    scale: str = "rank",
    signed: bool = True,
    chosen: Sequence[tuple[Checkpoint, float]] = (),
) -> Scores:
    """Scores with the recipe that replays them.

    Args:
        method: what computed them.
        task: the question.
        values: the scores [m, n].
        scale: see `Scores`.
        signed: whether negative scores mean opponents.
        chosen: the checkpoints that were used, and their eta.
    """
    recipe: Mapping[str, object] = {
        "whence": VERSION,
        "method": describe(method),
        "forward": describe(task.forward),
        "checkpoints": [checkpoint.digest for checkpoint, _ in chosen],
        "eta": [eta for _, eta in chosen],
        "train": identity(task.train),
        **({} if task.scored is None else {"scored": identity(task.scored)}),
        "queries": identity(task.queries),
        "dtype": str(task.engine.dtype),
        **({} if task.engine.feature_dtype is None else {"feature_dtype": str(task.engine.feature_dtype)}),
        **({"errors": True} if task.errors else {}),
        "torch": str(torch.__version__),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
    _say_what_says_nothing(values, task)
    images = task.to_score
    shown = (task.queries.pictures, images.pictures)
    return Scores(values, task.queries.ids, images.ids, recipe, scale, signed, images.meta, shown)
