"""whence ledger plan | run | status | verify | measure."""

from __future__ import annotations

import json as texts
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import (
    DATA,
    METHOD,
    MODEL,
    RUNNING,
    CaptionColumn,
    CustomDiffusion,
    Device,
    Lora,
    Ray,
    Resolution,
    Shard,
    TrainData,
    Workers,
    engine_on,
    shard_of,
)
from whence.cli.options import Option, Verb, error
from whence.cli.terminal import say
from whence.cli.verbs import Later, Verbs

if TYPE_CHECKING:
    from whence.evaluation.ledger import Ledger

SUBSETS = "Subsets"
Folder = Annotated[Path, Option("The ledger's folder.", "Arguments", argument=True)]
RANDOM = ("test", "tune", "fit")


@dataclass(frozen=True)
class Plan:
    """Decide what will be retrained. A plan never changes afterwards."""

    ledger: Folder
    model: Annotated[Path, Option("A model made by `whence train`: its recipe is what is repeated.", MODEL)]
    train_data_dir: TrainData
    caption_column: CaptionColumn = None
    resolution: Resolution = None
    lora: Lora = None
    custom_diffusion: CustomDiffusion = None
    test: Annotated[int | None, Option("Random subsets to judge scores on; 64, or 0 with --for.", SUBSETS, min=0)] = (
        None
    )
    tune: Annotated[int, Option("Random subsets to choose settings on, in Python.", SUBSETS, min=0)] = 0
    fit: Annotated[int, Option("Random subsets for removal-based methods.", SUBSETS, min=0)] = 0
    fraction: Annotated[float, Option("Share of the images in a random subset.", SUBSETS)] = 0.5
    seeds: Annotated[int, Option("Trainings per subset; 2 or more for a noise ceiling.", SUBSETS, min=1)] = 2
    leave_one_out: Annotated[bool, Option("Leave out every image, one by one.", SUBSETS)] = False
    leave_out_by: Annotated[str | None, Option("A column: leave out each of its values.", SUBSETS)] = None
    for_: Annotated[
        tuple[str, ...], Option("A method of `whence values` whose trainings are planned; may be repeated.", SUBSETS)
    ] = ()
    by: Annotated[
        str, Option("Who has a value in it: image, or a column of the training images.", SUBSETS, needs=("for_",))
    ] = "image"
    runs: Annotated[
        int | None,
        Option(
            "Subsets, coalitions or orders that the method draws; its own number by default.", SUBSETS, needs=("for_",)
        ),
    ] = None
    truncation: Annotated[
        int | None,
        Option("Players after which an order of Shapley values is cut off.", SUBSETS, min=1, needs=("for_",)),
    ] = None
    stack: Annotated[int | None, Option("Models trained together; the fastest here by default.", RUNNING, min=1)] = None


def plan(options: Plan) -> None:
    from whence.doctor.findings import in_time
    from whence.evaluation.calibrate import calibrate
    from whence.evaluation.ledger import Ledger
    from whence.evaluation.ledger_files import planned_stack
    from whence.evaluation.source import Design, Source
    from whence.models import adapter_of

    test = (0 if options.for_ else 64) if options.test is None else options.test
    tune = options.tune
    if options.fraction != Plan.fraction and not (test or tune or options.fit):
        raise error("--fraction: there are no random subsets", accepted="--test, --tune or --fit above 0 with it")
    source = Source(options.model, adapter_of(options.lora, options.custom_diffusion), options.caption_column)
    images = source.images(options.train_data_dir, options.resolution, options.ledger)
    study, stack = source.study(images), options.stack or planned_stack(options.ledger)
    design = Design(
        test, tune, options.fit, options.fraction, options.seeds, options.leave_one_out, options.leave_out_by,
        options.for_, options.by, options.runs, options.truncation,
    )  # fmt: skip
    subsets = design.subsets(images, study.recipe.seed)
    speeds = calibrate(study, images) if stack is None else calibrate(study, images, (stack,), 2)
    if stack is None:
        stack = min(speeds, key=lambda size: speeds[size])
        told = ", ".join(f"{together} together {1e3 * time:.1f}" for together, time in speeds.items())
        say(f"milliseconds per step and model: {told}")
    made = Ledger.plan(options.ledger, study, images, subsets, stack)
    source.write(options.ledger)
    steps = study.recipe.steps
    hours = in_time(len(made.units) * steps * speeds[stack])
    say(f"{len(made.units)} trainings of {steps} steps, {stack} together: {hours} of one process here")
    say("next: whence ledger run")


@dataclass(frozen=True)
class Run:
    """Train what is missing. Start it several times with --shard 0/2, 1/2 ... to use several processes or machines."""

    ledger: Folder
    train_data_dir: TrainData
    resolution: Resolution = None
    shard: Shard = "0/1"
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"
    repair: Annotated[bool, Option("First remove what `whence ledger verify` names, to make it anew.", RUNNING)] = False
    report_to: Annotated[
        str | None,
        Option(
            "A tracker that gets the last loss of each training, at the end.",
            RUNNING,
            accepted=("tensorboard", "wandb"),
        ),
    ] = None


def run(options: Run) -> None:
    from whence.evaluation.source import opened_ledger
    from whence.storage.trackers import check_tracker

    if options.report_to is not None:
        check_tracker(options.report_to)
    shard, engine = shard_of(options.shard), engine_on(options.device, workers=options.workers, ray=options.ray)
    ledger = opened_ledger(options.ledger, options.train_data_dir, options.resolution)
    if options.repair:
        _repair(ledger)
    ledger.run(shard, engine)
    if options.report_to is not None:
        _report(ledger, options.report_to)
    _say_status(ledger)


