"""Images: read from a folder in Hugging Face's `imagefolder` layout, from webdataset shards, Parquet files or a
`datasets.Dataset`, or handed over as a tensor.

Pictures are read lazily: opening lists them and hashes their bytes, `batch` decodes the pixels it is asked for
(`whence.data.pixels` tells how). The same pictures in files, in shards and in tables are the same images. Every image has a
readable name and the digest of its bytes; the digest keys its noise and its features, so that renaming, reordering or
regrouping images never changes what is computed for one of them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from whence.data import parquet as tables
from whence.data.classes import NO_CLASSES, Classes, class_labels
from whence.data.decoding import read_picture
from whence.data.hashing import (
    Cache,
    Stamp,
    common_size,
    described,
    fingerprint_of,
    hash_files,
    in_pixels,
    read_cache,
    refuse_inside,
    stamp_of,
    write_cache,
)
from whence.data.layout import Layout, PictureSource, skipped
from whence.data.memory import InMemory, Range, as_tensor
from whence.data.pixels import fit, is_cropped, to_x0
from whence.data.sources import layout_of
from whence.diffusion.noise import key_of
from whence.storage.arrays import tensor_digest
from whence.types import Batch, Images, WhenceError, expect

# ------------------------------------------------------------------------------------------------------- image folders


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Encoded pictures (see `image_folder`, `dataset_images`). Satisfies `whence.types.Images`; pixels stay on disk.

    Args:
        folder: the path that was opened; None for a data set in Python.
        source: where the pictures lie in it.
        ids: file names relative to the folder, or shard/member, or table/row.
        digests: of the bytes of each picture.
        meta: columns of metadata, a value per picture.
        stamps: (bytes, mtime_ns) of each file when it was hashed.
        size: (width, height) of all pictures as they are read.
        channels: 3 (RGB) or 1 (grey).
        resolution: side of the square they are brought to; None for pictures as they are.
        labels: class indices [n] int64, or None.
        classes: names of the classes, or None.
    """

    folder: Path | None
    source: PictureSource
    ids: Sequence[str]
    digests: Sequence[str]
    meta: Mapping[str, Sequence[object]]
    stamps: Sequence[Stamp]
    size: tuple[int, int]
    channels: int
    resolution: int | None
    labels: Tensor | None
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def preprocess(self) -> dict[str, object]:
        return {"resolution": self.resolution, "channels": self.channels}

    @property
    def empty_caption(self) -> None:
        return None

    @property
    def pictures(self) -> ImageFolder:
        return self

    def batch(self, rows: Sequence[int]) -> Batch:
        """x0 [b, C, H, W] float32 in [-1, 1]; cond has "class_labels" [b] int64 where the folder has labels."""
        rows = [int(row) for row in rows]
        width, height = self.size
        # Laid out as [b, C, H, W] from the start: channels-last strides would choose other convolution kernels.
        pixels = np.empty((len(rows), self.channels, height, width), np.uint8)
        for slot in sorted(range(len(rows)), key=lambda slot: rows[slot]):  # tables are read forward
            pixels[slot] = self._pixels(rows[slot])
        return Batch(to_x0(pixels), _keys(self.digests, rows), _conditions(self.labels, rows))

    def _pixels(self, row: int) -> np.ndarray:
        name = self.ids[row]
        where = self.source.where(name)
        if stamp_of(self.source.holder(name)) != self.stamps[row]:
            # The digest keys the noise and the stored features; it must be the digest of these pixels.
            raise WhenceError(f"{where}: the file changed after the folder was opened; open the folder again")
        picture = read_picture(self.source.file(name), where, self.channels)
        if is_cropped(picture.size, self.resolution):
            folder = self.folder or "data set"
            warnings.warn(f"{folder}: of pictures that are not square only the centre is read", stacklevel=3)
        picture = fit(picture, self.resolution)
        if picture.size != self.size:
            # The only way here: a PNG that tells its orientation after its pixels, where `header_size` does not look.
            raise WhenceError(
                f"{where}: {in_pixels(picture.size)} once upright, not {in_pixels(self.size)}; give --resolution"
            )
        return np.asarray(picture).reshape(*picture.size[::-1], self.channels).transpose(2, 0, 1)

    def describe(self) -> dict[str, object]:
        return _describe("image_folder", self)


