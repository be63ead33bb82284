"""Influence functions with the projected empirical Fisher or the exact Gauss-Newton matrix, and their normalised forms."""

from __future__ import annotations

from whence.curvature.exact import GaussNewton
from whence.curvature.gram import Gram
from whence.diffusion.draws import Draws, uniform
from whence.diffusion.outputs import Output, loss
from whence.features.parts import part
from whence.methods import normalize
from whence.methods.inner_product import InnerProduct
from whence.methods.registry import LABELS, ONE_PASS, method


@method("Koh & Liang", 2017, ONE_PASS, classifier=LABELS)
def influence(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
) -> InnerProduct:
    """g_q^T (sum_i g_i g_i^T + lambda I)^-1 g_i: influence functions with the projected empirical Fisher (Koh & Liang 2017).

    With a loss as output and one checkpoint this is also TRAK's kernel; they differ in Q and in ensembles.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(output, draws, dim, parameters), precondition=Gram(damping))


@method("Koh & Liang", 2017, "d x d matrix: small networks", classifier=LABELS)
def exact_influence(
    output: Output = loss, draws: Draws = uniform(10), damping: float = 0.01, parameters: str = "trained"
) -> InnerProduct:
    """g_q^T (sum_i J_i^T f'' J_i + lambda I)^-1 g_i with the exact Gauss-Newton matrix, for small networks: the predicted
    rise of the query's loss when image i is removed (Koh & Liang 2017, Gauss-Newton for the Hessian).

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        damping: lambda in units of the mean non-zero eigenvalue of the matrix.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    features = part(output, draws, None, parameters)
    return InnerProduct(features, precondition=GaussNewton(damping), scale="removal")


@method("Barshan et al.", 2020, ONE_PASS, classifier=LABELS)
def relatif_theta(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
) -> InnerProduct:
    """Influence divided by ||H^-1 g_i||: the most influence per change of the parameters (Barshan et al. 2020).

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    features = part(output, draws, dim, parameters)
    return InnerProduct(features, precondition=Gram(damping), normalize=normalize.relatif_theta)


@method("Barshan et al.", 2020, ONE_PASS, classifier=LABELS)
def relatif_loss(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
) -> InnerProduct:
    """Influence divided by (g_i^T H^-1 g_i)^1/2: the most influence per change of the loss (Barshan et al. 2020).

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    features = part(output, draws, dim, parameters)
    return InnerProduct(features, precondition=Gram(damping), normalize=normalize.relatif_loss)


@method("Hammoudeh & Lowd", 2022, ONE_PASS, classifier=LABELS)
def renormalized_influence(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "trained",
) -> InnerProduct:
    """Influence divided by ||g_i||, training side only (Hammoudeh & Lowd 2022); the norm is that of the projected row.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        damping: lambda in units of the mean non-zero eigenvalue of Phi^T Phi.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    features = part(output, draws, dim, parameters)
    return InnerProduct(features, precondition=Gram(damping), normalize=normalize.renormalized)
