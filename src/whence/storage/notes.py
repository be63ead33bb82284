"""What stands beside scores on disk: <run>/scores/<method>/scores.json, written last. Reading it needs no torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from whence.plain import WhenceError
from whence.storage.files import read_json
from whence.storage.jsons import refuse_unexpected, whole
from whence.storage.owned import MANIFEST

FORMAT_VERSION = 1
AGAIN = "run the command that made the scores once more"


class NoteOfImages(TypedDict):
    """What images.json says of one side of a run."""

    folder: str
    classes: list[str] | None
    pictures: str
    seen: str
    resolution: int | None
    channels: int
    by: NotRequired[str]
    players: NotRequired[list[str]]


class NoteOfWhole(TypedDict):
    """What scores.json says of the scores that were not kept; the numbers lie in scores.safetensors.

    groups: column -> names of its groups.
    """

    count: int
    groups: dict[str, list[str]]


class Notes(TypedDict):
    """What scores.json holds. files: digests of what lies beside it (earlier versions noted none)."""

    format_version: int
    query_ids: list[str]
    train_ids: list[str]
    train_meta: dict[str, list[Any]]
    recipe: dict[str, Any]
    scale: str
    signed: bool
    stderr_of: NotRequired[str]
    whole: NotRequired[NoteOfWhole]
    files: NotRequired[dict[str, str]]


BESIDE = ("scores.safetensors", "top.parquet")
"""The files that scores.json has the digests of."""


def scored(run: Path) -> dict[str, Path]:
    """Method -> its folder of finished scores in a run folder; refuses a folder that has none, tells of unfinished ones."""
    found = {path.parent.name: path.parent for path in sorted(run.glob("scores/*/scores.json"))}
    if not found:
        raise no_scores(run, f"--output_dir {run}", run.parent.parent if (run / "scores.json").is_file() else None)
    begun = {path.parent for name in BESIDE for path in run.glob(f"scores/*/{name}")} - {*found.values()}
    for folder in sorted(begun):
        told = f"{folder} holds no scores.json: its scores are not finished, or lost, and are left out"
        warnings.warn(told, stacklevel=3)
    return found


def no_scores(folder: Path, how: str, instead: Path | None) -> WhenceError:
    """No scores here; `instead`: where people mean, who give a run folder for the scores of a method, or these for it."""
    accepted = f"{instead}" if instead is not None else f"what `whence attribute ... {how}` has finished"
    return WhenceError("holds no finished scores", str(folder), accepted)


def notes_of(folder: Path) -> dict[str, Any]:
    """What the scores.json of RUN/scores/METHOD says."""
    path = folder / "scores.json"
    found = read_json(path, dict, AGAIN)
    if whole(number := found.get("format_version")) and number > FORMAT_VERSION:
        raise WhenceError(f"{folder}: written by a newer whence (format {number}); upgrade to read it")
    refuse_unexpected(found, Notes, str(path), AGAIN)
    return cast("dict[str, Any]", found)


def last_models(recipe: Mapping[str, Any]) -> list[str]:
    """The digests of the models, as their training left them, that scores were computed of; nothing where they are of single
    checkpoints, of other trainings or of pictures, or where the recipe does not say."""
    method, found = recipe.get("method"), recipe.get("checkpoints", [])
    if not isinstance(method, Mapping):  # in Python people may note anything
        return []
    encoder = (method.get("train") or {}).get("encoder")
    if encoder is not None and encoder.get("is") != "Layers":  # it looks at pictures alone, whatever the model
        return []
    one = found if recipe.get("eta") == [1.0] else []
    return list(found if method.get("aggregate") in ("last", "mean") else one)


def of_other_model(run: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether scores are certainly of another model than the run folder that they lie in.

    Args:
        run: the folder.
        recipe: of the scores.
    """
    note = read_json(run / MANIFEST, dict) if (run / MANIFEST).is_file() else {}
    models = last_models(recipe)
    return bool(models) and note.get("model", models[0]) not in models
