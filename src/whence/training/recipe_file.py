"""Recipes as TOML: read strictly, written completely.

    seed = 0
    [model]
    is = "NewLora"
    base = "sd/"
    [optimizer]
    is = "AdamW"
    learning_rate = 0.001

A table is a class of `recipe`, `is` its name where there is a choice. What is left out has its default; a key that the class
does not have, or a value of another type, is an error that says what would be accepted.
"""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w

from whence.diffusion import draws
from whence.diffusion.outputs import OUTPUTS, Output
from whence.storage.files import differences, text_of, write_once
from whence.training.recipe import Recipe
from whence.types import WhenceError, describe, digest

FILE = "recipe.toml"
PROTOCOLS: Mapping[type, tuple[type, ...]] = {
    draws.Density: (draws.Even, draws.LogitNormal, draws.Mode),
}
"""The classes that may stand where a protocol is asked for."""


# --------------------------------------------------------------------------------------------------------------- reading


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe in a .toml file, or in a folder of `whence train`.

    Args:
        path: the file, or the folder with recipe.toml.
        changes: "optimizer.learning_rate=1e-4" and the like, which win over the file.
    """
    path = path / FILE if path.is_dir() else path
    accepted = "a recipe like recipe.toml in a model folder"
    try:
        table = tomllib.loads(text_of(path, accepted))
    except tomllib.TOMLDecodeError as problem:
        raise WhenceError(f"cannot be read as TOML ({problem})", str(path), accepted) from None
    for change in changes:
        _set(table, change)
    recipe = recipe_of(table, str(path))
    return recipe if recipe.base is None else recipe.on(path.parent / recipe.base)  # relative to the file


def _set(table: dict[str, Any], change: str) -> None:
    """One "a.b=value" put into a table."""
    name, sign, text = change.partition("=")
    *way, last = name.strip().split(".")
    if not sign or not last:
        raise WhenceError(repr(change), "--set", "key=value, like optimizer.learning_rate=1e-4")
    for part in way:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise WhenceError(f"{part} in {change!r} is no table", "--set", "key=value, like schedule.steps=100")
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = text.strip()  # a text without its quotes


def recipe_of(table: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in the tables of a file."""
    try:
        found = _made(Recipe, table, "")
    except WhenceError as error:
        place = f"{where}: {error.where}" if error.where else where
        raise WhenceError(error.what, place, error.accepted) from None
    assert isinstance(found, Recipe)
    return found


