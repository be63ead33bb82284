"""A student: an embedding whose cosines rank the training images as a slow method does.

    x = (phi - mean) / std;      g(x) = W_L relu(... relu(W_1 x + b_1) ...) + b_L;      r[q, i] = cos(g(x_q), g(x_i))
    sigmoid(a r + b) = share of the candidates that stand before i in the teacher's order, 0 for its strongest proponent

One network for queries and training images. What ranks first has a small share, so that a comes out negative as a rule;
the score is -sign(a) r, larger for what did more for the query, whichever sign was learned. (Wang et al. 2025, 2511.10721.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from whence.features.activations import Layers
from whence.features.encoders import Encoder, Pixels
from whence.features.parts import Encoded
from whence.features.pretrained import Pretrained
from whence.features.rows import rows
from whence.storage.arrays import read_checked, write_checked
from whence.storage.files import file_digest, readable, write_json
from whence.types import VERSION, Checkpoint, Images, Task, WhenceError, describe, digest

FORMAT_VERSION = 1
NOTES, WEIGHTS = "student.json", "student.safetensors"
ONES_OWN: Mapping[str, Encoder] = {"pixels": Pixels(), "representation": Layers()}
"""Encoders that need no folder: the picture itself, and what the model makes of it."""
AGAIN = "make it again with `whence distill`"


def encoder_named(name: str) -> Encoder:
    """An encoder, checked at once.

    Args:
        name: pixels, representation (activations of the model itself), or the folder of a CLIP, ViT or DINO model.
    """
    if name in ONES_OWN:
        return ONES_OWN[name]
    found = Pretrained(name)
    try:
        found.check()
    except WhenceError as error:
        raise WhenceError(error.what, "encoder", f"{', '.join(ONES_OWN)}, or {error.accepted or 'a folder'}") from None
    return found


def features(names: Sequence[str], task: Task, images: Images, checkpoint: Checkpoint) -> Tensor:
    """Rows of several encoders side by side, from the store where they are there: [b, k] float32.

    Args:
        names: of the encoders.
        task: the question.
        images: b of them.
        checkpoint: the model, for what looks at it.
    """
    parts = [rows(Encoded(encoder_named(name)), task, checkpoint, images, f"{name}: images").all() for name in names]
    return torch.cat(parts, 1).float()


def set_of(images: Images) -> str:
    """The fingerprint of a set of images and of how their pixels are read, whatever their names and their order."""
    return digest([dict(images.preprocess), sorted(images.digests)], 32)


def embed(weights: Mapping[str, Tensor], phi: Tensor, kept: Sequence[Tensor] = ()) -> Tensor:
    """g, of length 1: [b, k] -> [b, d].

    Args:
        weights: mean, std, and weight.0, bias.0 ... of the layers.
        phi: rows of the encoders.
        kept: factors of the hidden layers [b, width] each, for dropout; none where nothing is dropped.
    """
    x = (phi - weights["mean"]) / weights["std"]
    last = sum(name.startswith("weight.") for name in weights) - 1
    for layer in range(last + 1):
        x = functional.linear(x, weights[f"weight.{layer}"], weights[f"bias.{layer}"])
        if layer < last:
            x = x.relu() * kept[layer] if kept else x.relu()
    return functional.normalize(x, dim=1)


@dataclass(frozen=True)
class Student:
    """A fitted student and the training images it has embedded.

    Args:
        weights: those of `embed`, and a and b.
        index: the training images' embeddings [n, d].
        digests: of their contents, row by row.
        encoders: names, as `encoder_named` takes them.
        notes: what else its folder says: of the images, the model, the teacher and how well it ranks.
    """

    weights: Mapping[str, Tensor]
    index: Tensor
    digests: Sequence[str]
    encoders: Sequence[str]
    notes: Mapping[str, Any]

    @staticmethod
    def of(
        weights: Mapping[str, Tensor],
        phi: Tensor,
        digests: Sequence[str],
        encoders: Sequence[str],
        notes: Mapping[str, Any],
    ) -> Student:
        """A student of these weights; phi are the rows of the training images, whose contents have these digests."""
        with torch.no_grad():
            index = torch.cat([embed(weights, row[None]) for row in phi])  # one by one, as queries are
        return Student(weights, index, list(digests), list(encoders), notes)

    def check(self, task: Task, checkpoint: Checkpoint) -> None:
        """Refuse other training images, another model where an encoder looks at it, and encoders that have changed.

        Args:
            task: the question.
            checkpoint: the model.
        """
        where = f"student {self.notes['name']}"
        if set_of(task.train) != self.notes["train"]:
            own, there = set(self.digests), set(task.train.digests)
            told = f"{len(there - own):,} of the {len(task.train):,} training images here are new to it"
            how = f"{told}, {len(own - there):,} of its {len(self.digests):,} are missing" if own != there else ""
            raise WhenceError(
                f"it was fitted on other training images ({how or 'the same files, read in another way: --resolution'})",
                where,
                "the images it was fitted on, or a student of these (`whence distill`)",
            )
        if self.notes["model"] not in (None, checkpoint.digest):
            raise WhenceError(
                "it reads representations of another model",
                where,
                "the model it was fitted on, or a student of this one",
            )
        for name, noted in zip(self.encoders, self.notes["encoders_described"], strict=True):
            if describe(encoder_named(name)) != noted:
                raise WhenceError(f"encoder {name} is not what it was", where, f"the one it was fitted on, or {AGAIN}")

    def scores(self, phi: Tensor, images: Images) -> Tensor:
        """-sign(a) r, larger for what did more: [m, k] -> [m, n], float64.

        Args:
            phi: rows of the queries.
            images: n training images, all of which are in the index.
        """
        at = {one: row for row, one in enumerate(self.digests)}
        index = self.index[[at[one] for one in images.digests]].double()
        with torch.no_grad():
            # One by one, and row by row: the order of sums, and with it the last bits, would depend on the others.
            queries = [embed(self.weights, row[None]).double() for row in phi]
        sign = -1.0 if float(self.weights["a"]) > 0 else 1.0
        return sign * torch.stack([(index * query).sum(1) for query in queries])

    def save(self, folder: Path) -> None:
        """Write it; student.json, which is written last, has the digest of the other file."""
        write_checked(folder / WEIGHTS, {**self.weights, "index": self.index})
        own = {"format_version": FORMAT_VERSION, "whence": VERSION, "positive": "proponent"}
        said = {"encoders": list(self.encoders), "digests": list(self.digests), "sha256": file_digest(folder / WEIGHTS)}
        write_json(folder / NOTES, {**own, **said, **describe(self.notes)})


def load_student(folder: str | Path) -> Student:
    """Read what `Student.save` wrote.

    Raises:
        WhenceError: the folder holds no student, or not what was written.
    """
    folder = Path(folder)
    if not (folder / NOTES).is_file():
        raise WhenceError(
            "holds no student.json",
            f"student {folder}",
            "a folder that `whence distill` has finished (RUN/students/METHOD)",
        )
    notes = readable(folder / NOTES)
    missing = [
        key for key in ("encoders", "encoders_described", "digests", "sha256", "train", "model") if key not in notes
    ]
    if missing:
        raise WhenceError(f"student.json says nothing of {missing[0]}", f"student {folder}", AGAIN)
    if not (folder / WEIGHTS).is_file() or file_digest(folder / WEIGHTS) != notes["sha256"]:
        raise WhenceError(f"{WEIGHTS} is not what was written, or not there", f"student {folder}", AGAIN)
    found = _tensors(folder.resolve(), notes["sha256"])
    index = found["index"]
    if len(index) != len(notes["digests"]):
        raise WhenceError(
            f"it embeds {len(index):,} images and names {len(notes['digests']):,}", f"student {folder}", AGAIN
        )
    weights = {name: value for name, value in found.items() if name != "index"}
    return Student(weights, index, notes["digests"], notes["encoders"], {**notes, "name": str(folder)})


@lru_cache(maxsize=4)
def _tensors(folder: Path, sha256: str) -> dict[str, Tensor]:
    """Read once for as long as the file stays."""
    return read_checked(folder / WEIGHTS, then=AGAIN)
