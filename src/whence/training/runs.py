"""`whence train`: a recipe and pictures become a model folder with its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from whence.data.classes import NO_CLASSES, classes_of, write_classes
from whence.data.dropping import without
from whence.data.hashing import DIGESTS
from whence.data.images import ImageFolder, image_folder
from whence.features.rows import identity
from whence.models import Model, Prior, encode_images, model_classes, open_model, with_token
from whence.storage.files import progress
from whence.storage.leftovers import sweep
from whence.storage.trackers import check_tracker, tracked
from whence.training.checkpoints import checkpoint_folders, content_of, load_state, save_checkpoint
from whence.training.held_out import HeldOut
from whence.training.loop import steps
from whence.training.optimizer import State
from whence.training.order import with_prior_images
from whence.training.recipe import New, NewCustomDiffusion, Recipe, Text
from whence.training.recipe_file import keep_recipe
from whence.training.standing import RecentLoss, Standing
from whence.training.study import Study
from whence.types import Engine, Images, WhenceError, describe


@dataclass(frozen=True)
class Pictures:
    """Where the pictures of a training are, and how they are read.

    Args:
        folder: an imagefolder, or .tar or .parquet files.
        resolution: side of the square they are brought to; the model's by default.
        caption_column: of their metadata, for models that read text; "text" by default.
        prior: the same with the prior images of Custom Diffusion.
        classes: names of the model's classes in their order, as `data.classes.class_names` takes them; None for what the
            base or the data say. They are kept with the result.
        skip: whether files in the folders that are not read may be skipped, however many.
        without: lists of images to leave out (`data.dropping`).
        validation: the same with pictures that do not train, whose loss is measured on the way; None for none.
    """

    folder: Path
    resolution: int | None = None
    caption_column: str | None = None
    prior: Path | None = None
    classes: str | Sequence[str] | None = None
    skip: bool = False
    without: tuple[Path, ...] = ()
    validation: Path | None = None


def train(
    recipe: Recipe,
    pictures: Pictures,
    folder: Path,
    every: int = 1000,
    engine: Engine = Engine(),
    report_to: str | None = None,
) -> Study:
    """Train by a recipe, from folders; returns what can be repeated.

    What depends on the pictures is filled in: how many prior images there are, and the size that a new network sees.

    Args:
        recipe: its `model` says what is trained.
        pictures: the training images.
        folder: of the result; a training that was cut off goes on in it.
        every: steps between checkpoints.
        engine: how the work is carried out.
        report_to: "tensorboard" or "wandb" for its losses (`storage.trackers`); None for none.
    """
    model, schedule = recipe.model, recipe.schedule
    if report_to is not None:
        check_tracker(report_to)
    if schedule.steps <= schedule.warmup_steps:
        warnings.warn(
            f"the learning rate only rises: of {schedule.warmup_steps} steps of warm-up (--lr_warmup_steps, "
            f"schedule.warmup_steps) there are {schedule.steps}, and it gets to {recipe.rate_at(schedule.steps - 1):.3g}, "
            f"not {recipe.optimizer.learning_rate:.3g}",
            stacklevel=2,
        )
    if pictures.prior is not None and not isinstance(model, NewCustomDiffusion):
        raise WhenceError("prior images are for Custom Diffusion", type(model).__name__, "no prior images")
    if isinstance(model, New):
        if pictures.caption_column is not None:
            raise WhenceError("a new network of pixels reads no text", "caption_column", "no such column")
        study = Study(recipe)
        seen: Images = _pixels(model, pictures, folder)
        conditional = bool(model.network.get("num_class_embeds"))
    else:
        study, seen, conditional = _on_pipeline(recipe, pictures, folder, engine)
    held = _held_out(study, pictures, seen, folder, engine)
    train_study(study, seen, folder, every, engine, report_to, held)
    known = seen.pictures
    if conditional and isinstance(known, ImageFolder) and known.classes is not None:
        write_classes(folder, known.classes)
    return study


def _held_out(study: Study, pictures: Pictures, train: Images, root: Path, engine: Engine) -> HeldOut | None:
    """The pictures whose loss is measured on the way, read as the training images are; None where there are none.

    Args:
        study: what is trained.
        pictures: where both are.
        train: the training images.
        root: of the result.
        engine: how captions and latents are computed.
    """
    if pictures.validation is None:
        return None
    known = train.pictures.classes if isinstance(train.pictures, ImageFolder) else None
    other = replace(pictures, folder=pictures.validation, without=(), classes=pictures.classes or known)
    cache, model = root / "validation", study.recipe.model
    if isinstance(model, New):
        return HeldOut.of(root, _pixels(model, other, cache), train)
    assert study.recipe.base is not None
    opened = open_model(study.recipe.base, trained=not isinstance(model, Text))
    if isinstance(model, NewCustomDiffusion):
        opened = with_token(opened, model.modifier_token)
    return HeldOut.of(root, _seen(opened, other, cache, engine), train)


def pixel_images(pictures: Pictures, channels: int, root: Path, count: int | None = None) -> tuple[ImageFolder, int]:
    """Square pictures and their side, at the size they are to have or have by themselves.

    Args:
        pictures: where they are.
        channels: that the network takes.
        root: of the result; keeps their digests.
        count: of the network's classes, None where it has none, or as many as the pictures.
    """
    cache = root / DIGESTS
    classes = NO_CLASSES if count is None and pictures.classes is None else classes_of(root, count, pictures.classes)
    images = image_folder(pictures.folder, pictures.resolution, channels, classes, cache, pictures.skip)
    height, width = images.batch([0]).x0.shape[-2:]
    if height != width:
        raise WhenceError(f"{pictures.folder}: the images are {width}x{height}; give --resolution for square ones")
    # By their size, as `attribute` will read them: the same images then have the same name.
    if pictures.resolution is None:
        images = image_folder(pictures.folder, width, channels, classes, cache, pictures.skip)
    return without(images, pictures.without), width


def _pixels(model: New, pictures: Pictures, root: Path) -> ImageFolder:
    size, channels = model.network.get("sample_size"), model.network.get("in_channels", 3)
    images, side = pixel_images(pictures, channels, root, model.network.get("num_class_embeds"))
    if side != size:
        raise WhenceError(
            f"sample_size is {size}, but the images are {side}x{side}; give --resolution {size}", "network"
        )
    if model.network.get("num_class_embeds") and images.labels is None:
        raise WhenceError(
            "the network is class-conditional",
            str(pictures.folder),
            "class folders or a `label` column in metadata.jsonl",
        )
    return images


def _on_pipeline(recipe: Recipe, pictures: Pictures, root: Path, engine: Engine) -> tuple[Study, Images, bool]:
    """The study of a recipe on a base, what its network sees, and whether it sees classes."""
    model, base = recipe.model, recipe.base
    if model is None or base is None:
        kind = "model" if model is None else f"model {type(model).__name__}"
        raise WhenceError("it does not say what it goes on from", f"recipe: {kind}", "base = a pipeline folder")
    opened = open_model(base, trained=not isinstance(model, Text))
    if isinstance(model, Text) and not opened.reads_text:
        raise WhenceError(
            f"{base}: its network reads no text", accepted="one that does; `whence train new` for one of pixels"
        )
    if isinstance(model, NewCustomDiffusion):
        opened = with_token(opened, model.modifier_token)
    prior = None
    if pictures.prior is not None:
        prior = Prior.of(_seen(opened, replace(pictures, folder=pictures.prior, without=()), root, engine))
    seen = _seen(opened, pictures, root, engine)
    recipe = replace(recipe, data=replace(recipe.data, prior=0 if prior is None else len(prior)))
    if isinstance(model, Text) and opened.part == "unet":
        recipe = replace(recipe, model=replace(model, sample_size=seen.batch([0]).x0.shape[-1]))
    return Study(recipe, prior), seen, model_classes(opened).count is not None


def _seen(opened: Model, pictures: Pictures, root: Path, engine: Engine) -> Images:
    """Pictures and captions as the network sees them."""
    size = opened.side(pictures.resolution)
    classes = model_classes(opened, pictures.classes)
    found = image_folder(pictures.folder, size, opened.channels, classes, root / DIGESTS, pictures.skip)
    found = without(found, pictures.without)
    return encode_images(opened, found, root, engine, pictures.caption_column)


def train_study(
    study: Study,
    images: Images,
    folder: Path,
    every: int,
    engine: Engine = Engine(),
    report_to: str | None = None,
    held: HeldOut | None = None,
) -> None:
    """Train, writing recipe.toml, checkpoint-N every `every` steps, and the result (averaged weights) at the end.

    Goes on from where it stood, some twenty seconds ago at most (see `standing`), or from the last checkpoint; a folder of
    another recipe or data set is refused, and so is one that holds a model which was not trained here.

    Args:
        study: what is trained, and how.
        images: as the network sees them (see `models.encode_images`).
        folder: a pipeline, or a LoRA or Custom Diffusion as diffusers writes them.
        every: steps between checkpoints.
        engine: how the work is carried out.
        report_to: as of `train`.
        held: pictures whose loss is measured at every checkpoint; None for none.
    """
    recipe, subject = study.recipe, study.subject
    network = study.network_at(recipe.seed)
    subject.check(network, images)
    notes: dict[str, Any] = {"study": describe(study), "images": identity(images)}
    content = content_of(images)  # not compared: models that were begun before it was noted go on
    done = checkpoint_folders(folder)
    foreign = [path for path in folder.glob("checkpoint-*") if path not in done]
    foreign += [folder / name for name in subject.results if (folder / name).exists() and not done]
    if foreign:
        raise WhenceError(f"{foreign[0]} was not written by whence train; choose another --output_dir")
    state = load_state(done[-1], notes) if done else None
    standing = Standing(folder, "standing", {**notes, "dtype": str(engine.dtype)})
    if (reached := standing.state()) is not None and (state is None or reached.step > state.step):
        state = reached
    keep_recipe(folder, recipe, notes)  # before the first step: whose folder this is
    sweep(folder)
    begun = state.step if state else 0
    seen, weights = with_prior_images(study, images)
    run = steps(network, study.forward(), seen, recipe, weights, state=state, engine=engine)
    run = standing.kept(run, recipe.steps)
    recent = RecentLoss()

    def shown(step: tuple[State, Any]) -> str:
        return recent.told(step) + ("" if held is None else held.told())

    with tracked(report_to, folder, describe(recipe)) as told:
        for state, loss in progress(run, "training", total=recipe.steps - begun, told=shown):
            told(state.step, {"loss": loss, "learning_rate": recipe.rate_at(state.step - 1)})
            if state.step % every == 0 or state.step == recipe.steps:
                write = partial(subject.write, network=network, weights=state.weights)
                save_checkpoint(folder, write, state, recipe, {**notes, "content": content})
                if held is not None:
                    told(state.step, {"held_out_loss": held.look(study, network, state, engine)})
    assert state is not None
    if held is not None and state.step not in held.losses:  # it was trained before, and is asked about now
        held.look(study, network, state, engine)
    standing.over()
    subject.finish(folder, network, state.ema)
