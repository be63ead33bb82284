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
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from whence.data.layout import (
    EXTENSIONS,
    METADATA,
    SPLITS,
    Columns,
    Files,
    Finding,
    Layout,
    Row,
    is_image,
    is_metadata,
    misnamed,
    some,
)

Numbered = tuple[int, Row]  # with its line number in the file


def folder_layout(folder: Path, files: Sequence[str]) -> Layout:
    """Match the files of a folder (see `walk`) with its metadata."""
    found = Layout(Files(folder))
    found.pictures = pictures = sorted(name for name in files if is_image(name))
    found.others = [name for name in files if not is_image(name)]
    tables = [name for name in found.others if is_metadata(name)]
    found.findings += misnamed(folder, pictures) + _splits(folder, pictures, tables)
    if tables:
        found.names, found.meta = _listed(folder, tables, pictures, found.findings)
    else:
        found.names = pictures
        found.meta = _folder_labels(folder, found.names, found.findings)
    if not found.names and not any(finding.level == "error" for finding in found.findings):
        found.findings.append(_no_images(folder, found.others))
    return found


def _splits(folder: Path, pictures: Sequence[str], tables: Sequence[str]) -> list[Finding]:
    """train/ and val/ inside the folder are two data sets, not two classes."""
    tops = {name.split("/")[0] for name in pictures if "/" in name}
    splits = sorted(top for top in tops if top.lower() in SPLITS)
    if not splits or any(table in METADATA for table in tables):
        return []
    if len(splits) == len(tops) and all("/" in name for name in pictures):
        what = f"holds splits ({some(splits)}), not images of one data set"
        return [Finding("error", what, str(folder), f"give one of them, such as {folder / splits[0]}")]
    what = f"sub-folders named like splits ({some(splits)}) are read together with the others"
    return [Finding("warning", what, str(folder), "give one split, or rename the folder if it is a class")]


def _folder_labels(folder: Path, names: Sequence[str], findings: list[Finding]) -> Columns:
    """The name of each image's folder, by Hugging Face's rule: all equally deep and at least two names."""
    labels = [posixpath.basename(posixpath.dirname(name)) for name in names]
    depths = {name.count("/") for name in names}
    if len(set(labels)) < 2:
        return {}
    if len(depths) > 1:
        what = "images lie at different depths, so sub-folders are not read as class labels"
        fix = "put every image in one sub-folder per class, if they are classes"
        findings.append(Finding("note", what, str(folder), fix))
        return {}
    return {"label": list[object](labels)}


def _no_images(folder: Path, others: Sequence[str]) -> Finding:
    kinds = Counter(posixpath.splitext(name)[1].lower() or "no extension" for name in others)
    accepted = f"accepted are {', '.join(EXTENSIONS)}"
    if not others:
        return Finding("error", "the folder is empty", str(folder), accepted)
    if kinds.keys() & {".zip", ".gz", ".tgz", ".zst", ".7z"}:
        accepted = (
            f"unpack it; accepted are .tar and .parquet as they are, and {accepted.removeprefix('accepted are ')}"
        )
    what = f"no images, only {some(f'{count} {kind}' for kind, count in kinds.most_common())}"
    return Finding("error", what, str(folder), accepted)


def _listed(
    folder: Path, tables: Sequence[str], pictures: Sequence[str], findings: list[Finding]
) -> tuple[list[str], Columns]:
    """The images the metadata files list, sorted, and their columns."""
    kinds = sorted({posixpath.basename(table) for table in tables})
    if len(kinds) > 1:
        findings.append(Finding("error", f"holds {' and '.join(kinds)}", str(folder), "keep one of them"))
        return [], {}
    rows: dict[str, Row] = {}
    for table in tables:
        _read_table(folder, table, rows, findings)
    names = sorted(rows)
    _compare(folder, kinds[0], names, pictures, findings)
    return names, gathered(names, [rows[name] for name in names], folder / tables[0], findings)


def gathered(
    names: Sequence[str], rows: Sequence[Mapping[str, object]], where: Path, findings: list[Finding]
) -> Columns:
    """One column per key of the rows, None where a row has none.

    Args:
        names: of the images.
        rows: their metadata.
        where: it stands, for findings.
        findings: what is wrong is added to them.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    meta = {column: [row.get(column) for row in rows] for column in columns}
    for column, values in meta.items():
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        if missing:
            what = f"column `{column}` is missing for {len(missing)} of {len(names)} images: {some(missing)}"
            findings.append(Finding("warning", what, str(where), "fill it in, or remove the column"))
    return meta


def _read_table(folder: Path, table: str, rows: dict[str, Row], findings: list[Finding]) -> None:
    """Add the rows of one metadata file under their names relative to the folder (they are relative to the file)."""
    where = str(folder / table)
    seen: dict[str, int] = {}
    try:
        content = list(READERS[posixpath.splitext(table)[1]](folder / table))
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        findings.append(Finding("error", f"cannot be read ({error})", where, "repair or remove it"))
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
        name = posixpath.join(posixpath.dirname(table), name)
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
        findings.append(Finding("error", what, where, f"accepted are {', '.join(EXTENSIONS)}"))
    missing = [name for name in names if is_image(name) and name not in present]
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
    return f"did you mean {near[0]!r} for {name!r}?" if near else "restore the files or remove their rows"


def _jsonl(path: Path) -> Iterator[Numbered]:
    # utf-8-sig: editors on Windows put a byte order mark first.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is a {type(row).__name__}, not one JSON object per line")
            yield number, row


def _csv(path: Path) -> Iterator[Numbered]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has another number of cells than the header")
            rows.append((reader.line_num, {key: value or None for key, value in row.items()}))
    numeric = {key for key in reader.fieldnames or () if _all_integers(row[key] for _, row in rows)}
    for number, row in rows:
        yield number, {key: int(value) if key in numeric and value else value for key, value in row.items()}


def _all_integers(values: Iterable[str | None]) -> bool:
    """Whether a column holds whole numbers only, written so that nothing is lost ("007" stays a name)."""
    present = [value for value in values if value is not None]
    return bool(present) and all(value.isdecimal() and str(int(value)) == value for value in present)


def _parquet(path: Path) -> Iterator[Numbered]:
    yield from enumerate(pq.read_table(path).to_pylist(), 1)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
