"""What is wrong with the images, by themselves and beside the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from whence.data.decoding import PIXELS_16
from whence.data.inspect import Inspected
from whence.data.layout import Finding
from whence.doctor.findings import NOTHING, Findings, guarded
from whence.doctor.inputs import Inputs
from whence.doctor.parts import Requirements
from whence.task.checks import QUERIES

GREY = {"1", "L", "LA", "La", "I", "F"} | PIXELS_16


def images(kind: str, inputs: Inputs, inspected: Callable[[], Inspected]) -> Findings:
    """What lies in a folder of images, by itself and beside the model.

    Args:
        kind: what findings call it.
        inputs: what a run would be given.
        inspected: opens the folder.
    """
    needs, resolution, column = inputs.requirements, inputs.resolution, inputs.caption_column
    if kind == QUERIES:
        column = inputs.query_caption_column or column
    checks: list[Callable[[Inspected], Findings]] = [
        lambda pictures: pictures.findings(resolution or needs.side, inputs.skip),
        lambda pictures: _fit(pictures, needs, resolution),
        lambda pictures: _captions(pictures, needs, column or "text"),
    ]
    findings = [finding for check in checks for finding in guarded(kind, lambda check=check: check(inspected()))]  # type: ignore[misc]
    return [f if f.where.startswith((kind, "check")) else replace(f, where=f"{kind} {f.where}") for f in findings]


def _fit(inspected: Inspected, requirements: Requirements, resolution: int | None) -> Findings:
    """Sizes and colours against those of the model."""
    own, channels, where = requirements.side, requirements.channels, str(inspected.folder)
    looks = inspected.readable
    if own is None or not looks:
        return []
    findings, sizes = [], Counter(look.size for look in looks)
    if resolution is not None and resolution != own:
        what = f"the images are brought to {resolution}x{resolution}, but the model is for {own}x{own}"
        fix = f"leave --resolution out unless it was trained at {resolution}"
        findings.append(Finding("warning", what, where, fix))
    side = resolution or own
    large = [size for size in sizes if min(size) > side]
    if large:
        one = f"{large[0][0]}x{large[0][1]}"
        what = f"images are larger ({one}) than the model's {side}x{side} and get shrunk"
        # A set that is square and of one size was made for a model; photos of all sizes are usually shrunk in training.
        prepared = len(sizes) == 1 and large[0][0] == large[0][1]
        fix = "check that the model was trained on shrunk images"
        findings.append(Finding("warning" if prepared else "note", what, where, fix))
    grey = sum(look.mode in GREY for look in looks)
    if channels == 3 and grey:
        what = f"{grey} of {len(looks)} images are grey, but the model has 3 channels: they are read as grey RGB"
        findings.append(Finding("warning", what, where, "check that the model was trained on them so"))
    if channels == 1 and grey < len(looks):
        what = f"{len(looks) - grey} of {len(looks)} images are in colour, but the model has 1 channel: read as grey"
        findings.append(Finding("warning", what, where, "check that the model was trained on them so"))
    return findings


def _captions(inspected: Inspected, requirements: Requirements, column: str) -> Findings:
    captions = inspected.layout.meta.get(column)
    if not requirements.text or captions is None:
        return []
    what = f"{len({str(caption) for caption in captions})} different captions in {column!r}"
    return [Finding("note", what, str(inspected.folder), NOTHING)]
