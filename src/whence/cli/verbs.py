"""Commands that are imported when they are run: the help of all of them needs one line of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from whence.cli.options import Verb


@dataclass(frozen=True)
class Later:
    """A command not imported yet.

    Args:
        where: "module:name" of its `Verb` or of a group of verbs, in `whence.cli`.
        help: its line in the list of commands.
        group: the heading it is listed under.
    """

    where: str
    help: str
    group: str = "Commands"

    def load(self, name: str) -> TyperCommand | TyperGroup:
        module, _, attribute = self.where.partition(":")
        found = vars(import_module(f"whence.cli.{module}"))[attribute]
        return found.command(name) if isinstance(found, Verb) else found

    def line(self, name: str) -> TyperCommand:
        """What stands for it where only its line is needed."""
        return TyperCommand(name, help=self.help, short_help=self.help, rich_help_panel=self.group)


class Verbs(TyperGroup):
    """A group of such commands."""

    later: Mapping[str, Later] = {}

    def __init__(self, **attributes: Any) -> None:
        attributes["commands"] = {name: one.line(name) for name, one in self.later.items()}
        super().__init__(**attributes)

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(self.later)  # in this order, not by the alphabet

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.load(name), rest

    def load(self, name: str) -> TyperCommand | TyperGroup:
        """The command itself."""
        return self.later[name].load(name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list in plain text: drawing it with rich takes longer than all the rest."""
        width = max(len(name) for name in self.later)
        for group in dict.fromkeys(one.group for one in self.later.values()):
            rows = [(name.ljust(width), one.help) for name, one in self.later.items() if one.group == group]
            with formatter.section(group):
                formatter.write_dl(rows)


def walk(group: Verbs, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """Every command of a group and of the groups in it, under the words that call it."""
    for name in group.later:
        found = group.load(name)
        if isinstance(found, Verbs):
            yield from walk(found, (*path, name))
        elif isinstance(found, TyperCommand):
            yield (*path, name), found
