"""Every file of a run folder, read and compared with its digest.

    *.json                     the checksum at its end                 scores/METHOD/*     the digests in scores.json
    features/, curvature/      the digest inside each array            generated/*         the digests in generated.json
    report.html, gallery.png   the digests in report.json              credit/BY/*         the digests in receipt.json
    masks/*.png                its name                                students/METHOD/*   the digest in student.json

Any other file is named, for nothing is known of it. Files of earlier versions hold fewer digests: they are read, and counted
apart from those that were compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from whence.curvature import factors
from whence.data.masks import read_mask
from whence.evaluation.receipts import RECEIPT
from whence.features.students import load_student
from whence.storage.arrays import Store, read_checked
from whence.storage.files import file_digest, is_beside, progress, read_json, readable
from whence.storage.leftovers import is_temporary
from whence.storage.owned import MANIFEST
from whence.storage.scores import load_scores
from whence.task.drawn import GENERATED, NOTE, check_drawn
from whence.task.reports import known_images, refuse_others
from whence.types import WhenceError


@dataclass(frozen=True)
class Verified:
    """What came out.

    Args:
        files: that were compared with a digest.
        broken: a line for each that is not what was written.
        read: files that hold no digest, of earlier versions.
        unknown: files that nothing is known of.
    """

    files: int
    broken: list[str]
    read: list[str]
    unknown: list[str]


def verified(root: Path) -> Verified:
    """Read every file of a run folder and compare it with its digest.

    Args:
        root: the run folder.
    """
    if not root.is_dir():
        raise WhenceError("there is no such folder", str(root), "the output folder of `whence attribute`")
    there = sorted(path for path in root.rglob("*") if not path.is_dir() and not is_temporary(path.relative_to(root)))
    if not (root / MANIFEST).is_file() and not any(path.name == "scores.json" for path in there):
        raise WhenceError(f"holds no {MANIFEST} and no scores", str(root), "the output folder of `whence attribute`")
    noted, broken = _noted(root), [*_missing(root)]
    counts: dict[str, list[str]] = {"compared": [], "read": [], "unknown": []}
    for path in progress(there, "verifying"):
        name = path.relative_to(root).as_posix()
        try:
            counts[_checked(path, name, noted)].append(name)
        except (WhenceError, OSError, SafetensorError) as error:
            told = str(error)
            broken.append(told if str(path) in told else f"{path}: {told}")
    gone = sorted(name for name in noted if (root / name).is_dir() or not (root / name).exists())
    broken += [f"{root / name}: is missing; {AGAIN}" for name in gone]
    return Verified(len(counts["compared"]), list(dict.fromkeys(broken)), counts["read"], counts["unknown"])


AGAIN = "run the command that wrote it once more"


def _checked(path: Path, name: str, noted: Mapping[str, str]) -> str:
    """Whether a file was compared with a digest, only read, or is not known; one that is not what was written is refused."""
    if name in noted:
        if file_digest(path) != noted[name]:
            raise WhenceError("is not what was written", str(path), AGAIN)
        return "compared"
    for pattern, check in CHECKS.items():
        if fnmatch(name, pattern):
            return "compared" if check(path) else "read"
    return "unknown"


def _json(path: Path) -> bool:
    value = readable(path) if path.name in (MANIFEST, "manifest.json") else read_json(path)
    return value is not None and b'"checksum"' in path.read_bytes()[-100:]


def _array(path: Path) -> bool:
    rows = next((one for one in Store(path.parents[2]).arrays() if one.folder == path.parent), None)
    if rows is None:
        raise WhenceError(
            "is missing", str(path.parent / "manifest.json"), f"{path.parent} removed, to compute it again"
        )
    for shard in rows.shards:
        if rows.path(shard) == path:
            rows.read(shard)
            return True
    raise WhenceError("is no part of the array of its folder", str(path), "it removed")


def _curvature(path: Path) -> bool:
    factors.read(path)
    return True


def _tensors(path: Path) -> bool:
    return bool(read_checked(path))


def _mask(path: Path) -> bool:
    if read_mask(path).digest != path.stem:
        raise WhenceError("is not the mask of its name", str(path), AGAIN)
    return True


def _student(path: Path) -> bool:
    load_student(path.parent)
    return True


CHECKS: Mapping[str, Callable[[Path], bool]] = {
    "*features/*/part-*.safetensors": _array,
    "*curvature/*.safetensors": _curvature,
    "*students/*/*.safetensors": _student,
    "*masks/*.png": _mask,
    "*.safetensors": _tensors,
    "*.json": _json,
}
"""By the name of a file in the run folder; the first that fits."""


def _noted(root: Path) -> dict[str, str]:
    """The digests that files of a run note of others: name in the run folder -> sha256. Files that cannot be read are told
    where they are checked themselves."""
    found: dict[str, str] = {}
    for path in (*root.rglob("scores.json"), *root.rglob("report.json"), *root.glob(f"credit/*/{RECEIPT}")):
        found |= _files(path, _quiet(path).get("files"))
    drawn = _quiet(root / NOTE).get("files")
    for folder, files in drawn.items() if isinstance(drawn, dict) else ():
        found |= _files(root / Path(folder).name / "any", files)
    return {Path(name).relative_to(root).as_posix(): digest for name, digest in found.items()}


def _files(beside: Path, files: object) -> dict[str, str]:
    named = files.items() if isinstance(files, dict) else ()
    return {str(beside.with_name(name)): str(digest) for name, digest in named if is_beside(name)}


def _quiet(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path) if path.is_file() else {}
    except WhenceError:
        return {}
    return found if isinstance(found, dict) else {}


def _missing(root: Path) -> Iterator[str]:
    """What whole runs have, and this one has not; and what does not fit together."""
    for notes, folders in (("scores.json", "scores/*/*"), (RECEIPT, "credit/*/*")):
        for folder in sorted({path.parent for path in root.glob(folders)}):
            if not (folder / notes).is_file():
                yield f"{folder / notes}: is missing; {AGAIN}"
    if (root / GENERATED).exists() and not (root / NOTE).is_file():
        yield f"{root / NOTE}: is missing; remove {root / GENERATED} to draw again"
    for folder in sorted({path.parent for path in root.glob("scores/*/scores.json")}):
        try:
            refuse_others(root, folder, load_scores(folder).recipe)
        except (WhenceError, OSError) as error:
            yield str(error) if str(folder) in str(error) else f"{folder}: {error}"
    try:
        check_drawn(root / GENERATED)
        index, known = _quiet(root / MANIFEST), known_images(root, "train")
        if known and index.get("train", known[0]) not in known:
            yield f"{root / MANIFEST}: is of other training images than images.json; {AGAIN}"
    except WhenceError as error:
        yield str(error)
    for name in _quiet(root / "report.json").get("beside", ()):
        if not (root / str(name)).is_file():
            yield f"{root / str(name)}: is missing; {AGAIN}"
    if any(root.glob("scores/*/scores.json")):
        for name in ("images.json", "report.json", MANIFEST):
            if not (root / name).is_file() and (root / "report.html").is_file():
                yield f"{root / name}: is missing; run `whence attribute` in it once more"
