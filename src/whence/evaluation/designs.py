"""Which subsets to retrain on: every design is a list of `Subset`s over n images (or over groups of them)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from whence.methods.removal.semivalues import kernel_masks
from whence.types import WhenceError

ROLES = ("fit", "tune", "test", "other")


@dataclass(frozen=True, eq=False)
class Subset:
    """A mask over the training images, and the trainings on it.

    Args:
        mask: which images are taken, bool [n].
        role: what its outputs may be used for: "fit" a method that reads retrainings, "tune" its settings, "test" it; or
            "other".
        design: how the mask came about.
        seeds: one training each.
        chance: the inclusion probability of its images, where it was drawn; None where not.
    """

    mask: np.ndarray
    role: str
    design: str
    seeds: tuple[int, ...]
    chance: float | None = None


def _check(role: str, seeds: Sequence[int]) -> tuple[int, ...]:
    if role not in ROLES:
        raise WhenceError(f"role {role!r} is not one of {', '.join(ROLES)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise WhenceError(f"seeds {list(seeds)}: give at least one, none of them twice")
    return tuple(seeds)


def full(n: int, seeds: Sequence[int] = (0, 1), role: str = "other") -> list[Subset]:
    """All images: the reference of leave-one-out, and the other-seed arm of counterfactuals.

    Args:
        n: training images.
        seeds: one training each.
        role: of the subset.
    """
    return [Subset(np.ones(n, dtype=bool), role, "full", _check(role, seeds))]


def fixed(
    n: int,
    count: int,
    fraction: float = 0.5,
    seeds: Sequence[int] = (0, 1),
    role: str = "test",
    seed: int = 0,
    common: bool = True,
) -> list[Subset]:
    """Random subsets of round(fraction n) images, balanced: every image is in equally many (+-1) of them.

    With common seeds (common random numbers) what a seed does to the trainings on all subsets alike, most of what it does
    to a convolutional network, is the same number for each of them: ranks do not see it (see `ceiling`). With seeds of
    its own (seed + span of the seeds * position) a subset's noise is independent of that of the others.

    Args:
        n: training images.
        count: subsets.
        fraction: of the images in a subset.
        seeds: one training each.
        role: of the subsets.
        seed: that the subsets are drawn with.
        common: the same seeds for all subsets; False moves them on from subset to subset.
    """
    size = round(fraction * n)
    if not 0 < size < n or count < 1:
        raise WhenceError(f"fixed design: {count} subsets of {size} out of {n} images; the size must be 1 to {n - 1}")
    rng = np.random.default_rng([seed, n, count])
    masks = np.zeros((count, n), dtype=bool)
    for mask in masks:
        mask[rng.permutation(n)[:size]] = True
    _balance(masks, rng)
    own = _seeds(_check(role, seeds), count, common)
    return [Subset(mask, role, f"fixed({fraction:g})", s, fraction) for mask, s in zip(masks, own, strict=True)]


def _seeds(seeds: tuple[int, ...], count: int, common: bool) -> list[tuple[int, ...]]:
    """The seeds of each of `count` subsets: the same, or moved on so that none is used twice."""
    span = 0 if common else max(seeds) - min(seeds) + 1
    return [tuple(s + i * span for s in seeds) for i in range(count)]


def again(subsets: Sequence[Subset], first: int, count: int) -> list[Subset]:
    """The same subsets trained more often, each with seeds of its own: for a higher noise ceiling.

    Args:
        subsets: those that were trained before.
        first: seed; the others follow it.
        count: further trainings of each subset.
    """
    return [
        replace(subset, seeds=tuple(range(first + count * i, first + count * (i + 1))))
        for i, subset in enumerate(subsets)
    ]


def _balance(masks: np.ndarray, rng: np.random.Generator) -> None:
    """Swap images within rows until column counts differ by at most one; row sizes stay."""
    while True:
        counts = masks.sum(0)
        if counts.max() - counts.min() <= 1:
            return
        often = rng.choice(np.flatnonzero(counts == counts.max()))
        seldom = rng.choice(np.flatnonzero(counts == counts.min()))
        row = rng.choice(np.flatnonzero(masks[:, often] & ~masks[:, seldom]))
        masks[row, often], masks[row, seldom] = False, True


def bernoulli(
    n: int,
    count: int,
    chance: float = 0.5,
    seeds: Sequence[int] = (0,),
    role: str = "fit",
    seed: int = 0,
    common: bool = False,
) -> list[Subset]:
    """Subsets that take each image independently with the same probability.

    By default with seeds of their own: whoever fits on them averages over the seeds, one of which has attributions of its
    own.

    Args:
        n: training images.
        count: subsets.
        chance: the probability, between 0 and 1.
        seeds: one training each.
        role: of the subsets.
        seed: that the subsets are drawn with.
        common: the same seeds for all subsets; False moves them on from subset to subset.
    """
    if not 0 < chance < 1:
        raise WhenceError(f"bernoulli design: chance {chance}; it must lie between 0 and 1")
    rng = np.random.default_rng([seed, n, count, 1])
    own = _seeds(_check(role, seeds), count, common)
    masks = rng.random((count, n)) < chance
    return [Subset(mask, role, f"bernoulli({chance:g})", s, chance) for mask, s in zip(masks, own, strict=True)]


def mixed(n: int, count: int, seeds: Sequence[int] = (0,), role: str = "fit", seed: int = 0) -> list[Subset]:
    """Bernoulli subsets whose probability is another one each, evenly spread over (0, 1): Shapley and Beta-Shapley values of
    any number of players, every training saying something of each of them.

    Args:
        n: training images.
        count: subsets.
        seeds: one training each, moved on from subset to subset.
        role: of the subsets.
        seed: that the subsets are drawn with.
    """
    rng = np.random.default_rng([seed, n, count, 3])
    own, found = _seeds(_check(role, seeds), count, common=False), []
    for number, mine in enumerate(own):
        chance = (number + 0.5) / count
        mask = rng.random(n) < chance
        found.append(Subset(mask, role, f"bernoulli({chance:g})" if mask.any() else EMPTY, mine, chance))
    return found


EMPTY = "empty"
"""The design of the subset without images: the network before its training, the value of nobody."""


def empty(n: int, seeds: Sequence[int] = (0, 1), role: str = "fit") -> list[Subset]:
    """No image: the network before its training.

    Args:
        n: training images.
        seeds: one network each.
        role: of the subset.
    """
    return [Subset(np.zeros(n, dtype=bool), role, EMPTY, _check(role, seeds))]


def kernel(n: int, count: int, seeds: Sequence[int] = (0,), role: str = "fit", seed: int = 0) -> list[Subset]:
    """Coalitions as kernel SHAP draws them (see `kernel_masks`), the same ones trained once.

    Args:
        n: players.
        count: coalitions.
        seeds: one training each, the same for all.
        role: of the subsets.
        seed: of the coalitions.
    """
    seeds = _check(role, seeds)
    return [Subset(mask, role, f"kernel({number})", seeds) for number, mask in enumerate(kernel_masks(n, count, seed))]


def merged(subsets: Sequence[Subset]) -> list[Subset]:
    """Subsets with equal images, trainings and kind of design as one, "kernel(3)" and "kernel(8)" as "kernel(3;8)": what a
    design draws twice is trained once."""
    found: dict[tuple[object, ...], Subset] = {}
    for subset in subsets:
        kind, _, rest = subset.design.partition("(")
        key = (subset.mask.tobytes(), subset.role, subset.seeds, kind)
        before = found.get(key)
        if before is not None:
            subset = replace(before, design=f"{before.design.removesuffix(')')};{rest}" if rest else before.design)
        found[key] = subset
    return list(found.values())


def of_players(subsets: Sequence[Subset], players: Sequence[Sequence[int]], n: int) -> list[Subset]:
    """Subsets of players as subsets of their images.

    Args:
        subsets: masks over the players.
        players: the rows of each.
        n: training images.
    """
    found = []
    for subset in subsets:
        rows = [row for player in np.flatnonzero(subset.mask).tolist() for row in players[player]]
        found.append(replace(subset, mask=_only(n, rows)))
    return found


def leave_out(
    n: int, players: Sequence[Sequence[int]] | None = None, seeds: Sequence[int] = (0,), role: str = "fit"
) -> list[Subset]:
    """All images but one, or but one group; the same seeds for all, so that only the images differ.

    Args:
        n: training images.
        players: the rows of each group (see `groups`); None for single images.
        seeds: one training each.
        role: of the subsets.
    """
    seeds = _check(role, seeds)
    return [Subset(_without(n, rows), role, f"leave_out({i})", seeds)
            for i, rows in enumerate(players or [[i] for i in range(n)])]  # fmt: skip


def chains(
    n: int,
    count: int,
    players: Sequence[Sequence[int]],
    seeds: Sequence[int] = (0,),
    role: str = "fit",
    seed: int = 0,
    length: int | None = None,
) -> list[Subset]:
    """Growing prefixes of random permutations of the players: the marginals of permutation Shapley values.

    Args:
        n: training images.
        count: permutations.
        players: the rows of each.
        seeds: one training each, the same for all prefixes.
        role: of the subsets.
        seed: of the permutations.
        length: players after which a chain is cut off; None for all.
    """
    rng, seeds, found = np.random.default_rng([seed, n, count, 2]), _check(role, seeds), []
    if length is not None and not 0 < length <= len(players):
        raise WhenceError(f"chains of {length} out of {len(players)} players", accepted=f"1 to {len(players)}")
    for chain in range(count):
        mask = np.zeros(n, dtype=bool)
        for position, player in enumerate(rng.permutation(len(players))[:length]):
            mask = mask | _only(n, players[player])
            found.append(Subset(mask, role, f"chain({chain},{position},{player})", seeds))
    return found


MOST_PLAYERS = 12  # 4,096 coalitions


def coalitions(
    n: int, players: Mapping[str, Sequence[int]], base: Sequence[int], seeds: Sequence[int] = (0, 1), role: str = "fit"
) -> list[Subset]:
    """The base images with those of every set of players, 2^k of them: the whole game, so that Shapley values are exact.
    Without a base the coalition of nobody is the network before its training.

    Args:
        n: training images.
        players: name -> its rows, at most `MOST_PLAYERS`.
        base: rows that are in all subsets; none where all images have players.
        seeds: one training each.
        role: of the subsets.
    """
    seeds, names = _check(role, seeds), list(players)
    if not 0 < len(names) <= MOST_PLAYERS:
        raise WhenceError(f"{len(names)} players", "coalitions", f"1 to {MOST_PLAYERS}")
    owners = [*base, *(row for rows in players.values() for row in rows)]
    if len(set(owners)) < len(owners):
        raise WhenceError("an image has two owners", "coalitions", "disjoint sets")
    found = []
    for number in range(2 ** len(names)):
        together = [name for bit, name in enumerate(names) if number >> bit & 1]
        mask = _only(n, [*base, *(row for name in together for row in players[name])])
        found.append(Subset(mask, role, f"coalition({' + '.join(together)})" if mask.any() else EMPTY, seeds))
    return found


def removal(
    n: int, sets: Mapping[str, Sequence[int]], seeds: Sequence[int] = (0, 1), role: str = "test"
) -> list[Subset]:
    """All images but those of each named set: counterfactuals. Sets with the same images share one entry.

    Args:
        n: training images.
        sets: name -> the rows that are left out.
        seeds: one training each.
        role: of the subsets.
    """
    seeds = _check(role, seeds)
    seen: dict[bytes, tuple[np.ndarray, list[str]]] = {}
    for name, rows in sets.items():
        mask = _without(n, rows)
        seen.setdefault(mask.tobytes(), (mask, []))[1].append(name)
    return [Subset(mask, role, "removal(" + " = ".join(names) + ")", seeds) for mask, names in seen.values()]


def addition(
    n: int, base: Sequence[int], sets: Mapping[str, Sequence[int]], seeds: Sequence[int] = (0, 1), role: str = "test"
) -> list[Subset]:
    """The base images plus those of each named set.

    Args:
        n: training images.
        base: rows that are in all subsets.
        sets: name -> the rows that are added.
        seeds: one training each.
        role: of the subsets.
    """
    found, seeds = [], _check(role, seeds)
    for name, rows in sets.items():
        found.append(Subset(_only(n, [*base, *rows]), role, f"addition({name})", seeds))
    return found


def _only(n: int, rows: Sequence[int]) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    for row in rows:
        if not 0 <= row < n:  # numpy would take -1 for the last image
            raise WhenceError(f"row {row} of {n} images; accepted: 0 to {n - 1}")
        mask[row] = True
    return mask


def _without(n: int, rows: Sequence[int]) -> np.ndarray:
    mask = ~_only(n, rows)
    if mask.all() or not mask.any():
        raise WhenceError(f"leaving out {len(rows)} of {n} images: some must go and some must stay")
    return mask
