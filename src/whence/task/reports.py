"""Scores and their report: computed for a task, written into its run folder, and written again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from whence.data.hashing import DIGESTS
from whence.data.images import image_folder
from whence.data.owners import standing_for
from whence.features.rows import identity
from whence.methods import METHODS, build, check_needs
from whence.methods.candidates import Candidates
from whence.methods.columns import fitted, told
from whence.methods.errors import DRAWS, PROJECTED
from whence.methods.question import Question
from whence.methods.strongest import Strongest
from whence.plain import digest
from whence.report.cite import DATE
from whence.report.page import NO_WARNINGS, Known, render
from whence.report.removed import NoteOfRemoved, Removed, shown_of
from whence.report.words import ERRORS, LOW, question_told
from whence.storage.files import file_digest, read_json, readable, write_bytes, write_json
from whence.storage.jsons import refuse_unexpected
from whence.storage.notes import NoteOfImages, notes_of, of_other_model, scored
from whence.storage.owned import MANIFEST, claimed
from whence.storage.scores import load_scores, save_scores
from whence.task.about import abouts
from whence.task.checks import refuse_other_pictures
from whence.task.drawn import check_drawn
from whence.task.judged import judged_told
from whence.task.references import NOTE, References, leanings
from whence.types import Images, Method, Scores, Task, WhenceError, describe


def _seen(note: Mapping[str, Any], found: Images) -> str | None:
    """The identity of these pictures as the network saw them, None where the note is of others."""
    return note.get("seen") if note.get("pictures") == identity(found) else None


def _silent(line: str) -> None:
    """Nothing is said."""


def explain(
    task: Task,
    methods: Mapping[str, Mapping[str, object]],
    title: str,
    facts: Mapping[str, str],
    candidates: Candidates | None = None,
    say: Callable[[str], None] = _silent,
    references: References | None = None,
    asked_about: Question | None = None,
    top: Strongest | None = None,
) -> Path:
    """Run methods, save their scores, and write the report; returns its path.

    Args:
        task: the question.
        methods: name -> settings.
        title: the headline.
        facts: lines about model and data, name -> text.
        candidates: the training images that are scored, named by a method that runs first and is kept like the others, with
            its settings among `methods` if it is there; all of them where None.
        say: what is done with the line that tells how many are scored.
        references: held-out pictures that say whether the pictures lean on single images at all; None for none.
        asked_about: what of the queries; None for what the methods ask themselves.
        top: how many of the strongest and weakest images of each query keep their scores; all where None.
    """
    results: dict[str, Scores] = {}
    refuse_other_pictures(
        task.root, [*methods, *([] if candidates is None else [candidates.by])], identity(task.queries)
    )
    missed = _of_others(task.root, methods)
    facts = {**facts, DATE: date.today().isoformat()}
    with claimed(task.root, task.folder_of(task.train)):
        if candidates is not None:
            candidates = replace(candidates, settings=methods.get(candidates.by, candidates.settings))
        asked = methods if candidates is None else {candidates.by: candidates.settings, **methods}
        for name in asked:
            check_needs(name, task)  # the last one, too, before the first has computed for a night
        if references is not None:
            references.check(task, asked)
        ready = {name: build(name, task.forward, settings) for name, settings in asked.items()}
        if candidates is not None:
            candidates.check(ready)
        note: Mapping[str, object] = {}
        if asked_about is not None:
            shape = task.queries.batch([0]).x0.shape[1:]
            ready = {name: asked_about.asked(name, method, task.forward, shape) for name, method in ready.items()}
            asked_about.keep(task.root)
            note = {"question": describe(asked_about)}
        for name, method in ready.items():
            ready[name] = fitted(method, task)
            if line := told(method, ready[name], task):
                say(f"{name}: {line}")
        for name, method in ready.items():
            if top is not None:
                found = top.score(task, method)
            else:
                found = method(task) if candidates is None else candidates.score(task, method)
            # What `whence replay` builds the method from again.
            call = {"method": name, "settings": describe(asked[name]), **note}
            results[name] = replace(found, recipe={**found.recipe, "call": call})
            save_scores(task.root / "scores" / name, results[name])
            _say_noise(name, results[name])
            _compare(task, name, method, results[name], references, say)
            if candidates is not None and name == candidates.by:
                task = candidates.named(task, found)
                say(f"scored: {len(task.to_score):,} of {len(task.train):,} images, named by {name}")
    results = {name: results[name] for name in [*methods, *(asked.keys() - methods.keys())]}
    beside = {name: notes_of(path)["recipe"] for name, path in scored(task.root).items()}
    shown = identity(task.queries)
    other = [name for name, recipe in beside.items() if name not in results and recipe.get("queries", shown) != shown]
    _say_left_out(other, task.root, "this run explains")
    sides = task.train.pictures, task.queries.pictures
    path = write_report(task.root, results, *sides, title, facts, False, copies_told(task.root, *sides))
    note_page(task.root, title, facts, list(results), missed)
    return path


def _say_noise(name: str, scores: Scores) -> None:
    """Warn of scores that another run would hardly give again."""
    found = scores.reliability
    if found is None or not bool((found < LOW).any()):
        return
    low, lowest, of = int((found < LOW).sum()), float(found.nan_to_num(1).min()), scores.stderr_of
    drawn = ERRORS[of][0] if of in ERRORS else f"other {of}"
    own = of.partition(";")[0] in (DRAWS, PROJECTED)
    more = "masks" if "masks" in of else "--draws, or --noise shared" if own else "--draws"
    told = f"{name}: the scores of {low} of {len(found)} pictures depend mostly on what was drawn for them"
    warnings.warn(
        f"{told} (reliability down to {lowest:.2f}): {drawn} would name other images; what helps: more {more}",
        stacklevel=3,
    )


def note_page(
    root: Path, title: str, facts: Mapping[str, str], methods: Sequence[str], missed: Sequence[str] = ()
) -> None:
    """Note what a page is made of, so that it can be written again, and its digests.

    Args:
        root: the run folder, in which it was written.
        title: its headline.
        facts: its lines about model and data.
        methods: on it.
        missed: what lay beside it by its note before, and is missed where it is gone.
    """
    files = {name: file_digest(root / name) for name in ("report.html", "gallery.png")}
    page: dict[str, object] = {"title": title, "facts": list(facts.items()), "methods": list(methods), "files": files}
    notes = (str(path.relative_to(root)) for path in sorted(root.glob(f"scores/*/{NOTE}")))
    there = [name for name in (*BESIDE, *notes) if (root / name).is_file()]
    page["beside"] = list(dict.fromkeys([*there, *missed]))
    write_json(root / "report.json", page)


def _of_others(root: Path, methods: Iterable[str]) -> list[str]:
    """What the note of the page names beside the scores of other methods than these, which are computed anew."""
    if not (root / "report.json").is_file():
        return []
    try:
        beside = read_json(root / "report.json", Page, ONCE_MORE).get("beside", ())
    except WhenceError:  # damaged: it is about to be written anew
        return []
    computed = {f"scores/{method}/{NOTE}" for method in methods}
    return [name for name in beside if Path(name).name == NOTE and name not in computed]


def _compare(
    task: Task, name: str, method: Method, found: Scores, references: References | None, say: Callable[[str], None]
) -> None:
    """Keep which pictures stand out against the references, and say how many; without references nothing stays of others."""
    folder = task.root / "scores" / name
    if references is None:
        (folder / NOTE).unlink(missing_ok=True)
        return
    judged = references.judge(task, method, found)
    references.write(folder, judged, task)
    m, count = len(task.queries), sum(judged.stands_out)
    say(f"{name}: {count} of {m} pictures lean on single images more than {len(references.images)} references do")
    if judged.doubt:
        warnings.warn(judged.doubt, stacklevel=3)


def write_report(
    folder: Path,
    results: Mapping[str, Scores],
    train: Images,
    queries: Images,
    title: str,
    facts: Mapping[str, str],
    anew: bool = True,
    warnings: Mapping[str, str] = NO_WARNINGS,
) -> Path:
    """Write `report.html` and `gallery.png` into a folder; returns the path of the page.

    Args:
        folder: where they are written.
        results: method -> scores.
        train: the training images.
        queries: the pictures that are explained.
        title: the headline.
        facts: lines about model and data, name -> text; methods that do not ask the model are named besides.
        anew: whether a page that would stay as it is is written, too.
        warnings: name of a picture -> what is to be known of it before any score.
    """
    alone = [name for name in results if name in METHODS and METHODS[name].pictures_alone]
    if alone:
        facts = {**facts, "Without the model": f"{', '.join(alone)}: of the pictures alone, whatever the model learned"}
    facts = {**facts, **judged_told(folder, results)}
    kept = {name: leanings(folder / "scores" / name, scores) for name, scores in results.items()}
    leaning = {name: each for name, each in kept.items() if each is not None}
    told = {name: question_told(scores) for name, scores in results.items()}
    if any(told.values()):
        each = "; ".join(f"{name}: {text or 'as the method asks'}" for name, text in told.items())
        facts = {**facts, "Question": next(iter(told.values())) if len({*told.values()}) == 1 else each}
    happened = removed_told(folder, train, queries, results)
    known = Known(warnings, leaning, abouts(results), happened)
    files = render(results, train, queries, title, facts, known)
    for name, content in files.items():
        write_bytes(folder / name, content, anew)
    return folder / "report.html"


COPIES, REMOVED = "copies.json", "removed.json"
TOLD = {
    COPIES: "what looks like a copy",
    NOTE: "which pictures lean on single images",
    REMOVED: "what happened without the images that were named",
}
BESIDE = (COPIES, REMOVED, "config.toml")
"""What a run folder may hold besides, by its report.json, so that it is missed where it goes."""


class AskedOfCopies(TypedDict):
    """Of which images copies.json is."""

    train: str
    queries: str


class Copies(TypedDict):
    """What a report reads of copies.json."""

    asked: AskedOfCopies
    warnings: dict[str, str]


class Page(TypedDict):
    """What report.json holds. files: digests of what lies beside it (earlier versions noted none)."""

    title: str
    facts: list[tuple[str, str]]
    methods: list[str]
    files: NotRequired[dict[str, str]]
    beside: NotRequired[list[str]]


def copies_told(root: Path, train: Images, queries: Images) -> dict[str, str]:
    """The pictures that look like copies, by name, and the sentence of each; empty where these were not looked at.

    Args:
        root: the run folder, which may hold what `evaluation.copies.looked` found.
        train: the training images.
        queries: the pictures.
    """
    if not (root / COPIES).is_file():
        return {}
    found = readable(root / COPIES, Copies)
    same = found["asked"]["train"] == identity(train) and found["asked"]["queries"] == identity(queries)
    if not same:
        told = "it is of other pictures or training images: what looks like a copy is not told"
        warnings.warn(f"{root / COPIES}: {told}; `whence copies` looks again, or remove it", stacklevel=3)
    return dict(found["warnings"]) if same else {}


def removed_told(root: Path, train: Images, queries: Images, results: Mapping[str, Scores]) -> Removed | None:
    """What happened without the images that these scores name, where that was tried with these images and pictures.

    Args:
        root: the run folder, which may hold what `evaluation.taken_away` found.
        train: the training images.
        queries: the pictures.
        results: method -> scores.
    """
    if not (root / REMOVED).is_file():
        return None
    note = read_json(root / REMOVED, NoteOfRemoved, f"the folder without {REMOVED}")
    if (note["train"], note["queries"]) != (identity(train), identity(queries)):
        return None
    other = [name for name, of in note["scores"].items() if name not in results or digest(results[name].values) != of]
    if other:
        told = f"{root / REMOVED} is of other scores of {', '.join(other)}: {TOLD[REMOVED]} is not told on the page"
        warnings.warn(told, stacklevel=3)
        return None
    return shown_of(note)


@dataclass(frozen=True)
class Noted:
    """The images of one side of a finished run, found again.

    Args:
        images: as they look; what stands for the images of each owner, where those were scored.
        known: what recipes may call them: by their pixels, and as the network saw them.
        folder: where they are.
    """

    images: Images
    known: tuple[str, str | None]
    folder: Path | None


def noted_images(root: Path, name: str, folder: Path | None = None) -> Noted:
    """The images of one side of a finished run, from what it noted of them.

    Args:
        root: the run folder.
        name: "train" or "queries".
        folder: where they are now; None for where they were.
    """
    if not (root / "images.json").is_file():
        raise _no_images(root)
    note = read_json(root / IMAGES, dict, ONCE_MORE).get(name)
    refuse_unexpected(note, NoteOfImages | None, str(root / IMAGES), ONCE_MORE)
    if note is None:
        raise WhenceError(f"the {name} images of {root} were in memory; use whence.task.write_report in Python")
    where, cache = folder or root / note["folder"], root / DIGESTS if name == "train" else None
    check_drawn(where)
    found = image_folder(where, note["resolution"], note["channels"], note["classes"], cache)
    images = standing_for(found, note["by"], note["players"]) if "by" in note else found
    return Noted(images, (identity(found), _seen(note, found)), found.folder)


def refuse_others(root: Path, folder: Path, recipe: Mapping[str, Any]) -> None:
    """Refuse scores of other training images, or of another model, than those of the run that they lie in.

    Args:
        root: the run folder.
        folder: of the scores.
        recipe: of the scores.
    """
    if recipe.get("train") not in (None, *(known := known_images(root, "train"))) and known:
        told = f"scores of other training images than {root / IMAGES} tells of"
        raise WhenceError(told, str(folder), MADE_HERE)
    if of_other_model(root, recipe):
        raise WhenceError(f"scores of another model than {root / MANIFEST} tells of", str(folder), MADE_HERE)


MADE_HERE = "those that were made here: it removed, and `whence attribute` once more"


def known_images(root: Path, name: str) -> list[str]:
    """What recipes may call the images of one side of a run; nothing where it noted none."""
    note = read_json(root / IMAGES, dict, ONCE_MORE).get(name) if (root / IMAGES).is_file() else None
    refuse_unexpected(note, NoteOfImages | None, str(root / IMAGES), ONCE_MORE)
    return [] if note is None else [note["pictures"], note["seen"]]


def _no_images(root: Path) -> WhenceError:
    return WhenceError(f"{root} does not say where its images are; {ONCE_MORE}")


IMAGES, ONCE_MORE = "images.json", "run `whence attribute` in it once more"


def report_again(root: Path, train: Path | None = None, queries: Path | None = None) -> Path:
    """The report of a finished run, with all methods that have scores in it.

    Args:
        root: the run folder.
        train: where the training images are now; None for where they were. Those that were scored and no others.
        queries: where the pictures are now, likewise.
    """
    there = set(scored(root))  # refuses what is no run folder
    if not (root / IMAGES).is_file():
        raise _no_images(root)
    page = read_json(root / "report.json", Page, ONCE_MORE) if (root / "report.json").is_file() else _new_page(root)
    order = [name for name in page["methods"] if name in there]
    results = {name: load_scores(root / "scores" / name) for name in [*order, *sorted(there - {*order})]}

    def images(name: str, option: str, folder: Path | None) -> Images:
        noted = noted_images(root, name, folder)
        known = noted.known
        other = [method for method, scores in results.items() if scores.recipe.get(name, known[0]) not in known]
        if len(other) == len(results):
            raise WhenceError(f"{noted.folder} holds other images than {other[0]} was computed for; give {option}")
        for method in other:
            del results[method]
        _say_left_out(other, root, f"{noted.folder} holds")
        return noted.images

    _leave_out_other_models(root, results)
    sides = images("train", "--train_data_dir", train), images("queries", "--query_data_dir", queries)
    gone = [name for name in page.get("beside", ()) if Path(name).name in TOLD and not (root / name).is_file()]
    for name in gone:
        warnings.warn(f"{root / name} is gone: {TOLD[Path(name).name]} is not told on the page", stacklevel=2)
    told = copies_told(root, *sides)
    path = write_report(root, results, *sides, page["title"], dict(page["facts"]), warnings=told)
    note_page(root, page["title"], dict(page["facts"]), page["methods"] or list(results), page.get("beside", ()))
    return path


TITLE = "Which training images made these pictures?"


def _new_page(root: Path) -> Page:
    """What stands above the scores of a run that has no page yet: those of `whence.attribute` have none."""
    note = read_json(root / IMAGES, dict, ONCE_MORE)
    model = note.get("model")
    about = {"Model": model, "Training images": note.get("train"), "Pictures explained": note.get("queries")}
    folders = {name: one["folder"] for name, one in about.items() if isinstance(one, dict) and "folder" in one}
    facts = [(name, os.path.relpath(root / str(folder))) for name, folder in folders.items()]
    return {"title": TITLE, "facts": facts, "methods": []}


def _leave_out_other_models(root: Path, results: dict[str, Scores]) -> None:
    """Take out scores that were computed of another model than the run is of, and say so."""
    other = [name for name, scores in results.items() if of_other_model(root, scores.recipe)]
    if len(other) == len(results):
        raise WhenceError(f"its scores are of another model than {MANIFEST} tells of", str(root), ONCE_MORE)
    for name in other:
        del results[name]
    if other:
        told = f"{root}: the scores of {', '.join(other)} are of another model than the run, and are not on the page"
        warnings.warn(told, stacklevel=3)


def _say_left_out(methods: Sequence[str], root: Path, those: str) -> None:
    if methods:
        told = f"{root}: the scores of {', '.join(methods)} are of other images than {those}, and are not on the page"
        warnings.warn(told, stacklevel=3)