def image_folder(
    folder: str | Path,
    resolution: int | None = None,
    channels: int | None = None,
    classes: Sequence[str] | Classes | None = None,
    cache: str | Path | None = None,
    skip: bool = True,
) -> ImageFolder:
    """Open a folder of images; no pixel is read yet.

    Accepted: webdataset shards (`data.webdataset`), Parquet or Arrow files (`data.parquet`): a folder of them, one file, or
    a pattern like `data/train-*.parquet`. Or Hugging Face's `imagefolder`: plain files, nested or not; one sub-folder per
    class; or `metadata.jsonl` (.csv, .parquet) with `file_name` and free columns (creator, license, label, text ...),
    which become `meta`. Where there is metadata, the images are those it lists and its `label` column gives the classes;
    else the names of the sub-folders do, if all images lie equally deep and there are at least two names: the rules of
    Hugging Face `datasets`. Rows are sorted by file name; packed ones keep their order. docs/files.md has it as a table.

    Args:
        folder: where the pictures are; a folder, a packed file, or a pattern of packed files.
        resolution: side in px of the square every image is brought to; None takes them as they are, all of one size.
        channels: 3 (RGB, also where it is None) or 1 (grey).
        classes: the class names in the order the model was trained with, or all that is known of its classes
            (`data.classes`); None for the sorted names found here. Open queries with `classes=train.classes`: a folder
            that holds only horses would otherwise call them class 0.
        cache: a JSON file of digests, outside the folder, trusted for files whose name, size and mtime are unchanged. Where
            it has the same pictures in another order, they keep that order: files may be renamed.
        skip: False to refuse a folder in which more than a few files are not read. They are named either way.

    Raises:
        WhenceError: what makes the rows ambiguous; `whence.data.inspect.inspect_folder` lists all of it at once.
    """
    expect(folder, (str, Path), "folder", "a folder of pictures; whence.tensor_images for those in memory")
    folder = Path(folder)
    if cache is not None:
        refuse_inside(Path(cache).parent, folder)
    found, before = layout_of(folder), Cache() if cache is None else read_cache(Path(cache), folder)
    cached = before.files
    images = open_layout(found, folder, Reading(resolution, channels, _known(classes), skip), before)
    stamped = zip(images.ids, images.stamps, images.digests, strict=True)
    files = {name: (*stamp, digest) for name, stamp, digest in stamped}
    if cache is not None and (files != cached or list(files) != list(cached)):
        write_cache(Path(cache), folder, files)
    return images


def dataset_images(
    dataset: object,
    resolution: int | None = None,
    channels: int | None = None,
    classes: Sequence[str] | Classes | None = None,
    image_column: str | None = None,
) -> ImageFolder:
    """The pictures of a `datasets.Dataset` (of one split, not streamed), decoded when they are asked for.

    Args:
        dataset: what `datasets.load_dataset(..., split=...)` returns.
        resolution, channels, classes: as in `image_folder`.
        image_column: the column of pictures; None for `image`, or the only one.
    """
    if not isinstance(dataset, tables.Dataset):
        accepted = "a datasets.Dataset of one split, such as load_dataset(..., split='train')"
        raise WhenceError(f"a {type(dataset).__name__} is no data set", accepted=accepted)
    found = tables.dataset_layout(dataset, image_column)
    return open_layout(found, None, Reading(resolution, channels, _known(classes)), Cache())


@dataclass(frozen=True)
class Reading:
    """How the images of a folder are read; the fields as in `image_folder`."""

    resolution: int | None = None
    channels: int | None = None
    classes: Classes = NO_CLASSES
    skip: bool = True


def _known(classes: Sequence[str] | Classes | None) -> Classes:
    if classes is None or isinstance(classes, Classes):
        return classes or NO_CLASSES
    return Classes(tuple(classes))


