"""Captions in columns of other names, on one side or on both."""

from __future__ import annotations

from pathlib import Path

import pytest

from families import save_whole
from test_cli import refused, succeeds
from test_encode import CAPTIONS, pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("captions")
    save_whole("sd", root / "sd")
    for column in ("text", "caption"):
        pictures(root / f"train-{column}", CAPTIONS, column=column)
        pictures(root / f"queries-{column}", ["a cat"], seed=1, column=column)
    (root / "prompts.txt").write_text("a cat\ntwo birds\n")
    return root


SIDES = [
    # column of the training images, of the pictures, options
    ("caption", "caption", ("--caption_column", "caption")),
    ("caption", "text", ("--caption_column", "caption", "--query_caption_column", "text")),
    ("text", "caption", ("--query_caption_column", "caption")),
    ("caption", None, ("--caption_column", "caption")),
    ("caption", None, ("--caption_column", "caption", "--query_caption_column", "text")),
    ("text", None, ()),
]


def command(world: Path, out: Path, train: str, queries: str | None) -> tuple[object, ...]:
    drawn = ("--generate", 2, "--prompts", world / "prompts.txt", "--num_inference_steps", 2)
    given = drawn if queries is None else ("--query_data_dir", world / f"queries-{queries}")
    return ("attribute", world / "sd", "--train_data_dir", world / f"train-{train}", *given, "--output_dir", out,
            "--resolution", 8, "--draws", 3, "--dim", 8, "--parameters", "cross-attention-kv")  # fmt: skip


@pytest.mark.parametrize(("train", "queries", "options"), SIDES)
def test_a_column_for_each_side(train, queries, options, world, tmp_path):
    assert "report:" in succeeds(*command(world, tmp_path / "run", train, queries), *options).out
    if queries is not None:
        given = ("--query_data_dir", world / f"queries-{queries}", "--train_data_dir", world / f"train-{train}")
        succeeds("doctor", world / "sd", *given, "--resolution", 8, *options)
    replayed = succeeds("replay", tmp_path / "run" / "scores" / "das")
    assert "das" in replayed.out + replayed.err


def test_captions_are_missed_before_pictures_are_drawn(world, tmp_path):
    refused(*command(world, tmp_path / "run", "caption", None), says="no column 'text' .*caption.*--caption_column")
    wrong = ("--caption_column", "caption", "--query_caption_column", "caption")
    refused(*command(world, tmp_path / "run", "caption", None), *wrong, says="drawn pictures have no column 'caption'")
    assert not (tmp_path / "run" / "generated").exists()
