"""Scores on disk: <run>/scores/<method>/ holds scores.safetensors, scores.json (recipe) and top.parquet."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from whence.storage.arrays import read_checked, write_checked
from whence.storage.columns import as_parquet, plain_columns
from whence.storage.files import file_digest, read_json, telling, write_bytes, write_json
from whence.storage.jsons import refuse_unexpected, whole
from whence.types import Scores, WhenceError, describe, expect

FORMAT_VERSION = 1
AGAIN = "run the command that made the scores once more"


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
    files: NotRequired[dict[str, str]]


def save_scores(folder: str | Path, scores: Scores, k: int = 100) -> None:
    """Write scores, their recipe, and a Parquet table of the strongest.

    Args:
        folder: where they are written.
        scores: [m, n].
        k: proponents of each query in the table.
    """
    expect(scores, Scores, "scores", "save_scores(folder, scores)")
    expect(folder, (str, Path), "folder", "save_scores(folder, scores)")
    folder = Path(folder)
    # Metadata is what people have; it was read as columns that can be saved, but images in memory bring their own.
    scores = replace(scores, train_meta=plain_columns(scores.train_meta))
    tensors = {"values": scores.values} if scores.stderr is None else {"values": scores.values, "stderr": scores.stderr}
    write_checked(folder / "scores.safetensors", tensors)
    to_parquet(scores, folder / "top.parquet", k)
    rows = {"query_ids": list(scores.query_ids), "train_ids": list(scores.train_ids), "train_meta": scores.train_meta}
    facts = {"recipe": describe(scores.recipe), "scale": scores.scale, "signed": scores.signed}
    if scores.stderr_of:
        facts["stderr_of"] = scores.stderr_of
    facts["files"] = {name: file_digest(folder / name) for name in BESIDE}
    # Written last: scores without it are not finished.
    write_json(folder / "scores.json", {"format_version": FORMAT_VERSION, "positive": "proponent", **facts, **rows})


BESIDE = ("scores.safetensors", "top.parquet")
"""The files that scores.json has the digests of."""


def scored(run: Path) -> dict[str, Path]:
    """Method -> its folder of finished scores in a run folder; refuses a folder that has none, tells of unfinished ones."""
    found = {path.parent.name: path.parent for path in sorted(run.glob("scores/*/scores.json"))}
    if not found:
        raise _no_scores(run, f"--output_dir {run}", run.parent.parent if (run / "scores.json").is_file() else None)
    begun = {path.parent for name in BESIDE for path in run.glob(f"scores/*/{name}")} - {*found.values()}
    for folder in sorted(begun):
        told = f"{folder} holds no scores.json: its scores are not finished, or lost, and are left out"
        warnings.warn(told, stacklevel=3)
    return found


def _no_scores(folder: Path, how: str, instead: Path | None) -> WhenceError:
    """No scores here; `instead`: where people mean, who give a run folder for the scores of a method, or these for it."""
    accepted = f"{instead}" if instead is not None else f"what `whence attribute ... {how}` has finished"
    return WhenceError("holds no finished scores", str(folder), accepted)


def load_scores(folder: str | Path) -> Scores:
    """Read what `save_scores` wrote: RUN/scores/METHOD."""
    folder = Path(folder)
    if not (folder / "scores.json").is_file():
        inside = next((path.parent for path in sorted(folder.glob("scores/*/scores.json"))), None)
        raise _no_scores(folder, "--output_dir RUN: RUN/scores/METHOD", inside)
    notes, path = notes_of(folder), folder / "scores.safetensors"
    names = ("query_ids", "train_ids", "recipe", "scale", "signed", "train_meta")
    found = read_checked(path)
    if "values" not in found:
        raise WhenceError("holds no scores", str(path), AGAIN)
    # A digest of the bytes, beside that of the values within: of other scores in its place.
    if file_digest(path) != notes.get("files", {}).get(path.name, file_digest(path)):
        raise WhenceError("is not the file that was written with its scores.json", str(path), AGAIN)
    facts = {name: notes[name] for name in names}
    with telling(folder / "scores.json", AGAIN):
        return Scores(found["values"], **facts, stderr=found.get("stderr"), stderr_of=notes.get("stderr_of", ""))


def notes_of(folder: Path) -> dict[str, Any]:
    """What the scores.json of RUN/scores/METHOD says."""
    path = folder / "scores.json"
    found = read_json(path, dict, AGAIN)
    if whole(number := found.get("format_version")) and number > FORMAT_VERSION:
        raise WhenceError(f"{folder}: written by a newer whence (format {number}); upgrade to read it")
    refuse_unexpected(found, Notes, str(path), AGAIN)
    return cast("dict[str, Any]", found)


def to_parquet(scores: Scores, path: str | Path, k: int | None = None) -> None:
    """A long table: query, rank (0 = strongest proponent), image, score, standard errors where there are some (see
    `Scores.columns`), and the training images' own columns.

    Args:
        scores: [m, n].
        path: of the file.
        k: images per query; None for all.
    """
    table = replace(scores, train_meta=plain_columns(scores.train_meta)).columns(k)
    write_bytes(Path(path), as_parquet(table))
