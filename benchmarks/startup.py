"""How long does the command line take to start, and what does `import whence` load?

    python benchmarks/startup.py       about a minute; benchmarks/results/startup.json

Seconds of the clock of `whence --help`, `whence --version` and of a command that is spelt wrongly, divided by those of
`python -c "import typer, rich"` in the same round; the median of the rounds. Mark: at most 1.5. And whether `import whence`
imports diffusers or transformers: it must not.
"""

import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from _record import SMOKE, record

ROUNDS = 1 if SMOKE else 15
WHENCE = Path(sys.executable).with_name("whence")
ARMS = {
    "whence --help": [WHENCE, "--help"],
    "whence --version": [WHENCE, "--version"],
    "a wrong command": [WHENCE, "atribute"],
}
BASELINE = [sys.executable, "-c", "import typer, rich"]
HEAVY = ("diffusers", "transformers")
IMPORTED = f"import sys, whence; print(*[name for name in {HEAVY} if name in sys.modules])"


def seconds(command):
    begun = perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return perf_counter() - begun


def main():
    ratios = {name: [] for name in ARMS}
    for command in () if SMOKE else (BASELINE, *ARMS.values()):
        seconds(command)  # the first run reads from disk
    for _ in range(ROUNDS):
        baseline = seconds(BASELINE)
        for name, command in ARMS.items():
            ratios[name].append(seconds(command) / baseline)
    imported = subprocess.run(
        [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True
    ).stdout.split()
    found = {name: round(median(values), 2) for name, values in ratios.items()}
    print(found, imported)
    record(
        "startup", {"question": __doc__.splitlines()[0], "times_of_baseline": found, "import_whence_loads": imported}
    )


if __name__ == "__main__":
    main()
