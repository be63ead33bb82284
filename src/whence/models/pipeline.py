"""A pipeline folder, opened: its network, its noise schedule and its training checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import TypeVar

import diffusers
from diffusers import ConfigMixin, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from whence.data.classes import Classes, classes_of
from whence.data.layout import CLASSES
from whence.diffusion.forward import PREDICTION_TYPES, Denoiser, FlowMatching, Predict, plain
from whence.models.autoencoders import Autoencoder, autoencoder_of, refuse_unknown_parts
from whence.models.families.family import HOOK, Config, Family, needs_of
from whence.models.networks import NETWORKS, buildable, family_of, known, load_network, name_ignored
from whence.models.others import refusing
from whence.models.parts import Addition, Parts
from whence.models.settings import refuse_settings
from whence.models.weights import weight_files
from whence.storage.files import files_digest, read_object
from whence.types import Checkpoint, Engine, WhenceError, digest

DIFFUSION = (
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMInverseScheduler",
    "PNDMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "SASolverScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "LMSDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
SCHEDULERS = (*DIFFUSION, "DPMSolverSDEScheduler", *FLOW)  # that one diffusers builds with torchsde only
"""Whose noise schedule is read; how they sample does not matter here."""
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
BETAS: dict[str, Config] = {
    **dict.fromkeys(("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"), _LATENT),
    "DPMSolverSDEScheduler": _LATENT,
    **{name: {**_LATENT, "beta_schedule": "scaled_linear"} for name in ("LCMScheduler", "TCDScheduler")},
}
"""The noise schedules of classes whose defaults are others than those of DDPM, for configurations that leave them out."""
PARTS = ("unet", "transformer")


@dataclass(frozen=True)
class Model:
    """A pipeline folder, opened: what its network is, how it is measured, and its training checkpoints by step.

    Args:
        folder: the pipeline.
        config: the content of the network's config.json.
        scheduler: the content of scheduler_config.json.
        forward: how the network is measured.
        final: the weights that pictures are drawn with.
        checkpoints: those of its training, by step.
        part: the folder of the network, "unet" or "transformer".
        token: the new word of Custom Diffusion, whose network takes token ids; None otherwise.
        additions: what a LoRA adds to the text encoders, by their folder.
        trained_in: the folder of what was trained on the pipeline; None for the pipeline itself.
    """

    folder: Path
    config: Config
    scheduler: Config
    forward: Denoiser | FlowMatching
    final: Checkpoint
    checkpoints: tuple[Checkpoint, ...] = ()
    part: str = "unet"
    token: str | None = None
    additions: Mapping[str, Addition] = field(default_factory=dict)
    trained_in: Path | None = None

    def parts(self, engine: Engine) -> Parts:
        """Its other parts, with what is added to them."""
        return Parts(self.folder, engine, self.token, self.additions)

    def side(self, asked: int | None) -> int:
        """Side that pictures are brought to: the one that is asked for, or the model's own."""
        return self.resolution if asked is None else asked

    @property
    def resolution(self) -> int:
        """Side of the pictures, in pixels."""
        side = self.config.get("sample_size")
        if type(side) is not int or side < 1:
            where = str(self.folder / self.part / "config.json")
            raise WhenceError(
                f"sample_size is {side!r}, not one whole number", where, "the side there, or --resolution"
            )
        return side * (1 if self.vae is None else self.vae.shrink)

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return self.in_channels if self.vae is None else self.vae.channels

    @property
    def in_channels(self) -> int:
        """Channels of what the network sees; that of its class where config.json does not say."""
        found = self.config.get("in_channels", signature(self.family.kind).parameters["in_channels"].default)
        if type(found) is not int or found < 1:
            where = str(self.folder / self.part / "config.json")
            raise WhenceError(f"in_channels is {found!r}", where, "a whole number")
        return found

    @property
    def family(self) -> Family:
        """What its network is."""
        return family_of(self.config)

    @property
    def vae(self) -> Autoencoder | None:
        """The autoencoder between pictures and what the network sees, None without one."""
        return autoencoder_of(self.folder)

    @property
    def needs(self) -> tuple[str, ...]:
        """The conditions that the network cannot do without."""
        return needs_of(self.forward.predict)

    @property
    def reads_text(self) -> bool:
        """Whether the network reads captions."""
        return bool({"encoder_hidden_states", "input_ids"} & {*self.needs})


