"""How close does every method come to retraining? One row per method on one bank.

LDS on test subsets, for held-out and for generated queries, with two-way bootstrap intervals; every choice (damping, the
penalty of a datamodel) is made on tune subsets; the ceiling is what seed noise leaves possible. Each method starts from an
empty store, so that seconds and bytes are its own. Rows are kept as they are finished: a run that was cut off goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.table import Table as Columns

from whence.diffusion.draws import Draws, Grid, Stratified, uniform
from whence.diffusion.noise import normals, stream
from whence.evaluation.banks import QUERIES, Bank, BankRecipe, train_reference
from whence.evaluation.ceiling import replicate_correlation
from whence.evaluation.choice import nested, sharpen
from whence.evaluation.designs import Subset
from whence.evaluation.lds import bootstrap, predict
from whence.evaluation.ledger import Ledger
from whence.evaluation.outcomes import Table
from whence.features.parts import Gradient
from whence.features.rows import identity
from whence.methods import METHODS, build, settings_of
from whence.methods.aggregate import mean
from whence.methods.inner_product import FeatureMethod, InnerProduct
from whence.methods.metagradient import AveragedMetagradient
from whence.methods.removal import datamodels, leave_out
from whence.methods.removal.leave_out import Estimate
from whence.models import Recorded, open_model
from whence.storage.files import progress, read_json, write_json, writing
from whence.storage.scores import load_scores, save_scores
from whence.training.order import noise_keys
from whence.types import Checkpoint, Engine, Method, Scores, Task, WhenceError, digest

matplotlib.use("Agg")
DAMPINGS = tuple(10.0**e for e in range(-6, 5))
PENALTIES = tuple(10.0**e for e in np.arange(-1, 5, 0.5))
FRACTIONS = tuple(0.9**e for e in range(1, 40))  # of the LASSO penalty from which on all effects are 0
POWERS = (0.5, 0.75, 1.0, 1.5, 2.0)
SHARPENED = tuple(name for name, entry in METHODS.items() if entry.trial.sharpened)
ENSEMBLES = tuple(name for name, entry in METHODS.items() if entry.trial.ensemble)
ON_REQUEST = tuple(name for name, entry in METHODS.items() if entry.trial.on_request)
AGAIN = tuple(name for name, entry in METHODS.items() if entry.retrains)  # takes hours: trainings are kept
BASELINE = next(name for name, entry in METHODS.items() if entry.trial.baseline)


Result = dict[str, Any]  # the content of bench.json, or a part of it


@dataclass(frozen=True)
class Settings:
    """What every method that averages gradients over draws is run with; what a method does not take is left out.

    Args:
        draws: the (timestep, noise) pairs that gradients are averaged over.
        dim: columns of the random projection; None for exact gradients.
        members: models on random halves of the images, whose scores the ensembles average, and masks of a method that
            takes some.
    """

    draws: Draws = uniform(100)
    dim: int | None = 4096
    members: int = 4

    def of(self, name: str) -> dict[str, object]:
        takes, entry = settings_of(name), METHODS[name]
        ours = {"dim": self.dim, "masks": self.members}
        given: Result = {key: value for key, value in ours.items() if key in takes}
        averaged = isinstance(takes.get("draws"), Draws) and isinstance(takes["draws"].timesteps, (Grid, Stratified))
        if averaged and not entry.measured and not entry.trial.own_draws:
            fewer = entry.trial.fewer_draws
            given["draws"] = self.draws if fewer == 1 else uniform(max(2, self.draws.count // fewer))
        return given


Key = tuple[str, float | None]  # what is tried: in words, and a number
Candidates = dict[Key, Scores]
Scorer = Callable[[str, Task], Candidates]
Estimates = Mapping[Key, Estimate]


def random_scores(kind: str, task: Task) -> Candidates:
    """The row that everything must beat."""
    keys = stream(1, 0, torch.arange(len(task.queries)))
    values = normals(keys, (len(task.train),), torch.float64)
    return {("", None): Scores(values, task.queries.ids, task.train.ids, {"method": "random"})}


def by_method(name: str, settings: Settings, measured: Draws, ensemble: bool = False) -> Scorer:
    """A method of METHODS, over the whole grid of dampings where it has one.

    Queries of inner products of gradients are measured on the method's own draws, and on those of the bank: the better one
    is chosen with the damping. What trains again measures them on those of the bank alone.

    Args:
        name: of the method.
        settings: that it is run with.
        measured: the draws of the bank.
        ensemble: whether its scores are averaged over models.
    """
    entry = METHODS[name]
    exactly = {"redraw": False} if "redraw" in settings_of(name) else {}

    def variants(task: Task) -> Iterator[tuple[str, float | None, Method]]:
        given = settings.of(name)
        if entry.measured:
            yield "", None, build(name, task.forward, given | {"draws": measured} | exactly)
        elif entry.trial.grid is not None:
            setting, values = entry.trial.grid
            for value in values:
                yield "", value, build(name, task.forward, {**given, setting: value})
        else:
            method = build(name, task.forward, given)
            if ensemble:
                method = replace(cast(InnerProduct, method), aggregate=mean)
            yield "own draws", None, method
            if isinstance(method, InnerProduct) and method.query is None and isinstance(method.train, Gradient):
                as_measured = replace(measured, unit=method.train.draws.unit)
                yield "measured draws", None, replace(method, query=replace(method.train, draws=as_measured))

    def score(kind: str, task: Task) -> Candidates:
        found: Candidates = {}
        for words, number, method in variants(task):
            if isinstance(method, FeatureMethod) and method.damping is not None:
                grid = method.grid(task, DAMPINGS)
                found |= {(words, damping): scores for damping, scores in zip(DAMPINGS, grid, strict=True)}
            else:
                found[words, number] = method(task)
        return found

    return score


def sharpened(scorer: Scorer) -> Scorer:
    """sign(tau) |tau|^p of another row's candidates, p chosen with the rest."""

    def score(kind: str, task: Task) -> Candidates:
        return {
            (f"{words}, power {power:g}".removeprefix(", "), number): replace(
                scores, values=torch.from_numpy(sharpen(scores.values.numpy(), power))
            )
            for (words, number), scores in scorer(kind, task).items()
            for power in POWERS
        }

    return score


