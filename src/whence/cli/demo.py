"""whence demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from whence.cli.common import Device, Output, engine_on, say_report
from whence.cli.options import Verb


@dataclass(frozen=True)
class Demo:
    """Train a small DDPM on digits, draw sixteen, and show which digits made them."""

    output_dir: Output = Path("demo")
    device: Device = "cpu"


def demo(options: Demo) -> None:
    from whence.evaluation.demo import demo

    say_report(demo(options.output_dir, engine_on(options.device)))


VERB = Verb(demo, Demo)
