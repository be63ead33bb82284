"""From what people have, a model folder and folders of images, to a task and its scores."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, Unpack

from torch import nn

from whence.data.classes import NO_CLASSES, Classes, Labels, same_numbering
from whence.data.hashing import DIGESTS, refuse_inside
from whence.data.images import ImageFolder, dataset_images, image_folder
from whence.data.memory import InMemory
from whence.features.rows import identity
from whence.models import Adapter, Model, encode_images, model_classes, open_model
from whence.storage.files import differences, write_json
from whence.storage.hub import DATASET, on_disk
from whence.storage.owned import check_claim, claim, claimed, give_free, goes_on
from whence.task.checks import CHECKS, copies
from whence.task.drawn import Sampling, check_drawn, generated, schedule_digest, trajectory_of
from whence.task.memory import are_pictures, check_ranges, images_in_memory
from whence.task.modules import checkpoint_of
from whence.training.checkpoints import say_of_another_schedule, say_of_other_images, study_on
from whence.types import Checkpoint, Engine, Forward, Images, Task, WhenceError, describe, expect


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be attributed, and to what: a model, its training images, and pictures to explain.

    Pictures, in folders or in memory, are encoded as the model needs it (see `models.encode`); Images of any other kind are
    taken as they are.

    Args:
        model: a diffusers pipeline folder.
        train: its training images: anything that `image_folder` opens, a `datasets.Dataset`, or Images.
        queries: the pictures to explain, likewise; or `Sampling`, for the model to draw them.
        root: the run folder, made or gone on with.
        adapter: what was trained on the pipeline; the ensemble is then one of such adapters.
        ensemble: further pipelines trained alike, for methods that average over models.
        resolution: of the training; the model's sample size by default.
        caption_column: of the training images' metadata, for models that read text; "text" by default.
        engine: how the work is carried out.
        classes: names of the model's classes in their order: themselves, a file with one per line, or a text with commas;
            None for what its folder or the data say (see `data.classes`).
        skip: whether files in the folders that are not read may be skipped, however many.
        index: a folder shared by runs on the same model and training images, made or gone on with: what is computed of
            those is kept there, once, whatever pictures are explained. The run folder by default.
        query_caption_column: of the pictures to explain; "text" for those that are drawn, else as `caption_column`.
        errors: whether standard errors are measured, too: twice the room for features, and no further pass.
    """

    model: str | Path
    train: str | Path | Images
    queries: str | Path | Images | Sampling
    root: str | Path = "runs/whence"
    adapter: Adapter | None = None
    ensemble: Sequence[str | Path] = ()
    resolution: int | None = None
    caption_column: str | None = None
    engine: Engine = Engine()
    classes: str | Sequence[str] | None = None
    skip: bool = False
    index: str | Path | None = None
    query_caption_column: str | None = None
    errors: bool = True

    @cached_property
    def opened(self) -> Model:
        """The model, opened once."""
        return open_model(self.model, self.adapter)

    @property
    def size(self) -> int:
        """Side that pictures are brought to."""
        return self.opened.side(self.resolution)

    @cached_property
    def train_images(self) -> Images:
        """The training images as they are, at the model's size."""
        return self.images_of(self.train, self.classes_known, self.shared)

    @cached_property
    def query_images(self) -> Images:
        """The pictures to explain, likewise, drawn now if they are to be; their classes are those of the training images."""
        classes, train = self.classes_known, self.train_images
        if isinstance(train, ImageFolder) and train.classes is not None:
            classes = Classes(train.classes, classes.count)
        queries = self.images_of(self.pictures(), classes)
        if isinstance(queries, ImageFolder) and isinstance(train, ImageFolder):
            known, asked = (
                Labels(None if side.labels is None else side.labels.tolist(), side.classes) for side in (train, queries)
            )
            same_numbering(known, asked, queries.folder or "data set", classes.count)
        return queries

    @cached_property
    def others(self) -> tuple[Model, ...]:
        """The further models of the ensemble."""
        return tuple(self._other(folder) for folder in self.ensemble)

    @property
    def shared(self) -> Path:
        """Where what is computed of the training images is kept."""
        return Path(self.root if self.index is None else self.index)

    @cached_property
    def classes_known(self) -> Classes:
        """What is known of the model's classes."""
        return model_classes(self.opened, self.classes)

    def images_of(self, source: str | Path | Images, classes: Classes, cache_in: Path | None = None) -> Images:
        """The images that lie somewhere, at the model's size.

        Args:
            source: where they are, or they themselves.
            classes: what is known of those of the model.
            cache_in: the folder that keeps their digests and their order, None for none.
        """
        return folder_images(source, self.size, self.opened.channels, cache_in, classes, self.skip)

    @property
    def identity(self) -> dict[str, object]:
        """What a run folder or an index belongs to."""
        return {**identity_of(self.opened.final, self.train_images), "schedule": schedule_digest(self.opened)}

    @property
    def _where(self) -> str:
        """The folder of its weights, and that of its schedule."""
        opened = self.opened
        adapter = opened.folder / opened.part if self.adapter is None else self.adapter.folder
        return f"{adapter} or {opened.folder / 'scheduler'}"

    def check_claim(self) -> None:
        """Refuse a run folder, or an index, that belongs to another model or other training images; a run folder of its own
        that holds no results goes on with the images that are the same."""
        for folder in {self.shared, Path(self.root)}:
            if not (self.shared == Path(self.root) and goes_on(folder, self.identity)):
                check_claim(folder, self.identity, self._where)

    def check_apart(self) -> None:
        """Refuse folders of results that lie among the images of either side."""
        for source in (self.train, self.queries):
            if isinstance(source, str | Path):
                for folder in dict.fromkeys((Path(self.root), self.shared)):
                    refuse_inside(folder, Path(source))

    def claim(self) -> Path:
        """The run folder, which from now on belongs to this model and these training images."""
        if self.shared == Path(self.root):
            give_free(self.shared, self.identity)
        for folder in (self.shared, Path(self.root)):
            claim(folder, self.identity, self._where)
        return Path(self.root)

    def pictures(self) -> str | Path | Images:
        """The pictures to explain, drawn now if they are to be."""
        if not isinstance(self.queries, Sampling):
            return self.queries
        return generated(self.opened, self.claim(), self.queries, self.engine, self.resolution)

    def asking(self, queries: str | Path | Images | Sampling, root: str | Path) -> Request:
        """The same of other pictures, in a run folder of theirs; the model and the images that were opened stay so.

        Args:
            queries: the pictures to explain.
            root: the run folder.
        """
        other = replace(self, queries=queries, root=root, index=self.shared)
        for name in ("opened", "train_images", "others", "classes_known"):
            if name in vars(self):
                vars(other)[name] = vars(self)[name]
        return other

    def task(self) -> Task:
        """The question that methods answer."""
        for check in CHECKS:
            if not check.late:
                check.run(self)
        sides = {"train": self.train_images, "queries": self.query_images}
        named = [list(zip(images.ids, images.digests, strict=True)) for images in sides.values()]
        for finding in copies(*named):
            warnings.warn(str(finding), stacklevel=2)
        root = self.claim()
        with claimed(root, self.shared):
            return self._task(sides, root)

    def _task(self, sides: Mapping[str, Images], root: Path) -> Task:
        """The same, of the images of both sides as they are."""
        opened = self.opened
        seen = {
            "train": self._encoded("train", sides["train"], self.shared, self.caption_column),
            "queries": self._encoded("queries", sides["queries"], root, self.query_column),
        }
        note_images(root, sides, seen, self.made_of(root))
        study = study_on(opened.folder, self.adapter, seen["train"])
        say_of_another_schedule(opened, study)
        say_of_other_images(opened.folder if self.adapter is None else self.adapter.folder, seen["train"])
        return Task(
            opened.forward if study is None else study.forward(),  # with what the training declared
            (*opened.checkpoints, opened.final),
            seen["train"],
            seen["queries"],
            root,
            self.engine,
            ensemble=tuple(other.final for other in self.others),
            study=study,
            sampled=trajectory_of(opened, sides["queries"], root, self.engine),
            index=self.shared,
            errors=self.errors,
        )

    def references(self, folder: Path) -> Images:
        """Held-out pictures in a folder, as the network sees them; encoded like the pictures to explain."""
        refuse_inside(Path(self.root), folder)
        images = self.images_of(folder, self.classes_known)
        check_ranges(self.opened.forward, self.train_images, images)
        return self._encoded("queries", images, Path(self.root) / "references", self.query_column)

    def _encoded(self, name: str, images: Images, root: Path, column: str | None) -> Images:
        if not are_pictures(self.opened, name, images, self.size):
            return images
        return encode_images(self.opened, images, root, self.engine, column)

    @property
    def query_column(self) -> str | None:
        """The column of the captions of the pictures to explain."""
        if isinstance(self.queries, Sampling):
            if self.query_caption_column not in (None, "text"):
                raise WhenceError(
                    f"drawn pictures have no column {self.query_caption_column!r}",
                    "--query_caption_column",
                    "no such option",
                )
            return "text" if self.opened.reads_text else None
        return self.query_caption_column or self.caption_column

    def _other(self, folder: str | Path) -> Model:
        """A further model of the ensemble: a pipeline, or what lies on the same one."""
        adapter = self.adapter
        alike = open_model(folder) if adapter is None else open_model(self.model, replace(adapter, folder=Path(folder)))
        different = differences(describe(self.opened.forward), describe(alike.forward))
        if different:
            raise WhenceError(f"{alike.folder} is not measured like {self.opened.folder} ({different[0]})")
        if alike.additions != self.opened.additions:
            raise WhenceError(
                f"{folder} adapts the text encoders otherwise, and captions are encoded once for all models",
                "ensemble",
                "LoRAs of the network alone, or without an ensemble",
            )
        return alike

    def made_of(self, root: Path) -> dict[str, object]:
        """Where the models are, seen from the run folder."""
        adapter = self.adapter
        return {
            "folder": os.path.relpath(self.opened.folder.resolve(), root.resolve()),
            "adapter": describe(adapter and replace(adapter, folder=Path(os.path.relpath(adapter.folder, root)))),
            "ensemble": [os.path.relpath(folder, root) for folder in self.ensemble],
            "caption_column": self.caption_column,
            "query_caption_column": self.query_column,
        }


