"""whence bench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import METHOD, BankData, BankFolder, BankName, Device, Output, engine_on, write_config
from whence.cli.options import Option, Verb
from whence.cli.terminal import console, say


@dataclass(frozen=True)
class Bench:
    """Print how close every method comes to retraining, with intervals and the ceiling."""

    name: BankName
    bank_dir: BankFolder = None
    data_dir: BankData = None
    methods: Annotated[tuple[str, ...], Option("Rows to compute; all by default. May be repeated.", METHOD)] = ()
    draws: Annotated[int, Option("(timestep, noise) pairs per image.", METHOD, min=1)] = 100
    dim: Annotated[int, Option("Columns of the projection.", METHOD, min=1)] = 4096
    output_dir: Output = Path("runs/bench")
    device: Device = "cpu"


def bench(options: Bench) -> None:

    from whence.evaluation import banks
    from whence.evaluation import bench as room

    recipe, root = banks.by_name(options.name, options.data_dir), options.output_dir
    found = banks.load(options.name, recipe, options.bank_dir)
    settings, engine = room.Settings(room.uniform(options.draws), options.dim), engine_on(options.device)
    result = room.run(found, recipe, root, list(options.methods) or None, settings, engine)
    write_config(options, root)
    console(width=170).print(room.grid(result))
    for method, why in result["skipped"].items():
        say(f"{method}: {why}")
    say(f"result: {root / 'bench.json'}, {root / 'bench.png'}")


VERB = Verb(bench, Bench, config=True)
