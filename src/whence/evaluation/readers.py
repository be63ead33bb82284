"""How values are read from a ledger of retrained models: leave-one-out, Shapley, influence ...

A reader takes a `Game` and returns an `Estimate` (see `methods.removal`): larger = did more FOR the query, in units of the
measured output; errors are those of other seeds, and of other subsets where these were drawn. `VALUES` holds every reader by
name; `plans` holds the trainings that each of them needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from whence.evaluation import designs
from whence.evaluation.games import Game
from whence.methods.removal import datamodels, leave_out, semivalues
from whence.methods.removal.leave_out import Estimate
from whence.storage.tables import Array
from whence.types import WhenceError

SUBSETS, SEEDS, ORDERS = "subsets and seeds", "seeds", "orders and seeds"
PENALTIES = tuple(10.0**e for e in np.arange(-2, 5, 0.5))
FRACTIONS = tuple(10.0**e for e in np.arange(0, -4.01, -0.25))


@dataclass(frozen=True)
class Value:
    """A reader and what is known of it.

    Args:
        read: (game, settings) -> estimate.
        paper: who proposed it.
        year: when.
        needs: the trainings that it reads, in words.
        stderr_of: what its errors are of; from all coalitions, of seeds alone.
        semivalue: whether players in all coalitions are the ground that the others stand on, without a value.
        scale: see `Scores`.
    """

    read: Callable[..., Estimate]
    paper: str
    year: int
    needs: str
    stderr_of: str
    semivalue: bool = False
    scale: str = "value"

    @property
    def settings(self) -> dict[str, object]:
        """With their defaults."""
        return settings_after(self.read, 1)


def settings_after(read: Callable[..., object], asked: int) -> dict[str, object]:
    """The settings of a function with their defaults: its parameters after the first, which are what it is asked about."""
    return {name: each.default for name, each in list(inspect.signature(read).parameters.items())[asked:]}


VALUES: dict[str, Value] = {}


def _value(
    paper: str, year: int, needs: str, stderr_of: str, semivalue: bool = False, scale: str = "value"
) -> Callable[[Callable[..., Estimate]], Callable[..., Estimate]]:
    def register(read: Callable[..., Estimate]) -> Callable[..., Estimate]:
        VALUES[read.__name__] = Value(read, paper, year, needs, stderr_of, semivalue, scale)
        return read

    return register


def _lacks(method: str, what: str) -> WhenceError:
    return WhenceError(what, method, f"a ledger of `whence ledger plan --for {method}`, run and measured")


@_value("Cook", 1977, "trainings on everything, and without each player", SEEDS, scale="removal")
def leave_one_out(game: Game) -> Estimate:
    """Retraining without each player: seed by seed where the seeds are the same, so that what a seed does to all cancels."""
    runs, full = game.by_mask(), np.ones(len(game.players), bool)
    everything = runs.get(full.tobytes(), {})
    if not everything:
        raise _lacks("leave_one_out", "no training saw all players")
    without = []
    for place, player in enumerate(game.players):
        mask = full.copy()
        mask[place] = False
        if mask.tobytes() not in runs:
            raise _lacks("leave_one_out", f"no training leaves out {player!r} alone")
        without.append(runs[mask.tobytes()])
    shared = sorted(set(everything).intersection(*without))
    if shared:
        tables = [np.stack([each[seed] for seed in shared]) for each in (everything, *without)]
        return leave_out.paired_leave_one_out(tables[0], tables[1:], game.better)
    tables = [np.stack(list(each.values())) for each in (everything, *without)]
    return leave_out.leave_one_out(tables[0], tables[1:], game.better)


def whole_game(game: Game) -> Game | None:
    """The coalitions of players who are not in all of them, where every one of these was trained; None elsewhere.

    Players in all coalitions are part of the ground that the others stand on, and have no value.
    """
    found = game.designed("coalition", designs.EMPTY)
    if not found.units:
        return None
    free = np.asarray(~found.masks.all(axis=0), np.bool_)
    if not 0 < free.sum() <= semivalues.MAX_PLAYERS or len(np.unique(found.masks, axis=0)) < 2 ** free.sum():
        return None
    players = [player for player, kept in zip(found.players, free, strict=True) if kept]
    return replace(found, players=players, masks=found.masks[:, free])


def _exact(game: Game, sizes: Array) -> Estimate:
    """Semivalue of a whole game, Σ_S c_S ȳ_S; its error is that of the trainings alone: SE² = Σ_S c_S² var(ȳ_S)."""
    masks, means, variances = game.averaged()
    found = semivalues.semivalue(masks, means, sizes, game.better)
    weights = semivalues.semivalue_weights(masks, sizes)
    return Estimate(found.values, np.sqrt(variances.T @ weights**2), len(game.units))


@_value(
    "Ghorbani & Zou",
    2019,
    "all coalitions of up to 12 players; or growing chains; or subsets of mixed sizes",
    SUBSETS,
    True,
)
def shapley(game: Game) -> Estimate:
    """Exact from all coalitions; else the mean over growing chains of players; else by importance weights from subsets that
    take each player with probabilities spread over (0, 1)."""
    whole = whole_game(game)
    if whole is not None:
        return _exact(whole, semivalues.beta_sizes(len(whole.players)))
    if game.designed("chain").units:
        return _of_chains(game)
    return _sampled(game, "shapley", semivalues.beta_sizes(len(game.players)))


@_value("Kwon & Zou", 2022, "all coalitions of up to 12 players; or subsets of mixed sizes", SUBSETS, True)
def beta_shapley(game: Game, alpha: float = 4.0, beta: float = 1.0) -> Estimate:
    """Beta(alpha, beta)-Shapley: a large alpha weighs small coalitions."""
    whole = whole_game(game)
    if whole is not None:
        return _exact(whole, semivalues.beta_sizes(len(whole.players), alpha, beta))
    return _sampled(game, "beta_shapley", semivalues.beta_sizes(len(game.players), alpha, beta))


@_value(
    "Wang & Jia",
    2023,
    "all coalitions of up to 12 players; or subsets that take each player with probability 1/2",
    SUBSETS,
    True,
)
def banzhaf(game: Game) -> Estimate:
    """With minus without, over all coalitions or over fair coins."""
    whole = whole_game(game)
    if whole is not None:
        return _exact(whole, semivalues.banzhaf_sizes(len(whole.players)))
    drawn = game.designed("bernoulli").role("fit").only(lambda unit: unit.chance == 0.5)
    if not drawn.units:
        raise _lacks("banzhaf", "neither all coalitions were trained, nor subsets with probability 1/2")
    masks, means, _ = drawn.averaged()
    return semivalues.banzhaf(masks, means, game.better)


def _sampled(game: Game, method: str, sizes: Array) -> Estimate:
    drawn = game.designed("bernoulli", designs.EMPTY).only(lambda unit: unit.role == "fit" and unit.chance is not None)
    chances = [unit.chance for unit in drawn.units if unit.chance is not None]
    if len(set(chances)) < 4:
        raise _lacks(method, "neither all coalitions were trained, nor subsets of many sizes")
    return semivalues.sampled_semivalue(drawn.masks, drawn.outputs, chances, sizes, game.better)


def _of_chains(game: Game) -> Estimate:
    """Mean of the marginals over chains and seeds; a chain that was cut off gives those who were to come equal parts of what
    was left, so that all marginals still sum to v(all) - v(nobody).

    SE: standard deviation over chains / sqrt(chains), seeds averaged first.
    """
    runs, k = game.by_mask(), len(game.players)
    nobody, everything = runs.get(np.zeros(k, bool).tobytes()), runs.get(np.ones(k, bool).tobytes())
    if nobody is None or everything is None:
        raise _lacks("shapley", "chains need the training on everything and the network before it")
    chains: dict[int, dict[int, tuple[int, bytes]]] = {}
    for unit, mask in zip(game.units, game.masks, strict=True):
        for each in _drawn_as(unit.design, "chain"):
            number, position, player = map(int, each.split(","))
            chains.setdefault(number, {})[position] = (player, mask.tobytes())
    found = [
        each
        for each in (_marginals(chain, runs, nobody, everything, k) for chain in chains.values())
        if each is not None
    ]
    if not found:
        raise _lacks("shapley", "no chain is finished")
    table = np.stack(found) * (-1 if game.better == "lower" else 1)
    count = len(table)
    error = table.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else np.full_like(table[0], np.nan)
    return Estimate(table.mean(axis=0), error, len(game.units))


def _drawn_as(design: str, kind: str) -> list[str]:
    """The places that a subset has in a design, "kernel(3;8)": ["3", "8"]; none in another one."""
    found, _, rest = design.removesuffix(")").partition("(")
    return rest.split(";") if found == kind else []


Runs = Mapping[bytes, Mapping[int, Array]]


def _marginals(
    chain: Mapping[int, tuple[int, bytes]],
    runs: Runs,
    nobody: Mapping[int, Array],
    everything: Mapping[int, Array],
    k: int,
) -> Array | None:
    """What each player adds to the prefix before it [m, k], mean over the seeds that all its trainings share; None where one
    is missing.

    Args:
        chain: position -> player and mask.
        runs: mask -> seed -> outputs.
        nobody: of the network before training.
        everything: of the training on all.
        k: players.
    """
    steps = [chain.get(position) for position in range(len(chain))]
    prefixes = [runs.get(step[1]) for step in steps if step is not None]
    known = [each for each in prefixes if each is not None]
    shared = sorted(set(nobody).intersection(everything, *known))
    if len(known) < len(steps) or not shared:
        return None
    marginals = np.zeros((len(shared), next(iter(nobody.values())).shape[0], k))
    for row, seed in enumerate(shared):
        before, left = nobody[seed], set(range(k))
        for step, prefix in zip(steps, known, strict=True):
            assert step is not None
            marginals[row, :, step[0]] = prefix[seed] - before
            before = prefix[seed]
            left.discard(step[0])
        for player in left:
            marginals[row, :, player] = (everything[seed] - before) / len(left)
    return np.asarray(marginals.mean(axis=0), np.float64)


@_value("Feldman & Zhang", 2020, "random subsets", SUBSETS)
def empirical_influence(game: Game) -> Estimate:
    """Mean output with a player minus mean output without."""
    masks, means, _ = _random(game, "empirical_influence").averaged()
    return leave_out.empirical_influence(masks, means, game.better)


@_value("Feldman & Zhang", 2020, "random subsets, measured on the training images themselves", SUBSETS)
def memorization(game: Game) -> Estimate:
    """Influence of every training image on itself: [1, n]."""
    masks, means, _ = _random(game, "memorization").averaged()
    if masks.shape != means.shape:
        raise WhenceError(
            f"{means.shape[1]} measured pictures and {masks.shape[1]} players",
            "memorization",
            "--by image, and the training images measured: whence ledger measure --query_data_dir TRAIN --name train",
        )
    return leave_out.memorization(masks, means, game.better)


def _random(game: Game, method: str) -> Game:
    drawn = game.designed("fixed", "bernoulli").role("fit")
    if not drawn.units:
        raise _lacks(method, "no random subset of the role fit was trained")
    return drawn


@_value("Ilyas et al., with ridge", 2022, "random subsets", SUBSETS)
def datamodel_ridge(game: Game, penalty: float | None = None) -> Estimate:
    """Ridge regression of the outputs on the masks. The penalty of each query is the one that errs least on tune subsets;
    where there are none, on each fitted one without it."""
    masks, means, _ = _random(game, "datamodel_ridge").averaged()
    tune = game.designed("fixed", "bernoulli").role("tune")
    if penalty is not None:
        return datamodels.ridge(masks, means, penalty, game.better)
    if not tune.units:
        return datamodels.ridge(masks, means, datamodels.ridge_penalty(masks, means, PENALTIES), game.better)
    tune_masks, tune_means, _ = tune.averaged()
    chosen = datamodels.ridge_penalty_on(masks, means, tune_masks, tune_means, PENALTIES)
    return datamodels.ridge(masks, means, chosen, game.better)


@_value("Ilyas et al.", 2022, "random subsets, and tune subsets", SUBSETS)
def datamodel_lasso(game: Game, penalty: float | None = None, resamples: int = 20, seed: int = 0) -> Estimate:
    """LASSO of the outputs on the masks; the penalty of each query that errs least on tune subsets."""
    masks, means, _ = _random(game, "datamodel_lasso").averaged()
    if penalty is not None:
        return datamodels.lasso(masks, means, penalty, resamples, seed, game.better)
    tune = game.designed("fixed", "bernoulli").role("tune")
    if not tune.units:
        raise _lacks("datamodel_lasso", "no tune subset was trained to choose the penalty on, and none is given")
    tune_masks, tune_means, _ = tune.averaged()
    chosen = datamodels.lasso_penalty_on(masks, means, tune_masks, tune_means, FRACTIONS)
    return datamodels.lasso(masks, means, chosen, resamples, seed, game.better)


@_value("Lundberg & Lee; Covert & Lee", 2021, "coalitions of kernel SHAP, nobody and everybody", SUBSETS)
def kernel_shap(game: Game) -> Estimate:
    """Shapley value as the least-squares fit to coalitions that are drawn by the Shapley kernel."""
    k = len(game.players)
    kernels = {mask.tobytes() for mask in game.designed("kernel").masks}
    if not kernels:
        raise _lacks("kernel_shap", "no coalition of kernel SHAP was trained")
    size = game.masks.sum(axis=1)
    read = (size == 0) | (size == k) | np.array([mask.tobytes() in kernels for mask in game.masks])
    masks, means, _ = game.rows(np.flatnonzero(read).tolist()).averaged()
    size = masks.sum(axis=1)
    if not (size == 0).any() or not (size == k).any():
        raise _lacks("kernel_shap", "the training on everything or the network before it is missing")
    empty, full = means[size == 0][0], means[size == k][0]
    # A coalition that was drawn twice counts twice, and was trained once.
    place = {mask.tobytes(): row for row, mask in enumerate(masks)}
    drawn = zip(game.units, game.masks, strict=True)
    counted = {each: place[mask.tobytes()] for unit, mask in drawn for each in _drawn_as(unit.design, "kernel")}
    rows = list(counted.values())
    return semivalues.kernel_shap(masks[rows], means[rows], empty, full, game.better)
