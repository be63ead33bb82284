"""How do time and memory grow with the training images, and what does a question to a finished index take?

python benchmarks/growth.py [PART ...]      growth, million and index; a quarter of an hour, 9 GB of disk for the million

growth   A tiny network and tiny images: `d_trak` at k = 512 with --top 100, of 16 queries, for n = 20,000 and 200,000:
         seconds of the processor and the most memory of a process of its own, features and system included; then 256
         queries against the finished features, beside a copy of as many bytes by numpy and the products alone.
million  A million rows at k = 4,096 in bfloat16, made up, with the factor of their first 8,192 in place of all: 16
         queries with --top 100, and the most memory.
index    496 icons by their own network: what the queries' own gradients take, and a second set of pictures asked by
         an open index, medians of five.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from _record import RESULTS, RUNS, SMOKE, peak_bytes, record
from whence.curvature.gram import Primal
from whence.data.images import image_folder, subset, tensor_images
from whence.diffusion.draws import uniform
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.diffusion.outputs import squared_norm
from whence.evaluation.index import Index
from whence.features.parts import Gradient
from whence.features.projections import SJLT
from whence.methods import build
from whence.methods.inner_product import InnerProduct
from whence.methods.strongest import Strongest
from whence.storage.arrays import Store
from whence.task import Request
from whence.types import Checkpoint, Engine, Task

SIZES = (200, 2000) if SMOKE else (20_000, 200_000)
COLUMNS, WIDE, MANY = (16, 32, 3000) if SMOKE else (512, 4096, 1_000_000)
TOP = 5 if SMOKE else 100
TIMES = 1 if SMOKE else 5


class Tiny(nn.Module):
    """A denoiser of 64 numbers, told the timestep."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(65, 32), nn.SiLU(), nn.Linear(32, 64))

    def forward(self, x, t, **_):
        told = torch.cat([x.flatten(1), t[:, None] / 1000], 1)
        return (self.layers(told).reshape(x.shape),)


def made(count, seed):
    return tensor_images(
        torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1,
        [f"{seed}-{i:07d}" for i in range(count)],
        value_range=(-1, 1),
    )


def small_task(root, n, queries):
    torch.manual_seed(0)
    network = Tiny()
    point = Checkpoint(lambda: network, "0" * 64, "model", None, None)
    forward = Denoiser(linear_schedule(1000))
    return Task(forward, (point,), made(n, 1), made(queries, 2), Path(root), Engine(batch_size=256))


def growth_of(root, n):
    """One size, in a process of its own: features, system and scores."""
    began, task = time.process_time(), small_task(root, n, 16)
    method = build("d_trak", task.forward, {"dim": COLUMNS, "draws": uniform(1)})
    scores = Strongest(TOP).score(task, method)
    return {
        "images": n,
        "seconds": time.process_time() - began,
        "peak_bytes": peak_bytes(),
        "kept": len(scores.train_ids),
    }


def against_all(root, n):
    """256 queries against finished features: seconds of the scores, of the products alone, and of a copy."""
    task = small_task(root, n, 256)
    method = build("d_trak", task.forward, {"dim": COLUMNS, "draws": uniform(1)})
    Strongest(TOP).score(task, method)  # the queries' own rows
    began = time.process_time()
    Strongest(TOP).score(task, method)
    whole = time.process_time() - began
    values = torch.randn(n, COLUMNS)
    query = torch.randn(len(task.queries), COLUMNS, dtype=torch.float64)
    began = time.process_time()
    for part in values.split(4096):
        query @ part.double().T
    products = time.process_time() - began
    began = time.process_time()
    np.copyto(np.empty_like(values.numpy()), values.numpy())
    return {"queries": 256, "scores": whole, "products_alone": products, "copy": time.process_time() - began}


# ------------------------------------------------------------------------------------------------------------ a million


class Numbers(Sequence):
    """As many names as there are images, none of them held."""

    def __init__(self, count, form):
        self.count, self.form = count, form

    def __len__(self):
        return self.count

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self.form.format(i) for i in range(*at.indices(self.count))]
        if not 0 <= at < self.count:
            raise IndexError(at)
        return self.form.format(at)


@dataclass(frozen=True)
class Many:
    """Images of which nothing but their number is known."""

    count: int
    labels: None = None
    empty_caption: None = None

    def __len__(self):
        return self.count

    @property
    def ids(self):
        return Numbers(self.count, "{:07d}.png")

    @property
    def digests(self):
        return Numbers(self.count, "{:064x}")

    @property
    def meta(self):
        return {}

    @property
    def preprocess(self):
        return {}

    @property
    def pictures(self):
        return self

    def describe(self):
        return None

    def batch(self, numbers):
        raise NotImplementedError


@dataclass(frozen=True)
class Known:
    """A system whose factor is known: no part of a recipe."""

    damping: float = 1.0
    factor = torch.empty(0, 0)

    def solve(self, problem, train, query, dampings):
        return [Primal(train, query, Known.factor, self.damping)]


@dataclass(frozen=True)
class Made(InnerProduct):
    """Scores of rows that are there: no part of a recipe."""

    there = None

    def read(self, task, checkpoint, where):
        return Made.there


