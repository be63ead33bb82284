"""Any metadata, any folder: read, or refused in one line that names a file; never a traceback, never silence about what is
left out. 100 cases of each; WHENCE_FUZZ=1000 for more."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from test_packed import encoded, write_tar
from whence.data.classes import Classes
from whence.data.images import ImageFolder, image_folder
from whence.data.inspect import look_at
from whence.data.layout import ABOUT, FEW, is_hidden
from whence.storage.columns import plain_column, plain_value
from whence.storage.scores import load_scores, save_scores
from whence.types import Scores, WhenceError

CASES = int(os.environ.get("WHENCE_FUZZ", "100"))
fuzz = settings(
    max_examples=CASES, deadline=None, derandomize=CASES == 100, suppress_health_check=[HealthCheck.too_slow]
)
PICTURES = [encoded(i, (4, 4)) for i in range(8)]

VALUES = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**70), 2**70)
    | some.floats()
    | some.text(some.characters(), max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
LABELS = some.integers(-2, 12) | some.floats() | some.sampled_from(["cat", "dog", ""]) | some.booleans() | VALUES
KEYS = some.sampled_from(["label", "text", "creator", "query", "rank", "train_query", "score", "", "é"]) | some.text(
    max_size=3
)
MODELS = some.sampled_from([Classes(), Classes(None, 2), Classes(None, 10), Classes(("cat", "dog"), 2)])


def looked(folder: Path, classes: Classes, skip: bool) -> tuple[ImageFolder | None, str]:
    """The images, None where they were refused, and all that was said."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            images = image_folder(folder, 4, classes=classes, skip=skip)
        except WhenceError as error:
            line = str(error)
            assert len(line.splitlines()) == 1, line
            assert str(folder) in line, line
            return None, line
    findings = [str(finding) for finding in look_at(folder).findings(4)]
    return images, "\n".join([*(str(warning.message) for warning in told), *findings])


def saved(images: ImageFolder, folder: Path) -> None:
    values = torch.arange(len(images), dtype=torch.float32)[None]
    scores = Scores(values, ["q"], images.ids, {}, train_meta=images.meta)
    save_scores(folder, scores, 1)
    assert load_scores(folder).train_meta == scores.train_meta
    scores.to_csv(folder / "scores.csv")
    scores.to_parquet(folder / "all.parquet")


@fuzz
@given(some.lists(some.dictionaries(KEYS, LABELS, max_size=4), min_size=1, max_size=4), MODELS)
def test_metadata(rows: list[dict[str, Any]], classes: Classes) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "data"
        folder.mkdir()
        for i, row in enumerate(rows):
            (folder / f"{i}.png").write_bytes(PICTURES[i])
            row["file_name"] = f"{i}.png"
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        images, told = looked(folder, classes, skip=False)
        if images is None:
            assert classes.count is not None, told  # only classes make a column matter
            return
        saved(images, Path(home) / "run")
        members: dict[str, bytes] = {}
        for i, row in enumerate(rows):
            free = {name: value for name, value in row.items() if name != "file_name"}
            members |= {f"{i}.png": PICTURES[i], f"{i}.json": json.dumps(free).encode()}
        packed, _ = looked(write_tar(Path(home) / "a.tar", members), classes, skip=False)
        assert packed is not None
        assert packed.meta == images.meta
        assert (packed.labels is None) == (images.labels is None)
        assert all(plain_column(column).values == column for column in images.meta.values())
        if images.labels is not None:
            raw = [plain_value(row["label"]) for row in rows]  # infinity is a text wherever metadata is read
            assert images.labels.tolist() == (raw if images.classes is None or raw[0] == images.labels[0] else
                                              [images.classes.index(label) for label in raw])  # fmt: skip
            assert classes.count is None or int(images.labels.max()) < classes.count
        elif any("label" in row for row in rows):
            assert "`label`" in told


FOLDERS = some.sampled_from(
    ["", "cat/", "dog/", "train/", "a.b/", "x-val/", "é/", ".hidden/", "__MACOSX/", "data/cat/", "[x]/"]
)
NAMES = some.sampled_from(
    ["0.png", "1.JPG", "a.v1.png", "0.txt", "0.npy", "1.heic", "README.md", "metadata.csv", "metadata.jsonl", "classes.txt",
     "train-0.tar", "x-val-0.tar", "a.tar", "B.TAR", "a.parquet", "b.parquet", "x.arrow", "y.zip", ".DS_Store", "é.png",
     "no ending", "._0.png", "[1].png"]
)  # fmt: skip
ENTRY = some.tuples(FOLDERS, NAMES, some.integers(0, 3))


def content(path: Path, kind: int) -> None:
    """A file of this name, mostly as it should be; kind 3 is damaged."""
    number = sum(map(ord, str(path.name))) % 8
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.suffix.lower()
    if ending == ".tar":
        write_tar(
            path, {f"{i}.{part}": PICTURES[i] if part == "png" else b"x" for i in range(2) for part in ("png", "txt")}
        )
    elif ending == ".parquet":
        pq.write_table(pa.table({"image": PICTURES[:2]} if kind else {"a": [1.0, float("nan")]}), path)
    elif path.name == "metadata.jsonl":
        path.write_text(json.dumps({"file_name": "0.png", "label": kind}) + "\n")
    elif path.name == "metadata.csv":
        path.write_text("file_name,label\n0.png,cat\n")
    elif path.name == "classes.txt":
        path.write_text("cat\ndog\n" if kind else "")
    else:
        path.write_bytes(PICTURES[number])
    if kind == 3:
        path.write_bytes(path.read_bytes()[:40])


@fuzz
@given(some.lists(ENTRY, min_size=1, max_size=9, unique_by=lambda entry: entry[:2]), MODELS, some.booleans())
def test_layouts(entries: list[tuple[str, str, int]], classes: Classes, skip: bool) -> None:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "data"
        for parent, name, kind in entries:
            content(folder / f"{parent}{name}", kind)
        images, told = looked(folder, classes, skip)
        findings = look_at(folder).findings(4, skip)
        assert all(len(str(finding).splitlines()) == 1 for finding in findings)
        if images is None:
            return
        saved(images, Path(home) / "run")
        used = {name.split(".tar/")[0] if ".tar/" in name.lower() else name for name in images.ids}
        used |= {name.rpartition("/")[0] for name in images.ids}
        every = [f"{parent}{name}" for parent, name, _ in entries]
        rest = [
            name for name in every if name not in used and not is_hidden(name) and f"{name}/0.png" not in images.ids
        ]
        silent = [name for name in rest if Path(name).name not in ("metadata.csv", "metadata.jsonl", "classes.txt")]
        assert not silent or "skipped" in told or "left out" in told or "not read" in told, (silent, told)
        matter = [name for name in silent if not ABOUT.fullmatch(Path(name).name)]
        assert skip or len(matter) <= FEW
