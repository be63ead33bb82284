"""What is wrong with a pipeline folder: its configuration, its weights, its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from whence.data.layout import Finding, some
from whence.diffusion.forward import PREDICTION_TYPES
from whence.doctor.findings import NOTHING, Findings, broken, guarded, in_bytes, json_object, quiet, short, whole_number
from whence.doctor.inputs import Inputs
from whence.doctor.machine import machine_memory
from whence.doctor.parts import autoencoder, family, known_family, lora_fits, part_of, weight_files
from whence.methods import METHODS
from whence.models import NETWORKS, SCHEDULERS, Lora
from whence.models.autoencoders import Autoencoder, autoencoder_of, missing_autoencoder
from whence.models.pipeline import FLOW, PARTS, schedule_of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers opens


def pipeline_folder(inputs: Inputs) -> Findings:
    """A pipeline folder, and the adapter on it."""
    assert inputs.model is not None
    folder, adapter = Path(inputs.model), inputs.adapter
    findings = guarded("model folder", lambda: _folder(folder))
    if broken(findings):
        return findings
    findings += guarded("network", lambda: _network(folder, inputs.resolution))
    findings += guarded("scheduler", lambda: _scheduler(folder))
    findings += guarded("parts", lambda: family(folder))
    findings += guarded("weights", lambda: _weights(folder / part_of(folder)))
    vae = autoencoder(folder)
    names = {path.name for path in folder.iterdir() if "text_encoder" in path.name}
    for part in sorted(names | (set() if vae is None else {vae.part})):
        findings += guarded("weights", lambda part=part: _other_weights(folder / part))  # type: ignore[misc]
    if adapter is None:
        findings += guarded("checkpoints", lambda: _checkpoints(folder))
        findings += guarded("averages", lambda: _averages(folder))
    elif isinstance(adapter, Lora) and not broken(findings):
        findings += guarded("LoRA", lambda: lora_fits(folder, adapter.folder))
    # Whatever the checks above do not know of, the room that opens models does.
    return findings if broken(findings) else findings + guarded("model", lambda: _opens(inputs))


def _folder(folder: Path) -> Findings:
    """Whether this is a pipeline folder at all, and what it is instead."""
    where, pipeline = str(folder), "give a pipeline folder as save_pretrained writes it"
    if not folder.exists():
        fix = f"{pipeline}; a model of the Hub has to be downloaded first (hf download NAME --local-dir FOLDER)"
        return [Finding("error", "no such model folder", where, fix)]
    if not folder.is_dir():
        fix = f"{pipeline}; a single file can be turned into one (from_single_file, then save_pretrained)"
        return [Finding("error", "is a file, not a model folder", where, fix)]
    part = part_of(folder)
    if (folder / "config.json").is_file() and not (folder / part).is_dir():
        if (folder / "model_index.json").is_file():
            fix = "write it anew with sub-folders: DDPMPipeline.from_pretrained(...).save_pretrained(...)"
            return [Finding("error", f"all parts of the pipeline lie in one folder, without {part}/", where, fix)]
        kind = quiet(folder / "config.json").get("_class_name")
        what = f"this is the {NETWORKS[kind].folder if kind in NETWORKS else part} folder itself"
        return [Finding("error", what, where, f"give its parent: {folder.resolve().parent}")]
    findings, inside = [], some(sorted(path.name for path in folder.iterdir()), 8) or "nothing"
    for each, name in ((part, "config.json"), ("scheduler", "scheduler_config.json")):
        if not (folder / each / name).is_file():
            missing = f"{each}/{name} is missing" if (folder / each).is_dir() else f"{each}/ is missing"
            findings.append(Finding("error", f"{missing}; the folder holds {inside}", where, _nearer(folder, pipeline)))
    network = known_family(quiet(folder / part / "config.json"))
    foreign = network is not None and not network.kind.__module__.startswith("diffusers.")  # to diffusers' pipelines
    if not findings and not foreign and not (folder / "model_index.json").is_file():
        what = "model_index.json is missing, so diffusers itself will not open this folder"
        findings.append(Finding("warning", what, where, "whence reads it; check that the copy is complete"))
    return findings


def _nearer(folder: Path, otherwise: str) -> str:
    near = sorted(path.parent.parent for part in PARTS for path in folder.glob(f"*/{part}/config.json"))
    return f"did you mean {near[0]}?" if near else otherwise


def _network(folder: Path, resolution: int | None) -> Findings:
    """The class, the size and the channels of the network, and of the VAE before it."""
    path = folder / part_of(folder) / "config.json"
    config, where = json_object(path), str(path)
    findings = _class("network", config, NETWORKS, where)
    if resolution is None and whole_number(config.get("sample_size")) is None:
        what = f"sample_size is {config.get('sample_size')!r}, not one whole number"
        fix = "write the side of the training images there, or give --resolution"
        findings.append(Finding("error", what, where, fix))
    if vae := autoencoder_of(folder):  # one that is not read is told by its name
        return findings + _vae(folder, vae, config, resolution)
    channels, absent = config.get("in_channels", 3), missing_autoencoder(folder) or "vae"
    if channels in (1, 3) and missing_autoencoder(folder):
        what = f"{absent}/ is missing, which model_index.json names: the network takes latents"
        findings.append(Finding("error", what, where, "add it as save_pretrained writes it"))
    elif channels not in (1, 3):
        fix = f"add the {absent}/ that it was trained with; without one, grey (1) and RGB (3) pixels are accepted"
        findings.append(Finding("error", f"in_channels is {channels!r}: the network takes latents", where, fix))
    elif config.get("out_channels", channels) not in (channels, 2 * channels):
        what = f"out_channels is {config['out_channels']!r} for in_channels {channels}"
        fix = f"accepted: {channels}, or {2 * channels} where the variance is learned too"
        findings.append(Finding("error", what, where, fix))
    return findings


def _vae(folder: Path, vae: Autoencoder, config: Mapping[str, object], resolution: int | None) -> Findings:
    """Whether the VAE's latents are what the network takes."""
    findings, where = [], str(folder / vae.part / "config.json")
    network, made, seen = known_family(config), vae.latents, config.get("in_channels")
    packed = 1 if network is None else network.packing
    if isinstance(seen, int) and seen // packed != made:
        what = f"the VAE makes {made} channels, the network takes {seen // packed}"
        findings.append(Finding("error", what, where, "networks for inpainting or editing are not supported"))
    if vae.config.get("latents_mean") is not None:
        findings.append(Finding("error", "latents_mean is set", where, "accepted: a VAE with shift and scaling_factor"))
    shrink = vae.shrink
    if resolution is not None and resolution % shrink:
        what = f"pictures of {resolution}x{resolution} do not fit this VAE"
        findings.append(Finding("error", what, where, f"give a --resolution that {shrink} divides"))
    return findings


