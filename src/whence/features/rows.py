"""Feature rows on disk: one part of a recipe x one checkpoint x some images -> Rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from whence.features.parts import Encoded, Part
from whence.storage.arrays import Rows, Store
from whence.storage.files import progress
from whence.types import Batch, Checkpoint, Engine, Images, Task, WhenceError, digest

SHARD_BYTES = 64 * 2**20


def prepare(checkpoint: Checkpoint, engine: Engine) -> nn.Module:
    """The checkpoint's network, ready to be measured: evaluation mode, on the device; weights checked for NaN and Inf."""
    module = checkpoint.load().to(engine.device).eval()
    if any(tensor.dtype != engine.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()):
        module = module.to(engine.dtype)  # only where needed: diffusers warns at every cast
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise WhenceError(f"checkpoint {checkpoint.name}: weight {name} holds NaN or Inf; training diverged there")
    return module


def identity(images: Images) -> str:
    """The fingerprint of an ordered set of images and of how their pixels are read."""
    return digest([images.describe() if hasattr(images, "describe") else None, list(images.digests)], 32)


def rows(part: Part, task: Task, checkpoint: Checkpoint, images: Images, what: str) -> Rows:
    """The rows of a part for all images, from the store where they are there, computed and stored where not."""
    engine = task.engine
    images = _looked_at(part, images)
    first = images.batch([0]).to(engine.device, engine.dtype)
    module = prepare(checkpoint, engine)
    width = part.width(module, task.forward, first)
    row_bytes = width * torch.finfo(engine.dtype).bits // 8
    per_shard = min(SHARD_BYTES // row_bytes, engine.budget // part.bytes_per_image(module, engine.dtype), len(images))
    key = {"part": part, "checkpoint": checkpoint.digest, "forward": task.forward, "images": identity(images)}
    array = Store(task.root).array(key, (len(images), width), engine.dtype, per_shard)

    for shard in progress(array.missing(), what):
        values = part.compute(module, task.forward, _batches(images, shard, engine), shard.stop - shard.start, engine)
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            name = images.ids[shard.start + int(bad[0])]
            raise WhenceError(f"{what}: the feature row of image {name!r} holds NaN or Inf")
        array.write(shard, values)
    return array


def _looked_at(part: Part, images: Images) -> Images:
    """The pictures, for an encoder that reads them, where the network sees latents of them."""
    if isinstance(part, Encoded) and getattr(part.encoder, "of_pictures", False):
        return getattr(images, "pictures", images)
    return images


def _batches(images: Images, shard: slice, engine: Engine) -> Iterator[Batch]:
    for start in range(shard.start, shard.stop, engine.batch_size):
        rows = range(start, min(start + engine.batch_size, shard.stop))
        yield images.batch(list(rows)).to(engine.device, engine.dtype)
