"""A method of one's own, by its path: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import whence
from errors import refuses
from whence.methods import METHODS, entry, method, settings_of
from whence.methods.registry import ONE_PASS

OWN = """
import torch
from whence.types import Scores

def nothing(level=0.0):
    def score(task):
        values = torch.full((len(task.queries), len(task.train)), level, dtype=torch.float64)
        return Scores(values, task.queries.ids, task.train.ids, {})
    return score

def bare(task):
    return nothing(1.0)(task)

seven = 7
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


def scores_of(path: str, **settings: float) -> torch.Tensor:
    net, forward = torch.nn.Conv2d(1, 1, 1), whence.Denoiser(torch.linspace(0.9, 0.1, 10))
    return whence.attribute((net, forward), torch.zeros(3, 1, 2, 2), -torch.ones(2, 1, 2, 2), path, **settings).values


def test_settings_are_read_from_the_function(own):
    assert settings_of(f"{own}:nothing") == {"level": 0.0}
    assert (scores_of(f"{own}:nothing", level=2.0) == 2.0).all()


def test_a_function_of_a_task_is_a_method(own):
    assert (scores_of(f"{own}:bare") == 1.0).all()


@pytest.mark.parametrize("path", ["no_such_module:f", "{own}:no_such_function", "{own}:", ":f"])
def test_what_cannot_be_imported(path, own):
    with refuses("cannot be imported", accepted="package.module:function"):
        entry(path.format(own=own))


def test_what_is_no_method(own):
    with refuses("is a int, no method"):
        entry(f"{own}:seven")


def test_a_path_to_one_of_ours_is_ours():
    assert entry("whence.methods.trak:d_trak") is METHODS["d_trak"]


def test_no_name_is_given_twice():
    with refuses("'trak'"):
        method("nobody", None, ONE_PASS)(METHODS["trak"].make)
