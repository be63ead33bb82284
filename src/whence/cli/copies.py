"""whence copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, METHOD, Device, Output, Skip, TrainData, engine_on, write_config
from whence.cli.options import Option, Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Copies:
    """Say which pictures look like copies of training images: nearer to one than training images are to each other. No model
    is needed."""

    train_data_dir: TrainData
    query_data_dir: Annotated[
        Path, Option("Pictures to look at: a folder, or .tar or .parquet files.", DATA, hub="dataset")
    ]
    resolution: Annotated[
        int | None, Option("Side of the square that all are brought to; as they are by default.", DATA, min=1)
    ] = None
    skip: Skip = False
    encoder: Annotated[
        tuple[Path, ...],
        Option(
            "Compare by this encoder, too: the folder of a CLIP, ViT or DINO model; may be repeated.",
            METHOD,
            hub="model",
        ),
    ] = ()
    rate: Annotated[
        float, Option("Share of pictures that are no copies that each comparison may flag.", METHOD, min=0.0, max=1.0)
    ] = 0.01
    output_dir: Output = Path("runs/copies")
    device: Device = "cpu"


def copies(options: Copies) -> None:
    from whence.evaluation import copies as room
    from whence.evaluation.conformal import check_rate
    from whence.features.encoders import Thumbnail
    from whence.features.pretrained import Pretrained

    check_rate(options.rate, "--rate")
    encoders = [Pretrained(str(folder)) for folder in options.encoder]
    for encoder in encoders:
        encoder.check()
    engine = engine_on(options.device)
    folders = options.train_data_dir, options.query_data_dir
    train, queries = room.sides(*folders, options.resolution, options.skip, options.output_dir)
    how = room.Look(options.rate, (Thumbnail(), *encoders))
    found = room.looked(options.output_dir, train, queries, how, engine)
    room.write_table(options.output_dir / "copies.csv", found)
    write_config(options, options.output_dir)
    for line in (*room.lines(found), *map(room.meaning, found["measures"])):
        say(line)
    say(room.summary(found))
    say(f"table: {options.output_dir / 'copies.csv'}")


VERB = Verb(copies, Copies, config=True)