class Options(TypedDict, total=False):
    """What a request may say besides what it is about."""

    ensemble: Sequence[str | Path]
    resolution: int | None
    caption_column: str | None
    engine: Engine
    classes: str | Sequence[str] | None
    skip: bool
    index: str | Path | None
    query_caption_column: str | None
    errors: bool


def task_from_pretrained(
    model: str | Path,
    train: str | Path | Images,
    queries: str | Path | Images | Sampling,
    root: str | Path = "runs/whence",
    adapter: Adapter | None = None,
    **options: Unpack[Options],
) -> Task:
    """The task of a diffusers pipeline folder, its training images, and pictures to explain.

    Args:
        model: a diffusers pipeline folder.
        train: its training images: anything that `image_folder` opens, a `datasets.Dataset`, or Images.
        queries: the pictures to explain, likewise; or `Sampling`, for the model to draw them.
        root: the run folder, made or gone on with.
        adapter: what was trained on the pipeline.
        options: `ensemble`, `resolution`, `caption_column`, `query_caption_column`, `engine`, `classes`, `skip`, `index`,
            `errors`, as `Request` has them.
    """
    expect(model, (str, Path), "model", "a pipeline folder; a module is given to whence.task_from_module")
    sides = source_of("train", train), source_of("queries", queries)
    return Request(on_disk(model), *sides, root, adapter, **options).task()


