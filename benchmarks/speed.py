"""What did it cost before, and what does it cost now? The parts of whence that were measured slow, each beside what it was.

    OMP_NUM_THREADS=1 python benchmarks/speed.py [PART ...]     about six minutes; benchmarks/results/speed.json

Each part has the commit that it was measured at; those that are not named stay as they were measured before.
Processor seconds, one thread, the arms of a round one after the other; medians of five rounds, and the ratio of each round's
"before" to its "now". "Before" is a plain function of this file that does what the code did, on the same numbers; that both
give the same is checked here, and tested to 1e-10 in tests/.
"""

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from unittest.mock import patch

os.environ["WHENCE_QUIET"] = "1"

import torch
from torch.utils.data import TensorDataset

from _record import RESULTS, SMOKE, commit, record
from whence import SJLT, Checkpoint, tensor_images
from whence.curvature import gram as gram_room
from whence.curvature.gram import Gram
from whence.curvature.solve import Problem, decomposed, eigenbasis
from whence.diffusion.draws import once, uniform
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.diffusion.outputs import cross_entropy, squared_norm
from whence.features.parts import Gradient
from whence.methods.inner_product import InnerProduct
from whence.methods.tracin import tracin
from whence.models import new_network
from whence.scores import Scores, strongest
from whence.storage.arrays import Rows, Store
from whence.storage.files import read_json
from whence.training.study import unet_config
from whence.types import Task

ROUNDS = 1 if SMOKE else 5
SIDE, QUERIES = (64, 4) if SMOKE else (4096, 256)
NOTHING = Problem(None, None, None)


def timed(work):
    begun = process_time()
    found = work()
    return process_time() - begun, found


def compared(before, now, rounds=ROUNDS, tolerance=1e-10):
    """Both arms in each round: seconds of both, and the ratio."""
    taken = {"before": [], "now": []}
    for _ in range(rounds):
        for name, arm in (("before", before), ("now", now)):
            seconds, found = timed(arm)
            taken[name].append(seconds)
            if name == "before":
                expected = found
        if isinstance(found, torch.Tensor):
            off = float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
            assert off < tolerance, off
    ratios = [a / b if b else float("nan") for a, b in zip(taken["before"], taken["now"], strict=True)]
    found = {f"{name}_seconds": round(median(seconds), 4) for name, seconds in taken.items()}
    return {**found, "times_faster": round(median(ratios), 2)}


def stored(folder, values, per_shard):
    array = Store(folder).array({"speed": list(values.shape)}, tuple(values.shape), values.dtype, per_shard)
    for shard in array.missing():
        array.write(shard, values[shard])
    return array


