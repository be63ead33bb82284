"""The demo: a small model learns scikit-learn's digits and draws ten, three methods say which digits they came from, and
training again without these says which method was right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from whence.data.saving import save_png
from whence.diffusion.draws import uniform
from whence.evaluation.taken_away import Taking, take_away
from whence.storage.files import write_json
from whence.storage.scores import load_scores
from whence.task import REMOVED, Request, Sampling, drawing, explain, report_again
from whence.training.optimizer import AdamW
from whence.training.recipe import New, NoiseSchedule, Recipe, Schedule
from whence.training.runs import Pictures, train
from whence.types import Engine

NETWORK = {"_class_name": "MLPDenoiser", "sample_size": 8, "in_channels": 1, "width": 96, "layers": 2}
# One that predicts the digit, not the noise: so small a network then draws them without a grain.
NOISE = NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
RECIPE = Recipe(
    New(NETWORK, NOISE), AdamW(3e-3, beta1=0.9), Schedule(400, 50), batch_size=32, max_grad_norm=0.0, ema=0.99
)
IMAGES, PICTURES = 512, 10
# Draws cost little here: with fifty another run names nearly the same images, which with ten it does not.
METHODS: dict[str, dict[str, object]] = {
    "averaged_metagradient": {"masks": 2, "pairs": False},
    "d_trak": {"draws": uniform(50), "dim": 2048},
    "pixel_cosine": {},
}


@dataclass(frozen=True)
class Demo:
    """What came of it.

    Args:
        report: the page.
        said: which method was right.
        basis: what that rests on.
    """

    report: Path
    said: str
    basis: str


def digits(folder: Path, count: int = IMAGES) -> Path:
    """The first `count` digits as an imagefolder with their class in metadata.jsonl."""
    if not folder.exists():
        data = load_digits()
        pixels = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 8 - 1
        save_png(folder, pixels, [f"{i:04d}" for i in range(count)], [{"digit": int(y)} for y in data.target[:count]])
    return folder


def demo(folder: Path, engine: Engine = Engine(), pictures: int = PICTURES, taking: Taking = Taking()) -> Demo:
    """Train, draw, attribute, take away what was named and train again, and report. What is there already is used again.

    Args:
        folder: of the work.
        engine: how it is carried out.
        pictures: to draw.
        taking: how much is left out.
    """
    data = digits(folder / "digits")
    study = train(RECIPE, Pictures(data), folder / "model", RECIPE.steps, engine)
    how = Sampling(pictures)
    request = Request(folder / "model", data, how, folder, engine=engine)
    task = request.task()
    size = sum(p.numel() for p in request.opened.final.load().parameters())
    facts = {
        "Model": f"diffusion model ({size:,} parameters), trained here for {RECIPE.steps:,} steps",
        "Training images": f"{len(task.train):,} handwritten digits, 8 x 8 pixels (scikit-learn)",
        "Pictures explained": f"{pictures}, drawn by the model with DDIM, 50 steps, seed 0",
    }
    explain(task, METHODS, "Which digits made these digits?", facts)
    scores = {name: load_scores(folder / "scores" / name) for name in METHODS}
    draw, sides = drawing(request.opened, how, engine), (task.train, task.queries)
    found = take_away(taking, study, sides, scores, draw, folder / "without", engine)
    write_json(folder / REMOVED, found)
    return Demo(report_again(folder), found["said"], found["basis"])
