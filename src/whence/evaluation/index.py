"""An index: a model and its training images, measured once by some methods, for any number of pictures afterwards.

What methods need of the training images, their features and the systems made of them, is kept in the index. A question then
takes what the pictures themselves take, and one pass over the features: no network looks at a training image again, and no
training image is hashed again unless its size or time changed. A run folder of `whence attribute` is an index, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict, cast

from whence.data.images import subset
from whence.evaluation.replay import Where, asked_again, notes_of, settings_of_call
from whence.features.rows import identity
from whence.methods import build as made
from whence.methods import check_needs
from whence.methods.registry import spelled
from whence.methods.strongest import Strongest
from whence.storage.arrays import DTYPES
from whence.storage.files import readable, write_json
from whence.storage.notes import notes_of as notes_of_scores
from whence.storage.notes import scored
from whence.storage.owned import BUILT, give_free
from whence.storage.scores import save_scores
from whence.task import Request, Sampling, note_images
from whence.types import Engine, Images, Scores, WhenceError, describe

NOTE, AGAIN = BUILT, "`whence index build` once more"
Settings = Mapping[str, Mapping[str, Any]]


class Notes(TypedDict):
    """What built.json holds.

    methods: name -> settings; order: their names, that of the first question first; feature_dtype: None for that of the
    model; errors: whether standard errors are measured.
    """

    format_version: int
    methods: dict[str, dict[str, Any]]
    order: list[str]
    dtype: str
    feature_dtype: str | None
    errors: bool


@dataclass(frozen=True, eq=False)
class Index:
    """A model and its training images, as they were when the index was opened, and methods with their settings.

    Args:
        root: its folder.
        request: what is asked, but for the pictures.
        methods: name -> settings.
    """

    root: Path
    request: Request
    methods: Settings

    @classmethod
    def build(cls, request: Request, methods: Settings) -> Index:
        """Measure the training images, and keep what was found in the request's `index` folder. One that is there already
        goes on with the images that are the same.

        Args:
            request: model and training images; its pictures and its run folder are not looked at.
            methods: name -> settings, as `whence.attribute` takes them.
        """
        root, train = request.shared, request.train_images
        give_free(root, request.identity, built=True)
        with TemporaryDirectory(prefix="whence-index-") as folder, warnings.catch_warnings():
            # Of the one picture that is asked about here, which is a training image.
            warnings.filterwarnings("ignore", message=".*(byte-identical|have the same score)")
            asking = request.asking(subset(train, [0]), folder)
            task = asking.task()
            built = {name: made(name, task.forward, settings) for name, settings in methods.items()}
            for name in built:
                check_needs(name, task)
            for method in built.values():
                method(task)
        note_images(root, {"train": train}, {"train": task.train}, asking.made_of(root))
        engine = request.engine
        narrow = None if engine.feature_dtype is None else str(engine.feature_dtype)
        note: Notes = {
            "format_version": 1,
            "methods": describe(methods),
            "order": list(methods),
            "dtype": str(engine.dtype),
            "feature_dtype": narrow,
            "errors": request.errors,
        }
        write_json(root / NOTE, note)  # last: an index without it is not finished
        return cls(root, request, methods)

    @classmethod
    def open(
        cls,
        root: str | Path,
        engine: Engine = Engine(),
        model: str | Path | None = None,
        train: str | Path | None = None,
    ) -> Index:
        """An index that was built, or a run folder of `whence attribute`.

        Args:
            root: its folder.
            engine: how the work is carried out; number formats are those of the index.
            model: where the model is now; None for where it was.
            train: where the training images are now; None for where they were.

        Raises:
            WhenceError: no index, or one of another model or of other images.
        """
        root = Path(root)
        note = _note(root)
        dtypes = {"dtype": note["dtype"], "feature_dtype": note["feature_dtype"]}
        unknown = [name for name in dtypes.values() if name is not None and name not in DTYPES]
        if unknown:
            raise WhenceError(f"number format {unknown[0]!r}", str(root / NOTE), ", ".join(DTYPES))
        narrow = None if note["feature_dtype"] is None else DTYPES[note["feature_dtype"]]
        engine = replace(engine, dtype=DTYPES[note["dtype"]], feature_dtype=narrow)
        where = Where(root, model, train, index=root)
        request = asked_again(root, where, engine, note["errors"])
        request.check_claim()
        wrong = {*note["order"]} ^ note["methods"].keys()
        if wrong:
            raise WhenceError(f"settings and order of the methods differ ({min(wrong)})", str(root / NOTE), AGAIN)
        methods = {name: settings_of_call(name, note["methods"][name]) for name in note["order"]}
        return cls(root, request, methods)

    def asking(self, queries: str | Path | Images | Sampling, root: str | Path | None = None) -> Request:
        """The request of some pictures; what was opened stays open.

        Args:
            queries: the pictures to explain.
            root: a run folder for them; None for one in the index, named by the pictures.
        """
        if root is None:
            asked = self.request.asking(queries, self.root)
            root = self.root / "queries" / identity(asked.query_images)[:16]
        if Path(root).absolute() == self.root.absolute():
            raise WhenceError("is the index itself", str(root), "a run folder of its own for these pictures")
        return self.request.asking(queries, root)

    def chosen(self, names: Sequence[str]) -> Settings:
        """Some of its methods with their settings; all for no name."""
        unknown = [name for name in names if spelled(name) not in self.methods]
        if unknown:
            raise WhenceError(f"the index was not built for {unknown[0]!r}", str(self.root), ", ".join(self.methods))
        return {spelled(name): self.methods[spelled(name)] for name in names} or self.methods

    def query(
        self,
        queries: str | Path | Images | Sampling,
        method: str | None = None,
        top: int | None = None,
        root: str | Path | None = None,
    ) -> Scores:
        """Which training images made these pictures: scores [queries, training images], kept in the run folder.

        Args:
            queries: the pictures to explain: a folder, Images, or `Sampling`.
            method: one of those that the index was built for; the first where None.
            top: how many of the strongest and weakest images of each picture keep their scores; all where None.
            root: a run folder for them; None for one in the index.
        """
        name = next(iter(self.methods)) if method is None else next(iter(self.chosen((method,))))
        task = self.asking(queries, root).task()
        built = made(name, task.forward, self.methods[name])
        scores = built(task) if top is None else Strongest(top).score(task, built)
        call = {"method": name, "settings": describe(self.methods[name])}
        scores = replace(scores, recipe={**scores.recipe, "call": call})
        save_scores(task.root / "scores" / name, scores)
        return scores


def _note(root: Path) -> Notes:
    """What built.json says, or the recipes of a run folder."""
    if (root / NOTE).is_file():
        return cast("Notes", readable(root / NOTE, Notes))
    if not (root / "images.json").is_file() or not notes_of(root):
        told = "an index (`whence index build`), or a run folder of `whence attribute`"
        raise WhenceError("is no index", str(root), told)
    recipes = [notes_of_scores(folder)["recipe"] for folder in scored(root).values()]
    plain = [recipe for recipe in recipes if "call" in recipe and not {"scored", "contrast"} & recipe.keys()]
    plain = [recipe for recipe in plain if "question" not in recipe["call"]]
    if not plain:
        raise WhenceError("holds no scores of all training images and whole pictures", str(root), "another run folder")
    return {
        "format_version": 1,
        "order": [recipe["call"]["method"] for recipe in plain],
        "methods": {recipe["call"]["method"]: recipe["call"]["settings"] for recipe in plain},
        "dtype": plain[0]["dtype"],
        "feature_dtype": plain[0].get("feature_dtype"),
        "errors": bool(plain[0].get("errors", False)),
    }
