"""What K-FAC is made of, summed over training images, draws and pseudo-gradients, and kept on disk as far as it got.

A pseudo-gradient v has E v v^T = d^2 f / d prediction^2, so that gradients of <prediction, v> have the Gauss-Newton matrix
as second moment: sqrt(2/D) times normal noise for squared errors, p - onehot(label drawn from p) for cross-entropy.
One ordinary backward pass of <prediction, v> gives the output gradients s of all layers and all draws of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import cast

import torch
from torch import Tensor, nn

from whence.curvature.layers import Block, Layer, backward, blocks_of, recording, sides, verify
from whence.curvature.solve import Problem
from whence.diffusion import outputs
from whence.diffusion.draws import DrawRule, Draws
from whence.diffusion.noise import normals, seed_for, stream, uniforms
from whence.diffusion.outputs import Output
from whence.features.gradients import check, differentiating
from whence.features.parts import Gradient
from whence.features.projections import Identity
from whence.features.rows import prepare
from whence.storage.arrays import refuse_changed, seal_of_tensors, write_tensors
from whence.storage.files import FORMAT_VERSION, progress, write_json
from whence.storage.opening import tensors_in
from whence.types import Batch, Draw, Forward, Images, Task, WhenceError, describe, digest

SQUARED = (
    outputs.loss,
    outputs.elbo,
    outputs.weighted,
    outputs.squared_norm,
)  # curvature w_t (2/D) I in the prediction
ROWS_AT_ONCE = 64  # (image, draw) pairs in one pass; bounds the activations kept
ELEMENTS_AT_ONCE = 2**24  # of per-draw gradients held at a time (64 MiB)
SAVE_EVERY = 120.0  # seconds between two notes of the running sums, or 20 times what a note takes
Sums = dict[str, Tensor]
Add = Callable[[Sums, Block, Tensor, Tensor, bool], None]  # (sums, block, a, s, is it a draw's first pseudo-gradient)
Sharing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, float]]


def expand(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, float]:
    """Every position is a datum: A = mean over draws and positions of a a^T, B = mean over draws of sum_m s_m s_m^T.

    Exact for deep linear networks with a loss per token (Eschenhagen et al. 2023).
    """
    return a.flatten(1), s.flatten(1), 1 / a.shape[2]


def reduce(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, float]:
    """Positions are brought together first: A of the mean of a, B of the sum of s over them. Exact where the output pools
    them (Eschenhagen et al. 2023)."""
    return a.mean(2), s.sum(2), 1.0


@dataclass(frozen=True)
class Factors:
    """How A and B are estimated.

    Args:
        sharing: how the positions of a layer become data: `expand` or `reduce`.
        samples: pseudo-gradients per draw; None for all directions of the prediction (D backward passes: small networks).
        draws: of the curvature; None for those of the training gradients.
        joint_bias: the bias is one more input of its layer; False makes it a block of its own (as published, further from
            the Gauss-Newton matrix).
        skip_others: parameters that belong to no Linear or Conv2d are left out of curvature and inner product (as
            published) instead of refused.
        seed: of the pseudo-gradients.
    """

    sharing: Sharing = expand
    samples: int | None = 1
    draws: Draws | None = None
    joint_bias: bool = True
    skip_others: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise WhenceError(f"samples={self.samples}; accepted: 1 or more per draw, or None for all directions")


DEFAULT = Factors()


@dataclass(frozen=True)
class Fit:
    """The estimate of one checkpoint and measure: what it runs on, and the folder that keeps it.

    Args:
        task: the question; its training images are those summed over.
        module: the network.
        output: whose curvature it is.
        blocks: the parameters, by the factors they share.
        layers: the layers of the blocks, by name.
        draws: of the curvature.
        settings: how A and B are estimated.
        folder: where the sums are kept.
    """

    task: Task
    module: nn.Module
    output: Output
    blocks: Sequence[Block]
    layers: Mapping[str, Layer]
    draws: DrawRule
    settings: Factors
    folder: Path


@dataclass(frozen=True)
class Drawn:
    """Rows of one pass: images with one draw each.

    Args:
        batch: the images, repeated for each of their draws [b].
        draw: timestep [b] and noise [b, ...] of each row.
        numbers: which of its image's draws each row is [b].
    """

    batch: Batch
    draw: Draw
    numbers: Tensor


def measured(problem: Problem, who: str) -> tuple[Gradient, Output]:
    """The gradients whose Gauss-Newton matrix is asked for, and their output; others are refused."""
    part = problem.part
    if not isinstance(part, Gradient) or part.projection != Identity() or len(part.outputs) > 1:
        raise WhenceError(f"{who} needs unprojected gradients of one output (dim=None)")
    (output,) = part.outputs
    if output not in (*SQUARED, outputs.cross_entropy):
        accepted = ", ".join(o.name for o in (*SQUARED, outputs.cross_entropy))
        raise WhenceError(f"{who} does not know the curvature of output {output.name!r}; accepted: {accepted}")
    if part.draws.unit:
        raise WhenceError(f"{who} is the curvature of the plain mean over draws; accepted: unit=False")
    check(output, problem.task.forward)
    return part, output


def fit_factors(problem: Problem, settings: Factors) -> Fit:
    task = problem.task
    part, output = measured(problem, "K-FAC")
    draws = settings.draws or part.draws
    if draws.unit:
        raise WhenceError("K-FAC is the curvature of the plain mean over draws; accepted: unit=False")
    module = prepare(problem.checkpoint, task.engine)
    blocks = blocks_of(module, part.sizes(module), settings.joint_bias, settings.skip_others)
    key = {"factors": settings, "output": output, "draws": draws, "blocks": [block.name for block in blocks]}
    folder = folder_of(problem, key)
    owners = dict(module.named_modules())
    layers = {block.layer: cast(Layer, owners[block.layer]) for block in blocks}
    return Fit(task, module, output, blocks, layers, draws, settings, folder)


def folder_of(problem: Problem, key: Mapping[str, object]) -> Path:
    """The folder that keeps what was computed of this curvature."""
    task = problem.task
    key = {
        **key,
        "checkpoint": problem.checkpoint.digest,
        "forward": task.forward,
        # Sorted: a sum does not depend on the order of the images.
        "images": digest([task.train.describe(), sorted(task.train.digests)], 32),
        "dtype": str(task.engine.dtype),
        "rows": ROWS_AT_ONCE,
    }
    folder = task.folder_of(task.train) / "curvature" / digest(key)
    if not (folder / "manifest.json").exists():
        write_json(folder / "manifest.json", {"format_version": FORMAT_VERSION, "key": describe(key)})
    return folder


def factors(fit: Fit) -> Sums:
    """A [d_i, d_i] and B [d_o, d_o] of every block, float64."""

    def add(sums: Sums, block: Block, a: Tensor, s: Tensor, first: bool) -> None:
        left, right, scale = fit.settings.sharing(block.inputs(a), s)
        if first:  # a does not depend on the pseudo-gradient
            sums[f"A {block.name}"].add_(_lower(left), alpha=scale)
        sums[f"B {block.name}"].add_(_lower(right))

    sizes = {f"{side} {b.name}": b.shape[axis] for b in fit.blocks for side, axis in (("A", 1), ("B", 0))}
    zeros = {name: torch.zeros(size, size, dtype=torch.float64) for name, size in sizes.items()}
    lower = _mean_over_draws(fit, "factors", "factors", zeros, add, fit.draws)
    return {name: value.tril() + value.tril(-1).mT for name, value in lower.items()}


def _lower(x: Tensor) -> Tensor:
    """x x^T, whose lower triangle is complete and the rest is not: little more than half the work."""
    size = len(x)
    step = size if size < 128 else -(-size // 4)
    total = x.new_zeros(size, size)
    for start in range(0, size, step):
        stop = min(start + step, size)
        torch.mm(x[start:stop], x[:stop].mT, out=total[start:stop, :stop])
    return total


def basis(fit: Fit) -> Sums:
    """Eigenvectors (columns) QA, QB and eigenvalues dA, dB of every block's factors, float64."""
    path = fit.folder / "eigenvectors.safetensors"
    if not path.exists():
        write(path, eigenvectors(factors(fit), fit.task.engine.device), 0)
    return read(path)[0]  # also where just written: the layout in memory decides the last bit of products


