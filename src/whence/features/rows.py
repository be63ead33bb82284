"""Feature rows on disk: one part of a recipe x one checkpoint x some images -> Rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from whence.features.carried import Content, Place, taken
from whence.features.checks import refuse_unfit
from whence.features.parts import Encoded, Part, Value
from whence.storage.arrays import Rows, Store
from whence.storage.workers import Work, share
from whence.types import Batch, Checkpoint, Engine, Images, Task, WhenceError, digest

SHARD_BYTES = 64 * 2**20
AT_LEAST = 64
"""Images in a shard where there are as many, so that small ones do not wait for the disk."""
SHARDS = 64
"""Into as many a work is divided, so that several processes are done at the same time, and little is lost with one."""


SECONDS = 20.0
"""About as long a shard takes, at most."""
FEW = 8
LARGE = 2**20
"""Of fewer images than `FEW` each has a shard of its own, where its gradient has as many bytes."""


class Prepared:
    """The network that was prepared last, so that all parts of a task and both of its sides load it once."""

    key: tuple[object, ...] | None = None
    module: nn.Module | None = None

    @classmethod
    def forget(cls) -> None:
        """Let go of it."""
        cls.key, cls.module = None, None


def prepare(checkpoint: Checkpoint, engine: Engine) -> nn.Module:
    """The checkpoint's network, ready to be measured: evaluation mode, on the device; weights checked for NaN and Inf.

    The network is shared: who changes it takes `training.unroll.twin` of it first.
    """
    load = checkpoint.load
    how = (load.func, load.args) if isinstance(load, partial) else (load, ())  # of a folder, or of a module in memory
    key = (checkpoint.digest, *how, engine.device, engine.dtype)
    if key != Prepared.key or Prepared.module is None:
        Prepared.forget()  # first: two at once may not fit
        Prepared.module = _prepared(checkpoint, engine)
        Prepared.key = key
    return Prepared.module.eval()


def _prepared(checkpoint: Checkpoint, engine: Engine) -> nn.Module:
    module = checkpoint.load().to(engine.device).eval()
    if any(tensor.dtype != engine.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()):
        module = module.to(engine.dtype)  # only where needed: diffusers warns at every cast
    for name, weight in module.named_parameters():
        if not torch.isfinite(weight).all():
            raise WhenceError(f"checkpoint {checkpoint.name}: weight {name} holds NaN or Inf; training diverged there")
    return module


def identity(images: Images) -> str:
    """The fingerprint of an ordered set of images and of how their pixels are read."""
    return digest([images.describe(), list(images.digests)], 32)


def rows(part: Part, task: Task, checkpoint: Checkpoint, images: Images, what: str) -> Rows:
    """The rows of a part for all images, from the store where they are there, computed and stored where not.

    Args:
        part: the kind of feature.
        task: the question; its root holds the store, and its index that of the training images, if it has one.
        checkpoint: the weights at which features are measured.
        images: n of them.
        what: for the progress bar and errors.
    """
    engine, of_pictures, dtype = task.engine, _of_pictures(part), _dtype(part, task, images)
    store, key = _place(part, task, checkpoint, images)
    if of_pictures:
        images = images.pictures  # where the network sees latents of them
    array = store.known(key, len(images), dtype)
    if array is not None and not array.missing():
        return array  # nothing is left to compute: no network is loaded
    module = nn.Module() if of_pictures else prepare(checkpoint, engine)
    if not isinstance(part, Encoded):
        refuse_unfit(module, task.forward, images, engine)
    content = Content.of(key, images, dtype)
    before = {} if content is None else content.places(store)
    if array is None:
        width = part.width(module, task.forward, images.batch([0]).to(engine.device, engine.dtype))
        row_bytes = width * torch.finfo(dtype).bits // 8
        held = part.bytes_per_image(module, engine.dtype)
        per_shard = images_per_shard(len(images), row_bytes, held, engine)

        def measured() -> float:
            begun, one = time.perf_counter(), images.batch([0]).to(engine.device, engine.dtype)
            float(part.compute(module, task.forward, iter([one]), 1, engine).sum())  # waits for a GPU
            return time.perf_counter() - begun

        per_shard = in_time(per_shard, len(images) - len(before), held, measured)
        array = store.array(key, (len(images), width), dtype, per_shard)
        if content is not None:
            content.write(array)

    def fresh(shard: slice) -> list[int]:
        return [row for row in range(shard.start, shard.stop) if row not in before]

    def read(shard: slice) -> Iterator[Any]:
        return chain((len(fresh(shard)),), _batches(images, fresh(shard), engine))

    forward = task.forward  # no more of the task goes to other machines

    def compute(read: Iterable[Any]) -> Tensor:
        batches = iter(read)
        count = next(batches)
        return part.compute(module, forward, batches, count, engine) if count else torch.empty(0)

    def keep(shard: slice, computed: Tensor) -> None:
        values = _with_earlier(shard, computed, before)
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            name = images.ids[shard.start + int(bad[0])]
            raise WhenceError(f"{what}: the feature row of image {name!r} holds NaN or Inf")
        if dtype != engine.dtype:
            _refuse_lost(values, dtype, images.ids[shard], what)
        array.write(shard, values)

    share(array.shards, Work(array.has, array.path, compute, keep, read), what, engine)
    return array


def _with_earlier(shard: slice, computed: Tensor, before: Mapping[int, Place]) -> Tensor:
    """The rows of a shard: those that were computed, and those that were there before.

    Args:
        shard: of an array.
        computed: the rows that no earlier array had.
        before: where the others lie.
    """
    held = {row - shard.start: before[row] for row in range(shard.start, shard.stop) if row in before}
    if not held:
        return computed
    earlier = taken(list(held.values()))
    values = torch.empty(shard.stop - shard.start, earlier.shape[1], dtype=earlier.dtype)
    values[list(held)] = earlier
    new = [slot for slot in range(len(values)) if slot not in held]
    if new:
        values[new] = computed.to(values)
    return values


LOST = 0.01
"""What a number format may take of the length of a row, at most: bfloat16 takes .002 of any."""


def _refuse_lost(values: Tensor, dtype: torch.dtype, names: Sequence[str], what: str) -> None:
    """Refuse rows that a number format cannot hold: float16 has none above 65,504, and few below 6e-5."""
    exact = values.double()
    lost = torch.linalg.vector_norm(values.to(dtype).double() - exact, dim=1)
    bad = (~(lost <= LOST * torch.linalg.vector_norm(exact, dim=1))).nonzero().flatten().tolist()
    if bad:
        told = (
            f"the feature rows of {len(bad)} images of {len(values)}, such as {names[bad[0]]!r}, do not fit in {dtype}"
        )
        raise WhenceError(f"{what}: {told}", "feature_dtype", "bfloat16 or float32")


def _dtype(part: Part, task: Task, images: Images) -> torch.dtype:
    """The number format in which rows are kept: single numbers and the rows of queries as they are computed."""
    narrow = task.engine.feature_dtype
    return task.engine.dtype if narrow is None or images is task.queries or isinstance(part, Value) else narrow


def images_per_shard(n: int, row_bytes: int, held: int, engine: Engine) -> int:
    """How many images a shard has, at least 1: as many as memory allows, and few enough to share.

    Args:
        n: images, in all.
        row_bytes: of a row.
        held: bytes that an image takes before it is compressed.
        engine: whose budget is kept.
    """
    return max(1, min(SHARD_BYTES // row_bytes, engine.budget // held, max(AT_LEAST, -(-n // SHARDS)), n))


def in_time(per_shard: int, n: int, held: int, measured: Callable[[], float]) -> int:
    """As many images, or as few as take about `SECONDS`, so that little is lost with a shard and the bar moves.

    Args:
        per_shard: as many as there may be.
        n: images, in all.
        held: bytes that an image takes before it is compressed.
        measured: seconds that one image takes, of which the first time is not typical.
    """
    if n < FEW:  # to measure one would take as long as some of them
        return 1 if held >= LARGE else per_shard
    if per_shard * measured() <= SECONDS:
        return per_shard
    return max(1, min(per_shard, int(SECONDS / measured())))


def _place(part: Part, task: Task, checkpoint: Checkpoint, images: Images) -> tuple[Store, dict[str, object]]:
    """Where the rows of a part are kept, and their key; the arguments as of `rows`."""
    store = Store(task.folder_of(images))
    if _of_pictures(part):
        return store, {"part": part, "images": identity(images.pictures)}
    key = {"part": part, "checkpoint": checkpoint.digest, "forward": task.forward, "images": identity(images)}
    return store, key


def absent(part: Part, task: Task, checkpoint: Checkpoint, images: Images) -> int:
    """How many rows of a part are still to be computed; the arguments as of `rows`."""
    store, key = _place(part, task, checkpoint, images)
    array = store.known(key, len(images), _dtype(part, task, images))
    return len(images) if array is None else sum(shard.stop - shard.start for shard in array.missing())


def _of_pictures(part: Part) -> bool:
    """Whether a part is the row of an encoder that reads the pictures and looks at no model."""
    return isinstance(part, Encoded) and getattr(part.encoder, "of_pictures", False)


def _batches(images: Images, rows: Sequence[int], engine: Engine) -> Iterator[Batch]:
    for start in range(0, len(rows), engine.batch_size):
        yield images.batch(rows[start : start + engine.batch_size]).to(engine.device, engine.dtype)
