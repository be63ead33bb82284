"""Rows that were computed for an earlier set of images, and are carried over to one that shares images with it.

A row depends on the image alone, never on its company: who replaces a damaged file, removes one or adds some pays for what
changed. Beside the shards of an array lie the noise keys of its images, the first bits of what they show, and their labels.
Images whose captions were encoded are not carried over: what they are told lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from whence.diffusion.noise import key_of
from whence.storage.arrays import Rows, Store, read_checked, write_checked
from whence.storage.opening import tensors_in
from whence.types import Images, digest

FILE = "images.safetensors"
Place = tuple[Rows, int]  # an array, and one of its rows


@dataclass(frozen=True)
class Content:
    """What rows depend on.

    Args:
        kind: of the rows, whatever the images.
        images: the noise key and the label of each [n, 2].
    """

    kind: str
    images: Tensor

    @classmethod
    def of(cls, key: Mapping[str, object], images: Images, dtype: torch.dtype) -> Content | None:
        """Of an array; None where it is not known image by image.

        Args:
            key: of the array.
            images: of its rows.
            dtype: of its numbers.
        """
        if images.pictures is not images:
            return None
        keys = torch.tensor([key_of(one) for one in images.digests], dtype=torch.int64)
        labels = torch.full_like(keys, -1) if images.labels is None else images.labels.long()
        return cls(digest([{**key, "images": dict(images.preprocess)}, str(dtype)]), torch.stack([keys, labels], 1))

    def write(self, array: Rows) -> None:
        """Note it beside the rows."""
        write_checked(array.folder / FILE, {"images": self.images}, self.kind)

    def places(self, store: Store) -> dict[int, Place]:
        """Where the rows of images lie that other arrays hold, by their number here.

        Args:
            store: of the arrays.
        """
        found: dict[tuple[int, ...], Place] = {}
        for earlier in store.arrays():
            path = earlier.folder / FILE
            if not path.is_file() or _kind(path) != self.kind:
                continue
            there = [earlier.has(shard) for shard in earlier.shards]
            for number, one in enumerate(read_checked(path, of=self.kind)["images"].tolist()):
                if there[number // earlier.per_shard]:
                    found.setdefault(tuple(one), (earlier, number))
        if not found:
            return {}
        return {row: found[tuple(one)] for row, one in enumerate(self.images.tolist()) if tuple(one) in found}


def _kind(path: Path) -> str:
    """Of what kind the rows are beside which a file lies."""
    with tensors_in(path, "delete it") as file:
        return str((file.metadata() or {}).get("sha256", "")).partition(" ")[2]


def taken(places: Sequence[Place]) -> Tensor:
    """The rows at some places, at least one: [n, k]."""
    first, _ = places[0]
    values = torch.empty(len(places), first.width, dtype=first.dtype)
    for array in {array.folder: array for array, _ in places}.values():
        at = [slot for slot, (one, _) in enumerate(places) if one.folder == array.folder]
        values[at] = array.take([places[slot][1] for slot in at])
    return values
