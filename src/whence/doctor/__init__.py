"""`whence doctor`: what is wrong with model, data, disk or device, and what a run will cost, before it starts.

`Inputs` says what the run would be given, `examine` looks at it, `predict` measures, `lines` prints. Bad input never raises
here: it becomes a finding. Nothing is changed on disk, but for one temporary shard that tells how fast the disk is.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from whence.data.inspect import LEVELS
from whence.doctor import data, machine
from whence.doctor import model as models
from whence.doctor.cost import Cost, Step, predict
from whence.doctor.findings import Findings, broken, guarded
from whence.doctor.inputs import Inputs
from whence.doctor.parts import Requirements, requirements
from whence.doctor.planned import plan
from whence.doctor.text import lines
from whence.task.checks import CHECKS, MODEL, QUERIES, TRAIN, Check, copies

__all__ = ["Cost", "Inputs", "Requirements", "Step", "examine", "lines", "plan", "predict", "requirements"]


def examine(inputs: Inputs) -> Findings:
    """Everything worth knowing before `whence attribute`, errors first. An "error" makes the run fail; what is None is
    not looked at."""
    given = {MODEL: inputs.model, TRAIN: inputs.train, QUERIES: inputs.queries}
    findings = refusals(inputs, {name for name, value in given.items() if value is not None})
    if inputs.model_opened is not None:
        sound = not broken(findings)
        findings += guarded(MODEL, lambda: models.notes(inputs, sound))
    if inputs.train is not None:
        findings += data.images(TRAIN, inputs, lambda: inputs.train_pictures)
    if inputs.queries is not None:
        findings += data.images(QUERIES, inputs, lambda: inputs.query_pictures)
    if inputs.train is not None and inputs.queries is not None:
        findings += guarded("copies", lambda: copies(inputs.train_pictures.named, inputs.query_pictures.named))
    if inputs.model is not None and inputs.train is not None and not broken(findings):
        findings += guarded("output folder", lambda: machine.earlier_run(inputs))
    for folder in dict.fromkeys((Path(inputs.output), inputs.request.shared)):
        findings += guarded("output folder", lambda folder=folder: machine.disk(folder))  # type: ignore[misc]
    findings += guarded("memory", machine.memory)
    findings += guarded("device", machine.device)
    once = dict.fromkeys(findings)  # two checks may need the same thing
    return sorted(once, key=lambda finding: LEVELS.index(finding.level))


def refusals(inputs: Inputs, given: Collection[str]) -> Findings:
    """What a run would refuse, by the list that it goes through itself (`task.checks`).

    Args:
        inputs: what it would be given.
        given: what of it there is: `MODEL`, `TRAIN`, `QUERIES`.
    """
    findings: Findings = []
    opened = set() if TRAIN in given else {TRAIN}  # queries alone are looked at as if they were both
    for check in CHECKS:
        passed_over = check.late and broken(findings)  # what was told already would fail there once more
        if check.about in given and opened.issuperset(check.needs) and not passed_over:
            about_model = check.about == MODEL
            found = guarded(check.about, lambda check=check: _refusal(check, inputs), about_model)  # type: ignore[misc]
            findings += found
            if not broken(found):
                opened.add(check.opens)
    return findings


def _refusal(check: Check, inputs: Inputs) -> Findings:
    """Nothing, or an error that becomes a finding where this is called."""
    large = models.too_large(inputs.opened) if check.late else []
    if not large:
        check.run(inputs.request)
    return large
