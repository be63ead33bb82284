"""Pretrained image encoders as transformers keeps them: CLIP, ViT and DINO, DINOv2. They do not look at the model.

The pictures are brought to the encoder's own size and scale by Pillow as its preprocessor_config.json says (torchvision,
which transformers would use, is not needed): rounded to 8 bits, grey repeated to RGB, resized with the stated filter,
cropped around the centre, rescaled, normalised. Weights are read from safetensors only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from whence.storage.files import files_digest
from whence.storage.opening import regular
from whence.types import Batch, Forward, WhenceError

CLIP = ("clip", "clip_vision_model")
DINO = ("vit", "dinov2", "dinov2_with_registers")
AT_ONCE = 16  # pictures in one pass


@dataclass(frozen=True)
class Pretrained:
    """Rows of an encoder, computed in float32 on the engine's device.

    CLIP: the projected image embedding. ViT, DINO, DINOv2: the class token after the last norm.

    Args:
        folder: one that `save_pretrained` wrote, or owner/name on the Hugging Face hub.
        families: the kinds accepted, as `model_type` of config.json names them.
    """

    folder: str
    families: tuple[str, ...] = CLIP + DINO
    of_pictures = True

    def describe(self) -> str:
        """Name and digest of its bytes: what its features are stored under."""
        if not self.folder:
            return "Pretrained(no folder)"
        folder = self.check()
        return f"Pretrained({folder.name}, {_digest(folder)})"

    def check(self) -> Path:
        """The folder, if it holds an encoder of these families; nothing but JSON is read."""
        accepted = f"accepted: the folder of a {', '.join(self.families)} model written by save_pretrained"
        if not self.folder:
            raise WhenceError(f"this method needs an encoder and none is given; {accepted} (--set encoder=FOLDER)")
        folder = _local(self.folder, accepted)
        for name in ("config.json", _preprocessor(folder)):
            if not (folder / name).is_file():
                raise WhenceError(f"encoder {self.folder} has no {name}; {accepted}")
        family = _json(folder / "config.json").get("model_type")
        if family not in self.families:
            raise WhenceError(f"encoder {self.folder} is a {family!r} model; {accepted}")
        if not list(folder.glob("*.safetensors")):
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            why = f"only {pickled[0]}, a pickle, which whence never opens" if pickled else "no weights"
            raise WhenceError(f"encoder {self.folder} holds {why}; expected *.safetensors")
        return folder

    def __call__(self, model: nn.Module, forward: Forward, batch: Batch) -> Tensor:
        folder = self.check()
        network = _load(folder, _digest(folder), str(batch.x0.device))
        pixels = Preprocessing.read(folder)(batch.x0).to(batch.x0.device)
        found = []
        for start in range(0, len(pixels), AT_ONCE):
            few = pixels[start : start + AT_ONCE]
            # Always as many pictures: the order of sums, and with it the last bits of a row, depends on the batch.
            full = torch.cat([few, few.new_zeros(AT_ONCE - len(few), *few.shape[1:])])
            try:
                found.append(_embed(network, full)[: len(few)])
            except (ValueError, RuntimeError) as error:
                size = "x".join(map(str, few.shape[2:]))
                raise WhenceError(
                    f"encoder {self.folder} fails on {size} pictures: {str(error).splitlines()[0]}"
                ) from error
        return torch.cat(found).to(batch.x0.dtype)


def _embed(network: nn.Module, pixels: Tensor) -> Tensor:
    result = network(pixel_values=pixels)
    return result.image_embeds if "image_embeds" in result else result.last_hidden_state[:, 0]


def _local(name: str, accepted: str) -> Path:
    """The folder itself, or the copy of a hub repository in the cache, fetched when it is not there."""
    if Path(name).is_dir():
        return Path(name).resolve()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        raise WhenceError(f"encoder {name!r} is no folder; {accepted}")
    try:
        return _fetched(name)
    except Exception as error:  # no network, no such repository, no right to read it, a full disk
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WhenceError(f"encoder {name!r} is no folder, and the hub does not give it ({why}); {accepted}") from None


@lru_cache(maxsize=16)
def _fetched(name: str) -> Path:
    """Asked for once: the hub may give another revision during a run."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(regular(path).read_text())
    except (OSError, ValueError) as error:
        raise WhenceError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise WhenceError(
            f"{path} holds a {type(found).__name__}; expected the JSON object that save_pretrained writes"
        )
    return found


def _preprocessor(folder: Path) -> str:
    newer = "processor_config.json"
    return newer if (folder / newer).is_file() else "preprocessor_config.json"


def _digest(folder: Path) -> str:
    """Fingerprint of weights, configuration and preprocessing."""
    files = [folder / "config.json", folder / _preprocessor(folder), *sorted(folder.glob("*.safetensors"))]
    return _hash(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=16)