def open_layout(found: Layout, folder: Path | None, reading: Reading, before: Cache) -> ImageFolder:
    """The images of a layout.

    Args:
        found: what lies in the folder (`data.sources.layout_of`).
        folder: the path that was opened, None for a data set in Python.
        reading: how they are read.
        before: what was hashed before; only pictures whose file has changed since are hashed again.
    """
    resolution, channels = reading.resolution, 3 if reading.channels is None else reading.channels
    if channels not in (1, 3):
        raise WhenceError(f"channels={channels}; 1 (grey) and 3 (RGB) are accepted")
    if resolution is not None and resolution < 1:
        raise WhenceError(f"resolution={resolution}; a positive number of pixels is accepted")
    where, source = folder or Path("data set"), found.source
    for finding in [*found.findings, *skipped(found, where, reading.skip)]:
        if finding.level == "error":
            raise WhenceError(f"{finding.what}; {finding.fix}", finding.where)
        if finding.level == "warning":
            warnings.warn(str(finding), stacklevel=3)
    labels = class_labels(found, reading.classes, where)
    if labels.problem and None not in found.meta["label"]:  # gaps have been told
        warnings.warn(f"{where}: {labels.problem}; write all names, or all class indices", stacklevel=3)
    digests, stamps = hash_files(source, found.names, before.files)
    order = before.order_of(digests)
    size = common_size(source, where, found.names) if resolution is None else (resolution, resolution)
    return ImageFolder(
        folder,
        source,
        [found.names[row] for row in order],
        [digests[row] for row in order],
        {name: [column[row] for row in order] for name, column in found.meta.items()},
        [stamps[row] for row in order],
        size,
        channels,
        resolution,
        None if labels.numbers is None else torch.tensor([labels.numbers[row] for row in order], dtype=torch.int64),
        labels.names,
    )


