"""The demo: a small DDPM learns scikit-learn's digits, draws sixteen, and says which digits they came from."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.diffusion.draws import uniform
from whence.task import Request, Sampling, explain
from whence.training.optimizer import AdamW
from whence.training.recipe import New, Recipe, Schedule
from whence.training.runs import train_study
from whence.training.study import Study
from whence.types import Engine

NETWORK = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "add_attention": False,
}
STUDY = Study(Recipe(New(NETWORK), AdamW(2e-3), Schedule(800, 50), batch_size=32, ema=0.995))

IMAGES, PICTURES = 600, 16


def digits(folder: Path, count: int = IMAGES) -> Path:
    """The first `count` digits as an imagefolder with their class in metadata.jsonl."""
    if not folder.exists():
        data = load_digits()
        pixels = torch.tensor(data.images[:count], dtype=torch.float32)[:, None] / 8 - 1
        save_png(folder, pixels, [f"{i:04d}" for i in range(count)], [{"digit": int(y)} for y in data.target[:count]])
    return folder


def demo(folder: Path, engine: Engine = Engine()) -> Path:
    """Train, draw, attribute with D-TRAK, TRAK and raw pixels, and report; returns the path of the report.

    What is there already is used again.
    """
    data, model = digits(folder / "digits"), folder / "model"
    if not (model / "model_index.json").exists():
        train_study(STUDY, image_folder(data, channels=1), model, STUDY.recipe.steps, engine)
    request = Request(model, data, Sampling(PICTURES), folder, engine=engine)
    task = request.task()
    gradients = {"draws": uniform(10), "dim": 1024}
    methods = {"d_trak": gradients, "trak": gradients, "pixel_cosine": {}}
    size = sum(p.numel() for p in request.opened.final.load().parameters())
    facts = {
        "Model": f"DDPM (UNet2DModel, {size:,} parameters), trained here for {STUDY.recipe.steps:,} steps",
        "Training images": f"{len(task.train):,} handwritten digits, 8 x 8 pixels (scikit-learn)",
        "Pictures explained": f"{PICTURES}, drawn by the model with DDIM, 50 steps, seed 0",
    }
    return explain(task, methods, "Which digits made these digits?", facts)
