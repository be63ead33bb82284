"""Findings and costs as plain lines."""

from __future__ import annotations

from collections.abc import Sequence

from whence.data.inspect import LEVELS
from whence.data.layout import Finding
from whence.doctor.cost import Cost, Step
from whence.doctor.findings import in_bytes, in_time


def lines(findings: Sequence[Finding], cost: Cost | None) -> list[str]:
    """Plain lines for people: one for each finding, then the stages that matter, then what the whole run will cost."""
    all_findings = [*findings, *(cost.findings if cost else ())]
    found = [f"{finding.level + ':':9}{' '.join(str(finding).split())}" for finding in all_findings]
    counts = [
        f"{len(some)} {level}{'' if len(some) == 1 else 's'}"
        for level in LEVELS[:2]
        if (some := _of(all_findings, level))
    ]
    found.append(" and ".join(counts) if counts else "nothing is wrong")
    if cost is not None and cost.steps:
        found += [_line(step) for step in cost.steps if step.seconds >= cost.seconds / 20 or step.memory == cost.memory]
        device = f"; GPU memory: {in_bytes(cost.device_memory)}" if cost.device_memory else ""
        found.append(
            f"features: {in_bytes(cost.features)} on disk, scores: {in_bytes(cost.scores)}; "
            f"memory: {in_bytes(cost.memory)} at most{device}; time: {in_time(cost.seconds)} on this device ({cost.device})"
        )
    return found


def _of(findings: Sequence[Finding], level: str) -> list[Finding]:
    return [finding for finding in findings if finding.level == level]


def _line(step: Step) -> str:
    disk = f"{in_bytes(step.disk)} on disk, " if step.disk else ""
    return f"  {step.what}: {disk}{in_bytes(step.memory)} of memory, {in_time(step.seconds)}"
