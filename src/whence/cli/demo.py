"""whence demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from whence.cli.common import Device, Output, engine_on, say_report
from whence.cli.options import Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Demo:
    """Train on digits, draw ten, show which digits made them, and train again without these to see who was right."""

    output_dir: Output = Path("demo")
    device: Device = "cpu"


NEXT = """
On a folder of your own:
  whence doctor MODEL --train_data_dir IMAGES --query_data_dir PICTURES
  whence attribute MODEL --train_data_dir IMAGES --query_data_dir PICTURES --output_dir runs/first
  whence train new --train_data_dir IMAGES --resolution 32 --output_dir MODEL        (where there is no model yet)"""


def demo(options: Demo) -> None:
    from whence.evaluation.demo import demo

    found = demo(options.output_dir, engine_on(options.device, workers=None))
    say_report(found.report)
    for line in ("", found.said, found.basis, *NEXT.splitlines()):
        say(line.replace("\N{NO-BREAK SPACE}", " "))  # which a terminal is told by its number


VERB = Verb(demo, Demo)
