"""Pictures in memory: what is plainly meant otherwise is refused, and so is a range that would have to be guessed."""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from whence.data.images import ImageFolder, Subset, TensorImages, tensor_images
from whence.data.memory import ACCEPTED, READY, as_tensor, likely, span
from whence.models import Model
from whence.types import Forward, Images, WhenceError


def images_in_memory(name: str, given: object) -> Images:
    """Pictures as Images.

    Args:
        name: what they are, for errors.
        given: Images as they are, or what `tensor_images` takes.
    """
    if isinstance(given, str | Path):
        raise WhenceError(f"{name}={str(given)!r}: a module needs Images; use whence.image_folder({str(given)!r})")
    if isinstance(given, DataLoader | Dataset):
        kind = type(given).__name__
        accepted = f"{ACCEPTED}: torch.stack([x for x, _ in dataset]), with labels to whence.tensor_images"
        raise WhenceError(f"a {kind} has no stable names and may give other pictures every time", name, accepted)
    if isinstance(given, Images):
        return given
    x0, said = as_tensor(name, given)
    return tensor_images(_checked(name, x0) if said is None else given)  # type: ignore[arg-type]  # pictures of PIL


def _checked(name: str, x0: Tensor) -> Tensor:
    """Refuse what is plainly meant otherwise: no picture, one picture without an axis for many, channels last, bytes."""
    shape = list(x0.shape)
    if x0.ndim == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 4:
        raise WhenceError(f"shape {shape} is one picture", name, "[1, C, H, W]: x[None]")
    if x0.ndim == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3) and min(shape[1:3]) >= 4:
        raise WhenceError(f"shape {shape} has its channels last", name, "[n, C, H, W]: x.permute(0, 3, 1, 2)")
    if x0.ndim == 4 and not x0.is_floating_point() and int(x0.max()) > 1:
        raise WhenceError(f"{x0.dtype} from {int(x0.min())} to {int(x0.max())}", name, saying(name, x0))
    return x0


def saying(name: str, x0: Tensor) -> str:
    """How the range of pictures is said."""
    low, high = likely(*span(x0)) or (0, 1)
    return (
        f"whence.tensor_images({name}, value_range=({low:g}, {high:g})) for black and white, which become -1 and 1; "
        "value_range=(-1, 1) if the network takes them as they are"
    )


def check_ranges(forward: Forward, train: Images, queries: Images | None = None) -> None:
    """Refuse pictures whose range would have to be guessed: by denoisers they are taken in [-1, 1], by most other programs
    in [0, 1], and a wrong range gives other scores that look like right ones.

    Classifiers take what they were trained on, on both sides. Folders are always read in [-1, 1].

    Args:
        forward: how the network is measured.
        train: the training images.
        queries: the pictures to explain, None where they are still to be read.
    """
    raw, asked = _held(train), _held(queries)
    if forward.models != "denoiser":
        _same_kind(raw, asked)
        return
    for name, held in {"train": raw, "queries": asked}.items():
        if held is not None and held.value_range is None and likely(*span(held.x0)) is not None:
            least, most = span(held.x0)
            told = f"their {len(held)} pictures go from {least:g} to {most:g}, and whether that is black to white"
            raise WhenceError(f"{told}, or grey to white as in [-1, 1], is not said", name, saying(name, held.x0))
    if raw is None or raw.value_range != READY or likely(*span(raw.x0)) is None:
        return
    # The network takes other numbers than [-1, 1], as was said of the training images.
    if isinstance(queries, ImageFolder) or (asked is not None and asked.value_range != READY):
        least, most = span(raw.x0)
        told = f"training images are taken as they are, from {least:g} to {most:g}, which is not said of these pictures"
        raise WhenceError(told, "queries", "whence.tensor_images(queries, value_range=(-1, 1)), in the same range")


def _same_kind(train: TensorImages | None, queries: TensorImages | None) -> None:
    """Refuse bytes on one side and fractions on the other: a network was trained on one of them."""
    if train is None or queries is None or train.x0.is_floating_point() == queries.x0.is_floating_point():
        return
    here, there = ("{} from {:g} to {:g}".format(held.x0.dtype, *span(held.x0)) for held in (queries, train))
    told = f"{here}, where the training images are {there}"
    raise WhenceError(told, "queries", "numbers of one kind on both sides")


def are_pictures(model: Model, name: str, images: Images, size: int) -> bool:
    """Whether these are pictures, which are encoded as the model needs it: folders are, and so are pictures in memory.
    Images of any other kind have what the network takes.

    Without a text an array beside an autoencoder may be either, and with three channels it would pass for both.

    Args:
        model: a pipeline.
        name: what they are, for errors.
        images: the images.
        size: side that the pictures of folders are brought to.
    """
    held = _held(images)
    if held is None:
        return isinstance(_whole(images), ImageFolder)
    if model.vae is not None and not model.reads_text and held.value_range is None:
        accepted = f"whence.tensor_images({name}, value_range=(-1, 1)) for pictures; a class of your own for latents"
        raise WhenceError(
            f"{model.folder} sees latents, and whether these are or are pictures is not said", name, accepted
        )
    channels, shape = model.channels, list(held.x0.shape[1:])
    if len(shape) != 3 or shape[0] != channels:
        raise WhenceError(f"shape [n, {str(shape)[1:]} for {model.folder}", name, f"[n, {channels}, H, W]")
    if shape[1:] != [size, size]:
        sizes = f"{shape[2]}x{shape[1]}, where those of a folder are {size}x{size}"
        warnings.warn(f"{name}: pictures in memory are not resized: {sizes}", stacklevel=2)
    return True


def ready(given: object) -> bool:
    """Whether these are Images of a class of one's own, which have what the network takes."""
    return isinstance(given, Images) and _held(given) is None and not isinstance(_whole(given), ImageFolder)


def _held(images: Images | None) -> TensorImages | None:
    """The images in memory that these are some of; a class of one's own says what it has by what it gives."""
    whole = _whole(images)
    return whole if type(whole) is TensorImages else None


def _whole(images: Images | None) -> Images | None:
    """What these are some of."""
    while isinstance(images, Subset):
        images = images.images
    return images