def _influence(fit: Table, tune: Table, better: str) -> Estimates:
    return {("", None): leave_out.empirical_influence(fit.masks, fit.outputs, better)}


def _ridge(fit: Table, tune: Table, better: str) -> Estimates:
    return {("", p): datamodels.ridge(fit.masks, fit.outputs, p, better) for p in PENALTIES}


def _lasso(fit: Table, tune: Table, better: str) -> Estimates:
    """A penalty per query, so it is chosen here, on the tune runs alone."""
    penalty = datamodels.lasso_penalty_on(fit.masks, fit.outputs, *tune.averaged(), FRACTIONS)
    return {("", None): datamodels.lasso(fit.masks, fit.outputs, penalty, 0, better=better)}


READERS = {"empirical_influence": _influence, "datamodel_ridge": _ridge, "datamodel_lasso": _lasso}


def by_retraining(bank: Bank, name: str) -> Scorer:
    """Readers of the bank's own fit runs: what retraining buys without any gradient."""

    def score(kind: str, task: Task) -> Candidates:
        fit, tune = bank.tables[kind].role("fit"), bank.tables[kind].role("tune")
        if not fit.units:
            raise WhenceError(f"bank {bank.name} has no fit runs, which {name} reads")
        return {
            setting: Scores(torch.from_numpy(estimate.values), task.queries.ids, task.train.ids, {"method": name})
            for setting, estimate in READERS[name](fit, tune, fit.better or "lower").items()
        }

    return score


def scorers(
    bank: Bank, settings: Settings, measured: Draws, names: Sequence[str] | None = None
) -> dict[str, tuple[Scorer, bool]]:
    """Every row there is, or the named ones: its scorer, and whether it is of an ensemble of models.

    Args:
        bank: whose fit runs the readers of retrainings take.
        settings: that methods are run with.
        measured: the draws of the bank.
        names: of the rows; None for all but those that take hours.
    """
    rows: dict[str, tuple[Scorer, bool]] = {"random": (random_scores, False)}
    rows |= {name: (by_method(name, settings, measured), False) for name in METHODS}
    rows |= {f"{name}_sharpened": (sharpened(by_method(name, settings, measured)), False) for name in SHARPENED}
    rows |= {f"{name}_ensemble": (by_method(name, settings, measured, ensemble=True), True) for name in ENSEMBLES}
    rows |= {name: (by_retraining(bank, name), False) for name in READERS}
    unknown = [name for name in names or [] if name not in rows]
    if unknown:
        raise WhenceError(f"unknown method {unknown[0]!r}; this bench has {', '.join(rows)}")
    return {name: rows[name] for name in names or rows if names or name not in (*AGAIN, *ON_REQUEST)}


