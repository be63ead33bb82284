"""How much faster is EK-FAC influence of a small convolutional denoiser than with kronfluence 1.0.1?

The same network, images, (timestep, noise) draws (16 per image) and pseudo-gradients, float32, one thread: first factors,
eigenvectors and corrected eigenvalues, then the scores of every query for every training image. kronfluence has no draws:
its data set holds each (image, draw) as an item, made before the clock starts, and its scores are averaged over pairs of
draws afterwards. Each side runs in a process of its own, after a warm-up on two images; memory is the peak over what the
process held before. CPU seconds, because the machine may be shared. Scores must agree to 1e-3, or there is no result.

    OMP_NUM_THREADS=1 python benchmarks/ekfac.py
"""

import copy
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time

os.environ["WHENCE_QUIET"] = "1"

import torch
from torch import nn

from _record import SMOKE, apart, peak_bytes, record
from whence.curvature import factors as fitting
from whence.curvature.kfac import EKFAC
from whence.curvature.layers import layer_parameters
from whence.curvature.solve import Problem
from whence.data.images import subset, tensor_images
from whence.diffusion import outputs
from whence.diffusion.draws import stratified
from whence.diffusion.forward import Denoiser, linear_schedule
from whence.diffusion.noise import seed_for
from whence.features.parts import Gradient
from whence.features.rows import prepare
from whence.methods.inner_product import InnerProduct
from whence.types import Checkpoint, Engine, Task

IMAGES, QUERIES, DRAWS, SIZE, WIDTH, DAMPING, BATCH = 256, 100, 16, 8, 24, 1e-6, 32
if SMOKE:
    IMAGES, QUERIES, DRAWS, WIDTH = 4, 2, 2, 4
RATIOS = ("cpu_seconds", "cpu_seconds_factors", "cpu_seconds_scores", "peak_mib")


class Net(nn.Module):
    """A residual convolutional denoiser with GroupNorm and a time embedding."""

    def __init__(self):
        super().__init__()
        self.time = nn.Linear(2, WIDTH)
        self.into = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.down = nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * WIDTH, WIDTH, 2, stride=2)
        self.out = nn.Conv2d(WIDTH, 1, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, c) for c in (WIDTH, 2 * WIDTH, 2 * WIDTH))

    def forward(self, x, t):
        angle = t.to(x)[:, None] / 1000
        time = self.time(torch.cat([angle.cos(), angle.sin()], dim=1))[:, :, None, None]
        h = torch.tanh(self.norms[0](self.into(x) + time))
        g = torch.tanh(self.norms[1](self.down(h)))
        g = g + torch.tanh(self.norms[2](self.inner(g)))
        return self.out(torch.tanh(self.up(g)) + h)


