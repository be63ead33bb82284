"""`whence doctor`: what is wrong with model, data, disk or device, and what a run will cost, before it starts.

`Inputs` says what the run would be given, `examine` looks at it, `predict` measures, `lines` prints. Bad input never raises
here: it becomes a finding. Nothing is changed on disk, but for one temporary shard that tells how fast the disk is.
"""

from __future__ import annotations

from pathlib import Path

from whence.data.inspect import LEVELS
from whence.doctor import data, machine
from whence.doctor import model as models
from whence.doctor.cost import Cost, Step, plan, predict
from whence.doctor.findings import Findings, broken, guarded
from whence.doctor.inputs import Inputs
from whence.doctor.parts import Requirements, requirements
from whence.doctor.text import lines

__all__ = ["Cost", "Inputs", "Requirements", "Step", "examine", "lines", "plan", "predict", "requirements"]


def examine(inputs: Inputs) -> Findings:
    """Everything worth knowing before `whence attribute`, errors first. An "error" makes the run fail; what is None is
    not looked at."""
    findings: Findings = []
    if inputs.model is not None:
        findings += models.pipeline_folder(inputs)
    if inputs.train is not None:
        findings += data.images("training images", inputs, lambda: inputs.train_pictures, lambda: inputs.train_classes)
    if inputs.queries is not None:
        findings += data.images("query images", inputs, lambda: inputs.query_pictures, lambda: inputs.query_classes)
    if inputs.train is not None and inputs.queries is not None:
        findings += guarded("query images", lambda: data.shared_classes(inputs))
        findings += guarded("copies", lambda: data.copies(inputs.train_pictures, inputs.query_pictures))
    if inputs.model is not None and inputs.train is not None and not broken(findings):
        # Only a whole model and a readable folder have the fingerprints that a run folder is compared by.
        findings += guarded("output folder", lambda: machine.earlier_run(inputs))
    findings += guarded("output folder", lambda: machine.disk(Path(inputs.output)))
    findings += guarded("memory", machine.memory)
    findings += guarded("device", machine.device)
    once = dict.fromkeys(findings)  # two checks may need the same thing
    return sorted(once, key=lambda finding: LEVELS.index(finding.level))
