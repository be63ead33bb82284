"""What a notebook shows of scores."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from agreement import close
from whence.data.images import tensor_images
from whence.methods.similarity import pixel_dot
from worlds import unet_task


def test_a_notebook_shows_the_pictures_of_a_task(tmp_path):
    """Each as it is: the image of a thumbnail is read back from the page."""
    task = unet_task(tmp_path)
    scores = pixel_dot()(task)
    page = scores._repr_html_()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"[^>]*>([\w-]+)', page)
    assert [name for _, name in found if name.startswith("query")] == list(task.queries.ids)
    for data, name in found:
        side = task.queries if name.startswith("query") else task.train
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=float) / 127.5 - 1
        close(torch.from_numpy(pixels), side.x0[list(side.ids).index(name), 0].double(), 0.01)
    named = {name for _, name in found if name.startswith("train")}
    assert {scores.top(0)[0][0], scores.bottom(1)[0][0]} <= named
    vectors = replace(
        task, train=tensor_images(torch.rand(3, 5)), queries=tensor_images(torch.rand(1, 5)), root=tmp_path / "v"
    )
    page = pixel_dot()(vectors)._repr_html_()
    assert "<img" not in page, "what is no picture has a name all the same"
