"""whence counterfactual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import DATA, METHOD, BankData, BankFolder, BankName, Device, Output, engine_on, write_config
from whence.cli.options import Option, Verb
from whence.cli.terminal import console

if TYPE_CHECKING:
    from rich.table import Table

    from whence.evaluation.counterfactual import Result


@dataclass(frozen=True)
class Counterfactual:
    """Take away what the methods name, retrain, draw again, and compare with random removal and with another seed."""

    name: BankName
    output_dir: Output
    bench_dir: Annotated[Path, Option("Folder of `whence bench`, whose scores are used.", DATA)]
    bank_dir: BankFolder = None
    data_dir: BankData = None
    methods: Annotated[tuple[str, ...], Option("Methods to follow; may be repeated.", METHOD)] = (
        "d_trak",
        "pixel_cosine",
    )
    queries: Annotated[int, Option("Generated queries looked at.", METHOD, min=2)] = 8
    device: Device = "cpu"


def counterfactual(options: Counterfactual) -> None:

    from whence.evaluation import banks
    from whence.evaluation import counterfactual as room
    from whence.models import open_model
    from whence.storage.files import write_json
    from whence.storage.scores import load_scores

    recipe = banks.by_name(options.name, options.data_dir)
    generated = banks.load(options.name, recipe, options.bank_dir).queries["generated"]
    rows, root = options.bench_dir / "rows", options.output_dir
    # Refused before anything is trained.
    scores = {method: load_scores(rows / method / "generated") for method in options.methods}
    result = room.run(
        room.Plan(),
        recipe.study,
        recipe.train,
        open_model(banks.train_reference(recipe, options.bench_dir)),
        room.Asked(generated, range(options.queries), recipe.draws, range(len(generated))),
        scores,
        root,
        engine_on(options.device),
    )
    write_json(root / "counterfactual.json", result)
    write_config(options, root)
    room.plot(result, root / "counterfactual.png")
    console(width=120).print(_table(result))


def _table(result: Result) -> Table:
    from rich.table import Table

    table = Table(
        "removed by", "images", "rise of loss", "95 %", "l2", "SSIM", "worth random", box=None, pad_edge=False
    )
    for arm in result["arms"]:
        rise, worth = arm["dL"], arm["worth_random"]
        table.add_row(
            arm["arm"],
            str(arm["removed"]),
            f"{rise['mean']:+.4f}",
            f"{rise['low']:+.4f} to {rise['high']:+.4f}",
            f"{arm['l2']['mean']:.2f}",
            f"{arm['ssim']['mean']:.3f}",
            f"{worth:.0f}" if worth is not None else f"> {result['largest_random']}",
        )
    return table


VERB = Verb(counterfactual, Counterfactual, config=True)
