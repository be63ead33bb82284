"""TRAK and D-TRAK."""

from __future__ import annotations

from whence.curvature.gram import Gram
from whence.diffusion.draws import Draws, once, uniform
from whence.diffusion.outputs import Output, doubt, loss, margin, squared_norm
from whence.features.parts import Value, part
from whence.methods import aggregate
from whence.methods.inner_product import InnerProduct
from whence.methods.registry import MARGIN, ONE_PASS, Trial, method


@method("Park et al.", 2023, ONE_PASS, classifier=MARGIN, trial=Trial(ensemble=True, sharpened=True))
def trak(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    ensemble: bool = False,
) -> InnerProduct:
    """psi_q^T (Phi^T Phi + lambda I)^-1 phi_i * Q_i (Park et al. 2023). Q_i = 1 - p_i for margins, 1 for diffusion losses.

    In an ensemble, kernel and Q are averaged apart, as the paper has it. Differs from released code: float64 instead of
    float16 Gram, no division by mean|C^-1|, the same projection for every checkpoint.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        ensemble: mean over the models of `Task.ensemble` and the final one, instead of the final one alone.
    """
    return InnerProduct(
        part(output, draws, dim, parameters),
        precondition=Gram(damping),
        aggregate=aggregate.mean if ensemble else aggregate.last,
        weight=Value(doubt, once()) if output is margin else None,
    )


@method("Zheng et al.", 2024, ONE_PASS, classifier=None, trial=Trial(ensemble=True, sharpened=True))
def d_trak(
    output: Output = squared_norm,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
    ensemble: bool = False,
) -> InnerProduct:
    """TRAK's kernel with an output that is not the loss, the squared norm of the prediction, on both sides (Zheng et al.
    2024). Published: 10 or 100 steps, dim 32768.

    Differs from released code: noise is keyed by image, not by batch position; the system is solved in float64, which
    keeps small dampings usable; an unknown output is an error instead of the loss.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
        ensemble: mean over the models of `Task.ensemble` and the final one, instead of the final one alone.
    """
    return InnerProduct(
        part(output, draws, dim, parameters),
        precondition=Gram(damping),
        aggregate=aggregate.mean if ensemble else aggregate.last,
    )
