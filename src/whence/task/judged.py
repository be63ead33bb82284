"""How far the scores of a run can be believed, as `whence lds` found by retraining: kept in the run folder, for its page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from whence.storage.files import file_digest, readable, write_json

FILE = "lds.json"
FORMAT_VERSION = 1


class Judged(TypedDict):
    """What lds.json holds.

    methods: method -> lds, low, high, centre, as an `Interval` says, the digest of the scores that were judged, and whether
    they are of another model (transfer); ceiling: the highest LDS that any scores could reach, likewise without centre, or
    None; subsets, queries: how many were retrained and looked at."""

    format_version: int
    ledger: str
    subsets: int
    queries: int
    methods: dict[str, dict[str, Any]]
    ceiling: dict[str, float] | None


def keep_judged(
    run: Path,
    ledger: Path,
    found: Mapping[str, Mapping[str, float | bool]],
    ceiling: Mapping[str, float] | None,
    subsets: int,
    queries: int,
) -> None:
    """Keep what was found in a run folder.

    Args:
        run: the run folder.
        ledger: that judged it.
        found: method -> lds, low, high, centre, transfer.
        ceiling: likewise, without centre and transfer; None where it is not known.
        subsets: test subsets of the ledger.
        queries: pictures that both looked at.
    """
    methods = {name: {**each, "scores": _digest(run, name)} for name, each in found.items()}
    facts = {"ledger": str(ledger), "subsets": subsets, "queries": queries, "methods": methods}
    write_json(run / FILE, {"format_version": FORMAT_VERSION, **facts, "ceiling": ceiling})


def judged_told(run: Path, methods: Mapping[str, object]) -> dict[str, str]:
    """What the page says of scores that were judged by retraining; empty where none were, or they are others now.

    Args:
        run: the run folder.
        methods: on the page.
    """
    if not (run / FILE).is_file():
        return {}
    note = readable(run / FILE, Judged)
    same = {
        name: one for name, one in note["methods"].items() if name in methods and one["scores"] == _digest(run, name)
    }
    if not same:
        return {}
    each = ", ".join(f"{name} {_interval(one)}" for name, one in same.items())
    limit = f"; no scores could reach more than {_interval(note['ceiling'])}" if note["ceiling"] else ""
    told = f"LDS {each}{limit} (95 % intervals; {note['subsets']:,} retrained subsets of {note['ledger']})"
    return {"Judged by retraining": told}


def _interval(one: Mapping[str, Any]) -> str:
    told = f"{one.get('centre', one['lds']):.2f} [{one['low']:.2f}, {one['high']:.2f}]"
    return f"{told} of another model than was retrained" if one.get("transfer") else told


def _digest(run: Path, method: str) -> str:
    path = run / "scores" / method / "scores.safetensors"
    return file_digest(path) if path.is_file() else ""
