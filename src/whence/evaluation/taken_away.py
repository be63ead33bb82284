"""Which method was right: leave out what each one names, train again, and compare the rise of each picture's loss.

    r[q] = (loss_q(without) - loss_q(all)) / loss_q(all)          the same seed, so that only the images differ
    mean over pictures +- t se                                    t with m - 1 degrees, for this one model

Beside the methods as many random images are left out. A method is said to have named better images than another where the
interval of the paired difference lies above 0; these intervals hold together (Bonferroni), because all pairs are looked at
and the best of them is told.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import t as students
from torch import Tensor, nn

from whence.diffusion.draws import stratified
from whence.diffusion.outputs import loss
from whence.evaluation import designs
from whence.evaluation.ledger import Ledger
from whence.features.rows import identity
from whence.plain import digest
from whence.report.removed import RANDOM, NoteOfArm, NoteOfDifference, NoteOfRedrawn, NoteOfRemoved, interval, percent
from whence.scores import only_some, strongest
from whence.storage.files import progress
from whence.training.study import Study
from whence.types import Engine, Images, Scores, WhenceError

Rises = Mapping[str, NDArray[np.float64]]
Key = tuple[str, int]  # an arm, and the picture that it is of or the number of a random set
WHOLE = ("", 0)  # the model as it is
DRAWS = stratified(100, seed=777)
"""What pictures are measured at; others than the methods'."""


@dataclass(frozen=True)
class Taking:
    """What is left out.

    Args:
        count: images, the strongest of a method for a picture.
        random: sets of as many random images.
        stack: models trained together.
        level: of the intervals.
    """

    count: int = 20
    random: int = 4
    stack: int = 11
    level: float = 0.95


def take_away(
    taking: Taking,
    study: Study,
    sides: tuple[Images, Images],
    scores: Mapping[str, Scores],
    draw: Callable[[nn.Module], Tensor],
    root: Path,
    engine: Engine = Engine(),
) -> NoteOfRemoved:
    """Train again without the images that each method names for each picture, and without random ones.

    Args:
        taking: how many.
        study: what is trained, and how: its own seed, that of the model.
        sides: the training images, and the pictures.
        scores: of each method.
        draw: network -> the pictures, from the noise that they were drawn from.
        root: for the ledger.
        engine: how the work is carried out.
    """
    train, queries = sides
    n, seed = len(train), study.recipe.seed
    if not 0 < taking.count < n or len(queries) < 2:
        raise WhenceError(
            f"{taking.count} of {n} images, {len(queries)} pictures", "taking away", "fewer, and 2 or more"
        )
    sets = named(taking, scores, n)
    subsets = designs.removal(n, {f"{name}/{k}": rows for (name, k), rows in sets.items()}, (seed,))
    ledger = Ledger.plan(root, study, train, [*designs.full(n, (seed,)), *subsets], taking.stack)
    ledger.run(engine=engine)
    ledger.measure("loss", queries, loss, DRAWS, engine)
    table = ledger.table("loss")
    by_mask = {mask.tobytes(): row for row, mask in enumerate(table.masks)}
    row_of = {key: by_mask.get(kept(n, rows).tobytes()) for key, rows in {WHOLE: [], **sets}.items()}
    rows = {key: row for key, row in row_of.items() if row is not None}
    if len(rows) < len(row_of):
        told = f"{len(row_of) - len(rows)} of {len(row_of)} trainings did not end"
        raise WhenceError(told, str(root), "another folder, or a lower learning rate")
    losses = {key: table.outputs[row] for key, row in rows.items()}
    share = {key: (values - losses[WHOLE]) / losses[WHOLE] for key, values in losses.items()}
    rises = {name: np.array([share[name, q][q] for q in range(len(queries))]) for name in scores}
    rises[RANDOM] = np.mean([share[RANDOM, k] for k in range(taking.random)], axis=0)
    shown = [WHOLE, *((name, q) for name in scores for q in range(len(queries))), (RANDOM, 0)]
    drawn = {key: draw(ledger.load(table.units[rows[key]])) for key in progress(shown, "drawing again")}
    said, basis = verdict(rises, taking)
    return {
        "train": identity(train),
        "queries": identity(queries),
        "scores": {name: digest(each.values) for name, each in scores.items()},
        "count": taking.count,
        "said": said,
        "basis": basis,
        "arms": arms(rises, taking.level),
        "differences": differences(rises, taking.level),
        "pictures": {name: _pictures(q, [*scores], share, drawn) for q, name in enumerate(queries.ids)},
    }


def named(taking: Taking, scores: Mapping[str, Scores], n: int) -> dict[Key, list[int]]:
    """What is left out: the strongest images of each method for each picture, and random sets.

    Args:
        taking: how many.
        scores: of each method.
        n: training images.
    """
    found: dict[Key, list[int]] = {}
    for name, each in scores.items():
        if each.some_only:
            raise only_some(f"the scores of {name}", each)
        for q, row in enumerate(each.values):
            found[name, q] = sorted(strongest(row, taking.count).tolist())
    rng = np.random.default_rng(0)
    return found | {(RANDOM, k): sorted(rng.permutation(n)[: taking.count].tolist()) for k in range(taking.random)}


