"""The data room: folders of images, tensors of images, and what is told about folders that are not as they should be."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

from errors import refuses
from whence.data import hashing, saving
from whence.data import pixels as pictures
from whence.data.decoding import ORIENTATION
from whence.data.images import fingerprint, image_folder, subset, tensor_images
from whence.data.inspect import inspect_folder
from whence.data.saving import save_png
from whence.diffusion.noise import key_of
from whence.types import Images, WhenceError, describe, digest


def pixels(seed: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8), **options: object) -> np.ndarray:
    """Save a random picture; what was saved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = pixels(seed, size)
    Image.fromarray(array).save(path, **options)
    return array


def x0_of(array: np.ndarray) -> torch.Tensor:
    """The definition: pixel / 127.5 - 1, channels first."""
    array = array if array.ndim == 3 else array[:, :, None]
    return torch.tensor(array.transpose(2, 0, 1).tolist(), dtype=torch.float32) / 127.5 - 1


def rows_to(path: Path, *rows: dict | str) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def levels(findings: list, text: str) -> list[str]:
    return [finding.level for finding in findings if text in str(finding)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures without labels or metadata, some of them nested."""
    for seed, name in enumerate(["b.png", "a.png", "deep/er/d.png", "deep/c.png", "e.png"]):
        put(tmp_path / "images" / name, seed)
    return tmp_path / "images"


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_plain_folder(folder: Path) -> None:
    images = image_folder(folder)
    assert isinstance(images, Images)
    assert list(images.ids) == ["a.png", "b.png", "deep/c.png", "deep/er/d.png", "e.png"]
    assert list(images.digests) == [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in images.ids]
    batch = images.batch(range(5))
    assert batch.x0.dtype == torch.float32
    for row, seed in enumerate([1, 0, 3, 2, 4]):
        assert torch.equal(batch.x0[row], x0_of(pixels(seed)))
    assert batch.keys.tolist() == [key_of(value) for value in images.digests]
    assert batch.cond == {}
    assert images.meta == {}


def test_hidden_files_and_foreign_files_are_no_images(folder: Path) -> None:
    for name in [".hidden.png", ".git/x.png", "__MACOSX/y.png"]:
        put(folder / name, 9)
    (folder / "notes.txt").write_text("no image")
    assert len(image_folder(folder)) == 5


@pytest.mark.parametrize("channels", [1, 3])
def test_strides_are_those_of_a_fresh_tensor(folder: Path, channels: int) -> None:
    x0 = image_folder(folder, channels=channels).batch([0, 1]).x0
    assert x0.stride() == torch.empty(x0.shape).stride()


@pytest.mark.parametrize("groups", [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 0], [3], [2, 1]]])
def test_values_do_not_depend_on_the_grouping(folder: Path, groups: list[list[int]]) -> None:
    images = image_folder(folder, resolution=5)
    together = images.batch(range(5))
    for group in groups:
        batch = images.batch(group)
        assert torch.equal(batch.x0, together.x0[group])
        assert torch.equal(batch.keys, together.keys[group])


def test_rows_may_be_a_tensor_or_empty(folder: Path) -> None:
    images = image_folder(folder)
    assert torch.equal(images.batch(torch.tensor([2, 0])).x0, images.batch([2, 0]).x0)
    assert images.batch([]).x0.shape == (0, 3, 8, 8)
    assert images.batch([]).keys.dtype == torch.int64


def test_renamed_and_shuffled_files_keep_their_keys(tmp_path: Path) -> None:
    for seed, (one, other) in enumerate([("a", "z"), ("b", "y"), ("c", "x")]):
        put(tmp_path / "one" / f"{one}.png", seed)
        put(tmp_path / "other" / f"{other}.png", seed)
    one, other = image_folder(tmp_path / "one"), image_folder(tmp_path / "other")
    assert one.batch([0, 1, 2]).keys.tolist() == other.batch([2, 1, 0]).keys.tolist()
    assert len(set(one.batch([0, 1, 2]).keys.tolist())) == 3


def test_opening_reads_no_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = put(tmp_path / "0.png"), (tmp_path / "0.png").read_bytes()
    for number in range(500):
        (tmp_path / f"{number}.png").write_bytes(content[1])
    opened, loaded = [], []
    real_open, real_load = Image.open, ImageFile.ImageFile.load
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: opened.append(1) or real_open(*args, **kwargs))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(1) or real_load(self))
    images = image_folder(tmp_path, resolution=8)
    assert (len(images), len(opened), len(loaded)) == (500, 0, 0)
    images = image_folder(tmp_path)  # sizes come from the headers
    assert (len(images), len(opened), len(loaded)) == (500, 500, 0)
    images.batch([0, 1, 2])
    assert len(opened) == 503
    assert len(loaded) >= 3


def test_a_file_changed_behind_our_back_is_refused(folder: Path) -> None:
    images = image_folder(folder)
    put(folder / "b.png", seed=77)
    os.utime(folder / "b.png", ns=(1, 1))
    images.batch([0])
    with refuses("b.png: the file changed"):
        images.batch([0, 1])
    (folder / "b.png").unlink()
    with refuses("b.png: cannot be read"):
        images.batch([1])


# ------------------------------------------------------------------------------------------------- labels and metadata


def test_class_folders(tmp_path: Path) -> None:
    for seed, name in enumerate(["horse/0.png", "cat/1.png", "horse/2.png", "ape/3.png"]):
        put(tmp_path / name, seed)
    images = image_folder(tmp_path)
    assert images.meta["label"] == ["ape", "cat", "horse", "horse"]
    assert images.classes == ("ape", "cat", "horse")
    assert images.batch([3, 0, 1]).cond["class_labels"].tolist() == [2, 0, 1]
    assert images.batch([0]).cond["class_labels"].dtype == torch.int64


def test_queries_take_the_classes_of_the_training_images(tmp_path: Path) -> None:
    for name in ["train/cat/0.png", "train/horse/1.png", "queries/horse/2.png", "odd/zebra/3.png", "odd/cat/4.png"]:
        put(tmp_path / name)
    train = image_folder(tmp_path / "train")
    rows_to(tmp_path / "queries" / "metadata.jsonl", {"file_name": "horse/2.png", "label": "horse"})
    queries = image_folder(tmp_path / "queries", classes=train.classes)
    assert queries.batch([0]).cond["class_labels"].tolist() == [1]
    with refuses("'zebra' is not a class; the classes are cat, horse"):
        image_folder(tmp_path / "odd", classes=train.classes)


@pytest.mark.parametrize("names", [["one/a.png", "one/b.png"], ["one/a.png", "two/deep/b.png"], ["one/a.png", "b.png"]])
def test_folders_that_are_no_classes(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        put(tmp_path / name)
    images = image_folder(tmp_path)
    assert images.meta == {}
    assert images.batch([0]).cond == {}
    # Pictures to explain are often of one class, which has a number where the classes are known.
    known = image_folder(tmp_path, classes=["two", "one"]).batch([0]).cond
    assert known == (
        {"class_labels": torch.tensor([1])}
        if len({name.count("/") for name in names}) == 1 and names[1].startswith("one/b")
        else {}
    )


def test_metadata_columns(folder: Path) -> None:
    rows_to(
        folder / "metadata.jsonl",
        "\ufeff" + json.dumps({"file_name": "e.png", "creator": "Eve", "label": 3}),
        "",
        # Legal inside a JSON string, though str.splitlines would break the line there.
        json.dumps({"file_name": "./deep\\c.png", "label": 0, "text": "line\u2028separator"}, ensure_ascii=False),
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = image_folder(folder)
    assert list(images.ids) == ["deep/c.png", "e.png"]
    assert images.meta == {"label": [0, 3], "text": ["line\u2028separator", None], "creator": [None, "Eve"]}
    assert images.batch([1, 0]).cond["class_labels"].tolist() == [3, 0]
    assert images.classes is None
    assert sorted(str(warning.message).split(": ")[1][:12] for warning in told) == [
        "3 images are", "column `crea", "column `text",
    ]  # fmt: skip
    warnings.simplefilter("ignore")  # pytest restores the filters
    with refuses("label 3 of 3 classes"):
        image_folder(folder, classes=["a", "b", "c"])


def test_metadata_of_sub_folders_names_files_relative_to_itself(tmp_path: Path) -> None:
    for creator in ("ann", "bob"):
        put(tmp_path / creator / "0.png")
        rows_to(tmp_path / creator / "metadata.jsonl", {"file_name": "0.png", "creator": creator})
    images = image_folder(tmp_path)
    assert list(images.ids) == ["ann/0.png", "bob/0.png"]
    assert images.meta == {"creator": ["ann", "bob"]}


def test_metadata_above_splits_makes_them_one_data_set(tmp_path: Path) -> None:
    for name in ("train/0.png", "val/1.png"):
        put(tmp_path / name)
    rows_to(tmp_path / "metadata.jsonl", {"file_name": "train/0.png"}, {"file_name": "val/1.png"})
    assert list(image_folder(tmp_path).ids) == ["train/0.png", "val/1.png"]


def test_metadata_csv_keeps_whole_numbers_and_only_those(folder: Path) -> None:
    names = ["a.png", "b.png", "deep/c.png", "deep/er/d.png", "e.png"]
    lines = [f"{name},{10 - row},00{row},{row or ''}" for row, name in enumerate(names)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label,creator,year", *lines]))
    with pytest.warns(UserWarning, match="`year` is missing for 1 of 5 images: a.png"):
        images = image_folder(folder)
    assert images.meta["label"] == [10, 9, 8, 7, 6]
    assert images.meta["creator"] == ["000", "001", "002", "003", "004"]
    assert images.meta["year"] == [None, 1, 2, 3, 4]
    assert images.batch([0]).cond["class_labels"].tolist() == [10]


def test_metadata_parquet(folder: Path) -> None:
    table = pa.table({"file_name": ["e.png", "a.png"], "license": ["MIT", "CC0"]})
    pq.write_table(table, folder / "metadata.parquet")
    with pytest.warns(UserWarning, match="3 images are not listed"):
        assert image_folder(folder).meta == {"license": ["CC0", "MIT"]}


@pytest.mark.parametrize("values", [["cat", None], ["cat", 1], [0, -1], [0.5, 1.0], [True, False], [["a"], ["b"]]])
def test_labels_that_are_no_classes_give_no_condition(tmp_path: Path, values: list) -> None:
    for row in range(2):
        put(tmp_path / f"{row}.png", row)
    rows_to(tmp_path / "metadata.jsonl", *({"file_name": f"{row}.png", "label": values[row]} for row in range(2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = image_folder(tmp_path)
    assert images.meta["label"] == (["cat", "1"] if values == ["cat", 1] else values)  # one type for each column
    assert images.batch([0]).cond == {}
    assert levels(inspect_folder(tmp_path), "`label`") == ["warning"]


# ------------------------------------------------------------------------------------------------------ kinds of pixels


def test_grey(tmp_path: Path) -> None:
    array = pixels(0, channels=1)
    Image.fromarray(array).save(tmp_path / "grey.png")
    assert torch.equal(image_folder(tmp_path, channels=1).batch([0]).x0[0], x0_of(array))
    assert torch.equal(image_folder(tmp_path).batch([0]).x0[0], x0_of(array).expand(3, -1, -1))
    with refuses("channels=4; 1 "):
        image_folder(tmp_path, channels=4)


def test_colour_read_as_grey_is_its_luma(tmp_path: Path) -> None:
    array = put(tmp_path / "colour.png").astype(np.float64)
    luma = array @ [0.299, 0.587, 0.114]
    x0 = image_folder(tmp_path, channels=1).batch([0]).x0[0, 0]
    assert torch.allclose((x0 + 1) * 127.5, torch.tensor(luma, dtype=torch.float32), atol=0.51)


def test_alpha_lies_over_white(tmp_path: Path) -> None:
    colour, alpha = pixels(0), pixels(1, channels=1)
    alpha[0, :4] = [0, 255, 0, 255]
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "alpha.png")
    share = alpha[:, :, None] / 255
    expected = share * colour + (1 - share) * 255
    got = (image_folder(tmp_path).batch([0]).x0[0].permute(1, 2, 0).double().numpy() + 1) * 127.5
    assert np.abs(got - expected).max() <= 1.01
    assert np.abs(got[0, :4] - [[255] * 3, colour[0, 1], [255] * 3, colour[0, 3]]).max() < 1e-4
    assert levels(inspect_folder(tmp_path), "transparent") == ["warning"]


def test_opaque_alpha_changes_nothing(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([pixels(0), np.full((8, 8), 255, np.uint8)])).save(tmp_path / "opaque.png")
    assert torch.equal(image_folder(tmp_path).batch([0]).x0[0], x0_of(pixels(0)))
    assert levels(inspect_folder(tmp_path), "transparent") == []


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert ((image_folder(tmp_path, channels=1).batch([0]).x0 + 1) * 127.5).round().flatten().tolist() == [10, 255]


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for name, options in [("plain", {}), ("clear", {"transparency": 1})]:
        palette.save(tmp_path / f"{name}.png", **options)
    images = image_folder(tmp_path)
    assert list(images.ids) == ["clear.png", "plain.png"]
    clear, plain = ((images.batch([0, 1]).x0 + 1) * 127.5).round().int()[:, :, 0].permute(0, 2, 1).tolist()
    assert plain == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert clear == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png16(array: np.ndarray) -> bytes:
    """A 16-bit PNG [H, W] or [H, W, 3], written by hand: Pillow writes none in colour."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2 if array.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bits_keep_the_high_byte_in_grey_and_colour(tmp_path: Path) -> None:
    deep = np.array([[0, 255, 256], [511, 32768, 65535]], np.uint16)
    (tmp_path / "colour.png").write_bytes(png16(np.dstack([deep] * 3)))
    (tmp_path / "grey.png").write_bytes(png16(deep))
    Image.fromarray(deep).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 2 65535\n" + deep.astype(">u2").tobytes())
    images = image_folder(tmp_path)
    for row in range(len(images)):
        assert torch.equal(images.batch([row]).x0[0, 0], x0_of((deep >> 8).astype(np.uint8))[0]), images.ids[row]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_thirty_two_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.zeros((4, 4), dtype)).save(tmp_path / "deep.tif")
    with refuses("deep.tif: not a readable image (32-bit TIFF; 8-bit and 16-bit"):
        image_folder(tmp_path).batch([0])
    assert levels(inspect_folder(tmp_path), "32-bit TIFF") == ["error"]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "1", "LAB"])
