"""What happens when the images that a method names are really taken away.

For each query and method the top k images are left out, models are retrained with the same seeds, and the query is measured
and drawn again from the same noise. Arms beside the methods: random removal of many sizes, and nothing removed but another
seed, which says how much a picture changes for no reason at all.

    dL   mean over seeds of loss_q(without, seed) - loss_q(all, seed), on fixed draws
    l2   norm of the difference of the two redrawn pictures in [-1, 1];  ssim  their structural similarity
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from whence.evaluation.ledger import Ledger, Unit
from whence.models import Model, denoise, start_noise
from whence.storage.files import progress, writing
from whence.training.study import Study
from whence.types import Engine, Images, Scores, WhenceError

matplotlib.use("Agg")


@dataclass(frozen=True)
class Plan:
    """fractions of the training set to remove; seeds of the retrainings, and of the arm that only changes the seed;
    random: sets per size of random removal; sizes: the fractions of the random curve."""

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1)
    seeds: tuple[int, ...] = (5000, 5001)
    other_seeds: tuple[int, ...] = (5100, 5101)
    random: int = 5
    sizes: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.4)
    stack: int = 32


def removal_sets(plan: Plan, scores: Mapping[str, Scores], queries: Sequence[int], n: int) -> dict[str, list[int]]:
    """Every set to leave out, by arm name: method/fraction/query and random/fraction/number."""
    sets: dict[str, list[int]] = {}
    for fraction in plan.fractions:
        k = max(1, round(fraction * n))
        for name, s in scores.items():
            order = torch.sort(s.values, dim=1, descending=True, stable=True).indices[:, :k]
            sets |= {f"{name}/{fraction}/{q}": order[q].tolist() for q in queries}
    rng = np.random.default_rng(0)
    for fraction in sorted({*plan.sizes, *plan.fractions}):
        k = max(1, round(fraction * n))
        sets |= {f"random/{fraction}/{i}": sorted(rng.permutation(n)[:k].tolist()) for i in range(plan.random)}
    return sets


def run(
    plan: Plan,
    study: Study,
    train: Images,
    queries: Images,
    drawn_as: Sequence[int] | None,
    model: Model,
    scores: Mapping[str, Scores],
    rows: Sequence[int],
    draws: Draws,
    root: Path,
    engine: Engine = Engine(),
) -> dict[str, Any]:
    """Retrain, measure, redraw, and summarise. rows: the queries looked at; drawn_as: the number of each query among the
    pictures of the sampler's seed 0, or None for queries that no model drew (then nothing is redrawn)."""
    for name, s in scores.items():
        if list(s.query_ids) != list(queries.ids) or list(s.train_ids) != list(train.ids):
            raise WhenceError(f"the scores of {name} are for other queries or training images")
    n = len(train)
    subsets = [
        *designs.full(n, (*plan.seeds, *plan.other_seeds)),
        *designs.removal(n, removal_sets(plan, scores, rows, n), plan.seeds),
    ]
    ledger = Ledger.plan(root / "ledger", study, train, subsets, plan.stack)
    ledger.run(engine=engine)
    ledger.measure("loss", queries, loss, draws, engine)
    table = ledger.table("loss")
    losses = {(unit.subset, unit.seed): row for unit, row in zip(table.units, table.outputs, strict=True)}
    pictures = {} if drawn_as is None else _redraw(ledger, model, drawn_as, rows, engine)
    found: dict[str, dict[str, list[float]]] = {}
    for unit in table.units:
        pairs = _pairs(unit, plan)
        for arm, query, seed in pairs:
            for q in rows if query is None else [query]:
                values = {"dL": losses[unit.subset, unit.seed][q] - losses[0, seed][q]}
                if pictures:
                    a, b = pictures[unit.number][q], pictures[_full(table.units, seed).number][q]
                    values |= {"l2": float(np.linalg.norm(a - b)), "ssim": ssim(a, b)}
                for key, value in values.items():
                    found.setdefault(arm, {}).setdefault(f"{key}/{q}", []).append(float(value))
    return _summary(plan, found, rows, n)


def _full(units: Sequence[Unit], seed: int) -> Unit:
    return next(unit for unit in units if unit.subset == 0 and unit.seed == seed)