def world(root):
    torch.manual_seed(0)
    net = Net()
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(IMAGES + QUERIES, 1, SIZE // 4, SIZE // 4, generator=generator)
    x0 = nn.functional.interpolate(x0, SIZE, mode="bilinear").tanh()
    point = Checkpoint(lambda: copy.deepcopy(net), "benchmark")
    forward = Denoiser(linear_schedule())
    task = Task(forward, (point,), tensor_images(x0[:IMAGES]), tensor_images(x0[IMAGES:]), Path(root), Engine())
    return task, Gradient(outputs.loss, stratified(DRAWS), parameters=layer_parameters(net))


def ours(task, part):
    """(fit the factors, score)."""
    method = InnerProduct(part, precondition=EKFAC(DAMPING, absolute=True), name="ek_fac")
    problem = Problem(task, task.trajectory[0], part)
    return lambda: method.precondition.curvature(problem), lambda: method(task).values  # type: ignore[attr-defined]


def theirs(task, part):
    """(fit the factors, score) with kronfluence, on items that are made here."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task as TheirTask

    class Denoising(TheirTask):
        def compute_train_loss(self, batch, model, sample=False):
            x, t, v, target = batch
            prediction = model(x, t)
            return (prediction * v).sum() if sample else outputs.loss.value(prediction, target).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    first, second = (items(task, part, task.train, purpose) for purpose in ("factors", "eigenvalues"))
    queries = items(task, part, task.queries, "factors")
    # A copy: whence shares the network that it has prepared, and kronfluence changes it.
    model = prepare_model(copy.deepcopy(prepare(task.trajectory[0], task.engine)), Denoising())
    folder = str(task.root / "theirs")
    analyzer = Analyzer("x", model, Denoising(), cpu=True, disable_tqdm=True, output_dir=folder, log_level=40)

    def fit():
        analyzer.fit_covariance_matrices("f", first, per_device_batch_size=BATCH)
        analyzer.perform_eigendecomposition("f")
        analyzer.fit_lambda_matrices("f", second, per_device_batch_size=BATCH)

    def score():
        settings = ScoreArguments(damping_factor=DAMPING)
        analyzer.compute_pairwise_scores("s", "f", queries, first, len(queries), BATCH, score_args=settings)
        pairs = analyzer.load_pairwise_scores("s")["all_modules"].double()
        n = len(task.train)
        return pairs.reshape(len(task.queries), DRAWS, n, DRAWS).mean((1, 3)) / n

    return fit, score


def items(task, part, images, purpose):
    """(x_t, t, pseudo-gradient, target) of every image and draw."""
    found = []
    for i in range(len(images)):
        for rows in fitting.passes(images, [i], part.draws, task):
            x_t, target = task.forward(lambda x, t: x, rows.batch, rows.draw)
            seed = seed_for(0, purpose)
            (v,) = fitting.pseudo_gradients(outputs.loss, task.forward, 1, seed, x_t, rows)
            found.append((x_t, rows.draw.t, v, target))
    return torch.utils.data.TensorDataset(*(torch.cat(column) for column in zip(*found, strict=True)))


def one_side(name, folder):
    """Run one side here; scores go to a file, time and memory are returned."""
    torch.set_num_threads(1)
    task, part = world(folder)
    side = ours if name == "whence" else theirs
    two = subset(task.train, [0, 1])
    for step in side(replace(task, train=two, queries=two, root=task.root / "warm"), part):
        step()
    (fit, score), figures, before = side(task, part), {}, peak_bytes()
    for phase, work in (("factors", fit), ("scores", score)):
        start, used = perf_counter(), process_time()
        result = work()
        figures |= {f"seconds_{phase}": perf_counter() - start, f"cpu_seconds_{phase}": process_time() - used}
    figures["cpu_seconds"] = figures["cpu_seconds_factors"] + figures["cpu_seconds_scores"]
    Path(folder, "scores.json").write_text(json.dumps(result.tolist()))
    return {**figures, "peak_mib": (peak_bytes() - before) / 2**20}


def main():
    found, scores = {}, {}
    for name in ("kronfluence", "whence"):
        with tempfile.TemporaryDirectory() as folder:
            found[name] = apart(__file__, one_side, name, folder)
            scores[name] = torch.tensor(json.loads(Path(folder, "scores.json").read_text()), dtype=torch.float64)
    difference = float((scores["whence"] - scores["kronfluence"]).abs().max() / scores["kronfluence"].abs().max())
    if difference > 1e-3:
        raise SystemExit(f"scores differ by {difference}; no result is recorded")
    record(
        "ekfac",
        {
            "question": __doc__.splitlines()[0],
            "images": IMAGES,
            "queries": QUERIES,
            "draws": DRAWS,
            "size": SIZE,
            "parameters": sum(p.numel() for p in Net().parameters()),
            "damping": DAMPING,
            **found,
            **{f"ratio_{what}": found["kronfluence"][what] / (found["whence"][what] or 1) for what in RATIOS},
            "largest_relative_difference": difference,
        },
    )


if __name__ == "__main__":
    print(json.dumps(one_side(*sys.argv[1:]))) if len(sys.argv) > 1 else main()
