"""whence loras."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, METHOD, Output, write_config
from whence.cli.options import Option, Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Loras:
    """Say which LoRAs of one base are related: the cosine of what they change. No base model is needed."""

    folder: Annotated[
        Path,
        Option("A folder of LoRAs of diffusers, peft or kohya, in files or subfolders.", "Arguments", argument=True),
    ]
    query: Annotated[
        Path | None, Option("A LoRA that is asked about: its folder or file, in the folder or elsewhere.", DATA)
    ] = None
    labels: Annotated[
        Path | None,
        Option("Which data made each: a CSV file with columns lora and label; by default the subfolders.", DATA),
    ] = None
    similarity: Annotated[
        str,
        Option("plain, or centred: without the mean of the folder's LoRAs.", METHOD, accepted=("plain", "centred")),
    ] = "plain"
    output_dir: Output = Path("runs/loras")


def loras(options: Loras) -> None:
    from whence.evaluation import related as room

    found = room.related(options.folder, options.query, options.labels, options.similarity)
    room.write_related(found, options.output_dir)
    write_config(options, options.output_dir)
    for line in room.lines(found):
        say(line)
    say(f"tables: {options.output_dir / 'loras.csv'}, pairs.csv")
    say(f"picture: {options.output_dir / 'loras.png'}")


VERB = Verb(loras, Loras, config=True)
