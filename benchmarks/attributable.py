"""Are pictures that lean on single training images found, and are others left alone?

python benchmarks/attributable.py      ten minutes of one core

A model of the digits bank's kind, trained on 400 digits of which ten stand there 20 times each (planted). Asked about: the
planted digits, slightly changed, and 40 held-out ones; references: 200 other held-out digits. For every method and
statistic: power (planted ones that stand out at a false discovery rate of .1), false discoveries, and whether the p-values
of held-out digits are uniform (Kolmogorov & Smirnov, 200 draws of which held-out digit is asked about beside the others).
The statistic was chosen on other digits, planted and held out.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kstest

from _record import RUNS, SMOKE, digits, record
from whence.data.images import tensor_images
from whence.evaluation.banks import digit_images
from whence.methods import build
from whence.models import open_model
from whence.report.attributable import STATISTICS, attributability
from whence.training.runs import train_study
from whence.types import Engine, Task

METHODS = ("pixel_cosine", "output_cosine", "gradient_cosine", "trak", "relatif_loss", "d_trak", "ek_fac")
RATE, ENGINE = 0.1, Engine(budget=2**31)
SINGLE, PLANTED, TIMES, ASKED, REFERENCES, DRAWS = 200, 10, 20, 40, 200, 200
if SMOKE:
    METHODS, SINGLE, PLANTED, TIMES, ASKED, REFERENCES, DRAWS = ("pixel_cosine", "ek_fac"), 12, 2, 3, 4, 12, 5


def changed(x0):
    """Pictures with a little noise on them: what a model that copies draws is no byte-identical file."""
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    return (x0 + 0.1 * noise).clamp(-1, 1)


def world(folder):
    """The training images with planted ones, the model, and what is asked about."""
    pixels = digit_images(400, 400 + SINGLE + PLANTED)
    x0 = pixels.batch(range(len(pixels))).x0
    planted = x0[SINGLE:]
    # Each copy is a file of its own: the noise of an image is keyed by its content, and equal files would share it.
    tiny = 1e-3 * torch.randn(PLANTED * TIMES, *planted.shape[1:], generator=torch.Generator().manual_seed(1))
    train = tensor_images(torch.cat([x0[:SINGLE], (planted.repeat_interleave(TIMES, 0) + tiny).clamp(-1, 1)]))
    others = digit_images(1100, 1100 + ASKED + REFERENCES)
    held = others.batch(range(len(others))).x0
    study = digits().study
    if not (folder / "model/scheduler").exists():
        train_study(study, train, folder / "model", study.recipe.steps, ENGINE)
    model = open_model(folder / "model")
    queries = tensor_images(torch.cat([changed(planted), held]))
    return Task(model.forward, (model.final,), train, queries, folder / "run", ENGINE)


def uniform(values, statistic):
    """The p-value of Kolmogorov & Smirnov for p-values of held-out pictures, one of each draw, jittered in their steps."""
    rng, found = np.random.default_rng(0), []
    for _ in range(DRAWS):
        order = rng.permutation(len(values))
        p = attributability(values[order[:1]], values[order[1:]], statistic, RATE).p[0]
        found.append(p - rng.uniform(0, 1 / len(values)))
    return float(kstest(found, "uniform").pvalue)


def main(folder):
    task, result = world(folder), {}
    for name in METHODS:
        scores = build(name, task.forward, {})(task).values.double().numpy()
        planted, asked, held = scores[:PLANTED], scores[PLANTED : PLANTED + ASKED], scores[PLANTED + ASKED :]
        result[name] = {}
        for statistic in STATISTICS:
            found = attributability(np.concatenate([planted, asked]), held, statistic, RATE)
            out = np.array(found.stands_out)
            result[name][statistic] = {
                "power": float(out[:PLANTED].mean()),
                "false discoveries": float(out[PLANTED:].sum() / max(out.sum(), 1)),
                "uniform": uniform(np.concatenate([asked, held]), statistic),
            }
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    if SMOKE:
        with tempfile.TemporaryDirectory() as folder:
            found = main(Path(folder))
    else:
        found = main(RUNS / "attributable")
    sizes = {"planted": PLANTED, "times": TIMES, "asked": ASKED, "references": REFERENCES, "rate": RATE}
    record("attributable", {"question": __doc__.split("\n")[0], **sizes, "methods": found})
