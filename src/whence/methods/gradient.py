"""Gradient methods for any model: similarity of gradients, TracIn, influence and its normalised forms, TRAK.

Common arguments. output: what is measured (`outputs`); draws: the (timestep, noise) pairs averaged over; dim: columns of a
sparse projection (`projections.SJLT`), None for exact gradients; damping: lambda in units of the mean eigenvalue of the
Gram matrix; parameters: a named group or a regular expression.
"""

from __future__ import annotations

from whence import aggregate, normalize
from whence.draws import Draws, once, uniform
from whence.features import Gradient, Value
from whence.inner_product import InnerProduct
from whence.outputs import Output, doubt, loss, margin, probes
from whence.precondition.exact import GaussNewton
from whence.precondition.gram import Gram
from whence.projections import SJLT, Identity, TwoSided


def part(
    output: Output | tuple[Output, ...], draws: Draws, dim: int | None, parameters: str, seed: int = 0
) -> Gradient:
    """The gradient feature of a method; train and query share its noise seed and its projection."""
    return Gradient(output, draws, Identity() if dim is None else SJLT(dim, seed), parameters)


def gradient_dot(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """g_q . g_i: one step of gradient descent on image i changes the query's loss by -eta times this."""
    return InnerProduct("gradient_dot", part(output, draws, dim, parameters))


def gradient_cosine(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """cos(g_q, g_i)."""
    return InnerProduct("gradient_cosine", part(output, draws, dim, parameters), normalize=normalize.cosine)


def output_dot(
    count: int = 4, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """trace(J_q J_i^T) / D, J the Jacobian of the network's output, by `count` shared probes (Charpiat et al. 2019).

    Differs from released code: that works for a handful of outputs exactly; images have thousands, so probes estimate it.
    """
    return InnerProduct("output_dot", part(probes(count), draws, dim, parameters))


def output_cosine(
    count: int = 4, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """trace(J_q J_i^T) / sqrt(trace(J_q J_q^T) trace(J_i J_i^T)) (Charpiat et al. 2019, normalised)."""
    return InnerProduct("output_cosine", part(probes(count), draws, dim, parameters), normalize=normalize.cosine)


def tracin(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """sum_c eta_c g_q(theta_c) . g_i(theta_c) over training checkpoints (Pruthi et al. 2020, TracInCP).

    Differs from released code: a checkpoint without a learning rate is an error, not 1.
    """
    return InnerProduct("tracin", part(output, draws, dim, parameters), aggregate=aggregate.rate_weighted)


def tracin_projected(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 256, parameters: str = "all"
) -> InnerProduct:
    """sum_c eta_c sum_l <P1_l^T G_q,l P2_l, P1_l^T G_i,l P2_l> over checkpoints c and parameters l, G_l [d_o, d_i] the
    gradient as a matrix (Pruthi et al. 2020): TracIn with a random projection of its own for each parameter, from both
    sides, the same at every checkpoint; dim: columns per parameter, None for all. See `projections.TwoSided`.

    Differs from released code: every parameter instead of one chosen layer; eta_c stands outside instead of sqrt(eta_c) in
    the rows; a bias is a matrix of one column, and a side not longer than sqrt(dim) is left as it is.
    """
    features = Gradient(output, draws, Identity() if dim is None else TwoSided(dim), parameters)
    return InnerProduct("tracin_projected", features, aggregate=aggregate.rate_weighted)


def gas(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """sum_c eta_c cos(g_q(theta_c), g_i(theta_c)) over training checkpoints (Hammoudeh & Lowd 2022)."""
    return InnerProduct(
        "gas", part(output, draws, dim, parameters), normalize=normalize.cosine, aggregate=aggregate.rate_weighted
    )


def influence(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
) -> InnerProduct:
    """g_q^T (sum_i g_i g_i^T + lambda I)^-1 g_i: influence functions with the projected empirical Fisher (Koh & Liang
    2017). With a loss as output and one checkpoint this is also TRAK's kernel; they differ in Q and in ensembles."""
    return InnerProduct("influence", part(output, draws, dim, parameters), precondition=Gram(damping))


def exact_influence(
    output: Output = loss, draws: Draws = uniform(10), damping: float = 0.01, parameters: str = "all"
) -> InnerProduct:
    """g_q^T (sum_i J_i^T f'' J_i + lambda I)^-1 g_i with the exact Gauss-Newton matrix, for small networks: the predicted
    rise of the query's loss when image i is removed (Koh & Liang 2017, Gauss-Newton for the Hessian)."""
    features = part(output, draws, None, parameters)
    return InnerProduct("exact_influence", features, precondition=GaussNewton(damping), scale="removal")


def relatif_theta(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
) -> InnerProduct:
    """Influence divided by ||H^-1 g_i||: the most influence per change of the parameters (Barshan et al. 2020)."""
    features = part(output, draws, dim, parameters)
    return InnerProduct("relatif_theta", features, precondition=Gram(damping), normalize=normalize.relatif_theta)


def relatif_loss(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
) -> InnerProduct:
    """Influence divided by (g_i^T H^-1 g_i)^1/2: the most influence per change of the loss (Barshan et al. 2020)."""
    features = part(output, draws, dim, parameters)
    return InnerProduct("relatif_loss", features, precondition=Gram(damping), normalize=normalize.relatif_loss)


def renormalized_influence(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
) -> InnerProduct:
    """Influence divided by ||g_i||, training side only (Hammoudeh & Lowd 2022); the norm is that of the projected row."""
    features = part(output, draws, dim, parameters)
    return InnerProduct(
        "renormalized_influence", features, precondition=Gram(damping), normalize=normalize.renormalized
    )


def trak(
    output: Output = loss,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
    ensemble: bool = False,
) -> InnerProduct:
    """psi_q^T (Phi^T Phi + lambda I)^-1 phi_i * Q_i (Park et al. 2023). Q_i = 1 - p_i for margins, 1 for diffusion losses.

    ensemble: mean over all checkpoints of the task, kernel and Q apart, as the paper has it. Differs from released code:
    float64 instead of float16 Gram, no division by mean|C^-1|, the same projection for every checkpoint.
    """
    return InnerProduct(
        "trak",
        part(output, draws, dim, parameters),
        precondition=Gram(damping),
        aggregate=aggregate.mean if ensemble else aggregate.last,
        weight=Value(doubt, once()) if output is margin else None,
    )
