"""Similarity: which training images look like the query, to the eye, to an encoder, or to the model itself.

The baselines that every other method has to beat. clip_cosine and dino_cosine do not depend on the model at all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from whence.diffusion.draws import Draws
from whence.features.activations import STEPS, Layers
from whence.features.encoders import Function, Pixels
from whence.features.maps import SIDES, Mapped
from whence.features.parts import Encoded
from whence.features.pretrained import CLIP, DINO, Pretrained
from whence.methods import normalize
from whence.methods.inner_product import InnerProduct
from whence.methods.normalize import Normalize, cosine
from whence.methods.registry import EMBEDS, HIDDEN, ONCE, READS, Trial, method

Ours = Pixels | Layers | Pretrained | Function


@method("baseline", None, READS)
def pixel_dot(center: bool = False) -> InnerProduct:
    """<x_q, x_i> of the flattened images in [-1, 1]. Bright images dominate it; prefer the cosine.

    Args:
        center: whether each image's own mean is taken away.
    """
    return InnerProduct(Encoded(Pixels(center)))


@method("baseline", None, READS, trial=Trial(baseline=True))
def pixel_cosine(center: bool = False) -> InnerProduct:
    """cos(x_q, x_i) of the flattened images in [-1, 1].

    Args:
        center: whether each image's own mean is taken away.
    """
    return InnerProduct(Encoded(Pixels(center)), normalize=cosine)


@method("Radford et al.", 2021, EMBEDS, needs=("encoder",))
def clip_cosine(encoder: str | Path = "") -> InnerProduct:
    """cos(e_q, e_i) of CLIP's image embeddings, after its projection (D-TRAK's baseline: ViT-B/32).

    Differs from released code: pictures are preprocessed as the encoder's own preprocessor_config.json says.

    Args:
        encoder: folder of a CLIPModel or CLIPVisionModelWithProjection, or its hub name; none is built in.
    """
    return InnerProduct(Encoded(_pretrained(encoder, CLIP)), normalize=cosine)


@method("Caron et al.", 2021, EMBEDS, needs=("encoder",))
def dino_cosine(encoder: str | Path = "") -> InnerProduct:
    """cos(e_q, e_i) of the class tokens of a self-supervised ViT: DINO, DINOv2, or any ViT (the baseline of Wang et al.
    2024, better than CLIP there).

    Args:
        encoder: folder of a ViTModel or Dinov2Model, or its hub name; none is built in.
    """
    return InnerProduct(Encoded(_pretrained(encoder, DINO)), normalize=cosine)


@method("Wang et al.", 2023, EMBEDS, needs=("encoder",))
def abc_cosine(encoder: str | Path = "") -> InnerProduct:
    """cos(g(e_q), f(e_i)), e an encoder, f and g maps of training images and of drawn pictures that `whence abc fit` learned
    on fine-tunes whose exemplars are known (attribution by customization, Wang et al. 2023; see `features.maps`).

    Args:
        encoder: folder of the maps, which name their encoder.
    """
    sides = [Mapped(str(encoder), side) for side in SIDES]
    if encoder:
        _ = sides[0].maps  # checked at once where it is given
    return InnerProduct(Encoded(sides[0]), query=Encoded(sides[1]), normalize=cosine)


def _pretrained(folder: str | Path, families: tuple[str, ...]) -> Pretrained:
    """An encoder, checked at once where it is given, so that a long run does not end with a spelling mistake."""
    found = Pretrained(str(folder), families)
    if found.folder:
        found.check()
    return found


@method("Hanawa et al.", 2021, HIDDEN, classifier=ONCE)
def representation_dot(layers: str = "", draws: Draws = STEPS) -> InnerProduct:
    """<a_q, a_i>, a the activations of `layers` of the model at a few noisy steps (see `activations.Layers`; Hanawa et al.
    2021 for classifiers: the last hidden layer). Long activations dominate it; prefer the cosine.

    Args:
        layers: a module's name, or a regular expression that matches several; empty for the middle block of a UNet, and
            otherwise for what the last layer reads.
        draws: the (timestep, noise) pairs at which activations are read.
    """
    return InnerProduct(Encoded(Layers(layers, draws)))


@method("Hanawa et al.", 2021, HIDDEN, classifier=ONCE)
def representation_cosine(layers: str = "", draws: Draws = STEPS) -> InnerProduct:
    """cos(a_q, a_i) of the model's activations; 0 where one of them is zero (Hanawa et al. 2021).

    Args:
        layers: a module's name, or a regular expression that matches several; empty for the middle block of a UNet, and
            otherwise for what the last layer reads.
        draws: the (timestep, noise) pairs at which activations are read.
    """
    return InnerProduct(Encoded(Layers(layers, draws)), normalize=cosine)


@method("Hanawa et al.", 2021, HIDDEN, classifier=ONCE)
def representation_l2(layers: str = "", draws: Draws = STEPS) -> InnerProduct:
    """-||a_q - a_i|| of the model's activations (Hanawa et al. 2021): never above 0, and 0 for the image itself.

    Args:
        layers: a module's name, or a regular expression that matches several; empty for the middle block of a UNet, and
            otherwise for what the last layer reads.
        draws: the (timestep, noise) pairs at which activations are read.
    """
    return InnerProduct(Encoded(Layers(layers, draws)), normalize=normalize.distance)


def similarity(
    encoder: Ours | Callable[[Tensor], Tensor], metric: Normalize = cosine, digest: str = "", name: str = ""
) -> InnerProduct:
    """Rows of any encoder compared by a metric.

    Args:
        encoder: one of ours (`Pixels`, `Layers`, `Pretrained`, `Function`), or a function of pictures [b, C, H, W] in [-1,
            1] -> [b, k].
        metric: `normalize.cosine`, `normalize.none` (dot) or `normalize.distance` (-l2).
        digest: of a function: any text that changes whenever its results do.
        name: of a function that has none.
    """
    if not isinstance(encoder, Ours):
        encoder = Function(encoder, digest, name)
    return InnerProduct(Encoded(encoder), normalize=metric, name="similarity")
