"""Attribution by unlearning: take the query out of the model, and see whose training loss rises.

    score[q, i] = mean_s l_i(theta_q; s) - l_i(theta; s)        theta_q: the model that has forgotten query q

at the same draws s before and after; the larger one of image and mirror image where flips were trained. What an image shares
with the query is forgotten with it, so that its loss rises. How far a query is forgotten is chosen (see `forgetting`): only
the order of the scores within a query counts. The recipe of the scores says how far that was, `unlearned`: what the way of
forgetting says, and `others`, the mean loss of the training images as a multiple of what it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from whence.curvature.factors import Factors
from whence.diffusion.draws import DrawRule, Draws, stratified
from whence.diffusion.outputs import Output, loss
from whence.features.rows import identity
from whence.methods.curvature import FACTORS
from whence.methods.errors import Stated, unmeasured
from whence.methods.fisher import DiagonalFisher, EKFACFisher, Measured
from whence.methods.forgetting import BoundedAscent, Forgetting, Forgotten, NaturalAscent
from whence.methods.inner_product import recorded
from whence.methods.needs import check_scored
from whence.methods.registry import LABELS, PRODUCTS, Trial, method
from whence.storage.arrays import Store
from whence.storage.files import progress
from whence.types import Scores, Task, WhenceError, describe

DRAWS = stratified(16)
"""The same for all images: what a draw does to all losses alike then leaves their order as it is."""


@dataclass(frozen=True)
class Unlearning:
    """The rise of each training image's loss when the query is forgotten; see the head of this module.

    Args:
        name: in recipes and on the screen.
        forget: how the query is taken out.
        output: the loss of queries and training images.
        draws: at which both are measured.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        query: the loss of queries; None for `output`.
        query_draws: at which they are forgotten; None for `draws`.
    """

    name: str
    forget: Forgetting
    output: Output = loss
    draws: Draws = DRAWS
    parameters: str = "trained"
    query: Output | None = None
    query_draws: Draws | None = None
    image_by_image = True  # no setting: it has no annotation

    def narrowed(self, output: Callable[[Output], Output], draws: Callable[[DrawRule], Draws]) -> Unlearning:
        """The arguments are those of `question.Narrowable`: another part of the query is forgotten."""
        own, own_draws = self.query or self.output, self.query_draws or self.draws
        return replace(self, query=output(own), query_draws=draws(own_draws))

    def stated(self, task: Task) -> Stated:
        return Stated(because="each query is forgotten once, at all of the draws together")

    def networks(self, task: Task) -> tuple[Measured, Measured]:
        """How queries and training images are measured."""
        trained = Measured.of(task, self.output, self.draws, self.parameters)
        return replace(trained, output=self.query or self.output, draws=self.query_draws or self.draws), trained

    def forgotten(self, task: Task, query: int) -> Forgotten:
        """The model without one query, by its number.

        Args:
            task: the question.
            query: its row.
        """
        asked, trained = self.networks(task)
        forget = self.forget.begin(asked, trained, self.parameters, 0)
        return forget(task.queries.ids[query], asked.read(task.queries, [query]))

    def __call__(self, task: Task) -> Scores:
        check_scored(self.name, self, task)
        images, facts = task.to_score, (*self.forget.facts, "others")
        mirrors = (False, True) if _flipped(task) else (False,)
        key = {"part": "unlearning", "method": self, "checkpoint": task.trajectory[-1].digest, "forward": task.forward}
        key |= {"train": identity(task.train), "images": identity(images), "queries": identity(task.queries)}
        key |= {"mirrors": len(mirrors), "study": None if task.study is None else describe(task.study.recipe)}
        width, runs = len(images) + len(facts), self.forget.runs
        array = Store(task.root).array(key, (len(task.queries) * runs, width), torch.float64, 1)
        missing = array.missing()
        if missing:
            asked, trained = self.networks(task)
            before = [trained.table(trained.weights, images, mirrored) for mirrored in mirrors]
            forget = [self.forget.begin(asked, trained, self.parameters, run) for run in range(runs)]
        for rows in progress(missing, self.name):
            query, run = divmod(rows.start, runs)
            found = forget[run](task.queries.ids[query], asked.read(task.queries, [query]))
            after = [trained.table(found.weights, images, mirrored) for mirrored in mirrors]
            rise = torch.stack([self.forget.compare(*pair) for pair in zip(before, after, strict=True)]).amax(0)
            if not torch.isfinite(rise).all():
                raise WhenceError(
                    f"without {task.queries.ids[query]!r} the loss of "
                    f"{images.ids[int((~rise.isfinite()).nonzero()[0])]!r} is not finite",
                    self.name,
                    "a smaller rise, or another curvature or damping",
                )
            told = {**found.facts, "others": float(after[0].mean() / before[0].mean())}
            array.write(rows, torch.cat([rise, torch.tensor([told[name] for name in facts]).double()])[None])
        table = array.all().unflatten(0, (len(task.queries), runs)).mean(1)
        scores = recorded(self, task, table[:, : len(images)].clone(), chosen=[(task.trajectory[-1], 1.0)])
        far = {name: table[:, len(images) + place].tolist() for place, name in enumerate(facts)}
        self._say_of_others(far["others"])
        return unmeasured(replace(scores, recipe={**scores.recipe, "unlearned": far}), self, task)

    def _say_of_others(self, rises: list[float]) -> None:
        """Warn where more than the query was forgotten, for a method that means to keep the rest."""
        bound = self.forget.bound
        more = [] if bound is None else [rise for rise in rises if rise > 1 + bound]
        if more:
            warnings.warn(
                f"{self.name}: for {len(more)} of {len(rises)} pictures more was forgotten than the picture: the mean loss "
                f"of the training images is up to {max(more):.3g} times what it was; a smaller learning_rate or weight, or "
                "a larger batch_size, may keep more",
                stacklevel=3,
            )


def _flipped(task: Task) -> bool:
    """Whether the training saw mirror images."""
    return task.study is not None and bool(task.study.recipe.data.flip)


@method("Wang et al.", 2024, PRODUCTS, classifier=LABELS, trial=Trial(own_draws=True))
def abu(
    output: Output = loss,
    draws: Draws = DRAWS,
    damping: float = 0.1,
    parameters: str = "trained",
    rise: float = 0.1,
    steps: int = 1,
) -> Unlearning:
    """Attribution by unlearning: a step of gradient ascent on the query, preconditioned by the diagonal Fisher matrix; the
    rise of each training image's loss (Wang et al. 2024; see `unlearning`).

    Differs from released code: the step is as long as raises the query's loss by a given share; noise keyed by content; F
    damped, where released code may divide by nearly 0; F of the same draws.

    Args:
        output: the loss (`outputs`).
        draws: the (timestep, noise) pairs at which it is measured.
        damping: lambda in units of the mean of F over each parameter tensor.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, like
            cross-attention-kv as in the paper, or a regular expression.
        rise: of the query's loss, as a share of it.
        steps: of ascent.
    """
    return Unlearning("abu", NaturalAscent(DiagonalFisher(damping), rise, steps), output, draws, parameters)


@method("Wang et al.", 2025, PRODUCTS, classifier=LABELS, needs=("layers",), trial=Trial(own_draws=True))
def abu_ek_fac(
    output: Output = loss,
    draws: Draws = DRAWS,
    damping: float = 0.1,
    parameters: str = "trained",
    factors: Factors = FACTORS,
    rise: float = 0.1,
    steps: int = 1,
) -> Unlearning:
    """As `abu`, preconditioned by EK-FAC (Wang et al. 2025, 2511.10721, who call it AbU+).

    Args:
        output: the loss (`outputs`).
        draws: the (timestep, noise) pairs at which it is measured.
        damping: lambda in units of the mean eigenvalue of each layer.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        factors: how the curvature is estimated.
        rise: of the query's loss, as a share of it.
        steps: of ascent.
    """
    return Unlearning(
        "abu_ek_fac", NaturalAscent(EKFACFisher(damping, factors), rise, steps), output, draws, parameters
    )


@method("Serra et al.", 2026, "a short training per query", classifier=None, trial=Trial(own_draws=True))
def mucs(
    draws: Draws = DRAWS,
    parameters: str = "trained",
    learning_rate: float | None = None,
    weight: float = 0.2,
    share: float = 0.95,
    batch_size: int = 64,
    steps: int = 500,
    runs: int = 2,
    seed: int = 0,
) -> Unlearning:
    """Unlearning by bounded ascent with a retain term; the relative rise of each training image's loss (Serra et al. 2026;
    see `unlearning`).

    Differs from released code: AdamW with keyed batches and noise; l_null is the loss of a network that predicts 0; all
    trained weights by default, where the paper changes MLP and conditioning weights of a DiT (`parameters`).

    Args:
        draws: the (timestep, noise) pairs at which losses are compared.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        learning_rate: None for a tenth of that of the training, or 1e-4 where this is not known.
        weight: of the query beside the training images.
        share: of l_null at which the query is forgotten.
        batch_size: training images per step.
        steps: at most.
        runs: averaged.
        seed: of batches and noise.
    """
    how = BoundedAscent(learning_rate, weight, share, batch_size, steps, runs, seed)
    return Unlearning("mucs", how, loss, draws, parameters)
