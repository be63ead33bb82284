"""What was measured of retrained models: one row per training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from whence.evaluation.ceiling import Ceiling, ceiling, seed_effects
from whence.evaluation.tables import nanmean


@dataclass(frozen=True)
class Unit:
    """One training.

    Args:
        number: of the unit, and of its folder.
        subset: row of the masks.
        seed: of the training.
        role: of its subset.
        design: of its subset.
        chance: the inclusion probability of its images, where the subset was drawn.
    """

    number: int
    subset: int
    seed: int
    role: str
    design: str
    chance: float | None


@dataclass(frozen=True, eq=False)
class Table:
    """What was measured, a row per unit.

    Args:
        units: r trainings.
        masks: of each unit, bool [r, n].
        values: of each unit, query and draw [r, m, K].
        query_ids: names of the queries.
        better: of a value, "lower" or "higher"; None where neither is meant.
        queries: the identity of the queries (see `features.rows`); None where it is not known.
    """

    units: Sequence[Unit]
    masks: np.ndarray
    values: np.ndarray
    query_ids: Sequence[str]
    better: str | None
    queries: str | None = None

    def role(self, *roles: str) -> Table:
        """The rows of some roles."""
        keep = [row for row, unit in enumerate(self.units) if unit.role in roles]
        return replace(self, units=[self.units[r] for r in keep], masks=self.masks[keep], values=self.values[keep])

    @property
    def outputs(self) -> np.ndarray:
        """Mean over draws: [r, m] float64."""
        return self.values.astype(np.float64).mean(2)

    @property
    def subsets(self) -> np.ndarray:
        """The subset each unit belongs to: [r]."""
        return np.array([unit.subset for unit in self.units])

    @property
    def seeds(self) -> np.ndarray:
        """The seed of each unit: [r]."""
        return np.array([unit.seed for unit in self.units])

    def averaged(self) -> tuple[np.ndarray, np.ndarray]:
        """One row per subset: its mask and the mean of its seeds' outputs.

        Where subsets share seeds and some trainings are missing, what each seed does to all subsets alike is taken off
        first (see `ceiling.seed_effects`): else a subset would be ranked by which of its seeds are there.
        """
        index, seeds, outputs = self.subsets, self.seeds, self.outputs
        chosen = np.unique(index)
        of_subset = [frozenset(seeds[index == s].tolist()) for s in chosen]
        company: dict[
            int, frozenset[int]
        ] = {}  # the seeds that go with a seed: the same wherever it is, if none is missing
        if any(company.setdefault(seed, own) != own for own in of_subset for seed in own):
            outputs = outputs - seed_effects(outputs, index, seeds)
        first = [int(np.flatnonzero(index == s)[0]) for s in chosen]
        return self.masks[first], np.stack([nanmean(outputs[index == s], axis=0) for s in chosen])

    def ceiling(self) -> Ceiling:
        """The noise ceiling of its subsets."""
        return ceiling(self.outputs, self.subsets, self.seeds)
