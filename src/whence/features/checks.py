"""What a network and its images must be before features of them are computed: two passes over one image, once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from whence.diffusion.noise import normals
from whence.types import Batch, Draw, Engine, Forward, Images, WhenceError

PROBABLE = 1e-4  # how far from 1 the sum of probabilities may be, and that of logits by chance is not
SAME = 1e-3  # of the largest entry: more than rounding of any number format, less than what dropout does


def refuse_unfit(module: nn.Module, forward: Forward, images: Images, engine: Engine) -> None:
    """Refuse images that the network cannot take, a network that gives other numbers every time, and labels that are none of
    a classifier's classes.

    Args:
        module: the network, prepared.
        forward: how it is measured.
        images: n of them.
        engine: device and number format.
    """
    batch = images.batch([0]).to(engine.device, engine.dtype)
    noise = normals(batch.keys, batch.x0.shape[1:], engine.dtype).to(batch.x0)
    at = Draw(torch.full((1,), forward.timesteps // 2, device=batch.x0.device), noise)
    with torch.no_grad():
        first, again = (_measured(module, forward, batch, at) for _ in range(2))
    if not bool(((first - again).abs() <= SAME * first.abs().max()).all()) and bool(torch.isfinite(first).all()):
        raise WhenceError(
            f"two passes of this {type(module).__name__} over one image differ",
            "module",
            "a network without dropout or noise of its own in evaluation mode",
        )
    if forward.models == "classifier":
        _refuse_labels(first, batch, images)
        _refuse_probabilities(first)


def _measured(module: nn.Module, forward: Forward, batch: Batch, at: Draw) -> Tensor:
    try:
        return forward(module, batch, at)[0]
    except (WhenceError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the user's own network, whose traceback stays in sight
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        shape = list(batch.x0.shape[1:])
        what = f"{type(module).__name__} does not take an image of shape {shape} ({why})"
        raise WhenceError(what, "module", "images [n, C, H, W] as the network takes them") from error


def _refuse_probabilities(logits: Tensor) -> None:
    """Outputs and margins take a softmax themselves; the gradients of two in a row are not those of the training."""
    if bool((logits >= 0).all()) and abs(float(logits.sum()) - 1) < PROBABLE:
        raise WhenceError(
            "the network returns probabilities: they add up to 1", "classifier", "logits, from before the softmax"
        )


def _refuse_labels(logits: Tensor, batch: Batch, images: Images) -> None:
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise WhenceError(
            f"the network returns {list(logits.shape)} for one image",
            "classifier",
            "[1, classes], a logit for each of two or more classes (of one logit z make [0, z])",
        )
    labels, classes = batch.cond["class_labels"] if images.labels is None else images.labels, logits.shape[1]
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        row = int(wrong[0, 0])
        raise WhenceError(
            f"image {images.ids[row]!r} has label {int(labels[row])}, but the network has {classes} classes",
            "labels",
            f"0 to {classes - 1}",
        )
