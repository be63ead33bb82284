"""What lies in a folder of image files, and what is wrong with it: names and metadata only, no file's pixels are read.

The layout is Hugging Face's `imagefolder`: plain files, one sub-folder per class, or a metadata file with `file_name`.
Pictures packed in shards are the matter of `webdataset` and `parquet`; `sources` tells which it is. Everything wrong is
collected as findings, so that `images.image_folder` (raises the first error) and `inspect.inspect_folder` (lists all)
cannot disagree about what is accepted.
"""

from __future__ import annotations

import csv
import json
import posixpath
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from whence.data.layout import (
    ACCEPTED,
    CLASSES,
    METADATA,
    SPLITS,
    Files,
    Finding,
    Layout,
    Row,
    is_hidden,
    is_image,
    is_metadata,
    misnamed,
    some,
    split_of,
    train_first,
)
from whence.storage.columns import plain_column, plain_value, valid_text
from whence.storage.opening import regular

Numbered = tuple[int, Row]  # with its line number in the file
WHOLE, DECIMAL = re.compile(r"0|[1-9][0-9]{0,17}"), re.compile(r"-?[0-9]+(\.[0-9]*)?")


def folder_layout(folder: Path, files: Sequence[str]) -> Layout:
    """Match the files of a folder (see `walk`) with its metadata."""
    found = Layout(Files(folder))
    found.pictures = pictures = sorted(name for name in files if is_image(name))
    found.others = [name for name in files if not is_image(name)]
    tables = [name for name in found.others if is_metadata(name)]
    found.findings += misnamed(folder, pictures) + _splits(folder, pictures, tables)
    if tables:
        _listed(folder, tables, pictures, found)
    else:
        found.names = pictures
        folder_labels(folder, found)
    read = {*found.names, *tables, CLASSES}
    found.left_out = [name for name in pictures if name not in read]
    found.skipped = [name for name in found.others if name not in read]
    if not found.names and not any(finding.level == "error" for finding in found.findings):
        found.findings.append(_no_images(folder, found.others))
    return found


def _splits(folder: Path, pictures: Sequence[str], tables: Sequence[str]) -> list[Finding]:
    """train/ and val/ inside the folder are two data sets, not two classes."""
    if any(table in METADATA for table in tables):
        return []
    # Where every picture is in one, also deeper down and as a word of a name: data/train/cat/0.png, cifar-test/0.png.
    parts: dict[str | None, str] = {}
    for name in pictures:
        above = posixpath.dirname(name)
        parts.setdefault(split_of(f"{above}/"), above)
    if len(parts) > 1 and None not in parts:
        what = f"holds splits ({some(sorted(filter(None, parts)))}), not images of one data set"
        split, above = min(
            ((split, above) for split, above in parts.items() if split), key=lambda one: train_first(one[0])
        )
        one = next(parent for parent in reversed([above, *_above(above)]) if split_of(f"{parent}/") == split)
        return [Finding("error", what, str(folder), f"give one of them, such as {folder / one}")]
    tops = {name.split("/")[0] for name in pictures if "/" in name}
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    if not splits or len(tops) < 2:
        return []
    what = f"sub-folders named like splits ({some(splits)}) are read together with the others"
    return [Finding("warning", what, str(folder), "give one split, or rename the folder if it is a class")]


def _above(path: str) -> list[str]:
    """The folders that a folder is in, nearest first."""
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def folder_labels(folder: Path, found: Layout) -> None:
    """The name of each image's folder, by Hugging Face's rule: all equally deep and at least two names."""
    names = found.names
    labels = [posixpath.basename(posixpath.dirname(name)) for name in names]
    if len({name.count("/") for name in names}) > 1:
        if len(set(labels)) > 1:
            what = "images lie at different depths, so sub-folders are not read as class labels"
            fix = "put every image in one sub-folder per class, if they are classes"
            found.findings.append(Finding("note", what, str(folder), fix))
        return
    # The folder itself may be the class, where pictures to explain are all of one.
    found.folders = [label or folder.absolute().name for label in labels]
    if len(set(labels)) > 1:
        found.labels = list[object](labels)
        found.meta = {"label": list[object](labels)}