def open_pipeline(folder: str | Path, trained: bool = True) -> Model:
    """Read a diffusers pipeline folder. Nothing is loaded yet but its JSON files and the digest of its weights.

    Args:
        folder: as `save_pretrained` writes it.
        trained: False for a folder whose network is still to be trained: its weights are not looked for.
    """
    folder = Path(folder)
    for check in OPENING:
        check(folder)
    part, config = part_of(folder), network_config(folder)
    forward = _forward(config, scheduler_config(folder), folder / "scheduler" / SCHEDULER)
    final = _final(folder / part) if trained else _untrained(folder / part, config)
    return Model(folder, config, scheduler_config(folder), forward, final, part=part)


SCHEDULER, PIPELINE = "scheduler_config.json", "a pipeline folder as save_pretrained writes it"


def part_of(folder: Path) -> str:
    """The folder of the network: what is there, else what model_index.json promises, else unet."""
    there = [part for part in PARTS if (folder / part / "config.json").is_file()]
    index = folder / "model_index.json"
    promised = [part for part in PARTS if not there and index.is_file() and part in read_object(index)]
    return [*there, *promised, "unet"][0]


def whole_folder(folder: Path) -> None:
    """Refuse what is no pipeline folder, and say what it is instead."""
    where = str(folder)
    if not folder.exists():
        accepted = (
            f"{PIPELINE}; a model of the hub as OWNER/NAME with --download, or whence.hub_folder(NAME, download=True)"
        )
        raise WhenceError("no such model folder", where, accepted)
    if not folder.is_dir():
        accepted = f"{PIPELINE}; a single file can be turned into one (from_single_file, then save_pretrained)"
        raise WhenceError("is a file, not a model folder", where, accepted)
    part = part_of(folder)
    if (folder / "config.json").is_file() and not (folder / part).is_dir():
        if (folder / "model_index.json").is_file():
            accepted = "sub-folders: DDPMPipeline.from_pretrained(...).save_pretrained(...) writes them"
            raise WhenceError(f"all parts of the pipeline lie in one folder, without {part}/", where, accepted)
        kind = read_object(folder / "config.json").get("_class_name")
        itself = NETWORKS[kind].folder if isinstance(kind, str) and kind in NETWORKS else part
        raise WhenceError(f"this is the {itself} folder itself", where, f"its parent, {folder.resolve().parent}")


def network_config(folder: Path) -> Config:
    """The configuration of the network, of a class that we know and can be built."""
    part = part_of(folder)
    config, path = _config(folder, part, "config.json"), folder / part / "config.json"
    known("network", config.get("_class_name"), NETWORKS, folder / part)
    with _located(path):
        family_of(config).call(config)
    buildable(config, path)
    return config


def scheduler_config(folder: Path) -> Config:
    """The configuration of the scheduler, of a class and a noise schedule that we know."""
    config, path = _config(folder, "scheduler", SCHEDULER), folder / "scheduler" / SCHEDULER
    known("scheduler", config.get("_class_name"), SCHEDULERS, folder / "scheduler")
    # Entries of other samplers often stay in a file, and what is no schedule does not matter here.
    name_ignored(config, _scheduler_entries(), "every scheduler", path)
    # As its own class takes them; what others take, with which pictures are measured and drawn, by what they say of them.
    refuse_settings(getattr(diffusers, str(config["_class_name"])), config, path)
    for kind in (DDPMScheduler, DDIMScheduler):
        refuse_settings(kind, {k: v for k, v in config.items() if k in signature(kind.__init__).parameters}, path)
    _measure(config, plain, path)
    return config


