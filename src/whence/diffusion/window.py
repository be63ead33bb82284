"""A window of timesteps: the draws of a rule, as if some steps of the schedule were all there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from whence.diffusion.draws import Cumulative, DrawRule, Draws, Grid, Random, Repeated, Stratified, Timesteps
from whence.types import WhenceError

RULES = (Grid, Stratified, Random, Cumulative)
"""What spreads over any schedule, whatever its length."""


@dataclass(frozen=True)
class Window:
    """The steps that another rule gives on a schedule of high - low steps, moved up by low: as many draws as it has, all of
    them in [low, high).

    Args:
        rule: the other rule.
        low: the least noisy step of the window.
        high: the first step behind it.
    """

    rule: Timesteps
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise WhenceError(f"{self.low}-{self.high} holds no timestep", "timesteps", "LOW-HIGH with 0 <= LOW < HIGH")
        inner = self.rule.rule if isinstance(self.rule, Repeated) else self.rule
        if not isinstance(inner, RULES):
            names = ", ".join(kind.__name__ for kind in RULES)
            raise WhenceError(f"{type(inner).__name__} steps cannot be restricted to a window", "timesteps", names)
        if isinstance(inner, Cumulative) and inner.count > self.high - self.low:
            held = f"{self.high - self.low} steps hold no {inner.count} different ones"
            raise WhenceError(held, "timesteps", "a wider window, or fewer draws")

    @property
    def count(self) -> int:
        return self.rule.count

    def with_count(self, count: int) -> Window:
        return replace(self, rule=self.rule.with_count(count))

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        check_window((self.low, self.high), total)
        return self.low + self.rule(seed, keys, self.high - self.low)


def check_window(window: tuple[int, int], total: int) -> None:
    """Refuse a window that is empty, or goes beyond a schedule.

    Args:
        window: (low, high), the first step in it and the first behind it.
        total: T, the timesteps of the schedule.
    """
    low, high = window
    if not 0 <= low < high <= total:
        told = f"{low}-{high} of a schedule of {total:,} timesteps"
        raise WhenceError(told, "timesteps", f"LOW-HIGH with 0 <= LOW < HIGH <= {total}")


def within(draws: DrawRule, low: int, high: int) -> Draws:
    """The same rule and count of draws, in a window of timesteps: what a query is asked about.

    Args:
        draws: of the method.
        low: the least noisy step of the window.
        high: the first step behind it.
    """
    if not isinstance(draws, Draws):
        raise WhenceError(f"{type(draws).__name__} cannot be restricted to a window", "timesteps", "draws by a rule")
    return replace(draws, timesteps=Window(draws.timesteps, low, high))