def test_other_modes_become_colour(tmp_path: Path, mode: str) -> None:
    white = (255, 128, 128) if mode == "LAB" else Image.new("RGB", (1, 1), "white").convert(mode).getpixel((0, 0))
    Image.new(mode, (4, 4), white).save(tmp_path / "white.tif")
    assert Image.open(tmp_path / "white.tif").mode == mode
    x0 = image_folder(tmp_path).batch([0]).x0
    assert x0.shape == (1, 3, 4, 4)
    assert x0.min() > 0.98


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str) -> None:
    array = np.zeros((8, 16, 3), np.uint8)
    array[:, :8] = 255  # left half white; orientation 6 asks for a quarter turn clockwise, so the top half
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(array).save(tmp_path / f"turned.{kind}", exif=exif)
    images = image_folder(tmp_path)
    assert images.size == (8, 16)
    x0 = images.batch([0]).x0[0]
    assert x0.shape == (3, 16, 8)
    assert x0[:, :7].min() > 0.9
    assert x0[:, 9:].max() < -0.9


def test_a_png_that_tells_its_orientation_late(tmp_path: Path) -> None:
    array = put(tmp_path / "late.png", size=(16, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content, end = (tmp_path / "late.png").read_bytes(), chunk(b"IEND", b"")
    assert content.endswith(end)
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    (tmp_path / "late.png").write_bytes(content.removesuffix(end) + late + end)
    with refuses("late.png: 8x16 once upright, not 16x8; give --resolution"):
        image_folder(tmp_path).batch([0])
    upright = np.rot90(array, -1)[4:12]
    assert torch.equal(image_folder(tmp_path, resolution=8).batch([0]).x0[0], x0_of(upright))


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    images = image_folder(tmp_path)
    assert (images.batch([0, 1]).x0[:, :, 0, 0] > 0).tolist() == [[True, False, False]] * 2
    assert levels(inspect_folder(tmp_path), "2 files have several frames") == ["warning"]


# ------------------------------------------------------------------------------------------------------ size and crop


@pytest.mark.parametrize(
    ("size", "resolution", "resized", "corner"),
    [
        ((16, 8), 8, (16, 8), (4, 0)),
        ((8, 17), 8, (8, 17), (0, 4)),  # (17 - 8) / 2 = 4.5, rounded half to even as torchvision's centre crop does
        ((8, 19), 8, (8, 19), (0, 6)),  # 5.5 -> 6
        ((30, 20), 8, (12, 8), (2, 0)),
        ((20, 33), 8, (8, 13), (0, 2)),  # 8 * 33 / 20 = 13.2, rounded down
        ((20, 39), 8, (8, 15), (0, 4)),  # 15.6, rounded down too; 3.5 -> 4
        ((4, 4), 8, (8, 8), (0, 0)),
    ],
)
def test_shorter_side_to_resolution_then_the_centre(
    tmp_path: Path, size: tuple[int, int], resolution: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    array = put(tmp_path / "picture.png", size=size)
    wide = np.asarray(Image.fromarray(array).resize(resized, Image.Resampling.BILINEAR))
    (left, top), side = corner, resolution
    expected = x0_of(wide[top : top + side, left : left + side])
    assert torch.equal(image_folder(tmp_path, resolution).batch([0]).x0[0], expected)


def test_mixed_sizes_need_a_resolution(tmp_path: Path) -> None:
    put(tmp_path / "a.png", size=(8, 8))
    put(tmp_path / "b.png", size=(8, 9))
    with refuses("a.png is 8x8 and b.png is 8x9); give --resolution"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, resolution=4).batch([0, 1]).x0.shape == (2, 3, 4, 4)
    with refuses("resolution=0"):
        image_folder(tmp_path, resolution=0)
    assert levels(inspect_folder(tmp_path), "a.png is 8x8, b.png is 8x9") == ["error"]
    findings = inspect_folder(tmp_path, resolution=9)
    assert levels(findings, "2 images are smaller than 9") == ["warning"]
    assert levels(findings, "1 images are not square") == ["note"]


# ------------------------------------------------------------------------------------------------ saving and reading


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_come_back_bit_for_bit(tmp_path: Path, channels: int) -> None:
    array = np.arange(256, dtype=np.uint8).repeat(2 * channels).reshape(2, channels, 16, 16)  # every value occurs
    x0 = torch.tensor(array.tolist(), dtype=torch.float32) / 127.5 - 1
    rows = [{"seed": 1}, {"seed": 2, "text": "a horse"}]
    assert save_png(tmp_path / "out", x0, ["q/1", "q/0.png"], rows) == tmp_path / "out"
    with pytest.warns(UserWarning, match="`text` is missing"):
        images = image_folder(tmp_path / "out", channels=channels)
    assert list(images.ids) == ["q/0.png", "q/1.png"]
    assert torch.equal(images.batch([1, 0]).x0, x0)
    assert images.meta == {"seed": [2, 1], "text": ["a horse", None]}
    assert os.listdir(tmp_path) == ["out"]


def test_saving_rounds_and_clamps(tmp_path: Path) -> None:
    values = torch.tensor([-3.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1.0, 7.0, 0.5], dtype=torch.float64)
    save_png(tmp_path / "out", values.reshape(1, 1, 2, 4), ["x"])
    assert np.asarray(Image.open(tmp_path / "out" / "x.png")).flatten().tolist() == [0, 0, 0, 1, 128, 255, 255, 191]


def test_a_folder_is_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, content: torch.Tensor) -> None:
        if path.name == "1.png":
            raise KeyboardInterrupt
        pictures.write_picture(path, content)

    monkeypatch.setattr(saving, "write_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(tmp_path / "out", torch.zeros(2, 3, 4, 4), ["0", "1"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": torch.zeros(2, 4, 4, 4)}, "shape"),
        ({"images": torch.zeros(3, 4, 4)}, "shape"),
        ({"images": torch.full((2, 3, 4, 4), float("nan"))}, "image 'a.png' has values that are not finite"),
        ({"names": ["a"]}, "2 images, 1 names"),
        ({"names": ["a", "a.png"]}, "'a.png' occurs 2 times"),
        ({"names": ["a", "../b"]}, "'../b.png'"),
        ({"names": ["a", "/b"]}, "'/b.png'"),
        ({"names": ["a", ".b"]}, "'.b.png'"),
        ({"names": ["a", "b\\c"]}, "accepted are relative names"),
        ({"metadata": [{}, {"file_name": "c"}]}, "metadata of 'b.png' has a column `file_name`"),
        ({"metadata": [{}, {"score": float("nan")}]}, "metadata of 'b.png' cannot be written"),
        ({"metadata": [{}]}, "1 rows of metadata"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, change: dict, told: str) -> None:
    arguments = {"images": torch.zeros(2, 3, 4, 4), "names": ["a", "b"], "metadata": None} | change
    with refuses(told):
        save_png(tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_saving_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_png(tmp_path / "empty", torch.zeros(1, 3, 4, 4), ["a"])
    with refuses("exists and is not empty"):
        save_png(tmp_path / "empty", torch.zeros(1, 3, 4, 4), ["b"])
    assert sorted(os.listdir(tmp_path / "empty")) == ["a.png", "metadata.jsonl"]


# ------------------------------------------------------------------------------------------------ tensors and subsets


def test_tensor_images() -> None:
    x0 = torch.randn(11, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = tensor_images(x0, meta={"creator": list("abcdefghijk")}, labels=range(11))
    assert isinstance(images, Images)
    assert images.ids[0] == "00"
    assert images.ids[10] == "10"
    batch = images.batch([10, 3])
    assert torch.equal(batch.x0, x0[[10, 3]])
    assert batch.x0.dtype == torch.float64
    assert batch.keys.tolist() == [key_of(images.digests[10]), key_of(images.digests[3])]
    assert batch.cond["class_labels"].tolist() == [10, 3]
    assert images.meta == {"creator": list("abcdefghijk"), "label": list(range(11))}
    assert tensor_images(x0.flip(0)).digests == images.digests[::-1]
    assert len(set(images.digests)) == 11


def test_the_digest_of_a_tensor_is_its_bytes_shape_and_dtype() -> None:
    base = torch.zeros(1, 4)
    others = [torch.zeros(1, 2, 2), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4, dtype=torch.bfloat16)]
    digests = {tensor_images(x0).digests[0] for x0 in [base, *others, torch.ones(1, 4)]}
    assert len(digests) == 5
    strided = torch.zeros(1, 4, 2)[:, :, 0]
    assert tensor_images(strided).digests == tensor_images(base).digests


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ids": ["a"]}, "ids has length 1, but there are 2"),
        ({"ids": ["a", "a"]}, "'a' occurs 2 times"),
        ({"meta": {"creator": ["x"]}}, "meta 'creator' has length 1"),
        ({"labels": [0, 1, 2]}, "labels has length 3"),
        ({"x0": torch.tensor([[0.0], [float("inf")]]), "ids": ["a", "b"]}, "image 'b' has values"),
    ],
)
def test_what_tensor_images_refuses(change: dict, told: str) -> None:
    with refuses(told):
        tensor_images(**({"x0": torch.zeros(2, 1)} | change))


