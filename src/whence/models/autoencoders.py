"""The image autoencoder of a pipeline folder, whatever it is and wherever it lies; and which parts of a pipeline we know.

    z = (encoder(x) - shift_factor) * scaling_factor, at the mode where the encoder gives a distribution

VQModel is encoded without its codebook, which is part of its decoder, as the pipeline of latent diffusion has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusers import AsymmetricAutoencoderKL, AutoencoderDC, AutoencoderKL, AutoencoderTiny, ModelMixin, VQModel

from whence.models.settings import refuse_settings
from whence.storage.files import is_beside, read_object
from whence.types import WhenceError


@dataclass(frozen=True)
class Kind:
    """A class of autoencoders. levels: the entry of its configuration that has one number per halving, and one more;
    depth, latents: how many, and the channels of its latents, where the configuration leaves them out; channels: the entries
    that tell those, the first that is there."""

    kind: type[ModelMixin]
    levels: str = "block_out_channels"
    depth: int = 1
    latents: int = 4
    channels: tuple[str, ...] = ("latent_channels",)


KINDS = {
    kind.kind.__name__: kind
    for kind in (
        Kind(AutoencoderKL),
        Kind(AsymmetricAutoencoderKL, "down_block_out_channels"),
        Kind(VQModel, latents=3, channels=("vq_embed_dim", "latent_channels")),
        Kind(AutoencoderTiny, "encoder_block_out_channels", depth=4),
        Kind(AutoencoderDC, "encoder_block_out_channels", depth=6, latents=32),
    )
}


@dataclass(frozen=True)
class Autoencoder:
    """The image autoencoder of a pipeline folder. part: its folder in it."""

    part: str
    config: Mapping[str, object]

    @property
    def kind(self) -> Kind:
        """What it is; AutoencoderKL where its configuration does not say."""
        return KINDS[str(self.config.get("_class_name", "AutoencoderKL"))]

    @property
    def shrink(self) -> int:
        """Pixels per latent, along a side."""
        levels = self.config.get(self.kind.levels)
        return int(2 ** ((len(levels) if isinstance(levels, list) else self.kind.depth) - 1))

    @property
    def latents(self) -> int:
        """Channels of what the network sees."""
        return self._count(*self.kind.channels, otherwise=self.kind.latents)

    @property
    def channels(self) -> int:
        """Channels of the pictures."""
        return self._count("in_channels", otherwise=3)

    def _count(self, *names: str, otherwise: int) -> int:
        found = [value for name in names if isinstance(value := self.config.get(name), int)]
        return found[0] if found else otherwise


def autoencoder_of(folder: Path) -> Autoencoder | None:
    """The image autoencoder of a pipeline folder: that which model_index.json names, else the one that is there; None
    without one. One of a class that we do not read is refused by name."""
    there = {name: kind for name, kind in parts_of(folder).items() if _encodes(name, kind)}
    named = [name for name in there if name in _index(folder)] or [*there]
    found = [name for name in named if (folder / name / "config.json").is_file()]
    if len(found) > 1:
        raise WhenceError(
            f"{folder} has {len(found)} autoencoders ({', '.join(found)})", accepted="a pipeline with one"
        )
    if not found:
        return None
    config = read_object(folder / found[0] / "config.json")
    kind = config.get("_class_name", "AutoencoderKL")
    if not isinstance(kind, str) or kind not in KINDS:
        raise WhenceError(f"autoencoder class {kind!r} is not supported", str(folder / found[0]), ", ".join(KINDS))
    refuse_settings(KINDS[kind].kind, config, folder / found[0] / "config.json")
    return Autoencoder(found[0], config)


def missing_autoencoder(folder: Path) -> str | None:
    """The folder of an autoencoder that model_index.json names and that is not there."""
    return next(
        (name for name, kind in _index(folder).items() if _encodes(name, kind) and not (folder / name).is_dir()), None
    )


def _encodes(name: str, kind: str) -> bool:
    return name == "vae" or "autoencoder" in kind.lower() or kind.endswith(("VQModel", "VAE"))


def parts_of(folder: Path) -> dict[str, str]:
    """The parts of a pipeline, by model_index.json and by what lies there, and their classes ("" where nobody says)."""
    found = {} if not folder.is_dir() else {path.parent.name: path for path in sorted(folder.glob("*/config.json"))}
    there = {}
    for name, path in found.items():
        config = read_object(path) if not name.endswith("_ema") and not name.startswith("checkpoint-") else {}
        kind = config.get("_class_name")
        if kind or name == "vae":
            there[name] = str(kind or "")
    return {**there, **_index(folder)}


def _index(folder: Path) -> dict[str, str]:
    path = folder / "model_index.json"
    entries = read_object(path) if path.is_file() else {}
    elsewhere = [name for name in entries if not is_beside(name)]
    if elsewhere:  # it may come from anywhere; it must not make us read files elsewhere
        raise WhenceError(f"names the part {elsewhere[0][:100]!r}", str(path), "folders that lie beside it")
    return {
        name: str(kind[1]) for name, kind in entries.items() if isinstance(kind, list) and len(kind) == 2 and kind[1]
    }


UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermark", "initial")
"""Parts that do not touch what a picture or a caption becomes: checks of finished pictures, pictures as prompts, and the
weights that a training of `whence train full` went on from."""


def refuse_unknown_parts(folder: Path, known: Collection[str]) -> None:
    """Refuse a pipeline with a part that would be left out. known: those of its family, and its network."""
    autoencoder = autoencoder_of(folder)
    for name, kind in parts_of(folder).items():
        ours = autoencoder is not None and name == autoencoder.part
        if not (ours or name in known or name in UNUSED or name == "scheduler" or _encodes(name, kind)):
            accepted = ", ".join(sorted({*known, "scheduler", *UNUSED}))
            raise WhenceError(
                f"the part {name} ({kind or 'of no class'}) of this pipeline is not known", str(folder), accepted
            )
