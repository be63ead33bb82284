"""Write docs/methods.md: every method, from its docstring and the committed results of the bench.

.venv/bin/python docs/methods.py
"""

import inspect
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from whence.diffusion.forward import Denoiser, linear_schedule
from whence.methods import METHODS, NEEDS, settings_of, short
from whence.report.words import ERRORS
from whence.types import Task, image_by_image

ROOT = Path(__file__).resolve().parent.parent
# A question about a denoiser, of which methods say what their errors would be.
NOWHERE = Task(Denoiser(linear_schedule()), (), (), (), Path(), sampled=SimpleNamespace(timesteps=range(50)))
KINDS = ("heldout", "generated")
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# The methods

Written by `docs/methods.py` from the code and from
[bench-digits.json](../benchmarks/results/bench-digits.json). The formula that most of them share:

    score[q, i] = sum_c eta_c * a_q * (psi_q^T H_c^-1 phi_i) * b_i * w_i

psi, phi: features of query and training image, mostly gradients averaged over draws (timestep, noise) and projected; H: a
preconditioner; a, b: row scales; eta: weights of checkpoints; w: one number per training image. Larger = the image did more
FOR the query. A projection has at most `dim` columns: where the chosen parameters are no more than that, as with a small
LoRA, there is none, and the gradients are exact, which the run says and the recipe keeps. [bench.md](bench.md) compares
all methods on one bank, [truth.md](truth.md) says how they are judged, and
[map.html](map.html), one file for a browser, shows them by year and family, with what builds on what, or by LDS and time.

*LDS*: on the digits bank, held-out | generated queries, with 95 % intervals; damping chosen on other subsets. It says how
methods rank on that bank. *At its defaults*: with nothing chosen ([noise.md](noise.md)). *Standard errors*: what they are of, at the defaults of the method and for denoisers
([errors.md](errors.md)).

Settings that many methods share, and that mean the same in all of them unless said otherwise:

"""
SHARED_BY = 5  # methods with the same words for a setting, which are then said once


def lds(rows, name):
    row = rows.get(name)
    if row is None:
        return None
    cells = {kind: "{lds:.3f} [{low:.3f}, {high:.3f}]".format(**row[kind]) for kind in KINDS if kind in row}
    return " | ".join(cells.get(kind, "none") for kind in KINDS)


def split(entry):
    """The docstring of a method before its `Args:`, and what it says of each argument."""
    body, _, arguments = (inspect.getdoc(entry.make) or "").partition("\n\nArgs:\n")
    lines = re.sub(r"\n {5,}", " ", arguments).splitlines()
    return body, dict(line.strip().split(": ", 1) for line in lines)


def shared_settings():
    """What at least SHARED_BY methods say of a setting in the same words."""
    said = Counter(
        pair for name, entry in METHODS.items() for pair in split(entry)[1].items() if pair[0] in settings_of(name)
    )
    return {name: text for (name, text), count in said.items() if count >= SHARED_BY}


def bullets(settings):
    return "\n".join(f"* `{name}`: {text}" for name, text in settings.items())


def listed(name, entry, shared):
    """The settings of a method: the names of those that are said above, the others in words."""
    said = split(entry)[1]
    defaults = settings_of(name)
    shown = {key: key if value == "" else f"{key}={short(value)}" for key, value in defaults.items()}
    own = {shown[key]: said[key] for key in defaults if said[key] != shared.get(key)}
    common = [f"`{shown[key]}`" for key in defaults if said[key] == shared.get(key)]
    above = f"{', '.join(common)} (see above)" if common else ""
    if not own:
        return f"Settings: {above or 'none'}."
    return f"Settings: {above}{', and' if common else ''}\n\n{bullets(own)}".replace("Settings: \n", "Settings:\n")


def section(name, entry, bench, shared):
    body, _ = split(entry)
    facts = [entry.paper if entry.year is None else f"{entry.paper} {entry.year}", entry.cost]
    facts += [f"needs {NEEDS[need].words}" for need in entry.needs]
    facts.append("denoisers only" if entry.classifier is None else "denoisers and classifiers")
    measured = lds(bench["rows"], name)
    if measured is None:
        why = bench["skipped"].get(name)
        measured = f"none ({why})" if why else "not on the digits bank"
    settings = listed(name, entry, shared)
    stated = entry.make().stated(NOWHERE)
    kind = f"of the {stated.of}" if stated.of in ERRORS else "0, because no part of it is drawn by chance"
    errors = f"Standard errors: {kind if stated.of else f'none ({stated.because})'}.\n"
    lines = f"LDS: {measured}.\n\n{by_default(name)}{errors}"
    return f"## {name}\n\n*{'; '.join(facts)}*\n\n```text\n{body}\n```\n\n{settings}\n\n{lines}"


def by_default(name):
    """The LDS at the settings that a method has when nothing is said; empty where it was not measured."""
    path, draws = RESULTS / "noise-digits.json", settings_of(name).get("draws")
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    row = rows.get(f"{name}:{draws.count}" if draws else "", rows.get(name))
    if row is None:
        return ""
    found = [row[kind]["shared" if draws.shared else "own"] for kind in KINDS]
    told = " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*each["lds"][0]) for each in found)
    seeds = " | ".join(f"{each['seeds']:.2f}" for each in found)
    return f"LDS at its defaults: {told}; two seeds rank the images of a query alike by {seeds} (Spearman).\n\n"


EXCEPTIONS = """## Exceptions

None: every method runs on every family of models (UNet2DModel, Stable Diffusion 1 and 2, SDXL, DiT, PixArt, SD3, Flux, and
a LoRA on them), given what it needs; `tests/test_families_contract.py` tries all pairs. Those that train again need a model
or LoRA of `whence train`; DiT is trained by LoRA alone, because its own dropout of labels cannot be replayed.
"""


CANDIDATES = """## Candidates

`--candidates 50 --candidates_by pixel_cosine` (in Python `candidates=50, candidates_by="pixel_cosine"`) has only those
training images scored that a cheap method ranks among the first 50 of at least one query. The cheap method runs first,
on all images, with its own settings unless it is asked for with `--method` too, and its scores are kept like any
others.

Nothing is approximated: the curvature of the dear method is that of all training images, and a candidate's score is the
one that it has without the option (`tests/test_candidates.py`). What is saved are the features of the other images, and
they have no score, which is not a score of 0: opponents among them are not found, and sums over groups, `whence lds`
and `whence counterfactual` are refused. [candidates.json](../benchmarks/results/candidates.json) says how many of the
images that EK-FAC ranks first are among the candidates on the digits bank, and what was saved.

Score image by image, and take the option: {alone}.

Take all training images together, and refuse it: {together}.

A method, or a preconditioner, of your own says `image_by_image = True` if what it gives an image is the same whichever
others are scored; without that it is refused.
"""


def candidates():
    """Which methods score candidates alone, as they say themselves."""
    alone = {name: image_by_image(entry.make()) for name, entry in METHODS.items()}
    listed = {kept: ", ".join(f"`{name}`" for name, says in alone.items() if says == kept) for kept in (True, False)}
    return CANDIDATES.format(alone=listed[True], together=listed[False])


def page():
    bench = json.loads((RESULTS / "bench-digits.json").read_text())
    shared = shared_settings()
    parts = [f"{HEAD}{bullets(shared)}\n"]
    parts += [section(name, entry, bench, shared) for name, entry in METHODS.items()]
    parts += [candidates(), EXCEPTIONS]
    notes = ROOT / "docs" / "methods-notes.md"
    if notes.exists():
        parts.append(notes.read_text())
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "methods.md").write_text(page())