def test_a_subset_is_a_view(tmp_path: Path) -> None:
    for seed, name in enumerate(["cat/a.png", "dog/b.png", "cat/c.png"]):
        put(tmp_path / name, seed)
    images = image_folder(tmp_path)  # cat/a, cat/c, dog/b
    part = subset(images, [2, 0])
    assert isinstance(part, Images)
    assert part.ids == ["dog/b.png", "cat/a.png"]
    assert part.digests == [images.digests[2], images.digests[0]]
    assert part.meta == {"label": ["dog", "cat"]}
    got, expected = part.batch([1, 0]), images.batch([0, 2])
    assert torch.equal(got.x0, expected.x0)
    assert torch.equal(got.keys, expected.keys)
    assert got.cond["class_labels"].tolist() == [0, 1]
    assert subset(part, [1]).ids == ["cat/a.png"]
    for rows in ([3], [-1], [0, 0]):
        with refuses("distinct numbers from 0 to 2"):
            subset(images, rows)


# -------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_follows_what_a_model_sees(tmp_path: Path) -> None:
    for seed, name in enumerate(["a/0.png", "b/1.png"]):
        put(tmp_path / "one" / name, seed)
        put(tmp_path / "two" / name, seed)
        put(tmp_path / "three" / f"{seed}.png", seed)
    images = image_folder(tmp_path / "one")
    same = fingerprint(images)
    assert same == fingerprint(image_folder(tmp_path / "two"))
    assert same == fingerprint(subset(images, [0, 1]))
    different = [
        image_folder(tmp_path / "one", resolution=8),
        image_folder(tmp_path / "one", channels=1),
        image_folder(tmp_path / "one", classes=["b", "a"]),
        image_folder(tmp_path / "three"),  # the same pictures without labels
        subset(images, [1, 0]),
        subset(images, [0]),
    ]
    assert len({same, *map(fingerprint, different)}) == 7


