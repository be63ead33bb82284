"""What does removing the images that D-TRAK or raw pixels name really change, against removing random ones?

python benchmarks/counterfactual.py [BENCH_FOLDER] [FOLDER]      after benchmarks/digits.py; about ten minutes of a core
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from _record import ROOT, record

if __name__ == "__main__":
    bench, folder = (
        Path(sys.argv[i]) if len(sys.argv) > i else ROOT / "runs" / name
        for i, name in ((1, "bench-digits"), (2, "counterfactual-digits"))
    )
    command = ["counterfactual", "digits", "--bench_dir", bench, "--output_dir", folder]
    subprocess.run([sys.executable, "-m", "whence.cli.main", *map(str, command)], check=True)
    result = json.loads((folder / "counterfactual.json").read_text())
    record("counterfactual-digits", {"question": __doc__.split("\n")[0], **result})
    shutil.copy(folder / "counterfactual.png", ROOT / "benchmarks" / "results" / "counterfactual-digits.png")
