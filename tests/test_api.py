"""The public names: all there, under one roof, and nothing is imported before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import whence

HEAVY = ("torch", "diffusers", "transformers", "matplotlib", "pyarrow", "sklearn")
LIGHT = ["import whence", "import whence.cli.main", "from whence.cli.main import app"]


@pytest.mark.parametrize("statement", LIGHT)
def test_nothing_heavy_is_imported_before_it_is_used(statement):
    asked = f"{statement}; import sys; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in whence.__all__:
        assert getattr(whence, name) is not None
    assert {*whence.__all__} <= {*dir(whence)}


def test_every_method_is_in_one_namespace():
    for name, entry in whence.METHODS.items():
        assert (
            name in {"metagradient", "averaged_metagradient", "further_training", "montrage_style"}
            or getattr(whence.methods, name) is entry.make
        )


def test_no_bare_words_at_the_top():
    assert not {"random", "fixed", "subset", "density", "cumulative"} & {*dir(whence)}


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = whence.nonsense
