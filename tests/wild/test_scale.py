"""Scores call themselves a predicted rise of the loss only where they have the size of one: benchmarks/scale.py."""

from __future__ import annotations

import json
from pathlib import Path

from whence.methods import METHODS, entry

RESULTS = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "scale.json"


def test_a_scale_is_stated_only_where_leave_one_out_bears_it_out():
    rows = json.loads(RESULTS.read_text())["methods"]
    assert rows.keys() == METHODS.keys()
    stated = {name: row["size"] for name, row in rows.items() if row.get("scale", "rank") != "rank"}
    assert {"metagradient", "exact_influence", "ek_fac_refined"} <= stated.keys()
    assert {name: size for name, size in stated.items() if not 0.5 <= size <= 2} == {}


def test_the_scale_of_every_method_is_the_one_that_was_measured():
    rows = json.loads(RESULTS.read_text())["methods"]
    for name, row in rows.items():
        if "scale" in row:
            assert getattr(entry(name).make(), "scale", row["scale"]) == row["scale"], name