def test_descriptions_are_plain_and_move_with_the_folder(folder: Path) -> None:
    images = image_folder(folder, resolution=4)
    told = describe(images)
    assert told == json.loads(json.dumps(told))
    expected = {"is": "image_folder", "count": 5, "resolution": 4, "channels": 3, "fingerprint": fingerprint(images)}
    assert told == expected
    moved = folder.rename(folder.parent / "moved")
    assert digest(image_folder(moved, resolution=4)) == digest(images)
    assert describe(subset(images, [0]))["count"] == 1
    assert describe(tensor_images(torch.zeros(2, 1)))["is"] == "tensor_images"


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_spares_reading_and_notices_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = hashing.file_digest
    monkeypatch.setattr(hashing, "file_digest", lambda path: hashed.append(path.name) or real(path))
    cache = tmp_path / "cache" / "digests.json"
    first = image_folder(folder, cache=cache)
    assert sorted(hashed) == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    hashed.clear()
    assert image_folder(folder, cache=cache).digests == first.digests
    assert hashed == []
    put(folder / "b.png", seed=50)
    os.utime(folder / "b.png", ns=(5, 5))
    assert image_folder(folder, cache=cache).digests == image_folder(folder).digests != first.digests
    assert hashed[0] == "b.png"
    assert len(hashed) == 1 + 5  # one for the changed file, five without a cache
    assert os.listdir(cache.parent) == ["digests.json"]


