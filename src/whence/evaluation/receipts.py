"""Credit of a run folder: tables, a page, and a receipt that `whence replay` checks.

RUN/credit/BY/METHOD.csv, METHOD.parquet    a row per contributor and the rest
RUN/credit/BY/credit.html                   the page
RUN/credit/BY/receipt.json                  the tables, and digests of these files and of the scores they were made from
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pyarrow as pa

from whence.data.credentials import forbidden
from whence.evaluation.credit import Credit, Sums, agreement, credit, sums_of
from whence.evaluation.judging import trained_otherwise
from whence.plain import owner_of
from whence.report.credit import Listed, credit_page
from whence.report.words import LOW, question_told
from whence.storage.columns import as_csv, as_parquet
from whence.storage.files import file_digest, is_beside, read_json, write_bytes, write_json
from whence.storage.jsons import refuse_unexpected, whole
from whence.storage.notes import scored
from whence.storage.scores import load_scores
from whence.task.reports import noted_images, refuse_others
from whence.types import VERSION, Scores, WhenceError

FORMAT_VERSION = 2
RECEIPT = "receipt.json"
CREDENTIALS = "c2pa"
STRONGEST = 10
"""Images of a picture that count as having influence, where those that may not be trained on are listed."""


class Files(TypedDict):
    """What is read of a receipt that is replaced."""

    files: NotRequired[dict[str, str]]


class Receipt(TypedDict):
    """What is checked of a receipt."""

    by: str
    level: float
    files: dict[str, str]
    scores: dict[str, dict[str, str]]
    tables: dict[str, dict[str, list[Any]]]


@dataclass(frozen=True)
class Asked:
    """What credit is asked for.

    Args:
        by: the column that names the contributors.
        methods: of the run; empty for all.
        beside: a run folder of `whence values` by the same column, whose values are the truth that sums are compared with;
            None for none.
        not_allowed: the images that were not to be trained on: "column=value", or "c2pa" for those whose content credentials
            say so (see `data.credentials`); None for none.
        level: of the intervals.
    """

    by: str
    methods: Sequence[str] = ()
    beside: Path | None = None
    not_allowed: str | None = None
    level: float = 0.95


@dataclass(frozen=True)
class Told:
    """What came out.

    Args:
        folder: where it was written.
        credits: method -> shares.
        compared: method -> rank and linear correlation with each method of the values beside, by its name.
        listed: images that were not to be trained on and have influence.
        questions: method -> what was asked of the pictures, where it is not what the method asks itself; else "".
        of_errors: method -> whether the noise holds errors of its scores.
        cautions: method -> what a reader of its shares must know; "" for nothing.
    """

    folder: Path
    credits: Mapping[str, Credit]
    compared: Mapping[str, Mapping[str, tuple[float, float]]]
    listed: Sequence[Listed]
    questions: Mapping[str, str]
    of_errors: Mapping[str, bool]
    cautions: Mapping[str, str]


def write_credit(run: Path, asked: Asked) -> Told:
    """Compute and write the credit of a finished run."""
    found, beside = _scores(run, asked.methods), {} if asked.beside is None else _scores(asked.beside, ())
    sums = {method: sums_of(scores, asked.by) for method, scores in found.items()}
    truth = {method: _truth(method, scores, asked) for method, scores in beside.items()}
    for method, scores in beside.items():
        _same_question(run, method, scores, next(iter(found.values())))
    compared = {method: {name: _agree(own, other) for name, other in truth.items()} for method, own in sums.items()}
    credits = {method: credit(own, asked.level) for method, own in sums.items()}
    listed = _listed(run, found, asked.not_allowed)
    questions = {method: question_told(scores) for method, scores in found.items()}
    known = {method: each.known and bool(np.any(each.stderr)) for method, each in sums.items()}
    cautions = {method: "; ".join(filter(None, [credits[method].caution, _doubt(found[method])])) for method in found}
    told = Told(run / "credit" / asked.by, credits, compared if truth else {}, listed, questions, known, cautions)
    _write(told, run, asked, found)
    return told


def scores_of(run: Path, methods: Sequence[str], option: str) -> dict[str, Scores]:
    """Method -> its scores in a run folder; those of another model or of other training images are refused.

    Args:
        run: the run folder.
        methods: of it; empty for all.
        option: that names them, for the refusal.
    """
    there = scored(run)
    unknown = [name for name in methods if name not in there]
    if unknown:
        raise WhenceError(f"{run} holds no scores of {unknown[0]}", option, ", ".join(there))
    found = {name: load_scores(there[name]) for name in (methods or there)}
    for name, scores in found.items():
        refuse_others(run, there[name], scores.recipe)
    return found


def _scores(run: Path, methods: Sequence[str]) -> dict[str, Scores]:
    found = scores_of(run, methods, "--method")
    _refuse_several_sets(run, {name: scores.recipe.get("queries") for name, scores in found.items()})
    return found


def _refuse_several_sets(run: Path, pictures: Mapping[str, object]) -> None:
    """Shares of one set of pictures do not stand beside those of another.

    Args:
        run: the run folder.
        pictures: method -> the set that it scored.
    """
    sets: dict[object, list[str]] = {}
    for name, each in pictures.items():
        sets.setdefault(each, []).append(name)
    first, *rest = sets.values()
    if rest:
        other = ", ".join(name for names in rest for name in names)
        told = f"the scores of {other} are of other pictures than those of {', '.join(first)}"
        raise WhenceError(told, str(run), "--method, with methods of one set of pictures")


def _doubt(scores: Scores) -> str:
    """Sums over many images are steadier than scores; that they name others is worth knowing all the same."""
    found = scores.reliability
    low = 0 if found is None else int((found < LOW).sum())
    if not low:
        return ""
    return f"for {low:,} of {len(scores.query_ids):,} pictures another run would order single images otherwise"


def _truth(method: str, scores: Scores, asked: Asked) -> Sums:
    """The values of contributors by retraining; scores of `whence attribute` are none."""
    if "values" not in scores.recipe or "ledger" not in scores.recipe:
        raise WhenceError(
            f"{asked.beside}: {method} read no retrained model", "--values", "a run folder of `whence values`"
        )
    return sums_of(scores, asked.by, f"--values {asked.beside}")


def _same_question(run: Path, method: str, truth: Scores, own: Scores) -> None:
    """The values are of the pictures, of the training images and of the model that were scored."""
    other = None
    if list(truth.query_ids) != list(own.query_ids) or truth.recipe.get("queries") != own.recipe.get("queries"):
        other = "pictures than the scores", "a run on the same pictures"
    elif truth.recipe.get("train", own.recipe.get("train")) != own.recipe.get("train"):
        other = "training images than the scores", "a run on the same images"
    elif trained_otherwise(run, truth.recipe["ledger"].get("study", {})):
        other = "trainings than that of the model that was scored", "a ledger of that model"
    if other is not None:
        told, accepted = other
        raise WhenceError(f"the values of {method} are of other {told}", "--values", accepted)


def _agree(own: Sums, other: Sums) -> tuple[float, float]:
    """Over the contributors that both have: those in all coalitions have no value."""
    shared = [name for name in own.names if name in set(other.names)]
    if len(shared) < 3:
        raise WhenceError(
            f"{len(shared)} contributors have scores and values", "--values", "3 or more, by the same column"
        )
    return agreement(_only(own, shared), _only(other, shared))


def _only(sums: Sums, names: Sequence[str]) -> Sums:
    at = [list(sums.names).index(name) for name in names]
    return Sums(list(names), [sums.images[place] for place in at], sums.values[:, at], None, None)


def _listed(run: Path, found: Mapping[str, Scores], condition: str | None) -> list[Listed]:
    """The images that a condition names and that are among the strongest of any picture, by each method."""
    if condition is None:
        return []
    listed: list[Listed] = []
    by_file = _forbidden(run) if condition == CREDENTIALS else None
    for method, scores in found.items():
        marked = _named(scores, condition) if by_file is None else by_file
        for query in scores.query_ids:
            for rank, (name, score) in enumerate(scores.top(query, STRONGEST), start=1):
                if name in marked and score > 0:
                    listed.append(Listed(method, query, name, rank, score))
    return listed


def _forbidden(run: Path) -> set[str]:
    images = noted_images(run, "train")
    if images.folder is None:
        raise WhenceError("the training images are no files", str(run), "--not_allowed column=value")
    return forbidden(images.folder, list(images.images.ids))


def _named(scores: Scores, condition: str) -> set[str]:
    column, sign, value = condition.partition("=")
    if not sign or column not in scores.train_meta:
        known = ", ".join(scores.train_meta) or "metadata"
        raise WhenceError(
            f"{condition!r} names no images",
            "--not_allowed",
            f"column=value with a column of {known}; or {CREDENTIALS}, for the content credentials of the files",
        )
    owners = zip(scores.train_ids, scores.train_meta[column], strict=True)
    marked = {name for name, own in owners if owner_of(own) == value}
    if not marked:
        raise WhenceError(f"no image has {column} {value!r}", "--not_allowed", "a value that is there")
    return marked


def _write(told: Told, run: Path, asked: Asked, found: Mapping[str, Scores]) -> None:
    tables = {method: each.columns() for method, each in told.credits.items()}
    errors = {method: scores.stderr_of if told.of_errors[method] else "" for method, scores in found.items()}
    exact = {name: scores.stderr is not None and not told.of_errors[name] for name, scores in found.items()}
    exactly = {name: "nothing of these scores is drawn by chance" if each else "" for name, each in exact.items()}
    files = {}
    for method, table in tables.items():
        files[f"{method}.csv"] = as_csv(table)
        files[f"{method}.parquet"] = as_parquet(_typed(table))
        files[f"{method}-pictures.parquet"] = as_parquet(_of_pictures(told.credits[method], found[method]))
    said = {"errors": errors, "exact": exactly, "cautions": told.cautions, "questions": told.questions}
    files["credit.html"] = credit_page(asked.by, tables, told.compared, told.listed, said, asked.level)
    if (
        told.folder / RECEIPT
    ).is_file():  # what it names is ours: of methods that were asked for before, at another level
        before = read_json(told.folder / RECEIPT, Files, "delete it and run `whence credit` again")
        for name in before.get("files", {}).keys() - files.keys():
            (told.folder / Path(name).name).unlink(missing_ok=True)
    for name, data in files.items():
        write_bytes(told.folder / name, data)
    receipt = {
        "format_version": FORMAT_VERSION,
        "whence": VERSION,
        "by": asked.by,
        "level": asked.level,
        "questions": told.questions,
        "files": {name: file_digest(told.folder / name) for name in files},
        "scores": {method: _digests(run, method) for method in tables},
        "made_of": {method: _made_of(scores) for method, scores in found.items()},
        "tables": tables,
    }
    write_json(told.folder / RECEIPT, _finite(receipt))


def _of_pictures(found: Credit, scores: Scores) -> dict[str, Sequence[object]]:
    """The shares of every picture, as a long table."""
    rows = [(query, name) for query in scores.query_ids for name in found.names]
    table = {"query": [query for query, _ in rows], "contributor": [name for _, name in rows]}
    return {**table, "share": found.of_picture.ravel().tolist()}


def _digests(run: Path, method: str) -> dict[str, str]:
    return {name: file_digest(run / "scores" / method / name) for name in ("scores.json", "scores.safetensors")}


def _made_of(scores: Scores) -> dict[str, object]:
    """The digests of model and images that a result says it was made of."""
    return {key: scores.recipe[key] for key in ("checkpoints", "ledger", "train", "queries") if key in scores.recipe}


TEXTS, COUNTS = ("contributor", "advice"), ("images",)


def _typed(table: Mapping[str, Sequence[object]]) -> dict[str, pa.Array]:
    """Columns with their types: one of nothing but missing numbers would have none."""
    kinds = {name: pa.string() if name in TEXTS else pa.int64() if name in COUNTS else pa.float64() for name in table}
    return {name: pa.array(values, kinds[name]) for name, values in table.items()}


def _finite(thing: object) -> object:
    """JSON has no infinity: as text."""
    if isinstance(thing, float) and math.isinf(thing):
        return "infinite"
    if isinstance(thing, Mapping):
        return {key: _finite(value) for key, value in thing.items()}
    return [_finite(value) for value in thing] if isinstance(thing, list) else thing


def check_receipt(folder: Path) -> list[str]:
    """What of a receipt no longer holds, in words; nothing where all of it does.

    The scores it was made from are what they were, and give the same tables.

    Args:
        folder: RUN/credit/BY.
    """
    folder = folder.resolve()
    path, run = folder / RECEIPT, folder.parent.parent
    otherwise = "a new one: run `whence credit` again"
    receipt = read_json(path, dict, otherwise)
    if whole(number := receipt.get("format_version")) and number > FORMAT_VERSION:
        raise WhenceError(f"written by a newer whence (format {number})", str(path), "an upgrade")
    if receipt.get("format_version") != FORMAT_VERSION:
        raise WhenceError("written by an older whence", str(path), otherwise)
    refuse_unexpected(receipt, Receipt, str(path), otherwise)
    beside = [name for name in (*receipt["files"], *receipt["scores"]) if not is_beside(name)]
    if beside:
        raise WhenceError(f"names {beside[0]!r}, which is no file beside it", str(path), otherwise)
    different = [
        f"{folder / name} is not what it was, or is gone"
        for name, noted in receipt["files"].items()
        if not (folder / name).is_file() or file_digest(folder / name) != noted
    ]
    for method, digests in receipt["scores"].items():
        now = _digests(run, method) if all((run / "scores" / method / name).is_file() for name in digests) else {}
        changed = [name for name in digests if digests[name] != now.get(name)]
        if changed:
            told = f"{run / 'scores' / method}: {', '.join(changed)} is not what {path} was made from, or is gone"
            different.append(told)
            continue
        again = credit(sums_of(load_scores(run / "scores" / method), receipt["by"]), receipt["level"]).columns()
        if not _alike(receipt["tables"][method], _finite(again)):
            different.append(f"{path}: the same scores of {method} give other shares")
    return different


def _alike(one: object, other: object) -> bool:
    """Equal but for the rounding of another processor."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_alike(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
    return one == other
