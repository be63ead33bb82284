"""Names of the Hugging Face Hub where a folder is expected: OWNER/NAME or OWNER/NAME@REVISION.

What the hub's cache on this machine holds is read where it lies, without a request:

    CACHE/models--OWNER--NAME/refs/REVISION       the commit of a branch or tag; "main" by default
    CACHE/models--OWNER--NAME/snapshots/COMMIT/   its files; datasets--OWNER--NAME likewise

Anything else is fetched only where that is asked for, and never a file that could run (pickles, scripts). A folder of the
same name comes first.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from whence.plain import WhenceError

MODEL, DATASET = "model", "dataset"
NAME = re.compile(r"([\w][\w.-]*/[\w][\w.-]*?)(?:@([\w][\w./-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
MAIN = "main"
UNSAFE = (
    "*.bin",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.ot",
    "*.pb",
    "*.pickle",
    "*.pkl",
    "*.pt",
    "*.pth",
    "*.py",
)
"""Files that are not fetched: nothing that comes with a model or a data set is run, and these are not read."""
DOWNLOAD = "--download"


@dataclass(frozen=True)
class Found:
    """Where a name leads.

    Args:
        path: of the folder; the name itself where it is none of the hub's.
        said: what is to be known of it, "" for nothing.
    """

    path: Path
    said: str = ""


def cache_folder() -> Path:
    """The hub's cache on this machine, by its own variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def located(name: str | Path, kind: str = MODEL, download: bool = False, where: str = "") -> Found:
    """The folder that a name stands for.

    Args:
        name: a path, or a name of the hub.
        kind: MODEL (also of what lies on one: LoRAs, encoders) or DATASET.
        download: whether what the cache lacks may be fetched.
        where: the option, for errors.
    """
    path, match = Path(name), NAME.fullmatch(str(name))
    if match is None:
        return Found(path)
    repository, revision = match[1], match[2] or MAIN
    if path.exists():
        held = _cached(repository, revision, kind)
        other = f"{where or name}: the folder {name} is taken, not {name} of the hub, which the cache holds, too"
        return Found(path, "" if held is None else other)
    held = _cached(repository, revision, kind)
    if held is None and not download:
        accepted = f"a folder, or {DOWNLOAD} to fetch the {kind} of that name (no request is made without it)"
        raise WhenceError(
            f"{name}: no such folder, and the hub's cache {cache_folder()} does not hold it", where, accepted
        )
    if held is None:
        held = _fetched(repository, revision, kind, where)
    return Found(held, f"{where or name}: {repository} of the hub, commit {held.name[:12]}, in {held}")


def hub_folder(name: str, kind: str = MODEL, download: bool = False) -> Path:
    """The folder of a model or data set of the hub, as `located` finds it; no request is made unless `download` says so.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION; a path is returned as it is.
        kind: "model" (also a LoRA or an encoder) or "dataset".
        download: whether what the cache on this machine lacks may be fetched.
    """
    if kind not in (MODEL, DATASET):
        raise WhenceError(f"kind {kind!r}", "hub_folder", f"{MODEL!r} or {DATASET!r}")
    if not NAME.fullmatch(str(name)) and not Path(name).exists():
        accepted = "OWNER/NAME or OWNER/NAME@REVISION"
        raise WhenceError(f"{name!r} is neither there nor a name of the hub", "hub_folder", accepted)
    return located(name, kind, download).path


def on_disk(name: str | Path, kind: str = MODEL) -> Path:
    """The folder of a path, or of a name of the hub that its cache holds; where both are there, a warning says so.

    Args:
        name: either of them.
        kind: MODEL or DATASET.
    """
    found = located(name, kind)
    if found.path == Path(name) and found.said:
        warnings.warn(found.said, stacklevel=3)
    return found.path


def _cached(repository: str, revision: str, kind: str) -> Path | None:
    """The snapshot in the cache, None where it is not there."""
    folder = cache_folder() / f"{kind}s--{repository.replace('/', '--')}"
    if ".." in revision.split("/"):
        return None
    commit = _commit(folder, revision)
    if commit is None or not (folder / "snapshots" / commit).is_dir():
        return None
    return folder / "snapshots" / commit


def _commit(folder: Path, revision: str) -> str | None:
    """The commit of a branch, tag, or the beginning of one."""
    reference = folder / "refs" / revision
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
        if not COMMIT.fullmatch(commit):
            raise WhenceError(
                "it holds no commit", str(reference), f"40 hexadecimal digits; {DOWNLOAD} after removing it"
            )
        return commit
    if not re.fullmatch(r"[0-9a-f]{7,40}", revision) or not (folder / "snapshots").is_dir():
        return None
    found = [path.name for path in (folder / "snapshots").iterdir() if path.name.startswith(revision)]
    return found[0] if len(found) == 1 else None


def _fetched(repository: str, revision: str, kind: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            cache_dir=cache_folder(),
            ignore_patterns=list(UNSAFE),
        )
    except Exception as problem:  # whatever a network, a server or a disk can do
        told = str(problem).strip().splitlines() or [type(problem).__name__]
        accepted = "a name of the hub that this machine can reach, or a folder"
        raise WhenceError(f"{repository}@{revision} cannot be fetched ({told[0]})", where, accepted) from None
    return Path(found)
