"""Small recipes for tests: by default no warm-up and no averaging, and any setting changed by its name alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from whence.training.optimizer import SGD, AdamW
from whence.training.recipe import New, NoiseSchedule, Recipe, Schedule
from whence.training.study import Study

PLAIN = Recipe(None, AdamW(1e-4, eps_root=0.0), Schedule(1, 0), ema=0.0)


def recipe_of(steps: int, batch_size: int = 64, **settings: Any) -> Recipe:
    """A recipe with these settings (see `changed`)."""
    return changed(PLAIN, steps=steps, batch_size=batch_size, **settings)


def changed(recipe: Recipe, momentum: float | None = None, **settings: Any) -> Recipe:
    """A recipe with other settings, wherever in it they stand. momentum: for SGD in place of AdamW."""
    if momentum is not None:
        own = recipe.optimizer
        recipe = replace(recipe, optimizer=SGD(own.learning_rate, momentum, own.weight_decay))
    for name in ("optimizer", "schedule", "objective", "data"):
        part = getattr(recipe, name)
        here = {field.name for field in fields(part)} & settings.keys()
        recipe = replace(recipe, **{name: replace(part, **{key: settings.pop(key) for key in here})})
    return replace(recipe, **settings)


def pixel_study(network: Mapping[str, Any], recipe: Recipe, **noise: Any) -> Study:
    """The study of a new network of pixels. noise: of its noise schedule."""
    return Study(replace(recipe, model=New(network, NoiseSchedule(**noise))))
