"""The same pictures in files, webdataset shards, Parquet, Arrow and `datasets`: the same images, bit for bit."""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from errors import refuses
from families import save_whole
from test_cli import refused, succeeds
from test_doctor import levels, pipeline
from whence import attribute, dataset_images, uniform
from whence.data import parquet as tables
from whence.data.images import ImageFolder, fingerprint, image_folder
from whence.data.inspect import inspect_folder
from whence.data.sources import layout_of
from whence.types import Images, WhenceError

COUNT = 7
CAPTIONS = [f"picture {i}, ünïcode" for i in range(COUNT)]
LABELS = [i % 3 for i in range(COUNT)]
CREATORS = ["ann", "bob"] * 4


def encoded(number: int, size: tuple[int, int] = (10, 8)) -> bytes:
    """A random picture as the bytes of a PNG."""
    array = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


PICTURES = [encoded(i) for i in range(COUNT)]


def as_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    rows = []
    for i, content in enumerate(PICTURES):
        (path / f"{i:03d}.png").write_bytes(content)
        columns = {"text": CAPTIONS[i], "creator": CREATORS[i], "label": LABELS[i]}
        rows.append(json.dumps({"file_name": f"{i:03d}.png", **columns}) + "\n")
    (path / "metadata.jsonl").write_text("".join(rows))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int) -> dict[str, bytes]:
    key = f"{i:03d}"
    columns = json.dumps({"creator": CREATORS[i]}).encode()
    return {f"{key}.png": PICTURES[i], f"{key}.txt": CAPTIONS[i].encode(), f"{key}.json": columns,
            f"{key}.cls": str(LABELS[i]).encode()}  # fmt: skip


def as_tars(path: Path) -> Path:
    for shard, rows in (("train-0000.tar", range(4)), ("train-0001.tar", range(4, COUNT))):
        write_tar(path / shard, {name: content for i in rows for name, content in sample(i).items()})
    return path


