"""A benchmark of fine-tunes, whose pictures are influenced by their exemplars by construction (AbC, Wang et al. 2023).

A base is trained on with one or a few exemplars at a time, and draws. What it draws then is influenced by these exemplars:
a query whose truth is known. The base's own training images are the distractors.

    FOLDER/exemplars/model-00/     the exemplars, as their fine-tune saw them
    FOLDER/models/model-00/        the fine-tune: a pipeline, a LoRA or Custom Diffusion on the base
    FOLDER/drawn/model-00/         what it drew
    FOLDER/abc.json                written last

The first half of the fine-tunes is for learning, the other half for judging.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from whence.data.images import ImageFolder, image_folder
from whence.data.saving import save_png
from whence.features.rows import identity
from whence.models import CustomDiffusion, Lora, Model, labels_in_turn, open_model
from whence.storage.files import differences, files_digest, made, note_once, progress, read_json, write_json
from whence.storage.jsons import refuse_unexpected
from whence.task import Sampling, drawing, kept_pictures
from whence.training.checkpoints import say_of_other_images
from whence.training.recipe import Full, NewCustomDiffusion, NewLora, Recipe
from whence.training.runs import Pictures, train
from whence.types import Engine, Images, WhenceError, describe

FORMAT_VERSION = 1
NOTES = "abc.json"
FIT, TEST = "fit", "test"
KINDS = ("full", "lora", "custom")
ACCEPTED = "a folder that `whence abc build` finished"
TEXT = "text"


class NoteOfModel(TypedDict):
    """What the notes of a benchmark say of a fine-tune."""

    name: str
    role: str
    files: str


class Notes(TypedDict):
    """What is read of the notes of a benchmark."""

    base: str
    base_digest: str
    distractors: str
    count: int
    resolution: int
    caption_column: str | None
    models: list[NoteOfModel]


@dataclass(frozen=True)
class FineTunes:
    """How a benchmark is made.

    Args:
        recipe: of every fine-tune; its `model` says on what base, and of what kind.
        models: fine-tunes.
        exemplars: of each.
        draw: what each draws; prompts are those of its exemplars where there are none.
        seed: of the choice of exemplars.
    """

    recipe: Recipe
    models: int
    exemplars: int
    draw: Sampling
    seed: int = 0

    def __post_init__(self) -> None:
        if self.models < 2 or self.exemplars < 1:
            told = f"{self.models} fine-tunes on {self.exemplars} exemplars each"
            raise WhenceError(told, "abc build", "2 fine-tunes or more, and 1 exemplar or more")


@dataclass(frozen=True)
class Sources:
    """Where the images of a benchmark lie.

    Args:
        train: the base's own training images, the distractors.
        exemplars: images that it was not trained on.
        resolution: side of the square they are brought to; the base's by default.
        caption_column: of both, for a base that reads text; "text" by default.
    """

    train: Path
    exemplars: Path
    resolution: int | None = None
    caption_column: str | None = None


def base_of(recipe: Recipe) -> Path:
    """The pipeline that is fine-tuned."""
    if not isinstance(recipe.model, Full | NewLora | NewCustomDiffusion) or recipe.model.base is None:
        raise WhenceError(f"a {type(recipe.model).__name__} is no fine-tune", "abc build", ", ".join(KINDS))
    return recipe.model.base


def pictures_of(source: Path, opened: Model, resolution: int | None) -> ImageFolder:
    """Images at the base's size.

    Args:
        source: where they lie.
        opened: the base.
        resolution: another size.
    """
    return image_folder(source, opened.side(resolution), opened.channels)


def build(sources: Sources, how: FineTunes, folder: Path, engine: Engine = Engine()) -> dict[str, Any]:
    """Train and draw from every fine-tune, going on where an earlier run stopped; returns what abc.json says.

    Args:
        sources: of the images.
        how: the benchmark is made.
        folder: of the benchmark.
        engine: how the work is carried out.
    """
    base = base_of(how.recipe)
    opened = open_model(base)
    distractors = pictures_of(sources.train, opened, sources.resolution)
    images = pictures_of(sources.exemplars, opened, sources.resolution)
    chosen = _chosen(images, distractors, how)
    column = sources.caption_column or TEXT
    if labels_in_turn(opened, 1) is not None:
        raise WhenceError("the base draws by class, and an exemplar has none", str(base), "a base without classes")
    if opened.reads_text and column not in images.meta:
        raise WhenceError(f"the exemplars have no column {column!r} of captions", str(sources.exemplars), "captions")
    about = {
        "base": opened.final.digest,
        "distractors": identity(distractors),
        "exemplars": [[images.digests[row] for row in rows] for rows in chosen],
        "recipe": _without_base(how.recipe),
        "drawn": describe(how.draw),
        "captions": [[str(images.meta[column][row]) for row in rows] for rows in chosen] if opened.reads_text else None,
    }
    say_of_other_images(base, distractors)
    different = differences(describe(about), note_once(made(folder) / "asked.json", describe(about)))
    if different:
        raise WhenceError(
            f"was begun with other settings or images ({different[0]})", str(folder), "another --output_dir"
        )
    for number in progress(range(how.models), "fine-tunes"):
        _fine_tune(number, images, chosen[number], sources, how, folder, engine)
    notes = {
        "format_version": FORMAT_VERSION,
        "base": os.path.relpath(base.resolve(), folder.resolve()),
        "base_digest": opened.final.digest,
        "distractors": identity(distractors),
        "count": len(distractors),
        "kind": _kind(how.recipe),
        "resolution": opened.side(sources.resolution),
        "caption_column": sources.caption_column,
        "models": [
            {
                "name": _name(number),
                "role": role,
                "exemplars": [images.ids[row] for row in rows],
                "files": _files(folder, number),
            }
            for number, (rows, role) in enumerate(zip(chosen, roles(how.models), strict=True))
        ],
    }
    write_json(folder / NOTES, notes)
    return notes


def roles(count: int) -> list[str]:
    """What each fine-tune is for: the first half to learn, the others to judge."""
    return [FIT if number < count // 2 else TEST for number in range(count)]


def _chosen(images: Images, distractors: Images, how: FineTunes) -> list[list[int]]:
    known = set(distractors.digests)
    free, content = [], set[str]()
    for row in sorted(range(len(images)), key=lambda row: images.digests[row]):  # whatever their names
        if images.digests[row] not in known and images.digests[row] not in content:
            content.add(images.digests[row])
            free.append(row)
    left = len(images) - len(free)
    wanted = how.models * how.exemplars
    if len(free) < wanted:
        told = (
            f"{len(free)} images of {len(images)} can be exemplars, for {how.models} fine-tunes on {how.exemplars} each"
        )
        why = f"; {left} are among the base's training images, or twice here" if left else ""
        raise WhenceError(
            told + why, "exemplars", f"{wanted} images that the base was not trained on, or fewer --models"
        )
    if left:
        warnings.warn(
            f"{left} of {len(images)} images are among the base's training images, or twice here, and are no exemplars",
            stacklevel=3,
        )
    order = np.random.default_rng(how.seed).permutation(len(free))[:wanted].tolist()
    return [
        [free[place] for place in order[start : start + how.exemplars]] for start in range(0, wanted, how.exemplars)
    ]


def _without_base(recipe: Recipe) -> object:
    """The recipe by its numbers: the base is known by its content."""
    assert isinstance(recipe.model, Full | NewLora | NewCustomDiffusion)
    return describe(replace(recipe, model=replace(recipe.model, base=None)))


def _kind(recipe: Recipe) -> str:
    return "lora" if isinstance(recipe.model, NewLora) else "full" if isinstance(recipe.model, Full) else "custom"


def _name(number: int) -> str:
    return f"model-{number:02d}"


def _fine_tune(
    number: int,
    images: ImageFolder,
    rows: Sequence[int],
    sources: Sources,
    how: FineTunes,
    folder: Path,
    engine: Engine,
) -> None:
    name = _name(number)
    exemplars, model, drawn = (folder / part / name for part in ("exemplars", "models", "drawn"))
    column = sources.caption_column or TEXT
    texts = [str(images.meta[column][row]) for row in rows] if column in images.meta else None
    if not exemplars.is_dir():
        metadata = [
            {"original": images.ids[row]} | ({} if texts is None else {column: texts[at]})
            for at, row in enumerate(rows)
        ]
        save_png(exemplars, images.batch(list(rows)).x0, [f"exemplar-{at}" for at in range(len(rows))], metadata)
    recipe = replace(how.recipe, batch_size=min(how.recipe.batch_size, len(rows)), seed=how.recipe.seed + number)
    pictures = Pictures(exemplars, sources.resolution, sources.caption_column)
    train(recipe, pictures, model, how.recipe.schedule.steps, engine)
    opened = opened_at(base_of(how.recipe), model, _kind(how.recipe))
    prompts = (how.draw.prompts or texts) if opened.reads_text else None
    draw = replace(how.draw, prompts=prompts, seed=how.draw.seed + number)
    if not drawn.is_dir():
        found = drawing(opened, draw, engine, sources.resolution)(None)
        columns = None if draw.texts is None else [{column: text} for text in draw.texts]
        kept_pictures(made(drawn.parent) / name, found, draw.names, columns)


def opened_at(base: Path, folder: Path, kind: str) -> Model:
    """A fine-tune, with its base.

    Args:
        base: the pipeline.
        folder: of the fine-tune.
        kind: of `KINDS`.
    """
    if kind == "full":  # a pipeline itself
        return open_model(folder)
    return open_model(base, Lora(folder) if kind == "lora" else CustomDiffusion(folder))


def _files(folder: Path, number: int) -> str:
    paths = [path for part in ("exemplars", "drawn") for path in (folder / part / _name(number)).rglob("*")]
    return files_digest(sorted(path for path in paths if path.is_file()), names=True)


# ----------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class FineTune:
    """A fine-tune of a finished benchmark.

    Args:
        name: of its folders.
        role: "fit" or "test".
        model: its folder.
        exemplars: what it was trained on.
        drawn: what it drew.
    """

    name: str
    role: str
    model: Path
    exemplars: ImageFolder
    drawn: ImageFolder


@dataclass(frozen=True, eq=False)
class Exemplars:
    """A finished benchmark.

    Args:
        folder: of it.
        notes: abc.json.
        base: the pipeline.
        distractors: the base's training images.
        models: the fine-tunes.
    """

    folder: Path
    notes: Mapping[str, Any]
    base: Path
    distractors: ImageFolder
    models: Sequence[FineTune]

    def of(self, role: str) -> list[FineTune]:
        return [model for model in self.models if model.role == role]

    @property
    def digest(self) -> str:
        """Of the pictures of all fine-tunes and the distractors."""
        known = {"distractors": self.notes["distractors"], "models": [each["files"] for each in self.notes["models"]]}
        return str(known)

    @classmethod
    def read(cls, folder: Path, train_images: Path) -> Exemplars:
        """A benchmark, refused where it is unfinished, damaged, or of other distractors.

        Args:
            folder: of it.
            train_images: the base's training images.
        """
        if not (folder / NOTES).is_file():
            raise WhenceError(f"no {NOTES}", str(folder), ACCEPTED)
        notes = read_json(folder / NOTES, dict, ACCEPTED)
        if notes.get("format_version") != FORMAT_VERSION:
            raise WhenceError("is none of this version of whence", str(folder / NOTES), ACCEPTED)
        refuse_unexpected(notes, Notes, str(folder / NOTES), ACCEPTED)
        base = folder / notes["base"]
        if not base.is_dir():
            raise WhenceError(f"its base {base} is not there", str(folder), "the base where it was, or build again")
        opened = open_model(base)
        if opened.final.digest != notes["base_digest"]:
            raise WhenceError(f"{base} holds other weights than the base had", str(folder), "the same base")
        distractors = pictures_of(train_images, opened, notes["resolution"])
        if identity(distractors) != notes["distractors"]:
            told = f"{len(distractors):,} images, not the {notes['count']:,} that the benchmark was made with"
            raise WhenceError(told, str(train_images), "the base's training images")
        models = []
        for number, each in enumerate(notes["models"]):
            if _files(folder, number) != each["files"]:
                raise WhenceError("its pictures are not those that were written", str(folder / "drawn" / each["name"]),
                                  "build it again in a new folder")  # fmt: skip
            parts = (
                pictures_of(folder / part / each["name"], opened, notes["resolution"])
                for part in ("exemplars", "drawn")
            )
            models.append(FineTune(each["name"], each["role"], folder / "models" / each["name"], *parts))
        return cls(folder, notes, base, distractors, models)
