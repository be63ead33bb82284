"""The scripts that made the published figures still run: names that are gone are found in all of them without running, and
those with a smoke mode are run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GONE = re.compile(r"\[(attr-defined|call-arg|name-defined|import-not-found)\]")


def test_scripts_name_nothing_that_is_gone():
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*.py"))
    words = ["--ignore-missing-imports", "--check-untyped-defs", "--allow-untyped-defs", "--follow-imports=silent"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    assert [line for line in done.stdout.splitlines() if GONE.search(line)] == []


@pytest.mark.parametrize("name", ["digits"])
def test_a_script_runs(name):
    shutil.rmtree(ROOT / "runs" / "smoke", ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = ROOT / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), "--smoke"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in (ROOT / "runs" / "smoke").glob("*.json")]
    published = json.loads((ROOT / "benchmarks" / "results" / f"bench-{name}.json").read_text())
    assert found[0].keys() == published.keys() | {"members"}
    shutil.rmtree(ROOT / "runs" / "smoke")