def _scheduler(folder: Path) -> Findings:
    path = folder / "scheduler" / "scheduler_config.json"
    config = json_object(path)
    findings = _class("scheduler", config, SCHEDULERS, str(path))
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        accepted = f"accepted: {', '.join(PREDICTION_TYPES)}"
        findings.append(Finding("error", f"unknown prediction_type {kind!r}", str(path), accepted))
    if broken(findings) or config.get("_class_name") in FLOW:
        return findings
    if kind == "epsilon" and float(schedule_of(config).alphas_cumprod[-1]) == 0:
        what = "zero terminal SNR with prediction_type 'epsilon': at the last timestep nothing of a picture can be predicted"
        fix = "pictures cannot be drawn from there; check prediction_type, models like this predict v"
        findings.append(Finding("warning", what, str(path), fix))
    return findings


def _class(
    what: str, config: Mapping[str, object], accepted: Mapping[str, object] | Sequence[str], where: str
) -> Findings:
    name = config.get("_class_name")
    if name in accepted:
        return []
    return [Finding("error", f"{what} class {name!r} is not supported", where, f"accepted: {', '.join(accepted)}")]


def _opens(inputs: Inputs) -> Findings:
    _ = inputs.opened  # whatever is wrong is an error of ours, which becomes a finding
    return []


