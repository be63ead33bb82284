"""The laws of the command line, over every command: an option has a help text and a heading, and one that does not apply is
refused in one line with exit code 2, before any work begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING
from importlib import import_module

import pytest

from test_cli import refused, whence
from whence.cli.main import every_command
from whence.cli.options import Declaration, Verb, config_of, declarations

MODULES = (
    "abc",
    "attribute",
    "bank",
    "bench",
    "clean",
    "contrast",
    "copies",
    "counterfactual",
    "credit",
    "demo",
    "doctor",
    "lds",
)
MODULES = (
    *MODULES,
    "distill",
    "index",
    "ledger",
    "loras",
    "membership",
    "methods",
    "neurons",
    "preview",
    "query",
    "remove_first",
    "replay",
    "report",
    "train",
    "unlearn",
    "verify",
    "view",
    "values",
)


def verbs() -> Iterator[tuple[tuple[str, ...], Verb]]:
    """Every verb under the words that call it: VERB of whence/cli/report.py is `report`, PLAN of ledger.py `ledger plan`."""
    for module in MODULES:
        for name, found in vars(import_module(f"whence.cli.{module}")).items():
            if isinstance(found, Verb):
                word = module.replace("_", "-")
                yield ((word,) if name == "VERB" else (word, name.lower())), found


VERBS = dict(verbs())


def words(one: Declaration, value: str | None = None) -> list[str]:
    """An option as it is typed, with a value that its type takes."""
    if one.kind is bool:
        return [one.shown]
    if value is None:
        number = str(max(one.option.min or 1, 1)) if one.kind is int else str(one.option.max or 1)
        value = number if one.kind in (int, float) else (*one.option.accepted, "/nowhere")[0]
    return [value] if one.option.argument else [one.shown, value]


def misplaced() -> Iterator[object]:
    """Every option where it does not apply: without what it needs, and beside what it excludes."""
    for path, verb in VERBS.items():
        options = declarations(verb.options)
        required = [word for one in options.values() if one.default is MISSING for word in words(one)]
        for name, one in options.items():
            own = words(one) if one.default is not MISSING else []
            if one.option.needs:
                yield pytest.param([*path, *required, *own], id=f"{' '.join(path)} {name} alone")
            for other in one.option.without:
                both = [*path, *required, *own, *words(options[other])]
                yield pytest.param(both, id=f"{' '.join(path)} {name} and {other}")


def test_every_command_is_made_of_declared_options():
    assert set(VERBS) == set(every_command())


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_option_has_a_help_text_and_a_heading(path):
    assert VERBS[path].options.__doc__
    for name, one in declarations(VERBS[path].options).items():
        assert one.option.help.strip(), name
        assert one.option.group.strip(), name
        assert one.option.help.endswith("."), name


@pytest.mark.parametrize("typed", misplaced())
def test_what_does_not_apply_is_refused(typed):
    refused(*typed, says="applies only with|exclude each other")


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_what_does_not_exist_is_refused(path):
    refused(*path, "--no_such_option", "1", says="No such option|Missing")


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_the_help_is_there(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = whence(*path, "--help")
    assert done.code == 0
    assert all(one.shown in done.out for one in declarations(VERBS[path].options).values() if not one.option.argument)


CONFIGS = {
    "unknown": ("no_such_option = 1", "no option 'no_such_option'; accepted: "),
    "wrong type": ('seed = "one"', "seed = 'one'; accepted: a whole number"),
    "truth value": ("generate = true", "accepted: a whole number"),
    "no TOML": ("seed = ", "cannot be read as TOML"),
}


@pytest.mark.parametrize(("text", "says"), CONFIGS.values(), ids=list(CONFIGS))
def test_files_of_options_are_checked(text, says, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    refused("attribute", "/m", "--train_data_dir", "/t", "--config", tmp_path / "c.toml", says=says)


def typed(verb: Verb, *arguments: object) -> object:
    """The options that a verb gets when this is typed."""
    found: list[object] = []
    command = Verb(found.append, verb.options, verb.config).command("verb")
    command.main([str(word) for word in arguments], prog_name="whence verb", standalone_mode=False)
    return found[0]


WITH_CONFIG = {path: verb for path, verb in VERBS.items() if verb.config}


def every_option(verb: Verb) -> list[str]:
    """A value for as many options as go together."""
    declared, given, chosen, left_out = declarations(verb.options), [], set(), set()
    for name, one in declared.items():
        if name not in left_out and not one.option.needs and not chosen & set(one.option.without):
            chosen.add(name)
            left_out |= set(one.option.without)
            given += words(one)
    return given


@pytest.mark.parametrize("path", WITH_CONFIG, ids=" ".join)
def test_the_file_of_a_run_gives_its_options_again(path, tmp_path):
    """What is written into a run folder, read with --config, is the same request, whatever the folder it is read from."""
    verb, file = WITH_CONFIG[path], tmp_path / "config.toml"
    options = typed(verb, *every_option(verb))
    file.write_text(config_of(options))
    required = [word for one in declarations(verb.options).values() if one.option.argument for word in words(one)]
    again = typed(verb, *required, "--config", file)
    assert config_of(again) == config_of(options)


def test_an_option_wins_over_the_file_and_this_is_said(tmp_path, capfd):
    file = tmp_path / "c.toml"
    file.write_text('seed = 3\ndraws = 5\nmethod = ["trak"]\nquery_data_dir = "/q"\n')
    base = ("/m", "--train_data_dir", "/t", "--config", file)
    verb = VERBS[("attribute",)]
    found = typed(verb, *base, "--seed", 4, "--method", "d_trak", "--draws", 5)
    assert (found.seed, found.draws, found.method) == (4, 5, ("d_trak",))
    said = capfd.readouterr().err.splitlines()
    assert said == [
        f"whence: --method ['d_trak'] wins over method = ['trak'] in {file}",
        f"whence: --seed 4 wins over seed = 3 in {file}",
    ]
    found = typed(verb, *base, "--generate", 4)
    assert (found.query_data_dir, found.generate, found.seed) == (None, 4, 3)
    said = capfd.readouterr().err
    assert "query_data_dir" in said
    assert "left out" in said
