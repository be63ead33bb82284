"""A run folder, opened once and read only: its methods, its pictures, and what is known of both."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from whence.plain import WhenceError
from whence.report.words import GROUP_COLUMNS, named_value, plain
from whence.storage.files import file_digest, read_json, readable
from whence.storage.jsons import refuse_unexpected
from whence.storage.notes import AGAIN, BESIDE, notes_of, of_other_model, scored
from whence.storage.owned import MANIFEST
from whence.view.matrix import Opened, open_scores
from whence.view.sides import NO_COLUMNS, Columns, Side, noted_side, open_side

CAPTION = "text"
MOST_GROUPS = 5000
"""Values of a column that is offered as a filter although its name says nothing."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What a method said.

    Args:
        name: of the method.
        opened: its numbers.
        recipe: how they came about.
        scale, signed, stderr_of: see `whence.scores.Scores`.
        rows: the training image of each column [n'], None where all were scored, in their order.
        leaning: of each query whether it leans on single images more than held-out pictures do, None where not compared.
        whole: training images that were scored.
        kept: of how many of the first and of the last of each query the scores were kept; None for all.
    """

    name: str
    opened: Opened
    recipe: Mapping[str, Any]
    scale: str
    signed: bool
    stderr_of: str
    rows: NDArray[np.int64] | None
    leaning: Judged | None
    whole: int
    kept: int | None

    @property
    def columns(self) -> int:
        """Training images that have a score here."""
        return self.opened.values.shape[1]

    @property
    def grouped(self) -> str | None:
        """The column whose groups were scored, which their images share equally; see `whence.scores.groups_scored`."""
        found = self.recipe.get("unlearned")
        by = found.get("by") if isinstance(found, Mapping) else None
        return None if by in (None, "image") else str(by)

    def adds_up(self, column: str) -> bool:
        """Whether sums of its scores by a column say anything: of all images, and not of groups by another column."""
        return self.rows is None and self.grouped in (None, column)


class Judged(TypedDict):
    """What is read of attributable.json."""

    queries: str
    query_ids: list[str]
    rate: float
    p: list[float]
    adjusted: list[float]
    stands_out: list[bool]


@dataclass(frozen=True, eq=False)
class Facet:
    """A column that images are told apart by.

    Args:
        column: its name.
        names: of its values, sorted.
        codes: the value of each image [n].
        counts: images of each value.
    """

    column: str
    names: Sequence[str]
    codes: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True, eq=False)
class Shelf:
    """One side, ready to be looked through.

    Args:
        side: names, columns and pictures.
        facets: columns to filter by.
        caption: the column of captions, "" for none.
    """

    side: Side
    facets: Sequence[Facet]
    caption: str

    def __len__(self) -> int:
        return len(self.side.ids)

    @cached_property
    def words(self) -> list[str]:
        """Of each image everything that can be searched, in lower case; made for the first search."""
        texts = [column for column in self.side.meta.values() if column and isinstance(_first(column), str)]
        return [
            " ".join([name, *(str(column[row])[:LONGEST] for column in texts if column[row] is not None)]).casefold()
            for row, name in enumerate(self.side.ids)
        ]


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder.

    Args:
        root: the folder.
        title: of its report.
        facts: lines about model and data, name -> text.
        methods: that can be looked at, in the order of the report.
        train, queries: the images.
        told: what a reader must know: methods that are missing, images that are not found.
        warnings: name of a query -> what is to be known of it before any score.
        model: its folder, "" where that is not known.
    """

    root: Path
    title: str
    facts: Mapping[str, str]
    methods: Mapping[str, Scored]
    train: Shelf
    queries: Shelf
    told: Sequence[str]
    warnings: Mapping[str, str] = field(default_factory=dict)
    model: str = ""

    @property
    def who(self) -> str:
        """Who is scored: training images, or contributors with several of them; see `report.words.who_of`."""
        found = [scored.recipe.get("values") for scored in self.methods.values()]
        by_column = any(isinstance(each, Mapping) and each.get("by") != "image" for each in found)
        return "Contributors" if by_column else "Training images"


class Page(TypedDict):
    """What is read of report.json."""

    title: str
    facts: list[tuple[str, str]]
    methods: list[str]


def open_run(root: Path, others: Sequence[Path] = ()) -> Run:
    """Open a run folder.

    Args:
        root: what `whence attribute ... --output_dir` wrote.
        others: folders in which pictures that moved may be.

    Raises:
        WhenceError: it holds no finished scores, or what another version wrote, or files that are not what was written.
    """
    if not root.is_dir():
        raise WhenceError("there is no such folder", str(root), "the output folder of `whence attribute`")
    folders = scored(root)
    if (root / MANIFEST).is_file():
        readable(root / MANIFEST)  # one of a later version is refused
    page = read_json(root / "report.json", Page) if (root / "report.json").is_file() else None
    order = [name for name in page["methods"] if name in folders] if page else []
    notes = {name: notes_of(folders[name]) for name in [*order, *sorted(folders.keys() - {*order})]}
    told = [*_missing(root, page, notes)]
    told += _of_others(root, notes)
    with ThreadPoolExecutor(2) as pool:  # the digests of what is large, beside the rest
        hashed = pool.map(file_digest, [folders[name] / "scores.safetensors" for name in notes])
        sides = {name: open_side(root, name, scored_side(root, name, notes), others) for name in ("train", "queries")}
        list(hashed)
    if not sides["train"].ids:  # nothing was scored as a whole, and the images are not found
        sides["train"] = replace(sides["train"], **_named(notes))
    told += list(dict.fromkeys(side.problem for side in sides.values() if side.problem))
    methods = dict(_opened(folders, notes, sides["train"], told))
    if not methods:
        raise WhenceError("none of its methods can be looked at", str(root), "; ".join(told))
    caption = _caption(root)
    return Run(
        root,
        plain(page["title"]) if page else root.resolve().name,
        {} if page is None else {plain(name): plain(text) for name, text in page["facts"]},
        methods,
        shelf(sides["train"], caption),
        shelf(sides["queries"], caption),
        [plain(line) for line in told],
        _copies(root, sides["queries"]),
        _model(root),
    )


def _missing(root: Path, page: Page | None, notes: Mapping[str, Any]) -> Iterator[str]:
    """What was begun, or asked for, and is not there."""
    begun = {path.parent.name for name in BESIDE for path in root.glob(f"scores/*/{name}")}
    wanted = dict.fromkeys([*(page["methods"] if page else ()), *_asked(root), *sorted(begun)])
    missing = [name for name in wanted if name not in notes]
    if missing:
        yield f"not finished, or lost: {', '.join(missing)}; the command that began them goes on where it stopped"
    if page is None:
        yield "there is no report.json: the run is not finished, or was not written by `whence attribute`"


def _asked(root: Path) -> list[str]:
    """The methods that the command of the run named."""
    try:
        found = tomllib.loads((root / "config.toml").read_text(encoding="utf-8")).get("method", [])
    except (OSError, ValueError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _of_others(root: Path, notes: dict[str, Any]) -> list[str]:
    """Take out the methods whose scores are of other images than the run noted, or of another model, and name them."""
    other: list[str] = []
    for side in ("train", "queries"):
        noted, _ = noted_side(root, side)
        known = () if noted is None else (noted["pictures"], noted["seen"])
        other += [name for name, note in notes.items() if known and note["recipe"].get(side, known[0]) not in known]
    told = _left_out(notes, {*other}, "other images", root / "images.json")
    models = {name for name, note in notes.items() if of_other_model(root, note["recipe"])}
    return told + _left_out(notes, models, "another model", root / MANIFEST)


def _left_out(notes: dict[str, Any], other: set[str], what: str, noted: Path) -> list[str]:
    """Take out some methods, where others are left, and say of what they are.

    Args:
        notes: method -> its scores.json.
        other: the methods.
        what: their scores are of.
        noted: the file of the run that says so.
    """
    if notes and other == {*notes}:
        raise WhenceError(f"its scores are of {what} than {noted} names", str(noted.parent), "the run made again")
    for name in other:
        del notes[name]
    return [f"left out, because their scores are of {what}: {', '.join(sorted(other))}"] if other else []


def _named(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Names and columns of the training images that any method has a score of; columns that all of them have."""
    place: dict[str, tuple[Any, int]] = {}
    for note in notes.values():
        for row, name in enumerate(note["train_ids"]):
            place.setdefault(name, (note["train_meta"], row))
    common = set.intersection(*({*note["train_meta"]} for note in notes.values()))
    columns = [name for name in next(iter(notes.values()))["train_meta"] if name in common]
    return {"ids": list(place), "meta": {name: [meta[name][row] for meta, row in place.values()] for name in columns}}


def in_part(note: Mapping[str, Any]) -> bool:
    """Whether only the scores of some of the training images that were scored were kept, or only some were scored."""
    return "scored" in note["recipe"] or note.get("whole", {}).get("count", 0) > len(note["train_ids"])


def _kept(folder: Path, note: Mapping[str, Any]) -> tuple[int, int | None]:
    """Training images that were scored; of how many of each query's first and last the scores are here, None for all."""
    here = len(note["train_ids"])
    count = note.get("whole", {}).get("count", here)
    if count <= here:
        return here, None
    top = note["recipe"].get("top")
    if type(top) is not int or not 1 <= top <= here:
        told = f"keeps {here:,} of {count:,} scores of a picture, and {top!r} as how many of the first and last"
        raise WhenceError(told, str(folder / "scores.json"), AGAIN)
    return count, top


def scored_side(root: Path, name: str, notes: Mapping[str, Any]) -> Side:
    """Names and columns of one side as the scores have them.

    Args:
        root: the run folder.
        name: "train" or "queries".
        notes: method -> its scores.json.
    """
    if name == "queries":
        ids = next(iter(notes.values()))["query_ids"]
        wrong = next((method for method, note in notes.items() if note["query_ids"] != ids), None)
        if wrong is not None:
            raise WhenceError(f"{wrong} is of other queries than {next(iter(notes))}", str(root), "the run made again")
        return Side(ids, NO_COLUMNS)
    whole = next((note for note in notes.values() if not in_part(note)), None)
    return Side([], NO_COLUMNS) if whole is None else Side(whole["train_ids"], whole["train_meta"])


def _opened(
    folders: Mapping[str, Path], notes: Mapping[str, Any], train: Side, told: list[str]
) -> Iterator[tuple[str, Scored]]:
    """The methods whose columns are images of this run; of the others it is told why they are not shown."""
    place: dict[str, int] = {}
    for name, note in notes.items():
        rows = None
        if note["train_ids"] != train.ids or in_part(note):
            place = place or {image: row for row, image in enumerate(train.ids)}
            if not in_part(note) or any(image not in place for image in note["train_ids"]):
                told.append(f"{name} is left out: its training images are not those of the others")
                continue
            rows = np.array([place[image] for image in note["train_ids"]], np.int64)
        shape = len(note["query_ids"]), len(note["train_ids"])
        path = folders[name] / "scores.safetensors"
        opened = open_scores(path, note.get("files", {}).get(path.name), shape)
        if not opened.compared:
            told.append(
                f"{name}: written by an early version without a digest, so its scores were compared with nothing"
            )
        about = note["scale"], note["signed"], note.get("stderr_of", "")
        kept = _kept(folders[name], note)
        yield name, Scored(name, opened, note["recipe"], *about, rows, _leaning(folders[name], note), *kept)


def _leaning(folder: Path, note: Mapping[str, Any]) -> Judged | None:
    """What a method says of each query beside held-out pictures; of this query set, or nothing."""
    if not (folder / "attributable.json").is_file():
        return None
    found = readable(folder / "attributable.json", Judged)
    refuse_unexpected(found, Judged, str(folder / "attributable.json"), "it deleted, to attribute again")
    same = found["queries"] == note["recipe"].get("queries") and found["query_ids"] == note["query_ids"]
    count = {len(found["p"]), len(found["adjusted"]), len(found["stands_out"]), len(note["query_ids"])}
    return {key: found[key] for key in Judged.__annotations__} if same and len(count) == 1 else None  # type: ignore[return-value]


def _copies(root: Path, queries: Side) -> dict[str, str]:
    """The queries that look like copies, and the sentence of each; see `task.reports.copies_told`."""
    noted, _ = noted_side(root, "queries")
    if noted is None or not (root / "copies.json").is_file():
        return {}
    found = readable(root / "copies.json")
    asked, warnings = found.get("asked"), found.get("warnings")
    if not isinstance(asked, dict) or not isinstance(warnings, dict) or asked.get("queries") != noted["pictures"]:
        return {}
    return {name: plain(text) for name, text in warnings.items() if name in {*queries.ids}}


def _caption(root: Path) -> str:
    """The column of the captions."""
    found = _noted_model(root).get("caption_column")
    return found if isinstance(found, str) else CAPTION


def _model(root: Path) -> str:
    found = _noted_model(root).get("folder")
    return str((root / found).resolve()) if isinstance(found, str) else ""


def _noted_model(root: Path) -> Mapping[str, Any]:
    if not (root / "images.json").is_file():
        return {}
    found = read_json(root / "images.json", dict).get("model")
    return found if isinstance(found, dict) else {}


# ------------------------------------------------------------------------------------------------------------- shelves

LONGEST = 2000  # letters of a value that is searched


def shelf(side: Side, caption: str) -> Shelf:
    """A side with what is needed to search and filter it.

    Args:
        side: names, columns and pictures.
        caption: the column of captions, if it has one.
    """
    caption = caption if caption in side.meta else ""
    return Shelf(side, list(_facets(side.meta, len(side.ids), caption)), caption)


def _first(column: Sequence[object]) -> object:
    return next((value for value in column if value is not None), None)


def _labels(name: str, column: Sequence[object]) -> list[str]:
    """The values of a column as people read them, each worked out once."""
    known: dict[tuple[type, object], str] = {}
    for value in column:
        key = type(value), value  # 1, 1.0 and True are one key, and not one text
        if key not in known:
            known[key] = named_value(name, value)
    return [known[type(value), value] for value in column]


def _facets(meta: Columns, n: int, caption: str) -> Iterator[Facet]:
    """Columns with a telling name first, then those whose values repeat."""
    telling = [name for name in (*GROUP_COLUMNS, "licence") if name in meta]
    others = [name for name in meta if name not in telling and name != caption]
    for name in [*telling, *others]:
        labels = _labels(name, meta[name])
        names = sorted(set(labels))
        if name in telling or 1 < len(names) <= min(MOST_GROUPS, n // 2):
            place = {label: code for code, label in enumerate(names)}
            codes = np.fromiter((place[label] for label in labels), np.int64, n)
            yield Facet(name, names, codes, np.bincount(codes, minlength=len(names)))
