"""Content credentials of pictures: whether their makers allow training on them.

The entries of the assertions `c2pa.training-mining` and `cawg.training-mining` in the active manifest of a file. What is
read is what the file says; who signed it, and whether that is to be trusted, is not judged.

Sources: C2PA technical specification 1.4; CAWG training and data mining assertion 1.1. Reads with `c2pa-python`, which is
installed by who needs it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from whence.types import WhenceError

LABELS = ("c2pa.training-mining", "cawg.training-mining")
TRAINING = ("ai_training", "ai_generative_training")
"""The entries that are about training, behind the prefix of whose they are."""
USES = ("allowed", "constrained", "notAllowed")
"""From the mildest to the strictest."""


def reader() -> ModuleType:
    """c2pa-python; an error that says how to have it where it is not installed."""
    try:
        return importlib.import_module("c2pa")
    except ImportError:
        raise WhenceError(
            "reading content credentials needs c2pa-python", "c2pa", "`pip install c2pa-python`"
        ) from None


def training_use(path: Path) -> str:
    """What a file's content credentials say of training on it: the strictest of `USES`, or "" where they say nothing.

    Args:
        path: of the picture.
    """
    c2pa = reader()
    try:
        with c2pa.Reader(str(path)) as found:
            store = json.loads(found.json())
    except c2pa.C2paError as error:
        if type(error).__name__.endswith(("ManifestNotFound", "NotSupported")):
            return ""
        raise WhenceError(f"its content credentials cannot be read ({error})", str(path), "a whole file") from None
    manifest = store["manifests"].get(store.get("active_manifest"), {})
    uses = [
        str(entry.get("use", ""))
        for assertion in manifest.get("assertions", [])
        if assertion.get("label", "").partition("__")[0] in LABELS  # a second one of a kind is called label__1
        for name, entry in _entries(assertion).items()
        if name.partition(".")[2] in TRAINING
    ]
    known = [USES.index(use) for use in uses if use in USES]
    return USES[max(known)] if known else ""


def _entries(assertion: Mapping[str, object]) -> Mapping[str, Mapping[str, object]]:
    data = assertion.get("data")
    entries = data.get("entries") if isinstance(data, Mapping) else None
    return entries if isinstance(entries, Mapping) else {}


def forbidden(folder: Path, names: list[str]) -> set[str]:
    """The images whose content credentials do not allow training, or under conditions alone.

    Args:
        folder: that holds the files.
        names: of the images in it.
    """
    if not folder.is_dir():
        raise WhenceError("content credentials are in files, and this is no folder of them", str(folder), "a folder")
    return {name for name in names if training_use(folder / name) in USES[1:]}