def kept(n: int, rows: Sequence[int]) -> NDArray[np.bool_]:
    """All images but some: [n] bool."""
    mask = np.ones(n, bool)
    mask[list(rows)] = False
    return mask


def _pictures(
    q: int, methods: Sequence[str], share: Mapping[Key, NDArray[np.float64]], drawn: Mapping[Key, Tensor]
) -> list[NoteOfRedrawn]:
    """One picture as each model draws it."""
    found: list[NoteOfRedrawn] = [{"arm": "", "png": png(drawn[WHOLE][q])}]
    for key in [*((name, q) for name in methods), (RANDOM, 0)]:
        found.append({"arm": key[0], "rise": float(share[key][q]), "png": png(drawn[key][q])})
    return found


def png(picture: Tensor) -> str:
    """A picture [C, H, W] in [-1, 1] as a PNG file, in base64."""
    pixels = ((picture.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, format="png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def between(values: NDArray[np.float64], level: float) -> tuple[float, float, float]:
    """The mean of values of m pictures, and its t interval.

    Args:
        values: [m].
        level: of the interval.
    """
    mean, m = float(values.mean()), len(values)
    half = float(students.ppf((1 + level) / 2, m - 1)) * float(values.std(ddof=1)) / m**0.5
    return mean, mean - half, mean + half


def arms(rises: Rises, level: float) -> list[NoteOfArm]:
    """The mean rise of each arm and its own interval, the largest first.

    Args:
        rises: of each picture [m], by arm.
        level: of the intervals.
    """
    found = {name: between(values, level) for name, values in rises.items()}
    order = sorted(found, key=lambda name: -found[name][0])
    return [{"name": name, "mean": found[name][0], "low": found[name][1], "high": found[name][2]} for name in order]


def differences(rises: Rises, level: float) -> list[NoteOfDifference]:
    """The paired difference of every two arms, that with the larger mean first; all intervals hold together.

    Args:
        rises: of each picture [m], by arm.
        level: of all intervals together.
    """
    order = [arm["name"] for arm in arms(rises, level)]
    pairs, found = [*itertools.combinations(order, 2)], []
    for more, less in pairs:
        mean, low, high = between(rises[more] - rises[less], 1 - (1 - level) / len(pairs))
        found.append(NoteOfDifference(more=more, less=less, mean=mean, low=low, high=high))
    return found


def verdict(rises: Rises, taking: Taking) -> tuple[str, str]:
    """Which method was right, as far as that can be seen, and what the sentence rests on.

    Args:
        rises: of each picture [m], by arm.
        taking: what was left out.
    """
    every = arms(rises, taking.level)
    pairs = {(each["more"], each["less"]): each for each in differences(rises, taking.level)}
    mean = {arm["name"]: percent(arm["mean"]).removeprefix("+") for arm in every}
    methods = [arm["name"] for arm in every if arm["name"] != RANDOM]
    better = [name for name in methods if (name, RANDOM) in pairs and pairs[name, RANDOM]["low"] > 0]
    m, k = len(rises[RANDOM]), taking.count
    basis = (
        f"Rise of the loss of a picture when {k} of the training images are left out and the model is trained again with "
        f"its own seed, mean over {m} pictures of one model; differences are paired by picture, and their intervals hold "
        f"together with {100 * taking.level:g}\N{NO-BREAK SPACE}% (t, Bonferroni over {len(pairs)})."
    )
    if not better:
        return f"No difference seen: the {k} images that a method names matter no more than {k} random ones.", basis
    near = [name for name in better if name == better[0] or pairs[better[0], name]["low"] <= 0]
    names = _and(near, {name: name for name in near})
    were, they = ("was", "it names") if len(near) == 1 else ("were", "they name")
    told = [f"{names} {were} right: without the {k} images {they}, the loss of a picture rises by {_and(near, mean)}"]
    if len(near) > 1:
        gap, others = pairs[near[0], near[1]], "the other" if len(near) == 2 else "the others"
        told.append(f"no difference between {near[0]} and {others} is seen ({_gap(gap)})")
    behind = [name for name in better if name not in near]
    if behind:
        lead = f" ({_gap(pairs[near[0], behind[0]])})" if len(near) == 1 else ""
        told.append(f"{_and(behind, {name: f'{name} ({mean[name]})' for name in behind})} {_is(behind)} behind{lead}")
    return f"{'; '.join(told)}. Without {k} random images it is {mean[RANDOM]}.{_unseen(methods, better)}", basis


def _and(names: Sequence[str], told: Mapping[str, str]) -> str:
    """What is told of each name, in a row."""
    *first, last = [told[name] for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _gap(found: NoteOfDifference) -> str:
    return f"{percent(found['mean'])} {interval(found['low'], found['high'])}"


def _unseen(methods: Sequence[str], better: Sequence[str]) -> str:
    """Of the methods that named nothing that mattered more than chance."""
    none = [name for name in methods if name not in better]
    return f" No difference to random images is seen for {', '.join(none)}." if none else ""
