"""Everything that a run refuses before it computes: one list, which `attribute` goes through and `whence doctor` tells.

`attribute` stops at the first, and comes to the late ones only when it loads what they are about, if it has to; the doctor
goes through all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from whence.data.images import subset
from whence.data.layout import Finding, some
from whence.features.rows import identity, prepare
from whence.methods.before import check_before
from whence.methods.registry import spelled
from whence.models import OPENING, Recorded, check_conditions, check_parts, try_parts
from whence.storage.files import read_json
from whence.storage.notes import notes_of
from whence.task.drawn import Sampling, drawable, trajectory_of
from whence.task.memory import are_pictures, check_ranges, ready
from whence.training.checkpoints import study_on
from whence.types import Images, Method, Task, WhenceError

if TYPE_CHECKING:
    from whence.task.request import Request

MODEL, TRAIN, QUERIES = "model", "training images", "query images"
FOLDER = "model folder"


@dataclass(frozen=True)
class Check:
    """One thing that a run may refuse.

    Args:
        about: what it is about: `MODEL`, `TRAIN` or `QUERIES`.
        run: raises the refusal.
        needs: what must have been opened before: one of those three, or `FOLDER`.
        opens: which of them is open from then on.
        late: whether a run gets there only when it loads what it is about.
    """

    about: str
    run: Callable[[Request], object]
    needs: tuple[str, ...] = (MODEL,)
    opens: str = ""
    late: bool = False


def _of_folder(check: Callable[[Path], object], request: Request) -> None:
    check(Path(request.model))


def _sides(request: Request) -> None:
    """Numbers in its configuration, the names of its classes, and the columns that it reads."""
    _ = request.size, request.opened.channels, request.classes_known, request.query_column


def _drawn(request: Request) -> None:
    if isinstance(request.queries, Sampling):
        drawable(request.opened, request.queries, request.engine, request.resolution)


def _parts(request: Request) -> None:
    if not (ready(request.train) and ready(request.queries)):
        check_parts(request.opened, request.size, request.size)


def _weights(request: Request) -> None:
    prepare(request.opened.final, request.engine)


def _seen(name: str, images: Images, request: Request, column: str | None) -> None:
    if are_pictures(request.opened, name, images, request.size):
        check_conditions(request.opened, images, column)


def _train(request: Request) -> None:
    check_ranges(request.opened.forward, request.train_images)
    _seen("train", request.train_images, request, request.caption_column)


def _queries(request: Request) -> None:
    check_ranges(request.opened.forward, request.train_images, request.query_images)
    _seen("queries", request.query_images, request, request.query_column)


CHECKS: tuple[Check, ...] = (
    Check(MODEL, partial(_of_folder, OPENING[0]), needs=(), opens=FOLDER),
    *(Check(MODEL, partial(_of_folder, check), needs=(FOLDER,)) for check in OPENING[1:]),
    Check(MODEL, lambda request: request.opened, needs=(FOLDER,), opens=MODEL),
    Check(MODEL, _sides),
    Check(MODEL, _drawn),
    Check(MODEL, _parts),
    Check(MODEL, lambda request: request.others),
    Check(MODEL, _weights, late=True),
    Check(MODEL, lambda request: try_parts(request.opened, request.engine, request.size), late=True),
    Check(TRAIN, lambda request: request.check_apart(), needs=()),
    Check(TRAIN, lambda request: request.train_images, opens=TRAIN),
    Check(TRAIN, _train, needs=(MODEL, TRAIN)),
    Check(TRAIN, lambda request: request.check_claim(), needs=(MODEL, TRAIN)),
    Check(QUERIES, lambda request: request.query_images, needs=(MODEL, TRAIN), opens=QUERIES),
    Check(QUERIES, _queries, needs=(MODEL, TRAIN, QUERIES)),
)


def check_methods(request: Request, methods: Mapping[str, Method]) -> None:
    """Refuse what methods cannot do with the model of a request, before anything is drawn or encoded for them.

    Args:
        request: what is to be attributed.
        methods: by name.
    """
    for check in CHECKS:
        if not check.late and check.about != QUERIES:
            check.run(request)
    opened, train, root = request.opened, request.train_images, Path(request.root)
    plain = opened.vae is None and not opened.reads_text  # of others it is known once they are encoded
    study = study_on(opened.folder, request.adapter, train if plain else None)
    drawn, engine = request.queries, request.engine
    if isinstance(drawn, Sampling):
        sampled: Recorded | None = Recorded(opened, (), (), drawn.seed, drawn.steps, root, engine)
    else:
        sampled = trajectory_of(opened, request.query_images, root, engine)
        refuse_other_pictures(root, methods, identity(request.query_images), plain)
    chain = (*opened.checkpoints, opened.final)
    asked = Task(opened.forward, chain, train, subset(train, [0]), root, engine, study=study, sampled=sampled)
    for name, method in methods.items():
        check_before(name, method, asked)


def copies(train: Iterable[tuple[str, str]], queries: Sequence[tuple[str, str]]) -> list[Finding]:
    """Pictures to explain that are training images, byte for byte.

    Args:
        train: (name, digest) of the training images.
        queries: the same of the pictures to explain.
    """
    same = {digest: name for name, digest in train}
    found = [f"{name} = {same[digest]}" for name, digest in queries if digest in same]
    if not found:
        return []
    what = f"{len(found)} of {len(queries)} images are byte-identical to training images: {some(found)}"
    fix = "each finds itself first; give pictures that the model made, unless this is meant"
    return [Finding("warning", what, QUERIES, fix)]


def refuse_other_pictures(root: Path, methods: Iterable[str], shown: str, seen: bool = True) -> None:
    """Nothing is lost: scores of other pictures that a method left in the run folder are not replaced.

    Args:
        root: the run folder.
        methods: their names.
        shown: `identity` of the pictures to explain.
        seen: whether as the network sees them; else as they look, which is known of those of the last run alone.
    """
    note = read_json(root / "images.json", dict).get("queries", {}) if (root / "images.json").is_file() else {}
    looks = {note["seen"]: note["pictures"]} if isinstance(note, dict) and {"seen", "pictures"} <= note.keys() else {}
    for name in map(spelled, methods):
        folder = root / "scores" / name
        if not (folder / "scores.json").is_file():
            continue
        told = notes_of(folder)
        scored = told["recipe"].get("queries", shown)
        before = scored if seen else looks.get(scored, shown)
        if before != shown:
            count, named = len(told["query_ids"]), ", ".join(told["query_ids"][:3])
            named += " ..." if count > 3 else ""
            what = f"holds the scores of other pictures ({count}: {named}), or of these as they were"
            raise WhenceError(what, str(folder), "another run folder (--output_dir), or delete these scores")
