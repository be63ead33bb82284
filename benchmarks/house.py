"""How the house is built, counted from the source: rooms, sizes of files and functions, parameters, escapes from typing.

    python benchmarks/house.py            prints a table and the offenders by name; benchmarks/results/house.json

A function's whole length goes from its first decorator to its last line, so that declared options count. Its body is the
lines of code after the docstring: neither signature, nor docstring, nor comments, nor blank lines; stubs (`...`) are left
out, and a nested function counts both by itself and in the one that holds it. Parameters are
those of `def`, self included; settings are none: neither fields of dataclasses, nor the settings of a method, which
`@method` reads from its function. Lines that name `Any` are lines of code other than imports.
"""

import ast
import statistics
import tokenize
from pathlib import Path

from _record import ROOT, SMOKE, record

SOURCE = ROOT / "src" / "whence"
MARKS = {
    "rooms at the top level": 17,
    "lines of the longest file": 450,
    "lines of the longest function": 60,
    "most parameters of a function": 8,
    "median lines of a function's body": 6,
    "lines that name Any": 59,
    "calls of getattr or hasattr": 10,
}


def main():
    paths = sorted((SOURCE / "evaluation" if SMOKE else SOURCE).rglob("*.py"))
    functions = {name: node for path in paths for name, node in functions_of(path)}
    counted = {
        "rooms at the top level": {room: 1 for room in rooms()},
        "lines of the longest file": {short(path): len(path.read_text().splitlines()) for path in paths},
        "lines of the longest function": {name: whole_length(node) for name, node in functions.items()},
        "most parameters of a function": {name: parameters(node) for name, node in functions.items()},
        "lines that name Any": {short(path): len(lines_naming(path, {"Any"})) for path in paths},
        "calls of getattr or hasattr": {short(path): calls(path, {"getattr", "hasattr"}) for path in paths},
    }
    bodies = [body_length(path, node) for path in paths for _, node in functions_of(path) if not stub(node)]
    found = {name: summary(name)(each.values()) for name, each in counted.items()}
    found["median lines of a function's body"] = statistics.median(bodies)
    table = {name: {"found": found[name], "mark": mark, "kept": found[name] <= mark} for name, mark in MARKS.items()}
    offenders = {name: worst(name, each) for name, each in counted.items() if not table[name]["kept"]}
    payload = {"marks": table, "offenders": offenders, "files": len(paths), "functions": len(functions)}
    record("house", {**payload, "isinstance": sum(calls(path, {"isinstance"}) for path in paths)})
    for name, row in table.items():
        print(f"{'kept' if row['kept'] else 'OVER':5}{name:36}{row['found']:>6}   at most {row['mark']}")
    for name, each in offenders.items():
        print(f"\n{name}, at most {MARKS[name]}:")
        print("\n".join(f"  {count:5}  {place}" for place, count in each.items()))


def summary(name):
    """Marks of single files and functions hold for the largest, the others for all together."""
    return max if name.startswith(("lines of the longest", "most")) else sum


def worst(name, each):
    """What is over the mark, or what adds most to a sum that is; the largest first."""
    floor = MARKS[name] if summary(name) is max else 0
    ordered = sorted(each.items(), key=lambda item: -item[1])
    return {place: count for place, count in ordered if count > floor}


def rooms():
    inside = [path for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    return sorted(path.stem for path in inside if path.name != "__init__.py")


def short(path):
    return str(path.relative_to(SOURCE))


def functions_of(path):
    """(file:line name, node) of every function, methods and nested ones included."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(f"{short(path)}:{node.lineno} {node.name}", node) for node in nodes]


def whole_length(node):
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return node.end_lineno - first + 1


def body(node):
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def stub(node):
    return all(isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant) for each in node.body)


def body_length(path, node):
    first, last = body(node)[0].lineno, node.end_lineno
    return len({line for line in code_lines(path) if first <= line <= last})


_CODE = {}


def code_lines(path):
    """Numbers of the lines that hold more than comments and blanks."""
    if path not in _CODE:
        nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        _CODE[path] = {
            line
            for token in tokens(path)
            if token.type not in nothing | {tokenize.ENDMARKER, tokenize.ENCODING}
            for line in range(token.start[0], token.end[0] + 1)
        }
    return _CODE[path]


def tokens(path):
    with Path(path).open("rb") as file:
        return list(tokenize.tokenize(file.readline))


def parameters(node):
    if any(isinstance(each, ast.Call) and getattr(each.func, "id", "") == "method" for each in node.decorator_list):
        return 0  # they are declared settings
    given = node.args
    listed = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(each is not None for each in listed)


def lines_naming(path, words):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {line for node in imports for line in range(node.lineno, node.end_lineno + 1)}
    named = {token.start[0] for token in tokens(path) if token.type == tokenize.NAME and token.string in words}
    return named - imported


def calls(path, names):
    nodes = ast.walk(ast.parse(path.read_text()))
    return sum(isinstance(node, ast.Call) and getattr(node.func, "id", None) in names for node in nodes)


if __name__ == "__main__":
    main()