def _made(kind: type, table: Mapping[str, Any], place: str) -> object:
    """A frozen dataclass from its table. place: of the table in the file, for messages."""
    own = {field.name: field for field in fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in table:
        if name != "is" and name not in own:
            raise WhenceError(f"{kind.__name__} has no key {name!r}{_who_has(name, kind)}", place, _near(name, own))
    lacking = [name for name, field in own.items() if name not in table and _has_no_default(field)]
    if lacking:
        raise WhenceError(f"{lacking[0]} is missing", place, ", ".join(own))
    values = {
        name: _value(hints[name], value, f"{place}.{name}" if place else name, own[name])
        for name, value in table.items()
        if name != "is"
    }
    return kind(**values)


def _value(hint: object, value: object, place: str, field: Field[object]) -> object:
    """A value of the type that a field has."""
    choices = [choice for choice in _choices(hint) if choice is not types.NoneType]
    classes = [choice for choice in choices if choice in _tables()]
    if classes:
        if not isinstance(value, Mapping):
            raise _wrong(value, place, "a table")
        return _made(_class(classes, value, place, field), value, place)
    (kind,) = choices
    if kind is Output:
        return _named_output(value, place)
    if typing.get_origin(kind) is Mapping:
        if isinstance(value, Mapping):
            return _with_none(value)
        raise _wrong(value, place, "a table")
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text in quotes"}
        raise _wrong(value, place, words.get(kind, "a path in quotes"))
    return value


def _class(classes: list[type], value: Mapping[str, object], place: str, field: Field[object]) -> type:
    """The class of a table: the one that is named, the only one, or that of the default."""
    names = {kind.__name__: kind for kind in classes}
    if "is" in value:
        named = names.get(str(value["is"]))
        if named is None:
            raise WhenceError(f"is = {value['is']!r}", place, ", ".join(names))
        return named
    if len(names) == 1:
        return classes[0]
    default = type(field.default)
    if default in classes:
        return default
    raise WhenceError("it does not say what it is", place, f"is = one of {', '.join(names)}")


def _choices(hint: object) -> list[Any]:
    """The types that a hint stands for."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [kind for part in parts for kind in PROTOCOLS.get(part, (part,))]


def _has_no_default(field: Field[object]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _wrong(value: object, place: str, accepted: str) -> WhenceError:
    return WhenceError(f"is {value!r}", place, accepted)


def _named_output(value: object, place: str) -> Output:
    if not isinstance(value, str) or value not in OUTPUTS:
        raise _wrong(value, place, ", ".join(OUTPUTS))
    return OUTPUTS[value]


def _near(name: str, own: Mapping[str, object]) -> str:
    return ", ".join(get_close_matches(name, own, 3) or own)


def _who_has(name: str, kind: type) -> str:
    """Which other classes of a recipe have a key."""
    others = [other.__name__ for other in _tables() if other is not kind and name in {f.name for f in fields(other)}]
    return f" ({', '.join(others)} {'has' if len(others) == 1 else 'have'} it)" if others else ""


@cache
def _tables() -> tuple[type, ...]:
    """The classes that may be a table of a recipe."""
    found: list[type] = []

    def walk(kind: type) -> None:
        if kind in found or kind is Output:
            return
        found.append(kind)
        for hint in typing.get_type_hints(kind).values():
            for choice in _choices(hint):
                if is_dataclass(choice) and isinstance(choice, type):
                    walk(choice)

    walk(Recipe)
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------- writing

NONE = {"is": "None"}  # TOML has no null, which configurations of networks have


def recipe_text(recipe: Recipe) -> str:
    """The text of a recipe file, from which `read_recipe` makes the same recipe."""
    plain = _table(recipe)
    order = sorted(plain, key=lambda name: isinstance(plain[name], dict))  # numbers first, as TOML needs it
    return tomli_w.dumps({name: plain[name] for name in order})


def _table(value: Any) -> dict[str, object]:
    """A frozen dataclass as a table. Fields that are None are left out, because None is then their default."""
    kind = type(value)
    found: dict[str, object] = {}
    if kind not in _tables():
        known = ", ".join(sorted(table.__name__ for table in _tables()))
        raise WhenceError(f"a {kind.__name__} cannot be written to a file", "recipe", known)
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        one = vars(value)[field.name]
        if isinstance(one, Output):
            if OUTPUTS.get(one.name) is not one:
                raise WhenceError(f"the output {one.name!r} cannot be written to a file", "recipe", ", ".join(OUTPUTS))
            found[field.name] = one.name
        elif is_dataclass(one):
            classes = [choice for choice in _choices(hints[field.name]) if is_dataclass(choice)]
            said = {"is": type(one).__name__} if len(classes) > 1 else {}
            found[field.name] = said | _table(one)
        elif one is not None:
            found[field.name] = _plain(one)
    return found


def _plain(value: object) -> object:
    """Paths and free tables as TOML holds them."""
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, Mapping):
        return {name: NONE if one is None else _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _with_none(value: object) -> object:
    """The inverse of what `_plain` does with None in a free table."""
    if value == NONE:
        return None
    if isinstance(value, Mapping):
        return {name: _with_none(one) for name, one in value.items()}
    return [_with_none(one) for one in value] if isinstance(value, list) else value


CLAIM = "# Trained here on images {images}, study {study}\n"


def keep_recipe(folder: Path, recipe: Recipe, notes: Mapping[str, object]) -> None:
    """Write recipe.toml into a folder, which from then on belongs to this training; one that is there is the same, or the
    folder is refused. Of several processes that begin at once, one writes it and all others compare.

    Args:
        folder: of the training.
        recipe: of the training.
        notes: what else the training depends on: study, images. Their digests are the first line, a comment.
    """
    path, own = folder / FILE, CLAIM.format(images=notes["images"], study=digest(notes["study"]))
    write_once(path, (own + recipe_text(recipe)).encode())
    found = text_of(path, "the recipe that was written there, or another --output_dir")
    different = differences(describe(recipe.on(None)), describe(read_recipe(path).on(None)))
    if different:
        raise WhenceError(f"{path} is another recipe ({different[0]}); use the same options or another --output_dir")
    line = found[: found.find("\n") + 1]
    if line.startswith(CLAIM[:14]) and line != own:
        what = "base or prior images" if str(notes["images"]) in line else "training images"
        raise WhenceError(f"{path} was begun with other {what}; use the same ones or another --output_dir")