def _pairs(unit: Unit, plan: Plan) -> list[tuple[str, int | None, int]]:
    """(arm, query or None for all, seed of the full model to compare with) of a unit."""
    if unit.design == "full":
        if unit.seed in plan.seeds:
            return []
        return [("other seed/0", None, plan.seeds[plan.other_seeds.index(unit.seed)])]
    names = unit.design.removeprefix("removal(").removesuffix(")").split(" = ")
    parts = [name.split("/") for name in names]
    return [(f"{arm}/{fraction}", None if arm == "random" else int(last), unit.seed) for arm, fraction, last in parts]


def _redraw(
    ledger: Ledger, model: Model, drawn_as: Sequence[int], rows: Sequence[int], engine: Engine
) -> dict[int, dict[int, np.ndarray]]:
    """Every model's version of the queries, from the noise they were drawn from: unit -> query -> [C, H, W]."""
    noise = start_noise(model, max(drawn_as) + 1, seed=0)[[drawn_as[q] for q in rows]]
    found = {}
    for unit in progress(ledger.units, "drawing again"):
        network = ledger.load(unit).to(engine.device, engine.dtype).eval()
        drawn = denoise(network, model, noise.to(engine.device, engine.dtype), 50, {}, engine, quiet=True)
        found[unit.number] = dict(zip(rows, drawn.cpu().double().numpy(), strict=True))
    return found


def ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    """Structural similarity of two pictures [C, H, W] in [-1, 1], uniform windows (Wang et al. 2004)."""
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    size = (0, window, window)
    mean_a, mean_b = uniform_filter(a, size), uniform_filter(b, size)
    var_a, var_b = uniform_filter(a * a, size) - mean_a**2, uniform_filter(b * b, size) - mean_b**2
    cov = uniform_filter(a * b, size) - mean_a * mean_b
    values = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(values.mean())


def _summary(plan: Plan, found: Mapping[str, Mapping[str, list[float]]], rows: Sequence[int], n: int) -> dict[str, Any]:
    """Per arm and fraction: mean over queries of each effect, its bootstrap interval over queries, and the number of random
    images whose removal raises the loss as much."""
    rng = np.random.default_rng(0)
    resampled = rng.integers(0, len(rows), (2000, len(rows)))
    arms: list[dict[str, Any]] = []
    for arm, values in found.items():
        name, fraction = arm.rsplit("/", 1)
        entry: dict[str, Any] = {"arm": name, "fraction": float(fraction), "removed": round(float(fraction) * n)}
        for key in sorted({k.split("/")[0] for k in values}):
            per_query = np.array([np.mean(values[f"{key}/{q}"]) for q in rows])
            low, high = np.quantile(per_query[resampled].mean(1), [0.025, 0.975])
            entry[key] = {"mean": per_query.mean(), "median": np.median(per_query), "low": low, "high": high}
        arms.append(entry)
    curve = sorted((a["removed"], a["dL"]["mean"]) for a in arms if a["arm"] == "random")
    sizes, rises = [0, *(k for k, _ in curve)], np.maximum.accumulate([0.0, *(y for _, y in curve)])
    for entry in arms:
        rise = entry["dL"]["mean"]
        # Beyond the largest random removal nothing is known but that it is more.
        entry["worth_random"] = float(np.interp(rise, rises, sizes)) if rise <= rises[-1] else None
    arms.sort(key=lambda a: (a["arm"], a["fraction"]))
    return {"n": n, "queries": len(rows), "seeds": len(plan.seeds), "largest_random": sizes[-1], "arms": arms}


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Effect against the number of images removed, a line per arm."""
    keys = [key for key in ("dL", "l2", "ssim") if key in result["arms"][0]]
    names = sorted({a["arm"] for a in result["arms"]} - {"other seed"})
    titles = {"dL": "rise of the query's loss", "l2": "change of the redrawn picture (l2)", "ssim": "similarity (SSIM)"}
    figure, all_axes = plt.subplots(1, len(keys), figsize=(4.4 * len(keys), 3.6), layout="constrained", squeeze=False)
    for axes, key in zip(all_axes[0], keys, strict=True):
        for name in names:
            arms = [a for a in result["arms"] if a["arm"] == name and a["fraction"] <= 0.4]
            x = [a["removed"] for a in arms]
            y = np.array([[a[key][part] for part in ("mean", "low", "high")] for a in arms])
            colour = "0.55" if name == "random" else None
            line = axes.plot(x, y[:, 0], "o-", ms=4, label=name, color=colour)[0]
            axes.fill_between(x, y[:, 1], y[:, 2], alpha=0.15, color=line.get_color(), lw=0)
        for other in (a for a in result["arms"] if a["arm"] == "other seed"):
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