def members(recipe: BankRecipe, count: int, root: Path, engine: Engine) -> list[Checkpoint]:
    """Models on the random halves that `averaged_metagradient` takes, with its seeds: ensembles at no more than its cost.

    Args:
        recipe: of the bank.
        count: halves.
        root: of the bench.
        engine: how the work is carried out.
    """
    halves = AveragedMetagradient(masks=count)
    jobs = [job for group in halves.jobs(noise_keys(recipe.train)) for job in group]
    subsets = [Subset(job.mask.numpy() > 0, "fit", "half", (job.seed,), halves.fraction) for job in jobs]
    ledger = Ledger.plan(root / "members", recipe.study, recipe.train, subsets, recipe.stack)
    ledger.run(engine=engine)
    made = [digest([recipe.study, identity(recipe.train), job.seed, job.mask], 64) for job in jobs]
    return [
        Checkpoint(partial(ledger.load, unit), made[unit.subset], f"half-{unit.number}", None, None)
        for unit in ledger.units
    ]


def run(
    bank: Bank,
    recipe: BankRecipe,
    root: Path,
    names: Sequence[str] | None = None,
    settings: Settings = Settings(),
    engine: Engine = Engine(),
) -> Result:
    """Score, choose on tune rows, judge on test rows. Writes bench.json and bench.png in `root`; returns the result.

    Args:
        bank: the truth.
        recipe: of the bank.
        root: where rows are kept as they are finished; a run that was cut off goes on there.
        names: of the rows; None for all but those that take hours.
        settings: that methods are run with.
        engine: how the work is carried out.
    """
    rows = scorers(bank, settings, recipe.draws, names)  # refuses unknown names before anything is trained
    model = open_model(train_reference(recipe, root, engine))
    sampled = Recorded(model, bank.queries["generated"].ids, range(recipe.generated), 0, 50, root, engine)
    trajectory = (*model.checkpoints, model.final)
    halves = members(recipe, settings.members, root, engine) if any(many for _, many in rows.values()) else []
    for name, (scorer, many) in progress(rows.items(), "methods"):
        if (root / "rows" / name / "row.json").exists():
            continue
        row: Result = {}
        store, begun = root / ("trainings" if name in AGAIN else f"rows/{name}/store"), time.process_time()
        fresh = not store.exists()
        for kind in QUERIES:
            task = Task(
                model.forward,
                halves[-1:] if many else trajectory,
                recipe.train,
                bank.queries[kind],
                store,
                engine,
                ensemble=halves[:-1] if many else (),
                study=recipe.study,
                sampled=sampled if kind == "generated" else None,
            )
            try:
                candidates = scorer(kind, task)
            except WhenceError as error:  # such as a method for sampled queries only, asked about held-out ones
                row["skipped"] = str(error)
                continue
            row[kind] = _choose(bank.tables[kind], candidates)
            save_scores(root / "rows" / name / kind, candidates[row[kind]["variant"], row[kind]["setting"]])
        row["seconds"] = time.process_time() - begun if fresh else None  # what else a machine does is not counted
        row["bytes"] = sum(path.stat().st_size for path in store.rglob("*.safetensors"))
        if name not in AGAIN:
            shutil.rmtree(store, ignore_errors=True)
        write_json(root / "rows" / name / "row.json", row)
    result = judge(bank, root, names)
    write_json(root / "bench.json", result)
    plot(result, root / "bench.png")
    return result


def _choose(table: Table, candidates: Candidates) -> Result:
    """What does best on the tune subsets, and the curve of its variant: [number, LDS on tune, LDS on test]."""
    tune_masks, tune = table.role("tune").averaged()
    test_masks, test = table.role("test").averaged()
    values = {key: scores.values.numpy() for key, scores in candidates.items()}
    chosen = nested(values, tune_masks, tune, test_masks, test, table.better or "lower")
    variant, setting = chosen.setting
    curve = [[n, chosen.tune[w, n], chosen.test[w, n]] for w, n in values if w == variant]
    return {
        "variant": variant,
        "setting": setting,
        "optimism": chosen.optimism,
        "curve": curve if len(curve) > 1 else [],
    }


