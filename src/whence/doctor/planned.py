"""The question that `whence attribute` would answer, as a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whence.data.images import subset
from whence.doctor.inputs import Inputs
from whence.models import open_model
from whence.task.drawn import trajectory_of
from whence.training.checkpoints import study_on
from whence.types import Engine, Images, Task

DRAWN = 16  # pictures assumed where queries are still to be drawn


def plan(inputs: Inputs, engine: Engine = Engine(), ensemble: Sequence[Path] = ()) -> Task:
    """The task that `whence attribute` would make, without tying the output folder to it.

    Args:
        inputs: what it would be given; queries that are still to be drawn (None) are stood for by the first 16 training
            images.
        engine: how it would be carried out.
        ensemble: pipeline folders of further models.
    """
    opened, images = inputs.opened, inputs.train_images
    drawn: Images = subset(images, range(min(DRAWN, len(images))))
    queries = drawn if inputs.queries is None else inputs.query_images
    others = tuple(open_model(folder).final for folder in ensemble)
    trajectory = (*opened.checkpoints, opened.final)
    index = None if inputs.index is None else Path(inputs.index)
    root = Path(inputs.output)
    study = study_on(opened.folder, inputs.request.adapter, images)
    sampled = Supposed(queries) if inputs.queries is None else trajectory_of(opened, queries, root, engine)
    return Task(
        opened.forward if study is None else study.forward(),
        trajectory,
        images,
        queries,
        root,
        engine,
        ensemble=others,
        study=study,
        sampled=sampled,
        index=index,
        errors=inputs.errors,
    )


@dataclass(frozen=True)
class Supposed:
    """How queries will be sampled that are still to be drawn: what the network sees on the way is stood for by them.

    Args:
        queries: what stands for them.
    """

    queries: Images

    @property
    def timesteps(self) -> Sequence[int]:
        return range(980, -1, -20)

    def predicted(self, timestep: int) -> Images:
        return self.queries