def known_parts(folder: Path) -> None:
    """Refuse a pipeline with a part that would be left out."""
    part = part_of(folder)
    config = read_object(folder / part / "config.json") if (folder / part / "config.json").is_file() else {}
    kind = config.get("_class_name")
    if isinstance(kind, str) and kind in NETWORKS:
        family = family_of(config)
        refuse_unknown_parts(folder, {part, *family.parts, *family.optional})


OPENING: tuple[Callable[[Path], object], ...] = (whole_folder, network_config, scheduler_config, known_parts)
"""Whatever opening a pipeline folder refuses, before its weights are looked at."""


def _config(folder: Path, part: str, name: str) -> Config:
    path = folder / part / name
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        missing = f"{part}/{name} is missing" if (folder / part).is_dir() else f"{part}/ is missing"
        there = any((folder / each).is_dir() for each in PARTS)
        near = (
            []
            if there
            else sorted(path.parent.parent for each in PARTS for path in folder.glob(f"*/{each}/config.json"))
        )
        accepted = f"such as {near[0]}" if near else "with unet/ or transformer/, and scheduler/"
        raise WhenceError(f"{missing} (it holds {inside})", str(folder), f"{PIPELINE}, {accepted}")
    return read_object(path)


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Errors of what is worth the same wherever it stands name the file that it stands in."""
    try:
        yield
    except WhenceError as error:
        raise WhenceError(error.what, str(path), error.accepted) from error


def _forward(config: Config, scheduler: Config, where: Path) -> Denoiser | FlowMatching:
    return _measure(scheduler, family_of(config).call(config), where)


@cache
def _scheduler_entries() -> frozenset[str]:
    """What any scheduler may be told."""
    kinds = [getattr(diffusers, name) for name in SCHEDULERS]
    return frozenset(name for kind in kinds for name in signature(kind.__init__).parameters)


def _measure(scheduler: Config, predict: Predict, where: Path) -> Denoiser | FlowMatching:
    """How a network is measured under a schedule. where: its file."""
    settings = {k: v for k, v in scheduler.items() if k != "_class_name"}
    steps = settings.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise WhenceError(f"num_train_timesteps is {steps!r}", str(where), f"a whole number from 1 to {MOST_STEPS}")
    if scheduler["_class_name"] in FLOW:
        # Without dynamic shifting, which depends on the size of a picture: diffusers' scripts train without it.
        flow = built(FlowMatchEulerDiscreteScheduler, settings, where)
        with _located(where):
            return FlowMatching(flow.sigmas.flip(0).double(), predict=predict)
    kind = settings.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        told = f"prediction_type {kind!r} of {scheduler['_class_name']} is not supported"
        raise WhenceError(told, str(where), f"{', '.join(PREDICTION_TYPES)}; {HOOK}")
    return Denoiser(schedule_of(scheduler, where).alphas_cumprod.double(), kind, predict)


MOST_STEPS = 1_000_000
BETA_SCHEDULES = "linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace, or trained_betas"


def schedule_of(config: Config, where: Path = Path(SCHEDULER)) -> DDPMScheduler:
    """The noise schedule of a scheduler_config.json. diffusers builds it (linear, cosine, trained betas, zero-SNR rescaling
    ...); we only read it, as its training scripts do: by a DDPMScheduler, whatever the pipeline samples with.

    Args:
        config: its content.
        where: the file, for errors.
    """
    given = {**BETAS.get(str(config.get("_class_name")), {}), **config}
    own = {name: value for name, value in given.items() if name in DDPM}
    found = built(DDPMScheduler, own, where, BETA_SCHEDULES)
    betas, steps = found.betas, found.config["num_train_timesteps"]
    if betas.ndim != 1 or len(betas) != steps:
        told = f"trained_betas has the shape {list(betas.shape)}, and num_train_timesteps is {steps}"
        raise WhenceError(told, str(where), "a number for each timestep")
    if betas.ndim != 1 or not bool(((betas >= 0) & (betas <= 1)).all()):
        told = f"its betas go from {float(betas.min()):g} to {float(betas.max()):g}"
        raise WhenceError(told, str(where), "numbers from 0 to 1")
    return found


Scheduler = TypeVar("Scheduler", DDPMScheduler, FlowMatchEulerDiscreteScheduler)


def built(
    kind: type[Scheduler], settings: Config, where: Path, accepted: str = "settings that diffusers takes"
) -> Scheduler:
    """A scheduler of diffusers.

    Args:
        kind: its class.
        settings: of it.
        where: the file that they are from, for the error.
        accepted: likewise.
    """
    with refusing("the noise schedule is not known: diffusers cannot build it", str(where), accepted):
        found: Scheduler = kind.from_config(settings)
    return found


DDPM = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def _final(folder: Path) -> Checkpoint:
    return Checkpoint(partial(load_network, folder), weights_digest(folder), folder.parent.name)


def _untrained(folder: Path, config: Config) -> Checkpoint:
    def load() -> nn.Module:
        raise WhenceError(f"{folder}: this network has not been trained")

    return Checkpoint(load, digest(config, 64), folder.parent.name)


def with_checkpoints(model: Model) -> Model:
    """The model with the checkpoint-N folders that lie in its pipeline folder."""
    return replace(model, checkpoints=checkpoints_in(model.folder, partial(_checkpoint, part=model.part)))


def checkpoints_in(folder: Path, point: Callable[[Path], Checkpoint]) -> tuple[Checkpoint, ...]:
    """The checkpoint-N folders of a training by step, each read by `point`: raw weights, step from its name, rate from
    whence.json where our trainer wrote it. One that cannot be read stops the methods that read it, and no others."""
    found = []
    for path in sorted(folder.glob("checkpoint-*")):
        if path.is_dir():
            step = re.fullmatch(r"checkpoint-(\d+)", path.name)
            try:
                if step is None:
                    raise WhenceError(f"{path}: expected a folder named checkpoint-<step>; {ASIDE}")
                found.append(replace(point(path), step=int(step[1]), rate=_rate(path)))
            except WhenceError as error:
                number = 0 if step is None else int(step[1])
                broken = Checkpoint(partial(_unreadable, str(error)), "", path.name, number, problem=str(error))
                found.append(broken)
    return tuple(sorted(found, key=lambda checkpoint: checkpoint.step or 0))


ASIDE = "accepted: checkpoint-<step> with the weights in it, or a method that reads no checkpoints"


def _unreadable(problem: str) -> nn.Module:
    raise WhenceError(problem)


def _checkpoint(folder: Path, part: str) -> Checkpoint:
    if not (folder / part).is_dir():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise WhenceError(f"{folder} has no {part}/ (it holds {inside}); {ASIDE}")
    return Checkpoint(partial(load_network, folder / part), weights_digest(folder / part), folder.name)


def _rate(folder: Path) -> float | None:
    path = folder / "whence.json"
    rate = read_object(path).get("rate") if path.is_file() else None
    if rate is not None and (
        isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < float("inf")
    ):
        raise WhenceError(f"rate is {rate!r}, not a learning rate", str(path), "the number")
    return rate


def weights_digest(folder: Path) -> str:
    """Fingerprint of weights and configuration, by their bytes."""
    weight_files(folder)  # or they are refused
    return files_digest([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def model_classes(model: Model, given: str | Sequence[str] | None = None) -> Classes:
    """What is known of the classes of a model; given: as `data.classes.classes_of` takes it."""
    count = model.config.get(model.family.classes) if "class_labels" in model.needs else None
    if count is not None and (type(count) is not int or count < 1):
        where = str(model.folder / model.part / "config.json")
        raise WhenceError(f"{model.family.classes} is {count!r}", where, "the number of classes, a whole number")
    own = model.trained_in
    return classes_of(model.folder if own is None or not (own / CLASSES).is_file() else own, count, given)


def forward_of(network: ConfigMixin, scheduler: ConfigMixin) -> Denoiser | FlowMatching:
    """How a network is measured under a schedule."""

    def config(part: ConfigMixin) -> Config:
        return {**part.config, "_class_name": type(part).__name__}

    return _forward(config(network), config(scheduler), Path(SCHEDULER))
