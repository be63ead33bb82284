"""What a run will cost, measured on its first images."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from whence.curvature.gram import Gram
from whence.curvature.solve import NoPreconditioner
from whence.data.layout import Finding
from whence.doctor import machine
from whence.doctor.findings import NOTHING, Findings, finding_of, in_bytes, short
from whence.doctor.trial import tried
from whence.features.halves import halves_of
from whence.features.parts import Gradient, Part
from whence.features.projections import ENTRIES_AT_ONCE, Identity, Shapes, TwoSided
from whence.features.rows import absent, identity, images_per_shard, prepare
from whence.methods import build, check_needs
from whence.methods.columns import fitted
from whence.methods.errors import States
from whence.methods.inner_product import InnerProduct
from whence.methods.normalize import none
from whence.storage.arrays import Rows
from whence.storage.files import progress
from whence.types import Blocks, Checkpoint, Engine, Images, Method, Task, WhenceError, digest


@dataclass(frozen=True)
class Step:
    """A stage of a run.

    Args:
        what: it does.
        kind: "features", "system" or "scores".
        disk: bytes written.
        memory: bytes at most while it runs, the program included.
        seconds: it takes.
        device_memory: bytes of the GPU at most.
    """

    what: str
    kind: str
    disk: int = 0
    memory: int = 0
    seconds: float = 0.0
    device_memory: int = 0


@dataclass(frozen=True)
class Cost:
    """What a run will take.

    Args:
        steps: its stages.
        device: that it runs on.
        findings: what will not fit, what cannot run, what is not predicted.
    """

    steps: tuple[Step, ...]
    device: str = "cpu"
    findings: tuple[Finding, ...] = ()

    def disk(self, kind: str) -> int:
        return sum(step.disk for step in self.steps if step.kind == kind)

    @property
    def features(self) -> int:
        """Bytes of feature shards."""
        return self.disk("features")

    @property
    def scores(self) -> int:
        """Bytes of scores."""
        return self.disk("scores")

    @property
    def memory(self) -> int:
        return max((step.memory for step in self.steps), default=0)

    @property
    def device_memory(self) -> int:
        return max((step.device_memory for step in self.steps), default=0)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def predict(task: Task, methods: Mapping[str, Mapping[str, object]]) -> Cost:
    """Disk, memory and time of `whence attribute` with these methods (name -> settings), before it runs.

        disk     features n k bytes(dtype), once for each (part, checkpoint, images) that differ, of the n rows that are
                 not there already, and of each half of the draws where errors are measured; scores 8 m n, as much for errors
        memory   the largest stage: weights, activations and one slab of the projection as measured; one shard of
                 gradients and of rows; four matrices of min(n, k)^2 in float64 (Gram, eigenvectors, LAPACK); scores
        seconds  images (t_image + t_row) + shards (t_slab d/d_slab + t_write), and for the system
                 flops / rate + t_eigh(e0) (e/e0)^3 + shards read, at most: of full rank it goes by Cholesky

    That is for methods that compare rows, under a Gram matrix or none; any other is tried on a few images, queries and
    steps of its training, and carried on (`trial`).

    Measured here: one gradient of each part on three training images after a warm-up, a slab of its projection, one
    shard written and read, a float64 product, an eigendecomposition of size e0 <= 384. Assumed: all images and
    checkpoints cost the same, no other program begins to use the machine. Left out: starting Python,
    hashing the images, drawing queries, the report, file headers (about 200 bytes a shard). A measurement takes as long
    as about five images of the run.
    """
    if torch.device(task.engine.device).type == "cuda" and not torch.cuda.is_available():
        what, fix = f"device {task.engine.device!r} is not there", "accepted here: cpu"
        return Cost((), task.engine.device, (Finding("error", what, "device", fix),))
    rates: dict[str, Rate] = {}
    counted: set[str] = set()
    steps: list[Step] = []
    findings: Findings = []
    for name in progress(list(methods), "measuring"):
        try:
            method = build(name, task.forward, methods[name])
            check_needs(name, task)
            method = fitted(method, task)
            if _counted(method):
                assert isinstance(method, InnerProduct)
                more, noted = _steps(name, method, task, rates, counted)
                steps, findings = steps + more, findings + noted
            else:
                steps += _tried(name, method, task)
        except WhenceError as error:
            findings.append(finding_of(error, name))
        except Exception as error:  # what a network cannot do, it cannot do in the run either
            what, fix = f"fails on the first images ({short(error)})", "check that model and images belong together"
            findings.append(Finding("error", what, name, fix))
    cost = Cost(tuple(steps), task.engine.device, tuple(findings))
    return replace(cost, findings=(*findings, *_shortages(cost, task)))


def _shortages(cost: Cost, task: Task) -> Findings:
    """What the machine does not have."""
    findings, where = [], "this run"
    free = shutil.disk_usage(machine.standing(task.root)).free
    if cost.features + cost.scores > free:
        what = f"needs {in_bytes(cost.features + cost.scores)} on disk, {in_bytes(free)} are free"
        findings.append(Finding("error", what, where, "give an output folder on another disk, or a smaller dim"))
    total, free = machine.machine_memory()
    if total and cost.memory > free:
        what = f"needs {in_bytes(cost.memory)} of memory, {in_bytes(free)} are available"
        fix = "give a smaller dim, fewer images or fewer queries"
        findings.append(Finding("error" if cost.memory > total else "warning", what, where, fix))
    if cost.device_memory:
        free = torch.cuda.mem_get_info(task.engine.device)[0]
        if cost.device_memory > free:
            what = f"needs {in_bytes(cost.device_memory)} of GPU memory, {in_bytes(free)} are free"
            findings.append(
                Finding("error", what, where, "give fewer parameters, a smaller --budget_mb, or another device")
            )
    return findings


@dataclass(frozen=True)
class Rate:
    """What a part costs on this machine.

    Args:
        width: columns of a row.
        per_shard: rows of a shard.
        load: seconds for the weights, once.
        image: seconds to read and measure an image.
        row: seconds to project its row.
        matrix: seconds for the projection itself, per shard, however many rows it has.
        write: seconds to write a shard.
        read: seconds to read it.
        memory: peak while measuring, in bytes.
        device_memory: peak on the GPU, in bytes.
        buffers: gradients of a shard, which come on top, in bytes.
        resident: the program alone, in bytes.
    """

    width: int
    per_shard: int
    load: float
    image: float
    row: float
    matrix: float
    write: float
    read: float
    memory: int
    device_memory: int
    buffers: int
    resident: int


def _steps(
    name: str, method: InnerProduct, task: Task, rates: dict[str, Rate], counted: set[str]
) -> tuple[list[Step], Findings]:
    """The stages of a method that no method before it has done. rates, counted: what is known already, added to."""
    method.sign()  # refuses outputs that do not fit together
    steps: list[Step] = []
    findings: Findings = []
    checkpoints = [checkpoint for checkpoint, _ in method.aggregate(task)]
    arrays_of = list(_arrays(method, task))
    for what, part, images in arrays_of:
        if digest(part) not in rates:
            rates[digest(part)] = _measure(part, task, checkpoints[-1])
        # The key of `features.rows`, less what is the same throughout a task.
        keys = {digest([part, one.digest, identity(images)]): one for one in checkpoints}
        new = [checkpoint for key, checkpoint in keys.items() if key not in counted]
        counted |= {*keys}
        missing = Counter(absent(part, task, checkpoint, images) for checkpoint in new)
        there = sum((len(images) - count) * arrays for count, arrays in missing.items())
        if there:
            told = f"{there:,} of {len(images) * len(new):,} rows of the {what} are there already"
            findings.append(Finding("note", told, f"{name}: {task.folder_of(images)}", NOTHING))
        for count, arrays in missing.items():
            if count:
                steps.append(_array(f"{name}: {what}", rates[digest(part)], count, arrays, task.engine))
    rate, errors = rates[digest(arrays_of[0][1])], method.halved(task)
    if not (isinstance(method.train, Gradient) and isinstance(method.train.projection, Identity)):  # has no matrix
        findings += _wasteful(name, rate, len(task.train))
    steps.append(_system(name, method, rate, task, len(checkpoints), errors))
    steps.append(_scores(name, method, task, rate.resident, errors))
    return steps, findings


def _counted(method: object) -> bool:
    """Whether its stages are counted one by one; of others a few images tell."""
    return isinstance(method, InnerProduct) and isinstance(method.precondition, Gram | NoPreconditioner)


def _tried(name: str, method: Method, task: Task) -> list[Step]:
    """What a method takes by a trial."""
    found, resident = tried(name, method, task), machine.in_kernel("/proc/self/status", "VmRSS")
    whole = Step(
        f"{name}: all of it", "features", int(found.disk), int(found.memory), found.seconds, int(found.device_memory)
    )
    return [whole, _scores(name, method, task, resident, errors=False)]


def _scores(name: str, method: object, task: Task, resident: int, errors: bool) -> Step:
    """The scores of a method, on disk and in memory."""
    cells = 8 * len(task.queries) * len(task.train)
    # Ranking them for the table and the report takes indices and a sorted copy; errors take the scores of moved rows.
    stated = task.errors and isinstance(method, States) and method.stated(task).of != ""
    return Step(f"{name}: scores", "scores", cells * (1 + stated), resident + (12 if errors else 4) * cells)


def _array(what: str, rate: Rate, count: int, arrays: int, engine: Engine) -> Step:
    """Feature rows of some images, at so many checkpoints."""
    item = torch.finfo(engine.dtype).bits // 8
    rows = min(rate.per_shard, count)
    shards = math.ceil(count / rows)
    seconds = rate.load + count * (rate.image + rate.row) + shards * (rate.matrix + rate.write)
    kept = 3 * rows * rate.width * item  # projected, in one piece, and as the bytes of a file
    memory, device_memory = rate.memory + kept, 0
    if rate.device_memory:
        device_memory = rate.device_memory + rate.buffers + kept
    else:
        memory += rate.buffers
    what = f"{what} ({count:,} x {rate.width:,}{f', {arrays} checkpoints' if arrays > 1 else ''})"
    return Step(what, "features", arrays * count * rate.width * item, memory, arrays * seconds, device_memory)


def _system(name: str, method: InnerProduct, rate: Rate, task: Task, checkpoints: int, errors: bool) -> Step:
    """Gram matrix, eigenvectors and products: float64 on the CPU (see `curvature.gram`). For errors there are two further
    systems, with two rows of each query."""
    n, m, k = len(task.train), len(task.queries) * (1 + errors), rate.width
    shards, uses = math.ceil(n / rate.per_shard), 1 + (method.normalize is not none)
    if isinstance(method.precondition, NoPreconditioner):
        side, reads, flops = 0, shards * uses, 2 * m * n * k
    elif isinstance(method.precondition, Gram) and n < k:
        side, reads = n, 3 * shards  # whole, by columns, and beside the queries
        flops = n * n * k + 2 * m * n * k + 4 * m * n * n
    else:
        side, reads = k, shards * (1 + uses)
        flops = n * k * k * (2 * uses - 1) + 2 * m * k * k + 2 * m * n * k
    products = flops / _rate_of_products(min(rate.per_shard, n, 512), min(k, 2048))
    memory = rate.resident + 8 * (4 * side**2 + 2 * m * k + 4 * m * n + 3 * rate.per_shard * k)
    what = f"{name}: {f'system of {side:,} x {side:,}' if side else 'inner products'}"
    seconds = checkpoints * (products + _eigenvectors(side) + reads * rate.read * (1 + errors)) * (1 + 2 * errors)
    return Step(what, "system", 0, memory, seconds)


def _arrays(method: InnerProduct, task: Task) -> Iterator[tuple[str, Part, Images]]:
    for what, part, images in (
        ("training images", method.sides()[0], task.train),
        ("queries", method.sides()[1], task.queries),
    ):
        if method.halved(task):
            yield from (
                (f"{what} at half {number} of the draws", half, images)
                for number, half in enumerate(halves_of(part), 1)
            )
        else:
            yield what, part, images
    if method.weight is not None:
        yield "weights", method.weight, task.train


def _wasteful(name: str, rate: Rate, count: int) -> Findings:
    """Where most of the time goes into making the same projection matrix again."""
    shards = math.ceil(count / rate.per_shard)
    if shards < 2 or rate.matrix < rate.per_shard * (rate.image + rate.row):
        return []
    held = f"{rate.per_shard} image{'' if rate.per_shard == 1 else 's'}"
    what = f"the memory budget holds gradients of {held} at a time, and the projection is made anew {shards} times"
    fix = "that takes more than half of the time: give a larger --budget_mb (or Engine budget), or fewer parameters"
    return [Finding("warning", what, name, fix)]


@dataclass(frozen=True)
class _First:
    """A projection that costs nothing: what is left is the gradients' own time."""

    def width(self, shapes: Shapes) -> int:
        return 1

    def __call__(self, blocks: Blocks) -> Tensor:
        first = next(iter(blocks.values()))
        return first.reshape(len(first), -1)[:, :1].clone()


