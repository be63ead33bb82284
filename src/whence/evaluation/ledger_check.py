"""Every file of a ledger, read and compared with its digest; and what is broken, removed, so that `run` makes it anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from whence.evaluation.ledger_files import Measured, measured_values, measurement_of
from whence.evaluation.outcomes import Unit
from whence.storage.arrays import Store, read_checked
from whence.storage.files import progress, read_json
from whence.storage.leftovers import is_temporary
from whence.types import WhenceError

if TYPE_CHECKING:
    from whence.evaluation.ledger import Ledger


@dataclass(frozen=True)
class Broken:
    """A file, or a folder of files, that is not what was written.

    Args:
        path: of it.
        why: in a line that names it.
        anew: what makes it again once it is removed; "" where it cannot be removed without losing more.
    """

    path: Path
    why: str
    anew: str = ""


AGAIN = "give the same `whence ledger plan` again"
TRAIN, MEASURE = "`whence ledger run`", "`whence ledger measure`"


def broken_in(ledger: Ledger) -> list[Broken]:
    """What of a ledger is not what was written; its plan and its masks were read when it was opened."""
    units = progress(ledger.units, "verifying")
    return [*_notes(ledger.root), *_units(ledger, units), *_measurements(ledger)]


def _tried(path: Path, anew: str, read: Callable[..., object], *about: object) -> Iterator[Broken]:
    try:
        read(*about)
    except (WhenceError, OSError) as error:
        yield Broken(path, str(error) if str(path) in str(error) else f"{path}: {error}", anew)


def _notes(root: Path) -> Iterator[Broken]:
    source = root / "source.json"
    if source.exists():  # ledgers that were planned in Python have none
        yield from _tried(source, "", read_json, source, dict, AGAIN)
    for path in (*root.glob("digests.json"), *root.glob("queries/digests.json")):
        yield from _tried(path, "the next command", read_json, path, dict)
    for path in sorted(root.glob("standing/*.safetensors")):
        yield from _tried(path, TRAIN, read_checked, path)
    for folder in (root, root / "queries"):
        for path in sorted(folder.glob("features/*")):
            yield from _tried(path, "the next command", _array, path)


def _array(folder: Path) -> None:
    if folder.is_file():
        read_json(folder, dict)
        return
    for rows in (rows for rows in Store(folder.parents[1]).arrays() if rows.folder == folder):
        rows.verify(finished=False)


def _units(ledger: Ledger, units: Iterator[Unit]) -> Iterator[Broken]:
    for unit in units:
        folder = ledger.folder(unit)
        failed = folder.with_suffix(".failed.json")
        if failed.exists():
            yield from _tried(failed, TRAIN, read_json, failed, dict)
        if folder.exists() or ledger.done(unit):
            yield from _tried(folder, TRAIN, ledger.weights_of, unit)


def _measurements(ledger: Ledger) -> Iterator[Broken]:
    for folder in sorted(path for path in ledger.root.glob("measurements/*") if path.is_dir()):
        manifest = folder / "manifest.json"
        try:
            noted = read_json(manifest, Measured, f"measure again under another name, and remove {folder}")
        except WhenceError as error:
            yield Broken(manifest, str(error))
            continue
        m, of = len(noted["query_ids"]), measurement_of(ledger.digest, noted)
        numbers = {f"{unit.number:05d}" for unit in ledger.units}
        for path in sorted(folder.iterdir()):
            if path.suffix == ".safetensors" and path.stem in numbers:
                yield from _tried(path, MEASURE, measured_values, path, m, f"{of}/{int(path.stem)}")
            elif path != manifest and not is_temporary(path):
                yield Broken(path, f"{path}: it is no part of this measurement; remove it")


def unfinished_in(ledger: Ledger) -> list[str]:
    """What of the plan is not there yet, in words: no damage, but less than was planned."""
    done = [unit for unit in ledger.units if ledger.done(unit)]
    found = [f"{len(done)} of {len(ledger.units)} trainings are finished"] if len(done) < len(ledger.units) else []
    for folder in sorted(path for path in ledger.root.glob("measurements/*") if path.is_dir()):
        there = sum((folder / f"{unit.number:05d}.safetensors").exists() for unit in done)
        if there < len(done):
            found.append(f"{folder} holds {there} of {len(done)} finished trainings; {MEASURE} adds the others")
    return found


def repair(broken: list[Broken]) -> tuple[list[Broken], list[Broken]]:
    """Remove what is broken and can be made again; returns what was removed, and what was not."""
    removed = [one for one in broken if one.anew]
    for one in removed:
        if one.path.is_dir() and not one.path.is_symlink():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)
    return removed, [one for one in broken if not one.anew]
