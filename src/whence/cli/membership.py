"""whence membership."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import (
    DATA,
    METHOD,
    CaptionColumn,
    CustomDiffusion,
    Device,
    Lora,
    Output,
    engine_on,
    write_config,
)
from whence.cli.options import Option, Verb
from whence.cli.terminal import say


@dataclass(frozen=True)
class Membership:
    """Say whether a model was trained on a set of pictures, by comparing them with as many of the same kind that it has
    surely not seen (CDI)."""

    model: Annotated[Path, Option("A diffusers pipeline folder.", "Arguments", argument=True, hub="model")]
    suspect_data_dir: Annotated[Path, Option("Pictures that may have been in the training, 70 or more.", DATA)]
    unseen_data_dir: Annotated[
        Path, Option("As many pictures of the same kind that were surely not in the training.", DATA)
    ]
    lora: Lora = None
    custom_diffusion: CustomDiffusion = None
    caption_column: CaptionColumn = None
    resolution: Annotated[
        int | None, Option("Side of the square that both sets are brought to; as they are by default.", DATA, min=1)
    ] = None
    draws: Annotated[int, Option("Noises at each timestep.", METHOD, min=1)] = 5
    permutations: Annotated[
        int, Option("Shuffles of the labels, 99 or more; p is never below one in so many.", METHOD, min=1)
    ] = 999
    seed: Annotated[int, Option("Seed of noises and shuffles.", METHOD)] = 0
    output_dir: Output = Path("runs/membership")
    device: Device = "cpu"


def membership(options: Membership) -> None:
    from whence.data.hashing import refuse_inside
    from whence.evaluation import membership as room
    from whence.features.membership import Signals
    from whence.models import adapter_of, open_model
    from whence.storage.files import write_json

    engine, root = engine_on(options.device), options.output_dir
    model = open_model(options.model, adapter_of(options.lora, options.custom_diffusion))
    folders = options.suspect_data_dir, options.unseen_data_dir
    for folder in folders:
        refuse_inside(root, folder)
    read = (root, options.resolution, options.caption_column)
    suspects = room.pictures_of(model, folders[0], *read, engine=engine)
    unseen = room.pictures_of(model, folders[1], *read, like=suspects, engine=engine)
    signals, testing = Signals(options.draws, options.seed), room.Comparison(5, options.permutations, options.seed)
    found = room.membership(model.final, model.forward, suspects, unseen, root, signals, testing, engine)
    write_json(root / "membership.json", {"verdict": found.verdict, "caveat": found.caveat, **asdict(found)})
    write_config(options, root)
    say(found.verdict)
    say(found.caveat)
    say(f"details: {root / 'membership.json'}")


VERB = Verb(membership, Membership, config=True)
