"""Whose a run folder or an index is: of one model and one set of training images, noted in its index.json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from whence.plain import WhenceError, describe
from whence.storage import leftovers
from whence.storage.files import FORMAT_VERSION, differences, note_once, readable

MANIFEST = "index.json"
SINCE = ("schedule",)
"""What folders of earlier versions do not say of whose they are."""
BUILT = "built.json"
RESULTS = ("scores", "generated", "references", BUILT)
"""What lies in a run folder, or in an index, once it says something of its images."""


def claim(root: Path, identity: Mapping[str, object], model: str = "") -> None:
    """Tie a run folder to one model and data set, or refuse a folder that is tied to another.

    Args:
        root: the run folder.
        identity: of model and data set.
        model: where that model lies, for the refusal.
    """
    note_once(root / MANIFEST, {"format_version": FORMAT_VERSION, **describe(identity)})
    check_claim(root, identity, model)
    leftovers.sweep(root)


@contextmanager
def claimed(root: Path, index: Path) -> Iterator[None]:
    """A run folder in which something is refused is given free again, unless it holds scores or drawn pictures: who mends
    the command may mean another model, and features know by themselves whose they are. So is an index without features.

    Args:
        root: the run folder.
        index: the folder of the features of the training images; the run folder where there is no other.
    """
    try:
        yield
    except WhenceError:
        if not any((root / name).exists() for name in RESULTS):
            (root / MANIFEST).unlink(missing_ok=True)
        if index != root and not any(path.suffix != ".json" for path in index.glob("*/**/*.*")):  # notes of stores
            (index / MANIFEST).unlink(missing_ok=True)
        raise


def check_claim(root: Path, identity: Mapping[str, object], model: str = "") -> None:
    """Refuse a run folder that is tied to another model or data set (see `claim`)."""
    different = _claimed_otherwise(root, identity)
    if different:
        # Digests tell nobody anything; and who mended a refused command meets the folder that it left.
        told = re.sub(r"'[0-9a-f]{32,}'", lambda digest: f"{digest.group()[:9]}...'", different[0])
        empty = "" if (root / "scores").exists() else " (this one holds no scores: to delete it costs time alone)"
        how = "; the pictures, or how they are read (--resolution ...)" if different[0].startswith("train:") else ""
        how = f" in {model}" if model and different[0].startswith(("model:", "schedule:")) else how
        raise WhenceError(
            f"{root} belongs to another model or data set ({told}{how}); choose another output folder{empty}"
        )


def _claimed_otherwise(root: Path, identity: Mapping[str, object]) -> list[str]:
    """The fields in which a folder is tied to something else; none of a folder that is not tied yet."""
    if not (root / MANIFEST).exists():
        return []
    found = readable(root / MANIFEST)
    known = {name: value for name, value in describe(identity).items() if name in found or name not in SINCE}
    return differences({**known, "format_version": found["format_version"]}, found)


def goes_on(root: Path, identity: Mapping[str, object], built: bool = False) -> bool:
    """Whether a folder without results is of training images of which some were replaced, removed or added since. Features
    know by themselves whose they are, and those of the images that are the same are carried over.

    Args:
        root: the folder.
        identity: of model and data set, as they are now.
        built: whether an index that was built is, too: it is about to be built again.
    """
    different = {line.partition(":")[0] for line in _claimed_otherwise(root, identity)}
    held = [name for name in RESULTS if (root / name).exists() and not (built and name == BUILT)]
    return bool(different) and different <= {"train", "images"} and not held


def give_free(root: Path, identity: Mapping[str, object], built: bool = False) -> None:
    """Untie a folder that goes on with other training images; the arguments are those of `goes_on`."""
    if goes_on(root, identity, built):
        (root / MANIFEST).unlink()
