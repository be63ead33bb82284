"""What happens when the images that a method names are really taken away.

For each query and method the top k images are left out, models are retrained with the same seeds, and the query is measured
and drawn again from the same noise. Arms beside the methods: random removal of many sizes, and nothing removed but another
seed, which says how much a picture changes for no reason at all.

    dL   mean over seeds of loss_q(without, seed) - loss_q(all, seed), on fixed draws
    l2   norm of the difference of the two redrawn pictures in [-1, 1];  ssim  their structural similarity
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import uniform_filter

from whence.diffusion.draws import Draws
from whence.diffusion.outputs import loss
from whence.evaluation import designs
from whence.evaluation.ledger import Ledger
from whence.evaluation.outcomes import Table, Unit
from whence.features.rows import identity
from whence.models import Model, denoise, start_noise
from whence.storage.files import progress, writing
from whence.storage.notes import last_models
from whence.training.study import Study
from whence.types import Engine, Images, Scores, WhenceError, only_some

matplotlib.use("Agg")


Result = dict[str, Any]  # the content of counterfactual.json, or a part of it


@dataclass(frozen=True)
class Plan:
    """What is removed, and how often models are retrained.

    Args:
        fractions: of the training set, removed for each query and method.
        seeds: of the retrainings.
        other_seeds: of the arm that only changes the seed.
        random: sets per size of random removal.
        sizes: the fractions of the random curve.
        stack: models trained together.
    """

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1)
    seeds: tuple[int, ...] = (5000, 5001)
    other_seeds: tuple[int, ...] = (5100, 5101)
    random: int = 5
    sizes: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.4)
    stack: int = 32


@dataclass(frozen=True)
class Arm:
    """A fraction of the images is removed.

    Args:
        method: names the images, or RANDOM or OTHER_SEED.
        fraction: of the training set.
        query: the one they are named for; None for the same images for all queries.
    """

    method: str
    fraction: float
    query: int | None = None


RANDOM, OTHER_SEED = "random", "other seed"  # arms that are no method


@dataclass(frozen=True)
class Asked:
    """The queries that are looked at.

    Args:
        queries: all that have scores.
        rows: which of them are looked at.
        draws: on which their loss is measured.
        drawn_as: the number of each query among the pictures of the sampler's seed 0, or None for queries that no model
            drew (then nothing is redrawn).
    """

    queries: Images
    rows: Sequence[int]
    draws: Draws
    drawn_as: Sequence[int] | None


Removal = tuple[Arm, list[int]]  # an arm, and the images it leaves out


def removals(plan: Plan, scores: Mapping[str, Scores], queries: Sequence[int], n: int) -> list[Removal]:
    """What each method names for each query, and random sets of every size.

    Args:
        plan: how much is removed.
        scores: of each method.
        queries: rows of the queries that are looked at.
        n: training images.
    """
    found: list[Removal] = []
    for fraction in plan.fractions:
        k = max(1, round(fraction * n))
        for name, s in scores.items():
            order = torch.sort(s.values, dim=1, descending=True, stable=True).indices[:, :k]
            found += [(Arm(name, fraction, q), order[q].tolist()) for q in queries]
    rng = np.random.default_rng(0)
    for fraction in sorted({*plan.sizes, *plan.fractions}):
        k = max(1, round(fraction * n))
        found += [(Arm(RANDOM, fraction), sorted(rng.permutation(n)[:k].tolist())) for _ in range(plan.random)]
    return found


def _named(sets: Sequence[Removal]) -> dict[str, list[int]]:
    """Names for the ledger's plan, in which they are noted: method/fraction/query, or the number of a random set."""
    numbers: Counter[Arm] = Counter()
    names = {}
    for arm, rows in sets:
        last = numbers[arm] if arm.query is None else arm.query
        names[f"{arm.method}/{arm.fraction}/{last}"] = rows
        numbers[arm] += 1
    return names


