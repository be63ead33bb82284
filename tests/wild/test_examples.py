"""The examples run as they are written, and the notebooks beside them are these scripts, run."""

from __future__ import annotations

import json
import os
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from forks import forked
from whence.data.saving import save_png

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNNER = runpy.run_path(str(EXAMPLES / "run.py"))
NAMES = RUNNER["SCRIPTS"]
LONG = ("own_ddpm", "own_lora")
"""Half a minute and more: run by `make bench`, which sets WHENCE_LONG."""
LARGEST = 200_000  # bytes of a notebook: small enough to read and to review


def kept(name: str) -> list[dict[str, object]]:
    return json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_and_prints_what_its_notebook_shows(name, tmp_path):
    """The same cells print, and nothing else does; numbers may round otherwise on another machine."""
    if name in LONG and "WHENCE_LONG" not in os.environ:
        pytest.skip("long: `make bench` runs it")

    def work() -> None:
        os.environ.pop("ICONS", None)
        os.chdir(tmp_path)
        made = RUNNER["notebook"]((EXAMPLES / f"{name}.py").read_text())
        Path("made.json").write_text(json.dumps(made))

    done = forked(work, tmp_path / "log")
    assert done.code == 0, done.told[-3000:]
    made = json.loads((tmp_path / "made.json").read_text())["cells"]
    there = kept(name)
    assert [cell["source"] for cell in made] == [cell["source"] for cell in there], (
        f"run: python examples/run.py {name}"
    )
    kinds = [
        [[output["output_type"] for output in cell.get("outputs", [])] for cell in cells] for cells in (made, there)
    ]
    assert kinds[0] == kinds[1]
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_small_and_whole(name):
    """What any reader of notebooks asks for, version 4.5; no path of the machine that made it."""
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < LARGEST
    found = json.loads(path.read_text())
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    for cell in found["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == (wanted | {"execution_count", "outputs"} if cell["cell_type"] == "code" else wanted)
    assert "/work/" not in path.read_text()
    assert str(Path.home()) not in path.read_text()


def test_credit_takes_a_folder_of_icons(tmp_path, monkeypatch):
    """The three creators with the most, at 16 pixels; of each every eighth picture is asked about."""
    creators = ["anna"] * 9 + ["ben"] * 10 + ["carla"] * 3 + ["dora"] * 8
    x = torch.rand(30, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    facts = [{"creator": creator} for creator in creators]
    monkeypatch.setenv("ICONS", str(save_png(tmp_path, x, [f"{i:02d}" for i in range(30)], facts)))
    names: dict[str, Any] = {}
    first = [content for kind, content in RUNNER["cells"]((EXAMPLES / "credit_icons.py").read_text()) if kind == "code"]
    for content in first[:2]:
        RUNNER["outputs"](content, names, 1)
    assert names["owned"] == {"anna": 7, "ben": 8, "dora": 7}
    assert names["asked"].meta["creator"].count("ben") == 2
    assert names["train"].batch([0]).x0.shape == (1, 1, 16, 16)


def test_cells_are_told_apart():
    text = "# %% [markdown]\n# # Title\n#\n# text\n\n# %%\na = 1\nprint(a)\na + 1\n"
    assert RUNNER["cells"](text) == [("markdown", "# Title\n\ntext"), ("code", "a = 1\nprint(a)\na + 1")]
    printed, value = RUNNER["notebook"](text)["cells"][1]["outputs"]
    assert printed["text"] == "1\n"
    assert value["data"] == {"text/plain": "2"}
