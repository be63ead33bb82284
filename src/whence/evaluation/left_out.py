"""What happens to one's own pictures without the images that were named: the model is trained again, several times.

    r[q] = mean_s (loss_q(without, s) - loss_q(all, s)) / mean_s loss_q(all, s)        on draws and seeds s that all share

For each picture and method the strongest images are left out, or for all pictures together as many that stand first for any
of them; beside the methods as many random images. Everything lies in a ledger, so that what was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.evaluation import designs
from whence.evaluation.calibrate import calibrate
from whence.evaluation.ledger import Ledger
from whence.evaluation.ledger_files import planned_stack
from whence.evaluation.outcomes import Table
from whence.evaluation.receipts import scores_of
from whence.evaluation.replay import Where, check_same_world, request_of
from whence.evaluation.taken_away import Key, Taking, arms, kept, named, verdict
from whence.features.rows import identity
from whence.report.removed import RANDOM
from whence.scores import only_some, strongest
from whence.training.study import Study
from whence.types import Engine, Images, Scores, Task, WhenceError

LEDGER = "ledger"
WHOLE: Key = ("", 0)
Rises = dict[Key, NDArray[np.float64]]  # an arm, and the picture it is of or the number of a random set -> rises [m]


@dataclass(frozen=True)
class Removing:
    """What is left out, and how often models are trained.

    Args:
        count: images, the strongest of a method.
        together: one set of images for all pictures; False for one each.
        random: sets of as many random images.
        seeds: trainings of each set, and of all images.
        draws: (timestep, noise) pairs at which the loss of a picture is measured; an even number.
        stack: models trained together; None for the fastest here.
    """

    count: int = 20
    together: bool = False
    random: int = 4
    seeds: int = 2
    draws: int = 20
    stack: int | None = None


@dataclass(frozen=True)
class Found:
    """What came out.

    Args:
        said: in a sentence; "" of one picture, which says nothing of methods.
        rises: arm -> of each picture [m], as a share of its loss.
        losses: of each picture with all images [m].
        noted: as JSON.
    """

    said: str
    rises: Mapping[str, NDArray[np.float64]]
    losses: NDArray[np.float64]
    noted: Mapping[str, Any]


def asked(run: Path, methods: Sequence[str], where: Where) -> tuple[Task, dict[str, Scores]]:
    """The question of a run once more, and its scores; what is not of this model and these images is refused.

    Args:
        run: a run folder of `whence attribute`.
        methods: of it; empty for all.
        where: model and images are now, and the folder of the work.
    """
    found = scores_of(run, methods, "--methods")
    for name, scores in found.items():
        if scores.some_only:
            raise only_some(f"the scores of {name}", scores)
    first, *_ = found
    task = request_of(run / "scores" / first, found[first], where).task()
    for scores in found.values():
        check_same_world(task, scores.recipe)
    if task.study is None:
        raise WhenceError(
            "was not made by `whence train` from these images, and cannot be trained again",
            str(where.model or run),
            "a run on a model of `whence train`, with its training images",
        )
    return task, found


def leave_out(
    removing: Removing, task: Task, scores: Mapping[str, Scores], root: Path, engine: Engine = Engine()
) -> Found:
    """Train again without what each method names, and without random images; measure every picture.

    Args:
        removing: how much.
        task: the question, whose study says how the model was trained.
        scores: of each method, for all pictures.
        root: for the ledger.
        engine: how the work is carried out.
    """
    train, queries, study = task.train, task.queries, task.study
    n = len(train)
    if not 0 < removing.count < n:
        raise WhenceError(f"{removing.count} of {n} images", "--count", f"1 to {n - 1}")
    assert isinstance(study, Study)
    sets = sets_of(removing, scores, n)
    seeds = tuple(range(study.recipe.seed + 1, study.recipe.seed + 1 + removing.seeds))
    subsets = designs.removal(n, {f"{name}/{k}": rows for (name, k), rows in sets.items()}, seeds)
    stack = removing.stack or planned_stack(root / LEDGER) or _fastest(study, train)
    ledger = Ledger.plan(root / LEDGER, study, train, [*designs.full(n, seeds), *subsets], stack)
    ledger.run(engine=engine)
    ledger.measure("loss", queries, loss, stratified(removing.draws, seed=777, shared=False), engine)
    losses = _losses(ledger.table("loss"), {WHOLE: [], **sets}, n, root)
    whole = losses[WHOLE]
    share = {key: (values - whole) / whole for key, values in losses.items() if key != WHOLE}
    return _found(removing, share, whole, sets, (train, queries))


def _fastest(study: Study, train: Images) -> int:
    speeds = calibrate(study, train)
    return min(speeds, key=lambda size: speeds[size])


def sets_of(removing: Removing, scores: Mapping[str, Scores], n: int) -> dict[Key, list[int]]:
    """What is left out: by (method, picture), by (method, 0) for all pictures together, and by (random, number).

    Args:
        removing: how much.
        scores: of each method.
        n: training images.
    """
    found = named(Taking(removing.count, removing.random), scores, n)
    if not removing.together:
        return found
    one = {(name, 0): in_turn(each, removing.count) for name, each in scores.items()}
    return one | {key: rows for key, rows in found.items() if key[0] == RANDOM}


def in_turn(scores: Scores, count: int) -> list[int]:
    """Images for all pictures: the first of each picture, then the second of each, and so on; scores of several pictures are
    not added up, which would weigh them by their size.

    Args:
        scores: [m, n].
        count: images, no more than n.
    """
    orders = [strongest(row, count).tolist() for row in scores.values]
    return sorted(list(dict.fromkeys(chain.from_iterable(zip(*orders, strict=True))))[:count])


def _losses(table: Table, sets: Mapping[Key, Sequence[int]], n: int, root: Path) -> Rises:
    """The loss of each picture without each set, the mean over seeds: [m]."""
    rows: dict[bytes, list[int]] = {}
    for row, mask in enumerate(table.masks):
        rows.setdefault(mask.tobytes(), []).append(row)
    found = {key: rows.get(kept(n, images).tobytes(), []) for key, images in sets.items()}
    missing = sum(len(own) < len(set(table.seeds.tolist())) for own in found.values())
    if missing:
        raise WhenceError(
            f"trainings of {missing} sets did not end", str(root), "`whence ledger status`, which says why"
        )
    return {key: table.outputs[own].mean(0) for key, own in found.items()}


def _found(
    removing: Removing,
    share: Rises,
    whole: NDArray[np.float64],
    sets: Mapping[Key, Sequence[int]],
    sides: tuple[Images, Images],
) -> Found:
    """The rises by arm, and what they say."""
    (train, queries), m = sides, len(whole)
    names = list(dict.fromkeys(name for name, _ in share if name != RANDOM))
    own = {name: [share[name, 0 if removing.together else q][q] for q in range(m)] for name in names}
    drawn = np.stack([share[RANDOM, k] for k in range(removing.random)])
    rises = {name: np.array(values) for name, values in own.items()} | {RANDOM: drawn.mean(0)}
    said = verdict(rises, Taking(removing.count, removing.random))[0] if m > 1 else ""
    noted = {
        "train": identity(train),
        "queries": identity(queries),
        "query_ids": list(queries.ids),
        "count": removing.count,
        "together": removing.together,
        "said": said,
        "loss": whole.tolist(),
        "rise": {name: values.tolist() for name, values in rises.items()},
        "rise_of_random_sets": drawn.tolist(),
        "arms": arms(rises, Taking.level) if m > 1 else [],
        "left_out": {f"{name}/{k}": [train.ids[row] for row in rows] for (name, k), rows in sets.items()},
    }
    return Found(said, rises, whole, noted)