def _no_images(folder: Path, others: Sequence[str]) -> Finding:
    kinds = Counter(posixpath.splitext(name)[1].lower() or "no extension" for name in others)
    accepted = ACCEPTED
    if not others:
        return Finding("error", "the folder is empty", str(folder), accepted)
    if kinds.keys() & {".zip", ".gz", ".tgz", ".zst", ".7z", ".xz", ".bz2", ".rar"}:
        accepted = (
            f"unpack it; accepted are .tar and .parquet as they are, and {accepted.removeprefix('accepted are ')}"
        )
    what = f"no images, only {some(f'{count} {kind}' for kind, count in kinds.most_common())}"
    return Finding("error", what, str(folder), accepted)


# ------------------------------------------------------------------------------------------------------------- metadata


def _listed(folder: Path, tables: Sequence[str], pictures: Sequence[str], found: Layout) -> None:
    """The images the metadata files list, sorted, and their columns."""
    kinds = sorted({posixpath.basename(table) for table in tables})
    if len(kinds) > 1:
        found.findings.append(Finding("error", f"holds {' and '.join(kinds)}", str(folder), "keep one of them"))
        return
    rows: dict[str, Row] = {}
    spelled = _spelling(pictures)
    for table in tables:
        _read_table(folder, table, rows, found.findings, spelled)
    found.names = sorted(rows)
    _compare(folder, kinds[0], found.names, pictures, found.findings)
    fill(found, [rows[name] for name in found.names], folder / tables[0])


def fill(found: Layout, rows: Sequence[Mapping[str, object]], where: Path) -> None:
    """The rows as the layout's metadata: one column per key, None where a row has none, in types that can be saved."""
    names = found.names
    for key in dict.fromkeys(key for row in rows for key in row):
        column, values = valid_text(key), [row.get(key) for row in rows]
        if column == "label":
            found.labels = [plain_value(value) for value in values]
        plain = plain_column(values)
        found.meta[column] = plain.values
        if plain.changed and column != "label":  # what labels are wrong is told of them
            what = f"column `{column}` holds {plain.changed}, and is read as texts"
            fix = "write values of one kind if they are groups to be told apart"
            found.findings.append(Finding("warning", what, str(where), fix))
        missing = [name for name, value in zip(names, plain.values, strict=True) if value is None]
        if missing:
            what = f"column `{column}` is missing for {len(missing)} of {len(names)} images: {some(missing)}"
            found.findings.append(Finding("warning", what, str(where), "fill it in, or remove the column"))


def _spelling(pictures: Sequence[str]) -> Callable[[str], str]:
    """A name as the disk has it: Unicode spells "é" in two ways, and disks differ. Its own where two would do."""
    there, forms = set(pictures), defaultdict(list)
    for name in pictures:
        forms[unicodedata.normalize("NFC", name)].append(name)

    def spelled(name: str) -> str:
        same = [name] if name in there else forms.get(unicodedata.normalize("NFC", name), [])
        return same[0] if len(same) == 1 else name

    return spelled


def _read_table(
    folder: Path, table: str, rows: dict[str, Row], findings: list[Finding], spelled: Callable[[str], str]
) -> None:
    """Add the rows of one metadata file under their names relative to the folder (they are relative to the file)."""
    where = str(folder / table)
    seen: dict[str, int] = {}
    try:
        content = list(READERS[posixpath.splitext(table)[1]](regular(folder / table)))
    except (OSError, ValueError, csv.Error, pa.ArrowException, RecursionError) as error:
        what = f"cannot be read ({' '.join(str(error).split())})"
        findings.append(Finding("error", what, where, "repair or remove it"))
        return
    if not content:
        findings.append(Finding("error", "lists no image", where, "write one row per image, or remove the file"))
    unnamed = [number for number, row in content if not (isinstance(row.get("file_name"), str) and row["file_name"])]
    if unnamed:
        findings.append(_no_file_name(where, unnamed, dict(content)[unnamed[0]]))
        return
    for number, row in content:
        name = posixpath.normpath(str(row.pop("file_name")).replace("\\", "/"))
        if name.startswith(("/", "../")) or name == "..":
            # A metadata file may come from anywhere; it must not make us read files elsewhere.
            what, fix = f"line {number}: file_name leads out of the folder", "file names are relative to the metadata"
            findings.append(Finding("error", what, where, fix))
            continue
        name = spelled(posixpath.join(posixpath.dirname(table), name))
        if name in rows:
            what = f"{name} is listed twice (lines {seen.get(name, '?')} and {number})"
            findings.append(Finding("error", what, where, "keep one row per image"))
        rows[name], seen[name] = row, number


