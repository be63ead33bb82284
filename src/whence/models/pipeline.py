"""A pipeline folder, opened: its network, its noise schedule and its training checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from diffusers import ConfigMixin, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from whence.data.classes import Classes, classes_of
from whence.diffusion.forward import PREDICTION_TYPES, Denoiser, FlowMatching
from whence.models.autoencoders import Autoencoder, autoencoder_of, refuse_unknown_parts
from whence.models.families.family import HOOK, Config, Family, needs_of
from whence.models.networks import NETWORKS, family_of, known, load_network
from whence.models.parts import Addition, Parts
from whence.storage.files import files_digest, read_json
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

    def parts(self, engine: Engine) -> Parts:
        """Its other parts, with what is added to them."""
        return Parts(self.folder, engine, self.token, self.additions)

    @property
    def resolution(self) -> int:
        """Side of the pictures, in pixels."""
        side = self.config.get("sample_size")
        if type(side) is not int:
            raise WhenceError(f"{self.folder / self.part}: sample_size is {side!r}, not one number; give --resolution")
        return side * (1 if self.vae is None else self.vae.shrink)

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return int(self.config["in_channels"]) if self.vae is None else self.vae.channels

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
    if not folder.is_dir():
        raise WhenceError(f"model folder {folder} does not exist; expected a folder written by save_pretrained")
    part = next((name for name in PARTS if (folder / name / "config.json").is_file()), "unet")
    config = _config(folder, part, "config.json")
    scheduler = _config(folder, "scheduler", "scheduler_config.json")
    known("network", config.get("_class_name"), NETWORKS, folder / part)
    known("scheduler", scheduler.get("_class_name"), SCHEDULERS, folder / "scheduler")
    family = family_of(config)
    refuse_unknown_parts(folder, {part, *family.parts, *family.optional})
    forward = _forward(config, scheduler)
    final = _final(folder / part) if trained else _untrained(folder / part, config)
    return Model(folder, config, scheduler, forward, final, part=part)


def _config(folder: Path, part: str, name: str) -> Config:
    path = folder / part / name
    if not path.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise WhenceError(
            f"{folder} has no {part}/{name} (it holds {inside}); expected a diffusers pipeline with unet/ or transformer/, "
            "and scheduler/"
        )
    return read_json(path)


def _forward(config: Config, scheduler: Config) -> Denoiser | FlowMatching:
    predict = family_of(config).call(config)
    plain = {k: v for k, v in scheduler.items() if k != "_class_name"}
    if scheduler["_class_name"] in FLOW:
        # Without dynamic shifting, which depends on the size of a picture: diffusers' scripts train without it.
        flow = built(FlowMatchEulerDiscreteScheduler, plain, str(scheduler["_class_name"]))
        return FlowMatching(flow.sigmas.flip(0).double(), predict=predict)
    kind = plain.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        accepted = ", ".join(PREDICTION_TYPES)
        told = f"prediction_type {kind!r} of {scheduler['_class_name']}"
        raise WhenceError(f"{told} is not supported; accepted: {accepted}; {HOOK}")
    return Denoiser(schedule_of(scheduler).alphas_cumprod.double(), kind, predict)


def schedule_of(config: Config) -> DDPMScheduler:
    """The noise schedule of a scheduler_config.json. diffusers builds it (linear, cosine, trained betas, zero-SNR rescaling
    ...); we only read it, as its training scripts do: by a DDPMScheduler, whatever the pipeline samples with."""
    told = {**BETAS.get(str(config.get("_class_name")), {}), **config}
    own = {name: value for name, value in told.items() if name in DDPM}
    return built(DDPMScheduler, own, str(config.get("_class_name")), BETA_SCHEDULES)


BETA_SCHEDULES = "linear, scaled_linear, squaredcos_cap_v2, sigmoid, laplace, or trained_betas"
Scheduler = TypeVar("Scheduler", DDPMScheduler, FlowMatchEulerDiscreteScheduler)


def built(
    kind: type[Scheduler], settings: Config, name: str, accepted: str = "settings that diffusers takes"
) -> Scheduler:
    """A scheduler of diffusers, which raises errors of several kinds for settings that it does not know.

    Args:
        kind: its class.
        settings: of it.
        name: of the class in the file, for the error.
        accepted: likewise.
    """
    try:
        found: Scheduler = kind.from_config(settings)
    except (NotImplementedError, TypeError, ValueError) as error:
        what = f"the noise schedule is not known: diffusers cannot build it ({error})"
        raise WhenceError(what, f"scheduler {name}", accepted) from None
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
    notes = read_json(folder / "whence.json") if (folder / "whence.json").is_file() else {}
    return notes.get("rate")


def weights_digest(folder: Path) -> str:
    """Fingerprint of weights and configuration, by their bytes."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        why = f"only {pickled[0]}, a pickle, which whence never opens" if pickled else "no weights"
        raise WhenceError(
            f"{folder} holds {why}; expected *.safetensors (save_pretrained(..., safe_serialization=True))"
        )
    return files_digest([folder / "config.json", *files])


def model_classes(model: Model, given: str | Sequence[str] | None = None) -> Classes:
    """What is known of the classes of a model; given: as `data.classes.classes_of` takes it."""
    count = model.config.get(model.family.classes) if "class_labels" in model.needs else None
    return classes_of(model.folder, count, given)


def forward_of(network: ConfigMixin, scheduler: ConfigMixin) -> Denoiser | FlowMatching:
    """How a network is measured under a schedule."""

    def config(part: ConfigMixin) -> Config:
        return {**part.config, "_class_name": type(part).__name__}

    return _forward(config(network), config(scheduler))
