"""The loss of pictures that a training does not see, while it goes on: kept beside the model, in validation.json.

It is measured at the averaged weights, which are those that are written in the end, and at the same (timestep, noise) pairs
each time, so that it falls and rises with the model alone. It changes nothing of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from whence.diffusion.draws import stratified
from whence.features.gradients import measure
from whence.features.rows import identity
from whence.storage.files import readable, write_json
from whence.training.optimizer import State
from whence.training.study import Study
from whence.types import Draw, Engine, Images, WhenceError

FILE = "validation.json"
DRAWS = stratified(10, seed=778, shared=False)


class Note(TypedDict):
    """What validation.json holds. images: digest of the pictures; losses: (steps, mean loss), in the order of the steps."""

    format_version: int
    images: str
    count: int
    losses: list[tuple[int, float]]


@dataclass
class HeldOut:
    """Pictures that are held out of a training, and what was found of them.

    Args:
        folder: of the model.
        images: the pictures, as the network sees them.
        losses: steps -> mean loss.
    """

    folder: Path
    images: Images
    losses: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, images: Images, train: Images) -> HeldOut:
        """Pictures of which none trains the model; what an earlier run found of them is read.

        Args:
            folder: of the model.
            images: the pictures.
            train: the training images.
        """
        known = set(train.digests)
        both = [name for name, one in zip(images.ids, images.digests, strict=True) if one in known]
        if both:
            told = f"{len(both)} of {len(images)} pictures are training images, such as {both[0]!r}"
            raise WhenceError(told, "--validation_data_dir", "pictures that do not train the model")
        note = readable(folder / FILE, Note) if (folder / FILE).is_file() else None
        same = note is not None and note["images"] == identity(images)
        return cls(folder, images, dict(note["losses"]) if note is not None and same else {})

    def look(self, study: Study, network: nn.Module, state: State, engine: Engine) -> float:
        """The mean loss after some steps, measured and kept.

        Args:
            study: what is trained, and how.
            network: that is trained.
            state: of the training.
            engine: how the work is carried out.
        """
        training, forward, total = network.training, study.forward(), 0.0
        network.eval()
        with torch.no_grad():
            for start in range(0, len(self.images), engine.batch_size):
                rows = range(start, min(start + engine.batch_size, len(self.images)))
                batch = self.images.batch(list(rows)).to(engine.device, engine.dtype)
                draw = DRAWS(batch.keys, batch.x0.shape[1:], forward.timesteps, engine.dtype)
                for k in range(DRAWS.count):
                    one = Draw(draw.t[:, k].to(batch.x0.device), draw.noise[:, k].to(batch.x0))
                    total += float(measure(network, state.ema, forward, study.recipe.loss, batch, one).double().sum())
        network.train(training)
        found = self.losses[state.step] = total / len(self.images) / DRAWS.count
        note: Note = {
            "format_version": 1,
            "images": identity(self.images),
            "count": len(self.images),
            "losses": sorted(self.losses.items()),
        }
        write_json(self.folder / FILE, note)
        return found

    def told(self) -> str:
        """What is said of it beside the loss of the training; "" before the first look."""
        return f", held out {self.losses[max(self.losses)]:.4g}" if self.losses else ""
