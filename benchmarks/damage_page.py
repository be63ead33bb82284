"""Write docs/damage.md from the results of damage.py."""

import json

from _record import RESULTS, ROOT, SMOKE

OUTCOMES = ("refused", "same", "told", "unseen", "nameless", "traceback", "hung")
FOLDERS = {"run": "a run folder", "ledger": "a ledger", "model": "a model", "fuzz": "nonsense in a model's files"}
INTRODUCTION = """# Damaged and hostile files

Disks flip bits, copies end half-way, people edit files, and a model from somewhere may be made to do harm. What is read is
therefore checked, in one place for each kind of file:

* Every JSON file that whence writes holds a `checksum` of its content and its name, and every array a `sha256` of its names,
  shapes, types and values and of what it is of: whole files that were mixed up, from another run, another ledger or the file
  beside, are told like damaged ones. Both are compared when they are read. Files of earlier versions hold less, or nothing,
  and are read as before.
* What a JSON file holds is checked for its types before anything is done with it; it may be nested 100 deep, and a file of a
  model 64 MB large.
* Drawn pictures are compared with the digests in `generated.json`, scores with what `images.json` says the run is of, a
  training of a ledger with its plan.
* Nothing but files is opened: a pipe, a socket or a device in the place of a file is refused at once.
* Configurations and schedulers of models are checked by name for types and values that mean something.
* `whence verify RUN` and `whence ledger verify LEDGER` go through every file of a folder and name all that is not what was
  written; `whence ledger run LEDGER --repair` removes what is broken and makes it anew.

`python benchmarks/damage.py` damages every file of a run folder, of a ledger and of a model (deleted, emptied, cut, one bit
flipped, bytes added, a folder, a pipe or a link to `/dev/zero` in its place, the whole file beside it, that of the folder
beside, that of another run, not UTF-8, JSON of other types, nested deep, fields that cannot be) and calls every command that
reads it; and it sets entries of a model's configurations, and its files of weights, to nonsense.
*refused*: exit code 2 and one line that names the file. *same*: the results of the whole files. *told*: other results, and a
line that names the file. What must not be: *unseen*, other results and no word; *nameless*, a refusal that names no file; a
*traceback*; *hung*, no end in a minute.
"""


def row(name, key, runs):
    """The outcomes of a folder or a command: one number for each run, "-" where it was not called."""
    cells = []
    for one in OUTCOMES:
        found = [run["by command"].get(key) for run in runs]
        cells.append(" / ".join("-" if counts is None else str(counts.get(one, 0)) for counts in found))
    return f"| {name} | {' | '.join(cells)} |"


def cell(counts):
    """The outcomes of all damages of a file under one command."""
    return ", ".join(f"{count} {one}" for one in OUTCOMES if (count := counts.get(one)))


def commits(of):
    """Of which commit a run is; its kinds may be of several."""
    if isinstance(of, str):
        return f"commit `{of[:12]}`"
    return "commits " + ", ".join(f"`{one[:12]}` ({FOLDERS[kind]})" for kind, one in of.items())


def page(result):
    runs = result["runs"]
    lines = [INTRODUCTION, f"\n## {' and '.join(runs).capitalize()}", ""]
    for name, run in runs.items():
        told = f"{run['damages']:,} damages and {run['fuzzed']:,} fuzzed files in {run['calls']:,} calls"
        noted = f" {run['note']}" if "note" in run else ""
        lines.append(f"* **{name}**: {told}; {commits(run['commit'])}.{noted}")
    lines += ["", f"| {' / '.join(runs)} | {' | '.join(OUTCOMES)} |", f"|---|{'---:|' * len(OUTCOMES)}"]
    for key, folder in FOLDERS.items():
        lines.append(row(f"**{folder}**", key, [*runs.values()]))
        inner = sorted({one for run in runs.values() for one in run["by command"] if one.startswith(f"{key}: ")})
        lines += [row(one.partition(": ")[2], one, [*runs.values()]) for one in inner]
    last = [*result["runs"].values()][-1]
    lines += ["\n## File by file", "", "| file | command | outcomes of its damages |", "|---|---|---|"]
    for file, commands in last["table"].items():
        lines += [f"| `{file}` | {name} | {cell(counts)} |" for name, counts in commands.items()]
    where = "[benchmarks/results/damage.json](../benchmarks/results/damage.json)"
    return "\n".join([*lines, "", f"What was damaged how, and what was said where it must not be: {where}.", ""])


if __name__ == "__main__" and not SMOKE:
    (ROOT / "docs" / "damage.md").write_text(page(json.loads((RESULTS / "damage.json").read_text())))
