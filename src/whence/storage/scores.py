"""Scores on disk: <run>/scores/<method>/ holds scores.safetensors, scores.json (recipe) and top.parquet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from whence.storage.arrays import read_checked, write_checked
from whence.storage.columns import as_parquet, plain_columns
from whence.storage.files import read_json, write_bytes, write_json
from whence.types import Scores, WhenceError, describe

FORMAT_VERSION = 1


def save_scores(folder: str | Path, scores: Scores, k: int = 100) -> None:
    """Write scores, their recipe, and a Parquet table of the strongest.

    Args:
        folder: where they are written.
        scores: [m, n].
        k: proponents of each query in the table.
    """
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
    # Written last: scores without it are not finished.
    write_json(folder / "scores.json", {"format_version": FORMAT_VERSION, "positive": "proponent", **facts, **rows})


def scored(run: Path) -> dict[str, Path]:
    """Method -> its folder of finished scores in a run folder; refuses a folder that has none."""
    found = {path.parent.name: path.parent for path in sorted(run.glob("scores/*/scores.json"))}
    if not found:
        raise _no_scores(run, f"--output_dir {run}", run.parent.parent if (run / "scores.json").is_file() else None)
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
    notes = read_json(folder / "scores.json")
    if notes["format_version"] > FORMAT_VERSION:
        raise WhenceError(f"{folder}: written by a newer whence (format {notes['format_version']}); upgrade to read it")
    names = ("query_ids", "train_ids", "recipe", "scale", "signed", "train_meta")
    found = read_checked(folder / "scores.safetensors")
    facts = {name: notes[name] for name in names}
    return Scores(found["values"], **facts, stderr=found.get("stderr"), stderr_of=notes.get("stderr_of", ""))


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
