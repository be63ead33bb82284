"""A figure and what is needed to replay it: benchmarks/results/<name>.json.

`python benchmarks/NAME.py --smoke` only tries a script: on as little as shows that it runs, in one process, and all that it
makes lies in runs/smoke. Sizes are the script's own; the digits bank and commands are made small here.
"""

import contextlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOKE = "--smoke" in sys.argv
if SMOKE:
    sys.argv.remove("--smoke")
RUNS = ROOT / "runs" / "smoke" if SMOKE else ROOT / "runs"
RESULTS = RUNS if SMOKE else ROOT / "benchmarks" / "results"
WHENCE = (sys.executable, "-m", "whence.cli.main")
PACKAGES = ("torch", "numpy", "scipy", "scikit-learn")


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


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit code, what it printed, what it complained of, the most memory it had."""

    code: int
    out: str
    err: str
    peak_bytes: int


def whence(*words, command=WHENCE):
    """`whence WORDS`, one thread, no progress bars, nothing from the hub."""
    words = [str(word) for word in words]
    if SMOKE:
        return _here(words)
    settings = {"OMP_NUM_THREADS": "1", "WHENCE_QUIET": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([*command, *words], stdout=out, stderr=err, env=os.environ | settings)
        _, status, used = os.wait4(process.pid, 0)
        out.seek(0), err.seek(0)
        return Done(os.waitstatus_to_exitcode(status), out.read(), err.read(), used.ru_maxrss * 1024)


def _here(words):
    from whence.cli import main as cli

    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["whence", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return Done(int(end.code or 0), out.getvalue(), err.getvalue(), peak_bytes())
    finally:
        sys.argv = given
    raise AssertionError("main ends by SystemExit")


def apart(script, work, *words):
    """What work(*words) returns in a process of its own, where `python SCRIPT WORDS` prints it as JSON."""
    if SMOKE:
        return json.loads(json.dumps(work(*words)))
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def numbers(interval):
    """Estimate, low end, high end."""
    return [interval.estimate, interval.low, interval.high]


def peak_bytes():
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@cache
def digits():
    """The recipe of the digits bank; under --smoke that of a tiny one of its kind."""
    from whence.data.images import subset
    from whence.diffusion.draws import stratified
    from whence.evaluation import banks, designs
    from whence.training.recipe import New, Schedule

    whole, n = banks.digits(), 20
    if not SMOKE:
        return whole
    network = {"_class_name": "MLPDenoiser", "sample_size": 8, "in_channels": 1, "width": 8, "layers": 1}
    recipe = replace(whole.study.recipe, model=New(network), schedule=Schedule(4, 1), batch_size=8)
    subsets = [
        *designs.fixed(n, 6, seeds=(1000, 1001), role="test", seed=1),
        *designs.fixed(n, 4, seeds=(2000, 2001), role="tune", seed=2),
        *designs.fixed(n, 6, seeds=(4000,), role="fit", seed=3),
    ]
    return replace(
        whole,
        study=replace(whole.study, recipe=recipe),
        train=subset(whole.train, range(n)),
        heldout=subset(whole.heldout, range(4)),
        subsets=subsets,
        generated=4,
        draws=stratified(2, seed=777),
        checkpoint=2,
    )


def digits_bank(recipe):
    """The digits bank as it is shipped; under --smoke the tiny one, trained here, its ledger in runs/smoke/bank."""
    from whence.evaluation import banks

    if SMOKE:
        banks.build(recipe, "digits", RUNS / "bank")
    return banks.load("digits", recipe, RUNS / "bank" / "bank" if SMOKE else None)


def asked_bank():
    """Name, bank, recipe and bench folder that the command line asks for: `digits [FOLDER]` or `icons|photos DATA [FOLDER]`,
    by default runs/bench-NAME; under --smoke, since the pictures are no part of the project, the tiny bank of digits."""
    from whence.evaluation import banks

    name, *rest = ("digits",) if SMOKE else sys.argv[1:]
    recipe = digits() if name == "digits" else banks.by_name(name, Path(rest.pop(0)))
    bank = digits_bank(recipe) if name == "digits" else banks.load(name, recipe)
    return "icons" if SMOKE else name, bank, recipe, Path(rest[0]) if rest else RUNS / f"bench-{name}"


def near_in_pixels(queries, train):
    """The cosine of raw pixels of 8 bits, as `pixel_cosine` takes them: queries by training images."""
    import numpy as np

    from whence.data.pixels import to_pixels

    pixels = (to_pixels(some.batch(range(len(some))).x0) for some in (queries, train))
    q, x = (each.flatten(1).double().numpy() / 127.5 - 1 for each in pixels)
    return (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T


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
    import whence

    found = {"python": sys.version.split()[0], "whence": whence.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
