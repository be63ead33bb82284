"""`whence doctor`: what is wrong with model, data, disk or device, and what a run will cost, before it starts.

`examine` looks, `predict` measures, `lines` tells. Bad input never raises here: it becomes a finding. Nothing is changed
on disk, but for one temporary shard that tells how fast the disk is.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from whence import types
from whence.adapters import NETWORKS, SCHEDULERS, open_model
from whence.checks import LEVELS, inspect_folder
from whence.data import class_labels, file_digest, subset
from whence.engine import progress
from whence.features import SHARD_BYTES, Gradient, Part, identity, prepare
from whence.forward import PREDICTION_TYPES
from whence.imagefolder import Finding, Source, some
from whence.inner_product import InnerProduct
from whence.methods import METHODS, build
from whence.normalize import none
from whence.pictures import PIXELS_16, header_size
from whence.precondition.gram import Gram
from whence.precondition.solve import NoPreconditioner
from whence.projections import ENTRIES_AT_ONCE, TwoSided
from whence.sources import layout
from whence.store import Rows, read_json
from whence.tasks import folder_images, run_folder
from whence.types import Blocks, Checkpoint, Engine, Images, WhenceError, digest

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers opens
GREY = {"1", "L", "LA", "La", "I", "F"} | PIXELS_16
LITTLE = 2**30  # free bytes of disk or memory below which a run is likely to stop
DRAWN = 16  # pictures assumed where queries are still to be drawn
NOTHING = "nothing needs doing"

Findings = list[Finding]

# ------------------------------------------------------------------------------------------------------------- examine


def examine(
    model: Path | None, train: Path | None, queries: Path | None, output: Path, resolution: int | None = None
) -> Findings:
    """Everything worth knowing before `whence attribute`, errors first. An "error" makes the run fail; what is None is
    not looked at. resolution: as given to the run; the model's sample size by default."""
    config = {} if model is None else _quiet(Path(model) / "unet" / "config.json")
    side = resolution or _whole(config.get("sample_size"))
    findings: Findings = []
    if model is not None:
        findings += _model(Path(model), resolution)
    folders = {"training images": train, "query images": queries}
    for kind, folder in folders.items():
        if folder is not None:
            findings += _data(kind, Path(folder), config, resolution, side)
    if train is not None and queries is not None:
        findings += _guarded("query images", lambda: _shared_classes(Path(train), Path(queries)))
        findings += _guarded("copies", lambda: _copies(Path(train), Path(queries)))
    if model is not None and train is not None and not _broken(findings):
        # Only a whole model and a readable folder have the fingerprints that a run folder is compared by.
        findings += _guarded("output folder", lambda: _run_folder(Path(model), Path(train), side, Path(output)))
    findings += _guarded("output folder", lambda: _disk(Path(output)))
    findings += _guarded("memory", _memory)
    findings += _guarded("device", _device)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _guarded(name: str, check: Callable[[], Findings]) -> Findings:
    """The findings of a check; one that fails is a finding itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what `image_folder` warns of is among the findings already
            return check()
    except WhenceError as error:
        return [_told(error, name)]
    except Exception as error:
        what = f"the check itself failed: {_short(error)}"
        return [Finding("error", what, f"check of the {name}", "please report this as a bug in whence")]


def _told(error: WhenceError, name: str) -> Finding:
    what, _, fix = str(error).partition("; ")
    return Finding("error", what, name, fix or "mend this first")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _broken(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def _quiet(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none: `_object` is the one that complains."""
    try:
        return _object(path) if path.is_file() else {}
    except WhenceError:
        return {}


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise WhenceError(f"{path} holds a {type(value).__name__}, not a JSON object; save the model again")
    return value


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


# --------------------------------------------------------------------------------------------------------------- model


def _model(folder: Path, resolution: int | None) -> Findings:
    findings = _guarded("model folder", lambda: _folder(folder))
    if _broken(findings):
        return findings
    findings += _guarded("network", lambda: _network(folder, resolution))
    findings += _guarded("scheduler", lambda: _scheduler(folder))
    findings += _guarded("weights", lambda: _weights(folder / "unet"))
    findings += _guarded("checkpoints", lambda: _checkpoints(folder))
    findings += _guarded("averages", lambda: _averages(folder))
    # Whatever the checks above do not know of, the room that opens models does.
    return findings if _broken(findings) else findings + _guarded("model", lambda: _opens(folder))


