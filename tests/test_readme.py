"""The README says nothing that is not so: its Python runs, its commands parse, its tables are what the program prints.

`python tests/test_readme.py` writes the table of methods into it.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import whence
from whence.cli import main as cli
from whence.data.saving import save_png
from whence.models import new_network, new_scheduler, save_pipeline
from whence.training.study import unet_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
START, END = "<!-- whence methods --markdown -->\n", "<!-- end -->"


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def output_of(*arguments: str) -> str:
    out = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["whence", *arguments]),
        contextlib.redirect_stdout(out),
        pytest.raises(SystemExit) as stop,
    ):
        cli.main()
    assert not stop.value.code
    return out.getvalue()


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with the model and the images that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    network = new_network(unet_config(8, 3, (8, 8)), 0)
    save_pipeline(Path("ddpm"), network, network.state_dict(), new_scheduler(1000, "linear", "epsilon"))
    x0 = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_png("images", x0[:8], [f"{i}" for i in range(8)], [{"creator": "ab"[i % 2]} for i in range(8)])
    save_png("queries", x0[8:], ["first", "second"])
    return tmp_path


def test_python_runs(home):
    """All blocks, one after the other, as somebody would type them."""
    names: dict[str, object] = {}
    assert len(blocks("python")) >= 5
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
        scores = names["scores"]
        assert isinstance(scores, whence.Scores)
        assert torch.isfinite(scores.values).all()
        assert len(scores.top(0)) > 0
    assert (home / "scores.parquet").is_file()
    assert len(names["several"]) == 3


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_runs_twice_and_by_itself(page, home):
    """Each block alone, where it says what it needs, and all of them once more in the same folder: nothing is refused."""
    words = ["train", "new", "--train_data_dir", "images", "--output_dir", "trained", "--max_train_steps", "4"]
    output_of(*words, "--block_out_channels", "8,8", "--lr_warmup_steps", "1", "--checkpointing_steps", "2")
    shutil.rmtree("ddpm")
    Path("trained").rename("ddpm")
    text = (ROOT / page).read_text()
    for _ in range(2):
        names: dict[str, object] = {}
        for block in blocks("python", text):
            exec(compile(block, page, "exec"), names)
    for block in blocks("python", text):
        if "import" in block:
            exec(compile(block, page, "exec"), {})


PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
LINES = [line for page in PAGES for block in blocks("bash", page) for line in block.splitlines()]
EVERY = cli.every_command()
COMMANDS = sorted({line.split("#")[0].strip() for line in LINES if line.strip()})


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_understood(line):
    """Each option exists and takes the value given to it; targets of make are in the Makefile."""
    program, *words = shlex.split(line)
    if program == "make":
        assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in words)
        return
    assert program == "whence"
    if words[0] == "train" and words[1].endswith(".toml"):  # as the group of verbs reads it
        words.insert(1, "recipe")
    path = next(path for path in EVERY if tuple(words[: len(path)]) == path)
    EVERY[path].make_context(path[-1], words[len(path) :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.splitlines()[0])
def test_options_named_in_the_text_exist(page):
    """`--option` outside of the blocks."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    every = {option for command in EVERY.values() for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"`(--\w+)", text))
    assert named <= every | {"--help"}


def test_table_of_methods_is_the_one_printed():
    table = README.split(START)[1].split(END)[0]
    assert table == output_of("methods", "--markdown"), "run: python tests/test_readme.py"


def test_every_method_has_its_place_in_the_docs():
    headings = re.findall(r"^## (\S+)$", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert headings[: len(whence.METHODS)] == list(whence.METHODS), "run: python docs/methods.py"


def test_run_folder_is_described(home):
    """Everything in it, and nothing else."""
    words = ["attribute", "ddpm", "--train_data_dir", "images", "--output_dir", "run", "--method", "pixel_cosine"]
    output_of(*words, "--generate", "1", "--num_inference_steps", "2")
    table = README.split("## What is in a run folder")[1].split("\n## ")[0]
    first = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name.rstrip("/") for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    later = {"curvature", "lds.json"}  # by methods that measure one, and by `whence lds`
    assert {name.split("/")[0] for name in named} == {path.name for path in (home / "run").iterdir()} | later
    found = {path.name for path in (home / "run/scores/pixel_cosine").iterdir()}
    assert {name.removeprefix("scores/METHOD/") for name in named if "METHOD" in name} == found


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_every_exported_name_is_there():
    assert len(set(whence.__all__)) == len(whence.__all__)
    for name in whence.__all__:
        assert getattr(whence, name) is not None
    with pytest.raises(AttributeError, match="module 'whence' has no attribute 'atribute'"):
        whence.atribute  # noqa: B018


def main() -> None:
    table = output_of("methods", "--markdown")
    head, rest = README.split(START)
    (ROOT / "README.md").write_text(head + START + table + END + rest.split(END, 1)[1])


if __name__ == "__main__":
    main()


@pytest.mark.parametrize("heading", ["What to rely on", "Limits", "Methods"])
def test_every_claim_names_what_carries_it(heading):
    """The files that a section names are there, and each of its points names one, or a page that does."""
    (section,) = re.findall(rf"(?s)\n## {heading}\n(.*?)(?=\n## |\Z)", README)
    named = re.findall(r"(?:tests|benchmarks|docs)/[\w/.-]+\.\w+", section)
    assert named
    assert [path for path in named if not (ROOT / path).is_file()] == []
