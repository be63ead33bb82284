"""whence: which training images made this picture, and how sure are we?

Larger scores mean: this training image did more FOR the query (positive = proponent).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from whence.draws import Draws, cumulative, density, fixed, random, stratified, uniform
from whence.features import Gradient
from whence.forward import Classifier, Custom, Denoiser, FlowMatching
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
from whence.precondition.gram import Gram
from whence.projections import SJLT, Rademacher
from whence.types import VERSION as __version__
from whence.types import Batch, Checkpoint, Draw, Engine, Scores, WhenceError

if TYPE_CHECKING:
    from whence.data import image_folder, subset, tensor_images
    from whence.results import load_scores, save_scores, to_parquet
    from whence.tasks import Task, attribute

__all__ = [
    "METHODS",
    "SJLT",
    "Batch",
    "Checkpoint",
    "Classifier",
    "Custom",
    "Denoiser",
    "Draw",
    "Draws",
    "Engine",
    "FlowMatching",
    "Gradient",
    "Gram",
    "InnerProduct",
    "Rademacher",
    "Scores",
    "Task",
    "WhenceError",
    "__version__",
    "attribute",
    "cumulative",
    "d_trak",
    "density",
    "exact_influence",
    "fixed",
    "gas",
    "gradient_cosine",
    "gradient_dot",
    "image_folder",
    "influence",
    "load_scores",
    "output_cosine",
    "output_dot",
    "pixel_cosine",
    "pixel_dot",
    "random",
    "relatif_loss",
    "relatif_theta",
    "renormalized_influence",
    "save_scores",
    "stratified",
    "subset",
    "tensor_images",
    "to_parquet",
    "tracin",
    "trak",
    "uniform",
]

# Their rooms import diffusers (seconds), pyarrow or matplotlib: only those who use them wait.
_LATER = {
    "Task": "whence.tasks",
    "attribute": "whence.tasks",
    "image_folder": "whence.data",
    "load_scores": "whence.results",
    "save_scores": "whence.results",
    "subset": "whence.data",
    "tensor_images": "whence.data",
    "to_parquet": "whence.results",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
