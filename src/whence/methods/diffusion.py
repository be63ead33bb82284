"""Methods made for diffusion models."""

from __future__ import annotations

from whence import aggregate
from whence.draws import Draws, uniform
from whence.inner_product import InnerProduct
from whence.methods.gradient import part
from whence.outputs import Output, squared_norm
from whence.precondition.gram import Gram


def d_trak(
    output: Output = squared_norm,
    draws: Draws = uniform(10),
    dim: int | None = 4096,
    damping: float = 0.1,
    parameters: str = "all",
    ensemble: bool = False,
) -> InnerProduct:
    """TRAK's kernel with an output that is not the loss, the squared norm of the prediction, on both sides (Zheng et al.
    2024). Published: 10 or 100 steps, dim 32768.

    Differs from released code: noise is keyed by image, not by batch position; the system is solved in float64, which
    keeps small dampings usable; an unknown output is an error instead of the loss.
    """
    return InnerProduct(
        "d_trak",
        part(output, draws, dim, parameters),
        precondition=Gram(damping),
        aggregate=aggregate.mean if ensemble else aggregate.last,
    )
