"""What is worth knowing of a pipeline folder that no run refuses; what a run refuses is in `task.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from whence.data.layout import Finding, some
from whence.doctor.findings import NOTHING, Findings, guarded, in_bytes, quiet
from whence.doctor.inputs import Inputs
from whence.doctor.machine import machine_memory
from whence.doctor.parts import family, lora_fits
from whence.methods import METHODS
from whence.models import Lora, Model
from whence.models.weights import PICKLES, refuse_infinite, weight_files


def notes(inputs: Inputs, sound: bool) -> Findings:
    """Of a pipeline folder that can be opened, and of the adapter on it.

    Args:
        inputs: what a run would be given.
        sound: whether nothing of it would be refused.
    """
    model, adapter = inputs.opened, inputs.adapter
    findings = guarded("model folder", lambda: _index(model))
    findings += guarded("scheduler", lambda: _terminal(model))
    findings += guarded("parts", lambda: family(model))
    findings += guarded("weights", lambda: _unopened(model.folder / model.part))
    if adapter is None:
        findings += guarded("checkpoints", lambda: _checkpoints(model))
        findings += guarded("averages", lambda: _averages(model))
    elif isinstance(adapter, Lora) and sound:
        findings += guarded("LoRA", lambda: lora_fits(model, adapter.folder))
    return findings


def too_large(model: Model) -> Findings:
    """Whether its weights are too many to be loaded for a look; they are read from end to end all the same."""
    parts = [model.part, *(part for part in _encoders(model) if (model.folder / part).is_dir())]
    size = sum(path.stat().st_size for part in parts for path in weight_files(model.folder / part))
    _, free = machine_memory()
    if not free or 2 * size <= free:  # as float32, or twice where they are converted
        return []
    what = f"{in_bytes(size)} of weights are too many to be loaded for a check in {in_bytes(free)} of memory"
    findings = [Finding("note", what, str(model.folder), "their names and shapes are checked when the run loads them")]
    for part in parts:
        findings += guarded("model", lambda part=part: _whole(model.folder / part))  # type: ignore[misc]
    return findings


def _encoders(model: Model) -> list[str]:
    """The parts that have weights besides the network."""
    vae = [] if model.vae is None else [model.vae.part]
    return [*vae, *(part for part in (*model.family.parts, *model.family.optional) if part.startswith("text_encoder"))]


def _whole(folder: Path) -> Findings:
    refuse_infinite(folder)
    return []


def _as_warnings(findings: Sequence[Finding]) -> Findings:
    return [replace(finding, level="warning") for finding in findings]


def _index(model: Model) -> Findings:
    folder = model.folder
    if (folder / "model_index.json").is_file() or not model.family.kind.__module__.startswith("diffusers."):
        return []
    what = "model_index.json is missing, so diffusers itself will not open this folder"
    return [Finding("warning", what, str(folder), "whence reads it; check that the copy is complete")]


def _terminal(model: Model) -> Findings:
    """Whether there is a step at which nothing can be predicted."""
    bars = model.forward.alphas_cumprod
    if bars is None or model.forward.prediction_type != "epsilon" or float(bars[-1]) != 0:
        return []
    what = (
        "zero terminal SNR with prediction_type 'epsilon': at the last timestep nothing of a picture can be predicted"
    )
    fix = "pictures cannot be drawn from there; check prediction_type, models like this predict v"
    return [Finding("warning", what, str(model.folder / "scheduler"), fix)]


def _unopened(folder: Path) -> Findings:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    used = weight_files(folder)
    others = sorted(path.name for path in folder.glob("*.safetensors") if path not in used)
    findings = [Finding("note", f"pickles are never opened: {some(pickles)}", str(folder), NOTHING)] if pickles else []
    if others:
        what = f"{some(path.name for path in used)} is read, and not {some(others)}"
        findings.append(Finding("note", what, str(folder), "a variant of the same weights may lie there"))
    return findings


def _checkpoints(model: Model) -> Findings:
    """The checkpoint-N folders: complete, and with the learning rate that sums over training need."""
    folder = model.folder
    *names, last = [name for name, entry in METHODS.items() if "checkpoints" in entry.needs]
    users = f"{', '.join(names)} and {last}"
    if not model.checkpoints:
        what = f"no checkpoint-N folders, so {users} cannot run"
        return [Finding("note", what, str(folder), "train with --checkpointing_steps if you want them")]
    findings = []
    for checkpoint in model.checkpoints:
        if checkpoint.problem:
            what, _, fix = checkpoint.problem.partition("; ")
            at = f"checkpoint {checkpoint.name}, which {users} will refuse"
            findings.append(Finding("warning", what, at, fix or "mend, rename or remove it, if you want them"))
        else:
            findings += _as_warnings(guarded("checkpoint", lambda at=folder / checkpoint.name: _whole(at / model.part)))  # type: ignore[misc]
    without = [point.name for point in model.checkpoints if point.rate is None and not point.problem]
    if without:
        what = f"{len(without)} checkpoints do not say their learning rate, which {users} need: {some(without)}"
        fix = 'write it to whence.json in each, like {"rate": 1e-4}'
        findings.append(Finding("warning", what, str(folder), fix))
    return findings


def _averages(model: Model) -> Findings:
    """Which weights are averages over training (EMA): it is easy to attribute others than those that were sampled from."""
    folder, part = model.folder, model.part
    findings, kept = [], sorted(str(path.relative_to(folder)) for path in folder.glob(f"**/{part}_ema"))
    if kept:
        what = f"averaged weights (EMA) in {some(kept)} are not read, only those in {part}/"
        fix = f"check that {part}/ holds what was sampled from (diffusers puts the average there at the end)"
        findings.append(Finding("note", what, str(folder), fix))
    for path in sorted(folder.glob("checkpoint-*/whence.json")):
        study = quiet(path).get("study")
        recipe = study.get("recipe") if isinstance(study, dict) else None
        if isinstance(recipe, dict) and (decay := recipe.get("ema")):
            what = f"{part}/ holds averaged weights (EMA {decay}), the checkpoint-N folders raw ones"
            return [*findings, Finding("note", what, str(folder), NOTHING)]
    return findings