def _hash(files: tuple[tuple[str, int, int], ...]) -> str:
    """Computed once for as long as size and time of the files stay: it is asked for with every array."""
    return files_digest(Path(path) for path, _, _ in files)[:32]


@lru_cache(maxsize=1)
def _load(folder: Path, digest: str, device: str) -> nn.Module:
    """The network, loaded once; weights that are missing from the file are an error, not random numbers."""
    import transformers  # seconds: only for those who use it

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    options: dict[str, Any] = {}
    kind: Any
    if config.model_type in CLIP:
        vision = config.vision_config if config.model_type == "clip" else config
        vision.projection_dim = config.projection_dim  # of the whole CLIP, which its vision part need not repeat
        kind, options["config"] = transformers.CLIPVisionModelWithProjection, vision
    else:
        kinds = {"vit": transformers.ViTModel, "dinov2": transformers.Dinov2Model}
        kind = kinds.get(config.model_type, transformers.Dinov2WithRegistersModel)
        if config.model_type == "vit":
            options["add_pooling_layer"] = False  # a layer on top of the class token, which DINO does not have
    options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        network, loaded = kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise WhenceError(f"encoder {folder} cannot be loaded: {' '.join(str(error).split())}") from error
    if loaded["missing_keys"]:
        raise WhenceError(
            f"encoder {folder}: its weights lack {min(loaded['missing_keys'])}, which a {kind.__name__} has"
        )
    return network.to(device).eval()


@dataclass(frozen=True)
class Preprocessing:
    """x -> ((crop(resize(8-bit x)) * scale) - mean) / std.

    Args:
        resize: (shorter edge,) or (height, width); None to leave it out.
        resample: filter of the resizing, as Pillow numbers it.
        crop: (height, width) of the centre; None to leave it out.
        scale: of the bytes.
        mean: of each channel.
        std: of each channel.
    """

    resize: tuple[int, ...] | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def read(folder: Path) -> Preprocessing:
        """From the encoder's preprocessor_config.json. What it leaves open is an error, where no default is universal."""
        path = folder / _preprocessor(folder)
        stated = _json(path)
        stated = stated.get("image_processor", stated)
        edge = _json(folder / "config.json").get("model_type") in CLIP  # what a bare number means in old files

        def want(name: str) -> Any:
            if name not in stated or stated[name] is None:
                raise WhenceError(f"{path} does not state {name!r}, which its pictures depend on")
            return stated[name]

        normalize, resize = stated.get("do_normalize", True), stated.get("do_resize", True)
        return Preprocessing(
            resize=_size(path, want("size"), edge) if resize else None,
            resample=int(want("resample")) if resize else 0,
            crop=_area(path, want("crop_size")) if stated.get("do_center_crop", False) else None,
            scale=float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1.0,
            mean=tuple(want("image_mean")) if normalize else (0.0,) * 3,
            std=tuple(want("image_std")) if normalize else (1.0,) * 3,
        )

    def __call__(self, x0: Tensor) -> Tensor:
        """Pictures [b, 1 or 3, H, W] in [-1, 1] -> [b, 3, h, w] float32, on the CPU."""
        if x0.ndim != 4 or x0.shape[1] not in (1, 3):
            raise WhenceError(f"an encoder reads grey or RGB pictures [b, 1 or 3, H, W]; these are {list(x0.shape)}")
        bytes_ = ((x0.detach().cpu().double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        pictures = [self._one(Image.fromarray(p.expand(3, -1, -1).permute(1, 2, 0).numpy())) for p in bytes_]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() * self.scale
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (pixels - mean) / std

    def _one(self, picture: Image.Image) -> np.ndarray:
        """Resized and cropped: [h, w, 3] bytes."""
        if self.resize is not None:
            picture = picture.resize(self._target(picture), Image.Resampling(self.resample))
        if self.crop is not None:
            height, width = self.crop
            top, left = (picture.height - height) // 2, (picture.width - width) // 2
            if top < 0 or left < 0:
                raise WhenceError(
                    f"the encoder crops {height}x{width} of pictures of {picture.height}x{picture.width}; give larger ones"
                )
            picture = picture.crop((left, top, left + width, top + height))
        return np.asarray(picture)

    def _target(self, picture: Image.Image) -> tuple[int, int]:
        """(width, height) after resizing; the longer edge is rounded down, as transformers does."""
        assert self.resize is not None
        if len(self.resize) == 2:
            return self.resize[1], self.resize[0]
        (edge,), short = self.resize, min(picture.size)
        return int(edge * picture.width / short), int(edge * picture.height / short)


def _size(path: Path, size: object, edge: bool) -> tuple[int, ...]:
    if isinstance(size, int):
        return (size,) if edge else (size, size)
    if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        return (int(size["shortest_edge"]),)
    return _area(path, size)


def _area(path: Path, size: object) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise WhenceError(
        f"{path}: size {size!r} is not understood; accepted: a number, shortest_edge, or height and width"
    )
