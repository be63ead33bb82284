"""whence: which training images made this picture, and how sure are we?

Larger scores mean: this training image did more FOR the query (positive = proponent).
"""

from whence.draws import Draws, cumulative, fixed, random, stratified, uniform
from whence.forward import Classifier, Denoiser
from whence.inner_product import InnerProduct
from whence.methods import METHODS
from whence.methods.diffusion import d_trak
from whence.methods.gradient import (
    exact_influence,
    gas,
    gradient_cosine,
    gradient_dot,
    influence,
    output_cosine,
    output_dot,
    relatif_loss,
    relatif_theta,
    renormalized_influence,
    tracin,
    trak,
)
from whence.methods.similarity import pixel_cosine, pixel_dot
from whence.types import VERSION as __version__
from whence.types import Batch, Checkpoint, Draw, Engine, Scores, Task, WhenceError

__all__ = [
    "METHODS",
    "Batch",
    "Checkpoint",
    "Classifier",
    "Denoiser",
    "Draw",
    "Draws",
    "Engine",
    "InnerProduct",
    "Scores",
    "Task",
    "WhenceError",
    "__version__",
    "cumulative",
    "d_trak",
    "exact_influence",
    "fixed",
    "gas",
    "gradient_cosine",
    "gradient_dot",
    "influence",
    "output_cosine",
    "output_dot",
    "pixel_cosine",
    "pixel_dot",
    "random",
    "relatif_loss",
    "relatif_theta",
    "renormalized_influence",
    "stratified",
    "tracin",
    "trak",
    "uniform",
]
