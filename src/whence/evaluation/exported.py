"""What was found of training images, for other programs: Hugging Face `datasets`, and FiftyOne.

    images.parquet   load_dataset("parquet", data_files="images.parquet"): `image` is the picture, read where it lies
    fiftyone.json    a list of samples as `fiftyone.Sample.from_dict` takes them; `to_fiftyone` makes a data set of it

Both name files by their absolute paths. Pictures inside of .tar or .parquet files are no files of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from whence.data.images import ImageFolder
from whence.storage.columns import plain_columns
from whence.storage.files import read_json, write_bytes, write_json
from whence.types import Images, WhenceError

PACKED = "the pictures are no files of their own, so that {} names them without showing them"


def _files(images: Images) -> list[str] | None:
    """The absolute path of each picture; None where they lie in shards, tables or memory."""
    seen = images.pictures
    if not isinstance(seen, ImageFolder):
        return None
    files = [seen.source.file(name) for name in seen.ids]
    return [str(file.absolute()) for file in files if isinstance(file, Path)] if isinstance(files[0], Path) else None


def as_datasets(path: Path, table: Mapping[str, Sequence[object]], images: Images) -> str:
    """A table that `datasets.load_dataset` reads, with the pictures as a column; returns what is to be said, "" for nothing.

    Args:
        path: of the .parquet file.
        table: a row per image; its column `image` holds their names.
        images: of the rows.
    """
    columns = plain_columns({"file_name" if name == "image" else name: values for name, values in table.items()})
    arrays = {name: pa.array(values) for name, values in columns.items()}
    arrays = {name: each.cast(pa.string()) if pa.types.is_null(each.type) else each for name, each in arrays.items()}
    features: dict[str, object] = {
        name: {"dtype": _dtype(each.type), "_type": "Value"} for name, each in arrays.items()
    }
    files = _files(images)
    if files is not None:
        of_picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        arrays["image"] = pa.array([{"bytes": None, "path": file} for file in files], of_picture)
        features["image"] = {"_type": "Image"}
    told = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    content = pa.BufferOutputStream()
    pq.write_table(pa.table(arrays).replace_schema_metadata(told), content)
    write_bytes(path, bytes(content.getvalue().to_pybytes()))
    return "" if files is not None else PACKED.format(path.name)


def _dtype(kind: pa.DataType) -> str:
    return {"double": "float64", "bool": "bool", "int64": "int64"}.get(str(kind), "string")


def fiftyone_samples(path: Path, table: Mapping[str, Sequence[object]], images: Images) -> str:
    """The samples as JSON; returns what is to be said, "" for nothing.

    Args:
        path: of the .json file.
        table: a row per image: `label` becomes `ground_truth`, `drop` tags, every other column `whence_COLUMN`.
        images: of the rows.
    """
    files = _files(images)
    if files is None:
        return "no fiftyone.json: FiftyOne shows files, and the pictures are none of their own"
    columns = plain_columns(table)
    samples = []
    for row, file in enumerate(files):
        sample: dict[str, object] = {"filepath": file, "tags": str(columns["drop"][row] or "").split()}
        if columns["label"][row] is not None:
            sample["ground_truth"] = {"_cls": "Classification", "label": columns["label"][row]}
        rest = {name: values[row] for name, values in columns.items() if name not in ("drop", "label")}
        samples.append(sample | {f"whence_{name}": value for name, value in rest.items() if value is not None})
    write_json(path, samples)
    return ""


def to_fiftyone(folder: str | Path, name: str | None = None) -> Any:
    """A `fiftyone.Dataset` of a folder of `whence clean`: lists as tags, everything else as fields.

    Args:
        folder: the folder.
        name: of the data set; FiftyOne's own choice by default.
    """
    path = Path(folder) / "fiftyone.json"
    if not path.is_file():
        raise WhenceError(
            "it is not there", str(path), "the output folder of `whence clean` on a folder of picture files"
        )
    samples = read_json(path, list)
    try:
        fiftyone = import_module("fiftyone")
    except ImportError:
        how = f"pip install fiftyone, in an environment of its own if you like: {path} is all it needs"
        raise WhenceError("it is not installed here", "fiftyone", how) from None
    dataset = fiftyone.Dataset(name)
    dataset.add_samples([fiftyone.Sample.from_dict(sample) for sample in samples])
    return dataset