def _measure(part: Part, task: Task, checkpoint: Checkpoint) -> Rate:
    engine, images = task.engine, task.train
    resident = machine.in_kernel("/proc/self/status", "VmRSS")
    machine.forget_peak(engine)
    started = time.perf_counter()
    module = prepare(checkpoint, engine)
    load = time.perf_counter() - started
    width = part.width(module, task.forward, images.batch([0]).to(engine.device, engine.dtype))
    row_bytes, image_bytes = width * torch.finfo(engine.dtype).bits // 8, part.bytes_per_image(module, engine.dtype)
    # As in `features.rows`, which a test compares it with.
    per_shard = images_per_shard(len(images), row_bytes, image_bytes, engine)
    bare: Part = replace(part, projection=_First()) if isinstance(part, Gradient) else part

    def compute(rows: Sequence[int]) -> None:
        batches = iter([images.batch(rows).to(engine.device, engine.dtype)])
        bare.compute(module, task.forward, batches, len(rows), engine)

    compute([0])
    rows = list(range(len(images)))[1:4] or [0]
    image = _seconds(lambda: compute(rows), engine, 0.2) / len(rows)
    matrix, row = _projecting(part, module, per_shard, engine) if isinstance(part, Gradient) else (0.0, 0.0)
    memory, device_memory = machine.peak(engine)
    write, read = _writing(machine.standing(task.root), per_shard, width, engine.dtype)
    # vmap holds about three copies of the rows it makes at once, which the budget bounds.
    at_once = min(max(engine.budget, 3 * image_bytes), 3 * engine.batch_size * image_bytes)
    buffers = per_shard * image_bytes + at_once
    return Rate(width, per_shard, load, image, row, matrix, write, read, memory, device_memory, buffers, resident)


