"""Which (timestep, noise) pairs stand for an image: the draws over which its measurements are averaged.

Everything is a function of (seed, image key, draw number): see `noise`. T is the number of timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from whence.diffusion.noise import check_seed, normals, seed_for, stream, uniforms
from whence.types import Draw, Forward, WhenceError, describe, expect


class Timesteps(Protocol):
    """A rule that gives each image its timesteps."""

    @property
    def count(self) -> int: ...

    def with_count(self, count: int) -> Timesteps:
        """The same rule for another number of draws; an error where it has none."""
        ...

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        """The timesteps of each image: [b, count] int64 in [0, T).

        Args:
            seed: of what is random in the rule.
            keys: noise keys of the images [b].
            total: T, the timesteps of the schedule.
        """
        ...


@dataclass(frozen=True)
class Grid:
    """{0, T/K, 2T/K, ...}: contains 0, never T-1 (the grid of D-TRAK)."""

    count: int

    def with_count(self, count: int) -> Grid:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        return (torch.arange(self.count) * total // self.count).expand(len(keys), -1)


@dataclass(frozen=True)
class Cumulative:
    """{0, 1, ..., K-1}: the least noisy steps."""

    count: int

    def with_count(self, count: int) -> Cumulative:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        return torch.arange(self.count).expand(len(keys), -1)


@dataclass(frozen=True)
class Fixed:
    """One step, `count` noises (Journey-TRAK looks at one step of the sampler at a time)."""

    step: int
    count: int

    def with_count(self, count: int) -> Fixed:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        return torch.full((len(keys), self.count), self.step)


@dataclass(frozen=True)
class Steps:
    """The steps given, one noise each."""

    steps: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.steps)

    def with_count(self, count: int) -> Steps:
        if count == self.count:
            return self
        raise WhenceError(
            f"draws: {count} draws asked, but this rule names its steps ({', '.join(map(str, self.steps))}); accepted: "
            f"{self.count}, or draws with other steps"
        )

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        return torch.tensor(self.steps).expand(len(keys), -1)


@dataclass(frozen=True)
class Random:
    """Independent uniform steps."""

    count: int

    def with_count(self, count: int) -> Random:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        u = uniforms(stream(seed_for(seed, "timesteps"), 0, keys), self.count)
        return (u * total).long()


@dataclass(frozen=True)
class Stratified:
    """One uniform step in each of K equal bins of [0, T): unbiased, with far less spread than independent steps."""

    count: int

    def with_count(self, count: int) -> Stratified:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        u = uniforms(stream(seed_for(seed, "timesteps"), 0, keys), self.count)
        return ((torch.arange(self.count) + u) * total / self.count).long()


class Density(Protocol):
    """A distribution of timesteps: u in (0, 1) -> fraction of the schedule in (0, 1), counted from its least noisy step."""

    def __call__(self, u: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Even:
    """Every step alike."""

    def __call__(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True)
class LogitNormal:
    """1 - sigmoid(mean + std Phi^-1(u)), Phi the normal distribution function (Esser et al. 2024, section 3.1).

    mean and std as diffusers' scripts take them (--logit_mean, --logit_std): those count from the noisiest step, so that
    a larger mean trains less noisy steps.
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        return torch.sigmoid(-self.mean - self.std * torch.special.ndtri(u))


@dataclass(frozen=True)
class Mode:
    """u + scale (cos^2(pi u / 2) - 1 + u): the mode density of Esser et al. 2024 (--mode_scale)."""

    scale: float = 1.29

    def __call__(self, u: Tensor) -> Tensor:
        return u + self.scale * (torch.cos(torch.pi * u / 2).square() - 1 + u)


@dataclass(frozen=True)
class Quantiles:
    """One step in each of K equal parts of a density's probability: an unbiased mean over the steps of a training."""

    count: int
    density: Density

    def with_count(self, count: int) -> Quantiles:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        u = uniforms(stream(seed_for(seed, "timesteps"), 0, keys), self.count)
        return (self.density((torch.arange(self.count) + u) / self.count) * total).long().clamp(0, total - 1)


