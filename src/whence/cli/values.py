"""whence values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from whence.cli.common import DATA, METHOD, Output, Resolution, TrainData
from whence.cli.options import Option, Verb, error
from whence.cli.options import Values as Settings
from whence.cli.settings import pairs_of
from whence.cli.terminal import say

KNN = "knn_shapley"


@dataclass(frozen=True)
class Values:
    """What every training image, or owner of some, is worth by retraining: leave-one-out, Shapley, influence ...

    It reads a ledger that is run and measured, and trains nothing. Every value has a standard error.
    """

    ledger: Annotated[Path, Option("The ledger's folder.", "Arguments", argument=True)]
    train_data_dir: TrainData
    query_data_dir: Annotated[Path, Option("The pictures that were measured.", DATA)]
    by: Annotated[str, Option("Who has a value: image, or a column of the training images.", METHOD)] = "image"
    method: Annotated[tuple[str, ...], Option("As `whence methods` names them; may be repeated.", METHOD)] = (
        "shapley",
    )
    set: Annotated[tuple[str, ...], Option("A setting of a method, as name=value; may be repeated.", METHOD)] = ()
    name: Annotated[str, Option("Name of the measurement.", DATA)] = "loss"
    resolution: Resolution = None
    output_dir: Output = Path("runs/values")


def values(options: Values) -> None:
    from whence.evaluation.source import Source, opened_ledger
    from whence.evaluation.values import knn_shapley, write_values
    from whence.evaluation.values import values as read
    from whence.features.rows import identity
    from whence.report.words import errors_of

    root, size = options.ledger, options.resolution
    settings = _settings(options)
    ledger = opened_ledger(root, options.train_data_dir, size)
    queries = Source.read(root).images(options.query_data_dir, size, root / "queries", ledger.images)
    table = None if all(method == KNN for method in settings) else ledger.table(options.name)
    if table is not None and table.queries not in (None, identity(queries)):
        told = f"{options.query_data_dir} holds other pictures than were measured as {options.name!r}"
        raise error(told, accepted="those that were measured")
    found = {}
    for method, own in settings.items():
        if method == KNN:
            found[method] = knn_shapley(ledger.images, queries, **own)
        else:
            found[method] = read(ledger, method, options.by, options.name, **own)
    facts = {
        "Ledger": str(root) if table is None else f"{root} ({len(table.units):,} trainings measured as {options.name})",
        "Training images": f"{options.train_data_dir} ({len(ledger.images):,})",
        "Pictures": f"{options.query_data_dir} ({len(queries):,})",
    }
    path = write_values(found, ledger.images, queries, options.by, options.output_dir, facts)
    for method, scores in found.items():
        shape = f"{len(scores.query_ids):,} x {len(scores.train_ids):,} values"
        say(f"{method}: {shape}; standard errors: {errors_of(scores)}")
    say(f"report: {path}" if path else f"scores: {options.output_dir / 'scores'}")
    say("positive = proponent: the measured output is better with it than without")


def _settings(options: Values) -> dict[str, Settings]:
    """The settings of each method; one that no method has is an error."""
    from whence.evaluation.readers import VALUES, settings_after
    from whence.evaluation.values import knn_shapley

    given = pairs_of(options.set, ())
    known = {name: entry.settings for name, entry in VALUES.items()} | {KNN: settings_after(knn_shapley, 2)}
    for method in options.method:
        if method not in known:
            raise error(f"--method {method}", accepted=", ".join(known))
        if method == KNN and options.by != "image":
            raise error(f"--by {options.by}: {KNN} gives values to images", accepted=f"--set column={options.by}")
    takes = {method: set(known[method]) for method in options.method}
    unknown = [name for name in given if not any(name in each for each in takes.values())]
    if unknown:
        told = "; ".join(f"{method} takes {', '.join(sorted(each)) or 'none'}" for method, each in takes.items())
        raise error(f"--set {unknown[0]}: {told}")
    return {method: {name: value for name, value in given.items() if name in each} for method, each in takes.items()}


VERB = Verb(values, Values)