def test_a_cache_serves_one_folder_only(tmp_path: Path) -> None:
    for seed in (0, 1):
        path = tmp_path / str(seed) / "same.ppm"
        put(path, seed)  # uncompressed: equal sizes
        os.utime(path, ns=(5, 5))
    one, other = (image_folder(tmp_path / name, cache=tmp_path / "cache.json") for name in ("0", "1"))
    assert one.stamps == other.stamps
    assert one.digests != other.digests


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', '{"folder": "FOLDER", "files": {"a.png": 3}}'])
def test_a_file_that_is_no_cache_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(content.replace("FOLDER", os.path.realpath(folder)))
    with pytest.raises(WhenceError) as caught:
        image_folder(folder, cache=cache)
    assert "cache.json" in str(caught.value)
    assert "it is no cache of image digests" in str(caught.value)
    assert "not" not in cache.read_text()


# ---------------------------------------------------------------------------------------------------- folders gone bad


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


BAD = {
    # what is done to the folder: (errors that opening must raise)
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no such folder; give a folder of images"),
    "a file": (lambda f: (f.rename(f.with_name("gone")), f.write_text("x")), "is not a folder"),
    "empty": (lambda f: (f.rename(f.with_name("gone")), f.mkdir()), "the folder is empty; accepted are .avif, .bmp"),
    "no images": (
        lambda f: (f.rename(f.with_name("gone")), f.mkdir(), (f / "a.txt").touch(), (f / "b.txt").touch()),
        "no images, only 2 .txt; accepted are .avif",
    ),
    "packed": (
        lambda f: (f.rename(f.with_name("gone")), f.mkdir(), (f / "data.zip").touch()),
        "no images, only 1 .zip; unpack it; accepted are .tar and .parquet as they are, and .avif",
    ),
    "splits": (
        lambda f: (f.rename(f.with_name("gone")), put(f / "train" / "a.png"), put(f / "val" / "b.png")),
        "holds splits (train, val), not images of one data set; give one of them, such as",
    ),
    "wrong key": (
        lambda f: rows_to(f / "metadata.jsonl", {"text": "x", "filename": "a.png"}, {"filename": "b.png"}),
        "line 1 has no `file_name`, only text, filename (and so 1 more lines); rename the key 'filename' to 'file_name'",
    ),
    "no key": (
        lambda f: rows_to(f / "metadata.jsonl", {"file_name": "a.png"}, {"text": "x"}),
        "line 2 has no `file_name`, only text; each row names its image in `file_name`",
    ),
    "empty name": (lambda f: rows_to(f / "metadata.jsonl", {"file_name": ""}), "line 1 has no `file_name`"),
    "number": (lambda f: rows_to(f / "metadata.jsonl", {"file_name": 3}), "line 1 has no `file_name`"),
    "bad json": (
        lambda f: rows_to(f / "metadata.jsonl", {"file_name": "a.png"}, "{'file_name': 'b.png'}"),
        "line 2 is not JSON",
    ),
    "json list": (
        lambda f: (f / "metadata.jsonl").write_text('[{"file_name": "a.png"}]'),
        "line 1 is a list, not one JSON object per line",
    ),
    "not utf-8": (lambda f: (f / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}'), "cannot be read ('utf-8'"),
    "empty list": (lambda f: (f / "metadata.jsonl").touch(), "lists no image"),
    "missing": (
        lambda f: rows_to(f / "metadata.jsonl", {"file_name": "A.PNG"}, {"file_name": "zzz.png"}),
        "metadata.jsonl lists 2 files that are not there: A.PNG, zzz.png; did you mean 'a.png' for 'A.PNG'?",
    ),
    "twice": (
        lambda f: rows_to(f / "metadata.jsonl", {"file_name": "a.png"}, {"file_name": "./a.png"}),
        "a.png is listed twice (lines 1 and 2); keep one row per image",
    ),
    "outside": (
        lambda f: (put(f.parent / "secret.png"), rows_to(f / "metadata.jsonl", {"file_name": "../secret.png"})),
        "line 1: file_name leads out of the folder",
    ),
    "absolute": (
        lambda f: rows_to(f / "metadata.jsonl", {"file_name": str(f / "a.png")}),
        "line 1: file_name leads out of the folder",
    ),
    "no image listed": (
        lambda f: ((f / "a.txt").touch(), rows_to(f / "metadata.jsonl", {"file_name": "a.txt"})),
        "metadata.jsonl lists 1 files that are not images: a.txt; accepted are",
    ),
    "two lists": (
        lambda f: (rows_to(f / "metadata.jsonl", {"file_name": "a.png"}), (f / "metadata.csv").touch()),
        "holds metadata.csv and metadata.jsonl; keep one of them",
    ),
    "ragged csv": (
        lambda f: (f / "metadata.csv").write_text("file_name,text\na.png,hello, world\n"),
        "line 2 has another number of cells than the header",
    ),
    "short csv": (
        lambda f: (f / "metadata.csv").write_text("file_name,text\na.png\n"),
        "line 2 has another number of cells than the header",
    ),
    "bad parquet": (lambda f: (f / "metadata.parquet").write_text("PAR0"), "cannot be read (Could not open Parquet"),
    "broken link": (lambda f: (f / "x.png").symlink_to("nowhere.png"), "1 symbolic links lead nowhere: x.png"),
    "line break": (lambda f: put(f / "a\nb.png"), "file names are not printable UTF-8: 'a\\nb.png'"),
    "not utf-8 name": (
        lambda f: (f / "a.png").rename(os.fsdecode(os.fsencode(f) + b"/\xff.png")),
        "file names are not printable UTF-8: '\\udcff.png'",
    ),
    "zero bytes": (lambda f: (f / "b.png").write_bytes(b""), "0 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_and_diagnosed(folder: Path, case: str) -> None:
    spoil, told = BAD[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image_folder(folder)  # good until now
        assert "error" not in levels(inspect_folder(folder), "")
        spoil(folder)
        with refuses(told) as error:
            image_folder(folder)
    assert "\n" not in str(error.value)
    findings = inspect_folder(folder)
    assert "error" in levels(findings, told), [str(finding) for finding in findings]
    assert all(finding.what and finding.where and finding.fix for finding in findings)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-60]), "truncated"),
        (lambda path: path.write_bytes(b"not an image at all"), "no known format"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"IDAT", b"IDAX")), "b.png"),
    ],
)
def test_a_corrupt_image_is_named_when_it_is_read(folder: Path, spoil, told: str) -> None:
    spoil(folder / "b.png")
    images = image_folder(folder, resolution=8)
    images.batch([0, 2, 3, 4])
    with refuses("b.png: not a readable image") as error:
        images.batch([0, 1])
    assert told in error.value.what
    assert "\n" not in str(error.value)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert levels(inspect_folder(folder), "b.png") == ["error"]


