"""Pictures that are in memory already, in whatever people have them: tensors, numpy arrays, lists of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from whence.data.images import tensor_images
from whence.types import Images, WhenceError

ACCEPTED = "a tensor or an array [n, C, H, W] in [-1, 1], Images, or a folder"
InMemory = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]


def images_in_memory(name: str, given: object) -> Images:
    """Pictures as Images.

    Args:
        name: what they are, for errors.
        given: Images as they are; a tensor, an array, or a list of equal ones.
    """
    if isinstance(given, str | Path):
        raise WhenceError(f"{name}={str(given)!r}: a module needs Images; use whence.image_folder({str(given)!r})")
    if isinstance(given, DataLoader | Dataset):
        kind = type(given).__name__
        accepted = f"{ACCEPTED}: torch.stack([x for x, _ in dataset]), with labels to whence.tensor_images"
        raise WhenceError(f"a {kind} has no stable names and may give other pictures every time", name, accepted)
    if isinstance(given, Images):
        return given
    return tensor_images(_checked(name, _tensor(name, given)))


def _tensor(name: str, given: object) -> Tensor:
    if isinstance(given, Tensor):
        return given
    try:
        if isinstance(given, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(given))
        if isinstance(given, list | tuple):
            return torch.stack([torch.as_tensor(one) for one in given])
    except (TypeError, ValueError, RuntimeError) as error:
        raise WhenceError(f"they make no array of pictures ({error})", name, ACCEPTED) from None
    raise WhenceError(f"a {type(given).__name__} holds no pictures", name, ACCEPTED)


def _checked(name: str, x0: Tensor) -> Tensor:
    """Refuse what is plainly meant otherwise: no picture, one picture without an axis for many, channels last, bytes."""
    shape = list(x0.shape)
    if not shape or not shape[0]:
        raise WhenceError("there is no picture", name, ACCEPTED)
    if x0.ndim == 3 and shape[0] in (1, 3) and min(shape[1:]) >= 4:
        raise WhenceError(f"shape {shape} is one picture", name, "[1, C, H, W]: x[None]")
    if x0.ndim == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3) and min(shape[1:3]) >= 4:
        raise WhenceError(f"shape {shape} has its channels last", name, "[n, C, H, W]: x.permute(0, 3, 1, 2)")
    if x0.is_complex():
        raise WhenceError("complex numbers are no pixels", name, ACCEPTED)
    if x0.ndim == 4 and not x0.is_floating_point() and x0.dtype != torch.bool and int(x0.max()) > 1:
        raise WhenceError(f"{x0.dtype} from {int(x0.min())} to {int(x0.max())}", name, "[-1, 1]: x / 127.5 - 1")
    return x0
