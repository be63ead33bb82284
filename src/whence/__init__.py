"""whence: which training images made this picture, and how sure are we?

Larger scores mean: this training image did more FOR the query (positive = proponent). Every method is in `whence.methods`,
under its name. Nothing is imported before it is used: torch and diffusers take seconds, for which `whence --help` need not
wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whence.curvature.gram import Gram
    from whence.data.images import dataset_images, image_folder, tensor_images
    from whence.diffusion.draws import Draws, stratified, uniform
    from whence.diffusion.forward import Classifier, Custom, Denoiser, FlowMatching
    from whence.diffusion.outputs import Output
    from whence.evaluation.ceiling import ceiling
    from whence.evaluation.copies import near_copies
    from whence.evaluation.exported import to_fiftyone
    from whence.evaluation.index import Index
    from whence.evaluation.lds import bootstrap, lds
    from whence.evaluation.ledger import Ledger
    from whence.evaluation.replay import replay
    from whence.evaluation.retrieval import mislabel_auroc
    from whence.evaluation.values import knn_shapley, values
    from whence.features.encoders import Function
    from whence.features.parts import Encoded, Gradient
    from whence.features.projections import SJLT, Rademacher
    from whence.methods import METHODS
    from whence.methods.curvature import ek_fac
    from whence.methods.das import das
    from whence.methods.further import FurtherTraining
    from whence.methods.influence import exact_influence, influence, relatif_loss, relatif_theta, renormalized_influence
    from whence.methods.inner_product import InnerProduct, self_influence
    from whence.methods.last_layer import last_layer_ridge
    from whence.methods.metagradient import AveragedMetagradient, Metagradient
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
    from whence.models import CustomDiffusion, Lora
    from whence.report.attributable import attributability
    from whence.storage.hub import hub_folder
    from whence.storage.scores import load_scores, save_scores, to_parquet
    from whence.task import Request, Sampling, attribute, task_from_module, task_from_pretrained
    from whence.training.optimizer import SGD, AdamW
    from whence.training.recipe import Recipe
    from whence.training.recipe_file import read_recipe
    from whence.training.runs import train
    from whence.types import Batch, Checkpoint, Draw, Engine, Scores, Task, WhenceError, from_plain

__all__ = [
    "METHODS",
    "SGD",
    "SJLT",
    "AdamW",
    "AveragedMetagradient",
    "Batch",
    "Checkpoint",
    "Classifier",
    "Custom",
    "CustomDiffusion",
    "Denoiser",
    "Draw",
    "Draws",
    "Encoded",
    "Engine",
    "FlowMatching",
    "Function",
    "FurtherTraining",
    "Gradient",
    "Gram",
    "Index",
    "InnerProduct",
    "Ledger",
    "Lora",
    "Metagradient",
    "Output",
    "Rademacher",
    "Recipe",
    "Request",
    "Sampling",
    "Scores",
    "Task",
    "WhenceError",
    "__version__",
    "attributability",
    "attribute",
    "bootstrap",
    "ceiling",
    "clip_cosine",
    "d_trak",
    "das",
    "dataset_images",
    "dino_cosine",
    "ek_fac",
    "exact_influence",
    "from_plain",
    "gas",
    "gas_layerwise",
    "gradient_cosine",
    "gradient_dot",
    "hub_folder",
    "image_folder",
    "influence",
    "knn_shapley",
    "last_layer_ridge",
    "lds",
    "load_scores",
    "methods",
    "mislabel_auroc",
    "nda",
    "near_copies",
    "output_cosine",
    "output_dot",
    "pixel_cosine",
    "pixel_dot",
    "read_recipe",
    "relatif_loss",
    "relatif_theta",
    "renormalized_influence",
    "replay",
    "representation_cosine",
    "representation_dot",
    "representation_l2",
    "ridge",
    "save_scores",
    "self_influence",
    "similarity",
    "stratified",
    "task_from_module",
    "task_from_pretrained",
    "tensor_images",
    "to_fiftyone",
    "to_parquet",
    "tracin",
    "tracin_last_layer",
    "tracin_projected",
    "train",
    "trak",
    "uniform",
    "values",
]

__version__ = "0.1.0"

# Where each public name lives.
HOMES = {
    "whence.curvature.gram": "Gram",
    "whence.data.images": "dataset_images image_folder tensor_images",
    "whence.diffusion.draws": "Draws stratified uniform",
    "whence.diffusion.forward": "Classifier Custom Denoiser FlowMatching",
    "whence.diffusion.outputs": "Output",
    "whence.evaluation.ceiling": "ceiling",
    "whence.evaluation.copies": "near_copies",
    "whence.evaluation.exported": "to_fiftyone",
    "whence.evaluation.index": "Index",
    "whence.evaluation.lds": "bootstrap lds",
    "whence.evaluation.ledger": "Ledger",
    "whence.evaluation.replay": "replay",
    "whence.evaluation.retrieval": "mislabel_auroc",
    "whence.evaluation.values": "knn_shapley values",
    "whence.features.encoders": "Function",
    "whence.features.parts": "Encoded Gradient",
    "whence.features.projections": "Rademacher SJLT",
    "whence.methods": "METHODS",
    "whence.methods.curvature": "ek_fac",
    "whence.methods.das": "das",
    "whence.methods.influence": "exact_influence influence relatif_loss relatif_theta renormalized_influence",
    "whence.methods.inner_product": "InnerProduct self_influence",
    "whence.methods.last_layer": "last_layer_ridge",
    "whence.methods.further": "FurtherTraining",
    "whence.methods.metagradient": "AveragedMetagradient Metagradient",
    "whence.methods.nda": "nda",
    "whence.methods.regression": "ridge",
    "whence.methods.similarity": (
        "clip_cosine dino_cosine pixel_cosine pixel_dot representation_cosine representation_dot "
        "representation_l2 similarity"
    ),
    "whence.methods.tracin": (
        "gas gas_layerwise gradient_cosine gradient_dot output_cosine output_dot tracin "
        "tracin_last_layer tracin_projected"
    ),
    "whence.methods.trak": "d_trak trak",
    "whence.models": "CustomDiffusion Lora",
    "whence.report.attributable": "attributability",
    "whence.storage.hub": "hub_folder",
    "whence.storage.scores": "load_scores save_scores to_parquet",
    "whence.task": "Request Sampling attribute task_from_module task_from_pretrained",
    "whence.training.optimizer": "AdamW SGD",
    "whence.training.recipe": "Recipe",
    "whence.training.recipe_file": "read_recipe",
    "whence.training.runs": "train",
    "whence.types": "Batch Checkpoint Draw Engine Scores Task WhenceError from_plain",
}
_HOME = {name: module for module, names in HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("whence.methods")
    if name not in _HOME:
        raise AttributeError(f"module 'whence' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
