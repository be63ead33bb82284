"""What a stranger has on the disk, situation by situation: what is read of it, and what is said of the rest."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_files import laid_out, metadata, opened, put

from errors import refuses
from test_doctor import pictures, pipeline
from test_packed import encoded, table, write_tar
from whence import attribute
from whence.data.images import image_folder
from whence.data.inspect import inspect_folder
from whence.doctor import Inputs, examine
from whence.models import open_model
from whence.types import WhenceError

WEIGHTS = "diffusion_pytorch_model"


def hub(folder: Path) -> None:
    """A data set of the Hub: README, .gitattributes, a table, a loose picture."""
    put(folder, "sample.png")
    for name in ("README.md", ".gitattributes"):
        (folder / name).touch()
    (folder / "data").mkdir()
    pq.write_table(table(range(4)), folder / "data" / "train-00000-of-00001.parquet")


def img2dataset(folder: Path) -> None:
    """A shard, and beside it a table and statistics that tell of it once more."""
    write_tar(folder / "00000.tar", {f"{i}.{kind}": encoded(i, (8, 8)) if kind == "jpg" else b"a cat"
                                     for i in range(3) for kind in ("jpg", "txt")})  # fmt: skip
    (folder / "00000.parquet").touch()
    (folder / "00000_stats.json").write_text("{}")


def odd_rows(folder: Path) -> None:
    put(folder, *(f"{i}.png" for i in range(4)))
    rows = [{"text": "a"}, {"text": None}, {"text": 3}]
    metadata(folder, [{"file_name": f"./{i}.png", **row} for i, row in enumerate(rows)])


def linked(folder: Path) -> None:
    put(folder.parent / "elsewhere", "cat/0.png")
    put(folder, "dog/1.png")
    os.symlink(folder.parent / "elsewhere" / "cat", folder / "cat")


READ: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    # what lies there -> names that are read, and what is said
    "a repository of the Hub": (hub, [f"data/train-00000-of-00001.parquet/{i}" for i in range(4)], "sample.png"),
    "shards of img2dataset": (img2dataset, [f"00000.tar/{i}.jpg" for i in range(3)], "00000.parquet, 00000_stats.json"),
    "odd rows": (odd_rows, ["0.png", "1.png", "2.png"], "`text` is missing for 1 of 3 images: 1.png"),
    "names of the world": (lambda f: put(f, "猫/é ü.png", "犬/😀.png"), ["犬/😀.png", "猫/é ü.png"], ""),
    "a linked class": (linked, ["cat/0.png", "dog/1.png"], ""),
    "small copies of a Synology disk": (lambda f: put(f, "a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg"), ["a.png"], ""),
    "copies of a notebook": (lambda f: put(f, "a.png", ".ipynb_checkpoints/a-checkpoint.png"), ["a.png"], ""),
}


@pytest.mark.parametrize("case", READ)
def test_what_is_read(case: str, tmp_path: Path) -> None:
    make, names, says = READ[case]
    folder = laid_out(make, tmp_path)
    images, told = opened(folder, skip=False)
    assert list(images.ids) == names
    assert images.batch(range(len(names))).x0.shape == (len(names), 3, 8, 8)
    assert says in told
    findings = [str(finding) for finding in examine(Inputs(None, folder, None, tmp_path / "run"))]
    assert any(says in line for line in findings)
    hidden = [str(path) for path in folder.rglob("*") if "@eaDir" in str(path) or ".ipynb" in str(path)]
    assert not hidden or any("1 hidden pictures or folders are skipped" in line for line in findings)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "captions of kohya's trainer": (
        lambda f: [put(f, f"{i}.png") or (f / f"{i}.txt").touch() for i in range(5)], "5 files are skipped (5 .txt)"),
    "two splits": (lambda f: put(f, "test/a.png", "train/b.png"), "such as {}/train"),
    "a page saved as a picture": (lambda f: (put(f, "a.png"), (f / "b.jpg").write_text("<html>")), "b.jpg: not a readable"),
    **{f"a table with {mark!r} between its columns": (
        lambda f, mark=mark: (put(f, "a.png"), (f / "metadata.csv").write_text(f"file_name{mark}text\na.png{mark}x\n")),
        f"separated by {mark!r}; accepted are commas") for mark in (";", "\t", "|")},
    "an empty file": (lambda f: (put(f, "a.png"), (f / "b.png").touch()), "0 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    make, says = REFUSED[case]
    folder = laid_out(make, tmp_path)
    with pytest.raises(WhenceError) as error:
        image_folder(folder, 8, skip=False).batch([0, 1])
    line = str(error.value)
    assert len(line.splitlines()) == 1
    assert says.format(folder) in line
    assert str(folder) in line
    assert any(
        says.format(folder) in str(f) for f in examine(Inputs(None, folder, None, tmp_path)) if f.level == "error"
    )


def test_modes_of_pictures(tmp_path: Path) -> None:
    """Upright, over white, the first frame, the high byte."""
    plain = np.zeros((8, 8, 3), np.uint8)
    plain[:4] = 255  # white above, black below
    picture, exif = Image.fromarray(plain), Image.Exif()
    exif[0x112] = 3  # upside down
    picture.rotate(180).save(tmp_path / "exif.png", exif=exif)
    picture.convert("CMYK").save(tmp_path / "cmyk.tif")
    picture.save(tmp_path / "anim.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
    Image.fromarray(plain[..., 0].astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    palette = picture.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))  # white is transparent: over white
    images, _ = opened(tmp_path)
    expected = torch.tensor(plain).permute(2, 0, 1) / 127.5 - 1
    for row, name in enumerate(images.ids):
        assert torch.allclose(images.batch([row]).x0[0], expected, atol=0.02), name


def moved(model: Path) -> None:
    (model / "unet" / f"{WEIGHTS}.safetensors").rename(model / "unet" / f"{WEIGHTS}.fp16.safetensors")


def pickled(model: Path) -> None:
    (model / "unet" / f"{WEIGHTS}.safetensors").rename(model / "unet" / f"{WEIGHTS}.bin")


def both(model: Path) -> None:
    weights = load_file(model / "unet" / f"{WEIGHTS}.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, model / "unet" / f"{WEIGHTS}.fp16.safetensors", {"format": "pt"})


def sharded(model: Path) -> None:
    network = open_model(model).final.load()
    (model / "unet" / f"{WEIGHTS}.safetensors").unlink()
    network.save_pretrained(model / "unet", max_shard_size="20KB")  # type: ignore[operator]


def deepspeed(model: Path) -> None:
    (model / "checkpoint-500" / "pytorch_model").mkdir(parents=True)
    (model / "checkpoint-500" / "latest").write_text("pytorch_model")


MODELS: dict[str, tuple[Callable[[Path], None], bool, str]] = {
    # what is done to a model folder -> whether it is opened, and what the doctor says
    "weights as a pickle": (pickled, False, "only pickles, which whence never opens"),
    "the fp16 variant alone": (moved, False, "no weights that are opened"),
    "two variants": (both, True, f"{WEIGHTS}.safetensors is read, and not {WEIGHTS}.fp16.safetensors"),
    "shards": (sharded, True, ""),
    "a checkpoint of DeepSpeed": (deepspeed, True, "has no unet/ (it holds latest, pytorch_model)"),
}


@pytest.mark.parametrize("case", MODELS)
def test_model_folders(case: str, tmp_path: Path) -> None:
    change, opens, says = MODELS[case]
    model = pipeline(tmp_path / "model")
    before = open_model(model).final.load().state_dict()
    change(model)
    os.symlink(model, tmp_path / "link")
    findings = examine(Inputs(tmp_path / "link", None, None, tmp_path / "run"))
    assert any(says in str(finding) for finding in findings)
    assert any(finding.level == "error" for finding in findings) != opens
    if not opens:
        with refuses(says):
            open_model(tmp_path / "link")
        return
    found = open_model(tmp_path / "link").final.load().state_dict()
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_pictures_to_explain_among_the_training_images_are_told(tmp_path: Path) -> None:
    train, queries = pictures(tmp_path / "train", 4), pictures(tmp_path / "queries", 2, 1)
    shutil.copy(queries / "00.png", train / "zz.png")
    findings = examine(Inputs(None, train, queries, tmp_path / "run"))
    assert any("1 of 2 images are byte-identical to training images: 00.png = zz.png" in str(one) for one in findings)
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"^query images: 1 of 2 .*00\.png = zz\.png"):
        attribute(pipeline(tmp_path / "model"), train, queries, "pixel_dot", run)


def test_cropped_pictures_are_told(tmp_path: Path) -> None:
    """By the one rule that crops: a side that is longer by less than a pixel of the result is whole."""
    for name, size in {"square": (32, 32), "nearly": (320, 319), "wide": (40, 32), "tall": (8, 9)}.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "0.png")
        images, found = image_folder(tmp_path / name, 16), inspect_folder(tmp_path / name, 16)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            images.batch([0])
        cropped = name in ("wide", "tall")
        assert [str(one.message) for one in told] == cropped * [
            f"{tmp_path / name}: of pictures that are not square only the centre is read"
        ]
        assert any("not square" in str(one) for one in found) == cropped
    assert image_folder(tmp_path / "wide").batch([0]).x0.shape == (1, 3, 32, 40), "nothing is cropped without a size"
