"""whence verify."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.options import Option, Verb, error
from whence.cli.terminal import say


@dataclass(frozen=True)
class Verify:
    """Read every file of a run folder, and compare it with its digest."""

    run: Annotated[Path, Option("A run folder.", "Arguments", argument=True)]


def verify(options: Verify) -> None:
    from whence.data.layout import some
    from whence.evaluation.verify import verified

    if (options.run / "plan.json").is_file():
        raise error("is a ledger", str(options.run), f"`whence ledger verify {options.run} --train_data_dir IMAGES`")
    found = verified(options.run)
    for line in found.broken:
        say(line)
    if found.read:
        say(f"{len(found.read)} files hold no digest, as earlier versions wrote them: {some(found.read)}")
    if found.unknown:
        say(f"{len(found.unknown)} files of which nothing is known: {some(found.unknown)}")
    if found.broken:
        raise error(f"{len(found.broken)} files are not what was written", str(options.run), "the lines above")
    say(f"{found.files} files are what was written")


VERB = Verb(verify, Verify)