@dataclass(frozen=True)
class Repeated:
    """The steps of another rule, `times` noises at each (Diff-ReTrac: 16)."""

    rule: Timesteps
    times: int

    @property
    def count(self) -> int:
        return self.rule.count * self.times

    def with_count(self, count: int) -> Repeated:
        if count % self.times:
            raise WhenceError(
                f"draws: {count} draws asked, {self.times} noises at each step; accepted: multiples of {self.times}"
            )
        return replace(self, rule=self.rule.with_count(count // self.times))

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        return self.rule(seed, keys, total).repeat_interleave(self.times, dim=1)


@dataclass(frozen=True)
class Linspace:
    """K steps evenly from 1 to T-1, both ends included (the queries of Diff-ReTrac)."""

    count: int

    def with_count(self, count: int) -> Linspace:
        return replace(self, count=count)

    def __call__(self, seed: int, keys: Tensor, total: int) -> Tensor:
        return torch.linspace(1, total - 1, self.count, dtype=torch.float64).round().long().expand(len(keys), -1)


class DrawRule(Protocol):
    """Draws, or whatever else says which (timestep, noise) pairs stand for an image.

    With `unit`, gradients are divided by their norm before the mean, each that of `group` successive draws.
    """

    @property
    def count(self) -> int: ...

    @property
    def unit(self) -> bool: ...

    @property
    def group(self) -> int: ...

    def __call__(self, keys: Tensor, shape: Sequence[int], total: int, dtype: torch.dtype = torch.float32) -> Draw:
        """All draws of each image: t [b, S] and noise [b, S, *shape].

        Args:
            keys: noise keys of the images [b].
            shape: of one image.
            total: T, the timesteps of the schedule.
            dtype: of the noise.
        """
        ...


@dataclass(frozen=True)
class Draws:
    """The draws of a measurement.

    Args:
        timesteps: the rule that gives each image its timesteps.
        seed: of noise and timesteps.
        unit: divide each draw's gradient by its norm before the mean (Diff-ReTrac, DAS).
        shared: the same steps and noise for all images (common random numbers), so that two images differ by what they show
            and not by what was drawn for them; False gives each image its own, keyed by its content.
        antithetic: draws 2j and 2j+1 see opposite noise, which cancels the odd part of the sampling error.
        group: with `unit`, so many successive draws are averaged before they are divided by their norm (Diff-ReTrac: the
            noises of one timestep).
    """

    timesteps: Timesteps
    seed: int = 0
    unit: bool = False
    shared: bool = False
    antithetic: bool = False
    group: int = 1

    def __post_init__(self) -> None:
        if self.timesteps.count < 1:
            raise WhenceError(f"draws: {self.timesteps.count} draws per image; at least 1 is needed")
        check_seed(self.seed)
        if self.antithetic and self.timesteps.count % 2:
            raise WhenceError(f"antithetic draws come in pairs; {self.timesteps.count} is odd")
        if self.group < 1 or self.timesteps.count % self.group:
            raise WhenceError(f"draws: {self.timesteps.count} draws do not divide into groups of {self.group}")

    def describe(self) -> dict[str, object]:
        """As of any dataclass, without a group of 1, which banks and run folders of before do not name."""
        found = {f.name: describe(vars(self)[f.name]) for f in fields(self) if f.name != "group" or self.group > 1}
        return {"is": "Draws", **found}

    @property
    def count(self) -> int:
        return self.timesteps.count

    def with_count(self, count: int) -> Draws:
        """The same rule, noise and norms for another number of draws."""
        return replace(self, timesteps=self.timesteps.with_count(count))

    def __call__(self, keys: Tensor, shape: Sequence[int], total: int, dtype: torch.dtype = torch.float32) -> Draw:
        """All draws of each image: t [b, S] and noise [b, S, *shape]."""
        if self.shared:
            keys = torch.zeros_like(keys)
        t = self.timesteps(self.seed, keys, total)
        if int(t.min()) < 0 or int(t.max()) >= total:
            raise WhenceError(f"draws: timestep {int(t.max())} asked, but the schedule has steps 0 to {total - 1}")
        number = torch.arange(self.count)
        rows = stream(self.seed, number // 2 if self.antithetic else number, keys[:, None])
        noise = normals(rows, shape, dtype)
        if self.antithetic:
            sign = 1 - 2 * (number % 2)
            noise = noise * sign.reshape(-1, *[1] * len(shape)).to(dtype)
        return Draw(t, noise)


@dataclass(frozen=True)
class OneDraw:
    """One of the draws of another rule, with the timestep and noise it has there.

    Args:
        draws: the other rule.
        number: of the draw, from 0.
        unit: divide its gradient by its norm.
    """

    draws: Draws
    number: int
    unit: bool = False
    group = 1
    count = 1

    def __call__(self, keys: Tensor, shape: Sequence[int], total: int, dtype: torch.dtype = torch.float32) -> Draw:
        drawn, here = self.draws(keys, shape, total, dtype), slice(self.number, self.number + 1)
        return Draw(drawn.t[:, here], drawn.noise[:, here])


def uniform(count: int, seed: int = 0, unit: bool = False, shared: bool = True) -> Draws:
    """K steps on the even grid {0, T/K, 2T/K, ...}, one noise each (D-TRAK: K = 10 or 100).

    Args:
        count: K.
        seed: of the noise.
        unit: divide each draw's gradient by its norm before the mean.
        shared: the same steps and noise for all images (see `Draws`).
    """
    expect(count, int, "count", "how many draws of each image, like 10")
    return Draws(Grid(count), seed, unit, shared)


def cumulative(count: int, seed: int = 0, unit: bool = False, shared: bool = True) -> Draws:
    """The K least noisy steps {0, ..., K-1}.

    Args:
        count: K.
        seed: of the noise.
        unit: divide each draw's gradient by its norm before the mean.
        shared: the same steps and noise for all images (see `Draws`).
    """
    return Draws(Cumulative(count), seed, unit, shared)


def random(count: int, seed: int = 0, unit: bool = False, shared: bool = True) -> Draws:
    """K independent uniform steps.

    Args:
        count: K.
        seed: of steps and noise.
        unit: divide each draw's gradient by its norm before the mean.
        shared: the same steps and noise for all images (see `Draws`).
    """
    return Draws(Random(count), seed, unit, shared)


def fixed(step: int, count: int = 1, seed: int = 0, unit: bool = False, shared: bool = True) -> Draws:
    """K noises at one step.

    Args:
        step: the timestep.
        count: K.
        seed: of the noise.
        unit: divide each draw's gradient by its norm before the mean.
        shared: the same steps and noise for all images (see `Draws`).
    """
    return Draws(Fixed(step, count), seed, unit, shared)


def stratified(count: int, seed: int = 0, unit: bool = False, shared: bool = True) -> Draws:
    """One step per equal bin with antithetic noise: the recommended unbiased estimate of an expectation.

    Args:
        count: bins, an even number.
        seed: of steps and noise.
        unit: divide each draw's gradient by its norm before the mean.
        shared: the same steps and noise for all images (see `Draws`).
    """
    return Draws(Stratified(count), seed, unit, shared, antithetic=True)


def density(count: int, forward: Forward, seed: int = 0, unit: bool = False, shared: bool = True) -> Draws:
    """K steps as the training drew them, with antithetic noise.

    Args:
        count: K, an even number.
        forward: declares the density of the training's timesteps.
        seed: of steps and noise.
        unit: divide each draw's gradient by its norm before the mean.
        shared: the same steps and noise for all images (see `Draws`).
    """
    if forward.models == "classifier":
        name = type(forward).__name__
        raise WhenceError(f"density draws: {name} declares no density of timesteps; accepted: stratified({count})")
    return Draws(Quantiles(count, forward.density), seed, unit, shared, antithetic=True)


def once() -> Draws:
    """A single draw, for models that ignore it (classifiers)."""
    return Draws(Grid(1))