def _projecting(part: Gradient, module: nn.Module, per_shard: int, engine: Engine) -> tuple[float, float]:
    """Seconds per shard for the matrix, and per row for the product; of a slab, scaled to all parameters."""
    shapes, sizes = part.shapes(module), part.sizes(module)
    k, total = part.projection.width(shapes), sum(sizes.values())
    if total * k > 4 * ENTRIES_AT_ONCE and not isinstance(part.projection, TwoSided):  # whose matrices are small
        name = max(sizes, key=lambda block: sizes[block])
        shapes = {name: (min(sizes[name], max(4096, ENTRIES_AT_ONCE // k)),)}
    scale = total / sum(map(math.prod, shapes.values())) * len(part.outputs)

    def seconds(rows: int) -> float:
        blocks = {
            name: torch.ones(rows, *shape, dtype=engine.dtype, device=engine.device) for name, shape in shapes.items()
        }
        return scale * _seconds(lambda: part.projection(blocks), engine)

    one, all_rows = seconds(1), seconds(per_shard)
    return one, max(0.0, all_rows - one) / per_shard


def _writing(folder: Path, per_shard: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds to write a shard, and to read one as float64."""
    with tempfile.TemporaryDirectory(prefix=".whence-doctor-", dir=folder) as place:
        shard = slice(0, per_shard)
        rows, values = (
            Rows(Path(place), (per_shard, width), dtype, per_shard),
            torch.ones(per_shard, width, dtype=dtype),
        )
        write = _seconds(lambda: rows.write(shard, values))
        return write, _seconds(lambda: rows.read(shard).double())


def _rate_of_products(rows: int, width: int) -> float:
    """Floating-point operations per second of a float64 product of two shards."""
    a = torch.ones(rows, width, dtype=torch.float64)
    return 2 * rows * rows * width / _seconds(lambda: a @ a.T, min_seconds=0.05)


def _eigenvectors(side: int) -> float:
    """Seconds for all eigenvectors of a symmetric matrix."""
    if not side:
        return 0.0
    few = min(side, 384)
    a = torch.randn(few, few, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return _seconds(lambda: torch.linalg.eigh(a + a.T)) * (side / few) ** 3


def _seconds(action: Callable[[], object], engine: Engine = Engine(), min_seconds: float = 0.0) -> float:
    """Mean time of an action, repeated until `min_seconds` seconds have passed."""
    cuda, times = torch.device(engine.device).type == "cuda", 0
    started = time.perf_counter()
    while True:
        action()
        if cuda:
            torch.cuda.synchronize(engine.device)
        times, passed = times + 1, time.perf_counter() - started
        if passed >= min_seconds:
            return passed / times
