"""What a ledger measured, as a game: players are images or the owners of images, and every training is a coalition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from whence.evaluation.ceiling import seed_effects
from whence.evaluation.outcomes import Table, Unit
from whence.evaluation.tables import nanmean
from whence.storage.tables import Array, Mask
from whence.types import WhenceError


@dataclass(frozen=True, eq=False)
class Game:
    """Trainings by the players whose images they saw.

    Args:
        players: k names.
        units: r trainings.
        masks: which players each of them saw, bool [r, k].
        outputs: what it says of each query, mean over draws [r, m].
        better: of an output, "lower" or "higher".
        torn: trainings left aside, which saw some images of a player and not the others.
    """

    players: Sequence[str]
    units: Sequence[Unit]
    masks: Mask
    outputs: Array
    better: str
    torn: int = 0

    def only(self, keep: Callable[[Unit], bool]) -> Game:
        """The trainings of which something holds."""
        return self.rows([row for row, unit in enumerate(self.units) if keep(unit)])

    def rows(self, rows: Sequence[int]) -> Game:
        """Some of the trainings."""
        chosen = list(rows)
        units = [self.units[row] for row in chosen]
        return replace(self, units=units, masks=self.masks[chosen], outputs=self.outputs[chosen])

    def designed(self, *kinds: str) -> Game:
        """The trainings of some designs ("fixed", "bernoulli", "coalition" ...)."""
        return self.only(lambda unit: unit.design.partition("(")[0] in kinds)

    def role(self, *roles: str) -> Game:
        """The trainings of some roles."""
        return self.only(lambda unit: unit.role in roles)

    @property
    def seeds(self) -> list[int]:
        """Of the trainings, each once."""
        return sorted({unit.seed for unit in self.units})

    def by_mask(self) -> dict[bytes, dict[int, Array]]:
        """Coalition -> seed -> outputs [m]."""
        found: dict[bytes, dict[int, Array]] = {}
        for unit, mask, output in zip(self.units, self.masks, self.outputs, strict=True):
            found.setdefault(mask.tobytes(), {})[unit.seed] = output
        return found

    def averaged(self) -> tuple[Mask, Array, Array]:
        """One row per coalition: its mask [c, k], the mean of its outputs [c, m], and the variance of that mean [c, m], NaN
        where a coalition has one seed.

        What a seed does to all coalitions alike (see `ceiling.seed_effects`) is no noise of their comparison, and is taken
        off before the variance is measured, of which that leaves (N - 1) / N for N coalitions.
        """
        _, index = np.unique(self.masks, axis=0, return_inverse=True)
        index = index.reshape(-1)
        seeds = np.array([unit.seed for unit in self.units])
        level = self.outputs - np.nan_to_num(seed_effects(self.outputs, index, seeds))  # NaN: seeds met once
        masks, means, variances = [], [], []
        for coalition in range(index.max() + 1):
            rows = np.flatnonzero(index == coalition)
            mean, count = nanmean(level[rows], axis=0), len(rows)
            square = ((level[rows] - mean) ** 2).sum(axis=0)
            masks.append(self.masks[rows[0]])
            means.append(mean)
            variances.append(square / (count * (count - 1)) if count > 1 else np.full_like(mean, np.nan))
        total = index.max() + 1
        lost = total / (total - 1) if total > 1 else 1.0
        return np.stack(masks), np.stack(means), lost * np.stack(variances)


def game_of(table: Table, players: Mapping[str, Sequence[int]]) -> Game:
    """The game that a table plays for some players.

    Args:
        table: what was measured of every training.
        players: name -> the rows of its images, each image of one player.
    """
    if table.better is None:
        raise WhenceError(
            "the measured output is neither better high nor low", "values", "a loss, elbo or margin that was measured"
        )
    seen = np.stack([table.masks[:, list(rows)].mean(axis=1) for rows in players.values()], axis=1)
    whole = np.asarray(((seen == 0) | (seen == 1)).all(axis=1), np.bool_)
    units = [unit for unit, kept in zip(table.units, whole, strict=True) if kept]
    masks = seen[whole].astype(bool)
    return Game(list(players), units, masks, table.outputs[whole], table.better, int((~whole).sum()))