def table(rows: range = range(COUNT), **changes: Any) -> pa.Table:
    """As `datasets` writes it, but for its note on the schema."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns: dict[str, Any] = {
        "image": pa.array([{"bytes": PICTURES[i], "path": f"{i:03d}.png"} for i in rows], kind),
        "text": [CAPTIONS[i] for i in rows],
        "creator": [CREATORS[i] for i in rows],
        "label": [LABELS[i] for i in rows],
    }
    return pa.table({name: value for name, value in (columns | changes).items() if value is not None})


def as_parquet(path: Path) -> Path:
    path.mkdir(parents=True)
    pq.write_table(table(range(4)), path / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(table(range(4, COUNT)), path / "train-00001-of-00002.parquet")
    return path


def as_binary(path: Path) -> Path:
    path.mkdir(parents=True)
    pq.write_table(table(image=pa.array(PICTURES)), path / "all.parquet", row_group_size=2)
    return path


def as_arrow(path: Path) -> Path:
    """As `Dataset.save_to_disk` has it: a stream, cut into batches, and two JSON files."""
    path.mkdir(parents=True)
    with pa.ipc.new_stream(path / "data-00000-of-00001.arrow", table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)
    for name in ("state.json", "dataset_info.json"):
        (path / name).write_text("{}")
    return path


KINDS = {"tar": as_tars, "parquet": as_parquet, "bytes": as_binary, "arrow": as_arrow}
ORDERS = [[0, 1, 2, 3, 4, 5, 6], [6], [5, 0, 3], [2, 1, 2], []]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_folder(tmp_path_factory.mktemp("packed") / "folder")


def same(images: ImageFolder, plain: ImageFolder) -> None:
    assert isinstance(images, Images)
    assert images.digests == plain.digests
    assert images.meta == plain.meta
    assert len(set(images.ids)) == COUNT
    assert fingerprint(images) == fingerprint(plain)
    assert images.describe() == plain.describe()
    for rows in ORDERS:
        one, other = images.batch(rows), plain.batch(rows)
        assert torch.equal(one.x0, other.x0)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.cond["class_labels"], other.cond["class_labels"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resolution", [None, 4])
def test_the_same_pictures_are_the_same_images(kind: str, resolution: int | None, folder: Path, tmp_path: Path) -> None:
    images = image_folder(KINDS[kind](tmp_path / "data"), resolution)
    same(images, image_folder(folder, resolution))
    assert inspect_folder(tmp_path / "data", 8) == inspect_folder(tmp_path / "data", 8)
    assert [f for f in inspect_folder(tmp_path / "data", 8) if f.level != "note"] == []


def test_one_file_or_a_pattern(folder: Path, tmp_path: Path) -> None:
    tars, tables_ = as_tars(tmp_path / "tars"), as_parquet(tmp_path / "tables")
    assert image_folder(tars / "train-0001.tar").ids == image_folder(tars).ids[4:]
    assert image_folder(tables_ / "train-00001-of-00002.parquet").ids == image_folder(tables_).ids[4:]
    write_tar(tars / "val-0000.tar", {"0.png": PICTURES[0]})
    with refuses("holds splits (train, val)...such as '...tars/train*.tar'"):
        image_folder(tars)
    same(image_folder(tars / "train*.tar"), image_folder(folder))
    pq.write_table(table(), tars / "more.parquet")
    with refuses("holds .parquet and .tar files; give one kind"):
        image_folder(tars)
    with refuses("no such folder; give a folder of images"):
        image_folder(tars / "none*.tar")


def test_a_value_that_is_no_number_is_a_missing_one(tmp_path):
    """NaN differs from itself: it is not two values of one column."""
    members = {"a.png": encoded(0), "a.json": b'{"year": NaN}', "b.png": encoded(1), "b.json": b'{"year": 1999.0}'}
    assert image_folder(write_tar(tmp_path / "a.tar", members)).meta["year"] == [None, 1999.0]


def test_names_and_places(tmp_path: Path) -> None:
    assert image_folder(as_tars(tmp_path / "t")).ids[4] == "train-0001.tar/004.png"
    assert image_folder(as_parquet(tmp_path / "p")).ids[5] == "train-00001-of-00002.parquet/1"
    members = {"./deep.er/a.seg.png": b"mask", "./deep.er/a.jpg.txt": b"odd", "./deep.er/a.PNG": PICTURES[0]}
    members |= {"._x.png": b"of a Mac", "readme": b"", "deep.er/a.txt": b"a cat\n", "b.txt": b"without"}
    write_tar(tmp_path / "odd.tar", members)
    with pytest.warns(UserWarning, match="1 samples have no picture and are left out: b"):
        images = image_folder(tmp_path / "odd.tar")
    assert images.ids == ["odd.tar/deep.er/a.PNG"]
    assert images.meta == {"text": ["a cat\n"]}  # as webdataset reads it


def test_a_class_label_keeps_its_names_and_their_order(tmp_path: Path) -> None:
    told = {"image": {"_type": "Image"}, "label": {"names": ["zebra", "ape", "cat"], "_type": "ClassLabel"}}
    told |= {name: {"dtype": "string", "_type": "Value"} for name in ("text", "creator")}
    note = {"huggingface": json.dumps({"info": {"features": told}})}
    pq.write_table(table().replace_schema_metadata(note), tmp_path / "a.parquet")
    images = image_folder(tmp_path / "a.parquet")
    assert images.classes == ("zebra", "ape", "cat")
    assert images.meta["label"][:3] == ["zebra", "ape", "cat"]
    assert images.batch(range(COUNT)).cond["class_labels"].tolist() == LABELS
    asked = image_folder(tmp_path / "a.parquet", classes=["ape", "cat", "zebra"])
    assert asked.batch([0, 1, 2]).cond["class_labels"].tolist() == [2, 0, 1]
    unknown = table(label=pa.array([-1] * COUNT)).replace_schema_metadata(note)
    pq.write_table(unknown, tmp_path / "b.parquet")
    with pytest.warns(UserWarning, match="column `label` is missing for 7"):
        assert image_folder(tmp_path / "b.parquet").labels is None


# ------------------------------------------------------------------------------------------------------------- laziness


def test_little_is_held_of_a_large_table(tmp_path: Path) -> None:
    """One row group of 24 MB, no matter how it is read."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 100_000), dtype=np.uint8)
    pq.write_table(
        pa.table({"image": [row.tobytes() for row in noise]}), tmp_path / "large.parquet", write_batch_size=8
    )
    assert pq.ParquetFile(tmp_path / "large.parquet").num_row_groups == 1
    source, before, most = layout_of(tmp_path).source, pa.total_allocated_bytes(), 0
    for row in [*range(240), 3, 239]:
        assert source.file(f"large.parquet/{row}").getvalue() == noise[row].tobytes()  # type: ignore[union-attr]
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 10e6


