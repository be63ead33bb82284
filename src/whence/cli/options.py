"""Options declared once: the fields of a frozen dataclass become a command, whose function gets one value of that class.

    @dataclass(frozen=True)
    class Options:
        \"\"\"Help of the verb.\"\"\"
        run: Annotated[Path, Option("A run folder.", "Input", argument=True)]
        draws: Annotated[int | None, Option("Pairs per image.", "Method", min=1)] = None

An option that does not apply is an error: `needs` and `without` say beside the option when it applies, and `parsed` holds
every verb to it.
"""

from __future__ import annotations

import inspect
import shutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import typer
from typer.core import TyperCommand

from whence.cli.terminal import say

if typing.TYPE_CHECKING:
    from whence.types import WhenceError

WIDE = 100  # columns of a terminal from which on tables of options have room: narrower ones would cut their names
Options = TypeVar("Options")
Values = dict[str, Any]  # options by name, of whatever type each is


@dataclass(frozen=True)
class Option:
    """How a field is given on the command line, as --NAME.

    Args:
        help: one sentence; defaults and bounds are added to it.
        group: the heading it stands under in the help.
        argument: given by its place instead of by its name.
        min, max: bounds of a number.
        accepted: the only values, where there are few.
        needs: options of which at least one must be given, too: "name", or "name=value" for one with that value.
        without: options that must not be given beside it.
        hub: "model" or "dataset" where a name of the Hugging Face Hub stands for a folder, too.
    """

    help: str
    group: str
    argument: bool = False
    min: float | None = None
    max: float | None = None
    accepted: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    hub: str = ""


@dataclass(frozen=True)
class Declaration:
    """A field of a class of options. kind: its type, without None and tuple; many: it may be repeated."""

    name: str
    kind: type
    optional: bool
    many: bool
    default: Any
    option: Option

    @property
    def shown(self) -> str:
        """As people write it."""
        # A word of Python, like "for", has an underscore behind it as a field.
        return self.name.upper() if self.option.argument else f"--{self.name.rstrip('_')}"

    def parameter(self) -> inspect.Parameter:
        """What typer reads."""
        kind: Any = types.GenericAlias(list, self.kind) if self.many else self.kind
        default = inspect.Parameter.empty if self.default is MISSING else self.default
        if self.many and self.default is not MISSING:
            default = list(self.default)
        annotation: object = Annotated[kind | None if self.optional else kind, self._info()]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def _info(self) -> typer.models.ParameterInfo:
        option = self.option
        info: typer.models.ParameterInfo
        if option.argument:
            info = typer.Argument(help=option.help, rich_help_panel=option.group, min=option.min, max=option.max)
        else:
            info = typer.Option(
                self.shown, help=option.help, rich_help_panel=option.group, min=option.min, max=option.max
            )
        if option.accepted:
            info.autocompletion = lambda: list(option.accepted)
        return info

    def fits(self, value: object) -> bool:
        """Whether a value of a file is of this type: what the command line would have made of its text."""
        if self.many:
            return isinstance(value, list) and all(self._is_one(item) for item in value)
        return self._is_one(value)

    def _is_one(self, value: object) -> bool:
        if isinstance(value, bool) or self.kind is bool:
            return isinstance(value, bool) and self.kind is bool
        if self.kind is float:
            return isinstance(value, (int, float))
        return isinstance(value, int if self.kind is int else str)

    def told(self) -> str:
        """The type in words."""
        words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path in quotes"}
        one = words.get(self.kind, "a text in quotes")
        return f"a list, each item {one}" if self.many else one