def _no_file_name(where: str, lines: Sequence[int], row: Row) -> Finding:
    what = f"line {lines[0]} has no `file_name`, only {some(row, 6) or 'nothing'}"
    what += f" (and so {len(lines) - 1} more lines)" if len(lines) > 1 else ""
    meant = [key for key, value in row.items() if isinstance(value, str) and is_image(value)]
    fix = f"rename the key {meant[0]!r} to 'file_name'" if meant else "each row names its image in `file_name`"
    return Finding("error", what, where, fix)


def _compare(folder: Path, table: str, names: Sequence[str], pictures: Sequence[str], findings: list[Finding]) -> None:
    """Images listed but absent, absent from the list, or listed though not an image."""
    present, where = set(pictures), str(folder)
    foreign = [name for name in names if not is_image(name)]
    if foreign:
        what = f"{table} lists {len(foreign)} files that are not images: {some(foreign)}"
        findings.append(Finding("error", what, where, ACCEPTED))
    missing = [name for name in names if is_image(name) and name not in present]
    hidden = [name for name in missing if is_hidden(name)]
    if hidden:
        what = f"{table} lists {len(hidden)} hidden files: {some(hidden)}"
        findings.append(Finding("error", what, where, "rename them, or remove their rows"))
    missing = [name for name in missing if name not in hidden]
    if missing:
        what = f"{table} lists {len(missing)} files that are not there: {some(missing)}"
        findings.append(Finding("error", what, where, _resembling(missing[0], pictures)))
    unlisted = sorted(present - set(names))
    if unlisted and names:
        what = f"{len(unlisted)} images are not listed in {table} and are left out: {some(unlisted)}"
        findings.append(Finding("warning", what, where, "add a row for each if the model was trained on them"))


def _resembling(name: str, pictures: Sequence[str]) -> str:
    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", posixpath.splitext(posixpath.basename(text))[0]).casefold()

    near = [picture for picture in pictures if plain(picture) == plain(name)]
    if near and unicodedata.normalize("NFC", near[0]) == unicodedata.normalize("NFC", name):
        return f"did you mean {near[0]!a} for {name!a}? they look the same; write it as the file is named"
    return f"did you mean {near[0]!r} for {name!r}?" if near else "restore the files or remove their rows"


def _jsonl(path: Path) -> Iterator[Numbered]:
    # utf-8-sig: editors on Windows put a byte order mark first.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is a {type(row).__name__}, not one JSON object per line")
            yield number, row


def _once(pairs: Sequence[tuple[str, object]]) -> Row:
    """An object whose keys are all different: of two values for one key, JSON readers keep either."""
    row = dict(pairs)
    if len(row) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {name!r} is there twice")
    return row


def _csv(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        mark = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
        if mark is not None:
            raise ValueError(f"its columns are separated by {mark!r}; accepted are commas")
        if len(set(names)) < len(names):
            raise ValueError(f"column {Counter(names).most_common(1)[0][0]!r} is there twice")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has another number of cells than the header")
            rows.append((reader.line_num, {key: value or None for key, value in row.items()}))
    kinds = {name: _number_kind(name, [cell for _, row in rows if (cell := row[name]) is not None]) for name in names}
    for number, row in rows:
        yield number, {name: value if value is None else kinds[name](value) for name, value in row.items()}


def _number_kind(column: str, values: Sequence[str]) -> Callable[[str], object]:
    """int for a column of whole numbers, written so that nothing is lost ("007" stays a name); texts stay texts.

    Labels may be any numbers, too: a table with gaps writes 3 as 3.0, and as text that would be the name of a class.
    """
    if values and all(WHOLE.fullmatch(value) for value in values):
        return int
    return float if column == "label" and values and all(DECIMAL.fullmatch(value) for value in values) else str


def _parquet(path: Path) -> Iterator[Numbered]:
    yield from enumerate(pq.read_table(path).to_pylist(), 1)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