def test_rows_in_order_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [bytes([row]) for row in range(100)]}), path, row_group_size=40)
    cells, started = tables.Forward(path, "image"), []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *args: started.append(args[2][0]) or real(*args))
    for rows, groups in (range(100), [0]), ([5, 60, 99, 98], [0, 1, 2]), ([0, 39, 40, 41, 0], [0, 0]):
        started.clear()
        assert [cells(row) for row in rows] == [bytes([row]) for row in rows]
        assert started == groups


def test_a_batch_opens_its_own_pictures_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pictures in a shard: opening it keeps where they are, a batch decodes what it is asked for."""
    content = encoded(0, (2, 2))
    count = 3_000
    with tarfile.open(tmp_path / "big.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(count):
            info = tarfile.TarInfo(f"{i:04d}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    opened: list[object] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or real(file))
    images = image_folder(tmp_path / "big.tar", 2)
    assert (len(images), len(opened)) == (count, 0)
    assert images.batch([5, count - 1]).x0.shape == (2, 3, 2, 2)
    assert len(opened) == 2


def test_a_shard_that_changed_is_refused_and_digests_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars, cache = as_tars(tmp_path / "tars"), tmp_path / "digests.json"
    images = image_folder(tars, 4, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("whence.data.webdataset.Tars.file", lambda *args: pytest.fail("read again"))
        assert image_folder(tars, 4, cache=cache).digests == images.digests
    os.utime(tars / "train-0001.tar", ns=(1, 1))
    assert len(images.batch([0])) == 1
    with refuses("train-0001.tar/004.png: the file changed after"):
        images.batch([0, 4])


# ------------------------------------------------------------------------------------------------------------ bad input


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def tar_of(**members: bytes) -> Any:
    return lambda path: write_tar(path / "a.tar", {name.replace("_", "."): value for name, value in members.items()})


def parquet_of(**changes: Any) -> Any:
    return lambda path: pq.write_table(table(**changes), path / "a.parquet")


def cut_parquet(path: Path) -> None:
    pq.write_table(table(), path / "a.parquet")
    cut(path / "a.parquet", 900)


def damaged(path: Path) -> None:
    """A Parquet file whose footer is whole and whose data is not."""
    pq.write_table(table(), path / "a.parquet", compression="gzip", use_dictionary=False)
    content = bytearray((path / "a.parquet").read_bytes())
    content[60:1200] = bytes(1140)
    (path / "a.parquet").write_bytes(content)


def only_paths(path: Path) -> None:
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = [{"bytes": PICTURES[0], "path": None}] * 3 + [{"bytes": None, "path": "/etc/passwd"}] * 4
    pq.write_table(table(image=pa.array(cells, kind)), path / "a.parquet")


def cut_tar(keep: int) -> Any:
    return lambda path: cut(write_tar(path / "a.tar", sample(0) | sample(1)), keep)


def twice(path: Path) -> None:
    write_tar(path / "a.tar", sample(0))
    with tarfile.open(path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("000.png"))


def compressed(path: Path) -> None:
    with tarfile.open(path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("000.png"))


COLUMN = "a column `image` of bytes, or of struct{bytes, path}"
BAD: dict[str, tuple[Any, ...]] = {  # what is done, what is wrong, what is accepted
    "tar cut after a member": (cut_tar(1024), "truncated or damaged after 1,024 bytes; copy or download"),
    "no tar": (lambda p: (p / "a.tar").write_bytes(b"x" * 2000), "cannot be read as a tar file ...accepted are plain"),
    "empty tar file": (lambda p: (p / "a.tar").touch(), "cannot be read as a tar file"),
    "compressed": (compressed, "not compressed"),
    "no picture": (tar_of(a_txt=b"x"), "holds no picture; accepted are webdataset shards: key.jpg"),
    "two pictures": (tar_of(a_png=PICTURES[0], a_jpg=PICTURES[1]), "sample a has several pictures: a.png, a.jpg"),
    "twice": (twice, "000.png is there twice; keep one"),
    "two texts": (tar_of(a_png=PICTURES[0], a_txt=b"x", a_json=b'{"text": "y"}'), "`text` is 'y' here and 'x' beside"),
    "label": (tar_of(a_png=PICTURES[0], a_cls=b"cat"), "a.cls is 'cat'", "the number of a class"),
    "json": (tar_of(a_png=PICTURES[0], a_json=b"[1]"), "a.json is a list", "one object"),
    "not utf-8": (tar_of(a_png=PICTURES[0], a_txt=b"\xff"), "a.txt is not UTF-8"),
    "empty picture": (tar_of(a_png=b""), "a.tar/a.png: 0 bytes; replace or remove"),
    "no picture at all": (tar_of(a_png=b"GIF, not"), "a.tar/a.png: not a readable image (no known format)"),
    "no column": (parquet_of(image=None), "no column of pictures (columns: text, creator, label)", COLUMN),
    "texts": (parquet_of(image=["a.png"] * COUNT), "no column of pictures ", COLUMN),
    "two columns": (parquet_of(image=None, one=PICTURES, two=PICTURES), "2 columns hold bytes (one, two); call the"),
    "only paths": (only_paths, "a.parquet, row 3: ...only the path '/etc/passwd'", "the bytes"),
    "undecodable": (parquet_of(image=[*PICTURES[:5], b"no", b"no"]), "a.parquet, row 5: not a readable image"),
    "no row": (lambda p: pq.write_table(table(range(0)), p / "a.parquet"), "holds no row"),
    "parquet cut": (cut_parquet, "cannot be read as Parquet ...copy or download the file again"),
    "parquet damaged": (damaged, "a.parquet, row 0: cannot be decoded"),
    "no arrow": (lambda p: (p / "a.arrow").write_bytes(b"x" * 99), "cannot be read as Arrow"),
}  # fmt: skip


def read_all(path: Path) -> None:
    images = image_folder(path, 4)
    images.batch(range(len(images)))


def told_once(error: WhenceError, folder: Path) -> None:
    """In one line, and to those who only look at the folder."""
    assert "\n" not in str(error)
    assert "error" in levels(inspect_folder(folder, 4), str(error).split(";")[0].rpartition(": ")[2])


@pytest.mark.parametrize("bytes_left", [700, 1200], ids=["in a picture", "in a header"])
def test_a_tar_that_was_cut_is_one_line(bytes_left: int, tmp_path: Path) -> None:
    cut_tar(bytes_left)(tmp_path)
    with pytest.raises(WhenceError, match=r"a\.tar: (cannot be read as a tar file|truncated or damaged)") as error:
        read_all(tmp_path)
    told_once(error.value, tmp_path)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, tmp_path: Path) -> None:
    spoil, what, *accepted = BAD[case]
    spoil(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with refuses(what, accepted="".join(accepted)) as error:
            read_all(tmp_path)
    assert str(tmp_path) in str(error.value)
    told_once(error.value, tmp_path)


# ------------------------------------------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("packed") / "model")


def test_the_same_scores(model: Path, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"draws": uniform(2), "dim": 8}
    plain = attribute(model, folder, folder, "d_trak", tmp_path / "plain", **settings)
    for kind, make in KINDS.items():
        data = make(tmp_path / kind)
        scores = attribute(model, data, data, "d_trak", tmp_path / f"run {kind}", **settings)
        assert torch.equal(scores.values, plain.values)
        assert scores.train_meta == plain.train_meta
    # The run folder of the same pictures is gone on with.
    again = attribute(model, tmp_path / "tar", tmp_path / "parquet", "d_trak", tmp_path / "plain", **settings)
    assert torch.equal(again.values, plain.values)


def test_command_line(model: Path, tmp_path: Path) -> None:
    tars, parquet, run = as_tars(tmp_path / "tars"), as_parquet(tmp_path / "tables"), tmp_path / "run"
    sides = ("--train_data_dir", parquet, "--query_data_dir", tars / "train-0001.tar")
    settings = ("--output_dir", run, "--draws", 2, "--dim", 8)
    assert "3 of 3 images are byte-identical to training images" in succeeds("doctor", model, *sides, *settings).out
    succeeds("attribute", model, *sides, *settings, warns="byte-identical|only the centre is read")
    succeeds("report", run, warns="only the centre is read")
    training = ("--resolution", 8, "--block_out_channels", "8,8", "--max_train_steps", 2, "--lr_warmup_steps", 0)
    new = ("train", "new", "--train_data_dir", tars, *training, "--output_dir", tmp_path / "new")
    succeeds(*new, warns="only the centre is read")
    cut(tars / "train-0001.tar", 1024)
    refused(
        "attribute", model, *sides, *settings, says=r"train-0001\.tar: truncated or damaged after 1,024 bytes; copy"
    )
    other = ("--train_data_dir", tars, *sides[2:], "--output_dir", tmp_path / "other")
    refused("attribute", model, *other, says=r"train-0001\.tar: truncated")


def test_captions_reach_a_model_that_reads_text(folder: Path, tmp_path: Path) -> None:
    """Latents and text embeddings of the same pictures and captions; a table without captions is one line."""
    model = save_whole("sd", tmp_path / "sd")
    settings: dict[str, Any] = {"draws": uniform(2), "dim": 8}
    plain = attribute(model, folder, folder, "d_trak", tmp_path / "plain", **settings)
    for kind, make in (("tar", as_tars), ("parquet", as_parquet)):
        data = make(tmp_path / kind)
        scores = attribute(model, data, data, "d_trak", tmp_path / f"run {kind}", **settings)
        assert torch.equal(scores.values, plain.values)
    pq.write_table(table(text=None), tmp_path / "silent.parquet")
    sides = ("--train_data_dir", tmp_path / "silent.parquet", "--query_data_dir", folder)
    says = r"silent\.parquet: this model reads text, but there is no column 'text' \(columns: creator, label\)"
    refused("attribute", model, *sides, "--output_dir", tmp_path / "silent", says=says)
    pq.write_table(table(text=["a", None, *CAPTIONS[2:]]), tmp_path / "silent.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with refuses("no caption in 'text': silent.parquet/1 has None", "silent.parquet"):
            attribute(model, tmp_path / "silent.parquet", folder, "d_trak", tmp_path / "gap", **settings)


# ------------------------------------------------------------------------------------------------------------- datasets


class StandIn:
    """As much of `datasets.Dataset` as is asked of it, over a table."""

    class Features:
        def __init__(self, schema: pa.Schema):
            self.arrow_schema = schema

    def __init__(self, table: pa.Table):
        self.table, self.features = table, self.Features(table.schema)

    def __len__(self) -> int:
        return len(self.table)

    def select_columns(self, names: list[str]) -> StandIn:
        return StandIn(self.table.select(names))

    def with_format(self, kind: str) -> StandIn:
        assert kind == "arrow"
        return self

    def __getitem__(self, key: int | slice) -> pa.Table:
        pictures = any(pa.types.is_nested(kind) or pa.types.is_binary(kind) for kind in self.table.schema.types)
        assert isinstance(key, slice) != pictures, "pictures one by one only"
        return self.table.slice(key, 1) if isinstance(key, int) else self.table


def test_a_data_set_in_python(model: Path, folder: Path, tmp_path: Path) -> None:
    same(dataset_images(StandIn(table())), image_folder(folder))
    settings: dict[str, Any] = {"draws": uniform(2), "dim": 8}
    plain = attribute(model, folder, folder, "d_trak", tmp_path / "plain", **settings)
    scores = attribute(model, StandIn(table()), StandIn(table()), "d_trak", tmp_path / "run", **settings)
    assert torch.equal(scores.values, plain.values)
    # A local data set keeps paths, of files that its owner has loaded it from.
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    paths = pa.array([{"bytes": None, "path": str(folder / f"{i:03d}.png")} for i in range(COUNT)], kind)
    same(dataset_images(StandIn(table(image=paths))), image_folder(folder))
    assert dataset_images(StandIn(table(other=PICTURES[::-1])), image_column="other").digests[0] != PICTURES[0]
    with refuses("column 'text' holds no pictures"):
        dataset_images(StandIn(table()), image_column="text")
    with refuses("a dict is no data set", accepted="a datasets.Dataset of one split"):
        dataset_images({"train": StandIn(table())})


def test_a_real_data_set(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(folder / f"{i:03d}.png") for i in range(COUNT)], "text": CAPTIONS}
    columns |= {"creator": CREATORS[:COUNT], "label": LABELS}
    made = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    same(dataset_images(made), image_folder(folder))
    made.save_to_disk(tmp_path / "saved")
    same(image_folder(tmp_path / "saved"), image_folder(folder))
    datasets.load_from_disk(tmp_path / "saved").to_parquet(tmp_path / "made.parquet")  # with the pictures themselves
    same(image_folder(tmp_path / "made.parquet"), image_folder(folder))
