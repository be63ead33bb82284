"""A world for all files of this folder: a trained model, its images and pictures to explain."""

from __future__ import annotations

import pytest

from test_cli import QUERIES, TRAINING, World, noise, succeeds
from whence.data.saving import save_png

IMAGES = 12  # the commands of this folder run hundreds of times


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> World:
    world = World(tmp_path_factory.mktemp("small"))
    creators = [{"creator": "anna" if i % 3 else "ben"} for i in range(IMAGES)]
    save_png(world.images, noise(IMAGES, 0), [f"{i:02d}" for i in range(IMAGES)], creators)
    save_png(world.queries, noise(QUERIES, 1), [f"q{i}" for i in range(QUERIES)])
    succeeds("train", "new", "--train_data_dir", world.images, "--output_dir", world.model, *TRAINING)
    return world
