"""The trainings that a reader of `readers.VALUES` needs, as subsets of the training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from whence.evaluation import designs
from whence.evaluation.designs import MOST_PLAYERS, Subset
from whence.evaluation.readers import VALUES
from whence.types import WhenceError

RUNS, ORDERS = 200, 20


@dataclass(frozen=True)
class Asked:
    """For whom trainings are planned.

    Args:
        players: name -> the rows of its images.
        n: training images.
        common: seeds of subsets whose trainings are compared with each other.
        own: seeds of the first of the subsets that have seeds of their own.
    """

    players: Mapping[str, Sequence[int]]
    n: int
    common: Sequence[int]
    own: Sequence[int]

    @property
    def rows(self) -> list[Sequence[int]]:
        return list(self.players.values())

    def of_players(self, subsets: Sequence[Subset]) -> list[Subset]:
        """Subsets of players as subsets of images, equal ones once."""
        return designs.merged(designs.of_players(subsets, self.rows, self.n))


def planned(method: str, asked: Asked, runs: int | None = None, truncation: int | None = None) -> list[Subset]:
    """The subsets that a method needs.

    Args:
        method: a key of `readers.VALUES`.
        asked: for whom.
        runs: subsets, orders or coalitions that are drawn; None for 200, or 20 orders.
        truncation: players after which the orders of Shapley values are cut off; None for never.
    """
    if method not in VALUES:
        raise WhenceError(f"no method {method!r} reads a ledger", "--for", ", ".join(VALUES))
    if len(asked.players) < 2:
        raise WhenceError(f"{len(asked.players)} players", "--by", "a column with two values or more")
    drawn, whole = method in DRAWN, method in WHOLE and len(asked.players) <= MOST_PLAYERS
    if runs is not None and (runs < 1 or not drawn or whole):
        how = f"all coalitions of {len(asked.players)} players are trained" if whole else "nothing is drawn"
        raise WhenceError(f"{runs} runs for {method}: {how if runs >= 1 else 'at least 1'}", "--runs", "no such number")
    if truncation is not None and (method != "shapley" or whole):
        raise WhenceError(
            "orders are cut off only where they are drawn", "--truncation", "shapley of more than 12 players"
        )
    if whole:
        return designs.coalitions(asked.n, asked.players, [], asked.common)
    if method == "shapley":
        return _orders(asked, runs or ORDERS, truncation)
    return DESIGNS[method](asked, runs or RUNS)


def _orders(asked: Asked, count: int, truncation: int | None) -> list[Subset]:
    k = len(asked.players)
    length = k - 1 if truncation is None else min(truncation, k - 1)  # the last player makes the training on everything
    found = designs.chains(k, count, [[player] for player in range(k)], asked.common, seed=1, length=length)
    return [*_ends(asked), *asked.of_players(found)]


def _ends(asked: Asked) -> list[Subset]:
    """Everybody, and nobody."""
    return [*designs.full(asked.n, asked.common, "fit"), *designs.empty(asked.n, asked.common)]


def _leave_one_out(asked: Asked, runs: int) -> list[Subset]:
    return [*designs.full(asked.n, asked.common, "fit"), *designs.leave_out(asked.n, asked.rows, asked.common)]


def _halves(asked: Asked, runs: int) -> list[Subset]:
    return asked.of_players(designs.fixed(len(asked.players), runs, 0.5, asked.own, "fit", 3, common=False))


def _with_tune(asked: Asked, runs: int) -> list[Subset]:
    """Halves to fit on, and others to choose the penalty on: of few players the same halves are drawn for both."""
    tune = designs.fixed(len(asked.players), max(8, runs // 5), 0.5, asked.common, "tune", 4)
    chosen = asked.of_players(tune)
    taken = {subset.mask.tobytes() for subset in chosen}
    return [*(subset for subset in _halves(asked, runs) if subset.mask.tobytes() not in taken), *chosen]


def _seven_tenths(asked: Asked, runs: int) -> list[Subset]:
    return asked.of_players(designs.fixed(len(asked.players), runs, 0.7, asked.own, "fit", 3, common=False))


def _coins(asked: Asked, runs: int) -> list[Subset]:
    return asked.of_players(designs.bernoulli(len(asked.players), runs, 0.5, asked.own, "fit", 3))


def _mixed(asked: Asked, runs: int) -> list[Subset]:
    return asked.of_players(designs.mixed(len(asked.players), runs, asked.own, "fit", 3))


def _kernel(asked: Asked, runs: int) -> list[Subset]:
    found = designs.kernel(len(asked.players), max(runs, 2 * len(asked.players)), asked.common, "fit", 3)
    return [*_ends(asked), *asked.of_players(found)]


WHOLE = ("shapley", "banzhaf", "beta_shapley")
"""Methods that read all coalitions where there are few players."""
DESIGNS: dict[str, Callable[[Asked, int], list[Subset]]] = {
    "leave_one_out": _leave_one_out,
    "banzhaf": _coins,
    "beta_shapley": _mixed,
    "empirical_influence": _halves,
    "memorization": _seven_tenths,
    "datamodel_ridge": _halves,
    "datamodel_lasso": _with_tune,
    "kernel_shap": _kernel,
}
DRAWN = tuple(name for name in (*DESIGNS, "shapley") if name != "leave_one_out")