def task_from_module(
    module: nn.Module,
    forward: Forward,
    train: Images | InMemory,
    queries: Images | InMemory,
    root: str | Path = "runs/whence",
    engine: Engine = Engine(),
    index: str | Path | None = None,
    errors: bool = True,
) -> Task:
    """The task of a network in memory.

    Args:
        module: the network.
        forward: how it is measured.
        train: the training images: Images, or what `tensor_images` takes, [n, C, H, W] in [-1, 1].
        queries: the pictures to explain, likewise.
        root: the run folder, made or gone on with.
        engine: how the work is carried out.
        index: a folder that runs on the same network and training images share, as `Request` has it.
        errors: whether standard errors are measured, too.
    """
    refuse_unlike(module, forward)
    expect(root, (str, Path), "root", "a run folder")
    expect(engine, Engine, "engine", 'whence.Engine(device="cuda"), for example')
    train, queries = images_in_memory("train", train), images_in_memory("queries", queries)
    check_ranges(forward, train, queries)
    final = checkpoint_of(module)
    shared = None if index is None else run_folder(Path(index), final, train)
    root = run_folder(Path(root), final, train)
    return Task(forward, (final,), train, queries, root, engine, index=shared, errors=errors)


def folder_images(
    source: str | Path | Images,
    resolution: int | None,
    channels: int,
    cache_in: Path | None = None,
    classes: Classes = NO_CLASSES,
    skip: bool = True,
) -> Images:
    """A folder, its shards or tables, or a `datasets.Dataset`, at the model's size; or images as they are.

    Args:
        source: where they are.
        resolution: side that they are brought to.
        channels: of the pictures.
        cache_in: the folder that keeps their digests and their order, None for none.
        classes: what is known of those of the model.
        skip: whether more than a few files may be skipped.
    """
    if hasattr(source, "with_format"):  # whatever `datasets` has
        return dataset_images(source, resolution, channels, classes)
    if not isinstance(source, (str, Path)):
        return source
    check_drawn(Path(source))
    cache = None if cache_in is None else cache_in / DIGESTS
    return image_folder(source, resolution, channels, classes, cache, skip)


