"""Similarity of gradients, TracIn and GAS, of all parameters, of each layer or of the last one."""

from __future__ import annotations

from dataclasses import replace

from whence.diffusion.draws import Draws, uniform
from whence.diffusion.outputs import Output, loss, probes
from whence.features.gradients import LAST
from whence.features.parts import Gradient, part
from whence.features.projections import Identity, Layerwise, TwoSided
from whence.methods import aggregate, normalize
from whence.methods.inner_product import InnerProduct
from whence.methods.registry import EVERY_CHECKPOINT, LABELS, ONCE, ONE_PASS, PROBES, method


@method("Charpiat et al.", 2019, ONE_PASS, classifier=LABELS)
def gradient_dot(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """g_q . g_i: one step of gradient descent on image i changes the query's loss by -eta times this.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(output, draws, dim, parameters))


@method("Charpiat et al.", 2019, ONE_PASS, classifier=LABELS)
def gradient_cosine(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """cos(g_q, g_i).

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(output, draws, dim, parameters), normalize=normalize.cosine)


@method("Charpiat et al.", 2019, PROBES, classifier=ONCE)
def output_dot(
    count: int = 4, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """trace(J_q J_i^T) / D, J the Jacobian of the network's output, by shared random probes (Charpiat et al. 2019).

    Differs from released code: that works for a handful of outputs exactly; images have thousands, so probes estimate it.

    Args:
        count: random probes, the same for all images; each costs a gradient.
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(probes(count), draws, dim, parameters))


@method("Charpiat et al.", 2019, PROBES, classifier=ONCE)
def output_cosine(
    count: int = 4, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """trace(J_q J_i^T) / sqrt(trace(J_q J_q^T) trace(J_i J_i^T)) (Charpiat et al. 2019, normalised).

    Args:
        count: random probes, the same for all images; each costs a gradient.
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(probes(count), draws, dim, parameters), normalize=normalize.cosine)


@method("Pruthi et al.", 2020, EVERY_CHECKPOINT, classifier=LABELS, needs=("checkpoints",))
def tracin(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """sum_c eta_c g_q(theta_c) . g_i(theta_c) over training checkpoints (Pruthi et al. 2020, TracInCP).

    Differs from released code: a checkpoint without a learning rate is an error, not 1.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(part(output, draws, dim, parameters), aggregate=aggregate.rate_weighted)


@method("Pruthi et al.", 2020, EVERY_CHECKPOINT, classifier=LABELS, needs=("checkpoints",))
def tracin_projected(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 256, parameters: str = "trained"
) -> InnerProduct:
    """sum_c eta_c sum_l <P1_l^T G_q,l P2_l, P1_l^T G_i,l P2_l> over checkpoints c and parameters l, G_l [d_o, d_i] the
    gradient as a matrix (Pruthi et al. 2020): TracIn with a random projection of its own for each parameter, from both
    sides, the same at every checkpoint. See `projections.TwoSided`.

    Differs from released code: every parameter instead of one chosen layer; eta_c stands outside instead of sqrt(eta_c) in
    the rows; a bias is a matrix of one column, and a side not longer than sqrt(dim) is left as it is.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns per parameter; exact gradients with None, or no more parameters in all.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    features = Gradient(output, draws, Identity() if dim is None else TwoSided(dim), parameters)
    return InnerProduct(features, aggregate=aggregate.rate_weighted)


@method("Hammoudeh & Lowd", 2022, EVERY_CHECKPOINT, classifier=LABELS, needs=("checkpoints",))
def gas(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """sum_c eta_c cos(g_q(theta_c), g_i(theta_c)) over training checkpoints (Hammoudeh & Lowd 2022).

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    return InnerProduct(
        part(output, draws, dim, parameters), normalize=normalize.cosine, aggregate=aggregate.rate_weighted
    )


@method("Pruthi et al.", 2020, EVERY_CHECKPOINT, classifier=LABELS, needs=("checkpoints",))
def tracin_last_layer(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = None, parameters: str = LAST
) -> InnerProduct:
    """sum_c eta_c (x_q . x_i + 1)(delta_q . delta_i) over training checkpoints: TracIn of the last layer alone
    (Pruthi et al. 2020, TracInCP-Fast), x what the layer reads (+1 for its bias), delta the gradient by what it gives.

    The last layer is the Linear or Conv2d registered last; nothing below it is differentiated. For several draws, and for a
    convolution, whose weights act at every pixel, it is the sum of these products over pairs of draws and pixels.
    Differs from released code: the bias counts; a checkpoint without a learning rate is an error, not 1.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: the last layer; any other choice makes this `tracin`.
    """
    features = part(output, draws, dim, parameters)
    return InnerProduct(features, aggregate=aggregate.rate_weighted)


@method("Hammoudeh & Lowd", 2022, EVERY_CHECKPOINT, classifier=LABELS, needs=("checkpoints",))
def gas_layerwise(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "trained"
) -> InnerProduct:
    """sum_c eta_c sum_l cos(g_q^l(theta_c), g_i^l(theta_c)), l the layers (Hammoudeh & Lowd 2022, GAS-L): every layer counts
    alike, however large its gradient. weight and bias are one layer.

    Released code names it but never computes it; this is the formula of the paper.

    Args:
        output: what is measured on each image and differentiated (`outputs`).
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection (`projections.SJLT`); exact gradients with None, or no more parameters.
        parameters: "trained" (those that ask for gradients), another group of `gradients.PARAMETERS`, or a regular
            expression.
    """
    features = part(output, draws, dim, parameters)
    features = replace(features, projection=Layerwise(features.projection))
    return InnerProduct(features, aggregate=aggregate.rate_weighted)
