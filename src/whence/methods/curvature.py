"""Influence functions with curvature that is approximated or solved in steps.

K-FAC has factors for Linear and Conv2d layers only; other parameters (norms, embeddings) take no part in k_fac, ek_fac,
ek_fac_refined and source, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from whence.curvature.datainf import DataInf
from whence.curvature.factors import Factors
from whence.curvature.kfac import EKFAC, KFAC
from whence.curvature.lissa import LiSSA
from whence.curvature.pcg import ConjugateGradients
from whence.curvature.unrolling import Segment, backwards, curvature, divide, rate_sums
from whence.diffusion.draws import Draws, stratified
from whence.diffusion.outputs import Output, loss
from whence.features.halves import in_halves
from whence.features.parts import Gradient, part
from whence.features.rows import rows
from whence.methods.errors import DRAWS, SHARED, Stated, by_halves, of_draws, of_shared_draws, same, unmeasured
from whence.methods.inner_product import InnerProduct, recorded
from whence.methods.registry import LABELS, PRODUCTS, SEGMENTS, WITH_CURVATURE, Trial, method
from whence.storage.arrays import Rows
from whence.types import Checkpoint, Images, Scores, Task, WhenceError

FACTORS = Factors(skip_others=True)


@method("Martens & Grosse", 2015, WITH_CURVATURE, classifier=LABELS, needs=("layers",))
def k_fac(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "trained",
    factors: Factors = FACTORS,
) -> InnerProduct:
    """g_q^T (n F + n lambda I)^-1 g_i with F = B (x) A per layer: the predicted rise of the query's loss when image i is
    removed (Martens & Grosse 2015).

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean eigenvalue of each layer.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        factors: how A and B are estimated.
    """
    return InnerProduct(part(output, draws, None, parameters), precondition=KFAC(damping, factors=factors))


@method("Grosse et al.", 2023, WITH_CURVATURE, classifier=LABELS, needs=("layers",), trial=Trial(ensemble=True))
def ek_fac(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "trained",
    factors: Factors = FACTORS,
) -> InnerProduct:
    """As `k_fac` with eigenvalues measured in the basis of the factors (Grosse et al. 2023; for diffusion models Mlodozeniec
    et al. 2025: weight and bias apart, lambda = 1e-8 absolute, 250 draws).

    Differs from released code: noise keyed by image; bias and weight in one block; float64 sums and dot products; damping
    relative to each layer; both gradients in float, not 8 bits.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean eigenvalue of each layer.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        factors: how A and B are estimated.
    """
    return InnerProduct(part(output, draws, None, parameters), precondition=EKFAC(damping, factors=factors))


@method("Wang et al.", 2025, PRODUCTS, classifier=LABELS, needs=("layers",), trial=Trial(on_request=True))
def ek_fac_refined(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "trained",
    factors: Factors = FACTORS,
    steps: int = 10,
) -> InnerProduct:
    """As `ek_fac`, then `steps` of conjugate gradients on the Gauss-Newton system with EK-FAC as preconditioner (the idea of
    Wang et al. 2025, ASTRA).

    Differs from the paper: deterministic products over all training images and draws, not stochastic ones with a step size.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean eigenvalue of each layer.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        factors: how A and B are estimated.
        steps: of conjugate gradients.
    """
    return InnerProduct(
        part(output, draws, None, parameters),
        precondition=EKFAC(damping, factors=factors, refine=steps),
        scale="removal",
    )


@method("Koh & Liang", 2017, PRODUCTS, classifier=LABELS, trial=Trial(on_request=True))
def influence_cg(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "trained",
    tolerance: float = 1e-6,
    steps: int = 500,
) -> InnerProduct:
    """`exact_influence` without its matrix: the Gauss-Newton system of all chosen parameters by conjugate gradients, to a
    relative residual (Koh & Liang 2017, Gauss-Newton for the Hessian; Martens 2010 for the products).

    Differs from released code: one system for all training images, not one per batch; not converged is an error.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean non-zero eigenvalue of F, estimated from its trace.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        tolerance: the relative residual at which a query is solved.
        steps: as many at most.
    """
    return InnerProduct(
        part(output, draws, None, parameters),
        precondition=ConjugateGradients(damping, tolerance=tolerance, steps=steps),
        scale="removal",
    )


@method("Koh & Liang", 2017, PRODUCTS, classifier=LABELS, trial=Trial(on_request=True))
def influence_lissa(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "trained",
    depth: int = 200,
    scale: float | None = None,
) -> InnerProduct:
    """`influence_cg` by `depth` steps of a Neumann series, h <- v + (1 - lambda/scale) h - F h / scale (LiSSA: Agarwal et
    al. 2017, Koh & Liang 2017).

    Differs from released code: the Gauss-Newton matrix; products over all training images instead of single ones, so that no
    repeats are averaged; a scale that diverges is an error.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean non-zero eigenvalue of F, estimated from its trace.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        depth: steps of the series.
        scale: above half of the largest curvature; None for the largest, by a power iteration.
    """
    return InnerProduct(
        part(output, draws, None, parameters),
        precondition=LiSSA(damping, depth=depth, scale=scale),
        scale="removal",
    )


@method("Kwon et al.", 2024, "three passes over stored gradients", classifier=LABELS)
def datainf(
    output: Output = loss, draws: Draws = stratified(64), damping: float = 0.1, parameters: str = "trained"
) -> InnerProduct:
    """Influence with the mean of (g_i g_i^T + lambda)^-1 of each layer for the inverse of the mean; made for LoRA (Kwon et
    al. 2024).

    Differs from released code: a gradient of each image, not of each batch; lambda as in the paper.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean squared entry of each layer's gradients.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(output, draws, None, parameters), precondition=DataInf(damping))


