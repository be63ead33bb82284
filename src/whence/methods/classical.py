"""Variants of TracIn and GAS that look at one layer, or at each layer on its own terms."""

from __future__ import annotations

from dataclasses import replace

from whence import aggregate
from whence.draws import Draws, uniform
from whence.gradients import LAST
from whence.inner_product import InnerProduct
from whence.methods.gradient import part
from whence.outputs import Output, loss
from whence.projections import Layerwise


def tracin_last_layer(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = None, parameters: str = LAST
) -> InnerProduct:
    """sum_c eta_c (x_q . x_i + 1)(delta_q . delta_i) over training checkpoints: TracIn of the last layer alone
    (Pruthi et al. 2020, TracInCP-Fast), x what the layer reads (+1 for its bias), delta the gradient by what it gives.

    The last layer is the Linear or Conv2d registered last; nothing below it is differentiated. For several draws, and for a
    convolution, whose weights act at every pixel, it is the sum of these products over pairs of draws and pixels.
    Differs from released code: the bias counts; a checkpoint without a learning rate is an error, not 1.
    """
    features = part(output, draws, dim, parameters)
    return InnerProduct("tracin_last_layer", features, aggregate=aggregate.rate_weighted)


def gas_layerwise(
    output: Output = loss, draws: Draws = uniform(10), dim: int | None = 4096, parameters: str = "all"
) -> InnerProduct:
    """sum_c eta_c sum_l cos(g_q^l(theta_c), g_i^l(theta_c)), l the layers (Hammoudeh & Lowd 2022, GAS-L): every layer counts
    alike, however large its gradient. weight and bias are one layer.

    Released code names it but never computes it; this is the formula of the paper.
    """
    features = part(output, draws, dim, parameters)
    features = replace(features, projection=Layerwise(features.projection))
    return InnerProduct("gas_layerwise", features, aggregate=aggregate.rate_weighted)