def _report(ledger: Ledger, tracker: str) -> None:
    """A point for each finished training, by its number."""
    from whence.storage.files import read_json
    from whence.storage.trackers import tracked
    from whence.types import describe

    with tracked(tracker, ledger.root, describe(ledger.study.recipe)) as told:
        for unit in filter(ledger.done, ledger.units):
            facts = read_json(ledger.folder(unit) / "DONE.json", dict)
            measured = {name: float(facts[name]) for name in ("last_loss", "seconds") if name in facts}
            told(unit.number, {**measured, "images": float(ledger.masks[unit.subset].sum())})


@dataclass(frozen=True)
class Status:
    """Trainings done, failed and missing, by role."""

    ledger: Folder
    train_data_dir: TrainData
    resolution: Resolution = None
    json: Annotated[bool, Option("As JSON, for scripts.", RUNNING)] = False


def status(options: Status) -> None:
    from whence.evaluation.source import opened_ledger

    ledger = opened_ledger(options.ledger, options.train_data_dir, options.resolution)
    if options.json:
        say(texts.dumps(ledger.status()))
    else:
        _say_status(ledger)


def _say_status(ledger: Ledger) -> None:
    """How far the trainings are, in words."""
    found = ledger.status()
    total = {state: sum(counts[state] for counts in found.values()) for state in ("done", "failed", "missing")}
    for role, counts in found.items():
        told = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
        say(f"{role}: {told} ({ROLES[role]})")
    say(f"{total['done']:,} of {sum(total.values()):,} trainings are done")
    if total["failed"]:
        say(f"{total['failed']:,} diverged: units/NNNNN.failed.json says where; `whence ledger run` tries again")
    if total["missing"]:
        say("next: whence ledger run")
    elif not total["failed"]:
        say("next: whence ledger measure")


ROLES = {
    "test": "subsets that scores are judged on",
    "tune": "subsets that settings are chosen on",
    "fit": "subsets that methods read",
    "other": "all images, and what was left out or planned for values",
}


@dataclass(frozen=True)
class Verify:
    """Read every file of a ledger, and compare it with its digest."""

    ledger: Folder
    train_data_dir: TrainData
    resolution: Resolution = None


def verify(options: Verify) -> None:
    from whence.evaluation.ledger_check import unfinished_in
    from whence.evaluation.source import opened_ledger

    ledger = opened_ledger(options.ledger, options.train_data_dir, options.resolution)
    broken = ledger.broken()
    for one in broken:
        say(one.why)
    if broken:
        raise error(f"{options.ledger}: {len(broken)} files or folders are not what was written", accepted=REPAIRED)
    for line in unfinished_in(ledger):
        say(line)
    say("every finished unit is what was written, and so is every other file")


REPAIRED = "`whence ledger run --repair`, which removes what can be made again and makes it"


def _repair(ledger: Ledger) -> None:
    """Remove what is broken, and say so."""
    from whence.evaluation.ledger_check import repair

    removed, left = repair(ledger.broken())
    for one in removed:
        say(f"removed {one.path}, which {one.anew} makes again")
    for one in left:
        say(f"left as it is: {one.why}")


@dataclass(frozen=True)
class Measure:
    """Measure queries in every finished training, on draws that are the same for all of them."""

    ledger: Folder
    train_data_dir: TrainData
    query_data_dir: Annotated[Path, Option("Pictures whose outputs are measured.", DATA)]
    resolution: Resolution = None
    name: Annotated[str, Option("Name of the measurement.", METHOD)] = "loss"
    output: Annotated[str, Option("What is measured: loss, elbo, squared_norm ...", METHOD)] = "loss"
    draws: Annotated[int, Option("Stratified timesteps with antithetic noise; an even number.", METHOD, min=2)] = 20
    workers: Workers = None
    ray: Ray = None
    device: Device = "cpu"


def measure(options: Measure) -> None:
    from whence.diffusion.draws import stratified
    from whence.diffusion.outputs import OUTPUTS
    from whence.evaluation.source import Source, opened_ledger

    if options.output not in OUTPUTS:
        raise error(f"unknown output {options.output!r}", accepted=", ".join(OUTPUTS))
    root, size = options.ledger, options.resolution
    engine = engine_on(options.device, workers=options.workers, ray=options.ray)
    ledger = opened_ledger(root, options.train_data_dir, size)
    queries = Source.read(root).images(options.query_data_dir, size, root / "queries", ledger.images)
    ledger.measure(
        options.name, queries, OUTPUTS[options.output], stratified(options.draws, seed=777, shared=False), engine
    )
    measured = len(ledger.table(options.name).units)
    say(f"measured {len(queries)} queries as {options.name!r} in {measured} of {len(ledger.units)} trainings")


PLAN, RUN, STATUS = Verb(plan, Plan), Verb(run, Run), Verb(status, Status)
VERIFY, MEASURE = Verb(verify, Verify), Verb(measure, Measure)


class Ledgers(Verbs):
    later = {  # noqa: RUF012
        "plan": Later("ledger:PLAN", "Decide what will be retrained."),
        "run": Later("ledger:RUN", "Train what is missing."),
        "status": Later("ledger:STATUS", "Trainings done, failed and missing, by role."),
        "measure": Later("ledger:MEASURE", "Measure queries in every finished training."),
        "verify": Later("ledger:VERIFY", "Compare every file with its digest."),
    }


GROUP = Ledgers(name="ledger", no_args_is_help=True, help="Retrain a model on subsets, and keep what comes out.")
