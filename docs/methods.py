"""Write docs/methods.md: every method, from its docstring and the committed results of the bench.

.venv/bin/python docs/methods.py
"""

import inspect
import json
import textwrap
from pathlib import Path

from whence.methods import METHODS, NEEDS, settings_of

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("heldout", "generated")
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# The methods

Written by `docs/methods.py` from the code and from
[bench-digits.json](../benchmarks/results/bench-digits.json). The formula that most of them share:

    score[q, i] = sum_c eta_c * a_q * (psi_q^T H_c^-1 phi_i) * b_i * w_i

psi, phi: features of query and training image, mostly gradients averaged over draws (timestep, noise) and projected; H: a
preconditioner; a, b: row scales; eta: weights of checkpoints; w: one number per training image. Larger = the image did more
FOR the query. [bench.md](bench.md) compares all of them on one bank, [truth.md](truth.md) says how they are judged.

*LDS*: on the digits bank, held-out | generated queries, with 95 % intervals; damping chosen on other subsets. It says how
methods rank on that bank.
"""


def lds(rows, name):
    row = rows.get(name)
    if row is None:
        return None
    cells = {kind: "{lds:.3f} [{low:.3f}, {high:.3f}]".format(**row[kind]) for kind in KINDS if kind in row}
    return " | ".join(cells.get(kind, "none") for kind in KINDS)


def section(name, entry, bench):
    text = inspect.getdoc(entry.make) or ""
    facts = [entry.paper if entry.year is None else f"{entry.paper} {entry.year}", entry.cost]
    facts += [f"needs {NEEDS[need]}" for need in entry.needs]
    facts.append("denoisers only" if entry.classifier is None else "denoisers and classifiers")
    settings = ", ".join(f"`{key}`" for key in settings_of(name)) or "none"
    measured = lds(bench["rows"], name)
    if measured is None:
        why = bench["skipped"].get(name)
        measured = f"none ({why})" if why else "not on the digits bank"
    body = "\n".join(textwrap.dedent(text).splitlines())
    return f"## {name}\n\n*{'; '.join(facts)}*\n\n```text\n{body}\n```\n\nSettings: {settings}. LDS: {measured}.\n"


EXCEPTIONS = """## Exceptions

None: every method runs on every family of models (UNet2DModel, Stable Diffusion 1 and 2, SDXL, DiT, PixArt, SD3, Flux, and
a LoRA on them), given what it needs; `tests/test_families_contract.py` tries all pairs. Those that train again need a model
or LoRA of `whence train`; DiT is trained by LoRA alone, because its own dropout of labels cannot be replayed.
"""


def page():
    bench = json.loads((RESULTS / "bench-digits.json").read_text())
    parts = [HEAD, *(section(name, entry, bench) for name, entry in METHODS.items()), EXCEPTIONS]
    notes = ROOT / "docs" / "methods-notes.md"
    if notes.exists():
        parts.append(notes.read_text())
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "methods.md").write_text(page())
