"""`whence doctor`: what is wrong with model, data, disk or device, and what a run will cost, before it starts.

`examine` looks, `predict` measures, `lines` tells. Bad input never raises here: it becomes a finding. Nothing is changed
on disk, but for one temporary shard that tells how fast the disk is.
"""

from __future__ import annotations

from pathlib import Path

from whence.data.inspect import LEVELS
from whence.doctor import data, machine
from whence.doctor import model as models
from whence.doctor.cost import Cost, Step, plan, predict
from whence.doctor.findings import Findings, broken, guarded
from whence.doctor.parts import Requirements, requirements
from whence.doctor.text import lines
from whence.models import Adapter

__all__ = ["Cost", "Requirements", "Step", "examine", "lines", "plan", "predict", "requirements"]


def examine(
    model: Path | None,
    train: Path | None,
    queries: Path | None,
    output: Path,
    resolution: int | None = None,
    adapter: Adapter | None = None,
    caption_column: str = "text",
) -> Findings:
    """Everything worth knowing before `whence attribute`, errors first. An "error" makes the run fail; what is None is
    not looked at. The rest as given to the run; resolution: the model's sample size by default."""
    needed = Requirements() if model is None else requirements(Path(model))
    side = resolution or needed.side
    findings: Findings = []
    if model is not None:
        findings += models.pipeline_folder(Path(model), resolution, adapter)
    folders = {"training images": train, "query images": queries}
    for kind, folder in folders.items():
        if folder is not None:
            findings += data.images(kind, Path(folder), needed, resolution, caption_column)
    if train is not None and queries is not None:
        findings += guarded("query images", lambda: data.shared_classes(Path(train), Path(queries)))
        findings += guarded("copies", lambda: data.copies(Path(train), Path(queries)))
    if model is not None and train is not None and not broken(findings):
        # Only a whole model and a readable folder have the fingerprints that a run folder is compared by.
        findings += guarded("output folder", lambda: machine.earlier_run(model, train, side, Path(output), adapter))
    findings += guarded("output folder", lambda: machine.disk(Path(output)))
    findings += guarded("memory", machine.memory)
    findings += guarded("device", machine.device)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
