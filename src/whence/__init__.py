"""whence: which training images made this picture, and how sure are we?

Larger scores mean: this training image did more FOR the query (positive = proponent).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from whence.curvature.gram import Gram
from whence.diffusion.draws import Draws, cumulative, density, fixed, random, stratified, uniform
from whence.diffusion.forward import Classifier, Custom, Denoiser, FlowMatching
from whence.features.encoders import Function
from whence.features.parts import Encoded, Gradient
from whence.features.projections import SJLT, Rademacher
from whence.methods import METHODS
from whence.methods.influence import exact_influence, influence, relatif_loss, relatif_theta, renormalized_influence
from whence.methods.inner_product import InnerProduct, self_influence
from whence.methods.last_layer import last_layer_ridge
from whence.methods.nda import nda
from whence.methods.regression import ridge
from whence.methods.similarity import (
    clip_cosine,
    dino_cosine,
    pixel_cosine,
    pixel_dot,
    representation_cosine,
    representation_dot,
    representation_l2,
    similarity,
)
from whence.methods.tracin import (
    gas,
    gas_layerwise,
    gradient_cosine,
    gradient_dot,
    output_cosine,
    output_dot,
    tracin,
    tracin_last_layer,
    tracin_projected,
)
from whence.methods.trak import d_trak, trak
from whence.types import VERSION as __version__
from whence.types import Batch, Checkpoint, Draw, Engine, Scores, Task, WhenceError

if TYPE_CHECKING:
    from whence.data.images import dataset_images, image_folder, subset, tensor_images
    from whence.storage.scores import load_scores, save_scores, to_parquet
    from whence.task import attribute, task_from_module, task_from_pretrained

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
    "Encoded",
    "Engine",
    "FlowMatching",
    "Function",
    "Gradient",
    "Gram",
    "InnerProduct",
    "Rademacher",
    "Scores",
    "Task",
    "WhenceError",
    "__version__",
    "attribute",
    "clip_cosine",
    "cumulative",
    "d_trak",
    "dataset_images",
    "density",
    "dino_cosine",
    "exact_influence",
    "fixed",
    "gas",
    "gas_layerwise",
    "gradient_cosine",
    "gradient_dot",
    "image_folder",
    "influence",
    "last_layer_ridge",
    "load_scores",
    "nda",
    "output_cosine",
    "output_dot",
    "pixel_cosine",
    "pixel_dot",
    "random",
    "relatif_loss",
    "relatif_theta",
    "renormalized_influence",
    "representation_cosine",
    "representation_dot",
    "representation_l2",
    "ridge",
    "save_scores",
    "self_influence",
    "similarity",
    "stratified",
    "subset",
    "task_from_module",
    "task_from_pretrained",
    "tensor_images",
    "to_parquet",
    "tracin",
    "tracin_last_layer",
    "tracin_projected",
    "trak",
    "uniform",
]

# Their rooms import diffusers (seconds), pyarrow or matplotlib: only those who use them wait.
_LATER = {
    "attribute": "whence.task",
    "dataset_images": "whence.data.images",
    "image_folder": "whence.data.images",
    "load_scores": "whence.storage.scores",
    "save_scores": "whence.storage.scores",
    "subset": "whence.data.images",
    "task_from_module": "whence.task",
    "task_from_pretrained": "whence.task",
    "tensor_images": "whence.data.images",
    "to_parquet": "whence.storage.scores",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