@dataclass(frozen=True)
class Source:
    """-d f_q / d w_i of a training run in a few segments of constant curvature: see `curvature.unrolling`.

    Args:
        name: in recipes and on the screen.
        train: gradients; the queries' are those of the final weights.
        segments: into which the checkpoints are divided.
        factor: of all learning rates.
        factors: how the curvature of each checkpoint is estimated.
    """

    name: str
    train: Gradient
    segments: int = 3
    factor: float = 1.0
    factors: Factors = FACTORS
    image_by_image = True  # no setting: it has no annotation

    @property
    def linear_in_query(self) -> bool:
        return self.train.linear

    def __post_init__(self) -> None:
        if self.segments < 1 or not 0 < self.factor < float("inf"):
            raise WhenceError(
                f"{self.name}: segments={self.segments}, factor={self.factor}; accepted: 1 segment or more, and a factor "
                "above 0"
            )

    def __call__(self, task: Task) -> Scores:
        parts = divide(task, self.segments)
        sums = [self.factor * total for total in rate_sums(task, parts)]
        segments = [
            Segment(points, curvature(task, self.train, points, self.factors), total)
            for points, total in zip(parts, sums, strict=True)
        ]
        used = [(point, each.rates / len(each.checkpoints)) for each in segments for point in each.checkpoints]
        asked = (task, task.trajectory[-1], task.queries, f"{self.name}: queries")
        stated = self.stated(task).of
        if not task.errors or stated not in (DRAWS, SHARED):
            psi = rows(self.train, *asked).all().double()
            values = self._products(task, segments, psi, lambda *given: rows(self.train, *given))
            return unmeasured(recorded(self, task, values, chosen=used), self, task)
        halves = in_halves(self.train, *asked).all()
        psi = torch.cat([halves.at(0), halves.moved()])
        # Linear in both sides: R, C and I of `errors` are products with Delta.
        still = self._products(task, segments, psi, lambda *given: in_halves(self.train, *given).at(0))
        moved = self._products(task, segments, psi, lambda *given: in_halves(self.train, *given).moved())
        (values, by_query), (by_image, by_both) = still.chunk(2), moved.chunk(2)
        if stated == SHARED:
            variances = of_shared_draws(by_query + by_image, values)
        else:
            squares = torch.stack([by_query, by_image, by_both]).square()
            variances = of_draws(squares, values) * (1 + same(task.queries, task.to_score))
        scores = recorded(self, task, values.clone(), chosen=used)
        return replace(scores, stderr=variances.sqrt(), stderr_of=stated)

    def stated(self, task: Task) -> Stated:
        return by_halves(self.train, self.train, self.factors, task.forward)

    def _products(
        self,
        task: Task,
        segments: Sequence[Segment],
        psi: Tensor,
        read: Callable[[Task, Checkpoint, Images, str], Rows],
    ) -> Tensor:
        """(1/n) sum_l x_l^T g_l(i) for rows of queries: [len(psi), n].

        Args:
            task: the question.
            segments: l.
            psi: rows that are carried backwards.
            read: -> the rows g of the training images at a checkpoint.
        """
        images = task.to_score
        values = torch.zeros(len(psi), len(images), dtype=torch.float64)
        for segment, x in zip(segments, backwards(psi.to(task.engine.device), segments), strict=True):
            for point in segment.checkpoints:
                share = 1 / len(segment.checkpoints)
                for columns, g in read(task, point, images, f"{self.name} {point.name}: training images"):
                    values[:, columns] += share / len(task.train) * (x.cpu() @ g.double().T)
        return values


@method(
    "Bae et al.",
    2024,
    SEGMENTS,
    classifier=LABELS,
    needs=("checkpoints", "layers"),
    # Learning rates are no step lengths under AdamW; and the curvature of every checkpoint takes its time.
    trial=Trial(grid=("factor", (1.0, 10.0, 100.0, 1000.0, 10_000.0)), fewer_draws=5),
)
def source(
    output: Output = loss,
    draws: Draws = stratified(64),
    parameters: str = "trained",
    segments: int = 3,
    factor: float = 1.0,
    factors: Factors = FACTORS,
) -> Source:
    """(1/n) sum_l x_l^T g_l(i) over segments l of the training run, x_l from the query's gradient carried backwards through
    gradient descent with the EK-FAC curvature of each segment (SOURCE: Bae et al. 2024).

    Differs from released code: sums of rates exact where the training is known; Linear and Conv2d bias in the block of its
    weight.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        segments: the checkpoints are divided into as many, 2 to each as published.
        factor: of the learning rates: 1/(1 - beta) with momentum beta. AdamW divides gradients by their spread, so that
            its rates are no step lengths and want a factor that is tuned, about 1/mean(sqrt v).
        factors: how A and B are estimated.
    """
    return Source("source", part(output, draws, None, parameters), segments, factor, factors)