def random_rows(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def scores():
    """k = 4,096, 256 queries, shards of 4,096 training rows: psi^T H^-1 phi through the eigenvectors."""
    with tempfile.TemporaryDirectory() as folder:
        train, query = stored(Path(folder), random_rows(2 * SIDE, SIDE), SIDE), random_rows(QUERIES, SIDE, 1)
        basis = eigenbasis(*decomposed(torch.cov(random_rows(SIDE, SIDE, 2).double())), train, query.double(), SIDE)
        few = replace(basis, rows=replace(train, shape=(SIDE, SIDE)))
        dampings = [0.1, 1.0]

        def scales():
            """Two dampings under cosines and relatif_theta: each turned the training rows for itself, twice."""
            factors = [(basis.values + each) ** -p for each in dampings for p in (1, 2)]
            return torch.stack([torch.cat([piece.square() @ factor for piece in few.train()]) for factor in factors])

        def shared():
            both = few.at(dampings, 1.0, True)
            return torch.stack([scale() for each in both for scale in (each.train_self, each.train_square)])

        found = {
            f"{len(one.rows):,} rows": compared(lambda b=one: _turned(b, 0.1), one.at([0.1], 1.0, True)[0].kernel)
            for one in (few, basis)
        }
        return {**found, f"row scales of two dampings, {SIDE:,} rows": compared(scales, shared)}


def _turned(basis, damping):
    """As it was: every training row along the eigenvectors."""
    scaled = basis.query / (basis.values + damping)
    return torch.cat([scaled @ (values.double() @ basis.vectors).T for _, values in basis.rows], dim=1)


def one_damping():
    """One damping, 4,096 training rows and columns: an eigendecomposition, and Cholesky; the scores of 256 queries."""
    with tempfile.TemporaryDirectory() as folder:
        train, query = stored(Path(folder), random_rows(SIDE, SIDE), SIDE), random_rows(QUERIES, SIDE, 1)

        def before():
            return _by_eigenvectors(train, query.double(), 0.1)

        def now():
            return Gram(0.1).solve(NOTHING, train, query, [None])[0].kernel()

        return {"features to scores": compared(before, now, 1 if SMOKE else 3)}


def errors():
    """d_trak's scores with standard errors of 1,024 columns and 4,096 images from rows on disk: seven systems."""
    n, m, k = (40, 3, 16) if SMOKE else (4096, 64, 1024)
    point = Checkpoint(partial(small_network, 1, 64), "vectors")
    images, queries = (tensor_images(random_rows(count, 64, seed)) for count, seed in ((n, 3), (m, 4)))
    with tempfile.TemporaryDirectory() as folder:
        forward = Denoiser(linear_schedule(20), predict=lambda call, x, t, cond: call(x))
        task = Task(forward, (point,), images, queries, Path(folder), errors=True)
        method = InnerProduct(Gradient(squared_norm, uniform(2), SJLT(k)), precondition=Gram(0.1), name="d_trak")
        method(task)  # the rows are there from now on

        def before():
            with patch.object(gram_room, "_of_full_rank", lambda *_: False), patch.object(gram_room, "_formed", _again):
                return method(task).stderr

        return compared(before, lambda: method(task).stderr, 1 if SMOKE else 3, 1e-6)


def _again(train, dual):
    return (gram_room._of_rows if dual else gram_room._of_columns)(train)


def _by_eigenvectors(train, query, damping):
    """As it was: a whole product for the matrix, its eigenvectors, and every training row along them."""
    matrix = torch.zeros(train.width, train.width, dtype=torch.float64)
    for _, values in train:
        matrix += values.double().T @ values.double()
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0)
    scaled = (query @ vectors) / (values + damping * values.mean())
    return torch.cat([scaled @ (rows.double() @ vectors).T for _, rows in train], dim=1)


def dual():
    """Phi Phi^T of rows that do not fit in memory: 40 shards of exact gradients, all pairs of them and column by column."""
    n, k, per_shard = (40, 200, 1) if SMOKE else (1000, 20_000, 25)
    with tempfile.TemporaryDirectory() as folder:
        train = stored(Path(folder), random_rows(n, k), per_shard)
        held, gram_room.BLOCK_BYTES = gram_room.BLOCK_BYTES, 8 * k * per_shard  # as little as a shard

        def before():
            matrix = torch.zeros(n, n, dtype=torch.float64)
            for number, a in enumerate(train.shards):
                left = train.read(a).double()
                for b in train.shards[number:]:
                    block = left @ train.read(b).double().T
                    matrix[a, b], matrix[b, a] = block, block.T
            return matrix

        try:
            found = compared(before, lambda: gram_room._of_rows(train), 1 if SMOKE else 3)
            found["bytes_read"] = {"before": _read(before), "now": _read(lambda: gram_room._of_rows(train))}
        finally:
            gram_room.BLOCK_BYTES = held
        return found


def _read(work):
    """Bytes of feature rows that are read in some work."""
    count, true = [0], Rows.read

    def counting(rows, at):
        values = true(rows, at)
        count[0] += values.numel() * values.element_size()
        return values

    Rows.read = counting
    try:
        work()
    finally:
        Rows.read = true
    return count[0]