def _folder(folder: Path) -> Findings:
    """Whether this is a pipeline folder at all, and what it is instead."""
    where, pipeline = str(folder), "give a pipeline folder as save_pretrained writes it"
    if not folder.exists():
        fix = f"{pipeline}; a model of the Hub has to be downloaded first (hf download NAME --local-dir FOLDER)"
        return [Finding("error", "no such model folder", where, fix)]
    if not folder.is_dir():
        fix = f"{pipeline}; a single file can be turned into one (from_single_file, then save_pretrained)"
        return [Finding("error", "is a file, not a model folder", where, fix)]
    if (folder / "config.json").is_file() and not (folder / "unet").is_dir():
        if (folder / "model_index.json").is_file():
            fix = "write it anew with sub-folders: DDPMPipeline.from_pretrained(...).save_pretrained(...)"
            return [Finding("error", "all parts of the pipeline lie in one folder, without unet/", where, fix)]
        what = "this is the unet folder itself"
        return [Finding("error", what, where, f"give its parent: {folder.resolve().parent}")]
    findings, inside = [], some(sorted(path.name for path in folder.iterdir()), 8) or "nothing"
    for part, name in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
        if not (folder / part / name).is_file():
            missing = f"{part}/{name} is missing" if (folder / part).is_dir() else f"{part}/ is missing"
            findings.append(Finding("error", f"{missing}; the folder holds {inside}", where, _nearer(folder, pipeline)))
    ours = (
        _quiet(folder / "unet" / "config.json").get("_class_name") == "MLPDenoiser"
    )  # unknown to diffusers' pipelines
    if not findings and not ours and not (folder / "model_index.json").is_file():
        what = "model_index.json is missing, so diffusers itself will not open this folder"
        findings.append(Finding("warning", what, where, "whence reads it; check that the copy is complete"))
    return findings


def _nearer(folder: Path, otherwise: str) -> str:
    near = sorted(path.parent.parent for path in folder.glob("*/unet/config.json"))
    return f"did you mean {near[0]}?" if near else otherwise


def _network(folder: Path, resolution: int | None) -> Findings:
    """The class, the size and the channels of the network."""
    config, where = _object(folder / "unet" / "config.json"), str(folder / "unet" / "config.json")
    findings = _class("network", config, NETWORKS, where)
    if resolution is None and _whole(config.get("sample_size")) is None:
        what = f"sample_size is {config.get('sample_size')!r}, not one whole number"
        fix = "write the side of the training images there, or give --resolution"
        findings.append(Finding("error", what, where, fix))
    channels = config.get("in_channels", 3)
    if channels not in (1, 3):
        fix = "models of grey (1) and RGB (3) pixels are accepted; models of latents are not read yet"
        findings.append(Finding("error", f"in_channels is {channels!r}", where, fix))
    elif config.get("out_channels", channels) not in (channels, 2 * channels):
        what = f"out_channels is {config['out_channels']!r} for in_channels {channels}"
        fix = f"accepted: {channels}, or {2 * channels} where the variance is learned too"
        findings.append(Finding("error", what, where, fix))
    return findings


def _scheduler(folder: Path) -> Findings:
    path = folder / "scheduler" / "scheduler_config.json"
    config = _object(path)
    findings = _class("scheduler", config, SCHEDULERS, str(path))
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        accepted = f"accepted: {', '.join(PREDICTION_TYPES)}"
        findings.append(Finding("error", f"unknown prediction_type {kind!r}", str(path), accepted))
    return findings


def _class(what: str, config: Mapping[str, Any], accepted: Mapping[str, Any] | Sequence[str], where: str) -> Findings:
    name = config.get("_class_name")
    if name in accepted:
        return []
    return [Finding("error", f"{what} class {name!r} is not supported", where, f"accepted: {', '.join(accepted)}")]


def _opens(folder: Path) -> Findings:
    try:
        open_model(folder)
    except (NotImplementedError, TypeError, ValueError) as error:
        if isinstance(error, WhenceError):
            raise
        return [Finding("error", f"diffusers cannot build it ({_short(error)})", str(folder), "mend its JSON files")]
    return []


def _weights(folder: Path) -> Findings:
    """The weights of one unet/ folder: there, whole, finite, and those that the network has."""
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
    return findings if _broken(findings) else findings + _loads(folder)


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
    """Load the network and compare: diffusers leaves weights that the file lacks at random values, silently."""
    name, where = _quiet(folder / "config.json").get("_class_name"), str(folder)
    if name not in NETWORKS:
        return []
    fix = "the weights and config.json are of different models; save both again"
    try:
        _, told = NETWORKS[name].kind.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        return [Finding("error", f"the weights cannot be loaded as {name} ({_short(error)})", where, fix)]
    findings, missing, more = [], told["missing_keys"], told["unexpected_keys"]
    if missing:
        what = f"{len(missing)} weights of {name} are missing and would be random: {some(missing)}"
        findings.append(Finding("error", what, where, fix))
    if more:
        findings.append(Finding("warning", f"{len(more)} weights are no part of {name}: {some(more)}", where, fix))
    return findings