# ------------------------------------------------------------------------------------------------- tensors and subsets


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images held in memory (see `tensor_images`). Satisfies `whence.types.Images`.

    Args:
        x0: [n, ...].
        ids: names.
        digests: of each image.
        meta: columns of metadata, a value per image.
        labels: class indices [n] int64, or None.
        value_range: what was said of the numbers (see `data.memory`), None for nothing.
    """

    x0: Tensor
    ids: Sequence[str]
    digests: Sequence[str]
    meta: Mapping[str, Sequence[object]]
    labels: Tensor | None
    value_range: Range | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self):,} images of {' x '.join(map(str, self.x0.shape[1:]))})"

    @property
    def preprocess(self) -> dict[str, object]:
        return {}

    @property
    def empty_caption(self) -> None:
        return None

    @property
    def pictures(self) -> TensorImages:
        return self

    def batch(self, rows: Sequence[int]) -> Batch:
        rows = [int(row) for row in rows]
        return Batch(self.x0[rows], _keys(self.digests, rows), _conditions(self.labels, rows))

    def describe(self) -> dict[str, object]:
        return _describe("tensor_images", self)


def tensor_images(
    x0: InMemory,
    ids: Sequence[str] | None = None,
    meta: Mapping[str, Sequence[object]] | None = None,
    labels: Sequence[int] | Tensor | None = None,
    value_range: Range | None = None,
) -> TensorImages:
    """Images that are in memory already.

    The digest of an image is the sha256 of its shape, dtype and bytes; do not write into x0 afterwards.

    Args:
        x0: a tensor or an array [n, ...] of any dtype, a list of equal ones, or a list of pictures of PIL.
        ids: unique names; "0", "1", ... padded to sort by default.
        meta: columns of metadata, n values each.
        labels: class indices [n]; None for images without classes.
        value_range: the numbers that are black and white in x0, such as (0, 1) or (0, 255), which are brought to -1 and 1;
            (-1, 1) for images as the network takes them. Not said, they are taken as they are, and denoisers refuse
            those that never fall below zero.
    """
    x0, value_range = as_tensor("x0", x0, value_range)
    expect(meta, (Mapping, type(None)), "meta", 'columns by name, like {"creator": ["anna", "ben", ...]}')
    count = len(x0)
    ids = [f"{row:0{len(str(count - 1))}d}" for row in range(count)] if ids is None else [str(name) for name in ids]
    columns = {} if meta is None else {name: list(column) for name, column in meta.items()}
    index = None if labels is None else class_indices(labels)
    lengths = {"ids": len(ids), **{f"meta {name!r}": len(column) for name, column in columns.items()}}
    if index is not None:
        lengths["labels"] = len(index)
        columns.setdefault("label", index.tolist())
    for name, length in lengths.items():
        if length != count:
            raise WhenceError(f"{name} has length {length}, but there are {count} images")
    refuse_repeated(ids)
    for name, image in zip(ids, x0, strict=True):
        if not torch.isfinite(image).all():
            raise WhenceError(f"image {name!r} has values that are not finite")
    return TensorImages(x0, ids, [tensor_digest(image) for image in x0], columns, index, value_range)


def class_indices(labels: Sequence[int] | Tensor) -> Tensor:
    """Labels [n] as int64: whole numbers from 0. Anything else would be truncated, or counted from the end."""
    where, accepted = "labels", "class indices [n], one for each image: 0, 1, 2 ..."
    try:
        found = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise WhenceError(f"they are no numbers ({error})", where, accepted) from None
    if found.ndim != 1:
        kind = "soft labels or one-hot ones" if found.ndim == 2 else "no class indices"
        raise WhenceError(f"shape {list(found.shape)}: {kind}", where, f"{accepted}, such as labels.argmax(1)")
    numbers = found.real.to(torch.int64)
    wrong = (numbers != found).nonzero().flatten().tolist()
    if wrong:
        value = found[wrong[0]].item()
        raise WhenceError(f"{value} is no whole number: regression targets are no classes", where, accepted)
    if len(numbers) and int(numbers.min()) < 0:
        raise WhenceError(f"{int(numbers.min())} is below 0", where, f"{accepted}; leave images without a class out")
    return numbers


def refuse_repeated(names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise WhenceError(f"image {name!r} occurs {times} times; each image needs a name of its own")


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of other images, under the same ids and digests.

    Args:
        images: the others.
        rows: of them.
        ids: names of the rows.
        digests: of the rows.
        meta: columns of the rows.
        labels: class indices of the rows, or None.
    """

    images: Images
    rows: Sequence[int]
    ids: Sequence[str]
    digests: Sequence[str]
    meta: Mapping[str, Sequence[object]]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def preprocess(self) -> dict[str, object]:
        return dict(self.images.preprocess)

    @property
    def pictures(self) -> Images:
        """What these images look like, where the network sees latents of them; themselves elsewhere."""
        inside = self.images.pictures
        return self if inside is self.images else subset(inside, self.rows)

    @property
    def empty_caption(self) -> Mapping[str, Tensor] | None:
        return self.images.empty_caption

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.images.batch([self.rows[int(row)] for row in rows])

    def describe(self) -> dict[str, object]:
        return _describe("subset", self)


def subset(images: Images, rows: Sequence[int]) -> Subset:
    """A view of the given rows, in the given order; each image keeps its name, its noise and its features."""
    rows = [int(row) for row in rows]
    if any(not 0 <= row < len(images) for row in rows) or len(set(rows)) != len(rows):
        raise WhenceError(f"rows of a subset are distinct numbers from 0 to {len(images) - 1}")
    return Subset(
        images,
        rows,
        [images.ids[row] for row in rows],
        [images.digests[row] for row in rows],
        {name: [column[row] for row in rows] for name, column in images.meta.items()},
        None if images.labels is None else images.labels[rows],
    )


# ----------------------------------------------------------------------------------------------- identity and recipes


def fingerprint(images: Images) -> str:
    """One sha256 for everything `batch` returns: the ordered digests, the class labels, resolution and channels.

    Names, folders and other columns are left out: while the order stays, they change nothing that a model sees.
    """
    return fingerprint_of(images.digests, None if images.labels is None else images.labels.tolist(), images.preprocess)


def _describe(kind: str, images: Images) -> dict[str, object]:
    return described(kind, len(images), images.preprocess, fingerprint(images))


def _keys(digests: Sequence[str], rows: Sequence[int]) -> Tensor:
    return torch.tensor([key_of(digests[row]) for row in rows], dtype=torch.int64)


def _conditions(labels: Tensor | None, rows: Sequence[int]) -> dict[str, Tensor]:
    return {} if labels is None else {"class_labels": labels[rows]}