def declarations(options: type) -> dict[str, Declaration]:
    """The options of a verb by name, in order."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {field.name: _declaration(field.name, hints[field.name], field.default) for field in fields(options)}


def _declaration(name: str, hint: object, default: object) -> Declaration:
    kind, option = typing.get_args(hint)
    optional, many = isinstance(kind, types.UnionType), typing.get_origin(kind) is tuple
    if optional or many:  # X | None, tuple[X, ...]
        kind = typing.get_args(kind)[0]
    return Declaration(name, kind, optional, many, default, option)


def given(value: object) -> bool:
    """Whether an option has a value that says something."""
    return value is not None and value is not False and value != ()


def met(need: str, values: Mapping[str, object]) -> bool:
    """Whether "name" is given, or "name=value" holds."""
    name, sign, wanted = need.partition("=")
    return str(values[name]) == wanted if sign else given(values[name])


def applies(option: Option, values: Mapping[str, object]) -> bool:
    return not option.needs or any(met(need, values) for need in option.needs)


def refuse_what_does_not_apply(
    declared: Mapping[str, Declaration], values: Mapping[str, object], named: set[str]
) -> None:
    """Every option that was named applies beside the others. named: by the user, in whatever way."""
    for name in (name for name in declared if name in named):
        one = declared[name]
        if one.option.accepted and str(values[name]) not in one.option.accepted:
            raise error(f"{one.shown} {values[name]!r}", accepted=", ".join(one.option.accepted))
        for other in one.option.without:
            if other in named:
                raise error(f"{one.shown} and {declared[other].shown} exclude each other", accepted="one of them")
        if given(values[name]) and not applies(one.option, values):
            needs = " or ".join(_shown(need, declared) for need in one.option.needs)
            raise error(f"{one.shown} applies only with {needs}", accepted=f"both, or no {one.shown}")


def _shown(need: str, declared: Mapping[str, Declaration]) -> str:
    name, sign, wanted = need.partition("=")
    return f"{declared[name].shown} {wanted}" if sign else declared[name].shown


def error(what: str, where: str = "", accepted: str = "") -> WhenceError:
    """The error of bad input, imported only when there is one."""
    from whence.plain import WhenceError

    return WhenceError(what, where, accepted)


@dataclass(frozen=True)
class Verb(Generic[Options]):
    """A command of the command line.

    Args:
        run: what it does with its options.
        options: the class of its options; its docstring is the help.
        config: whether all options may be given in a file with --config, too.
    """

    run: Callable[[Options], None]
    options: type[Options]
    config: bool = False

    def command(self, name: str) -> TyperCommand:
        """As typer runs it."""
        declared = declarations(self.options)

        def run(ctx: typer.Context, **values: Any) -> None:
            self.run(self.parsed(ctx, declared, values))

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *(one.parameter() for one in declared.values())]
        if any(one.option.hub for one in declared.values()):
            parameters.append(_download_parameter())
        if self.config:
            parameters.append(_config_parameter(declared))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wide = shutil.get_terminal_size().columns >= WIDE
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich" if wide else None)
        alone.command(name, help=inspect.getdoc(self.options), no_args_is_help=_required(declared))(run)
        made = typer.main.get_command(alone)
        assert isinstance(made, TyperCommand)
        return made

    def parsed(self, ctx: typer.Context, declared: Mapping[str, Declaration], values: Values) -> Options:
        """The options as one value, checked."""
        found = {name: tuple(values[name]) if one.many else values[name] for name, one in declared.items()}
        sources = {name: _source(ctx, name) for name in found}
        named = {name for name, source in sources.items() if source in ("COMMANDLINE", "DEFAULT_MAP")}
        typed = {name for name, source in sources.items() if source == "COMMANDLINE"}
        file = dict(ctx.default_map or {})
        if file:
            path = values["config"]
            say_which_wins(declared, {name: found[name] for name in declared if name in typed}, file, path)
            named -= _give_way(declared, found, typed, named - typed, path)
        refuse_what_does_not_apply(declared, found, named)
        found = {name: _spelled(name, value) for name, value in found.items()}
        return self.options(**_on_disk(declared, found, bool(values.get("download"))))


NAMES_OF_METHODS = ("method", "methods", "candidates_by", "for_")


def _spelled(name: str, value: object) -> object:
    """Names of methods as we write them, whichever way they were given (`registry.spelled`)."""
    if name not in NAMES_OF_METHODS or not given(value):
        return value
    from whence.methods.registry import spelled

    return tuple(map(spelled, value)) if isinstance(value, tuple) else spelled(str(value))


def _required(declared: Mapping[str, Declaration]) -> bool:
    return any(one.default is MISSING for one in declared.values())


def _source(ctx: typer.Context, name: str) -> str:
    source = ctx.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


# ------------------------------------------------------------------------------------------------------ names of the hub


def _download_parameter() -> inspect.Parameter:
    help = "Fetch models and data sets of the Hugging Face Hub that are named and not in its cache here."
    annotation = Annotated[bool, typer.Option("--download", help=help, rich_help_panel="Running")]
    return inspect.Parameter("download", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


def _on_disk(declared: Mapping[str, Declaration], values: Values, download: bool) -> Values:
    """The same with a folder in place of each name of the hub; without --download nothing is asked of anybody."""
    found = dict(values)
    for name, one in declared.items():
        if one.option.hub and given(values[name]):
            paths = [_located(path, one, download) for path in (values[name] if one.many else [values[name]])]
            found[name] = tuple(paths) if one.many else paths[0]
    return found


def _located(path: Path, one: Declaration, download: bool) -> Path:
    if path.is_absolute() or path.parent == Path():  # of no hub; nothing heavy is imported
        return path
    from whence.storage.hub import located

    place = located(path, one.option.hub, download, one.shown)
    if place.said:
        _say(place.said)
    return place.path


# ------------------------------------------------------------------------------------------------------- config files


def _config_parameter(declared: Mapping[str, Declaration]) -> inspect.Parameter:
    def read(ctx: typer.Context, value: Path | None) -> Path | None:
        if value is not None:
            ctx.default_map = read_config(value, declared)
        return value

    help = "A .toml file with options, as every run folder holds; an option of the command line wins over it."
    option = typer.Option("--config", help=help, rich_help_panel="Running", callback=read, is_eager=True)
    annotation = Annotated[Path | None, option]
    return inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def read_config(path: Path, declared: Mapping[str, Declaration]) -> Values:
    """The options of a file: each one is known, and of its type."""
    import difflib
    import tomllib

    from whence.storage.files import text_of

    accepted = "lines like seed = 1"
    try:
        found = tomllib.loads(text_of(path, accepted))
    except tomllib.TOMLDecodeError as problem:
        raise error(f"cannot be read as TOML ({problem})", f"--config {path}", accepted) from None
    for name, value in found.items():
        if name not in declared:
            near = difflib.get_close_matches(name, declared, 3) or list(declared)
            raise error(f"no option {name!r}", str(path), ", ".join(near))
        if not declared[name].fits(value):
            raise error(f"{name} = {value!r}", str(path), declared[name].told())
    return found


def say_which_wins(declared: Mapping[str, Declaration], typed: Values, file: Values, path: Path) -> None:
    """An option of the command line wins over the file, and this is said."""
    for name, value in typed.items():
        written = tuple(file[name]) if isinstance(file.get(name), list) else file.get(name)
        if name in file and plain(value) != plain(written):
            _say(f"{declared[name].shown} {plain(value)} wins over {name} = {plain(written)} in {path}")


def _give_way(
    declared: Mapping[str, Declaration], values: Values, typed: set[str], written: set[str], path: Path
) -> set[str]:
    """Options of the file that do not go with those of the command line are left out, and this is said."""
    gone = {other for name in typed if given(values[name]) for other in declared[name].option.without} & written
    for name in typed:
        gone |= {other for other in written if name in declared[other].option.without}
    while True:
        for name in gone:
            values[name] = declared[name].default
        more = {name for name in written - gone if given(values[name]) and not applies(declared[name].option, values)}
        # Only what lost its need to the command line: a file that was wrong before still is.
        more = {name for name in more if any(need.partition("=")[0] in gone for need in declared[name].option.needs)}
        if not more:
            break
        gone |= more
    for name in sorted(gone):
        _say(f"{name} in {path} does not go with the options of the command line and is left out")
    return gone


def _say(message: str) -> None:
    say(f"whence: {message}", err=True)


def plain(value: object) -> object:
    """A value as TOML holds it."""
    if isinstance(value, Path):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def config_of(options: object) -> str:
    """All options that apply as the text of a .toml file. Paths become absolute, so that it may be read from anywhere."""
    declared, values = declarations(type(options)), vars(options)
    lines = []
    for name, one in declared.items():
        value = values[name]
        if given(value) and applies(one.option, values):
            absolute = value.absolute() if isinstance(value, Path) else value
            if one.many and one.kind is Path:
                absolute = tuple(item.absolute() for item in value)
            lines.append(f"{name} = {toml(plain(absolute))}\n")
    return "".join(lines)


def toml(value: object) -> str:
    """A text, number, truth value or list of them in TOML."""
    import json

    if isinstance(value, list):
        return f"[{', '.join(toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)  # of these types, JSON and TOML write the same
