"""Content credentials: what files say of training on them. c2pa-python is no dependency: a stand-in with its interface, and
with the structure that version 0.38 was seen to return for a signed file."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import refuses
from test_cli import refused, succeeds
from test_credit import scores
from whence.data.credentials import forbidden, training_use
from whence.storage.scores import save_scores


class C2paError(Exception):
    """Everything that goes wrong."""


class ManifestNotFound(C2paError):
    """The file has none."""


class Reader:
    """Of files that hold the JSON which the library would return."""

    def __init__(self, path: str):
        self.text = Path(path).read_text()
        if not self.text:
            raise ManifestNotFound("no JUMBF data found")
        if self.text == "damaged":
            raise C2paError("asset could not be parsed")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def json(self) -> str:
        return self.text


@pytest.fixture
def c2pa(monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", SimpleNamespace(Reader=Reader, C2paError=C2paError))


def store(*assertions: tuple[str, dict[str, str]]) -> str:
    found = [
        {"label": label, "data": {"entries": {name: {"use": use} for name, use in entries.items()}}}
        for label, entries in assertions
    ]
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [{"action": "c2pa.created"}]}}
    older = {"assertions": [{"label": LABEL, "data": {"entries": {"cawg.ai_training": {"use": "notAllowed"}}}}]}
    return json.dumps(
        {"active_manifest": "urn:1", "manifests": {"urn:0": older, "urn:1": {"assertions": [actions, *found]}}}
    )


LABEL = "cawg.training-mining"
FILES = {
    "none.png": ("", ""),
    "silent.png": (store(), ""),
    "mining.png": (store((LABEL, {"cawg.data_mining": "notAllowed", "cawg.ai_inference": "notAllowed"})), ""),
    "allowed.png": (store((LABEL, {"cawg.ai_training": "allowed"})), "allowed"),
    "cawg.png": (
        store((LABEL, {"cawg.ai_generative_training": "notAllowed", "cawg.ai_training": "allowed"})),
        "notAllowed",
    ),
    "c2pa.png": (store(("c2pa.training-mining", {"c2pa.ai_training": "constrained"})), "constrained"),
    "second.png": (
        store((LABEL, {"cawg.ai_training": "allowed"}), (f"{LABEL}__1", {"cawg.ai_training": "notAllowed"})),
        "notAllowed",
    ),
    "unknown.png": (store((LABEL, {"cawg.ai_training": "perhaps"})), ""),
}


@pytest.fixture
def folder(tmp_path):
    for name, (text, _) in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_what_files_say(c2pa, folder):
    """The strictest entry about training in the active manifest; mining and inference are something else."""
    assert {name: training_use(folder / name) for name in FILES} == {name: use for name, (_, use) in FILES.items()}
    assert forbidden(folder, list(FILES)) == {"cawg.png", "c2pa.png", "second.png"}


def test_what_cannot_be_read_is_refused(c2pa, folder):
    (folder / "cut.png").write_text("damaged")
    with refuses("its content credentials cannot be read (asset could not be parsed)", str(folder / "cut.png")):
        training_use(folder / "cut.png")
    with refuses("this is no folder of them", str(folder / "none.png"), "a folder"):
        forbidden(folder / "none.png", ["a"])


def test_without_the_library_it_is_said_how_to_have_it(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with refuses("needs c2pa-python", "c2pa", "`pip install c2pa-python`"):
        training_use(folder / "none.png")


def test_credit_lists_them(c2pa, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save_scores(run / "scores/trak", scores())
    refused("credit", run, "--not_allowed", "c2pa", says="does not say where its images are")
    noted = SimpleNamespace(folder=tmp_path, images=SimpleNamespace(ids=list("abcde")))
    monkeypatch.setattr("whence.evaluation.receipts.noted_images", lambda *_: noted)
    for name in "abcde":
        (tmp_path / name).write_text(FILES["cawg.png" if name == "b" else "none.png"][0])
    said = succeeds("credit", run, "--not_allowed", "c2pa").out
    assert "not allowed, and rank 1 of q1 by trak: b" in said
    (tmp_path / "b").write_text("")
    said = succeeds("credit", run, "--not_allowed", "c2pa").out
    assert "no image that was not to be trained on is among the ten strongest" in said