def run(
    plan: Plan,
    study: Study,
    train: Images,
    model: Model,
    asked: Asked,
    scores: Mapping[str, Scores],
    root: Path,
    engine: Engine = Engine(),
) -> Result:
    """Retrain, measure, redraw, and summarise.

    Args:
        plan: what is removed.
        study: what is trained, and how.
        train: the training images.
        model: whose sampler draws the pictures again.
        asked: the queries that are looked at.
        scores: of each method, for all queries.
        root: for the ledger.
        engine: how the work is carried out.
    """
    for name, s in scores.items():
        if s.some_only:
            raise only_some(f"the scores of {name}", s)
        sides = (s.query_ids, asked.queries, "queries"), (s.train_ids, train, "train")
        for ids, side, key in sides:
            if (
                list(ids) != list(side.ids) or s.recipe.get(key, own := identity(side)) != own
            ):  # made by hand: not known
                raise WhenceError(f"the scores of {name} are for other queries or training images")
        models = last_models(s.recipe)
        if len(models) == 1 and model.final.digest not in models:  # ensembles of a bench are of models of their own
            raise WhenceError(f"the scores of {name} are of another model than {model.folder}")
    n = len(train)
    sets = removals(plan, scores, asked.rows, n)
    subsets = [
        *designs.full(n, (*plan.seeds, *plan.other_seeds)),
        *designs.removal(n, _named(sets), plan.seeds),
    ]
    ledger = Ledger.plan(root / "ledger", study, train, subsets, plan.stack)
    ledger.run(engine=engine)
    ledger.measure("loss", asked.queries, loss, asked.draws, engine)
    pictures = _redraw(ledger, model, asked, engine)
    return _summary(plan, _effects(plan, sets, ledger.table("loss"), pictures, asked.rows), asked.rows, n)


Pictures = Mapping[int, Mapping[int, np.ndarray]]  # unit -> query -> [C, H, W]
Effects = dict[Arm, dict[str, list[float]]]  # of each query -> measure -> a value per training


def _effects(plan: Plan, sets: Sequence[Removal], table: Table, pictures: Pictures, rows: Sequence[int]) -> Effects:
    """What every training changed, against the model of all images with the same seed."""
    full = {unit.seed: row for row, unit in enumerate(table.units) if unit.design == "full"}
    losses, found = table.outputs, Effects()
    for row, unit in enumerate(table.units):
        for arm, seed in _arms(plan, sets, unit, table.masks[row]):
            for q in rows if arm.query is None else [arm.query]:
                values = found.setdefault(replace(arm, query=q), {})
                values.setdefault("dL", []).append(float(losses[row, q] - losses[full[seed], q]))
                if pictures:
                    a, b = pictures[unit.number][q], pictures[table.units[full[seed]].number][q]
                    values.setdefault("l2", []).append(float(np.linalg.norm(a - b)))
                    values.setdefault("ssim", []).append(ssim(a, b))
    return found


def _arms(plan: Plan, sets: Sequence[Removal], unit: Unit, mask: np.ndarray) -> list[tuple[Arm, int]]:
    """The arms that a training serves, and the seed of the full model it is compared with."""
    if unit.design == "full":
        if unit.seed in plan.seeds:
            return []
        return [(Arm(OTHER_SEED, 0.0), plan.seeds[plan.other_seeds.index(unit.seed)])]
    # Arms that leave out the same images share a training.
    gone = set(np.flatnonzero(~mask).tolist())
    return [(arm, unit.seed) for arm, images in sets if set(images) == gone]


def _redraw(ledger: Ledger, model: Model, asked: Asked, engine: Engine) -> Pictures:
    """Every model's version of the queries, from the noise they were drawn from; none of queries that no model drew."""
    if asked.drawn_as is None:
        return {}
    noise = start_noise(model, max(asked.drawn_as) + 1, seed=0)[[asked.drawn_as[q] for q in asked.rows]]
    found = {}
    for unit in progress(ledger.units, "drawing again"):
        network = ledger.load(unit).to(engine.device, engine.dtype).eval()
        drawn = denoise(network, model, noise.to(engine.device, engine.dtype), 50, {}, engine, quiet=True)
        found[unit.number] = dict(zip(asked.rows, drawn.cpu().double().numpy(), strict=True))
    return found


def ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Structural similarity of two pictures, uniform windows (Wang et al. 2004).

    Args:
        a: a picture [C, H, W] in [-1, 1].
        b: another one.
        window: side of a window, in pixels.
    """
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    size = (0, window, window)
    mean_a, mean_b = uniform_filter(a, size), uniform_filter(b, size)
    var_a, var_b = uniform_filter(a * a, size) - mean_a**2, uniform_filter(b * b, size) - mean_b**2
    cov = uniform_filter(a * b, size) - mean_a * mean_b
    values = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


def _summary(plan: Plan, found: Effects, rows: Sequence[int], n: int) -> Result:
    """Per arm and fraction: mean over queries of each effect, its bootstrap interval over queries, and the number of random
    images whose removal raises the loss as much."""
    rng = np.random.default_rng(0)
    resampled = rng.integers(0, len(rows), (2000, len(rows)))
    arms: list[Result] = []
    for arm in dict.fromkeys(replace(each, query=None) for each in found):
        entry: Result = {"arm": arm.method, "fraction": arm.fraction, "removed": round(arm.fraction * n)}
        of = [found[replace(arm, query=q)] for q in rows]
        for key in sorted(of[0]):
            per_query = np.array([np.mean(values[key]) for values in of])
            low, high = np.quantile(per_query[resampled].mean(1), [0.025, 0.975])
            entry[key] = {"mean": per_query.mean(), "median": np.median(per_query), "low": low, "high": high}
        arms.append(entry)
    curve = sorted((a["removed"], a["dL"]["mean"]) for a in arms if a["arm"] == RANDOM)
    sizes, rises = [0, *(k for k, _ in curve)], np.maximum.accumulate([0.0, *(y for _, y in curve)])
    for entry in arms:
        rise = entry["dL"]["mean"]
        # Beyond the largest random removal nothing is known but that it is more.
        entry["worth_random"] = float(np.interp(rise, rises, sizes)) if rise <= rises[-1] else None
    arms.sort(key=lambda a: (a["arm"], a["fraction"]))
    return {"n": n, "queries": len(rows), "seeds": len(plan.seeds), "largest_random": sizes[-1], "arms": arms}


def plot(result: Result, path: Path) -> None:
    """Effect against the number of images removed, a line per arm."""
    keys = [key for key in ("dL", "l2", "ssim") if key in result["arms"][0]]
    names = sorted({a["arm"] for a in result["arms"]} - {OTHER_SEED})
    titles = {"dL": "rise of the query's loss", "l2": "change of the redrawn picture (l2)", "ssim": "similarity (SSIM)"}
    figure, all_axes = plt.subplots(1, len(keys), figsize=(4.4 * len(keys), 3.6), layout="constrained", squeeze=False)
    for axes, key in zip(all_axes[0], keys, strict=True):
        for name in names:
            arms = [a for a in result["arms"] if a["arm"] == name and a["fraction"] <= 0.4]
            x = [a["removed"] for a in arms]
            y = np.array([[a[key][part] for part in ("mean", "low", "high")] for a in arms])
            colour = "0.55" if name == RANDOM else None
            line = axes.plot(x, y[:, 0], "o-", ms=4, label=name, color=colour)[0]
            axes.fill_between(x, y[:, 1], y[:, 2], alpha=0.15, color=line.get_color(), lw=0)
        for other in (a for a in result["arms"] if a["arm"] == OTHER_SEED):
            axes.axhline(other[key]["mean"], color="0.3", ls=":", label="nothing removed, other seed")
        axes.set_xscale("log")
        axes.set_xlabel("training images removed")
        axes.set_title(titles[key], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = all_axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
