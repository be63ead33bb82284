"""whence counterfactual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import (
    BANKS,
    DATA,
    METHOD,
    MODEL,
    BankData,
    BankFolder,
    Device,
    Output,
    Ray,
    Workers,
    engine_on,
    write_config,
)
from whence.cli.options import Option, Verb, error
from whence.cli.terminal import console, say

if TYPE_CHECKING:
    from rich.table import Table

    from whence.evaluation.counterfactual import Result
    from whence.evaluation.left_out import Found

OWN, BANK = "Your own model", "A bank"
OF_A_BANK = tuple(f"name={bank}" for bank in BANKS)
OF_A_RUN = (
    *("count", "together", "random", "seeds", "draws", "stack", "workers", "ray"),
    *("model", "train_data_dir", "query_data_dir"),
)


@dataclass(frozen=True)
class Counterfactual:
    """Take away what the methods name, train again, and compare with random removal."""

    name: Annotated[
        str,
        Option(f"A run folder of `whence attribute`, or a bank: {', '.join(BANKS)}.", DATA, argument=True),
    ]
    output_dir: Output
    methods: Annotated[
        tuple[str, ...],
        Option("Methods to follow; may be repeated. All of a run folder; d_trak and pixel_cosine of a bank.", METHOD),
    ] = ()
    count: Annotated[int, Option("Images left out: the strongest of a method for a picture.", OWN, min=1)] = 20
    together: Annotated[
        bool, Option("Leave out one set for all pictures: the first of each, then the second of each ...", OWN)
    ] = False
    random: Annotated[int, Option("Sets of as many random images beside them.", OWN, min=1)] = 4
    seeds: Annotated[int, Option("Trainings of each set, and of all images.", OWN, min=1)] = 2
    draws: Annotated[
        int, Option("Stratified timesteps at which a picture is measured; an even number.", OWN, min=2)
    ] = 20
    stack: Annotated[int | None, Option("Models trained together; the fastest here by default.", OWN, min=1)] = None
    model: Annotated[Path | None, Option("Where the model is now, if it moved.", MODEL)] = None
    train_data_dir: Annotated[Path | None, Option("Where the training images are now, if they moved.", DATA)] = None
    query_data_dir: Annotated[Path | None, Option("Where the pictures are now, if they moved.", DATA)] = None
    bench_dir: Annotated[
        Path | None,
        Option("Folder of `whence bench`, whose scores are used.", BANK, needs=tuple(f"name={b}" for b in BANKS)),
    ] = None
    bank_dir: BankFolder = None
    data_dir: BankData = None
    queries: Annotated[
        int | None, Option("Generated pictures looked at; 8 by default.", BANK, min=2, needs=("bench_dir",))
    ] = None
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"


def counterfactual(options: Counterfactual) -> None:
    if options.name not in BANKS:
        _own(options)
        return
    for name in OF_A_RUN:
        if getattr(options, name) != getattr(Counterfactual, name):
            raise error(f"--{name}: {options.name} is a bank", accepted="it with a run folder of `whence attribute`")
    _of_bank(options)


def _own(options: Counterfactual) -> None:
    from whence.evaluation.left_out import Removing, asked, leave_out
    from whence.evaluation.replay import Where
    from whence.storage.files import write_json

    root, run = options.output_dir, Path(options.name)
    if not run.is_dir():
        raise error(f"{options.name}: is no folder", accepted=f"a run folder, or {', '.join(BANKS)}")
    if root.absolute() == run.absolute():
        raise error(f"--output_dir {root}: is the run folder itself", accepted="a folder of its own")
    where = Where(root, options.model, options.train_data_dir, options.query_data_dir)
    task, scores = asked(run, options.methods, where)
    how = Removing(*(getattr(options, name) for name in ("count", "together", "random", "seeds", "draws", "stack")))
    found = leave_out(how, task, scores, root, engine_on(options.device, workers=options.workers, ray=options.ray))
    write_json(root / "counterfactual.json", {"format_version": 1, **found.noted})
    write_config(options, root)
    console().print(_rises(found, how.count))
    if found.said:
        say(found.said)
    say(f"kept in {root / 'counterfactual.json'}")


def _rises(found: Found, count: int) -> Table:
    """A row for each arm."""
    from rich.table import Table

    from whence.report.removed import interval, percent

    every = {arm["name"]: arm for arm in found.noted["arms"]}
    table = Table("without", "images", "rise of the loss", "95 %", "loss", box=None, pad_edge=False)
    for name, values in found.rises.items():
        shown = interval(every[name]["low"], every[name]["high"]) if every else ""
        loss = float(((1 + values) * found.losses).mean())
        table.add_row(name, f"{count:,}", _spaced(percent(float(values.mean()))), _spaced(shown), f"{loss:.4f}")
    table.add_row("nothing", "0", "", "", f"{float(found.losses.mean()):.4f}")
    return table


def _spaced(text: str) -> str:
    """With spaces that a terminal shows as such."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def _of_bank(options: Counterfactual) -> None:
    from whence.evaluation import banks
    from whence.evaluation import counterfactual as room
    from whence.models import open_model
    from whence.storage.files import write_json
    from whence.storage.scores import load_scores

    if options.bench_dir is None:
        raise error(f"{options.name} is a bank, whose scores are not given", accepted="--bench_dir")
    recipe = banks.by_name(options.name, options.data_dir)
    generated = banks.load(options.name, recipe, options.bank_dir).queries["generated"]
    rows, root, queries = options.bench_dir / "rows", options.output_dir, options.queries or 8
    # Refused before anything is trained.
    methods = options.methods or ("d_trak", "pixel_cosine")
    scores = {method: load_scores(rows / method / "generated") for method in methods}
    result = room.run(
        room.Plan(),
        recipe.study,
        recipe.train,
        open_model(banks.train_reference(recipe, options.bench_dir)),
        room.Asked(generated, range(queries), recipe.draws, range(len(generated))),
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
