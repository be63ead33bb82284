"""Which weights count, and how much: checkpoints of one training are one thing, models of an ensemble another."""

from dataclasses import replace
from pathlib import Path

import pytest

from errors import refuses
from whence.methods import METHODS, aggregate, build, settings_of
from worlds import checkpoint, classifier_task, trained_classifier


def members(count: int) -> tuple:
    return tuple(checkpoint(lambda i=i: trained_classifier(i + 1), f"other-{i}", None, None) for i in range(count))


@pytest.mark.parametrize("others", [0, 1, 4])
@pytest.mark.parametrize("checkpoints", [0, 1, 3])
def test_an_ensemble_is_of_models_and_a_trajectory_of_checkpoints(others, checkpoints):
    """Mean: final weights alone, eta = 1/(others + 1) each, however many checkpoints there are. TracIn's sum: checkpoints
    alone, however many models there are."""
    task = classifier_task(Path("unused"))
    along = tuple(replace(task.trajectory[0], name=f"at {s}", step=s, rate=0.1 * s) for s in range(1, checkpoints + 1))
    final = replace(task.trajectory[-1], name="final", step=None, rate=None)
    task = replace(task, trajectory=(*along, final), ensemble=members(others))
    assert aggregate.last(task) == [(final, 1.0)]
    assert aggregate.mean(task) == [(model, 1 / (others + 1)) for model in (*task.ensemble, final)]
    if checkpoints:
        assert aggregate.rate_weighted(task) == [(point, point.rate) for point in along]
    else:
        with refuses("there is only final"):
            aggregate.rate_weighted(task)


FOR_CLASSIFIERS = [name for name, entry in METHODS.items() if entry.classifier is not None]


@pytest.mark.parametrize("name", [name for name in FOR_CLASSIFIERS if set(METHODS[name].needs) <= {"checkpoints"}])
def test_only_an_average_over_models_looks_at_the_ensemble(name, tmp_path):
    """Every method that attributes a classifier and needs no more than checkpoints: without `ensemble=True` the further
    models change nothing."""
    task = classifier_task(tmp_path)
    method = build(name, task.forward, {"dim": 16} if "dim" in settings_of(name) else {})
    alone, among = method(task), method(replace(task, ensemble=members(2)))
    assert (alone.values == among.values).all()
    assert alone.recipe["checkpoints"] == among.recipe["checkpoints"]