def _checkpoints(folder: Path) -> Findings:
    """The checkpoint-N folders: complete, and with the learning rate that sums over training need."""
    paths = sorted(path for path in folder.glob("checkpoint-*") if path.is_dir())
    *most, last = [name for name, entry in METHODS.items() if "checkpoints" in entry.needs]
    users = f"{', '.join(most)} and {last}"
    if not paths:
        what = f"no checkpoint-N folders, so {users} cannot run"
        return [Finding("note", what, str(folder), "train with --checkpointing_steps if you want them")]
    findings, without = [], []
    for path in paths:
        if re.fullmatch(r"checkpoint-\d+", path.name) is None or not (path / "unet" / "config.json").is_file():
            what, fix = "expected checkpoint-<step> with unet/ in it", "complete, rename or remove it"
            findings.append(Finding("error", what, str(path), fix))
            continue
        findings += _weights(path / "unet")
        rate = _object(path / "whence.json").get("rate") if (path / "whence.json").is_file() else None
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
    """Which weights are averages over training (EMA): it is easy to attribute others than one sampled from."""
    findings, kept = [], sorted(str(path.relative_to(folder)) for path in folder.glob("**/unet_ema"))
    if kept:
        what = f"averaged weights (EMA) in {some(kept)} are not read, only those in unet/"
        fix = "check that unet/ holds what was sampled from (diffusers puts the average there at the end)"
        findings.append(Finding("note", what, str(folder), fix))
    for path in sorted(folder.glob("checkpoint-*/whence.json")):
        training = _quiet(path).get("training")
        if isinstance(training, dict) and training.get("ema") is not None:
            what = f"unet/ holds averaged weights (EMA {training['ema']}), the checkpoint-N folders raw ones"
            return [*findings, Finding("note", what, str(folder), NOTHING)]
    return findings


# ---------------------------------------------------------------------------------------------------------------- data


def _data(kind: str, folder: Path, config: Mapping[str, Any], resolution: int | None, side: int | None) -> Findings:
    """A folder of images, by itself and beside the model."""
    findings = _guarded(kind, lambda: inspect_folder(folder, side))
    findings += _guarded(kind, lambda: _fit(folder, config, resolution))
    findings += _guarded(kind, lambda: _labels(folder, config))
    return [f if f.where.startswith((kind, "check")) else replace(f, where=f"{kind} {f.where}") for f in findings]


def _names(folder: Path) -> tuple[Source, list[str]]:
    found = layout(folder)
    present = set(found.pictures)
    return found.source, [name for name in found.names if name in present]


def _fit(folder: Path, config: Mapping[str, Any], resolution: int | None) -> Findings:
    """Sizes and colours against those of the model."""
    own, channels, where = _whole(config.get("sample_size")), config.get("in_channels"), str(folder)
    source, names = _names(folder)
    looks = [look for look in (_peek(source, name) for name in names) if look]
    if own is None or not looks:
        return []
    findings, sizes = [], Counter(size for size, _ in looks)
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
    grey = sum(mode in GREY for _, mode in looks)
    if channels == 3 and grey:
        what = f"{grey} of {len(looks)} images are grey, but the model has 3 channels: they are read as grey RGB"
        findings.append(Finding("warning", what, where, "check that the model was trained on them so"))
    if channels == 1 and grey < len(looks):
        what = f"{len(looks) - grey} of {len(looks)} images are in colour, but the model has 1 channel: read as grey"
        findings.append(Finding("warning", what, where, "check that the model was trained on them so"))
    return findings


def _peek(source: Source, name: str) -> tuple[tuple[int, int], str] | None:
    """Size and mode from the header; None where it cannot be read, which `inspect_folder` tells."""
    try:
        file = source.file(name)
        with Image.open(file) as picture:
            return header_size(file, name), picture.mode
    except (WhenceError, OSError):
        return None


def _conditional(config: Mapping[str, Any]) -> bool:
    return config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None


