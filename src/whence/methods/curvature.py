"""Influence functions with Kronecker-factored curvature. Arguments as in `gradient`; damping: lambda in units of the mean
eigenvalue of each layer. Parameters outside Linear and Conv2d layers (norms, embeddings) take no part, as published."""

from __future__ import annotations

from whence.draws import Draws, stratified
from whence.inner_product import InnerProduct
from whence.methods.gradient import part
from whence.outputs import Output, loss
from whence.precondition.factors import Factors
from whence.precondition.kfac import EKFAC, KFAC

FACTORS = Factors(skip_others=True)


def k_fac(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "all",
    factors: Factors = FACTORS,
) -> InnerProduct:
    """g_q^T (n F + n lambda I)^-1 g_i with F = B (x) A per layer: the predicted rise of the query's loss when image i is
    removed (Martens & Grosse 2015)."""
    return InnerProduct(
        "k_fac", part(output, draws, None, parameters), precondition=KFAC(damping, factors=factors), scale="removal"
    )


def ek_fac(
    output: Output = loss,
    draws: Draws = stratified(64),
    damping: float = 0.01,
    parameters: str = "all",
    factors: Factors = FACTORS,
) -> InnerProduct:
    """As `k_fac` with eigenvalues measured in the basis of the factors (Grosse et al. 2023; for diffusion models Mlodozeniec
    et al. 2025: weight and bias apart, lambda = 1e-8 absolute, 250 draws).

    Differs from released code: noise keyed by image; bias and weight in one block; float64 sums and dot products; damping
    relative to each layer; both gradients in float, not 8 bits.
    """
    return InnerProduct(
        "ek_fac", part(output, draws, None, parameters), precondition=EKFAC(damping, factors=factors), scale="removal"
    )
