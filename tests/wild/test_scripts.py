"""The scripts that made the published figures still run: each on as little as shows it, all in one process, and what they
find has the fields of what is published. (What is gone where they do not come along is found by `make lint`.)"""

from __future__ import annotations

import gc
import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import pytest

from forks import forked

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("[!_]*.py"))
FIRST = ("digits", "linear")  # others read what these leave
RESULTS, SMOKE = BENCHMARKS / "results", BENCHMARKS.parent / "runs" / "smoke"
# Fields that a script writes since its figures were published.
SINCE = {"bench-digits": {"members"}}


def run(names: list[str]) -> None:
    """As `python benchmarks/NAME.py --smoke` each."""
    gc.freeze()  # kronfluence collects garbage at every turn, and there is a lot here that is none
    sys.path.insert(0, str(BENCHMARKS))
    sys.argv = ["smoke", "--smoke"]
    for name in names:
        begun, path = time.process_time(), str(BENCHMARKS / f"{name}.py")
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{name}: {end.code}") from end
        print(f"{name}: {time.process_time() - begun:.1f} s")
        sys.argv = [path]


def made_as(path: Path) -> str:
    """The name under which a script leaves it where it only shows that it runs: of the two banks of pictures, the first."""
    return path.name.replace("photos", "icons")


def fields(path: Path) -> set[str]:
    return set(json.loads(path.read_text()))


def test_every_script_runs(tmp_path):
    """And leaves what it publishes, under the same names, without touching what is published."""
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    shutil.rmtree(SMOKE, ignore_errors=True)
    done = forked(lambda: run([*FIRST, *(name for name in SCRIPTS if name not in FIRST)]), tmp_path / "log")
    assert done.code == 0, done.told[-4000:]
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before
    assert {made_as(path) for path in before} - {path.name for path in SMOKE.iterdir()} == set(), "made by no script"
    for path in RESULTS.glob("*.json"):
        assert fields(SMOKE / made_as(path)) == fields(path) | SINCE.get(path.stem, set()), path.name
    shutil.rmtree(SMOKE)
