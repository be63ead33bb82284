"""Files as people have them: metadata, layouts, endings, labels, names.

Each row of a table is a situation and what must happen.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from errors import refuses
from test_doctor import UNET, edit, pictures, pipeline
from test_packed import encoded, table, write_tar
from whence import attribute, tensor_images, uniform
from whence.cli.main import main
from whence.data.classes import Classes
from whence.data.images import ImageFolder, image_folder
from whence.data.inspect import inspect_folder
from whence.data.layout import EXTENSIONS, FEW, FOREIGN
from whence.doctor import Inputs, examine
from whence.storage.columns import plain_columns
from whence.storage.scores import load_scores, save_scores
from whence.task import Request
from whence.training.recipe import New, NoiseSchedule, Recipe, Schedule
from whence.training.runs import Pictures, train
from whence.types import Scores, WhenceError

SETTINGS: dict[str, Any] = {"draws": uniform(2), "dim": 8}


def put(folder: Path, *names: str) -> None:
    """Small pictures, all different."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(len(list(folder.rglob("*"))) + sum(map(ord, name)), (8, 8)))


def metadata(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def opened(path: Path, **options: Any) -> tuple[ImageFolder, str]:
    """The images, and all warnings in one text."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images = image_folder(path, 8, **options)
    return images, "\n".join(str(warning.message) for warning in told)


def laid_out(make: Callable[[Path], object], root: Path) -> Path:
    """A folder of its own with what `make` puts into it."""
    folder = root / "data"
    folder.mkdir()
    make(folder)
    return folder


def refused(path: Path, **options: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(WhenceError) as error:
            image_folder(path, 8, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------- columns of metadata

HALF = "\ud800"  # half a character, which JSON can spell
COLUMNS: dict[str, tuple[list[object], list[object]]] = {
    # what people write -> what is kept
    "a year in words": ([1999, "about 1900", 2001], ["1999", "about 1900", "2001"]),
    "a number with a hole": ([1.5, float("nan"), 2.0], [1.5, None, 2.0]),
    "infinity": ([float("inf"), 1.0, 2.0], ["inf", "1.0", "2.0"]),
    "tags, or one tag": ([["a", "b"], "c", []], ['["a", "b"]', "c", "[]"]),
    "tags": ([["a"], [], ["b", "c"]], [["a"], [], ["b", "c"]]),
    "lists of two kinds": ([[1], ["a"], []], ["[1]", '["a"]', "[]"]),
    "a hash as a number": ([2**63, 1, 2], [str(2**63), "1", "2"]),
    "a large negative number": ([-(2**63) - 1, 1, 2], [str(-(2**63) - 1), "1", "2"]),
    "no objects": ([{}, {}, {}], ["{}", "{}", "{}"]),
    "objects": ([{"a": 1}, {"b": "x"}, {"a": "y"}], ['{"a": 1}', '{"b": "x"}', '{"a": "y"}']),
    "objects in lists": ([[{}], [], []], ["[{}]", "[]", "[]"]),
    "yes, or how often": ([True, 3, None], ["true", "3", None]),
    "whole and other numbers": ([1, 2.5, None], [1, 2.5, None]),
    "numbers and half": ([2**60 + 1, 0.5, None], [str(2**60 + 1), "0.5", None]),
    "half a character": ([HALF, "x", "y"], ["\\ud800", "x", "y"]),
    "nothing": ([None, None, None], [None, None, None]),
    "null in lists": ([[None], [1], None], [[None], [1], None]),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_are_normalised_when_they_are_read_and_can_be_saved(case: str, tmp_path: Path) -> None:
    values, kept = COLUMNS[case]
    put(tmp_path / "data", "0.png", "1.png", "2.png")
    rows = [{"file_name": f"{i}.png", "column": value} for i, value in enumerate(values)]
    metadata(tmp_path / "data", rows)
    images, told = opened(tmp_path / "data")
    assert images.meta["column"] == kept
    changed = any(isinstance(b, str) and a != b and a != HALF for a, b in zip(values, kept, strict=True))
    assert ("`column`" in told and "read as texts" in told) == changed
    for k in (1, 2, 3):
        save_scores(tmp_path / str(k), Scores(torch.eye(3)[:1], ["q"], images.ids, {}, train_meta=images.meta), k)
        assert load_scores(tmp_path / str(k)).train_meta["column"] == kept
        assert pq.read_table(tmp_path / str(k) / "top.parquet").num_rows == k
    Scores(torch.eye(3)[:1], ["q"], images.ids, {}, train_meta=images.meta).to_csv(tmp_path / "scores.csv")


@pytest.mark.parametrize(
    "column",
    [np.array([1, 2, 3]), np.array([0.5, np.nan, 1]), [np.float32(1), np.int64(2), None], [b"a", b"\xff", None],
     [Path("a"), 1, {1, 2}], torch.arange(3).tolist()],
)  # fmt: skip
def test_columns_of_images_in_memory_can_be_saved(column: Any, tmp_path: Path) -> None:
    images = tensor_images(
        torch.zeros(3, 1, 2, 2), meta={"column": column, "query": [1, 2, 3], "train_query": [4, 5, 6]}
    )
    save_scores(tmp_path, Scores(torch.eye(3)[:1], ["q"], images.ids, {}, train_meta={**images.meta, "raw": column}))
    assert len(load_scores(tmp_path).train_meta["column"]) == 3
    found = pq.read_table(tmp_path / "top.parquet").column_names
    assert {"train_query", "train_train_query"} <= {*found}


def test_a_run_with_wild_metadata_ends_and_doctor_says_what_was_changed(tmp_path: Path) -> None:
    model, data = pipeline(tmp_path / "model"), pictures(tmp_path / "data", 4)
    wild: list[object] = [1999, "x", float("nan"), {}]
    metadata(data, [{"file_name": f"{i:02d}.png", "year": value, "hash": 2**70} for i, value in enumerate(wild)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = attribute(model, data, data, "d_trak", tmp_path / "run", **SETTINGS)
    assert scores.train_meta["year"] == ["1999", "x", None, "{}"]
    told = [str(f) for f in inspect_folder(data) if "read as texts" in str(f)]
    assert len(told) == 2
    assert all("metadata.jsonl" in line for line in told)
    assert plain_columns(scores.train_meta) == scores.train_meta


ROWS: dict[str, tuple[str, str]] = {
    "a key twice": ('{"file_name": "0.png", "a": 1, "a": 2}\n', "the key 'a' is there twice"),
    "deep": ('{"file_name": "0.png", "a": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1 is not JSON"),
    "hidden": ('{"file_name": ".0.png"}\n', "metadata.jsonl lists 1 hidden files: .0.png; rename them"),
    "digits": ('{"file_name": "0.png", "a": ' + "9" * 5_000 + "}\n", "line 1 is not JSON"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_no_rows(case: str, tmp_path: Path) -> None:
    text, says = ROWS[case]
    put(tmp_path, "0.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    assert says in refused(tmp_path)
    assert "metadata.jsonl" in refused(tmp_path)


def test_train_writes_the_names_of_classes_beside_the_model(tmp_path: Path) -> None:
    put(tmp_path / "data", *(f"{name}/{i}.png" for i, name in enumerate(ORDER)))
    network = {**UNET, "num_class_embeds": 4, "_class_name": "UNet2DModel"}
    recipe = Recipe(New(network, NoiseSchedule(100)), schedule=Schedule(1, 0), batch_size=2)
    train(recipe, Pictures(tmp_path / "data"), tmp_path / "model")
    assert (tmp_path / "model" / "classes.txt").read_text().split() == sorted(ORDER)
    data, asked = sides(tmp_path / "some")
    task = Request(tmp_path / "model", data, asked, tmp_path / "run").task()
    assert task.train.labels is not None
    assert task.train.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "says"), [("file_name,a,a\n0.png,1,2\n", "column 'a' is there twice"), ("0.png\n", "lists no image")]
)
def test_tables_that_are_no_tables(text: str, says: str, tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text(text)
    assert says in refused(tmp_path)


# -------------------------------------------------------------------------------------------- what is read of a folder


def parquet(path: Path, count: int = 7) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(range(count)), path)


def plain_table(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"a": [1, 2]}), path)


def tar(path: Path, count: int = 6) -> None:
    write_tar(path, {f"{i}.png": encoded(i, (8, 8)) for i in range(count)})


def linked(folder: Path) -> None:
    with tarfile.open(write_tar(folder / "a.tar", {"0.png": encoded(0, (8, 8))}), "a") as shard:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.png"
        shard.addfile(link)


def repository(folder: Path) -> None:
    parquet(folder / "data" / "train-00000-of-00001.parquet")
    put(folder, "preview.png")
    (folder / "README.md").write_text("# cats")


LAYOUTS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    # what lies there -> images that are read, and what is said of the rest
    "a repository": (repository, 7, "preview.png"),
    "shards and a logo": (lambda f: (tar(f / "a.tar"), put(f, "logo.png")), 6, "logo.png"),
    "shards in capitals": (lambda f: tar(f / "A.TAR"), 6, ""),
    "shards and a metadata file": (lambda f: (tar(f / "a.tar"), (f / "metadata.csv").write_text("x\n")), 6, "metadata.csv"),
    "pictures and a table of numbers": (
        lambda f: (put(f, "0.png", "1.png"), plain_table(f / "embeddings.parquet")), 2, "embeddings.parquet"),
    "pictures and an archive": (lambda f: (put(f, "0.png", "1.png"), (f / "more.zip").touch()), 2, "more.zip"),
    "a few captions beside": (lambda f: (put(f, "0.png"), (f / "0.txt").write_text("a cat")), 1, "0.txt"),
    "a damaged shard beside more pictures": (
        lambda f: (tar(f / "a.tar", 2), (f / "b.tar").touch(), put(f, "0.png", "1.png", "2.png")),
        3,
        "b.tar",
    ),
    "links in a shard": (linked, 1, "a.tar/1.png"),
    "a classes.txt of something else": (
        lambda f: (put(f, "cat/0.png", "dog/1.png"), (f / "classes.txt").write_text("person\ncar")), 2, ""),
    "few listed": (
        lambda f: (put(f, "0.png", "1.png"), metadata(f, [{"file_name": "0.png"}])), 1, "1.png"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_is_read_and_what_is_named(case: str, tmp_path: Path) -> None:
    act, count, says = LAYOUTS[case]
    folder = laid_out(act, tmp_path)
    images, told = opened(folder, skip=False)
    assert len(images) == count
    assert says in told
    assert says == "" or any(says in str(finding) for finding in inspect_folder(folder, 8))


MANY: dict[str, Callable[[Path], object]] = {
    "captions": lambda f: [put(f, f"{i}.png") or (f / f"{i}.txt").write_text("a cat") for i in range(FEW + 1)],
    "photos of a phone": lambda f: (put(f, "0.png"), [(f / f"{i}.heic").touch() for i in range(FEW + 1)]),
    "not listed": lambda f: (put(f, *(f"{i}.png" for i in range(FEW + 2))), metadata(f, [{"file_name": "0.png"}])),
    "loose pictures": lambda f: (tar(f / "a.tar"), put(f, *(f"p/{i}.png" for i in range(FEW + 1)))),
    "shards beside more pictures": lambda f: (tar(f / "a.tar"), put(f, *(f"p/{i}.png" for i in range(9)))),
    "latents in shards": lambda f: write_tar(
        f / "a.tar", {f"{i}.{kind}": encoded(i, (8, 8)) for i in range(FEW + 1) for kind in ("png", "npy")}
    ),
    "captions without pictures": lambda f: write_tar(
        f / "a.tar", {"a.png": encoded(0, (8, 8)), **{f"{i}.txt": b"a cat" for i in range(FEW + 1)}}
    ),
}


@pytest.mark.parametrize("case", MANY)
def test_many_skipped_files_need_skip(case: str, tmp_path: Path) -> None:
    data = laid_out(MANY[case], tmp_path)
    error = refused(data, skip=False)
    assert "skipped" in error
    assert "--skip" in error
    assert str(data) in error
    assert len(opened(data, skip=True)[0]) > 0
    findings = examine(Inputs(None, data, None, tmp_path / "run"))
    assert any("--skip" in str(f) for f in findings if f.level == "error")
    assert not any("--skip" in str(f) for f in examine(Inputs(None, data, None, tmp_path / "run", skip=True)))


def test_the_command_line_asks_for_skip(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    model, data, queries = pipeline(tmp_path / "model"), pictures(tmp_path / "data", 5), pictures(tmp_path / "q", 2, 1)
    for i in range(5):
        (data / f"{i:02d}.txt").write_text("a cat")
    words = ["whence", "attribute", model, "--train_data_dir", data, "--query_data_dir", queries, "--draws", 2]
    words += ["--dim", 8, "--output_dir", tmp_path / "run"]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", [*map(str, words), *more])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    code, told = run()
    assert code == 2
    assert told.count("\n") == 1
    assert "5 files are skipped (5 .txt): 00.txt, 01.txt, 02.txt and 2 more" in told
    assert "--skip" in told
    code, told = run("--skip")
    assert code == 0
    assert "5 files are skipped" in told


IMAGEFOLDER = (
    ".blp .bmp .dib .bufr .cur .pcx .dcx .dds .ps .eps .fit .fits .fli .flc .ftc .ftu .gbr .gif .grib .h5 .hdf .png .apng "
    ".jp2 .j2k .jpc .jpf .jpx .j2c .icns .ico .im .iim .tif .tiff .jfif .jpe .jpg .jpeg .mpg .mpeg .msp .pcd .pxr .pbm "
    ".pgm .ppm .pnm .psd .bw .rgb .rgba .sgi .ras .tga .icb .vda .vst .webp .wmf .emf .xbm .xpm"
)


@pytest.mark.parametrize("ending", IMAGEFOLDER.split())
def test_every_ending_of_imagefolder_is_read_or_named(ending: str, tmp_path: Path) -> None:
    put(tmp_path, "0.png")
    assert (ending in EXTENSIONS) != (ending in FOREIGN)
    picture, path = Image.open(tmp_path / "0.png"), tmp_path / f"1{ending}"
    kind = Image.registered_extensions().get(ending)
    modes = [mode for mode in ("RGB", "L", "1") if kind in Image.SAVE]
    for mode in modes:
        try:
            picture.convert(mode).resize((16, 16)).save(path)
            break
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
    if not path.exists():
        path.write_bytes(b"something")
        modes = []
    images, told = opened(tmp_path)
    assert images.ids == (["0.png", path.name] if ending in EXTENSIONS else ["0.png"])
    assert (path.name in told) == (ending in FOREIGN)
    if modes and ending in EXTENSIONS:
        assert images.batch([1]).x0.shape == (1, 3, 8, 8)


def test_the_documentation_names_every_ending() -> None:
    text = (Path(__file__).parents[2] / "docs" / "files.md").read_text()
    read, foreign = (
        next(line for line in text.splitlines() if line.startswith(start)) for start in ("| read", "| not read")
    )
    assert set(re.findall(r"\.\w+", read)) == {*EXTENSIONS}
    archives = {".7z", ".bz2", ".gz", ".rar", ".tgz", ".xz", ".zip", ".zst"}
    raw = {".arw", ".cr2", ".dng", ".nef", ".raw"}
    assert set(re.findall(r"\.\w+", foreign)) == FOREIGN - archives - raw


def test_a_program_under_the_name_of_a_picture_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    assert "a.png: not a readable image (EPS is not read)" in refused_batch(tmp_path)


def refused_batch(path: Path) -> str:
    with pytest.raises(WhenceError) as error:
        image_folder(path, 8).batch([0])
    return str(error.value)


TARS: dict[str, tuple[list[str], dict[str, str | None]]] = {
    # members -> picture: its caption
    "a dot in the name": (["a.v1.jpg", "a.v1.txt", "b.v2.jpg", "b.v2.txt"], {"a.v1.jpg": "a.v1", "b.v2.jpg": "b.v2"}),
    "numbers": (["cat.0.jpg", "cat.0.txt", "dog.0.jpg", "cat.1.jpg", "dog.1.jpg", "dog.1.txt"],
                {"cat.0.jpg": "cat.0", "dog.0.jpg": None, "cat.1.jpg": None, "dog.1.jpg": "dog.1"}),
    "a date": (["2020.01.02.jpg", "2020.01.02.txt", "2020.01.03.jpg", "2021.01.02.jpg", "2021.01.03.jpg"],
               {"2020.01.02.jpg": "2020.01.02", "2020.01.03.jpg": None, "2021.01.02.jpg": None, "2021.01.03.jpg": None}),
    "a mask beside": (["a.jpg", "a.seg.png", "a.txt"], {"a.jpg": "a"}),
    "one part": (["a.rgb.png", "a.txt", "b.rgb.png", "b.txt"], {"a.rgb.png": "a", "b.rgb.png": "b"}),
    "plain": (["a.jpg", "a.txt", "b.PNG"], {"a.jpg": "a", "b.PNG": None}),
    "dots in folders": (["v1.0/a.jpg", "v1.0/a.txt"], {"v1.0/a.jpg": "v1.0/a"}),
}  # fmt: skip


@pytest.mark.parametrize("case", TARS)
def test_dots_in_tar_keys_drop_nothing(case: str, tmp_path: Path) -> None:
    members, expected = TARS[case]
    content = {
        name: name.removesuffix(".txt").encode() if name.endswith(".txt") else encoded(i, (8, 8))
        for i, name in enumerate(members)
    }
    images, told = opened(write_tar(tmp_path / "a.tar", content))
    assert images.ids == [f"a.tar/{name}" for name in expected]
    assert list(images.meta.get("text", [None] * len(images))) == list(expected.values())
    for name in members:
        assert name in expected or name.endswith(".txt") or name in told


def test_two_parts_of_a_sample_are_refused(tmp_path: Path) -> None:
    names = ["a.left.png", "a.right.png", "b.left.png", "b.right.png"]
    write_tar(tmp_path / "a.tar", {name: encoded(i, (8, 8)) for i, name in enumerate(names)})
    assert "sample a has several pictures: a.left.png, a.right.png" in refused(tmp_path)


SPLITS: dict[str, list[str]] = {
    "first": ["train-000.tar", "train-001.tar", "val-000.tar"],
    "inside": ["cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar"],
    "with numbers": ["train0.tar", "train1.tar", "test0.tar"],
    "in folders": ["train/000.tar", "train/001.tar", "val/000.tar"],
    "in capitals": ["Train_0.tar", "Train_1.tar", "Test_0.tar"],
    "alone": ["x_test.tar", "x_train.tar"],
    "a bracket": ["[a] train-0.tar", "[a] train-1.tar", "[a] test-0.tar"],
    "pictures": ["train/a.png", "train/b.png", "val/a.png"],
    "pictures deeper": ["data/train/a.png", "data/train/b.png", "data/val/a.png"],
    "pictures of classes": ["x-train/cat/a.png", "x-train/dog/b.png", "x-test/cat/a.png", "x-test/dog/b.png"],
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits_are_not_joined_and_the_hint_opens_one(case: str, tmp_path: Path) -> None:
    for i, name in enumerate(SPLITS[case]):
        put(tmp_path, name) if name.endswith(".png") else write_tar(tmp_path / name, {f"{i}.png": encoded(i, (8, 8))})
    error = refused(tmp_path)
    assert "holds splits" in error
    hint = Path(error.partition("such as ")[2].strip("'"))
    images, _ = opened(hint)
    assert 0 < len(images) < len(SPLITS[case])


def test_a_hint_for_two_kinds_of_shards_opens_one(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", 3)
    parquet(tmp_path / "a.parquet")
    assert len(opened(Path(refused(tmp_path).partition("such as ")[2].strip("'")))[0]) == 7


def test_shards_without_a_split_beside_others_are_told(tmp_path: Path) -> None:
    tar(tmp_path / "cc3m-0.tar", 3)
    tar(tmp_path / "cc3m-val-0.tar", 4)
    images, told = opened(tmp_path)
    assert len(images) == 7
    assert "named like a split (val)" in told


# ---------------------------------------------------------------------------------------------------- names of pictures


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_unicode_forms_of_a_name_are_the_same_name(on_disk: str, listed: str, tmp_path: Path) -> None:
    name, row = (unicodedata.normalize(form, "é.png") for form in (on_disk, listed))
    put(tmp_path, name, "b.png")
    metadata(tmp_path, [{"file_name": row, "creator": "Eve"}, {"file_name": "b.png", "creator": "Bob"}])
    images, told = opened(tmp_path)
    assert dict(zip(images.ids, images.meta["creator"], strict=True)) == {name: "Eve", "b.png": "Bob"}
    assert told == ""


def test_a_hint_never_shows_two_names_that_look_the_same(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "ệ.png") for form in ("NFC", "NFD")]
    put(tmp_path, *forms)
    metadata(tmp_path, [{"file_name": "e\u0302\u0323.png"}])
    assert "did you mean 'e\\u0323\\u0302.png' for 'e\\u0302\\u0323.png'? they look the same" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_huge_picture_is_told(kind: str, tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("1", (14_200, 14_200)).save(out, kind)
    (tmp_path / "a.png").write_bytes(out.getvalue())
    findings = [str(f) for f in examine(Inputs(None, tmp_path, None, tmp_path / "run")) if f.level == "error"]
    assert any("a.png: more than 179 million pixels; make it smaller" in line for line in findings), findings
    assert not any("check itself" in line for line in findings)
    with refuses("more than 179 million pixels"):
        image_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- labels

TEN = Classes(None, 10)
NAMED = Classes(tuple(f"c{i}" for i in range(10)), 10)
LABELS: dict[str, tuple[list[object], Classes, list[int] | str]] = {
    # labels, the model's classes -> numbers, or what is said
    "whole numbers": ([3, 0, 9], TEN, [3, 0, 9]),
    "whole numbers with a point": ([3.0, 0.0, 9.0], TEN, [3, 0, 9]),
    "halves": ([0.5, 1.0, 2.0], TEN, "0.png has 0.5"),
    "soft labels": ([[0.1, 0.9], [1, 0], [0, 1]], TEN, "0.png has [0.1, 0.9]"),
    "beyond": ([3, 0, 10], TEN, "labels go up to 10, but the model has 10 classes (0 to 9)"),
    "far beyond": ([2**70, 0, 1], TEN, f"0.png has {2**70}"),
    "far beyond what nobody asks for": ([2**70, 0, 1], Classes(), []),
    "ignored ones": ([3, -100, 1], TEN, "1.png has -100"),
    "unknown ones": ([3, -1, 1], TEN, "1.png has -1"),
    "gaps": ([3, None, 1], TEN, "`label` is missing for 1 of 3 images: 1.png"),
    "not a number": ([3, float("nan"), 1], TEN, "`label` is missing for 1 of 3 images: 1.png"),
    "infinite": ([float("inf"), 2.0, 1.0], TEN, "0.png has 'inf'"),
    "truth values": ([True, False, True], TEN, "0.png has True"),
    "names and numbers": (["cat", 1, 2], TEN, "neither all names nor all whole numbers"),
    "objects": ([{}, 1, 2], TEN, "0.png has {}"),
    "fewer names than classes": (["cat", "dog", "cat"], TEN, "2 class names (cat, dog), but the model has 10 classes"),
    "more names than classes": (["a", "b", "c"], Classes(None, 2), "labels go up to 2, but the model has 2 classes"),
    "as many": (["b", "a", "c"], Classes(None, 3), [1, 0, 2]),
    "known names": (["c7", "c2", "c7"], NAMED, [7, 2, 7]),
    "an unknown name": (["c7", "c2", "x"], NAMED, "label 'x' is not a class"),
    "names in a model that writes them otherwise": (["b", "a", "c"], Classes(("x", "y", "z"), 3, False), [1, 0, 2]),
    "synonyms": (["tench", "Carassius"], Classes(("tench, Tinca tinca", "goldfish, Carassius"), 2, False), [0, 1]),
    "no classes": ([0.5, 1.0, 2.0], Classes(), []),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_checked_once_with_the_classes_that_there_are(case: str, tmp_path: Path) -> None:
    labels, classes, expected = LABELS[case]
    put(tmp_path, *(f"{i}.png" for i in range(len(labels))))
    metadata(tmp_path, [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)])
    if isinstance(expected, str):
        error = refused(tmp_path, classes=classes)
        assert expected in error
        assert str(tmp_path) in error
    else:
        images, told = opened(tmp_path, classes=classes)
        assert ([] if images.labels is None else images.labels.tolist()) == expected
        assert expected or "`label` is neither" in told


def test_labels_of_a_table_with_gaps_are_no_names(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(3)))
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,10.0\n1.png,2.0\n2.png,0.0\n")
    images, _ = opened(tmp_path)
    assert images.labels is not None
    assert images.labels.tolist() == [10, 2, 0]


@pytest.mark.parametrize(
    "labels",
    [
        [0.7, 1.9, -0.4],
        [0, 1, -100],
        [[1, 0], [0, 1], [1, 0]],
        ["a", "b", "c"],
        [0, 1, float("nan")],
    ],
)
def test_labels_in_memory_are_never_truncated(labels: Any) -> None:
    with refuses(where="labels", accepted="class indices [n]"):
        tensor_images(torch.zeros(3, 1, 2, 2), labels=labels)
    assert tensor_images(torch.zeros(3, 1), labels=torch.tensor([0.0, 2.0, 1.0])).labels.tolist() == [0, 2, 1]  # type: ignore[union-attr]


def conditional(folder: Path, count: int, names: list[str] | None = None) -> Path:
    model = pipeline(folder, num_class_embeds=count)
    if names:
        (model / "classes.txt").write_text("\n".join(names))
    return model


ORDER = ["zebra", "ape", "cat", "dog"]


def sides(folder: Path) -> tuple[Path, Path]:
    put(folder / "data", "cat/0.png", "cat/1.png", "ape/2.png", "ape/3.png")
    put(folder / "asked", "cat/4.png")
    return folder / "data", folder / "asked"


SAYS: dict[str, Callable[[Path, Path], Mapping[str, Any]]] = {
    "model folder": lambda model, data: (model / "classes.txt").write_text("\n".join(ORDER)) and {},
    "model index": lambda model, data: (
        edit(model / "model_index.json", id2label={str(i): name for i, name in enumerate(ORDER)}) or {}),
    "beside the images": lambda model, data: (data / "classes.txt").write_text("\r\n".join(ORDER)) and {},
    "option": lambda model, data: {"classes": ",".join(ORDER)},
    "option with a file": lambda model, data: (
        (model.parent / "names").write_text("\n".join(ORDER)) and {"classes": str(model.parent / "names")}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAYS)
def test_classes_have_the_numbers_of_the_model(case: str, tmp_path: Path) -> None:
    """Training images of two of four classes, and pictures to explain of one."""
    model = conditional(tmp_path / "model", 4)
    data, asked = sides(tmp_path)
    with refuses("2 class names (ape, cat), but the model has 4 classes"):
        Request(model, data, asked, tmp_path / "run").task()
    findings = examine(Inputs(model, data, asked, tmp_path / "run"))
    assert any("their numbers are not known" in str(f) for f in findings if f.level == "error")
    options = SAYS[case](model, data)
    for queries in (asked, asked / "cat"):
        task = Request(model, data, queries, tmp_path / f"run {queries.name}", **options).task()
        assert task.train.labels is not None
        assert task.queries.labels is not None
        assert task.train.labels.tolist() == [1, 1, 2, 2]
        assert task.queries.labels.tolist() == [2]
        findings = examine(Inputs(model, data, queries, tmp_path / "other", **options))
        assert [str(f) for f in findings if f.level == "error"] == []


WRONG: dict[str, tuple[str, str]] = {
    "too many": ("a,b,c,d,e", "5 names, but the model has 4 classes"),
    "twice": ("ape,cat,ape", "names 'ape' twice"),
    "none": (",", "names no class"),
    "others": ("a,b,c,d", "label 'ape' is not a class; the classes are a, b, c, d"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_names_of_classes_are_told(case: str, tmp_path: Path) -> None:
    given, says = WRONG[case]
    data, asked = sides(tmp_path)
    model = conditional(tmp_path / "model", 4)
    with pytest.raises(WhenceError) as error:
        Request(model, data, asked, tmp_path / "run", classes=given).task()
    assert says in str(error.value)
    findings = examine(Inputs(model, data, asked, tmp_path / "run", classes=given))
    assert any(says in str(f) for f in findings if f.level == "error")


def test_names_beside_numbers_are_refused(tmp_path: Path) -> None:
    model = conditional(tmp_path / "model", 2)
    put(tmp_path / "data", "0.png", "1.png")
    metadata(tmp_path / "data", [{"file_name": f"{i}.png", "label": i} for i in range(2)])
    put(tmp_path / "asked", "ape/2.png", "cat/3.png")
    with refuses("the labels are names, but those of the training images are numbers"):
        Request(model, tmp_path / "data", tmp_path / "asked", tmp_path / "run").task()


# ------------------------------------------------------------------------------------------------------- files renamed


def test_a_renamed_file_keeps_its_place_and_its_score(tmp_path: Path) -> None:
    model, data, queries = pipeline(tmp_path / "model"), pictures(tmp_path / "data", 5), pictures(tmp_path / "q", 2, 1)
    metadata(data, [{"file_name": f"{i:02d}.png", "creator": f"c{i}"} for i in range(5)])
    first = attribute(model, data, queries, "d_trak", tmp_path / "run", **SETTINGS)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features").rglob("*.safetensors")}
    (data / "00.png").rename(data / "zz.png")
    (data / "03.png").rename(data / "aa.png")
    names = ["zz.png", "01.png", "02.png", "aa.png", "04.png"]
    metadata(data, [{"file_name": name, "creator": f"c{i}"} for i, name in enumerate(names)])
    again = attribute(model, data, queries, "d_trak", tmp_path / "run", **SETTINGS)
    assert torch.equal(again.values, first.values)
    assert list(again.train_ids) == names
    assert again.train_meta == first.train_meta
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "features").rglob("*.safetensors")}
    assert not [f for f in examine(Inputs(model, data, queries, tmp_path / "run")) if f.level == "error"]


def test_other_pictures_under_the_same_names_are_refused(tmp_path: Path) -> None:
    model, data, queries = pipeline(tmp_path / "model"), pictures(tmp_path / "data", 5), pictures(tmp_path / "q", 2, 1)
    Request(model, data, queries, tmp_path / "run").task()
    (tmp_path / "run" / "scores").mkdir()  # without results it goes on with the images that are the same
    pictures(data, 1, seed=9)
    with refuses("belongs to another model or data set"):
        Request(model, data, queries, tmp_path / "run").task()


def test_copies_of_a_picture_keep_their_places(tmp_path: Path) -> None:
    put(tmp_path / "d", "a.png", "c.png")
    (tmp_path / "d" / "b.png").write_bytes((tmp_path / "d" / "a.png").read_bytes())
    cache = tmp_path / "cache.json"
    before = list(image_folder(tmp_path / "d", 8, cache=cache).digests)
    (tmp_path / "d" / "a.png").rename(tmp_path / "d" / "z.png")
    images = image_folder(tmp_path / "d", 8, cache=cache)
    assert list(images.digests) == before
    assert sorted(images.ids) == ["b.png", "c.png", "z.png"]
    assert [image_folder(tmp_path / "d", 8).digests[row] for row in (0, 1, 2)] == [before[0], before[2], before[0]]