def eigenvectors(factors: Sums, device: str) -> Sums:
    """QA, dA of every A and QB, dB of every B."""
    found: Sums = {}
    for name, matrix in progress(list(factors.items()), "K-FAC eigenvectors"):
        if not torch.isfinite(matrix).all():
            raise WhenceError(f"K-FAC: the inputs or gradients of {name[2:]} hold NaN or Inf for some training image")
        values, vectors = torch.linalg.eigh(matrix.to(device))
        found[f"d{name}"], found[f"Q{name}"] = values.clamp(min=0), vectors
    return found


def eigenvalues(fit: Fit, basis: Sums, draws: DrawRule, of: str = "") -> Sums:
    """Lambda [d_o, d_i] of every block: mean over draws of (Q_B^T G Q_A)^2, float64.

    Args:
        fit: what is measured.
        basis: QA and QB of every block.
        draws: of this measurement.
        of: names a basis that is not that of this fit.
    """
    dtype = torch.promote_types(fit.task.engine.dtype, torch.float32)
    Q = {name: vectors.to(fit.task.engine.device, dtype) for name, vectors in basis.items() if name.startswith("Q")}

    def add(sums: Sums, block: Block, a: Tensor, s: Tensor, first: bool) -> None:
        sums[block.name] += squares(block.inputs(a), s, Q[f"QA {block.name}"], Q[f"QB {block.name}"])

    zeros = {block.name: torch.zeros(block.shape, dtype=torch.float64) for block in fit.blocks}
    name = f"eigenvalues-{digest([draws, of] if of else draws)}"
    return _mean_over_draws(fit, "eigenvalues", name, zeros, add, draws)


