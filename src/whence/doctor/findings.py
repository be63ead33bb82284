"""What every check shares: findings, checks that cannot fail, files that may not be there, and units for people."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from whence.data.layout import Finding
from whence.storage.files import read_object
from whence.types import WhenceError

NOTHING = "nothing needs doing"
Findings = list[Finding]


def guarded(name: str, check: Callable[[], Findings], warns: bool = False) -> Findings:
    """The findings of a check; one that fails is a finding itself.

    Args:
        name: of what is checked.
        check: the check.
        warns: whether what it warns of is a finding; what `image_folder` warns of is among the findings already.
    """
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = check()
        return found + [_warned(str(one.message)) for one in told if warns and one.category is UserWarning]
    except WhenceError as error:
        return [finding_of(error, name)]
    except Exception as error:
        what = f"the check itself failed: {short(error)}"
        return [Finding("error", what, f"check of the {name}", "please report this as a bug in whence")]


def _warned(text: str) -> Finding:
    where, _, what = " ".join(text.split()).partition(": ")
    return Finding("warning", what, where, "nothing needs doing if this is meant")


def finding_of(error: WhenceError, name: str) -> Finding:
    """An error as a finding, in the same sentence."""
    what, fix = error.what, f"accepted: {error.accepted}" if error.accepted else ""
    if not fix:
        what, _, fix = what.partition("; ")
    return Finding("error", what, f"{name} {error.where}".strip(), fix or "mend this first")


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def broken(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def quiet(path: Path) -> dict[str, object]:
    """The object of a JSON file, empty where there is none: `json_object` is the one that complains."""
    try:
        return json_object(path) if path.is_file() else {}
    except WhenceError:
        return {}


def json_object(path: Path) -> dict[str, object]:
    return read_object(path)


def whole_number(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None


def in_millions(count: int) -> str:
    """A number of parameters, in millions where there are some: no network is said to have 0.0."""
    return f"{count:,}" if count < 1e6 else f"{count / 1e6:,.1f} M"


def in_bytes(count: float) -> str:
    """Decimal units, as disks are sold and `df -H` tells."""
    return _scaled(count, ("bytes", "KB", "MB", "GB", "TB"))


def in_operations(count: float) -> str:
    """Of floating point numbers."""
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def _scaled(count: float, units: Sequence[str]) -> str:
    """In the largest unit that leaves at least 1 of it."""
    power = 0 if count < 1000 else min(len(units) - 1, int(math.log10(count) / 3))
    value = count / 1000**power
    return f"{value:.0f} {units[power]}" if power == 0 or value >= 100 else f"{value:.1f} {units[power]}"


def in_time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            value = seconds / size
            return f"about {value:.0f} {unit}" if value >= 10 else f"about {value:.1f} {unit}"
    return f"about {seconds:.0f} seconds" if seconds >= 1.5 else "a second or less"
