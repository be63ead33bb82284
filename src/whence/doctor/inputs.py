"""What a run would be given, each thing opened once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

from whence.data.classes import Classes
from whence.data.hashing import DIGESTS, read_cache
from whence.data.images import ImageFolder, Reading
from whence.data.inspect import Inspected, look_at
from whence.doctor.parts import Requirements, requirements
from whence.models import Adapter, Model
from whence.task import Request
from whence.types import Images, WhenceError


@dataclass(frozen=True)
class Looking(Request):
    """The request of a run whose folders are looked at first, each once, and in which nothing is written.

    Args:
        look: what lies in a folder.
    """

    look: Callable[[Path], Inspected] = look_at

    def images_of(self, source: str | Path | Images, classes: Classes, cache_in: Path | None = None) -> Images:
        """The images of a folder that was looked at (see `Request`)."""
        before = () if cache_in is None else (read_cache(cache_in / DIGESTS, Path()),)
        reading = Reading(self.size, self.opened.channels, classes, self.skip)
        return self.look(cast(Path, source)).images(reading, *before)


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
        index: the folder that keeps what is computed of the training images; the run folder by default.
        errors: whether standard errors are measured, too.
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
    index: Path | None = None
    errors: bool = True

    @cached_property
    def request(self) -> Looking:
        """The run that would be started; what is None in it is not asked for, and queries alone are looked at as if they
        were the training images, too."""
        return Looking(
            cast(Path, self.model),
            cast(Path, self.queries if self.train is None else self.train),
            cast(Path, self.queries),
            self.output,
            self.adapter,
            resolution=self.resolution,
            caption_column=self.caption_column,
            classes=self.classes,
            skip=self.skip,
            index=self.index,
            query_caption_column=self.query_caption_column,
            look=self._looked,
        )

    def _looked(self, path: Path) -> Inspected:
        return self.train_pictures if path is self.train else self.query_pictures

    @property
    def opened(self) -> Model:
        if self.model is None:
            raise WhenceError("no model; accepted: a folder")
        return self.request.opened

    @cached_property
    def model_opened(self) -> Model | None:
        """The model, None where it is not given or is refused."""
        try:
            return None if self.model is None else self.request.opened
        except WhenceError:
            return None

    @cached_property
    def requirements(self) -> Requirements:
        """What the model asks of images; of one that is not given, or refused, nothing is known."""
        try:
            return Requirements() if self.model_opened is None else requirements(self.model_opened)
        except WhenceError:
            return Requirements()

    @cached_property
    def train_pictures(self) -> Inspected:
        return look_at(_given("training images", self.train))

    @cached_property
    def query_pictures(self) -> Inspected:
        return look_at(_given("query images", self.queries))

    @property
    def train_images(self) -> ImageFolder:
        return cast(ImageFolder, self.request.train_images)

    @property
    def query_images(self) -> ImageFolder:
        return cast(ImageFolder, self.request.query_images)


def _given(what: str, path: Path | None) -> Path:
    if path is None:
        raise WhenceError(f"no {what}; accepted: a folder")
    return Path(path)
