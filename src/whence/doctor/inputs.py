"""What a run would be given, each thing opened once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from whence.data.classes import Classes, class_labels, classes_of
from whence.data.hashing import DIGESTS, read_cache
from whence.data.images import ImageFolder, Reading
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
        classes: their names in the model's order: a file, or names with commas; None for what folders say.
        skip: whether files that are not read may be skipped, however many.
        query_caption_column: the same of the pictures to explain; as `caption_column` by default.
    """

    model: Path | None
    train: Path | None
    queries: Path | None
    output: Path
    resolution: int | None = None
    adapter: Adapter | None = None
    caption_column: str | None = None
    classes: str | None = None
    skip: bool = False
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
        return self.train_pictures.images(self._reading(self.train_classes), read_cache(self._cache, Path()))

    @cached_property
    def query_images(self) -> ImageFolder:
        return self.query_pictures.images(self._reading(self.query_classes))

    @cached_property
    def train_classes(self) -> Classes:
        """What is known of the classes of the model; of a model that has none, nothing."""
        needs = self.requirements
        return classes_of(Path(self.model or "."), needs.classes if needs.labels else None, self.classes)

    @cached_property
    def query_classes(self) -> Classes:
        """The same, with the names that the training images have."""
        if self.train is None:
            return self.train_classes
        # Whether they are as many as the model has is told of the training images.
        labels = class_labels(self.train_pictures.layout, replace(self.train_classes, count=None), self.train)
        return replace(self.train_classes, names=labels.names, sure=True) if labels.names else self.train_classes

    @property
    def _cache(self) -> Path:
        return Path(self.output) / DIGESTS

    def _reading(self, classes: Classes) -> Reading:
        side = self.resolution or self.opened.resolution
        return Reading(side, self.opened.channels, classes, self.skip)


def _given(what: str, path: Path | None) -> Path:
    if path is None:
        raise WhenceError(f"no {what}; accepted: a folder")
    return Path(path)
