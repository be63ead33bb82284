"""How the scores of a run are judged by a ledger: of the same images and queries, and of a model that it retrains."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from whence.evaluation.lds import Interval, bootstrap, predict
from whence.evaluation.ledger import Ledger
from whence.evaluation.outcomes import Table
from whence.evaluation.source import Source
from whence.features.rows import identity
from whence.methods import METHODS
from whence.models import Adapter, Model, open_model
from whence.storage.files import differences, read_json
from whence.storage.notes import scored
from whence.storage.scores import load_scores
from whence.training.checkpoints import checkpoint_folders, left_by, study_on
from whence.types import Images, Scores, WhenceError, describe, from_plain, only_some

Found = Mapping[str, Scores]  # method -> scores
Study = Mapping[str, Any]  # a training, as it is described


@dataclass(frozen=True)
class Verdict:
    """What a ledger says of the scores of a run.

    Args:
        methods: method -> its linear datamodeling score.
        ceiling: of the noise; None where no subset was trained with two seeds, or fewer than four were: what is noise cannot
            be told.
        other: the methods whose scores are of another model.
    """

    methods: Mapping[str, Interval]
    ceiling: Interval | None
    other: Sequence[str]


def judge(run: Path, ledger: Ledger, name: str, transfer: bool = False) -> Verdict:
    """The linear datamodeling score of every method in a run folder, and the noise ceiling.

    Args:
        run: a run folder with finished scores.
        ledger: that retrained the same images.
        name: of the measurement of the same queries.
        transfer: whether scores of another model than the ledger retrains are judged, too.
    """
    found = {method: load_scores(folder) for method, folder in scored(run).items()}
    test = judging(run, found, ledger, name, transfer)
    masks, outputs = test.averaged()
    predicted = {method: predict(scores.values.numpy(), masks) for method, scores in found.items()}
    judged = bootstrap(predicted, outputs, test.better or "lower")
    seeds = Counter(test.subsets.tolist())
    limit = test.ceiling().spearman if len(seeds) >= 4 and max(seeds.values()) > 1 else None
    other = of_another_model(run, found, ledger) if transfer else []
    return Verdict({method: judged.interval(method) for method in found}, limit, other)


def judging(run: Path, found: Found, ledger: Ledger, name: str, transfer: bool = False) -> Table:
    """The test rows that judge some scores; what makes them say less than it seems is warned of.

    Args:
        run: the run folder of the scores.
        found: method -> scores.
        ledger: that retrained the same images.
        name: of the measurement of the same queries.
        transfer: whether scores of another model than the ledger retrains are judged, too.

    Raises:
        WhenceError: there are no rows, or the scores are of other images, of other queries or of another model.
    """
    test = ledger.table(name).role("test")
    if not test.units:
        raise WhenceError(f"{ledger.root} has no finished test units; plan some with --test, then run and measure")
    for method, scores in found.items():
        if scores.some_only:
            raise only_some(f"the scores of {method}", scores)
        _same_pictures(method, scores, ledger, test, name)
    other = [] if transfer else of_another_model(run, found, ledger)
    if other:
        source = _source(ledger)
        whose = f"{ledger.root} retrains" + ("" if source is None else f" ({source.model})")
        raise WhenceError(
            f"the scores of {', '.join(other)} are of another model than {whose}",
            str(run),
            "scores of that model, or of one by the same recipe; `whence lds --transfer` tells how well these foresee it",
        )
    for doubt in _doubts(ledger, test):
        warnings.warn(doubt, stacklevel=3)
    return test


FEW = 16  # subsets; the correlation of unrelated ranks over as many has a standard deviation of 0.26


def _doubts(ledger: Ledger, test: Table) -> Iterator[str]:
    """What makes a score of scores say less than it seems to.

    Args:
        ledger: that judges them.
        test: its measured test rows.
    """
    planned, subsets = sum(unit.role == "test" for unit in ledger.units), len(set(test.subsets.tolist()))
    if len(test.units) < planned:
        yield f"{len(test.units)} of {planned} test trainings are measured; run and measure {ledger.root} to its end"
    if subsets < FEW:
        yield f"{subsets} test subsets say little, and intervals over so few are too narrow; plan {FEW} or more, better 64"


def of_another_model(run: Path, found: Found, ledger: Ledger) -> list[str]:
    """The methods whose scores are of a model that the ledger does not retrain.

    Args:
        run: the run folder of the scores, which says where its model lies.
        found: method -> scores.
        ledger: that judges them.
    """
    source, study, images = _source(ledger), ledger.notes["study"], ledger.images
    asking = [name for name in found if name not in METHODS or not METHODS[name].pictures_alone]
    other = [name for name in asking if not _of_study(found[name].recipe, study)]
    known = _states(source.opened) if other and source is not None else set()
    other = [name for name in other if not known & {*found[name].recipe.get("checkpoints", ())}]
    known = _made_by(run, study, images) if other else set()
    return [name for name in other if not known & {*found[name].recipe.get("checkpoints", ())}]


def _of_study(recipe: Mapping[str, Any], study: Study) -> bool:
    """Whether scores say themselves of which trainings they are, and these are alike."""
    own = recipe.get("study", recipe.get("ledger", {}).get("study"))
    return isinstance(own, Mapping) and _alike(own, study)


def _alike(one: Study, other: Study) -> bool:
    """Whether two trainings differ in nothing but their seed.

    A ledger retrains a recipe with seeds of its own: it knows the truth of any model that the recipe made of the same
    images, whatever the seed of that.
    """
    first, second = ({**each, "recipe": {**each.get("recipe", {}), "seed": None}} for each in (one, other))
    return not differences(first, second)


def _made_by(run: Path, study: Study, images: Images) -> set[str]:
    """The digests of the model of a run and of its checkpoints, where the recipe made it of these images; else none."""
    there = _model_of(run)
    found = None if there is None else study_on(*there, images)
    if there is None or found is None or not _alike(describe(found), study):
        return set()
    folder, adapter = there
    opened, done = open_model(folder, adapter), checkpoint_folders(folder if adapter is None else adapter.folder)[-1]
    return _states(opened) if left_by(done, opened.final.load()) else set()


def trained_otherwise(run: Path, study: Study) -> bool:
    """Whether the model of a run is there, and certainly none of this training, with whatever seed.

    Args:
        run: the run folder.
        study: the training, as it is described.
    """
    there = _model_of(run)
    found = None if there is None else study_on(*there)
    return there is not None and (found is None or not _alike(describe(found), study))


def _model_of(run: Path) -> tuple[Path, Adapter | None] | None:
    """Where the model of a run lies; None where the run does not say, or it is gone."""
    note = read_json(run / "images.json", dict).get("model") if (run / "images.json").is_file() else None
    if not isinstance(note, dict) or not (run / note["folder"]).is_dir():
        return None
    adapter: Adapter | None = from_plain(note["adapter"])
    return run / note["folder"], adapter and replace(adapter, folder=run / adapter.folder)


def _states(model: Model) -> set[str]:
    """The digests of a model and of its checkpoints."""
    return {state.digest for state in (*model.checkpoints, model.final)}


def _source(ledger: Ledger) -> Source | None:
    """What it retrains; ledgers that were planned in Python do not say."""
    return Source.read(ledger.root) if (ledger.root / "source.json").is_file() else None


def _same_pictures(method: str, scores: Scores, ledger: Ledger, test: Table, name: str) -> None:
    """The scores are of the images that were retrained on and of the queries that were measured: by their content, since
    other pictures may have the same file names."""
    sides = {
        "train": (scores.train_ids, ledger.images.ids, identity(ledger.images)),
        "queries": (scores.query_ids, test.query_ids, test.queries),
    }
    told = {
        "train": "training images than the ledger; give the scores of the images that it retrained",
        "queries": f"queries than {ledger.root / 'measurements' / name}; measure those",
    }
    for side, (ours, theirs, content) in sides.items():
        if list(ours) != list(theirs):
            raise WhenceError(f"the scores of {method} are for other {told[side]}")
        if content is not None and scores.recipe.get(side, content) != content:
            raise WhenceError(f"the scores of {method} are for pictures of the same names, but other {told[side]}")
