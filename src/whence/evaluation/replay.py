"""A result computed again from its recipe: the same method on the same model and images, without what was stored."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from whence.data.hashing import DIGESTS
from whence.data.images import ImageFolder
from whence.evaluation.contrast import INDEPENDENT, contrasted
from whence.features.rows import identity
from whence.methods import build, settings_of
from whence.methods.candidates import Candidates
from whence.methods.question import question_note, question_of
from whence.methods.strongest import Strongest
from whence.models import Adapter, model_classes
from whence.storage.arrays import DTYPES
from whence.storage.files import differences, read_json, telling
from whence.storage.jsons import refuse_unexpected
from whence.storage.notes import NoteOfImages
from whence.storage.scores import load_scores
from whence.task import Request
from whence.task.reports import ONCE_MORE
from whence.types import Engine, Forward, Method, Scores, Task, WhenceError, describe, from_plain

SURROUNDINGS = ("whence", "torch", "processor", "dtype")  # of a result: other ones round differently


@dataclass(frozen=True)
class Replay:
    """A result and what came out when it was computed again.

    Args:
        stored: the scores that were kept.
        again: the scores computed now.
        different: the fields of the recipe in which the two differ, as "field: found x, expected y".
    """

    stored: Scores
    again: Scores
    different: list[str]

    @property
    def identical(self) -> bool:
        """Whether all scores, and their standard errors, are the same to the last bit."""
        return _equal(self.stored.values, self.again.values) and _equal(self.stored.stderr, self.again.stderr)

    @property
    def apart(self) -> float:
        """The largest difference, as a share of the largest score."""
        stored, again = self.stored.values.double(), self.again.values.double()
        return float((again - stored).abs().max() / stored.abs().max().clamp(min=torch.finfo(torch.float64).tiny))


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def replay(
    folder: str | Path,
    model: str | Path | None = None,
    train: str | Path | None = None,
    queries: str | Path | None = None,
) -> Replay:
    """Compute the scores of a run again, from nothing but their recipe, the model and the images.

    Args:
        folder: RUN/scores/METHOD, as `whence attribute` leaves it. Nothing in the run folder is changed or read but recipes.
        model: where the model is now; None for where it was.
        train: where the training images are now; None for where they were.
        queries: where the pictures are now; None for where they were.

    Raises:
        WhenceError: the folder holds no replayable scores, or model or images are others than those of the result.
    """
    folder = Path(folder).resolve()
    stored = load_scores(folder)
    if "contrast" in stored.recipe:  # RUN/contrast/NAMES/scores/METHOD is of what lies in RUN/scores/METHOD
        folder = folder.parents[3] / "scores" / folder.name
    root = folder.parent.parent
    with TemporaryDirectory(prefix="whence-replay-") as fresh:
        if (root / DIGESTS).is_file():
            shutil.copy(root / DIGESTS, fresh)  # the order of the training images, should files have been renamed
        task = request_of(folder, stored, Where(Path(fresh), model, train, queries)).task()
        check_same_world(task, stored.recipe)
        with telling(folder / "scores.json", ONCE_MORE):
            again = _scores(task, stored, root)
        if (pair := stored.recipe.get("contrast")) is not None:
            again = contrasted(again, pair["this"], pair["not_that"], pair.get("stderr") == INDEPENDENT)
    wanted = {name: value for name, value in stored.recipe.items() if name != "call"}
    return Replay(stored, again, differences(wanted, describe(again.recipe)))


@dataclass(frozen=True)
class Where:
    """Where the sides of a result lie now.

    Args:
        output: the folder of the work.
        model: None for where it was.
        train: the training images; None for where they were.
        queries: the pictures; None for where they were.
        index: the folder of what is computed of the training images; None for `output`.
    """

    output: Path
    model: str | Path | None = None
    train: str | Path | None = None
    queries: str | Path | None = None
    index: Path | None = None


def request_of(folder: Path, stored: Scores, where: Where) -> Request:
    """What a result answers, as it was asked.

    Args:
        folder: RUN/scores/METHOD.
        stored: the scores there.
        where: model, images and results are now.
    """
    root = folder.parent.parent
    if "call" not in stored.recipe or not {"train", "queries"} <= notes_of(root).keys():
        raise WhenceError("the recipe says nothing of model and images", str(folder), "scores of `whence attribute`")
    narrow = stored.recipe.get("feature_dtype")
    engine = Engine(dtype=DTYPES[stored.recipe["dtype"]], feature_dtype=None if narrow is None else DTYPES[narrow])
    return asked_again(root, where, engine, stored.recipe.get("errors", False))


def asked_again(root: Path, where: Where, engine: Engine, errors: bool) -> Request:
    """What a run, or an index, was asked; where there are no pictures, those of `where` or none.

    Args:
        root: the run folder.
        where: model, images and results are now.
        engine: how the work is carried out.
        errors: whether standard errors are measured.
    """
    notes = notes_of(root)
    if "train" not in notes:
        raise WhenceError("says nothing of model and training images", str(root), "what `whence attribute` made")
    about = notes["model"]
    pictures = root / notes["queries"]["folder"] if "queries" in notes else root / "queries"
    request = Request(
        where.model or root / about["folder"],
        where.train or root / notes["train"]["folder"],
        where.queries or pictures,
        where.output,
        _adapter(about["adapter"], root),
        [root / other for other in about["ensemble"]],
        notes["train"]["resolution"],
        about["caption_column"],
        engine,
        skip=True,
        index=where.index,
        query_caption_column=about.get("query_caption_column"),
        errors=errors,
    )
    # Images may have labels where the model has no classes; it then takes none.
    conditional = model_classes(request.opened).count is not None
    return replace(request, classes=notes["train"]["classes"]) if conditional else request


def _scores(task: Task, stored: Scores, root: Path) -> Scores:
    """The scores once more; of candidates, which are named once more as well."""
    method = method_of(stored, task.forward)
    if (question := question_of(question_note(stored), root)) is not None:
        shape = task.queries.batch([0]).x0.shape[1:]
        method = question.asked(stored.recipe["call"]["method"], method, task.forward, shape)
    if "top" in stored.recipe:
        return Strongest(stored.recipe["top"]).score(task, method)
    note = stored.recipe.get("candidates")
    if note is None:
        return method(task)
    candidates = Candidates(note["count"], note["by"], settings_of_call(note["by"], note["settings"]))
    cheap = build(candidates.by, task.forward, candidates.settings)(task)
    named = candidates.named(task, cheap)
    if list(named.to_score.ids) != list(stored.train_ids):
        same = len({*named.to_score.ids} & {*stored.train_ids})
        raise WhenceError(
            f"{candidates.by} names other candidates here, {same:,} of {len(stored.train_ids):,} the same",
            accepted="the processor and the libraries of the result",
        )
    return candidates.score(named, method)


def method_of(stored: Scores, forward: Forward) -> Method:
    """The method of a result, with its settings.

    Args:
        stored: the result.
        forward: how its model is measured.
    """
    call = stored.recipe["call"]
    return build(call["method"], forward, settings_of_call(call["method"], call["settings"]))


def notes_of(root: Path) -> Mapping[str, Any]:
    """What a run folder says of its model and images: {} where it says nothing."""
    path = root / "images.json"
    found = read_json(path, dict, ONCE_MORE) if path.is_file() else {}
    if not isinstance(found.get("model"), dict):
        return {}
    refuse_unexpected(found, Notes, str(path), ONCE_MORE)
    return cast("Mapping[str, Any]", found)


class Made(TypedDict):
    """What images.json says of the model of a run."""

    folder: str
    adapter: dict[str, Any] | None
    ensemble: list[str]
    caption_column: str | None
    query_caption_column: NotRequired[str | None]


class Notes(TypedDict):
    """What is read of images.json."""

    model: Made
    train: NotRequired[NoteOfImages]
    queries: NotRequired[NoteOfImages]


def _adapter(note: Mapping[str, str] | None, root: Path) -> Adapter | None:
    found: Adapter | None = from_plain(note)
    return found and replace(found, folder=root / found.folder)


def settings_of_call(method: str, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method, from what a recipe says of them."""
    defaults = settings_of(method)
    unknown = [name for name in plain if name not in defaults]
    if unknown:
        raise WhenceError(f"{method} has no setting {unknown[0]!r}", "recipe", ", ".join(defaults) or "none")
    return {name: from_plain(value, type(defaults[name])) for name, value in plain.items()}


def check_same_world(task: Task, recipe: Mapping[str, Any]) -> None:
    """Refuse other images or another model than those of the result, before anything is computed.

    Args:
        task: the model and images that are there.
        recipe: of the result.
    """
    sides = {"train": ("training images", "--train_data_dir"), "queries": ("pictures", "--query_data_dir")}
    for side, (what, option) in sides.items():
        images = task.train if side == "train" else task.queries
        if identity(images) != recipe.get(side):
            shown = images.pictures
            where = str(shown.folder) if isinstance(shown, ImageFolder) and shown.folder is not None else ""
            raise WhenceError(f"these are not the {what} of the result", where, f"{option} with the same images")
    there = {checkpoint.digest for checkpoint in (*task.trajectory, *task.ensemble)}
    if not {*recipe["checkpoints"]} <= there:
        raise WhenceError("this is not the model of the result", accepted="--model with the same weights")