def _labels(folder: Path, config: Mapping[str, Any]) -> Findings:
    """A class-conditional model cannot be measured without the class of each image."""
    found, where = layout(folder), str(folder)
    if not found.names or not _conditional(config):
        return []
    labels, _ = class_labels(found.meta.get("label"), found.classes, folder)
    if labels is None:
        fix = "give class folders or a `label` column in metadata.jsonl"
        return [Finding("error", "the model is class-conditional, but the images have no labels", where, fix)]
    classes = _whole(config.get("num_class_embeds"))
    if classes is not None and int(labels.max()) >= classes:
        what = f"labels go up to {int(labels.max())}, but the model has {classes} classes (0 to {classes - 1})"
        return [Finding("error", what, where, "give the images and labels that the model was trained on")]
    return []


def _shared_classes(train: Path, queries: Path) -> Findings:
    """The classes of the queries are among those of the training images."""
    own, asked = layout(train), layout(queries)
    _, classes = class_labels(own.meta.get("label"), own.classes, train)
    class_labels(asked.meta.get("label"), classes, queries)
    return []


def _copies(train: Path, queries: Path) -> Findings:
    """Queries that are files of the training set."""
    (seen, names), (asked, wanted) = _names(train), _names(queries)
    sizes = {_length(asked, name) for name in wanted}
    # Only files of equal length can be equal, so that a large folder need not be read once more.
    same = {file_digest(seen.file(name)): name for name in names if _length(seen, name) in sizes}
    copies = {name: same[key] for name in wanted if (key := file_digest(asked.file(name))) in same}
    if not copies:
        return []
    pairs = some(f"{query} = {image}" for query, image in copies.items())
    what = f"{len(copies)} of {len(wanted)} images are byte-identical to training images: {pairs}"
    fix = "similarity will just find themselves; give pictures that the model made"
    return [Finding("warning", what, f"query images {queries}", fix)]


def _length(source: Source, name: str) -> int:
    file = source.file(name)
    return file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())


# ------------------------------------------------------------------------------------------------------------- machine


