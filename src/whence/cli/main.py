"""The command line. Option names are those of diffusers' own training scripts; 0 done, 2 bad input, 1 our bug.

Nothing heavy is imported here: `whence --help` and shell completion are to be there at once.
"""

from __future__ import annotations

import errno
import re
import sys
import warnings
from typing import Annotated

import typer
from typer.core import TyperCommand

import whence
from whence.cli.stopping import INTERRUPTED, MESSAGE, listening, stopped
from whence.cli.terminal import joined, say
from whence.cli.verbs import Later, Verbs, walk

SCORE, JUDGE, MODELS = "Attribute", "How sure are we?", "Train and look ahead"
VERBS = {
    "attribute": Later("attribute:VERB", "Score every training image for every picture, and write a report.", SCORE),
    "index": Later("index:GROUP", "Measure training images once, for any pictures afterwards.", SCORE),
    "query": Later("query:VERB", "Ask an index, or a finished run, about other pictures.", SCORE),
    "doctor": Later("doctor:VERB", "Say what is wrong and what a run will cost, before it starts.", SCORE),
    "copies": Later("copies:VERB", "Say which pictures look like copies of training images.", SCORE),
    "clean": Later(
        "clean:VERB", "Say which training images are double, mislabelled, harmful or unlike the rest.", SCORE
    ),
    "loras": Later("loras:VERB", "Say which LoRAs are related, and which data made them.", SCORE),
    "membership": Later("membership:VERB", "Say whether a model was trained on a set of images.", SCORE),
    "replay": Later("replay:VERB", "Compute a result again from its recipe, and compare.", SCORE),
    "distill": Later("distill:VERB", "Fit a network to a slow method's scores: milliseconds a picture.", SCORE),
    "contrast": Later("contrast:VERB", "Which images made this picture rather than that one.", SCORE),
    "view": Later("view:VERB", "Look at finished runs in a browser, on this machine alone.", SCORE),
    "report": Later("report:VERB", "Write the report of a finished run again.", SCORE),
    "verify": Later("verify:VERB", "Compare every file of a run folder with its digest.", SCORE),
    "remove-first": Later("remove_first:VERB", "Name the images whose removal would hurt a picture most.", SCORE),
    "methods": Later("methods:VERB", "Print every method, its paper, what it computes and needs.", SCORE),
    "demo": Later("demo:VERB", "Train on digits, show which of them made what it draws, and who was right.", SCORE),
    "train": Later("train:GROUP", "Train a model whose every step can be reproduced.", MODELS),
    "preview": Later("preview:VERB", "A model's pictures as they would be without some images.", MODELS),
    "unlearn": Later("unlearn:VERB", "A model that has forgotten a picture, and what it draws then.", MODELS),
    "neurons": Later("neurons:VERB", "Find and switch off the neurons that bring back memorised pictures.", MODELS),
    "ledger": Later("ledger:GROUP", "Retrain a model on subsets, and keep what comes out.", JUDGE),
    "credit": Later("credit:VERB", "Which share each contributor has, with intervals, and what is nobody's.", JUDGE),
    "values": Later(
        "values:VERB", "What images or their owners are worth by retraining: Shapley, influence ...", JUDGE
    ),
    "lds": Later("lds:VERB", "Judge the scores of a run by a ledger.", JUDGE),
    "bench": Later("bench:VERB", "How close every method comes to retraining, on a bank.", JUDGE),
    "abc": Later(
        "abc:GROUP", "A benchmark of fine-tunes whose exemplars are known, and a method learned on it.", JUDGE
    ),
    "counterfactual": Later("counterfactual:VERB", "Take away what the methods name, and retrain.", JUDGE),
    "bank": Later("bank:VERB", "Build a bank of retrained models.", JUDGE),
}


class Main(Verbs):
    later = VERBS


app = typer.Typer(
    cls=Main,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Which training images made this picture, and how sure are we? Positive = proponent.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"whence {whence.__version__}")
        raise typer.Exit()


@app.callback()
def base(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def every_command() -> dict[tuple[str, ...], TyperCommand]:
    """All commands, imported, under the words that call them: ("ledger", "plan") ..."""
    root = typer.main.get_command(app)
    assert isinstance(root, Verbs)
    return dict(walk(root))


# What the machine refuses is no bug of ours: full disks, folders that may not be written, files in the way.
REFUSED = {
    errno.ENOSPC: "free some space and run the same command again to go on",
    errno.EFBIG: "see `ulimit -f`, or give a folder on another disk",
    errno.EDQUOT: "free some space and run the same command again to go on",
    errno.EACCES: "make it readable and writable, or give another folder",
    errno.EPERM: "make it readable and writable, or give another folder",
    errno.EROFS: "give a folder on a disk that can be written",
    errno.ENOTDIR: "a folder is needed there; give another one",
    errno.EEXIST: "a folder is needed there; give another one",
    errno.EISDIR: "a file is needed there; give another one",
    errno.ELOOP: "give another folder",
    errno.ESTALE: "mount its disk again, or give another folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EIO: "the disk may be failing; give another one",
}


# As numpy, torch on a CPU and torch on a GPU say it.
NO_MEMORY = re.compile(r"(?:Unable|[Tt]ried) to allocate ([\d.]+ \w+)")
SMALLER = "give a smaller --resolution, --draws, --dim, --batch_size or --budget_mb and run again to go on"


def main() -> None:
    """Run the command line with the promised exit codes."""
    warnings.showwarning = _Warn()
    with listening():
        try:
            code = app(standalone_mode=False) or 0  # typer.Exit, and Ctrl-C, come back as their code
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except Exception as error:
            code = INTERRUPTED if stopped() else _told(error)
        if code == INTERRUPTED:
            _fail(MESSAGE, code)
    sys.exit(code)


def _told(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if hasattr(error, "format_message"):  # click's own complaints about options; empty where it printed the help
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            typer.echo(message)
            return 2
        return _fail(joined(message), 2) if message.strip() else 2
    if isinstance(error, OSError) and error.errno in REFUSED:
        return _fail(f"{error.filename or 'the disk'}: {error.strerror}; {REFUSED[error.errno]}", 2)
    asked = NO_MEMORY.search(str(error))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and asked):
        return _fail(f"out of memory ({asked.group(1) if asked else 'nothing is free'} more asked for); {SMALLER}", 2)
    from whence.types import VERSION, WhenceError  # after the others: whoever raised one has imported torch

    if isinstance(error, WhenceError):
        return _fail(str(error), 2)
    import traceback

    traceback.print_exception(error)
    return _fail(f"this is a bug in whence {VERSION}; please report it with the lines above", 1)


class _Warn:
    """Each warning of a call in one line, once: a folder may be opened from several places."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    def __call__(self, message: Warning | str, *where: object, **more: object) -> None:
        line = joined(str(message))
        if line not in self.told:
            self.told.add(line)
            say(f"whence: warning: {line}", err=True)


def _fail(message: str, code: int) -> int:
    say(f"whence: {message.strip()}", err=True)
    return code


if __name__ == "__main__":
    main()