def run_folder(root: Path, final: Checkpoint, train: Images) -> Path:
    """A run folder, which belongs to one model and one set of training images.

    Args:
        root: the folder.
        final: the model.
        train: the training images.
    """
    claim(root, identity_of(final, train))
    return root


def identity_of(final: Checkpoint, train: Images) -> dict[str, object]:
    """What a run folder belongs to."""
    return {"model": final.digest, "train": identity(train), "images": len(train)}


NOBODY: Mapping[str, object] = {}


def note_images(
    root: Path,
    sides: Mapping[str, Images],
    seen: Mapping[str, Images],
    model: Mapping[str, object] | None,
    players: Mapping[str, object] = NOBODY,
) -> None:
    """Where model and images of a run lie and how they are read, so that its report and its scores can be made again.

    Args:
        root: the run folder.
        sides: "train" and "queries", as they look; images in memory lie nowhere.
        seen: the same, as the network sees them.
        model: where it lies; None where the scores ask none.
        players: of the training images, where owners of several were scored (see `owners.standing_for`).
    """
    notes = {
        name: {
            "folder": os.path.relpath(images.folder.resolve(), root.resolve()),
            "classes": images.classes,
            "pictures": identity(images),
            "seen": identity(seen[name]),
            **images.preprocess,
            **(players if name == "train" else {}),
        }
        for name, images in sides.items()
        if isinstance(images, ImageFolder) and images.folder is not None
    }
    write_json(root / "images.json", {"format_version": 1, "model": model, **notes})


def source_of(name: str, given: object) -> Any:
    """What `Request` takes: folders, data sets and `Sampling` as they are, pictures in memory as Images."""
    if isinstance(given, str | Path):
        return on_disk(given, DATASET)
    if isinstance(given, Sampling | Images) or hasattr(given, "with_format"):
        return given
    return images_in_memory(name, given)


def refuse_unlike(module: object, forward: object) -> None:
    """The network, and then how it is measured; what people give instead, or the other way round."""
    measures = callable(forward) and hasattr(forward, "models") and not isinstance(forward, type | nn.Module)
    if not isinstance(module, nn.Module) or not measures:
        first, second = (part.__name__ if isinstance(part, type) else type(part).__name__ for part in (module, forward))
        raise WhenceError(
            f"({first}, {second}{', the class itself' if isinstance(forward, type) else ''})",
            "model",
            "(module, forward): the network first, then how it is measured, such as whence.Classifier()",
        )