def test_a_truncated_jpeg(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", size=(64, 64))
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
    with refuses("a.jpg: not a readable image (...truncated"):
        image_folder(tmp_path).batch([0])


def test_an_unknown_header_is_named_when_sizes_are_read(folder: Path) -> None:
    (folder / "b.png").write_text("not an image")
    with refuses("b.png: not a readable image (no known format)"):
        image_folder(folder)


def test_files_without_permission(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests may run as root, who may read everything: refuse in root's stead.
    real = Path.open

    def refuse(self: Path, *args, **kwargs):
        if self.name == "b.png":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with refuses("b.png: cannot be read (Permission denied)"):
        image_folder(folder)
    assert levels(inspect_folder(folder), "b.png: cannot be read (Permission denied)") == ["error"]
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Denied", str(path))))
    with refuses("cannot be listed (Denied); make the folder readable", "images"):
        image_folder(folder)
    assert levels(inspect_folder(folder), "cannot be listed") == ["error"]


def test_permission_withdrawn_after_opening(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = image_folder(folder)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", refuse)
    with refuses("a.png: cannot be read (Permission denied); make it readable"):
        images.batch([0])


def test_links_are_followed_but_not_in_circles(folder: Path) -> None:
    (folder / "deep" / "loop").symlink_to(folder, target_is_directory=True)
    put(folder.parent / "elsewhere" / "x.png", 9)
    (folder / "there").symlink_to(folder.parent / "elsewhere", target_is_directory=True)
    names = list(image_folder(folder).ids)
    assert names == ["a.png", "b.png", "deep/c.png", "deep/er/d.png", "e.png", "there/x.png"]


# ----------------------------------------------------------------------------------------------------- other findings


def test_a_sound_folder_has_no_findings(tmp_path: Path) -> None:
    for seed, name in enumerate(["cat/a.png", "cat/b.png", "dog/c.png"]):
        put(tmp_path / name, seed)
    for resolution in (None, 8):
        assert inspect_folder(tmp_path, resolution) == []
    rows = [{"file_name": name, "label": name[:3]} for name in ("cat/a.png", "cat/b.png", "dog/c.png")]
    rows_to(tmp_path / "metadata.jsonl", *rows)
    assert inspect_folder(tmp_path) == []


def _seeded(*names: str):
    return lambda folder: [put(folder / name, 100 + row) for row, name in enumerate(names)]


def _mixed(folder: Path) -> None:
    Image.fromarray(pixels(9, channels=1)).save(folder / "grey.png")


def _labelled(*labels: str):
    def act(folder: Path) -> None:
        for row in range(len(labels)):
            put(folder / "c" / f"{row}.png", row)
        rows = [{"file_name": f"c/{row}.png", "label": label} for row, label in enumerate(labels)]
        rows_to(folder / "metadata.jsonl", *rows)

    return act


def _unlabelled(folder: Path) -> None:
    put(folder / "two" / "1.png", 9)
    rows_to(folder / "metadata.jsonl", {"file_name": "deep/c.png"}, {"file_name": "two/1.png"})


def test_images_at_different_depths(folder: Path) -> None:
    assert levels(inspect_folder(folder), "images lie at different depths") == ["note"]


@pytest.mark.parametrize(
    ("level", "act", "told"),
    [
        ("warning", lambda f: [(f / n).write_bytes((f / "a.png").read_bytes()) for n in ("y.png", "z.png")],
         "2 files are exact copies of another: a.png = y.png = z.png"),
        ("warning", _mixed, "different colour modes: 5 RGB, 1 L"),
        ("warning", lambda f: rows_to(f / "metadata.jsonl", {"file_name": "a.png"}),
         "4 images are not listed in metadata.jsonl and are left out: b.png, deep/c.png, deep/er/d.png and 1 more"),
        ("warning", lambda f: rows_to(f / "metadata.jsonl", {"file_name": "a.png", "text": "x"}, {"file_name": "b.png"}),
         "column `text` is missing for 1 of 2 images: b.png"),
        ("warning", _seeded("train/x.png"), "sub-folders named like splits (train) are read together"),
        ("warning", lambda f: (f / "photo.HEIC").touch(), "1 pictures are of a format that is not read: photo.HEIC"),
        ("warning", _labelled("2", "10"), "class names are numbers sorted as text: 10, 2"),
        ("note", _seeded("UPPER.PNG"), "1 file extensions are in upper case: UPPER.PNG"),
        ("note", lambda f: (f / "readme.md").touch(), "1 files are not images and are skipped: readme.md"),
        ("note", lambda f: (f / "a.png").rename(f / "a.jpg"),
         "1 files are of another format than their name says: a.jpg is PNG"),
        ("note", _unlabelled, "sub-folders are not read as class labels, because there is a metadata file"),
    ],
)  # fmt: skip
def test_a_finding_of_each_kind(folder: Path, level: str, act, told: str) -> None:
    assert levels(inspect_folder(folder), told) == []
    act(folder)
    findings = inspect_folder(folder)
    assert levels(findings, told) == [level], [str(finding) for finding in findings]
    assert [finding.level for finding in findings] == sorted(
        (finding.level for finding in findings), key=["error", "warning", "note"].index
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image_folder(folder)  # none of these is fatal


def test_several_faults_are_told_at_once(folder: Path) -> None:
    _truncate(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    put(folder / "e.png", size=(9, 9))
    rows_to(folder / "metadata.jsonl", {"file": "a.png"})
    findings = inspect_folder(folder)
    for told in ("`file_name`", "a.png: not a readable image", "b.png: 0 bytes", "2 different sizes"):
        assert levels(findings, told) == ["error"], told


def test_progress_shows_for_many_files_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    list(hashing.progress(range(hashing.LONG), "hashing"))
    assert capsys.readouterr().err == ""
    list(hashing.progress(range(hashing.LONG + 1), "hashing"))
    assert "hashing" in capsys.readouterr().err
