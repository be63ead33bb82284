"""Maps of an encoder's rows that `whence abc fit` learned: of training images, and of drawn pictures (Wang et al. 2023).

x = e(image) / ||e(image)||
linear    x W + b                        W = 1, b = 0 at first
channel   x s + b                        s = 1, b = 0
network   x + relu(x U + a) V + b        V = 0, b = 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from whence.features.encoders import Encoder, Pixels
from whence.features.pretrained import Pretrained
from whence.storage.arrays import read_checked, write_checked
from whence.storage.files import building, file_digest, files_digest, made, move_in, read_json, write_json
from whence.types import Batch, Forward, WhenceError, describe

FORMAT_VERSION = 1
NOTES, TENSORS = "maps.json", "maps.safetensors"
KINDS = ("linear", "channel", "network")
SIDES = ("train", "drawn")
ACCEPTED = "a folder that `whence abc fit` wrote"
PIXELS = "pixels"
HIDDEN = 256
"""Units of `network`."""

Map = Mapping[str, Tensor]
"""The parameters of one side."""


def encoder_named(name: str | Path) -> Encoder:
    """An encoder by what people call it: pixels, or the folder or hub name of CLIP, ViT, DINO or DINOv2.

    Args:
        name: of the encoder.
    """
    if str(name) == PIXELS:
        return Pixels()
    found = Pretrained(str(name))
    found.check()
    return found


def unmoved(kind: str, width: int, seed: int = 0) -> dict[str, Tensor]:
    """A map that changes nothing: where its learning begins.

    Args:
        kind: of `KINDS`.
        width: k, of a row.
        seed: of what enters nothing yet in `network`.
    """
    bias = torch.zeros(width)
    if kind == "linear":
        return {"W": torch.eye(width), "b": bias}
    if kind == "channel":
        return {"s": torch.ones(width), "b": bias}
    if kind == "network":
        drawn = torch.randn(width, HIDDEN, generator=torch.Generator().manual_seed(seed)) / width**0.5
        return {"U": drawn, "a": torch.zeros(HIDDEN), "V": torch.zeros(HIDDEN, width), "b": bias}
    raise WhenceError(f"no kind of map {kind!r}", "maps", ", ".join(KINDS))


def mapped(rows: Tensor, way: Map) -> Tensor:
    """Rows of an encoder under a map, not brought to length 1 again: [b, k].

    Args:
        rows: e [b, k].
        way: the map.
    """
    x = nn.functional.normalize(rows, dim=1)
    if "W" in way:
        return x @ way["W"].to(x) + way["b"].to(x)
    if "s" in way:
        return x * way["s"].to(x) + way["b"].to(x)
    return x + (x @ way["U"].to(x) + way["a"].to(x)).relu() @ way["V"].to(x) + way["b"].to(x)


@dataclass(frozen=True, eq=False)
class Maps:
    """What was learned.

    Args:
        encoder: by its name (see `encoder_named`).
        kind: of both maps.
        sides: "train" and "drawn".
        notes: how it was learned, and the calibration.
    """

    encoder: str
    kind: str
    sides: Mapping[str, Map]
    notes: Mapping[str, object]

    @property
    def width(self) -> int:
        return len(self.sides["train"]["b"])

    def write(self, folder: Path) -> None:
        """Keep them in a new folder, which appears whole."""
        made(folder.parent)
        tensors = {f"{side}.{name}": value for side in SIDES for name, value in self.sides[side].items()}
        with building(folder) as new:
            write_checked(new / TENSORS, tensors)
            about = {"encoder": self.encoder, "encoder_digest": _digest(self.encoder), "kind": self.kind}
            known = {"tensors": file_digest(new / TENSORS), **about, **self.notes}
            write_json(new / NOTES, {"format_version": FORMAT_VERSION, **describe(known)})
            move_in(new, folder)

    @classmethod
    def read(cls, folder: Path) -> Maps:
        """Those of a folder, refused where it is none, is damaged, or its encoder is another one now."""
        if not (folder / NOTES).is_file() or not (folder / TENSORS).is_file():
            raise WhenceError(f"no {NOTES} and {TENSORS}", str(folder), ACCEPTED)
        notes = read_json(folder / NOTES, dict, ACCEPTED)
        told = {key: notes.get(key) for key in ("encoder", "encoder_digest", "kind", "tensors")}
        if notes.get("format_version") != FORMAT_VERSION or not all(isinstance(each, str) for each in told.values()):
            raise WhenceError(f"is none of this version of whence ({told})", str(folder / NOTES), ACCEPTED)
        encoder, kind = str(told["encoder"]), str(told["kind"])
        if file_digest(folder / TENSORS) != told["tensors"]:
            raise WhenceError("is not the file that was written with its maps.json", str(folder / TENSORS), ACCEPTED)
        tensors = read_checked(folder / TENSORS, "run `whence abc fit` again")
        sides = {
            side: {name.removeprefix(f"{side}."): v for name, v in tensors.items() if name.startswith(f"{side}.")}
            for side in SIDES
        }
        if kind not in KINDS or any(sides[side].keys() != unmoved(kind, 1).keys() for side in SIDES):
            raise WhenceError(f"holds no {kind!r} maps", str(folder / TENSORS), ACCEPTED)
        if _digest(encoder) != told["encoder_digest"]:
            raise WhenceError(
                f"encoder {encoder} is another one than the maps were learned on", str(folder), "the same"
            )
        return cls(encoder, kind, sides, notes)


def _digest(encoder: str) -> str:
    return str(describe(encoder_named(encoder)))


@lru_cache(maxsize=4)
def _opened(folder: Path, state: str) -> Maps:
    return Maps.read(folder)


@dataclass(frozen=True)
class Mapped:
    """Rows of an encoder under a learned map.

    Args:
        folder: that `whence abc fit` wrote; empty for none, which is refused where it is used.
        side: "train" for training images, "drawn" for pictures to explain.
    """

    folder: str
    side: str
    of_pictures = True

    @property
    def maps(self) -> Maps:
        if not self.folder:
            raise WhenceError("no maps are given", "abc_cosine", f"--set encoder=FOLDER, {ACCEPTED}")
        folder = Path(self.folder)
        if not folder.is_dir():
            raise WhenceError("no such folder", str(folder), ACCEPTED)
        files = [folder / name for name in (NOTES, TENSORS) if (folder / name).is_file()]
        return _opened(folder.resolve(), files_digest(files))

    def describe(self) -> dict[str, object]:
        """By content, wherever it lies."""
        known = self.maps.notes["tensors"] if self.folder else ""
        return {"is": "Mapped", "maps": known, "encoder": self.maps.encoder if self.folder else "", "side": self.side}

    def __call__(self, model: nn.Module, forward: Forward, batch: Batch) -> Tensor:
        maps = self.maps
        rows = encoder_named(maps.encoder)(model, forward, batch)
        if rows.shape[1] != maps.width:
            raise WhenceError(
                f"maps of rows of {maps.width} numbers, and {maps.encoder} gives {rows.shape[1]} for these pictures",
                str(self.folder),
                "pictures of the size that the maps were learned on, or an encoder that brings them to its own",
            )
        return mapped(rows, maps.sides[self.side])