def _standing(path: Path) -> Path:
    """The nearest folder that is there: where the output will be made."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _disk(output: Path) -> Findings:
    at = _standing(output)
    if not at.is_dir():
        return [Finding("error", f"{at} is a file", str(output), "give another output folder")]
    if not os.access(at, os.W_OK | os.X_OK):
        return [Finding("error", f"{at} cannot be written to", str(output), "make it writable, or give another folder")]
    free = shutil.disk_usage(at).free
    if free < LITTLE:
        fix = "free some space, or give a folder on another disk"
        return [Finding("warning", f"only {_bytes(free)} are free on this disk", str(output), fix)]
    return [Finding("note", f"{_bytes(free)} are free on this disk", str(output), NOTHING)]


def _run_folder(model: Path, train: Path, side: int | None, output: Path) -> Findings:
    """Whether an earlier run in the output folder was of the same model and images."""
    if not (output / "index.json").exists():
        return []
    opened = open_model(model)
    run_folder(output, opened.final, folder_images(train, side, opened.channels))
    return [Finding("note", "a run of this model and these images; it is gone on with", str(output), NOTHING)]


def _memory() -> Findings:
    total, free = _machine_memory()
    if not total:
        return [Finding("note", "the size of this machine's memory is unknown", "memory", NOTHING)]
    what = f"{_bytes(free)} of {_bytes(total)} are available"
    if free < LITTLE:
        return [Finding("warning", what, "memory", "close other programs")]
    return [Finding("note", what, "memory", NOTHING)]


def _machine_memory() -> tuple[int, int]:
    """Bytes in all and available, inside a container those of the container; 0 where the system does not say."""
    total, free = _proc("/proc/meminfo", "MemTotal"), _proc("/proc/meminfo", "MemAvailable")
    groups = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in groups:
        try:
            most, taken = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
        if most < total:
            total, free = most, max(0, min(free, most - taken))
    return total, free


def _proc(path: str, field: str) -> int:
    """A size in a table of the Linux kernel, in bytes; 0 elsewhere."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def _device() -> Findings:
    findings, where = [], "device"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        what = f"{torch.cuda.get_device_name(number)}, {_bytes(free)} of {_bytes(total)} free"
        findings.append(Finding("note", what, f"device cuda:{number}", f"give --device cuda:{number} to use it"))
    if not findings and (Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")):
        what = f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it"
        findings.append(Finding("warning", what, where, "install a CUDA build of torch that fits its driver"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, told = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    what = f"{'' if findings else 'no CUDA GPU; '}CPU with {cores} cores, {threads} of them used"
    what += f" (OMP_NUM_THREADS={told})" if told else ""
    if threads > cores:
        findings.append(Finding("warning", what, where, f"set OMP_NUM_THREADS={cores}: more threads are slower"))
    else:
        fix = f"set OMP_NUM_THREADS={cores} to use all" if threads < cores else NOTHING
        findings.append(Finding("note", what, where, fix))
    return findings


# ------------------------------------------------------------------------------------------------------------- predict


@dataclass(frozen=True)
class Step:
    """A stage of a run. kind: "features", "system" or "scores"; memory: bytes at most while it runs, the program
    included; device_memory: those of the GPU."""

    what: str
    kind: str
    disk: int = 0
    memory: int = 0
    seconds: float = 0.0
    device_memory: int = 0


@dataclass(frozen=True)
class Cost:
    """What a run will take; findings: what will not fit, what cannot run, what is not predicted."""

    steps: tuple[Step, ...]
    device: str = "cpu"
    findings: tuple[Finding, ...] = ()

    def disk(self, kind: str) -> int:
        return sum(step.disk for step in self.steps if step.kind == kind)

    @property
    def features(self) -> int:
        """Bytes of feature shards."""
        return self.disk("features")

    @property
    def scores(self) -> int:
        """Bytes of scores."""
        return self.disk("scores")

    @property
    def memory(self) -> int:
        return max((step.memory for step in self.steps), default=0)

    @property
    def device_memory(self) -> int:
        return max((step.device_memory for step in self.steps), default=0)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)


def plan(
    model: Path,
    train: Path,
    queries: Path | None,
    output: Path,
    resolution: int | None = None,
    engine: Engine = Engine(),
    ensemble: Sequence[Path] = (),
) -> types.Task:
    """The task that `whence attribute` would make, without tying the output folder to it.

    Queries that are still to be drawn (None) are stood for by the first 16 training images.
    """
    opened = open_model(model)
    side = resolution or opened.resolution
    images = folder_images(train, side, opened.channels)
    classes = getattr(images, "classes", None)
    if queries is None:
        asked: Images = subset(images, range(min(DRAWN, len(images))))
    else:
        asked = folder_images(queries, side, opened.channels, None, classes)
    checkpoints = (*(open_model(folder).final for folder in ensemble), *opened.along, opened.final)
    return types.Task(opened.forward, checkpoints, images, asked, Path(output), engine)


def predict(task: types.Task, methods: Mapping[str, Mapping[str, Any]]) -> Cost:
    """Disk, memory and time of `whence attribute` with these methods (name -> settings), before it runs.

        disk     features n k bytes(dtype), once for each (part, checkpoint, images) that differ; scores 8 m n
        memory   the largest stage: weights, activations and one slab of the projection as measured; one shard of
                 gradients and of rows; four matrices of min(n, k)^2 in float64 (Gram, eigenvectors, LAPACK); scores
        seconds  images (t_image + t_row) + shards (t_slab d/d_slab + t_write), and for the system
                 flops / rate + t_eigh(e0) (e/e0)^3 + shards read

    Measured here: one gradient of each part on three training images after a warm-up, a slab of its projection, one
    shard written and read, a float64 product, an eigendecomposition of size e0 <= 384. Assumed: all images and
    checkpoints cost the same, nothing is stored yet, nobody else begins to use the machine. Left out: starting Python,
    hashing the images, drawing queries, the report, file headers (about 200 bytes a shard). A measurement takes as long
    as about five images of the run.
    """
    if torch.device(task.engine.device).type == "cuda" and not torch.cuda.is_available():
        what, fix = f"device {task.engine.device!r} is not there", "accepted here: cpu"
        return Cost((), task.engine.device, (Finding("error", what, "device", fix),))
    rates: dict[str, Rate] = {}
    counted: set[str] = set()
    steps: list[Step] = []
    findings: Findings = []
    for name in progress(list(methods), "measuring"):
        try:
            method = build(name, task.forward, methods[name])
            if not isinstance(method, InnerProduct):
                findings.append(Finding("note", "its cost is not predicted", name, NOTHING))
                continue
            more, told = _steps(name, method, task, rates, counted)
            steps, findings = steps + more, findings + told
        except WhenceError as error:
            findings.append(_told(error, name))
        except Exception as error:  # what a network cannot do, it cannot do in the run either
            what, fix = f"fails on the first images ({_short(error)})", "check that model and images belong together"
            findings.append(Finding("error", what, name, fix))
    cost = Cost(tuple(steps), task.engine.device, tuple(findings))
    return replace(cost, findings=(*findings, *_shortages(cost, task)))


def _shortages(cost: Cost, task: types.Task) -> Findings:
    """What the machine does not have."""
    findings, where = [], "this run"
    free = shutil.disk_usage(_standing(task.root)).free
    if cost.features + cost.scores > free:
        what = f"needs {_bytes(cost.features + cost.scores)} on disk, {_bytes(free)} are free"
        findings.append(Finding("error", what, where, "give an output folder on another disk, or a smaller dim"))
    total, free = _machine_memory()
    if total and cost.memory > free:
        what = f"needs {_bytes(cost.memory)} of memory, {_bytes(free)} are available"
        fix = "give a smaller dim, fewer images or fewer queries"
        findings.append(Finding("error" if cost.memory > total else "warning", what, where, fix))
    if cost.device_memory:
        free = torch.cuda.mem_get_info(task.engine.device)[0]
        if cost.device_memory > free:
            what = f"needs {_bytes(cost.device_memory)} of GPU memory, {_bytes(free)} are free"
            findings.append(
                Finding("error", what, where, "give fewer parameters, a smaller --budget_mb, or another device")
            )
    return findings


@dataclass(frozen=True)
class Rate:
    """What a part costs on this machine. Seconds: load (the weights, once), image (read and measured), row (projected),
    matrix (its share per shard, however many rows), write and read (a shard). Bytes: memory and device_memory (peaks
    while measuring), buffers (gradients of a shard, which come on top), resident (the program alone)."""

    width: int
    per_shard: int
    load: float
    image: float
    row: float
    matrix: float
    write: float
    read: float
    memory: int
    device_memory: int
    buffers: int
    resident: int


def _steps(
    name: str, method: InnerProduct, task: types.Task, rates: dict[str, Rate], counted: set[str]
) -> tuple[list[Step], Findings]:
    """The stages of a method that no method before it has done. rates, counted: what is known already, added to."""
    method.sign()  # refuses outputs that do not fit together
    steps: list[Step] = []
    findings: Findings = []
    checkpoints = [checkpoint for checkpoint, _ in method.aggregate(task)]
    for what, part, images in _arrays(method, task):
        if digest(part) not in rates:
            rates[digest(part)] = _measure(part, task, checkpoints[-1])
        # The key of `features.rows`, less what is the same throughout a task.
        keys = {digest([part, checkpoint.digest, identity(images)]) for checkpoint in checkpoints} - counted
        counted |= keys
        if keys:
            steps.append(_array(f"{name}: {what}", rates[digest(part)], len(images), len(keys), task.engine))
    rate = rates[digest(method.train)]
    findings += _wasteful(name, rate, len(task.train))
    steps.append(_system(name, method, rate, task, len(checkpoints)))
    if not isinstance(method.precondition, (Gram, NoPreconditioner)):
        what = f"time and memory of its curvature ({type(method.precondition).__name__}) are not predicted"
        findings.append(Finding("note", what, name, NOTHING))
    cells = 8 * len(task.queries) * len(task.train)
    # Ranking them for the table and the report takes indices and a sorted copy.
    steps.append(Step(f"{name}: scores", "scores", cells, rate.resident + 4 * cells))
    return steps, findings


def _array(what: str, rate: Rate, count: int, arrays: int, engine: Engine) -> Step:
    """Feature rows of some images, at so many checkpoints."""
    item = torch.finfo(engine.dtype).bits // 8
    rows = min(rate.per_shard, count)
    shards = math.ceil(count / rows)
    seconds = rate.load + count * (rate.image + rate.row) + shards * (rate.matrix + rate.write)
    kept = 3 * rows * rate.width * item  # projected, in one piece, and as the bytes of a file
    memory, device_memory = rate.memory + kept, 0
    if rate.device_memory:
        device_memory = rate.device_memory + rate.buffers + kept
    else:
        memory += rate.buffers
    what = f"{what} ({count:,} x {rate.width:,}{f', {arrays} checkpoints' if arrays > 1 else ''})"
    return Step(what, "features", arrays * count * rate.width * item, memory, arrays * seconds, device_memory)


def _system(name: str, method: InnerProduct, rate: Rate, task: types.Task, checkpoints: int) -> Step:
    """Gram matrix, eigenvectors and products: float64 on the CPU (see `precondition.gram`)."""
    n, m, k = len(task.train), len(task.queries), rate.width
    shards, uses = math.ceil(n / rate.per_shard), 1 + (method.normalize is not none)
    if isinstance(method.precondition, NoPreconditioner):
        side, reads, flops = 0, shards * uses, 2 * m * n * k
    elif isinstance(method.precondition, Gram) and n < k:
        side, reads = n, shards * (shards + 3) // 2
        flops = n * n * k + 2 * m * n * k + 4 * m * n * n
    else:
        side, reads = k, shards * (1 + uses)
        flops = 2 * n * k * k * (1 + uses) + 2 * m * k * k + 2 * m * n * k
    products = flops / _rate_of_products(min(rate.per_shard, n, 512), min(k, 2048))
    memory = rate.resident + 8 * (4 * side**2 + 2 * m * k + 4 * m * n + 3 * rate.per_shard * k)
    what = f"{name}: {f'system of {side:,} x {side:,}' if side else 'inner products'}"
    seconds = checkpoints * (products + _eigenvectors(side) + reads * rate.read)
    return Step(what, "system", 0, memory, seconds)


def _arrays(method: InnerProduct, task: types.Task) -> Iterator[tuple[str, Part, Images]]:
    yield "training images", method.train, task.train
    yield "queries", method.query or method.train, task.queries
    if method.weight is not None:
        yield "weights", method.weight, task.train


def _wasteful(name: str, rate: Rate, count: int) -> Findings:
    """Where most of the time goes into making the same projection matrix again."""
    shards = math.ceil(count / rate.per_shard)
    if shards < 2 or rate.matrix < rate.per_shard * (rate.image + rate.row):
        return []
    held = f"{rate.per_shard} image{'' if rate.per_shard == 1 else 's'}"
    what = f"the memory budget holds gradients of {held} at a time, and the projection is made anew {shards} times"
    fix = "that takes more than half of the time: give a larger --budget_mb (or Engine budget), or fewer parameters"
    return [Finding("warning", what, name, fix)]


# ------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class _First:
    """A projection that costs nothing: what is left is the gradients' own time."""

    def width(self, sizes: Mapping[str, int]) -> int:
        return 1

    def __call__(self, blocks: Blocks) -> Tensor:
        return next(iter(blocks.values()))[:, :1].clone()


def _measure(part: Part, task: types.Task, checkpoint: Checkpoint) -> Rate:
    engine, images = task.engine, task.train
    resident = _proc("/proc/self/status", "VmRSS")
    _forget_peak(engine)
    started = time.perf_counter()
    module = prepare(checkpoint, engine)
    load = time.perf_counter() - started
    width = part.width(module, task.forward, images.batch([0]).to(engine.device, engine.dtype))
    row_bytes, image_bytes = width * torch.finfo(engine.dtype).bits // 8, part.bytes_per_image(module, engine.dtype)
    # As in `features.rows`, which a test compares it with.
    per_shard = max(1, min(SHARD_BYTES // row_bytes, engine.budget // image_bytes, len(images)))
    bare: Part = replace(part, projection=_First()) if isinstance(part, Gradient) else part

    def compute(rows: Sequence[int]) -> None:
        batches = iter([images.batch(rows).to(engine.device, engine.dtype)])
        bare.compute(module, task.forward, batches, len(rows), engine)

    compute([0])
    rows = list(range(len(images)))[1:4] or [0]
    image = _seconds(lambda: compute(rows), engine, 0.2) / len(rows)
    matrix, row = _projecting(part, module, per_shard, engine) if isinstance(part, Gradient) else (0.0, 0.0)
    memory, device_memory = _peak(engine)
    write, read = _writing(_standing(task.root), per_shard, width, engine.dtype)
    # vmap holds about three copies of the rows it makes at once, which the budget bounds.
    at_once = min(max(engine.budget, 3 * image_bytes), 3 * engine.batch_size * image_bytes)
    buffers = per_shard * image_bytes + at_once
    return Rate(width, per_shard, load, image, row, matrix, write, read, memory, device_memory, buffers, resident)


def _projecting(part: Gradient, module: nn.Module, per_shard: int, engine: Engine) -> tuple[float, float]:
    """Seconds per shard for the matrix, and per row for the product; of a slab, scaled to all parameters."""
    sizes, project = part.sizes(module), part.projecting(module)
    k, total = project.width(sizes), sum(sizes.values())
    if total * k > 4 * ENTRIES_AT_ONCE and not isinstance(part.projection, TwoSided):
        name = max(sizes, key=lambda block: sizes[block])
        sizes = {name: min(sizes[name], max(4096, ENTRIES_AT_ONCE // k))}
    scale = total / sum(sizes.values()) * len(part.outputs)

    def seconds(rows: int) -> float:
        blocks = {
            name: torch.ones(rows, size, dtype=engine.dtype, device=engine.device) for name, size in sizes.items()
        }
        return scale * _seconds(lambda: project(blocks), engine)

    one, all_rows = seconds(1), seconds(per_shard)
    return one, max(0.0, all_rows - one) / per_shard


def _writing(folder: Path, per_shard: int, width: int, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds to write a shard, and to read one as float64."""
    with tempfile.TemporaryDirectory(prefix=".whence-doctor-", dir=folder) as place:
        shard = slice(0, per_shard)
        rows, values = (
            Rows(Path(place), (per_shard, width), dtype, per_shard),
            torch.ones(per_shard, width, dtype=dtype),
        )
        write = _seconds(lambda: rows.write(shard, values))
        return write, _seconds(lambda: rows.read(shard).double())


def _rate_of_products(rows: int, width: int) -> float:
    """Floating-point operations per second of a float64 product of two shards."""
    a = torch.ones(rows, width, dtype=torch.float64)
    return 2 * rows * rows * width / _seconds(lambda: a @ a.T, least=0.05)


def _eigenvectors(side: int) -> float:
    """Seconds for all eigenvectors of a symmetric matrix."""
    if not side:
        return 0.0
    few = min(side, 384)
    a = torch.randn(few, few, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return _seconds(lambda: torch.linalg.eigh(a + a.T)) * (side / few) ** 3


def _seconds(action: Callable[[], object], engine: Engine = Engine(), least: float = 0.0) -> float:
    """Mean time of an action, repeated until `least` seconds have passed."""
    cuda, times = torch.device(engine.device).type == "cuda", 0
    started = time.perf_counter()
    while True:
        action()
        if cuda:
            torch.cuda.synchronize(engine.device)
        times, passed = times + 1, time.perf_counter() - started
        if passed >= least:
            return passed / times


def _forget_peak(engine: Engine) -> None:
    if torch.device(engine.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(engine.device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak counts from now on


def _peak(engine: Engine) -> tuple[int, int]:
    """Most bytes held since `_forget_peak`, by the program and on the GPU."""
    cuda = torch.device(engine.device).type == "cuda"
    return _proc("/proc/self/status", "VmHWM"), torch.cuda.max_memory_allocated(engine.device) if cuda else 0


# ---------------------------------------------------------------------------------------------------------------- tell


def lines(findings: Sequence[Finding], cost: Cost | None) -> list[str]:
    """Plain lines for people: one for each finding, then the stages that matter, then what the whole run will cost."""
    every = [*findings, *(cost.findings if cost else ())]
    told = [f"{finding.level + ':':9}{' '.join(str(finding).split())}" for finding in every]
    counts = [
        f"{len(found)} {level}{'' if len(found) == 1 else 's'}" for level in LEVELS[:2] if (found := _of(every, level))
    ]
    told.append(" and ".join(counts) if counts else "nothing is wrong")
    if cost is not None and cost.steps:
        told += [_line(step) for step in cost.steps if step.seconds >= cost.seconds / 20 or step.memory == cost.memory]
        device = f"; GPU memory: {_bytes(cost.device_memory)}" if cost.device_memory else ""
        told.append(
            f"features: {_bytes(cost.features)} on disk, scores: {_bytes(cost.scores)}; "
            f"memory: {_bytes(cost.memory)} at most{device}; time: {_duration(cost.seconds)} on this device ({cost.device})"
        )
    return told


def _of(findings: Sequence[Finding], level: str) -> list[Finding]:
    return [finding for finding in findings if finding.level == level]


def _line(step: Step) -> str:
    disk = f"{_bytes(step.disk)} on disk, " if step.disk else ""
    return f"  {step.what}: {disk}{_bytes(step.memory)} of memory, {_duration(step.seconds)}"


def _bytes(count: float) -> str:
    """Decimal units, as disks are sold and `df -H` tells."""
    power = 0 if count < 1000 else min(4, int(math.log10(count) / 3))
    value, unit = count / 1000**power, ("bytes", "KB", "MB", "GB", "TB")[power]
    return f"{value:.0f} {unit}" if power == 0 or value >= 100 else f"{value:.1f} {unit}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            value = seconds / size
            return f"about {value:.0f} {unit}" if value >= 10 else f"about {value:.1f} {unit}"
    return f"about {seconds:.0f} seconds" if seconds >= 1.5 else "a second or less"