def squares(a: Tensor, s: Tensor, QA: Tensor, QB: Tensor) -> Tensor:
    """sum over draws of (Q_B^T G Q_A)^2, G = s a^T of each: [d_o, d_i] float64.

    Each side is rotated before the product of the two where it has fewer columns (positions) than the other has rows.

    Args:
        a: inputs [d_i, b, M].
        s: output gradients [d_o, b, M].
        QA: eigenvectors of A, as columns [d_i, d_i].
        QB: eigenvectors of B, as columns [d_o, d_o].
    """
    (d_i, rows, positions), d_o = a.shape, len(s)
    early_a, early_s = positions < d_o, positions < d_i
    if early_a:
        a = (QA.mT @ a.flatten(1)).unflatten(1, (rows, positions))
    if early_s:
        s = (QB.mT @ s.flatten(1)).unflatten(1, (rows, positions))
    if positions == 1 and early_a and early_s:
        return (s[..., 0].square() @ a[..., 0].square().mT).double()
    total = torch.zeros(d_o, d_i, dtype=torch.float64, device=a.device)
    step = max(1, ELEMENTS_AT_ONCE // (d_i * d_o))
    for start in range(0, rows, step):
        some = slice(start, start + step)
        G = s[:, some].transpose(0, 1) @ a[:, some].permute(1, 2, 0)
        G = G if early_a else (G.flatten(0, 1) @ QA).view_as(G)
        G = G if early_s else QB.mT @ G
        total += G.square_().sum(0)
    return total


def _mean_over_draws(fit: Fit, what: str, name: str, zeros: Sums, add: Add, draws: DrawRule) -> Sums:
    """What `add` adds for each block, averaged over images and draws; a killed run goes on where it stopped."""
    task, path = fit.task, fit.folder / f"{name}.safetensors"
    groups = grouped(task.train, draws)
    sums, done = read(path) if path.exists() else (zeros, 0)
    sums = {key: value.to(task.engine.device) for key, value in sums.items()}
    noted, cost, checked = monotonic(), 0.0, False
    with differentiating(fit.module, [name for block in fit.blocks for name in block.names]):
        for number in progress(range(done, len(groups)), f"K-FAC {what}"):
            for rows in passes(task.train, groups[number], draws, task):
                _pass(fit, sums, add, rows, seed_for(fit.settings.seed, what), checked)
                checked = True
            if monotonic() - noted >= max(SAVE_EVERY, 20 * cost) and number + 1 < len(groups):
                start = monotonic()
                write(path, sums, number + 1)
                noted = monotonic()
                cost = noted - start
    if done < len(groups):
        write(path, sums, len(groups))
    return {key: value.cpu() / (len(task.train) * draws.count) for key, value in sums.items()}


def grouped(images: Images, draws: DrawRule, at_once: int | None = None) -> list[list[int]]:
    """The images of each pass, as lists of their numbers.

    Sorted, and grouped by a constant: no bit of a sum depends on the order of the images, the batch size or the budget.

    Args:
        images: those summed over.
        draws: of each image.
        at_once: (image, draw) pairs in one pass; ROWS_AT_ONCE by default.
    """
    order = sorted(range(len(images)), key=lambda i: images.digests[i])
    step = max(1, (at_once or ROWS_AT_ONCE) // draws.count)
    return [order[i : i + step] for i in range(0, len(order), step)]


def passes(
    images: Images, rows: Sequence[int], draws: DrawRule, task: Task, at_once: int | None = None
) -> Iterator[Drawn]:
    """All draws of some images, at most `at_once` of them at a time.

    Args:
        images: the images.
        rows: numbers of those that are meant.
        draws: of each image.
        task: says how many timesteps there are, and where to compute.
        at_once: (image, draw) pairs in one pass; ROWS_AT_ONCE by default.
    """
    at_once = at_once or ROWS_AT_ONCE
    batch = images.batch(rows).to(task.engine.device, task.engine.dtype)
    drawn = draws(batch.keys, batch.x0.shape[1:], task.forward.timesteps, batch.x0.dtype)
    for start in range(0, draws.count, at_once):
        numbers = torch.arange(start, min(start + at_once, draws.count))
        times = len(numbers)
        cond = {name: value.repeat_interleave(times, 0) for name, value in batch.cond.items()}
        t, noise = drawn.t[:, numbers].flatten(), drawn.noise[:, numbers].flatten(0, 1)
        many = Batch(batch.x0.repeat_interleave(times, 0), batch.keys.repeat_interleave(times), cond)
        yield Drawn(many, Draw(t.to(batch.x0.device), noise.to(batch.x0)), numbers.repeat(len(rows)))


def _pass(fit: Fit, sums: Sums, add: Add, rows: Drawn, seed: int, checked: bool) -> None:
    """One forward pass, and a backward pass for each pseudo-gradient."""
    forward, samples = fit.task.forward, fit.settings.samples
    with recording(fit.layers) as calls:
        prediction, _ = forward(fit.module, rows.batch, rows.draw)
    _finite(fit, prediction.detach(), rows)
    if not checked:
        verify(fit.module, fit.layers, fit.blocks, prediction, calls)
    count = samples or prediction[0].numel()
    for j, v in enumerate(pseudo_gradients(fit.output, forward, samples, seed, prediction.detach(), rows)):
        for layer, slopes in backward(prediction, calls, v, keep=j + 1 < count).items():
            a, s = sides(layer, fit.layers[layer], calls[layer], slopes, len(prediction))
            _finite(fit, s.transpose(0, 1), rows)
            for block in fit.blocks:
                if block.layer == layer:
                    add(sums, block, a, s, j == 0)


def _finite(fit: Fit, values: Tensor, rows: Drawn) -> None:
    if torch.isfinite(values.sum()):
        return
    bad = (~torch.isfinite(values.flatten(1))).any(1).nonzero()
    if len(bad):
        keys = fit.task.train.batch(range(len(fit.task.train))).keys.tolist()
        name = fit.task.train.ids[keys.index(int(rows.batch.keys[bad[0, 0]]))]
        raise WhenceError(f"K-FAC: the prediction or the gradients of training image {name!r} hold NaN or Inf")


def pseudo_gradients(
    output: Output,
    forward: Forward,
    samples: int | None,
    seed: int,
    prediction: Tensor,
    rows: Drawn,
) -> Iterator[Tensor]:
    """v [b, ...] whose v v^T sum to d^2 f / d prediction^2 of each row, exactly or in expectation.

    Those of a row are a function of (seed, image key, number of the draw).

    Args:
        output: f.
        forward: knows the weights of the output.
        samples: so many v are drawn; None for all directions, which is exact.
        seed: of what is drawn.
        prediction: of each row [b, ...].
        rows: the images and draws that the predictions are of.
    """

    def streams(j: int) -> Tensor:
        return stream(seed_for(seed, f"pseudo-gradient {j}"), rows.numbers, rows.batch.keys)

    if output == outputs.cross_entropy:
        p = prediction.softmax(1)
        labels = torch.arange(p.shape[1], device=p.device)
        if samples is None:
            yield from (p[:, label, None].sqrt() * (p - (labels == label).to(p)) for label in labels)
            return
        upper = p.double().cumsum(1)
        for j in range(samples):
            u = uniforms(streams(j), 1).to(p.device) * upper[:, -1:]
            drawn = (upper < u).sum(1, keepdim=True)
            yield (p - (labels == drawn).to(p)) / samples**0.5
        return
    root, shape = squared_weight(output, forward, prediction, rows.draw.t).sqrt(), prediction.shape[1:]
    if samples is None:
        yield from (root * unit.reshape(shape) for unit in torch.eye(shape.numel()).to(prediction))
        return
    for j in range(samples):
        yield root * normals(streams(j), shape, prediction.dtype).to(prediction) / samples**0.5


def squared_weight(output: Output, forward: Forward, prediction: Tensor, t: Tensor) -> Tensor:
    """2 w_t / D of each row, shaped to multiply the prediction.

    Args:
        output: one of SQUARED.
        forward: knows the weights of the output.
        prediction: of each row [b, ...].
        t: timesteps [b].
    """
    scale = torch.full((len(prediction),), 2 / prediction[0].numel(), dtype=torch.float64, device=prediction.device)
    if output.weight is not None:
        scale = scale * output.weight(forward, t)
    return scale.to(prediction).reshape(-1, *[1] * (prediction.ndim - 1))


def write(path: Path, tensors: Sums, done: int) -> None:
    """Put sums on disk.

    Args:
        path: of the file.
        tensors: the sums.
        done: groups or steps that are in them.
    """
    # One entry for all: the order of several is another one in every process.
    write_tensors(path, tensors, {"done": f"{done} {seal_of_tensors(tensors, _of(path, done))}"})


def _of(path: Path, done: int) -> str:
    """What sums are: their folder is named after the digest of all that they depend on."""
    return f"{path.parent.name}/{path.stem}/{done}"


def read(path: Path) -> tuple[Sums, int]:
    """The sums of a file, and how many groups or steps are in them."""
    with tensors_in(path, "delete it and run again") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        done, _, noted = (file.metadata() or {}).get("done", "").partition(" ")
    if not done.isdecimal():
        raise WhenceError(f"{path} holds no sums of whence; delete it and run again")
    if noted:  # earlier versions noted none
        refuse_changed(path, noted, found, _of(path, int(done)), "run again")
    return found, int(done)
