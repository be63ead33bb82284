"""What a ledger retrains, which subsets it takes, and how the scores of a run are judged by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from whence.data.classes import Classes
from whence.data.images import ImageFolder
from whence.data.owners import IMAGE, owners
from whence.evaluation import designs
from whence.evaluation.ledger import Ledger
from whence.evaluation.plans import Asked, planned
from whence.models import Adapter, Lora, Model, encode_images, model_classes, open_model
from whence.storage.files import read_json, telling, write_json
from whence.task import folder_images
from whence.training.checkpoints import say_of_other_images, study_of, study_on
from whence.training.study import Study
from whence.types import Images, WhenceError, describe, from_plain


class Noted(TypedDict):
    """What source.json holds."""

    model: str
    adapter: dict[str, Any] | None
    caption_column: str | None


@dataclass(frozen=True)
class Source:
    """What a ledger retrains; kept beside the plan, so that the later commands find it again.

    Args:
        model: a model folder of `whence train`, or a base.
        adapter: the LoRA or Custom Diffusion on the base that is retrained; None for the model itself.
        caption_column: of the images, for models that read text.
    """

    model: Path
    adapter: Adapter | None
    caption_column: str | None

    @classmethod
    def read(cls, root: Path) -> Source:
        if not (root / "plan.json").is_file():
            raise WhenceError(f"{root} holds no plan.json; make one with `whence ledger plan`")
        if not (root / "source.json").is_file():
            raise WhenceError(f"{root} holds a plan, but no source.json; give the same `whence ledger plan` again")
        path, otherwise = root / "source.json", "give the same `whence ledger plan` again"
        found = read_json(path, Noted, otherwise)
        with telling(path, otherwise):
            return cls(Path(found["model"]), from_plain(found["adapter"]), found["caption_column"])

    def write(self, root: Path) -> None:
        on = describe(self.adapter and replace(self.adapter, folder=self.adapter.folder.resolve()))
        found = {"model": str(self.model.resolve()), "adapter": on, "caption_column": self.caption_column}
        write_json(root / "source.json", found)

    @cached_property
    def opened(self) -> Model:
        return open_model(self.model, self.adapter)

    def images(self, folder: Path, resolution: int | None, root: Path, like: Images | None = None) -> Images:
        """The images as the network sees them.

        Args:
            folder: of the pictures.
            resolution: they are brought to; the model's by default.
            root: keeps what is computed for that.
            like: the training images, whose classes queries have.
        """
        opened = self.opened
        known = None if like is None else like.pictures
        classes = model_classes(opened)
        if isinstance(known, ImageFolder) and known.classes is not None:
            classes = Classes(known.classes, classes.count)
        pictures = folder_images(folder, opened.side(resolution), opened.channels, root, classes)
        return encode_images(self.opened, pictures, root, caption_column=self.caption_column)

    def study(self, images: Images) -> Study:
        if self.adapter is None:
            say_of_other_images(self.model, images)
            return study_of(self.model)
        found = study_on(self.model, self.adapter, images)
        if found is None:
            option = "lora" if isinstance(self.adapter, Lora) else "custom"
            raise WhenceError(
                f"{self.adapter.folder} was not made by `whence train {option}` from these images on {self.model}; only "
                "what was can be repeated"
            )
        return found


def opened_ledger(root: Path, train_data_dir: Path, resolution: int | None = None) -> Ledger:
    """The ledger in a folder, on its training images.

    Args:
        root: the ledger folder.
        train_data_dir: the training images it was planned for.
        resolution: they are brought to; the model's by default.
    """
    source = Source.read(root)
    images = source.images(train_data_dir, resolution, root)
    return Ledger(root, images, source.study(images))


@dataclass(frozen=True)
class Design:
    """Which subsets are retrained: the whole set, random subsets in three roles, images or groups left out, and what methods
    that read retrainings ask for.

    Args:
        test, tune, fit: random subsets to judge scores on, to choose settings on, and for removal-based methods.
        fraction: share of the images in a random subset.
        seeds: trainings per subset; 2 or more for a noise ceiling.
        leave_one_out: leave out every image, one by one.
        leave_out_by: a column of the metadata, each of whose values is left out; None for none.
        values: methods of `readers.VALUES` whose trainings are planned.
        by: the players of these: a column, or "image".
        runs: subsets, orders or coalitions that these draw; None for their own number.
        truncation: players after which the orders of Shapley values are cut off; None for never.
    """

    test: int
    tune: int
    fit: int
    fraction: float
    seeds: int
    leave_one_out: bool
    leave_out_by: str | None
    values: tuple[str, ...] = ()
    by: str = IMAGE
    runs: int | None = None
    truncation: int | None = None

    def subsets(self, images: Images, own: int) -> list[designs.Subset]:
        """The subsets of a plan.

        Args:
            images: the training images.
            own: the seed of the model itself; those of the subsets lie well apart from it and from each other.
        """
        n, again = len(images), range(own + 1, own + 1 + self.seeds)
        found: list[designs.Subset] = []
        for role, count, first in (("test", self.test, 1000), ("tune", self.tune, 200_000), ("fit", self.fit, 400_000)):
            if count:
                seeds = range(own + first, own + first + self.seeds)
                found += designs.fixed(n, count, self.fraction, seeds, role, seed=first, common=role != "fit")
        if self.leave_one_out:
            found += designs.leave_out(n, None, again)
        if self.leave_out_by is not None:
            found += designs.leave_out(n, list(owners(images, self.leave_out_by).values()), again)
        for method in self.values:
            asked = Asked(owners(images, self.by), n, again, range(own + 400_000, own + 400_000 + self.seeds))
            found += planned(method, asked, self.runs, self.truncation)
        everything = any(subset.mask.all() and subset.seeds == tuple(again) for subset in found)
        return _once(found if everything else [*designs.full(n, again), *found])


LOOKED_UP = ("full", "leave_out")
"""Designs whose trainings are found by their masks: those of any other design will do."""


def _once(subsets: Sequence[designs.Subset]) -> list[designs.Subset]:
    """Subsets without those that were asked for twice, by two methods."""
    there: dict[tuple[object, ...], set[str]] = {}
    for subset in subsets:
        there.setdefault((subset.mask.tobytes(), subset.role, subset.seeds), set()).add(subset.design)
    kept: dict[tuple[object, ...], designs.Subset] = {}
    for subset in subsets:
        key = (subset.mask.tobytes(), subset.role, subset.seeds)
        others = {design for design in there[key] if design.partition("(")[0] not in LOOKED_UP}
        if not others or subset.design in others:
            kept.setdefault((*key, subset.design if others else ""), subset)
    return list(kept.values())
