"""The only room that knows diffusers: its folders become forwards, checkpoints and samplers, and our runs become folders.

A model folder is read as `save_pretrained` left it (model_index.json, unet/, scheduler/), with the `checkpoint-N` folders
that training scripts put beside them. safetensors only: weights in .bin files are pickles and are never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from whence.data import TensorImages, tensor_images
from whence.engine import progress
from whence.forward import Denoiser
from whence.networks import MLPDenoiser
from whence.noise import normals, seed_for, stream
from whence.store import Rows, Store, differences, read_json, write_json
from whence.training import State, Training
from whence.types import Checkpoint, Engine, Weights, WhenceError, describe

diffusers_logging.set_verbosity_error()

NETWORKS = {"UNet2DModel": UNet2DModel, "MLPDenoiser": MLPDenoiser}
SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")


def call_unet(call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DModel(sample, timestep).sample"""
    return call(x_t, t, return_dict=False)[0]


def call_unet_with_labels(call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """UNet2DModel(sample, timestep, class_labels).sample"""
    if "class_labels" not in cond:
        raise WhenceError("this model is class-conditional: the images need class folders or a `label` column")
    return call(x_t, t, class_labels=cond["class_labels"], return_dict=False)[0]


@dataclass(frozen=True)
class Model:
    """A pipeline folder, opened: what its network is, how it is measured, and its training checkpoints by step."""

    folder: Path
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    forward: Denoiser
    final: Checkpoint
    along: tuple[Checkpoint, ...]

    @property
    def resolution(self) -> int:
        side = self.config.get("sample_size")
        if type(side) is not int:
            raise WhenceError(f"{self.folder / 'unet'}: sample_size is {side!r}, not one number; give --resolution")
        return side

    @property
    def channels(self) -> int:
        return int(self.config["in_channels"])


def open_model(folder: str | Path) -> Model:
    """Read a diffusers pipeline folder. Nothing is loaded yet but its JSON files and the digest of its weights."""
    folder = Path(folder)
    if not folder.is_dir():
        raise WhenceError(f"model folder {folder} does not exist; expected a folder written by save_pretrained")
    config = _config(folder, "unet", "config.json")
    scheduler = _config(folder, "scheduler", "scheduler_config.json")
    _known("network", config.get("_class_name"), NETWORKS, folder / "unet")
    _known("scheduler", scheduler.get("_class_name"), SCHEDULERS, folder / "scheduler")
    along = sorted((_along(path) for path in folder.glob("checkpoint-*") if path.is_dir()), key=lambda c: c.step or 0)
    return Model(folder, config, scheduler, _forward(config, scheduler), _final(folder / "unet"), tuple(along))


def _config(folder: Path, part: str, name: str) -> dict[str, Any]:
    path = folder / part / name
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise WhenceError(
            f"{folder} has no {part}/{name} (it holds {inside}); expected a diffusers pipeline with unet/ and scheduler/"
        )
    return read_json(path)


def _known(what: str, name: Any, accepted: Mapping[str, Any] | Sequence[str], where: Path) -> None:
    if name not in accepted:
        raise WhenceError(f"{where}: {what} class {name!r} is not supported; accepted: {', '.join(accepted)}")


def _forward(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Denoiser:
    # diffusers builds the schedule (linear, scaled_linear, cosine, trained betas, zero-SNR rescaling ...); we only read it.
    schedule = DDPMScheduler.from_config({k: v for k, v in scheduler.items() if k != "_class_name"})
    labelled = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    predict = call_unet_with_labels if labelled else call_unet
    return Denoiser(schedule.alphas_cumprod.double(), str(schedule.config.prediction_type), predict)


def _final(folder: Path) -> Checkpoint:
    return Checkpoint(partial(load_network, folder), _digest(folder), folder.parent.name)


def _along(folder: Path) -> Checkpoint:
    """A checkpoint-N folder: raw weights in unet/, step from its name, rate from whence.json where our trainer wrote it."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    if match is None or not (folder / "unet").is_dir():
        raise WhenceError(f"{folder}: expected a folder named checkpoint-<step> that contains unet/")
    notes = read_json(folder / "whence.json") if (folder / "whence.json").is_file() else {}
    load = partial(load_network, folder / "unet")
    return Checkpoint(load, _digest(folder / "unet"), folder.name, int(match[1]), notes.get("rate"))


def _digest(folder: Path) -> str:
    """Fingerprint of weights and configuration, by their bytes."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only {pickled[0]}, a pickle, which whence never opens" if pickled else "no weights"
        raise WhenceError(
            f"{folder} holds {why}; expected *.safetensors (save_pretrained(..., safe_serialization=True))"
        )
    total = hashlib.sha256()
    for path in [folder / "config.json", *files]:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def load_network(folder: Path) -> nn.Module:
    """The network of one unet/ folder; weights that are missing from the file are an error, not random numbers."""
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    options = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        network, loaded = NETWORKS[name].from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise WhenceError(
            f"{folder}: the weights cannot be loaded as {name}: {' '.join(str(error).split())}"
        ) from error
    for what, names in (("lacks", loaded["missing_keys"]), ("holds the unknown", loaded["unexpected_keys"])):
        if names:
            raise WhenceError(f"{folder}: the weights file {what} {sorted(names)[0]} ({len(names)} such weights)")
    return network


def new_network(config: Mapping[str, Any], seed: int) -> nn.Module:
    """A network with initial weights drawn from the seed; config as in a unet/config.json, UNet2DModel by default."""
    name = config.get("_class_name", "UNet2DModel")
    _known("network", name, NETWORKS, Path("model config"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "weights"))
        try:
            return NETWORKS[name](**{k: v for k, v in config.items() if not k.startswith("_")})
        except (TypeError, ValueError) as error:
            raise WhenceError(f"model config: {str(error).splitlines()[0]}") from error


def new_scheduler(steps: int, beta_schedule: str, prediction_type: str) -> DDPMScheduler:
    """The noise schedule of a new model."""
    try:
        return DDPMScheduler(num_train_timesteps=steps, beta_schedule=beta_schedule, prediction_type=prediction_type)
    except (NotImplementedError, ValueError) as error:
        raise WhenceError(
            f"scheduler: {error}; accepted beta schedules: linear, scaled_linear, squaredcos_cap_v2"
        ) from None


def forward_of(network: Any, scheduler: Any) -> Denoiser:
    """How a network is measured under a schedule."""
    return _forward(network.config, scheduler.config)


def save_pipeline(folder: Path, network: Any, weights: Weights, scheduler: DDPMScheduler) -> None:
    """Write a folder that DDPMPipeline.from_pretrained (for UNet2DModel) and `open_model` read."""
    with_weights(network, weights)
    if isinstance(network, UNet2DModel):
        DDPMPipeline(network, scheduler).save_pretrained(folder)
    else:
        network.save_pretrained(folder / "unet")
        scheduler.save_pretrained(folder / "scheduler")


def save_checkpoint(folder: Path, network: Any, state: State, training: Training, data: Mapping[str, Any]) -> None:
    """checkpoint-N: raw weights in unet/, the whole optimiser state and our notes. Appears whole, by one rename."""
    target = folder / f"checkpoint-{state.step}"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with_weights(network, state.weights).save_pretrained(temporary / "unet")
    parts = {"weights": state.weights, "m": state.m, "v": state.v, "ema": state.ema}
    flat = {f"{part}/{name}": w.contiguous().clone() for part, values in parts.items() for name, w in values.items()}
    save_file(flat, temporary / "state.safetensors")
    # The rate in force at this checkpoint is that of the step that led here.
    notes = {"step": state.step, "rate": training.rate_at(state.step - 1), "training": describe(training), "data": data}
    write_json(temporary / "whence.json", notes)
    move_in(temporary, target)


def move_in(source: Path, target: Path) -> None:
    """Rename, or leave what is there: another process that does the same work was faster, and its bytes are the same."""
    try:
        if not target.exists():
            source.rename(target)
    except OSError:
        if not target.exists():
            raise
    if source.is_dir():
        shutil.rmtree(source)


def load_state(folder: Path, training: Training, data: Mapping[str, Any]) -> State:
    """Go on from a checkpoint-N folder, or refuse one that another recipe or another data set made."""
    notes = read_json(folder / "whence.json")
    expected = {"training": describe(training), "data": describe(data)}
    different = differences(expected, {k: notes.get(k) for k in expected})
    if different:
        raise WhenceError(
            f"{folder} is from another run ({different[0]}); use the same options or another --output_dir"
        )
    flat = load_file(folder / "state.safetensors")
    parts: dict[str, Weights] = {"weights": {}, "m": {}, "v": {}, "ema": {}}
    for key, value in flat.items():
        part, name = key.split("/", 1)
        parts[part][name] = value
    return State(**parts, step=int(notes["step"]))


def with_weights(network: Any, weights: Weights) -> Any:
    """The network, now holding these weights."""
    network.load_state_dict(weights, strict=False)
    return network


def sample(
    model: Model, count: int, seed: int, steps: int = 50, labels: Tensor | None = None, engine: Engine = Engine()
) -> Tensor:
    """Pictures from the model by DDIM (eta 0): [count, C, H, W] in [-1, 1].

    The initial noise of picture i is a function of (seed, i), so picture 3 is the same whether 4 or 400 are drawn.
    """
    network = model.final.load().to(engine.device, engine.dtype).eval()
    return denoise(
        network, model, start_noise(model, count, seed).to(engine.device, engine.dtype), steps, labels, engine
    )


def start_noise(model: Model, count: int, seed: int) -> Tensor:
    """The noise that pictures 0 .. count-1 of a seed begin with."""
    shape = (model.channels, model.resolution, model.resolution)
    return normals(stream(seed_for(seed, "sample"), 0, torch.arange(count)), shape)


def denoise(
    network: nn.Module,
    model: Model,
    noise: Tensor,
    steps: int,
    labels: Tensor | None,
    engine: Engine,
    quiet: bool = False,
    watch: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """DDIM from the given noise. watch: is told the timestep and the clean images predicted there, batch by batch."""
    scheduler = _ddim(model, steps)
    pieces = []
    with torch.no_grad():
        starts = range(0, len(noise), engine.batch_size)
        for start in starts if quiet else progress(starts, "sampling"):
            x = noise[start : start + engine.batch_size]
            cond = {} if labels is None else {"class_labels": labels[start : start + engine.batch_size].to(x.device)}
            for t in scheduler.timesteps:
                prediction = model.forward.predict(network, x, t.expand(len(x)).to(x.device), cond)
                moved = scheduler.step(prediction[:, : x.shape[1]], int(t), x, eta=0.0)
                x = moved.prev_sample
                if watch is not None:
                    watch(int(t), moved.pred_original_sample.clamp(-1, 1))
            pieces.append(x.clamp(-1, 1))
    return torch.cat(pieces)


def _ddim(model: Model, steps: int) -> Any:
    scheduler = DDIMScheduler.from_config({k: v for k, v in model.scheduler.items() if k != "_class_name"})
    scheduler.set_timesteps(steps)
    return scheduler


def labels_in_turn(model: Model, count: int) -> Tensor | None:
    """The classes of pictures 0 .. count-1 of a class-conditional model: each in turn; None for others."""
    classes = model.config.get("num_class_embeds")
    return None if classes is None else torch.arange(count) % classes


@dataclass(frozen=True, eq=False)
class Recorded:
    """The journey of pictures that `sample` drew (see `types.Journey`): sampled once more when first asked for, with the
    predicted clean images kept in the run folder. ids: the pictures' names; numbers: which of the seed's pictures they are.
    """

    model: Model
    ids: Sequence[str]
    numbers: Sequence[int]
    seed: int
    steps: int
    root: Path
    engine: Engine = Engine()

    @property
    def timesteps(self) -> list[int]:
        return [int(t) for t in _ddim(self.model, self.steps).timesteps]

    def predicted(self, timestep: int) -> TensorImages:
        arrays = {t: self._array(t) for t in self.timesteps}
        if timestep not in arrays:
            raise WhenceError(f"timestep {timestep} is none of the sampler's; accepted: {_short_list(self.timesteps)}")
        todo = {rows.start: rows for array in arrays.values() for rows in array.missing()}
        for start in progress(sorted(todo), "sampling once more"):
            self._record(arrays, todo[start])
        labels = self._labels()
        x0 = arrays[timestep].all().reshape(len(self.ids), *self._shape)
        return tensor_images(x0, ids=list(self.ids), labels=labels)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.model.channels, self.model.resolution, self.model.resolution)

    def _labels(self) -> Tensor | None:
        every = labels_in_turn(self.model, max(self.numbers) + 1)
        return None if every is None else every[list(self.numbers)]

    def _array(self, timestep: int) -> Rows:
        key = {
            "part": "journey",
            "timestep": timestep,
            "model": self.model.final.digest,
            "scheduler": self.model.scheduler,
            "seed": self.seed,
            "steps": self.steps,
            "numbers": list(self.numbers),
        }
        shape = (len(self.ids), math.prod(self._shape))
        return Store(self.root).array(key, shape, self.engine.dtype, self.engine.batch_size)

    def _record(self, arrays: Mapping[int, Rows], rows: slice) -> None:
        network = self.model.final.load().to(self.engine.device, self.engine.dtype).eval()
        noise = start_noise(self.model, max(self.numbers) + 1, self.seed)[list(self.numbers)][rows]
        labels = self._labels()
        seen: dict[int, list[Tensor]] = {t: [] for t in arrays}
        denoise(
            network,
            self.model,
            noise.to(self.engine.device, self.engine.dtype),
            self.steps,
            None if labels is None else labels[rows],
            self.engine,
            quiet=True,
            watch=lambda t, x0: seen[t].append(x0.flatten(1)),
        )
        for t, pieces in seen.items():
            arrays[t].write(rows, torch.cat(pieces))


def _short_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return f"{shown} ... {numbers[-1]}" if len(numbers) > 6 else shown