def table():
    """The first 100 images of 20 queries among 200,000, and the sums of 20,000 creators of 40,000 images."""
    m, n, k, creators, few = (2, 200, 10, 20, 40) if SMOKE else (20, 200_000, 100, 20_000, 40_000)
    values, names = random_rows(m, n).double(), [f"i{i}" for i in range(n)]
    found = Scores(values, [f"q{j}" for j in range(m)], names, {})

    def sorted_whole():
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]

    def strongest_of():
        return torch.stack([strongest(row, k) for row in values])

    owner = [f"c{i * 7919 % creators:05d}" for i in range(few)]
    grouped = Scores(values[:, :few], found.query_ids, names[:few], {}, train_meta={"creator": owner})

    def searched():
        groups = sorted(set(owner))
        index = torch.tensor([groups.index(name) for name in owner])
        return torch.zeros(m, len(groups), dtype=values.dtype).index_add_(1, index, values[:, :few])

    return {
        "which are first": compared(sorted_whole, strongest_of, tolerance=1e-300),
        "the whole table": {"now_seconds": round(median(timed(lambda: found.columns(k))[0] for _ in range(ROUNDS)), 4)},
        "group_by": compared(searched, lambda: grouped.group_by("creator").values, 1),
    }


def classifier():
    """TracIn of a 64-64-10 network, two checkpoints, 2,000 training images and 100 queries, beside captum's TracInCP."""
    import captum
    from captum.influence import TracInCP

    n, m = (20, 3) if SMOKE else (2000, 100)
    x, y = random_rows(n + m, 64), torch.arange(n + m) % 10
    points = [
        Checkpoint(partial(small_network, seed), f"classifier {seed}", f"checkpoint-{seed}", seed, 0.1)
        for seed in (1, 2)
    ]
    train, queries = tensor_images(x[:n], labels=y[:n]), tensor_images(x[n:], labels=y[n:])

    def load(network, point):
        network.load_state_dict(point.load().state_dict())
        return point.rate

    def theirs(batch_size):
        data = TensorDataset(x[:n], y[:n])
        found = TracInCP(
            small_network(0),
            data,
            points,
            load,
            loss_fn=torch.nn.CrossEntropyLoss(reduction="none"),
            batch_size=batch_size,
        )
        return found.influence((x[n:], y[n:]))

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            return tracin(cross_entropy, once(), dim=None)(
                Task(Classifier(), points, train, queries, Path(folder))
            ).values

    arms = {f"batches of {size}": compared(lambda b=size: theirs(b), ours, tolerance=1e-4) for size in (16, 500)}
    return {"captum": captum.__version__, **arms}


def sparse():
    """The sparse projection of gradients: a UNet of 0.5 M parameters to 4,096 columns, 128 images at once and one at a time,
    and a 64-64-10 network, 2,000 images."""
    unet = {name: tuple(p.shape) for name, p in new_network(unet_config(16, 3, (24, 56)), 0).named_parameters()}
    small = {name: tuple(p.shape) for name, p in small_network(0).named_parameters()}
    arms = {"UNet, 128": (unet, 128, 4096), "UNet, 1": (unet, 1, 4096), "classifier, 2,000": (small, 2000, 512)}
    found = {}
    for name, (shapes, b, k) in arms.items():
        blocks = {at: torch.randn(b if not SMOKE else 2, *shape) for at, shape in shapes.items()}
        found[name] = compared(
            lambda x=blocks, w=k: _tensor_by_tensor(w, x), lambda x=blocks, w=k: SJLT(w)(x), tolerance=1e-5
        )
    return found


def _tensor_by_tensor(k, blocks):
    """As it was: a bincount per tensor and image, its entries made anew."""
    total = torch.zeros(len(next(iter(blocks.values()))), k)
    for name, block in blocks.items():
        flat = block.reshape(len(block), -1)
        column, sign = SJLT(k).entries(name, flat.shape[1])
        for row, target in zip(flat, total, strict=True):
            target += torch.bincount(column, weights=row * sign, minlength=k)
    return total


def small_network(seed, outputs=10):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, outputs))


PARTS = {part.__name__: part for part in (scores, one_damping, errors, dual, table, classifier, sparse)}


def main():
    torch.set_num_threads(1)
    path = RESULTS / "speed.json"
    found = read_json(path).get("parts", {}) if path.exists() and not SMOKE else {}
    for name in sys.argv[1:] or PARTS:
        question = " ".join(str(PARTS[name].__doc__).split())
        found[name] = {"question": question, **PARTS[name](), "commit": commit(), "load": os.getloadavg()[0]}
        record("speed", {"question": __doc__.splitlines()[0], "parts": found})


if __name__ == "__main__":
    main()
