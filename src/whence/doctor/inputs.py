"""What a run would be given, each thing opened once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from whence.data.images import ImageFolder
from whence.data.inspect import Inspected, look_at
from whence.doctor.parts import Requirements, requirements
from whence.models import Adapter, Model, open_model
from whence.types import WhenceError


@dataclass(frozen=True)
class Inputs:
    """What `whence attribute` would be given. Model and folders are opened when they are first asked for, and only then.

    Args:
        model: a pipeline folder, None where there is none to look at yet.
        train: the training images: a folder, a packed file or a pattern, None likewise.
        queries: the pictures to explain, None likewise or where they are still to be drawn.
        output: the run folder.
        resolution: side in px that all images are brought to; None for the model's own.
        adapter: what was trained on the model, None for nothing.
        caption_column: of the images' metadata, for a model that reads text; "text" by default.
        query_caption_column: the same of the pictures to explain; as `caption_column` by default.
    """

    model: Path | None
    train: Path | None
    queries: Path | None
    output: Path
    resolution: int | None = None
    adapter: Adapter | None = None
    caption_column: str | None = None
    query_caption_column: str | None = None

    @cached_property
    def requirements(self) -> Requirements:
        return Requirements() if self.model is None else requirements(Path(self.model))

    @cached_property
    def opened(self) -> Model:
        return open_model(_given("model", self.model), self.adapter)

    @cached_property
    def train_pictures(self) -> Inspected:
        return look_at(_given("training images", self.train))

    @cached_property
    def query_pictures(self) -> Inspected:
        return look_at(_given("query images", self.queries))

    @cached_property
    def train_images(self) -> ImageFolder:
        return self.train_pictures.images(self._side, self.opened.channels)

    @cached_property
    def query_images(self) -> ImageFolder:
        return self.query_pictures.images(self._side, self.opened.channels, self.train_images.classes)

    @property
    def _side(self) -> int:
        return self.resolution or self.opened.resolution


def _given(what: str, path: Path | None) -> Path:
    if path is None:
        raise WhenceError(f"no {what}; accepted: a folder")
    return Path(path)
