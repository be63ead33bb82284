"""Scores on disk: <run>/scores/<method>/ holds scores.safetensors, scores.json (recipe) and top.parquet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from whence.scores import Whole
from whence.storage.arrays import read_checked, write_checked
from whence.storage.columns import as_parquet, plain_columns
from whence.storage.files import file_digest, telling, write_bytes, write_json
from whence.storage.notes import AGAIN, BESIDE, FORMAT_VERSION, NoteOfWhole, no_scores, notes_of
from whence.types import Scores, WhenceError, describe, expect


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
    write_checked(folder / "scores.safetensors", tensors | _of_whole(scores.whole))
    to_parquet(scores, folder / "top.parquet", min(k, scores.kept or k))
    rows = {"query_ids": list(scores.query_ids), "train_ids": list(scores.train_ids), "train_meta": scores.train_meta}
    facts = {"recipe": describe(scores.recipe), "scale": scores.scale, "signed": scores.signed}
    if scores.stderr_of:
        facts["stderr_of"] = scores.stderr_of
    if scores.whole is not None:
        names = {column: list(named) for column, (named, _, _) in scores.whole.groups.items()}
        facts["whole"] = {"count": scores.whole.count, "groups": names}
    facts["files"] = {name: file_digest(folder / name) for name in BESIDE}
    # Written last: scores without it are not finished.
    write_json(folder / "scores.json", {"format_version": FORMAT_VERSION, "positive": "proponent", **facts, **rows})


def load_scores(folder: str | Path) -> Scores:
    """Read what `save_scores` wrote: RUN/scores/METHOD."""
    folder = Path(folder)
    if not (folder / "scores.json").is_file():
        inside = next((path.parent for path in sorted(folder.glob("scores/*/scores.json"))), None)
        raise no_scores(folder, "--output_dir RUN: RUN/scores/METHOD", inside)
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
        rest = None if "whole" not in notes else _whole(notes["whole"], found)
        return Scores(
            found["values"], **facts, stderr=found.get("stderr"), stderr_of=notes.get("stderr_of", ""), whole=rest
        )


KEPT = ("mean", "variance", "positive", "above", "edges", "bars", "reliability")
"""The numbers of `Whole` that each query has."""


def _of_whole(whole: Whole | None) -> dict[str, Tensor]:
    if whole is None:
        return {}
    found = {f"whole.{name}": value for name in KEPT if (value := getattr(whole, name)) is not None}
    for number, (_, images, sums) in enumerate(whole.groups.values()):
        found |= {f"whole.groups.{number}.images": images, f"whole.groups.{number}.sums": sums}
    return found


def _whole(note: NoteOfWhole, found: dict[str, Tensor]) -> Whole:
    groups = {
        column: (names, found[f"whole.groups.{number}.images"], found[f"whole.groups.{number}.sums"])
        for number, (column, names) in enumerate(note["groups"].items())
    }
    return Whole(note["count"], groups=groups, **{name: found.get(f"whole.{name}") for name in KEPT})  # type: ignore[arg-type]


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
