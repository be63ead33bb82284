"""Run a script of cells, and keep it with what its cells printed as a notebook beside it.

    python examples/run.py NAME [NAME ...]        all of them by default; works in runs/examples/NAME

A script has the percent format: `# %%` begins a cell of code, `# %% [markdown]` one of text. What a cell prints, and the value of
its last line, is kept; what it warns of is not. Any tool that reads .ipynb shows them, and none is needed to run them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = tuple(sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run"))
TEXT = "[markdown]"


def cells(text: str) -> list[tuple[str, str]]:
    """(markdown or code, content) of each cell."""
    found = []
    for part in ("\n" + text).split("\n# %%")[1:]:
        head, _, body = part.partition("\n")
        if TEXT in head:
            lines = [line[2:] if line.startswith("# ") else line.removeprefix("#") for line in body.strip("\n").split("\n")]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", body.strip("\n")))
    return found


def outputs(code: str, names: dict[str, object], count: int) -> list[dict[str, object]]:
    """What a cell prints, and what its last line is worth, as a notebook has it."""
    tree, printed = ast.parse(code), io.StringIO()
    last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {count}", "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last), f"cell {count}", "eval"), names)
    found: list[dict[str, object]] = []
    if printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        data = {"text/plain": repr(value)}
        shown = getattr(value, "_repr_html_", None)
        if shown is not None:
            data["text/html"] = shown()
        found.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return found


def notebook(text: str) -> dict[str, object]:
    """The script as a notebook, its cells run one after the other."""
    names: dict[str, object] = {"__name__": "__main__"}
    made, count = [], 0
    for place, (kind, content) in enumerate(cells(text)):
        cell: dict[str, object] = {"cell_type": kind, "id": f"cell-{place}", "metadata": {}, "source": content}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": outputs(content, names, count)}
        made.append(cell)
    language = {"name": "python", "display_name": "Python 3", "language": "python"}
    return {"cells": made, "metadata": {"kernelspec": language}, "nbformat": 4, "nbformat_minor": 5}


def main(wanted: list[str]) -> None:
    os.environ["WHENCE_QUIET"] = "1"
    home = Path.cwd()
    for name in wanted or SCRIPTS:
        begun, work = time.monotonic(), home / "runs" / "examples" / name
        work.mkdir(parents=True, exist_ok=True)
        os.chdir(work)
        made = notebook((HERE / f"{name}.py").read_text())
        os.chdir(home)
        (HERE / f"{name}.ipynb").write_text(json.dumps(made, indent=1) + "\n")
        print(f"{name}: {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