def _weights(folder: Path) -> Findings:
    """The weights of one network: there, whole, finite, and those that the network has."""
    if not folder.is_dir():
        return []
    where, files = str(folder), sorted(folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not files:
        what = f"only pickles, which whence never opens: {some(pickles)}" if pickles else "no weights"
        fix = "write *.safetensors: save_pretrained(..., safe_serialization=True)"
        return [Finding("error", what, where, fix)]
    findings = [Finding("note", f"pickles are never opened: {some(pickles)}", where, NOTHING)] if pickles else []
    index = folder / f"{WEIGHTS}.index.json"
    if not (folder / WEIGHTS).is_file() and not index.is_file():
        what = f"no {WEIGHTS}, only {some(path.name for path in files)}"
        return [*findings, Finding("error", what, where, "save it again without `variant`, or rename the file")]
    for path in files:
        findings += _values(path)
    if broken(findings):
        return findings
    size, (_, free) = sum(path.stat().st_size for path in weight_files(folder)), machine_memory()
    if free and 2 * size > free:  # as float32, or twice where they are converted
        what = f"{in_bytes(size)} of weights are too many to be loaded for a check in {in_bytes(free)} of memory"
        return [*findings, Finding("note", what, where, "their names and shapes are checked when the run loads them")]
    return findings + _loads(folder)


def _other_weights(folder: Path) -> Findings:
    """The weights of a VAE or a text encoder: there, whole and finite."""
    if not folder.is_dir():
        return []
    files = weight_files(folder)
    if not files:
        inside = some(sorted(path.name for path in folder.iterdir()), 5) or "nothing"
        fix = "write *.safetensors: save_pretrained(..., safe_serialization=True), without `variant`"
        return [Finding("error", f"no weights that are opened (it holds {inside})", str(folder), fix)]
    return [finding for path in files for finding in _values(path)]


def _values(path: Path) -> Findings:
    """One file of weights: readable to its end, and finite."""
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            return [
                Finding("error", "a Git LFS pointer, not the weights", str(path), "fetch the file with git lfs pull")
            ]
    try:
        with safe_open(path, framework="pt") as file:
            bad = [name for name in file.keys() if not torch.isfinite(file.get_tensor(name)).all()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        return [Finding("error", f"truncated or damaged ({error})", str(path), "copy or download the file again")]
    if not bad:
        return []
    what = f"{len(bad)} weights hold NaN or Inf: {some(bad)}"
    return [Finding("error", what, str(path), "training diverged; take an earlier checkpoint")]


def _loads(folder: Path) -> Findings:
    """Load the network and compare: diffusers leaves weights that the file lacks at random values and does not say so."""
    name, where = quiet(folder / "config.json").get("_class_name"), str(folder)
    if name not in NETWORKS:
        return []
    fix = "the weights and config.json are of different models; save both again"
    try:
        _, loaded = NETWORKS[name].kind.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        return [Finding("error", f"the weights cannot be loaded as {name} ({short(error)})", where, fix)]
    findings, missing, more = [], loaded["missing_keys"], loaded["unexpected_keys"]
    if missing:
        what = f"{len(missing)} weights of {name} are missing and would be random: {some(missing)}"
        findings.append(Finding("error", what, where, fix))
    if more:
        findings.append(Finding("warning", f"{len(more)} weights are no part of {name}: {some(more)}", where, fix))
    return findings


def _checkpoints(folder: Path) -> Findings:
    """The checkpoint-N folders: complete, and with the learning rate that sums over training need."""
    paths = sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())
    *names, last = [name for name, entry in METHODS.items() if "checkpoints" in entry.needs]
    users = f"{', '.join(names)} and {last}"
    if not paths:
        what = f"no checkpoint-N folders, so {users} cannot run"
        return [Finding("note", what, str(folder), "train with --checkpointing_steps if you want them")]
    findings, without, part = [], [], part_of(folder)
    for path in paths:
        if re.fullmatch(r"checkpoint-\d+", path.name) is None or not (path / part / "config.json").is_file():
            what = f"expected checkpoint-<step> with {part}/ in it, so {users} will refuse it"
            findings.append(Finding("warning", what, str(path), "complete, rename or remove it, if you want them"))
            continue
        findings += _weights(path / part)
        rate = json_object(path / "whence.json").get("rate") if (path / "whence.json").is_file() else None
        if rate is None:
            without.append(path.name)
        elif not isinstance(rate, (int, float)) or not rate >= 0:
            what = f"rate is {rate!r}, not a learning rate"
            findings.append(Finding("error", what, str(path / "whence.json"), "write the number"))
    if without:
        what = f"{len(without)} checkpoints do not say their learning rate, which {users} need: {some(without)}"
        fix = 'write it to whence.json in each, like {"rate": 1e-4}'
        findings.append(Finding("warning", what, str(folder), fix))
    return findings


def _averages(folder: Path) -> Findings:
    """Which weights are averages over training (EMA): it is easy to attribute others than those that were sampled from."""
    part = part_of(folder)
    findings, kept = [], sorted(str(path.relative_to(folder)) for path in folder.glob(f"**/{part}_ema"))
    if kept:
        what = f"averaged weights (EMA) in {some(kept)} are not read, only those in {part}/"
        fix = f"check that {part}/ holds what was sampled from (diffusers puts the average there at the end)"
        findings.append(Finding("note", what, str(folder), fix))
    for path in sorted(folder.glob("checkpoint-*/whence.json")):
        study = quiet(path).get("study")
        if isinstance(study, dict) and (decay := study.get("recipe", {}).get("ema")):
            what = f"{part}/ holds averaged weights (EMA {decay}), the checkpoint-N folders raw ones"
            return [*findings, Finding("note", what, str(folder), NOTHING)]
    return findings
