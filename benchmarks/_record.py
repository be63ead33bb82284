"""A figure and what is needed to replay it: benchmarks/results/<name>.json."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = "--smoke" in sys.argv
"""Whether a script is only tried: on as little as shows that it runs, its figures in runs/smoke, not among the published."""
if SMOKE:
    sys.argv.remove("--smoke")
RESULTS = ROOT / "runs" / "smoke" if SMOKE else ROOT / "benchmarks" / "results"
PACKAGES = ("whence", "torch", "numpy", "scipy", "scikit-learn")


def record(name, payload):
    """Write payload with machine, commit and versions, print it, and return the path."""
    result = {**payload, "machine": machine(), "commit": commit(), "versions": versions()}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, path)
    print(path.read_text(), end="")
    return path


def machine():
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }


def processor():
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def commit():
    """`git rev-parse HEAD`, with "+changes" where the working tree is not that commit; None before the first one."""
    head = git("rev-parse", "--verify", "HEAD")
    return head and head + ("+changes" if git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")


def git(*arguments):
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def versions():
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