def judge(bank: Bank, root: Path, names: Sequence[str] | None = None) -> Result:
    """Intervals of all finished rows, paired: the same resampled subsets and queries for every method.

    Args:
        bank: the truth.
        root: of the bench.
        names: of the rows; None for all that are finished.
    """
    rows = {path.parent.name: read_json(path, dict) for path in sorted(root.glob("rows/*/row.json"))}
    if names is not None:
        rows = {name: row for name, row in rows.items() if name in names}
    result: Result = {"bank": bank.name, "study": bank.manifest["study"], "rows": {}, "ceiling": {}}
    for kind in QUERIES:
        test = bank.tables[kind].role("test")
        masks, outputs = test.averaged()
        limit = test.ceiling().spearman
        result["ceiling"][kind] = {
            "estimate": limit.estimate,
            "low": limit.low,
            "high": limit.high,
            "reliability": float(np.nanmean(replicate_correlation(test.outputs, test.subsets, test.seeds))),
        }
        scored = {name: load_scores(root / "rows" / name / kind) for name, row in rows.items() if kind in row}
        predictions = {name: predict(scores.values.numpy(), masks) for name, scores in scored.items()}
        found = bootstrap(predictions, outputs, bank.tables[kind].better or "lower")
        for name in scored:
            lds = found.interval(name)
            gain = found.difference(name, BASELINE) if BASELINE in scored else lds
            cost = {key: rows[name][key] for key in ("seconds", "bytes")}
            result["rows"].setdefault(name, cost)[kind] = {
                **rows[name][kind],
                "lds": lds.estimate,
                "low": lds.low,
                "high": lds.high,
                "centre": lds.centre,  # what the ends are about, as the ceiling is: infinitely many subsets
                "of_ceiling": lds.centre / limit.estimate,
                "noise": _noise(scored[name]),
                "over_pixels": [gain.estimate, gain.low, gain.high],
            }
    result["skipped"] = {name: row["skipped"] for name, row in rows.items() if name not in result["rows"]}
    return result


def _noise(scores: Scores) -> str | None:
    """Whether all images were measured at the same draws, "shared", or each at its "own"; None where there are none."""
    told = json.dumps(scores.recipe.get("method"))
    return "shared" if '"shared": true' in told else "own" if '"shared"' in told else None


def grid(result: Result) -> Columns:
    """The result as a table for the terminal, best first."""
    table = Columns("method", box=None, pad_edge=False, header_style="bold")
    for kind in QUERIES:
        for column in (f"LDS {kind}", "95 %", "of ceiling", "damping"):
            table.add_column(column, justify="right")
    for column in ("seconds", "MB"):
        table.add_column(column, justify="right")
    for name, row in ordered(result):
        cells = []
        for kind in QUERIES:
            r = row.get(kind)
            if r is None:
                cells += [""] * 4
                continue
            setting = "" if r["setting"] is None else f"{r['setting']:.0e}"
            cells += [f"{r['lds']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}", f"{r['of_ceiling']:.0%}", setting]
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"  # unknown where trainings were there before
        table.add_row(name, *cells, seconds, f"{row['bytes'] / 1e6:.1f}")
    c = result["ceiling"]
    cells = [
        x for k in QUERIES for x in (f"{c[k]['estimate']:.3f}", f"{c[k]['low']:.3f} to {c[k]['high']:.3f}", "", "")
    ]
    table.add_row("ceiling", *cells, "", "", style="bold")
    return table


def ordered(result: Result) -> list[tuple[str, Any]]:
    """Rows by the LDS on generated queries, best first."""
    return sorted(result["rows"].items(), key=lambda item: -item[1].get("generated", {"lds": -1.0})["lds"])


def plot(result: Result, path: Path) -> None:
    """Points with intervals per method, the ceiling as a band."""
    rows = ordered(result)[::-1]
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    for kind, colour, shift in (("heldout", "#0b66c3", 0.14), ("generated", "#d1600c", -0.14)):
        there = [number for number, (_, row) in enumerate(rows) if kind in row]
        values = np.array([[rows[number][1][kind][key] for key in ("lds", "low", "high")] for number in there])
        errors = np.abs(values[:, 1:] - values[:, :1]).T
        at = np.array(there) + shift
        axes.errorbar(values[:, 0], at, xerr=errors, fmt="o", ms=4, lw=1.4, color=colour, label=f"{kind} queries")
        limit = result["ceiling"][kind]
        axes.axvspan(limit["low"], limit["high"], color=colour, alpha=0.12, lw=0)
        axes.axvline(limit["estimate"], color=colour, lw=1, ls="--", label=f"ceiling, {kind}")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_ylim(-0.8, len(rows) - 0.2)
    axes.set_xlabel("linear datamodeling score (95 % interval); damping chosen on other subsets")
    axes.set_title(f"How close to retraining? Bank: {result['bank']}", loc="left", fontsize=11)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