def million(root):
    array = Store(Path(root)).array({"part": "made up"}, (MANY, WIDE), torch.bfloat16, 2**26 // (2 * WIDE))
    base = torch.randn(2 * array.per_shard, WIDE, generator=torch.Generator().manual_seed(0)).bfloat16()
    for at, shard in enumerate(array.shards):
        array.write(shard, base.roll(31 * at, 1)[at % array.per_shard :][: shard.stop - shard.start])
    first = array.block(slice(0, min(2 * WIDE, MANY))).all().double()
    system = first.T @ first + torch.eye(WIDE, dtype=torch.float64)
    torch.save(torch.linalg.cholesky(system), Path(root) / "factor.pt")


def million_asked(root, m=16):
    began = time.process_time()
    array = Store(Path(root)).known({"part": "made up"}, MANY, torch.bfloat16)
    Known.factor = torch.load(Path(root) / "factor.pt")
    point = Checkpoint(lambda: nn.Linear(1, 1), "0" * 64, "model", None, None)
    task = Task(Denoiser(linear_schedule(1000)), (point,), Many(MANY), made(m, 2), Path(root), Engine())
    part = Gradient(squared_norm, uniform(1), SJLT(WIDE))
    asked = torch.randn(m, WIDE, generator=torch.Generator().manual_seed(1)).double()
    Made.there = array, asked
    scores = Strongest(TOP).score(task, Made(part, precondition=Known()))
    return {
        "images": MANY,
        "columns": WIDE,
        "bytes_on_disk": 2 * MANY * WIDE,
        "queries": m,
        "seconds": time.process_time() - began,
        "peak_bytes": peak_bytes(),
        "kept": len(scores.train_ids),
    }


# ----------------------------------------------------------------------------------------------------- a finished index


def index(root, model, data):
    """A second set of pictures, by an open index, beside what their own gradients take."""
    size = 4 if SMOKE else 16
    request = Request(model, data / "train", data / "train", Path(root) / "x", index=Path(root) / "index")
    settings = {"d_trak": {"dim": COLUMNS}}
    Index.build(request, settings)
    opened = Index.open(Path(root) / "index")
    pictures = image_folder(data / "val", opened.request.size, opened.request.opened.channels)
    opened.query(subset(pictures, range(size)))
    found = []
    for number in range(1, TIMES + 1):
        asked = subset(pictures, range(number, number + size))
        task = opened.asking(asked, Path(root) / f"own-{number}").task()
        method = build("d_trak", task.forward, settings["d_trak"])
        assert isinstance(method, InnerProduct)
        began = time.process_time()
        method.query_halves(task, task.trajectory[-1], "")
        own = time.process_time() - began
        began = time.process_time()
        opened.query(asked, root=Path(root) / f"asked-{number}")
        found.append({"own_gradients": own, "question": time.process_time() - began})
    ratio = statistics.median(each["question"] / each["own_gradients"] for each in found)
    return {"images": len(opened.request.train_images), "queries": size, "runs": found, "ratio": ratio}


def apart(part, *words):
    """A part in a process of its own, whose memory is that of it alone."""
    if SMOKE:
        return globals()[part](*words) or {}
    command = [sys.executable, __file__, *(["--smoke"] if SMOKE else []), "=", part, *map(str, words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def growth(root):
    sizes = [apart("growth_of", Path(root) / str(n), n) for n in SIZES]
    few, many = sizes
    return {
        "sizes": sizes,
        "time_ratio": many["seconds"] / few["seconds"],
        "more_memory_bytes": many["peak_bytes"] - few["peak_bytes"],
        "against_all": apart("against_all", Path(root) / str(SIZES[-1]), SIZES[-1]),
    }


def main(asked):
    known = RESULTS / "growth.json"
    found = json.loads(known.read_text()) if known.exists() else {}
    with tempfile.TemporaryDirectory(dir=RUNS if RUNS.is_dir() else None) as folder:
        root = Path(folder)
        if "growth" in asked:
            found["growth"] = growth(root / "growth")
        if "million" in asked:
            (root / "million").mkdir()
            apart("million", root / "million")
            found["million"] = apart("million_asked", root / "million")
            shutil.rmtree(root / "million")
        if "index" in asked:
            found["index"] = index(root, *place(root))
    parts = {name: found[name] for name in PARTS if name in found}
    record("growth", {"question": __doc__.split("\n")[0], **parts})


def place(root):
    """A network of icons and their folder; in smoke one of digits that was hardly trained."""
    if not SMOKE:
        return RUNS / "bench-icons" / "model", Path("../shared/data/icons")
    from _record import whence
    from whence.data.saving import save_png

    for side, seed in (("train", 0), ("val", 1)):
        images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        save_png(root / "data" / side, images, [f"{i:02d}" for i in range(24)])
    options = ("--resolution", 8, "--block_out_channels", "8,8", "--max_train_steps", 1, "--channels", 1)
    done = whence("train", "new", "--train_data_dir", root / "data" / "train", "--output_dir", root / "model", *options)
    assert done.code == 0, done.err
    return root / "model", root / "data"


PARTS = ("growth", "million", "index")

if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1:]
    if words[:1] == ["="]:
        part, folder, *sizes = words[1:]
        answer = globals()[part](folder, *map(int, sizes))
        print(
            json.dumps(answer if isinstance(answer, dict) else {"peak_bytes": resource.getrusage(0).ru_maxrss * 1024})
        )
    else:
        main(words or PARTS)
